"""The values that an image file stores, for every format but JPEG: (H, W, C) of any type, or a short reason why not.

- PNG, WEBP, BMP, GIF, PPM, JPEG 2000, AVIF and plain TIFFs go through PIL, which has at most 8 bits of a colour. Colour
  PNGs of 16 bits go through torchvision, arrays and all other TIFFs through `arrays`, formats that say which value is
  white through `own_white`.
- The size is read from the header before a value is decoded, and weighed against the file's bytes: a few hundred bytes
  that claim millions of pixels hold no image.
- How many channels are asked for decides what is done: 3 is RGB (grey is repeated, palettes are looked up, CMYK is
  converted, an alpha channel is dropped and not composited), 1 is grey, by luma where it is colour. Any other number
  must be stored as it is, an alpha channel being a channel.
- Of an animation the first frame is taken. A grey TIFF of as many equal pages as channels are asked for has a channel
  in each; of any other, the first page is taken.
- Orientation is ignored: PIL turns TIFFs as it decodes them, and they are turned back.
"""

import contextlib
import functools
import io
import struct
import warnings
import zlib

import numpy as np
from PIL import Image

from prelude.data.counting import counted

MAX_PIXELS = 64 * 2**20
"""Larger images are refused unless `data.max_pixels` says otherwise: 64 Mi pixels are 192 MiB of RGB."""

MAX_PIXELS_PER_BYTE = 1000
"""Of an image with more than `ALWAYS_ENOUGH` pixels. Photographs have below 100; one colour all over, as PNG or JPEG
with 8 bits, up to 1030."""

ALWAYS_ENOUGH = 4 * 2**20

# A list of our own: PIL also registers formats that start other programs (EPS runs Ghostscript).
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF")

TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
NPY = b"\x93NUMPY"
JPEG = b"\xff\xd8\xff"
_PNG = b"\x89PNG\r\n\x1a\n"
_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as JPEG and PIL have it
WIDTH, HEIGHT, BITS_PER_SAMPLE, SAMPLES_PER_PIXEL, EXTRA_SAMPLES = 256, 257, 258, 277, 338
_COMPRESSION, _ORIENTATION, _PLANES = 259, 274, 284

# What undoes that by which PIL obeys an orientation.
_TURNED_BACK = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}  # fmt: skip

