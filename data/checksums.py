"""Checksums of a stream of bytes, by the names that stores give them."""

import hashlib
import os
from collections.abc import Callable

OWN = "sha256"
"""Of a file for which no store gives one."""

_BLOCK = 2**22


class Digests:
    """kinds: `md5`, `etag` (MD5, too), `sha256`, `crc32c`."""

    def __init__(self, kinds: tuple[str, ...]):
        self.running = {kind: _new(kind) for kind in kinds or (OWN,)}

    def update(self, chunk) -> None:
        for running in self.running.values():
            running.update(chunk)

    def hexadecimal(self) -> dict[str, str]:
        return {kind: running.hexdigest() for kind, running in self.running.items()}

    def of_file(self, fd: int, say: Callable[[], None]) -> dict[str, str]:
        """Of a whole file. say: called after each block."""
        at = 0
        while block := os.pread(fd, _BLOCK, at):
            self.update(block)
            at += len(block)
            say()
        return self.hexadecimal()


def computable(checksums: dict[str, str]) -> dict[str, str]:
    """Those of a store's that can be computed here."""
    return {kind: digest for kind, digest in checksums.items() if kind != "crc32c" or _has_crc32c()}


def _new(kind: str):
    return _Crc32c() if kind == "crc32c" else hashlib.new("md5" if kind == "etag" else kind, usedforsecurity=False)


def _has_crc32c() -> bool:
    try:
        import google_crc32c  # noqa: F401  comes with gcsfs
    except ImportError:
        return False
    return True


class _Crc32c:
    def __init__(self):
        import google_crc32c

        self.checksum = google_crc32c.Checksum()

    def update(self, chunk) -> None:
        self.checksum.update(bytes(chunk))

    def hexdigest(self) -> str:
        return self.checksum.digest().hex()
