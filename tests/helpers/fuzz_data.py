"""Tars and images damaged at random, read by us and by an independent reader.

    python tests/helpers/fuzz_data.py 2000        so many of each, from seed 0; stops at the first that is wrong

What must hold of every tar: nothing raises, every place lies within the file, an image that is whole never has
another's label, what is missing is told, and where Python's tarfile reads all of it, both find the same members. Of
every image: pixels or BadImage, and no more memory than the limits allow.
"""

import io
import random
import resource
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from prelude.data.decode import ALWAYS_ENOUGH, MAX_PIXELS_PER_BYTE, BadImage, decode
from prelude.data.tar_index import TarIndex, index_tar, keys_by_offset, passed_over

BLOCK = 512
FORMATS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
MOST_MEMORY = 700 * 2**20  # bytes that this process may grow by: the largest image allowed, and what PIL copies


def a_tar(rng: random.Random) -> tuple[bytes, list[bytes]]:
    """(tar, images): pairs of an image, which is its number and noise, and a label, which is its number."""
    images, members = [], []
    name = rng.choice(["{:04}", "a/b.c/{:04}", "./t/{:04}", "x" * 110 + "/{:04}", "k{:04}.v1", "é{:04}"])
    for n in range(rng.randint(1, 30)):
        images.append(b"<%04d>" % n + rng.randbytes(rng.choice([0, 100, 505, 506, 1500, 5000])))
        members += [(f"{name.format(n)}.jpg", images[-1]), (f"{name.format(n)}.cls", b"<%04d>" % n)]
        if rng.random() < 0.1:
            members.append((f"a/._{n}.jpg", b"\0\5\x16\7"))
    order = rng.random()
    members = rng.sample(members, len(members)) if order < 0.2 else sorted(members) if order < 0.4 else members
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=rng.choice(FORMATS)) as tar:
        for path, content in members:
            info = tarfile.TarInfo(path)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return file.getvalue(), images


def damaged(tar: bytes, rng: random.Random) -> tuple[bytes, bool]:
    """One kind of damage, or none, or two; and whether tarfile can be believed: it reads extended headers beyond the
    size that they claim."""
    changed, believed = bytearray(tar), True
    for _ in range(rng.choice([0, 1, 1, 1, 2])):
        at = rng.randrange(len(changed) + 1)
        length = rng.choice([1, 10, 300, BLOCK, 5000])
        kind = rng.choice(["bytes", "cut", "more", "fewer", "zeros", "noise", "size", "size", "no end"])
        if kind == "bytes":
            for _ in range(rng.randint(1, 20)):
                changed[min(rng.randrange(len(changed) + 1), len(changed) - 1)] = rng.randrange(256)
        elif kind == "cut":
            del changed[at:]
        elif kind == "more":
            changed[at:at] = rng.randbytes(length)
        elif kind == "fewer":
            del changed[at : at + length]
        elif kind in ("zeros", "noise"):
            length = min(rng.choice([length, 10**6]), len(changed) - at)
            changed[at : at + length] = bytes(length) if kind == "zeros" else rng.randbytes(length)
        elif kind == "size":
            believed &= _claim_a_size(changed, rng)
        else:
            changed = bytearray(bytes(changed).rstrip(b"\0"))
            changed += bytes(-len(changed) % BLOCK)
        if not changed:
            break
    return bytes(changed), believed


def _claim_a_size(tar: bytearray, rng: random.Random) -> bool:
    """Whether it is that of a file."""
    headers = [at for at in range(0, len(tar) - BLOCK, BLOCK) if tar[at + 257 : at + 262] == b"ustar"]
    if not headers:
        return True
    at = rng.choice(headers)
    tar[at + 124 : at + 136] = b"%011o\0" % rng.choice([0, 1, 700, 10_000, 10**6, 8**11 - 1])
    tar[at + 148 : at + 156] = b" " * 8
    tar[at + 148 : at + 156] = b"%06o\0 " % sum(tar[at : at + BLOCK])
    return tar[at + 156 : at + 157] == b"0"


def check_tar(seed: int, folder: Path) -> None:
    rng = random.Random(seed)
    whole, images = a_tar(rng)
    tar, believed = damaged(whole, rng)
    path = folder / "x.tar"
    path.write_bytes(tar)
    index = index_tar(str(path), "cls")
    places = [*index.images[:].tolist(), *[place for place in index.labels[:].tolist() if place[0] >= 0]]
    assert all(0 <= offset and offset + size <= len(tar) for offset, size in places), "beyond the file"
    _pairs_are_right(tar, images, index)
    found = {tar[offset : offset + size] for offset, size in index.images[:].tolist()}
    missing = len(set(images) - found)
    told = sum(problem.lost for problem in index.problems)
    spoilt = len(found - set(images))  # their bytes were changed, which decoding finds out
    could_be_a_marker = 2 * BLOCK <= len(tar) - len(tar.rstrip(b"\0")) < 2**15  # no one knows better than its length
    silent = not told + spoilt and index.ended and not could_be_a_marker
    assert not missing or not silent, f"{missing} are missing, and nothing is told"
    # tarfile believes a size that swallows other members, if zeros follow.
    believed &= all(problem.reason != "wrong size" for problem in index.problems)
    members = _by_tarfile(tar) if believed else None
    if members is not None:
        assert keys_by_offset(str(path)).keys() == {member.offset_data for member in members}, "other members"
        _agrees(tar, members, index)


