"""Formats that say themselves which value is white: PGM, PPM and grey JPEG 2000.

PIL hands such values over on the scale of all 8 or 16 bits. That is what they mean where nobody says otherwise; a
range, and the class numbers of a mask, are about the values that the file stores, which are read here.
"""

import re

import numpy as np
from PIL import Image

from prelude.data.stored import BadImage, open_image

_CODESTREAM = b"\xff\x4f\xff\x51"  # of JPEG 2000: its start, and the marker of the segment SIZ
_STARTS = (b"P2", b"P3", b"P5", b"P6", b"\0\0\0\x0cjP  ", _CODESTREAM)
_DEPTH = 42  # bytes from there to that of the first component: one less than its bits, and whether it has a sign
_COMMENT = re.compile(rb"#[^\r\n]*")


def white_of(image: bytes, opened: Image.Image) -> int | None:
    """The value that becomes white; None where PIL gives what is stored, or no more than 8 bits of it."""
    if opened.format == "PPM":
        codec, _, _, settings = opened.tile[0]
        return settings[1] if codec in ("ppm", "ppm_plain") and isinstance(settings, tuple) else None
    if opened.format == "JPEG2000" and opened.mode in ("L", "I;16"):
        bits, _ = _depth(image)
        return (1 << bits) - 1
    return None


def is_scaled(image: bytes, max_pixels: int) -> bool:
    """Whether an image of more than 8 bits fills all of 16 without a range, by what its file says. Raises BadImage."""
    if not image.startswith(_STARTS):  # an array, or a TIFF that PIL cannot open
        return False
    white = white_of(image, open_image(image, max_pixels))
    return white is not None and 255 < white < 65535


def unscaled(image: bytes, opened: Image.Image) -> np.ndarray:
    """(H, W), or (H, W, 3) of a PPM, of an image that has a `white_of`. Raises BadImage, or what PIL does."""
    return _of_pnm(image, opened) if opened.format == "PPM" else _of_jpeg_2000(image, opened)


def _of_pnm(image: bytes, opened: Image.Image) -> np.ndarray:
    codec, _, offset, (_, white) = opened.tile[0]
    shape = (opened.height, opened.width, 3) if opened.mode == "RGB" else (opened.height, opened.width)
    count = int(np.prod(shape))
    if codec == "ppm":
        stored = np.dtype(">u2" if white > 255 else "u1")
        if len(image) - offset < count * stored.itemsize:
            raise BadImage("truncated")
        values = np.frombuffer(image, stored, count, offset)
    else:
        words = _COMMENT.sub(b"", image[offset:]).split()[:count]
        if len(words) < count:
            raise BadImage("truncated")
        values = np.array([int(word) for word in words])
        if values.max() > white or values.min() < 0:
            raise BadImage("undecodable")
    return values.reshape(shape).astype(np.uint16 if white > 255 else np.uint8)


def _of_jpeg_2000(image: bytes, opened: Image.Image) -> np.ndarray:
    bits, signed = _depth(image)
    if bits > 16:
        raise BadImage("more than 16 bits")  # of which PIL has the upper 16
    if bits > 8 and opened.mode == "L":  # PIL takes 9 bits in a .jp2 for 8, and looks closer where there is no box
        opened = open_image(image[image.find(_CODESTREAM) :], opened.width * opened.height)
    values = np.asarray(opened)
    values = values >> (8 * values.dtype.itemsize - bits)
    return values.astype(np.int32) - (1 << (bits - 1)) if signed else values


def _depth(image: bytes) -> tuple[int, bool]:
    """The bits of a JPEG 2000, and whether values have a sign: PIL moves these up to begin at 0."""
    start = image.find(_CODESTREAM)
    if start < 0 or len(image) <= start + _DEPTH:
        raise BadImage("undecodable")
    depth = image[start + _DEPTH]
    return (depth & 0x7F) + 1, bool(depth & 0x80)
