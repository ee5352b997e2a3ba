"""Where the samples of one tar shard lie: byte offsets and sizes, read from the headers alone.

- Reads what webdataset reads: ustar with prefixes, GNU long names, PAX paths and sizes, base-256 sizes, old (v7)
  headers. Every header's checksum is verified. File names become samples by webdataset's own rule.
- Damage never raises and is never silent: each lost member or sample is one `Problem`. After a damaged header the
  walk goes on at the next sound one, so a single bad block costs one member and not the rest of the shard.
- Nothing is ever extracted: a member's name is only a key, so it cannot climb out of a folder.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from webdataset.tariterators import base_plus_ext

from prelude.data.errors import UserError
from prelude.data.image_files import IMAGE_EXTENSIONS, MAX_IMAGE_BYTES

BLOCK = 512
_MAX_EXTENDED_HEADER = 2**20
_SCAN = 2**20
_ZEROS = bytes(BLOCK)
_REGULAR = (b"0", b"\0", b"7")
_LINKS = (b"1", b"2")
_WITHOUT_CONTENT = (b"1", b"2", b"3", b"4", b"5", b"6")  # links, devices, folders, whatever their size field says
_META = re.compile(r"__[^/]*__($|/)")  # webdataset's own metadata members
_COMPRESSED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2", b"\xfd7zXZ": "xz"}


class Member(NamedTuple):
    name: str
    offset: int  # of the content, bytes from the start of the tar
    size: int


class Problem(NamedTuple):
    reason: str  # one of few, so that problems can be counted
    where: str  # a key, a member's name, or a byte offset


@dataclass(frozen=True)
class TarIndex:
    images: np.ndarray  # (n, 2) int64: offset and size of each sample's image
    labels: np.ndarray  # (n, 2) int64: the same of its label, -1 where it has none; (0, 2) if no label was asked for
    problems: tuple[Problem, ...]


def index_tar(path: str, label: str = "") -> TarIndex:
    """Walks the headers of the tar at `path`. `label`: extension of the label's member, or "".

    Raises UserError for a compressed tar, which has no byte offsets, and OSError where the file cannot be read.
    """
    problems: list[Problem] = []
    images, labels = [], []
    for key, files in _samples(_members(path, problems), problems):
        image = _image_of(key, files, problems)
        if image:
            images.append(image)
            labels.append(files.get(label, (-1, -1)))
    return TarIndex(_table(images), _table(labels if label else []), tuple(problems))


def keys_by_offset(path: str) -> dict[int, str]:
    """The key of every member of a tar, by the offset of its content."""
    return {member.offset: base_plus_ext(member.name)[0] or member.name for member in _members(path, [])}


def samples_of(path: str, problems: list[Problem]) -> Iterator[tuple[str, dict[str, tuple[int, int]]]]:
    """(key, {extension: (offset, size)}) of every sample of a tar, with or without an image; errors as `index_tar`."""
    return _samples(_members(path, problems), problems)


def image_extension(extensions) -> str | None:
    """Which of a sample's extensions is its image: `jpg` before `png`, both before `left.jpg`."""
    for known in IMAGE_EXTENSIONS:
        if known in extensions:
            return known
    return next((ext for ext in extensions if ext.rpartition(".")[2] in IMAGE_EXTENSIONS), None)


# ---- members into samples


def _samples(members: Iterator[Member], problems: list[Problem]) -> Iterator[tuple[str, dict]]:
    """Neighbouring members with one key are one sample: (key, {extension: (offset, size)})."""
    key, files, seen = None, None, set()
    for member in members:
        prefix, extension = base_plus_ext(member.name)
        if prefix is None or _META.match(member.name):
            continue
        if prefix != key:
            if files is not None:
                yield key, files
            key, files = prefix, {}
            if key in seen:
                problems.append(Problem("duplicate key", key))
                files = None
            seen.add(key)
        if files is None:
            continue
        extension = extension.lower()
        if extension in files:
            problems.append(Problem("duplicate member", member.name))
            continue
        files[extension] = member.offset, member.size
    if files is not None:
        yield key, files