# What PIL's parsers have been seen to raise, or plausibly raise, on damaged bytes.
_PIL_ERRORS = (
    OSError, SyntaxError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError, EOFError, RuntimeError,
    MemoryError, AssertionError, struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip

# Set once, here: `warnings.catch_warnings` around each call would not be safe between threads.
warnings.filterwarnings("ignore", module=r"PIL\.")


class BadImage(Exception):
    """Bytes that give no image. The message is a short reason, one of few, so that reasons can be counted."""


class OtherChannels(BadImage):
    """A sound image with another number of channels. `there`: how many."""

    def __init__(self, there: int, wanted: int):
        super().__init__(f"{counted(there, 'channel')} and not {wanted}")
        self.there = there


def stored_values(
    image: bytes, channels: int | None, max_pixels: int = MAX_PIXELS, deep: bool = True, pages: int | None = None
) -> np.ndarray:
    """(H, W, channels), or with as many channels as there are for None.

    deep: whether more than 8 bits of a colour matter, as they are stored; without, PIL's upper 8 do, and white is what
    a format calls so. pages: how many grey pages of a TIFF
    are channels where `channels` does not say. Raises BadImage.
    """
    pages = channels or pages
    if image.startswith(NPY):
        from prelude.data import arrays  # here: only those who have such images pay for it

        return _fitted(arrays.of_npy(image, channels, max_pixels), channels)
    is_tiff, colours = image.startswith(TIFF), False
    try:
        with open_image(image, max_pixels) as opened:
            if not (is_tiff and _is_for_tifffile(opened, channels, pages, deep)):
                return _of_pil(image, opened, channels, deep)
            unspecified = opened.tag_v2.get(EXTRA_SAMPLES) == (0,)  # a fourth band such as infrared, and no opacity
            colours = opened.mode in ("RGB", "RGBA") and not unspecified
    except BadImage as error:
        if not is_tiff or str(error) != "not an image":
            raise
    from prelude.data import arrays

    return _fitted(arrays.of_tiff(image, pages, max_pixels), channels, colours)


def has_alpha(image: bytes, max_pixels: int = MAX_PIXELS) -> bool:
    """Whether the last channel of a PNG or a TIFF is its opacity."""
    if image.startswith(_PNG):
        return image[25:26] in (b"\x04", b"\x06")
    try:
        return image.startswith(TIFF) and open_image(image, max_pixels).mode in ("LA", "RGBA")
    except BadImage:
        return False


def has_8_bits(image: bytes) -> bool:
    """Whether the first bytes tell that no channel has more. False where they do not tell."""
    return image[24:25] <= b"\x08" if image.startswith(_PNG) else image.startswith((b"RIFF", b"GIF8", b"BM"))


def open_image(image: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """PIL's lazy image: the header read and its size checked, no pixel decoded."""
    if max_pixels > (Image.MAX_IMAGE_PIXELS or max_pixels):
        Image.MAX_IMAGE_PIXELS = max_pixels  # PIL's own limit would be met first; ours is checked just below
    try:
        opened = Image.open(io.BytesIO(image), formats=installed_formats())
    except Image.DecompressionBombError as error:
        raise BadImage("too many pixels") from error
    except _PIL_ERRORS as error:
        raise BadImage("not an image") from error
    check_size(opened.height, opened.width, len(image), max_pixels)
    return opened


def open_header(image: bytes) -> Image.Image:
    """PIL's lazy image for those who want no pixels, of a JPEG of any size, since it can be decoded smaller. Raises
    BadImage."""
    formats = installed_formats()
    try:
        if image.startswith(JPEG):
            open_jpeg, _ = Image.OPEN["JPEG"]  # `Image.open` would refuse what is above PIL's own limit
            return open_jpeg(io.BytesIO(image), "")
        return Image.open(io.BytesIO(image), formats=formats)
    except _PIL_ERRORS as error:
        raise BadImage("not an image") from error


def values_of(image: bytes, opened: Image.Image) -> np.ndarray:
    """(H, W) or (H, W, C): what the file stores, on no other scale, and not turned. Raises BadImage."""
    with pil_errors():
        if _white(image, opened) is None:
            step = _step_of_few_bits(opened)
            values = np.asarray(_unturned(opened))
            return values // step if step > 1 else values
        from prelude.data import own_white

        return own_white.unscaled(image, opened)


def check_size(height: int, width: int, num_bytes: int, max_pixels: int) -> None:
    if height * width > max_pixels:
        raise BadImage("too many pixels")
    if height * width > max(ALWAYS_ENOUGH, MAX_PIXELS_PER_BYTE * num_bytes):
        raise BadImage("too few bytes")
    if height * width == 0:
        raise BadImage("no pixels")


@contextlib.contextmanager
def pil_errors():
    try:
        yield
    except _PIL_ERRORS as error:
        raise BadImage("truncated" if "truncated" in str(error).lower() else "undecodable") from error


def _of_pil(image: bytes, opened: Image.Image, channels: int | None, deep: bool) -> np.ndarray:
    if deep and (_white(image, opened) or 0) > 255:
        values = values_of(image, opened)
        return _fitted(values if values.ndim == 3 else values[:, :, None], channels, colours=True)
    if opened.mode.startswith(("I", "F")):  # I;16 and its byte orders, I, which older PILs give 16-bit PNGs, and F
        with pil_errors():
            values = np.asarray(_unturned(opened))
        values = values.astype(values.dtype.newbyteorder("="), copy=False)  # I;16B holds the other one
        if opened.mode == "I" and opened.format != "TIFF":
            values = values.clip(0, 65535).astype(np.uint16)
        return _fitted(values[:, :, None], channels)
    if deep and image.startswith(_PNG) and image[24] == 16:
        return _fitted(_png_of_16_bits(image), channels, colours=True)
    with pil_errors():
        opened = _unturned(opened)
        if channels in (1, 3):
            opened = opened.convert("RGB" if channels == 3 else "L")
        elif opened.mode == "P":
            opened = opened.convert("RGB")
        values = np.array(opened)
    return _fitted(values if values.ndim == 3 else values[:, :, None], channels)


def _white(image: bytes, opened: Image.Image) -> int | None:
    if opened.format not in ("PPM", "JPEG2000"):
        return None
    from prelude.data import own_white  # here: only those who have such images pay for it

    return own_white.white_of(image, opened)


def _step_of_few_bits(opened: Image.Image) -> int:
    """By what PIL multiplies grey values of 2 or 4 bits, so that their white is that of 8; known until it decodes."""
    settings = opened.tile[0][3] if opened.tile else ""
    stored_as = str(settings[0] if isinstance(settings, tuple) else settings)  # a TIFF's goes on, as in L;2R
    return {"L;2": 85, "L;4": 17}.get(stored_as[:3], 1)


def _unturned(opened: Image.Image) -> Image.Image:
    """Decoded, and of a TIFF as it lies in the file."""
    turned_by = opened.getexif().get(_ORIENTATION) if opened.format == "TIFF" else None
    opened.load()
    return opened.transpose(_TURNED_BACK[turned_by]) if turned_by in _TURNED_BACK else opened


def _png_of_16_bits(image: bytes) -> np.ndarray:
    """(H, W, C) uint16, of 2, 3 or 4 channels; PIL has 8 bits of them."""
    import torch
    import torchvision.io

    try:
        # A copy into a bytearray, because torch warns about memory that it may not write.
        encoded = torch.frombuffer(bytearray(image), dtype=torch.uint8)
        pixels = torchvision.io.decode_png(encoded, torchvision.io.ImageReadMode.UNCHANGED)  # (C, H, W)
    except RuntimeError as error:
        raise BadImage("undecodable") from error
    return np.ascontiguousarray(pixels.permute(1, 2, 0).numpy())


def _is_for_tifffile(opened: Image.Image, channels: int | None, pages: int | None, deep: bool) -> bool:
    """Whether PIL would lose channels, pages or bits of a TIFF that it opens."""
    with pil_errors():
        samples = int(opened.tag_v2.get(SAMPLES_PER_PIXEL, 1))
        bits = int(max(opened.tag_v2.get(BITS_PER_SAMPLE, (1,))))
        # Planes of which PIL reads each sample as one of 8 bits; compressed ones it leaves to libtiff, which does not.
        planes = opened.tag_v2.get(_PLANES) == 2 and opened.tag_v2.get(_COMPRESSION, 1) == 1
        if samples > 1 and (channels not in (1, 3) or (bits > 8 and (deep or planes))):
            return True
        has_pages = samples == 1 and bits > 1 and opened.mode != "P" and pages not in (None, 1)
        return has_pages and opened.n_frames == pages


def _fitted(values: np.ndarray, channels: int | None, colours: bool = False) -> np.ndarray:
    """values: (H, W, C). colours: whether these are RGB, or grey, perhaps with an alpha channel."""
    there = values.shape[2]
    if channels in (None, there):
        return values
    if channels == 3 and (there == 1 or (colours and there == 2)):
        return np.repeat(values[:, :, :1], 3, axis=2)
    if colours and channels == 3:
        return np.ascontiguousarray(values[:, :, :3])
    if colours and channels == 1:
        grey = values[:, :, :1] if there == 2 else values[:, :, :3] @ np.array(_LUMA, np.float32)[:, None]
        return np.ascontiguousarray(grey).round().astype(values.dtype)
    raise OtherChannels(there, channels)


@functools.cache
def installed_formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)
