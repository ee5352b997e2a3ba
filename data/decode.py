"""From an image file's bytes to pixels, or to a short reason why not.

- JPEG goes through simplejpeg (libjpeg-turbo); every other format, and every JPEG that it cannot turn into RGB (CMYK),
  through `stored`.
- A JPEG whose data simplejpeg finds damaged is bad, whatever PIL would make of it: PIL paints what is missing grey.
- The result has as many channels as are asked for; `stored` says how. Three channels of 8 bits are the same as PIL's
  `convert("RGB")`.
- Without a `value_range` pixels have 8 bits: 16-bit values keep their upper 8 bits, where PIL would clip grey to white.
  What a PGM, PPM or JPEG 2000 of 9 to 15 bits calls white is white then; a range is of the values that it stores.
  With one they are floating point on the same scale, so that nothing of 12 or 16 bits is lost.
- A JPEG with more pixels than are allowed is decoded at half, a quarter or an eighth of its size, the first that fits
  (libjpeg's scaled DCT); a progressive one, which would need all of its memory, is refused, as all other formats are.
- EXIF orientation is ignored: pixels come as they are stored, as torchvision and timm read them, and PIL all
  but TIFFs.
- Nothing of ours is written to the console (libtiff has words of its own) and no state is shared: safe from any number
  of threads.
"""

import re
import struct
from typing import NamedTuple

import numpy as np
import simplejpeg

from prelude.data.stored import (
    ALWAYS_ENOUGH,
    JPEG,
    MAX_PIXELS,
    MAX_PIXELS_PER_BYTE,
    BadImage,
    OtherChannels,
    check_size,
    has_8_bits,
    has_alpha,
    stored_values,
)

__all__ = [
    "ALWAYS_ENOUGH",
    "MAX_PIXELS",
    "MAX_PIXELS_PER_BYTE",
    "BadImage",
    "OtherChannels",
    "ValueRange",
    "decode",
    "deep_values",
    "on_8_bits",
]

ValueRange = tuple[float, float]  # stored values that become black and white

MAX_SCANS = 100
"""Of a progressive JPEG, which has about ten. Each may take ten bytes and as long as a whole image."""

SCAN_BYTES = 10  # of the smallest: a marker, and the header for one component

_REDUCED = (2, 4, 8)  # in each direction


def decode(
    image: bytes, value_range: ValueRange | None = None, channels: int = 3, max_pixels: int = MAX_PIXELS
) -> np.ndarray:
    """(H, W, channels), C-contiguous and writable: uint8, or with a `value_range` float32 from 0 to 255.

    value_range: the values of images with more than 8 bits that become 0 and 255; those of 8 bits are left as they are.
    None for all of 16 bits. Raises BadImage when no pixels can be had.
    """
    if not image:
        raise BadImage("empty")
    pixels = _of_jpeg(image, channels, max_pixels) if image.startswith(JPEG) else None
    if pixels is None:
        values = stored_values(image, channels, max_pixels, deep=value_range is not None)
        pixels = on_8_bits(values, value_range)
    return pixels if value_range is None else pixels.astype(np.float32, copy=False)


def deep_values(image: bytes, channels: int | None = None, max_pixels: int = MAX_PIXELS) -> np.ndarray | None:
    """(H, W, C) stored values, but for opacity, of an image of more than 8 bits; None for others. Raises BadImage.

    channels: that are wanted, which makes as many grey pages of a TIFF channels; None for its first page alone.
    """
    if image.startswith(JPEG) or has_8_bits(image):
        return None
    values = stored_values(image, None, max_pixels, pages=channels)
    if values.dtype in (np.uint8, np.bool_):
        return None
    return values[:, :, :-1] if has_alpha(image, max_pixels) else values


def on_8_bits(values: np.ndarray, value_range: ValueRange | None) -> np.ndarray:
    """Stored values on the scale of 8 bits: uint8 as it is, and floating point where there is a range."""
    if values.dtype == np.uint8:
        return values if values.flags.writeable else values.copy()
    if values.dtype == np.bool_:
        return values.astype(np.uint8) * 255
    if value_range is not None:
        low, high = value_range
        scaled = (values.astype(np.float32) - low) * (255 / (high - low))
        return np.nan_to_num(scaled, copy=False).clip(0, 255)
    if values.dtype == np.uint16:
        return (values >> 8).astype(np.uint8)
    raise BadImage(f"{values.dtype} values, no data.range")  # no range of theirs could be mapped to 0..255


