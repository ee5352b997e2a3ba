"""Shards that are no local files, as the output of the commands that webdataset opens them with.

- A command that fails before the tar's end is an error in its own words, even where it was cut between two members.
- A command that prints nothing for `stall_seconds` is left. Nothing is tried again in mid-transfer, which would print
  the beginning twice; the stream goes on with another shard.
- A stream that is closed, or whose process is killed, ends its command, whatever that waits for.
"""

import atexit
import os
import select
import subprocess
import weakref

from webdataset import utils
from webdataset.gopen import Pipe, gopen, gopen_curl, gopen_pipe, gopen_schemes, rewrite_url

from prelude.data.errors import UserError
from prelude.data.shards import is_remote
from prelude.data.waiting import end_with_parent

CONNECT_SECONDS = 30
_BROKEN_PIPE = (141, -13)  # of a shell and of a process: we stopped reading
_LAST_WORDS_SECONDS = 5


def refuse_unknown_schemes(urls: list[str]) -> None:
    """Raises UserError for a URL that webdataset does not know how to open."""
    for url in filter(is_remote, urls):
        scheme = url.partition(":")[0]
        if scheme not in gopen_schemes:
            raise UserError(
                f"{url} cannot be opened: the scheme {scheme} is not known; write a command that prints the tar, "
                f"such as 'pipe:aws s3 cp s3://bucket/000.tar -'."
            )


def open_url(url: str, stall_seconds: float):
    """A file to be read to its end and closed. Raises OSError and ValueError."""
    url = rewrite_url(url)
    # A command ends with its reader, which a silent one would not notice the end of.
    settings = {"mode": "rb", "bufsize": 0, "preexec_fn": end_with_parent}
    opens = gopen_schemes.get(url.partition(":")[0])
    if opens is gopen_pipe and not utils.enforce_security:
        return _Command(Pipe(url.removeprefix("pipe:"), shell=True, **settings), stall_seconds)
    if opens is not gopen_curl:
        opened = gopen(url)
        return _Command(opened, stall_seconds) if isinstance(opened, Pipe) else opened
    connect = f"{min(CONNECT_SECONDS, stall_seconds):.3f}"
    curl = ["curl", "--silent", "--show-error", "--fail", "--location", "--connect-timeout", connect, url]
    return _Command(Pipe(curl, stderr=subprocess.PIPE, **settings), stall_seconds)


class _Command:
    """What a command prints."""

    def __init__(self, pipe: Pipe, stall_seconds: float):
        self.pipe, self.process, self.stall_seconds = pipe, pipe.proc, stall_seconds
        self.fd, self.ready = pipe.stream.fileno(), select.poll()
        self.ready.register(self.fd, select.POLLIN)
        _running.add(self)

    def read(self, size: int) -> bytes:
        """`size` bytes, or what is left. Raises OSError when the command has failed or prints nothing more."""
        content = bytearray()
        while len(content) < size:
            if not self.ready.poll(self.stall_seconds * 1000):
                raise OSError(f"nothing has come for {self.stall_seconds:g} seconds")
            some = os.read(self.fd, size - len(content))
            if not some:
                break
            content += some
        if not content:  # only now, so that what came before the failure is not lost with it
            self._check()
        return bytes(content)

    def _check(self) -> None:
        try:
            code = self.process.wait(_LAST_WORDS_SECONDS)
        except subprocess.TimeoutExpired:
            return  # it has closed its output and does something else, which close() ends
        if code and code not in _BROKEN_PIPE:
            words = self.process.stderr.read().decode(errors="replace").split() if self.process.stderr else []
            raise OSError(" ".join(words) or f"the command ended with {code}")

    def close(self) -> None:
        self.end()
        self.pipe.stream.close()
        if self.process.stderr:
            self.process.stderr.close()
        self.process.wait()

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()


_running: weakref.WeakSet = weakref.WeakSet()


@atexit.register
def _end_all() -> None:
    for command in list(_running):
        command.end()
