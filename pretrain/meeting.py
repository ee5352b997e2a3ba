"""How the ranks of a job find each other at start, and who is named when one does not come.

Rank 0 keeps a store on MASTER_PORT (under torchrun its agent does); each rank writes its host there. What goes wrong is
one sentence: a port that is taken, an address where nobody answers, ranks that never started.
"""

import os
import socket
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from types import MappingProxyType

import torch.distributed as dist

from prelude.data.counting import shortened
from prelude.data.errors import RunStopped, UserError, cause_of

_LOOK_EVERY = 0.2  # seconds
_LOOKS_A_SECOND = 256  # of all ranks together, at rank 0's store


@dataclass(frozen=True)
class Meeting:
    """Where all ranks have met."""

    rank: int
    world_size: int
    address: tuple[str, int]
    store: dist.Store
    keeps_store: bool  # in this process
    hosts: tuple[str, ...]  # of all ranks; only of those up to this one except on rank 0
    sharing: Mapping[str, int]  # ranks of this host that hold the same as this one, itself included; by what is held

    def connect(self) -> dist.Store:
        """A connection of its own: one that waits keeps nobody else waiting."""
        return _prefixed(dist.TCPStore(*self.address, is_master=False, wait_for_workers=False))

    def gather(self, nth: int) -> None:
        """Returns once all ranks have come to this place, which is the nth. Raises dist.DistError."""
        place = f"gathered/{nth}"
        self.store.add(place, 1)
        while self.store.add(place, 0) < self.world_size:
            time.sleep(max(_LOOK_EVERY, self.world_size / _LOOKS_A_SECOND))


def meet(
    rank: int, world_size: int, *, limit: float, warn_after: float, holds: Mapping[str, str] = MappingProxyType({})
) -> Meeting:
    """Returns once all ranks have come. holds: what this rank was given of its host, by kind; the meeting tells with
    how many ranks it is shared.

    Raises UserError when the port is taken, RunStopped after `limit` seconds; who is missing is printed after
    `warn_after` seconds.
    """
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    keeps_store = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    until = time.monotonic() + limit
    store = _prefixed(_keep(address, limit) if keeps_store else _reach(rank, address, limit, warn_after))
    try:
        me = f"{socket.gethostname()} {os.getpid()} {time.time_ns()}"
        if store.compare_set(f"came/{rank}", "", me).decode() != me:
            raise UserError(_taken(address, f"another job's rank {rank} has come there"))
        held = {kind: f"holds/{kind}/{socket.gethostname()}/{what}" for kind, what in holds.items()}
        for key in held.values():
            store.add(key, 1)
        store.set(f"here/{rank}", "")
        if rank == 0:
            _wait_for_all(store, world_size, address, until, warn_after)
        else:
            _wait_for_first(store, rank, address, until)
        hosts = [store.get(f"came/{other}").decode().split()[0] for other in range(world_size if rank == 0 else 1)]
        sharing = {kind: store.add(key, 0) for kind, key in held.items()}
    except dist.DistError as error:
        raise RunStopped(
            f"Rank {rank} on {socket.gethostname()} lost the store at {_text(address)} while it waited for the others "
            f"({first_line(error)}); rank 0 has most likely ended, and says why."
        ) from None
    return Meeting(rank, world_size, address, store, keeps_store, tuple(hosts), sharing)


def first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".")


def _prefixed(store: dist.Store) -> dist.Store:
    """Ranks that torchrun starts again find the store of those before them."""
    return dist.PrefixStore(f"prelude/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _keep(address: tuple[str, int], limit: float) -> dist.Store:
    try:
        return dist.TCPStore(*address, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=limit))
    except dist.DistError as error:
        if "EADDRINUSE" in str(error) or "address already in use" in str(error).lower():
            raise UserError(_taken(address, f"it is in use on {socket.gethostname()}")) from None
        raise UserError(
            f"Rank 0 cannot keep its store at {_text(address)} ({first_line(error)}); MASTER_ADDR has to be the host "
            "of rank 0."
        ) from None


def _reach(rank: int, address: tuple[str, int], limit: float, warn_after: float) -> dist.Store:
    """Connects to rank 0's store. A plain connection is tried first: torch's own attempts cannot be interrupted, and
    say in forty lines that nobody answers."""
    started, warned = time.monotonic(), False
    while why := _unreachable(address):
        waited = time.monotonic() - started
        if waited > limit:
            raise RunStopped(
                f"Rank {rank} on {socket.gethostname()} found no rank 0 at {_text(address)} in {waited:.0f} s ({why}); "
                "see whether rank 0 has started there, and whether this host may reach that port."
            )
        if waited > warn_after and not warned:
            warned = True
            _warn(f"rank {rank} on {socket.gethostname()} still waits for rank 0 at {_text(address)} ({why})")
        time.sleep(_LOOK_EVERY)
    try:
        return dist.TCPStore(*address, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=limit))
    except dist.DistError as error:
        raise UserError(_taken(address, f"what answers there is no rank 0 ({first_line(error)})")) from None


def _unreachable(address: tuple[str, int]) -> str:
    """Why nobody answers there; "" where somebody does."""
    try:
        socket.create_connection(address, timeout=2).close()
        return ""
    except OSError as error:
        return cause_of(error)


def _wait_for_all(store: dist.Store, world_size: int, address, until: float, warn_after: float) -> None:
    started, missing, warned = time.monotonic(), list(range(world_size)), False
    while missing := [rank for rank in missing if not store.check([f"here/{rank}"])]:
        waited = time.monotonic() - started
        if time.monotonic() > until:
            here = sorted({store.get(f"came/{rank}").decode().split()[0] for rank in range(world_size)
                           if rank not in missing})  # fmt: skip
            sentence = (
                f"{named(missing)} of {world_size} did not come to {_text(address)} in {waited:.0f} s, while those of "
                f"{', '.join(here)} did; see what they printed and whether their host can reach that port, then start "
                "the same command again."
            )
            store.set("missing", sentence)
            time.sleep(5 * _LOOK_EVERY)  # the others read it before this process takes the store along
            raise RunStopped(sentence)
        if waited > warn_after and not warned:
            warned = True
            _warn(f"{named(missing)} of {world_size} not here after {waited:.0f} s, still waiting")
        time.sleep(_LOOK_EVERY)
    store.set("all", "here")


def _wait_for_first(store: dist.Store, rank: int, address, until: float) -> None:
    while not store.check(["all"]):
        if store.check(["missing"]):
            raise RunStopped(store.get("missing").decode())
        if time.monotonic() > until + 10 * _LOOK_EVERY:
            raise RunStopped(
                f"Rank {rank} on {socket.gethostname()} waited for the other ranks at {_text(address)}, and rank 0 "
                "does not answer; see what it printed."
            )
        time.sleep(_LOOK_EVERY)


def named(ranks: list[int], most: int = 8) -> str:
    listed = shortened([str(rank) for rank in ranks], most)
    return f"Rank {listed}" if len(ranks) == 1 else f"Ranks {listed}"


def _taken(address: tuple[str, int], why: str) -> str:
    port = address[1]
    other = port + 1 if port < 65535 else 29500
    return (
        f"Port {port} is taken: {why}. Start with another, as in deepspeed --master_port {other} or torchrun "
        f"--master_port {other}, or under srun and mpirun with MASTER_PORT={other}."
    )


def _text(address: tuple[str, int]) -> str:
    return f"{address[0]}:{address[1]}"


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)
