"""Ranks that find each other, as threads of one process, and what each of them says where one does not come."""

import socket
from concurrent.futures import ThreadPoolExecutor

import pytest

from prelude.data.errors import RunStopped, UserError
from prelude.pretrain.meeting import Meeting, meet

WAIT = 60.0


@pytest.fixture(autouse=True)
def port(monkeypatch) -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        number = probe.getsockname()[1]
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(number))
    return number


def of_ranks(*ranks: int, world_size: int, limit: float, holding=lambda rank: {}) -> list[Meeting | Exception]:
    def one(rank: int):
        try:
            return meet(rank, world_size, limit=limit, warn_after=limit / 2, holds=holding(rank))
        except (UserError, RunStopped) as error:
            return error

    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(one, ranks))


def test_all_meet_and_rank_0_knows_every_host(port):
    meetings = of_ranks(2, 1, 0, world_size=3, limit=WAIT)
    assert [meeting.keeps_store for meeting in meetings] == [False, False, True]
    assert meetings[2].hosts == (socket.gethostname(),) * 3
    assert {meeting.address for meeting in meetings} == {("127.0.0.1", port)}
    meetings[0].connect().set("word", "heard")
    assert meetings[1].store.get("word") == b"heard"


def test_all_are_told_with_how_many_they_share_what_they_were_given():
    meetings = of_ranks(
        0, 1, 2, 3, world_size=4, limit=WAIT, holding=lambda rank: {"cores": "0,1" if rank else "2", "GPU": str(rank)}
    )
    assert [dict(meeting.sharing) for meeting in meetings] == [
        {"cores": 1, "GPU": 1},
        *({"cores": 3, "GPU": 1} for _ in range(3)),
    ]


def test_those_who_came_all_name_those_who_did_not(capsys):
    first, third = of_ranks(0, 2, world_size=4, limit=3.0)
    assert isinstance(first, RunStopped) and "Ranks 1, 3 of 4 did not come" in str(first)
    assert str(third) == str(first)
    assert capsys.readouterr().err.startswith("warning: Ranks 1, 3 of 4 not here after ")


def test_a_rank_that_finds_its_place_taken_does_not_disturb_who_has_it(port):
    meetings = of_ranks(0, 1, world_size=2, limit=WAIT)
    (stranger,) = of_ranks(1, world_size=2, limit=WAIT)
    assert isinstance(stranger, UserError) and f"Port {port} is taken: another job's rank 1" in str(stranger)
    assert meetings[0].store.check(["came/1"])


def test_whatever_else_holds_the_port_is_told(port):
    with socket.socket() as other:
        other.bind(("127.0.0.1", port))
        other.listen()
        (refused,) = of_ranks(0, world_size=2, limit=WAIT)
    assert isinstance(refused, UserError) and f"--master_port {port + 1}" in str(refused)


def test_an_address_that_has_no_host_is_told(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "no-such-host.invalid")
    (refused,) = of_ranks(1, world_size=2, limit=0.1)
    assert isinstance(refused, RunStopped) and "found no rank 0 at no-such-host.invalid" in str(refused)
