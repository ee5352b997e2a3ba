"""From an image file's bytes to RGB pixels, or to a short reason why not.

- JPEG goes through simplejpeg (libjpeg-turbo) and, where that is not installed, through torchvision; every other
  format, and every JPEG that those cannot turn into RGB (CMYK), through PIL.
- A JPEG whose data simplejpeg finds damaged is bad, whatever PIL would make of it: PIL paints what is missing grey.
  Where simplejpeg is not installed nobody notices, unless the file is cut off.
- The size is read from the header before a pixel is decoded, and weighed against the file's bytes: a few hundred bytes
  that claim millions of pixels hold no image.
- The result is always three channels of 8 bits, the same as PIL's `convert("RGB")`: grey is repeated, palettes are
  looked up, CMYK is converted, an alpha channel is dropped (not composited), the first frame of an animation is
  taken. 16-bit grey keeps its upper 8 bits, where PIL would clip it to white, or is scaled by a `value_range`.
- EXIF orientation is ignored: pixels come as they are stored, as PIL, torchvision and timm read them.
- Nothing of ours is written to the console (libtiff has words of its own) and no state is shared: safe from any number
  of threads.
"""

import contextlib
import functools
import io
import re
import struct
import warnings
import zlib
from typing import Literal

import numpy as np
from PIL import Image

try:
    import simplejpeg
except ImportError:
    simplejpeg = None

Backend = Literal["simplejpeg", "torchvision", "pil"]

MAX_PIXELS = 64 * 2**20
"""Larger images are refused: 64 Mi pixels are 192 MiB of RGB. Below PIL's own limit, so that ours is the one met."""

MAX_PIXELS_PER_BYTE = 1000
"""Of an image with more than `ALWAYS_ENOUGH` pixels. Photographs have below 100; one colour all over, as PNG or JPEG
with 8 bits, up to 1030."""

ALWAYS_ENOUGH = 4 * 2**20

MAX_SCANS = 100
"""Of a progressive JPEG, which has about ten. Each may take ten bytes and as long as a whole image."""

# A list of our own: PIL also registers formats that start other programs (EPS runs Ghostscript).
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF")