def _of_jpeg(image: bytes, channels: int, max_pixels: int) -> np.ndarray | None:
    """None for what only PIL can decode."""
    if channels not in (1, 3):
        raise OtherChannels(3, channels)
    if _ends_in_a_hole(image):
        raise BadImage("truncated")
    frame = _frame(image)
    # Counting scans takes as long as a third of decoding, and most files have only one.
    if frame.progressive and len(image) > MAX_SCANS * SCAN_BYTES and image.count(b"\xff\xda") > MAX_SCANS:
        raise BadImage("too many scans")
    try:
        return _decode_jpeg(image, frame, channels, max_pixels)
    except _Unsupported:
        return None


class _Unsupported(BadImage):
    """simplejpeg cannot do this, and PIL may."""


def _ends_in_a_hole(jpeg: bytes) -> bool:
    """Whether the file's end was allocated but never written: zeros are valid codes, so no decoder is sure to notice.

    A whole file may be padded too, but has its end marker (FF D9) after the start of its last scan (FF DA).
    """
    return jpeg.endswith(bytes(16)) and jpeg.rfind(b"\xff\xd9") < jpeg.rfind(b"\xff\xda")


class _Frame(NamedTuple):
    """What the header of a JPEG's frame says."""

    progressive: bool
    height: int
    width: int
    components: int  # 0 where the file is not by the book, whatever else is said then


_UNKNOWN = _Frame(True, 0, 0, 0)


def _frame(jpeg: bytes) -> _Frame:
    """Read here, since asking libjpeg takes as long as a tenth of decoding a small image."""
    at = 2
    try:
        while jpeg[at] == 0xFF and (marker := jpeg[at + 1]) not in _WITHOUT_LENGTH:
            if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
                _, height, width, components = _FRAME_HEADER.unpack_from(jpeg, at + 4)
                return _Frame(marker in (0xC2, 0xC6, 0xCA, 0xCE), height, width, components)
            at += 2 + (jpeg[at + 2] << 8) + jpeg[at + 3]
    except (IndexError, struct.error):
        pass
    return _UNKNOWN


_FRAME_HEADER = struct.Struct(">BHHB")  # after its marker and its length: precision, height, width, components
_WITHOUT_LENGTH = {0x00, 0x01, *range(0xD0, 0xDA), 0xFF}


def _decode_jpeg(image: bytes, frame: _Frame, channels: int, max_pixels: int) -> np.ndarray:
    try:
        height, width, colours = frame.height, frame.width, ""
        if frame.components not in (1, 3) or not height * width:
            height, width, colours, _ = simplejpeg.decode_jpeg_header(image)
        if height * width > max_pixels:
            return _decode_reduced(image, height, width, colours, channels, max_pixels)
        check_size(height, width, len(image), max_pixels)
        # Strict, because a lenient decoder returns a truncated image as a grey one.
        if colours in ("CMYK", "YCCK"):
            simplejpeg.decode_jpeg(image, "CMYK", strict=True)
            raise _Unsupported("undecodable")  # its conversion to RGB differs from PIL's
        return simplejpeg.decode_jpeg(image, "RGB" if channels == 3 else "GRAY", strict=True)
    except ValueError as error:
        raise _refusal(str(error)) from error


def _decode_reduced(image: bytes, height: int, width: int, colours: str, channels: int, max_pixels: int) -> np.ndarray:
    """At the largest size that is allowed. Raises ValueError as simplejpeg does."""
    if height * width > MAX_PIXELS_PER_BYTE * len(image):
        raise BadImage("too many pixels")
    sizes = [(-(-height // by), -(-width // by)) for by in _REDUCED]
    fitting = [size for size in sizes if size[0] * size[1] <= max_pixels]
    if not fitting or _frame(image).progressive or colours in ("CMYK", "YCCK"):
        raise BadImage("too many pixels")
    pixels = simplejpeg.decode_jpeg(
        image, "RGB" if channels == 3 else "GRAY", min_height=fitting[0][0], min_width=fitting[0][1], strict=True
    )
    if pixels.shape[:2] != fitting[0]:
        raise BadImage("too many pixels")
    return pixels


def _refusal(message: str) -> BadImage:
    """What libjpeg's warning or error says of a file: whether PIL may try, and if not, why."""
    if message.startswith("Premature end") or "premature end" in message:
        return BadImage("truncated")
    between_headers = _EXTRANEOUS.match(message)
    if message.startswith("Corrupt JPEG data") and not between_headers:
        return BadImage("undecodable")
    return _Unsupported("undecodable")


# Bytes too many before a table, a frame or a comment, none of which follows pixels. Before all others they are pixels
# that were left over: the decoder had lost its way.
_EXTRANEOUS = re.compile(r"Corrupt JPEG data: \d+ extraneous bytes before marker 0x(db|c[012]|dd|e.|fe)")
