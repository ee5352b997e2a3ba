"""What becomes of a signal that asks this process to end, from its first line on.

- SIGTERM and SIGUSR1 (a scheduler's warning) leave at once with exit code 75 as long as there is nothing to save: while
  libraries are imported, while ranks wait for each other, in an evaluation. Python alone would answer only when the
  main thread comes back from C; a thread that the operating system's own handler wakes does not wait for it.
- Inside `postponed` they are a request that `requested` tells of, as is Ctrl-C. Ctrl-C once more, a second or more
  later, leaves at once: launchers pass the first one on, so that it comes twice.
- A rank whose launcher is gone asks itself to end: nobody is left to pass a signal on, or to hear its exit code.

Imports nothing heavy: a door calls `listen` before anything else.
"""

import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PREEMPTED = 75  # EX_TEMPFAIL: schedulers that requeue on a code can use it
INTERRUPTED = 130  # what shells make of Ctrl-C
PARENT = "PRELUDE_PARENT"  # in the environment: the process without which this one has no reason to go on

_ENDING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_SAME_INTERRUPT = 1.0  # seconds within which a second Ctrl-C is the first, passed on by a launcher
_SAVING = "the step under way is finished and saved"


class _State:
    listening = False
    interruptible = False  # Ctrl-C is a KeyboardInterrupt, which the door catches
    postponed = False
    asked = False
    obeyed = False  # a request to end was heard and has been done
    then: Callable[[], None] | None = None
    besides: Callable[[], bool] | None = None
    interrupted_at: float | None = None
    before_leaving: list[Callable[[int], None]] = []


def listen() -> None:
    """Takes over the signals that end a process. For the main thread of a door, as its first act."""
    if _State.listening:
        return
    _State.listening = True
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    _State.pipe = (reader, writer)  # kept: the operating system's handler writes to it
    signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    _handle()
    threading.Thread(target=_heed, args=(reader, _lifelines()), daemon=True, name="signals").start()


def interruptible() -> None:
    """From here on Ctrl-C is a KeyboardInterrupt, so that what is half done is cleared away."""
    _State.interruptible = True


@contextmanager
def postponed(then: Callable[[], None] | None = None, besides: Callable[[], bool] | None = None) -> Iterator[None]:
    """Inside, who asks the process to end is heard and not obeyed: see `requested`. Calls `then` at each request.

    besides: whether the process is asked to end in another way than by a signal, see `wanted`.
    """
    _State.postponed, _State.asked, _State.then, _State.besides = True, False, then, besides
    before = {} if _State.listening or not _in_main_thread() else _handle()
    try:
        yield
    finally:
        _State.obeyed = _State.obeyed or _State.asked
        _State.postponed, _State.asked, _State.then, _State.besides = False, False, None, None
        for number, handler in before.items():
            signal.signal(number, handler)


def requested() -> bool:
    """Whether this process was asked to end since `postponed` began; never outside of it."""
    return _State.asked


def wanted() -> bool:
    """`requested`, or asked for in the other way that `postponed` was told of. For who waits at the end of a run."""
    return _State.asked or (_State.besides is not None and _State.besides())


def before_leaving(act: Callable[[int], None]) -> None:
    """Has `act` called with the exit code when a signal ends the process at once. It must not wait long."""
    _State.before_leaving.append(act)


def _handle() -> dict:
    """Returns the handlers that were there. What is ignored (a shell's background job ignores Ctrl-C) stays so."""
    heard = [number for number in _ENDING if signal.getsignal(number) is not signal.SIG_IGN]
    return {number: signal.signal(number, _handler) for number in heard}


def _handler(number: int, _) -> None:
    """Runs in the main thread, between two steps of Python."""
    if _State.postponed:
        again = _State.asked
        _State.asked = True
        if not again and _State.then is None:
            more = "; Ctrl-C again leaves at once" if number == signal.SIGINT else ""
            _say(f"{signal.Signals(number).name}: {_SAVING}{more}")
        if _State.then:
            _State.then()
    elif number == signal.SIGINT and _State.interruptible:
        raise KeyboardInterrupt


def _heed(reader: socket.socket, lifelines: dict[int, str]) -> None:
    """The thread: ends the process at once where that is right, whatever the main thread is busy with."""
    while True:
        if select.select([reader], [], [], 1.0)[0]:
            for number in reader.recv(64):
                _obey(number)
        for pid in [pid for pid in lifelines if not _is_there(pid)]:
            _say(f"{lifelines.pop(pid)} is gone: asking this run to end")
            os.kill(os.getpid(), signal.SIGTERM)


def _obey(number: int) -> None:
    if number == signal.SIGINT:
        first, now = _State.interrupted_at, time.monotonic()
        _State.interrupted_at = now if first is None else first
        again = first is not None and now - first > _SAME_INTERRUPT
        if again or not (_State.postponed or _State.interruptible):
            _leave(INTERRUPTED, "interrupted")
    elif number in _ENDING and not _State.postponed:
        why = "" if _State.obeyed else ", as there was nothing to save; run it again"
        _leave(PREEMPTED, f"{signal.Signals(number).name}: ended at once{why}")


def _leave(code: int, text: str) -> None:
    for act in _State.before_leaving:
        act(code)
    _say(text)
    os._exit(code)


def _say(text: str) -> None:
    """Past Python's buffers, whose lock the interrupted main thread may hold; on the first rank only."""
    if (os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0") == "0":
        with suppress(OSError):  # the terminal may have gone first
            os.write(2, f"{text}\n".encode())


def _lifelines() -> dict[int, str]:
    """Processes whose end is a signal to this one. Only those that hand out ranks: whoever closes the shell that
    started a run does not ask it to end."""
    found = {}
    if "TORCHELASTIC_RUN_ID" in os.environ or {"LOCAL_SIZE", "CROSS_RANK"} <= os.environ.keys():
        found[os.getppid()] = "the launcher"
        found |= _deepspeed_command(os.getppid())
    if os.environ.get(PARENT, "").isdigit():
        found[int(os.environ[PARENT])] = "the process that started this run"
    return found


def _deepspeed_command(launch: int) -> dict[int, str]:
    """DeepSpeed's launcher on one host is the child of the command that a person started and signals."""
    try:
        parent = int(Path(f"/proc/{launch}/stat").read_text().rpartition(")")[2].split()[1])
        is_it = b"deepspeed" in Path(f"/proc/{parent}/cmdline").read_bytes()
    except (OSError, ValueError):
        return {}
    return {parent: "the deepspeed command"} if is_it else {}


def _is_there(pid: int) -> bool:
    if pid == _PARENT:  # one that nobody has waited for yet still has its number
        return os.getppid() == pid
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, PermissionError):  # gone, or the number is somebody else's by now
        return False
    return True


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


_PARENT = os.getppid()