def _pairs_are_right(tar: bytes, images: list[bytes], index: TarIndex) -> None:
    """An image and a label that both are as they were written carry one number."""
    for (offset, size), (label, label_size) in zip(index.images[:].tolist(), index.labels[:].tolist(), strict=True):
        content, number = tar[offset : offset + size], tar[label : label + label_size] if label >= 0 else b""
        if content in images and number in {image[:6] for image in images}:
            assert content[:6] == number, f"{number!r} as the label of {content[:6]!r}"


def _by_tarfile(tar: bytes) -> list[tarfile.TarInfo] | None:
    """All regular members, where the tar is sound from its first to its last byte."""
    try:
        with tarfile.open(fileobj=io.BytesIO(tar), mode="r:") as opened:
            members = opened.getmembers()
    except (tarfile.TarError, ValueError, OSError, EOFError):
        return None
    end = max((m.offset_data + -(-m.size // BLOCK) * BLOCK for m in members), default=0)
    extra = len(tar) - end  # a name of an extended header alone has no member
    sound = members and not any(tar[end:]) and 2 * BLOCK <= extra <= 10_240 + 2 * BLOCK
    return [member for member in members if member.isreg()] if sound else None


def _agrees(tar: bytes, members: list[tarfile.TarInfo], index: TarIndex) -> None:
    """Images by name, told apart by a rule of our own: up to the first dot of the file's name."""
    by_key: dict[str, dict[str, bytes]] = {}
    for member in members:
        folder, _, file = member.name.rpartition("/")
        key, _, extension = file.partition(".")
        if key and not passed_over(member.name):
            content = tar[member.offset_data : member.offset_data + member.size]
            by_key.setdefault(f"{folder}/{key}", {}).setdefault(extension.rpartition(".")[2], content)
    expected = {(files["jpg"], files.get("cls")) for files in by_key.values() if files.get("jpg")}
    found = {
        (tar[offset : offset + size], tar[label : label + length] if label >= 0 else None)
        for (offset, size), (label, length) in zip(index.images[:].tolist(), index.labels[:].tolist(), strict=True)
    }
    assert found == expected, "other samples than tarfile's"


def an_image(rng: random.Random) -> bytes:
    height, width = rng.choice([(1, 1), (7, 30), (64, 48), (200, 150)])
    mode = rng.choice(["RGB", "L", "CMYK", "I;16", "RGBA", "P", "1"])
    shape = (height, width, {"RGB": 3, "CMYK": 4, "RGBA": 4}.get(mode, 1))
    pixels = np.random.default_rng(rng.randrange(2**32)).integers(0, 256, shape, np.uint8)
    if mode == "I;16":
        image = Image.fromarray(pixels[:, :, 0].astype(np.uint16) << 4)
    elif mode in ("P", "1"):
        image = Image.fromarray(pixels[:, :, 0]).convert(mode)
    else:
        image = Image.fromarray(pixels.squeeze(2) if mode == "L" else pixels, mode)
    formats = {
        "CMYK": ["JPEG", "TIFF"],
        "I;16": ["PNG", "TIFF"],
        "RGBA": ["PNG", "WEBP"],
        "P": ["GIF", "PNG"],
        "1": ["PNG", "PPM"],
    }
    kind = rng.choice(formats.get(mode, ["JPEG", "JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM", "GIF"]))
    options = {"JPEG": {"progressive": rng.random() < 0.3}, "TIFF": {"compression": rng.choice([None, "tiff_deflate"])}}
    file = io.BytesIO()
    image.save(file, kind, **options.get(kind, {}))
    return file.getvalue()


def check_image(seed: int) -> None:
    rng = random.Random(seed)
    image = bytearray(an_image(rng))
    for _ in range(rng.choice([0, 1, 3, 30])):
        place = rng.randrange(len(image) if rng.random() < 0.5 else min(len(image), 200))
        image[place] = rng.choice([0, 0x7F, 0xFF, rng.randrange(256)])
    if rng.random() < 0.3:
        del image[rng.randrange(len(image)) :]
    if rng.random() < 0.1:
        image += b"\xff\xd9"
    try:
        pixels = decode(bytes(image), value_range=(value_range := rng.choice([None, (0, 4095)])))
    except BadImage as error:
        assert 0 < len(str(error)) < 30, error
        return
    assert pixels.dtype == (np.float32 if value_range else np.uint8) and pixels.ndim == 3 and pixels.shape[2] == 3
    assert pixels.size // 3 <= max(ALWAYS_ENOUGH, MAX_PIXELS_PER_BYTE * len(image)), (
        "more pixels than its bytes can hold"
    )


def main(count: int) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(count):
            try:
                check_tar(seed, Path(folder))
                check_image(seed)
            except Exception:
                print(f"seed {seed} is wrong", file=sys.stderr)
                raise
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    assert grown < MOST_MEMORY, f"{grown / 2**20:.0f} MiB more than before"
    print(f"{count} tars and {count} images; {grown / 2**20:.0f} MiB more memory at most")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 200)
