"""What is done to an image on its way into a shard: looked at, and made smaller where that was asked for.

- An image that training could not decode is left out. One that needs `data.channels` or `data.range` is kept as it is,
  byte for byte, and told of; so is one that needs a package which is not installed.
- Re-coding makes JPEGs of what JPEG can hold: 8 bits, grey or colour, one frame, nothing transparent. Everything else
  is kept as it is and told of. Nothing is enlarged: what is small enough is not touched.
- Nothing is turned, as nothing is in training; a photograph that its EXIF tag would have turned is told of.
"""

import io
import re
from typing import NamedTuple

import numpy as np
from PIL import Image

from prelude.data.decode import BadImage, OtherChannels, decode, deep_values
from prelude.data.image_files import ARRAY_EXTENSION, MAX_IMAGE_BYTES
from prelude.data.packing.source import LeftOut
from prelude.data.stored import (
    BITS_PER_SAMPLE,
    HEIGHT,
    JPEG,
    NPY,
    SAMPLES_PER_PIXEL,
    TIFF,
    WIDTH,
    open_header,
    pil_errors,
    stored_values,
)

QUALITY = 90
_EXIF, _FIRST_SEGMENTS = b"Exif\0\0", 2**17
_ORIENTATION, _TURNS = 274, range(2, 9)  # 1 is upright, and other numbers mean nothing
_CHUNKS = ((b"\x89PNG", b"eXIf"), (b"RIFF", b"EXIF"))  # start of a PNG or WebP, chunk of the tag
_EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "BMP": "bmp", "GIF": "gif", "TIFF": "tif",
               "PPM": "ppm", "JPEG2000": "jp2", "AVIF": "avif"}  # fmt: skip
_CHANNELS = {"1": 1, "L": 1, "P": 3, "LA": 2, "PA": 4, "RGB": 3, "RGBA": 4, "CMYK": 4, "YCbCr": 3, "LAB": 3, "HSV": 3}


class Form(NamedTuple):
    """What an image's header says."""

    format: str
    mode: str  # PIL's
    height: int
    width: int
    channels: int
    bits: int  # of a channel; 0 where the header does not say
    transparent: bool
    frames: int


class Prepared(NamedTuple):
    content: bytes
    extension: str
    remark: str | None  # what was not done to it, where that was to be expected, and why


def prepare(content: bytes, extension: str, short_side: int | None, quality: int) -> Prepared:
    """Raises LeftOut for an image that nobody could train on."""
    if not content or len(content) > MAX_IMAGE_BYTES:
        raise LeftOut("image too large" if content else "empty image")
    try:
        pixels, remark = _decoded(content)
    except BadImage as error:
        if "prelude-ssl[" in str(error):
            return Prepared(content, extension or extension_of(content), f"packed, but it {error}")
        raise LeftOut(str(error)) from error
    extension = extension or extension_of(content)
    if remark:
        return Prepared(content, extension, remark)
    if short_side is None or min(pixels.shape[:2]) <= short_side:
        return Prepared(content, extension, _unturned(content))
    try:
        form = form_of(content)
    except BadImage as error:
        raise LeftOut(str(error)) from error
    unfit = _unfit_for_jpeg(form)
    if unfit:
        return Prepared(content, extension, f"not re-coded: {unfit}")
    return Prepared(_as_jpeg(pixels, form, short_side, quality), "jpg", _unturned(content))


def _unturned(content: bytes) -> str | None:
    """Of a JPEG, PNG or WebP whose tag would have it turned; a damaged tag says nothing."""
    if not _may_be_turned(content):
        return None
    try:
        with pil_errors():
            orientation = open_header(content).getexif().get(_ORIENTATION)
    except BadImage:
        return None
    return "packed as it is stored; its EXIF orientation would have it turned" if orientation in _TURNS else None


def _may_be_turned(content: bytes) -> bool:
    """Whether it is worth opening a second time: few have a tag."""
    if content.startswith(JPEG):
        return _EXIF in content[:_FIRST_SEGMENTS]
    return any(content.startswith(start) and chunk in content for start, chunk in _CHUNKS)