def _image_of(key: str, files: dict, problems: list[Problem]) -> tuple[int, int] | None:
    extension = image_extension(files)
    if extension is None:
        problems.append(Problem("no image", key))
        return None
    if "." in extension and sum(ext.rpartition(".")[2] in IMAGE_EXTENSIONS for ext in files) > 1:
        # `photo.1.jpg`, `photo.2.jpg`: by the convention, a key ends at the first dot of the file's name
        problems.append(Problem("several images under one key", key))
        return None
    _, size = files[extension]
    if size == 0 or size > MAX_IMAGE_BYTES:
        problems.append(Problem("image too large" if size else "empty image", f"{key}.{extension}"))
        return None
    return files[extension]


def _table(rows: list) -> np.ndarray:
    return np.array(rows, np.int64).reshape(-1, 2)


# ---- headers into members


def _members(path: str, problems: list[Problem]) -> Iterator[Member]:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)  # no read-ahead: headers lie far apart
        _refuse_compressed(path, os.pread(fd, 8, 0))
        yield from _walk(fd, os.fstat(fd).st_size, problems)
    finally:
        os.close(fd)


def _refuse_compressed(path: str, start: bytes) -> None:
    for magic, name in _COMPRESSED.items():
        if start.startswith(magic):
            raise UserError(
                f"{path} is compressed with {name}, and images inside cannot be read by their byte offset; "
                f"write an uncompressed tar (images gain nothing from it)."
            )


def _walk(fd: int, end: int, problems: list[Problem]) -> Iterator[Member]:
    offset, extended = 0, {}
    while True:
        block = os.pread(fd, BLOCK, offset)
        if len(block) < BLOCK:
            problems.append(Problem("cut short" if block else "no end marker", f"byte {offset}"))
            return
        header = _parse(block)
        if header is None:
            following = _next_sound_header(fd, offset + BLOCK, end)
            blank = block == _ZEROS
            if blank and following is None:
                return  # the end marker
            problems.append(Problem("zeros between members" if blank else "bad header", f"byte {offset}"))
            if following is None:
                return
            offset, extended = following, {}
            continue

        name, size, kind = header
        content = offset + BLOCK
        if kind in b"xgLK":
            if size > _MAX_EXTENDED_HEADER:
                problems.append(Problem("bad header", f"byte {offset}"))
                return
            if kind in b"xL":
                extended.update(_extended(kind, os.pread(fd, size, content)))
        else:
            name, size = extended.get("path", name), extended.get("size", size)
            if kind in _WITHOUT_CONTENT:
                size = 0
            if content + size > end:
                problems.append(Problem("cut short", name))
                return
            if "sparse" in extended or kind == b"S":
                problems.append(Problem("sparse member", name))
            elif kind in _LINKS:
                if (base_plus_ext(name)[1] or "").lower() in IMAGE_EXTENSIONS:
                    problems.append(Problem("a link and not a file", name))
            elif kind in _REGULAR and not name.endswith("/"):
                yield Member(name, content, size)
            extended = {}
        offset = content + -(-size // BLOCK) * BLOCK


def _parse(block: bytes) -> tuple[str, int, bytes] | None:
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
        elif keyword == b"size" and value.isdigit():
            found["size"] = int(value)
        elif keyword.startswith(b"GNU.sparse"):
            found["sparse"] = True
        at += int(length)
    return found


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


def _next_sound_header(fd: int, offset: int, end: int) -> int | None:
    """The first block at or after `offset` that is a ustar header with a right checksum."""
    while offset < end:
        chunk = os.pread(fd, _SCAN, offset)
        for at in range(0, len(chunk) - BLOCK + 1, BLOCK):
            if chunk[at + 257 : at + 262] == b"ustar" and _parse(chunk[at : at + BLOCK]):
                return offset + at
        if len(chunk) < _SCAN:
            return None
        offset += _SCAN
    return None
