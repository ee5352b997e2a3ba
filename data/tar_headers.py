"""From the headers of a tar to its members: names, offsets and sizes, whatever is damaged.

- Reads ustar with prefixes, GNU long names, PAX paths and sizes, base-256 sizes, old (v7) headers. Every header's
  checksum is verified.
- A member is believed when a sound header, or the archive's end, follows where its size says. Where none does, its
  bytes are searched first: a header among them means that the size is wrong, and only this member is lost.
- After any damage the walk goes on at the next sound header, so that it costs what is damaged and not the rest.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

BLOCK = 512
TAIL = 4096  # bytes at a member's end that are read with the header behind them: mostly the same page
_RECORD = 10240  # what tar fills its end up to, unless told otherwise
_LARGEST_RECORD = 2**20
_MAX_EXTENDED_HEADER = 2**20
_SCAN = 2**20
_SEARCHED = 2**26  # of a member: where its size is wrong, the next header comes after its true content
_ZEROS = bytes(BLOCK)
_EXTENDED = (b"x", b"g", b"L", b"K")
_REGULAR = (b"0", b"\0", b"7")
_LINKS = (b"1", b"2")
_WITHOUT_CONTENT = (b"1", b"2", b"3", b"4", b"5", b"6")  # links, devices, folders, whatever their size field says
_USTAR = re.compile(rb"ustar(?=\0|  \0)")
_IN_A_NUMBER = np.isin(np.arange(256), list(b"01234567 \0"))


class Member(NamedTuple):
    name: str
    offset: int  # of the content, bytes from the start of the tar
    size: int
    is_file: bool = True  # False: a link
    tail: bytes = b""  # the last bytes of the content, at most `TAIL`


class Damage(NamedTuple):
    reason: str  # one of few, so that problems can be counted
    where: str  # a member's name or a byte offset
    num_bytes: int  # that no sound member covers
    at_least: int = 1  # samples that must be lost by it


@dataclass(slots=True)
class _Last:
    """The member before, until what follows shows that its size is right."""

    header: int  # offset, bytes
    content: int
    size: int
    name: str
    kind: str  # file, link, or "" for what is of no interest


class Walk:
    """The members of an open tar of `end` bytes, once. `damage` and `ended` are complete when the iteration is.

    ended: whether the tar has its end marker. Without, it may have been cut off between two members.
    """

    def __init__(self, fd: int, end: int):
        self.fd, self.end = fd, end
        self.damage: list[Damage] = []
        self.ended = False

    def __iter__(self) -> Iterator[Member]:
        offset, last, extended = 0, None, {}
        while offset is not None:
            tail, block = self._read(offset, last)
            header = parse(block) if len(block) == BLOCK else None
            if header is None:
                inner = self._header_within(last, offset)
                if inner is not None:
                    self._lose("wrong size", last.name, inner - last.header)
                else:
                    if last is not None and last.kind:
                        yield Member(last.name, last.content, last.size, last.kind == "file", tail)
                    inner = self._after_damage(offset, block)
                offset, last, extended = inner, None, {}
                continue
            if last is not None and last.kind:
                yield Member(last.name, last.content, last.size, last.kind == "file", tail)
            offset, last, extended = self._member(offset, block, header, extended)

    def _member(self, offset: int, block: bytes, header: tuple, extended: dict):
        """What a sound header says: (offset of the next one, this member, what extends the next one)."""
        name, size, kind = header
        content = offset + BLOCK
        if kind not in _EXTENDED:
            name, size = extended.get("path", name), extended.get("size", size)
            size = 0 if kind in _WITHOUT_CONTENT else size
            content += self._sparse_map(block, content) if kind == b"S" else 0
        if content + size > self.end or (kind in _EXTENDED and size > _MAX_EXTENDED_HEADER):
            following = next_sound_header(self.fd, offset + BLOCK, self.end)
            reason = "cut short" if following is None else "wrong size"
            self._lose(reason, name or f"byte {offset}", (following or self.end) - offset)
            return following, None, {}
        last = _Last(offset, content, size, name, "")
        if kind in _EXTENDED:
            says = _extended(kind, os.pread(self.fd, size, content)) if kind in (b"x", b"L") else {}
            extended = extended | says
        else:
            if "sparse" in extended or kind == b"S":
                self._lose("sparse member", name, 0)
            elif kind in _LINKS:
                last.kind = "link"
            elif kind in _REGULAR and not name.endswith("/"):
                last.kind = "file"
            extended = {}
        return content + -(-size // BLOCK) * BLOCK, last, extended

    def _sparse_map(self, block: bytes, content: int) -> int:
        """Bytes of an old GNU sparse map that continues behind its header."""
        length, more = 0, block[482]
        while more and content + length < self.end:
            more = (os.pread(self.fd, BLOCK, content + length) + _ZEROS)[504]
            length += BLOCK
        return length

    def _read(self, offset: int, last: _Last | None) -> tuple[bytes, bytes]:
        """(the end of the last member's content, the block at `offset`), in one read."""
        if last is None or not last.kind:
            return b"", os.pread(self.fd, BLOCK, offset)
        start = max(last.content, last.content + last.size - TAIL)
        together = os.pread(self.fd, offset + BLOCK - start, start)
        return together[: last.content + last.size - start], together[offset - start :]

    def _header_within(self, last: _Last | None, offset: int) -> int | None:
        """The first sound header in the content of a member that nothing sound follows; that of a tar within the tar
        begins with one, and is no sign of a wrong size."""
        if last is None or offset <= last.content:
            return None
        found = next_sound_header(self.fd, last.content, min(offset, last.content + _SEARCHED))
        return None if found == last.content else found

    def _after_damage(self, offset: int, block: bytes) -> int | None:
        """Where to go on after a block that is no header; None at the end."""
        if not block:
            if not offset:
                self._lose("no end marker", "byte 0", 0)
            return None
        if len(block) < BLOCK:
            self._lose("cut short", f"byte {offset}", len(block))
            return None
        following = next_sound_header(self.fd, offset, self.end)
        blank = block == _ZEROS
        if following is None and blank:
            self.ended = True
            # Zeros beyond a record are no marker: a file whose rest was allocated and never written ends so.
            record = max(_RECORD, min(self.end & -self.end, _LARGEST_RECORD))
            if self.end - offset > record + 2 * BLOCK:
                self._lose("nothing but an end", f"byte {offset}", self.end - offset, 0)
            return None
        reason = "zeros between members" if blank else "bad header"
        gap = (following or self.end) - offset
        at_least = 0 if blank and gap <= _RECORD + 2 * BLOCK else 1  # joined tars have an end marker between them
        self._lose(reason, f"byte {offset}", gap, at_least)
        return following

    def _lose(self, reason: str, where: str, num_bytes: int, at_least: int = 1) -> None:
        self.damage.append(Damage(reason, where, num_bytes, at_least))


def next_sound_header(fd: int, offset: int, end: int) -> int | None:
    """The first header with a right checksum from `offset` on that begins before `end`.

    A ustar one is found wherever it lies, so that bytes which are missing or too many do no further harm; an old one,
    which has no magic, at whole blocks from `offset`.
    """
    while offset < end:
        chunk = os.pread(fd, min(_SCAN + BLOCK, end - offset + BLOCK), offset)
        for at in _candidates(chunk):
            if offset + at < end and parse(chunk[at : at + BLOCK]):
                return offset + at
        if len(chunk) < _SCAN + BLOCK:
            return None
        offset += _SCAN
    return None


def _candidates(chunk: bytes) -> list[int]:
    """Where in `chunk` whole headers may lie, ascending."""
    found = {match.start() - 257 for match in _USTAR.finditer(chunk)}
    blocks = np.frombuffer(chunk, np.uint8, len(chunk) // BLOCK * BLOCK).reshape(-1, BLOCK)
    checksums = blocks[:, 148:156]
    plausible = _IN_A_NUMBER[checksums].all(1) & (checksums >= ord("0")).any(1) & (blocks[:, 0] != 0)
    found.update((np.flatnonzero(plausible) * BLOCK).tolist())
    return sorted(at for at in found if 0 <= at <= len(chunk) - BLOCK)


def parse(block: bytes) -> tuple[str, int, bytes] | None:
    """(name, size, type) of a header block, or None if its checksum or a number in it is wrong."""
    try:
        stored = _number(block[148:156])
        size = _number(block[124:136])
    except ValueError:
        return None
    summed = block[:148] + b" " * 8 + block[156:]
    if stored != sum(summed) and stored != _signed_sum(summed):
        return None
    name = block[:100].partition(b"\0")[0]
    prefix = block[345:500].partition(b"\0")[0]
    if block[257:263] == b"ustar\0" and prefix:  # GNU's magic ends with a blank and has other fields there
        name = prefix + b"/" + name
    return _text(name), size, block[156:157]


def _signed_sum(block: bytes) -> int:
    """Some old writers summed the bytes as signed ones."""
    return sum(block) - 256 * sum(byte > 127 for byte in block)


def _number(field: bytes) -> int:
    if field[0] & 0x80:  # base 256, for sizes of 8 GiB and more
        if field[0] & 0x40:
            raise ValueError("negative")
        return int.from_bytes(bytes([field[0] & 0x3F]) + field[1:], "big")
    digits = field.partition(b"\0")[0].strip()
    if not digits:
        return 0
    value = int(digits, 8)
    if value < 0:
        raise ValueError("negative")
    return value


def _extended(kind: bytes, content: bytes) -> dict:
    """What a PAX or GNU header says of the member that follows: `path`, `size`, `sparse`."""
    if kind == b"L":
        return {"path": _text(content.partition(b"\0")[0])}
    found, at = {}, 0
    while at < len(content):
        length, blank, _ = content[at : at + 20].partition(b" ")
        if not blank or not length.isdigit() or int(length) <= len(length) + 1:
            break
        keyword, _, value = content[at + len(length) + 1 : at + int(length) - 1].partition(b"=")
        if keyword == b"path":
            found["path"] = _text(value)
        elif keyword == b"size" and value.isdigit() and len(value) < 20:
            found["size"] = int(value)
        elif keyword.startswith(b"GNU.sparse"):
            found["sparse"] = True
        at += int(length)
    return found


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")