# What PIL's parsers have been seen to raise, or plausibly raise, on damaged bytes.
_PIL_ERRORS = (
    OSError, SyntaxError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError, EOFError, RuntimeError,
    MemoryError, AssertionError, struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip

# Set once, here: `warnings.catch_warnings` around each call would not be safe between threads.
warnings.filterwarnings("ignore", module=r"PIL\.")


class BadImage(Exception):
    """Bytes that give no image. The message is a short reason, one of few, so that reasons can be counted."""


def decode(image: bytes, backend: Backend | None = None, value_range: tuple[float, float] | None = None) -> np.ndarray:
    """(H, W, 3) uint8 RGB, C-contiguous and writable.

    value_range: the values of images with more than 8 bits that become black and white; None for all of 16 bits.

    `backend` forces one decoder alone, for comparisons. Raises BadImage when no pixels can be had; ImportError
    when the forced backend is not installed.
    """
    if not image:
        raise BadImage("empty")
    if backend is not None:
        return _DECODERS[backend](image)
    if image.startswith(b"\xff\xd8\xff"):
        if _ends_in_a_hole(image):
            raise BadImage("truncated")
        if _is_progressive(image) and image.count(b"\xff\xda") > MAX_SCANS:
            raise BadImage("too many scans")
        try:
            return _decode_jpeg(image)
        except _Unsupported:
            pass
    return _decode_pil(image, value_range)


def deep_values(image: bytes) -> np.ndarray | None:
    """(H, W) stored values of an image with more than 8 bits; None for any other. Raises BadImage."""
    if image.startswith(b"\xff\xd8\xff"):
        return None
    with _open(image) as opened:
        return _deep(opened)


class _Unsupported(BadImage):
    """A fast decoder cannot do this, and PIL may."""


def _ends_in_a_hole(jpeg: bytes) -> bool:
    """Whether the file's end was allocated but never written: zeros are valid codes, so no decoder is sure to notice.

    A whole file may be padded too, but has its end marker (FF D9) after the start of its last scan (FF DA).
    """
    return jpeg.endswith(bytes(16)) and jpeg.rfind(b"\xff\xd9") < jpeg.rfind(b"\xff\xda")


def _is_progressive(jpeg: bytes) -> bool:
    """From the marker of its frame. Counting scans takes as long as a third of decoding, and most have only one."""
    at = 2
    while jpeg[at : at + 1] == b"\xff" and at + 4 <= len(jpeg):
        marker = jpeg[at + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return marker in (0xC2, 0xC6, 0xCA, 0xCE)
        at += 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big")
    return True  # not by the book: better count


def _decode_jpeg(image: bytes) -> np.ndarray:
    if simplejpeg is not None:
        return _decode_simplejpeg(image)
    if _torchvision_io() is not None:
        return _decode_torchvision(image)
    raise _Unsupported("no fast JPEG decoder")


def _decode_simplejpeg(image: bytes) -> np.ndarray:
    if simplejpeg is None:
        raise ImportError("simplejpeg is not installed")
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(image)
        _check_size(height, width, len(image))
        # Strict, because a lenient decoder returns a truncated image as a grey one.
        if colours in ("CMYK", "YCCK"):
            simplejpeg.decode_jpeg(image, "CMYK", strict=True)
            raise _Unsupported("undecodable")  # its conversion to RGB differs from PIL's
        return simplejpeg.decode_jpeg(image, "RGB", strict=True)
    except ValueError as error:
        raise _refusal(str(error)) from error


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


def _decode_torchvision(image: bytes) -> np.ndarray:
    io_module = _torchvision_io()
    if io_module is None:
        raise ImportError("torchvision.io.decode_jpeg is not available")
    with _open(image) as header:
        if header.format != "JPEG" or header.mode not in ("RGB", "L"):
            raise _Unsupported("undecodable")  # its CMYK conversion differs from PIL's
    import torch  # here, as torchvision is: plain decoding needs neither

    try:
        # A copy into a bytearray, because torch warns about memory that it may not write.
        encoded = torch.frombuffer(bytearray(image), dtype=torch.uint8)
        pixels = io_module.decode_jpeg(encoded, io_module.ImageReadMode.RGB)  # (3, H, W)
    except RuntimeError as error:
        raise _Unsupported("undecodable") from error  # PIL knows better what is wrong
    return np.ascontiguousarray(pixels.permute(1, 2, 0).numpy())


@functools.cache
def _torchvision_io():
    """torchvision.io, or None without it: imported late, as it takes a second and most never need it."""
    try:
        import torchvision.io
    except ImportError:
        return None
    warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"torchvision\.io")
    return torchvision.io if hasattr(torchvision.io, "decode_jpeg") else None


def _decode_pil(image: bytes, value_range: tuple[float, float] | None = None) -> np.ndarray:
    with _open(image) as opened:
        values = _deep(opened)
        if values is None:
            with _pil_errors():
                return np.array(opened.convert("RGB"))
    if value_range is not None:
        low, high = value_range
        grey = (values.astype(np.float32) - low) * (255 / (high - low))
        grey = np.nan_to_num(grey).clip(0, 255).round()
    elif values.dtype.kind == "f":
        raise BadImage("floating point pixels")  # they have no range that could be mapped to 0..255
    else:
        grey = (values >> 8).clip(0, 255)
    return np.repeat(grey.astype(np.uint8)[:, :, None], 3, axis=2)


def _deep(opened: Image.Image) -> np.ndarray | None:
    """Modes I;16 and its byte orders, I, which older PILs give 16-bit PNGs, and F."""
    if not opened.mode.startswith(("I", "F")):
        return None
    with _pil_errors():
        return np.asarray(opened)


@contextlib.contextmanager
def _pil_errors():
    try:
        yield
    except _PIL_ERRORS as error:
        raise BadImage("truncated" if "truncated" in str(error).lower() else "undecodable") from error


def _open(image: bytes) -> Image.Image:
    """PIL's lazy image: the header read and its size checked, no pixel decoded."""
    try:
        opened = Image.open(io.BytesIO(image), formats=_installed_formats())
    except Image.DecompressionBombError as error:
        raise BadImage("too many pixels") from error
    except _PIL_ERRORS as error:
        raise BadImage("not an image") from error
    _check_size(opened.height, opened.width, len(image))
    return opened


@functools.cache
def _installed_formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _check_size(height: int, width: int, num_bytes: int) -> None:
    if height * width > MAX_PIXELS:
        raise BadImage("too many pixels")
    if height * width > max(ALWAYS_ENOUGH, MAX_PIXELS_PER_BYTE * num_bytes):
        raise BadImage("too few bytes")
    if height * width == 0:
        raise BadImage("no pixels")


_DECODERS = {"simplejpeg": _decode_simplejpeg, "torchvision": _decode_torchvision, "pil": _decode_pil}