def _decoded(content: bytes) -> tuple[np.ndarray | None, str | None]:
    """RGB of 8 bits, or the settings without which there is none. Raises BadImage."""
    try:
        return decode(content), None
    except OtherChannels as error:
        return None, f"packed; data.channels={error.there} reads it"
    except BadImage as error:
        if not str(error).endswith("no data.range"):
            raise
        deep_values(content)
        return None, "packed; a data.range reads it"


def form_of(content: bytes) -> Form:
    """Raises BadImage."""
    if extension_of(content) == ARRAY_EXTENSION:
        return _form_of_array(content, "NPY")
    try:
        with open_header(content) as image:
            return Form(
                image.format, image.mode, *_size(image), _channels(image), _bits(image, content),
                image.has_transparency_data or image.mode in ("LA", "PA", "RGBA"), getattr(image, "n_frames", 1),
            )  # fmt: skip
    except (BadImage, OSError, SyntaxError, ValueError) as error:
        if content.startswith(TIFF):
            return _form_of_array(content, "TIFF")
        raise BadImage("not an image") from error


def _form_of_array(content: bytes, name: str) -> Form:
    values = stored_values(content, None)
    return Form(name, "", *values.shape, 8 * values.dtype.itemsize, False, 1)


def extension_of(content: bytes) -> str:
    """By the content alone; "" where it is no image."""
    try:
        with open_header(content) as image:
            return _EXTENSIONS.get(image.format, "")
    except BadImage:
        return "tif" if content.startswith(TIFF) else ARRAY_EXTENSION if content.startswith(NPY) else ""


def as_png(pixels: np.ndarray) -> bytes:
    """pixels: (H, W) uint8 or uint16, or (H, W, 3) uint8. Lossless."""
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def as_npy(values: np.ndarray) -> bytes:
    """values: (H, W, C) of any type of number. Lossless."""
    out = io.BytesIO()
    np.save(out, np.ascontiguousarray(values), allow_pickle=False)
    return out.getvalue()


def _as_jpeg(pixels: np.ndarray, form: Form, short_side: int, quality: int) -> bytes:
    height, width, _ = pixels.shape
    scale = short_side / min(height, width)
    size = max(round(width * scale), short_side), max(round(height * scale), short_side)
    image = Image.fromarray(pixels[:, :, 0] if form.mode in ("L", "1") else pixels)
    out = io.BytesIO()
    image.resize(size, Image.Resampling.LANCZOS).save(out, "JPEG", quality=quality, subsampling="4:2:0")
    return out.getvalue()


def _unfit_for_jpeg(form: Form) -> str | None:
    if form.bits == 0:
        return f"{form.format} may hold more than 8 bits"
    if form.bits > 8:
        return f"{form.bits} bits a channel"
    if form.transparent:
        return "an alpha channel"
    if form.frames > 1:
        return "several frames"
    return None


def _size(image: Image.Image) -> tuple[int, int]:
    """(height, width), which PIL has of a TIFF as it would turn it."""
    return (image.tag_v2[HEIGHT], image.tag_v2[WIDTH]) if image.format == "TIFF" else (image.height, image.width)


def _channels(image: Image.Image) -> int:
    if image.format == "TIFF":
        return int(image.tag_v2.get(SAMPLES_PER_PIXEL, 1)) if image.mode != "P" else 3
    return _CHANNELS.get(image.mode, 1)


def _bits(image: Image.Image, content: bytes) -> int:
    if image.mode == "F":
        return 32
    if image.format == "PNG":
        return content[24]
    if image.format == "TIFF":
        return int(max(image.tag_v2.get(BITS_PER_SAMPLE, (1,))))
    if image.format == "PPM":
        header = re.sub(rb"#[^\n]*\n", b" ", content[:4096]).split(maxsplit=4)
        return 1 if header[0] in (b"P1", b"P4") else int(header[3]).bit_length()
    if image.format in ("JPEG2000", "AVIF"):
        return 0
    return 8
