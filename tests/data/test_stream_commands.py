"""Streams against a server on this machine that stalls, hangs up, refuses or has nothing to give."""

import contextlib
import os
import threading
import time

import psutil
import pytest
from servers import Server, serving

from prelude.data import streaming
from prelude.data.batch import View, ViewPlan
from prelude.data.errors import RunStopped, Stopped
from prelude.data.streaming import StreamingLoader

PLAN = ViewPlan((View((6, 6)),))
COMMANDS = ("curl", "sleep")


@pytest.fixture
def server(write_shards):
    """The address of a server of one tar of 20 samples, under any name; names that begin so misbehave."""
    with open(write_shards([20])[0], "rb") as file:
        tar = file.read()
    with serving(Server(default=tar)) as running:
        yield running.url


def build(urls, **changes):
    """Streams, of what would be fetched whole if it were not asked for so."""
    settings = dict(seed=5, micro_batch=4, num_samples=35) | changes
    return StreamingLoader([urls] if isinstance(urls, str) else urls, PLAN, **settings)


def commands():
    found = []
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended
            found += [child] if child.name() in COMMANDS else []
    return found


def all_are_gone() -> None:
    """A command that was killed may be listed for a moment longer."""
    until = time.monotonic() + 10
    while commands() and time.monotonic() < until:
        time.sleep(0.05)
    assert not commands()


def exhaust(loader):
    while True:
        next(loader)


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize(
    "name, reason",
    [
        ("404.tar", "curl: .22. .* 404"),
        ("503.tar", "curl: .22. .* 503"),
        (":1/refused.tar", "curl: .7. Failed to connect"),
        ("//no.such.host.invalid/x.tar", "curl: .6. Could not resolve host"),
    ],
)
def test_a_server_that_gives_nothing_ends_the_run_with_its_reason(name, reason, num_workers, server):
    url = (
        f"http:{name}" if name.startswith("//") else f"http://127.0.0.1{name}" if name[0] == ":" else f"{server}/{name}"
    )
    loader = build(url, num_workers=num_workers)
    with pytest.raises(RunStopped, match=f"cannot be read.* in {url} .{reason}"):
        next(loader)
    loader.close()


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("name", ["silent", "stalls"])
def test_a_server_that_stalls_is_named_and_given_up(name, num_workers, server, patience):
    patience.timeout_seconds = 3
    loader = build(f"{server}/{name}", num_workers=num_workers)
    with pytest.raises(RunStopped, match=f"for 3 seconds while waiting for the next batch.*{server}/{name}"):
        exhaust(loader)
    loader.close()
    all_are_gone()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_stop_is_obeyed_while_a_server_stalls(num_workers, server, patience):
    loader = build(f"{server}/silent", num_workers=num_workers)
    patience.should_stop = lambda: time.monotonic() > began + 0.2 and bool(commands())
    began = time.monotonic()
    with pytest.raises(Stopped, match=f"it reads {server}/silent"):
        next(loader)
    loader.close()
    all_are_gone()


def test_a_command_that_starts_while_the_loader_is_closed_is_ended(patience, monkeypatch):
    loader, open_url, closed = build("pipe:exec sleep 1000"), streaming.open_url, threading.Event()

    def opened(*arguments):
        command = open_url(*arguments)
        patience.should_stop = lambda: True
        closed.wait()
        return command

    monkeypatch.setattr(streaming, "open_url", opened)
    with pytest.raises(Stopped):
        next(loader)
    loader.close()
    closed.set()
    all_are_gone()


def test_a_stalled_server_among_others_is_passed(server, patience):
    patience.timeout_seconds = 8  # a quarter of it for each shard
    loader = build([f"{server}/silent", *(f"{server}/good{n}" for n in range(20))])
    while not any("silent" in shard for shard, _ in loader.bad.counts):
        assert len(next(loader)) == 4
    assert len(next(loader)) == 4
    loader.close()


def test_a_transfer_that_breaks_off_is_damage(server):
    loader = build(f"{server}/hangs-up")
    for _ in range(40):
        assert len(next(loader)) == 4
    reasons = {reason for _, reason in loader.bad.counts}
    assert reasons and all("curl: (18)" in reason for reason in reasons)
    loader.close()


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("members", [[], [("README", b"no dot")], [("folder/x", b"")]])
def test_a_command_that_prints_a_tar_without_samples_ends_the_run(members, num_workers, tmp_path, write_tar):
    path = write_tar(tmp_path / "x.tar", members)
    loader = build(f"pipe:cat {path}", num_workers=num_workers)
    with pytest.raises(RunStopped, match=f"cannot be read.* in pipe:cat {path} .a tar without a single sample"):
        next(loader)
    loader.close()


def test_a_tar_without_images_ends_the_run(tmp_path, write_tar):
    path = write_tar(tmp_path / "x.tar", [(f"{n}.txt", b"") for n in range(200)])
    loader = build(f"pipe:cat {path}")
    with pytest.raises(RunStopped, match="cannot be read.* .no image"):
        next(loader)
    loader.close()


def test_a_command_that_fails_between_two_members_is_damage(write_shards):
    loader = build(f"pipe:head -c {5 * 2048} {write_shards([20])[0]}; exit 3")  # four blocks a sample
    for _ in range(20):
        assert len(next(loader)) == 4
    assert {reason for _, reason in loader.bad.counts} == {"the command ended with 3"}
    loader.close()


def test_a_command_that_goes_on_after_its_tar_is_ended(write_shards):
    loader = build(f"pipe:cat {write_shards([20])[0]}; exec >&-; exec sleep 1000")
    next(loader)
    loader.close()
    all_are_gone()


@pytest.mark.parametrize("url, num_workers", [("SERVER/silent", 1), ("pipe:exec sleep 1000", 0)])
def test_what_hangs_ends_with_a_process_that_is_killed(url, num_workers, server, run_python):
    """The worker, and the command that it or the process itself reads from."""
    code = (
        "import sys, prelude.data.streaming as data\nfrom prelude.data.batch import View, ViewPlan\n"
        "plan, rest = ViewPlan((View((6, 6)),)), dict(seed=0, micro_batch=4, num_samples=9)\n"
        "next(data.StreamingLoader([sys.argv[1]], plan, num_workers=int(sys.argv[2]), **rest))\n"
    )
    process = run_python(code, url.replace("SERVER", server), num_workers)
    until = time.monotonic() + 100
    while not (found := psutil.Process(process.pid).children(recursive=True)) or found[-1].name() not in COMMANDS:
        assert time.monotonic() < until
        time.sleep(0.05)
    assert len(found) == num_workers + 1
    os.kill(process.pid, 9)
    while any(child.is_running() and child.status() != "zombie" for child in found):
        assert time.monotonic() < until
        time.sleep(0.05)
