"""Formats whose files say which value is white: a range is of what they store, and without one they are not dark."""

import io
import struct
import zlib

import imagecodecs
import numpy as np
import pytest
import tifffile

from prelude.data.batch import View, ViewPlan
from prelude.data.decode import BadImage, decode, deep_values
from prelude.data.loader import build_loader
from prelude.data.shards import ShardIndex
from prelude.evaluators.dense.masks import read_mask

PLAN = ViewPlan((View((8, 8), crop="center", flip=0.0),))
GREY = np.random.default_rng(0).integers(0, 3000, (8, 9), np.uint16)
COLOUR = np.random.default_rng(1).integers(0, 3000, (8, 9, 3), np.uint16)


def pnm(kind: int, values: np.ndarray, white: int) -> bytes:
    """P2 and P3 are text, P5 and P6 bytes."""
    head = f"P{kind}\n# a remark\n{values.shape[1]} {values.shape[0]}\n{white}\n".encode()
    if kind < 4:
        return head + b"# another\n" + " ".join(map(str, values.ravel())).encode()
    return head + values.astype(">u2" if white > 255 else np.uint8).tobytes()


def jpeg_2000(values: np.ndarray, bits: int, codec: str = "jp2") -> bytes:
    return bytes(imagecodecs.jpeg2k_encode(values, level=0, bitspersample=bits, codecformat=codec, reversible=True))


FILES = {
    "PGM": (pnm(5, GREY, 4095), GREY), "PGM as text": (pnm(2, GREY, 4095), GREY), "PPM": (pnm(6, COLOUR, 4095), COLOUR),
    "PPM as text": (pnm(3, COLOUR, 4095), COLOUR), "JPEG 2000": (jpeg_2000(GREY, 12), GREY),
    "JPEG 2000 without boxes": (jpeg_2000(GREY, 12, "j2k"), GREY),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_a_range_is_of_the_stored_values_and_white_is_the_files_without_one(name):
    image, values = FILES[name]
    stored = values if values.ndim == 3 else np.repeat(values[:, :, None], 3, 2)
    wanted = (stored.clip(500, 2500) - 500.0) / 2000 * 255
    np.testing.assert_allclose(decode(image, value_range=(500, 2500)), wanted, atol=1e-4)
    assert np.abs(decode(image) - stored / 4095 * 255).max() <= 1
    assert np.array_equal(deep_values(image), stored if values.ndim == 3 else stored[:, :, :1])


def test_nine_bits_and_signs_of_jpeg_2000_are_what_was_written():
    nine = GREY >> 3
    for codec in ("jp2", "j2k"):
        assert np.array_equal(deep_values(jpeg_2000(nine, 9, codec))[:, :, 0], nine)
    signed = GREY.astype(np.int16) - 1000
    assert np.array_equal(deep_values(jpeg_2000(signed, 12))[:, :, 0], signed)


@pytest.mark.parametrize("name", ["PGM", "JPEG 2000"])
def test_auto_finds_the_bits_and_nothing_is_told_to_be_dark(name, tmp_path, write_tar, caplog):
    ending = "pgm" if name == "PGM" else "jp2"
    path = str(write_tar(tmp_path / "x.tar", [(f"{n}.{ending}", FILES[name][0]) for n in range(3)]))
    assert ShardIndex(path, value_range="auto").value_range == (0, 4095)
    views = [next(build_loader(path, PLAN, seed=0, micro_batch=3, value_range=r)).views[0] for r in (None, "auto")]
    assert abs(views[0].float() - views[1]).max() <= 1 and not caplog.records


@pytest.mark.parametrize("name", ["PGM", "PGM as text", "PPM", "PPM as text"])
def test_a_file_that_is_cut_is_refused(name):
    with pytest.raises(BadImage, match="truncated"):
        decode(FILES[name][0][:-40], value_range=(0, 4095))


def test_masks_hold_the_class_numbers_that_were_written():
    classes = GREY % 21
    for mask in (
        pnm(5, classes, 20),
        pnm(2, classes, 20),
        pnm(5, classes, 300),
        jpeg_2000(classes.astype(np.uint8), 5),
    ):
        assert np.array_equal(read_mask(mask, 1000), classes)


def grey_png(values: np.ndarray, bits: int) -> bytes:
    rows = np.packbits((values[:, :, None] >> np.arange(bits)[::-1] & 1).reshape(len(values), -1).astype(bool), axis=1)
    head = struct.pack(">IIBBBBB", values.shape[1], len(values), bits, 0, 0, 0, 0)
    parts = (b"IHDR", head), (b"IDAT", zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))), (b"IEND", b"")
    chunks = [struct.pack(">I", len(d)) + name + d + struct.pack(">I", zlib.crc32(name + d)) for name, d in parts]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def grey_tiff(values: np.ndarray, bits: int) -> bytes:
    content = io.BytesIO()
    tifffile.imwrite(content, values, bitspersample=bits, photometric="minisblack")
    return content.getvalue()


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_grey_values_of_few_bits_are_class_numbers_in_masks_and_go_up_to_white_in_images(bits):
    classes = (GREY % min(1 << bits, 20)).astype(np.uint8)
    image = grey_png(classes, bits)
    assert np.array_equal(read_mask(image, 1000), classes)
    white = (1 << bits) - 1
    for value_range in (None, (0, 4095)):  # which is of images of more than 8 bits
        assert np.abs(decode(image, value_range=value_range)[:, :, 0] - classes / white * 255).max() <= 1
    if bits in (2, 4):
        assert np.array_equal(read_mask(grey_tiff(classes, bits), 1000), classes)
