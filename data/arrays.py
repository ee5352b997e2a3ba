"""Images that are arrays: `.npy`, and the TIFFs that PIL cannot read whole. (H, W, C) of any type of number.

- Which axis has the channels is told by their number, the last axis before the first. Where any number will do, it is
  the shorter of the two.
- Nothing in a file can run code, and nothing is made up: a file that lacks a part of its image is a bad one.
"""

import functools
import io
import logging
import struct
import zlib
from typing import NamedTuple

import numpy as np

from prelude.data.stored import BadImage, OtherChannels, check_size

MAX_BYTES_PER_PIXEL = 8
"""Times `data.max_pixels`: the memory that a TIFF may claim. More channels or bits, fewer pixels."""

_KINDS = "buif"  # true and false, whole numbers, floating point
_NPY_ERRORS = (ValueError, TypeError, SyntaxError, LookupError, RecursionError, MemoryError, OverflowError)
# What tifffile and its codecs have been seen to raise, or plausibly raise, on damaged bytes.
_TIFF_ERRORS = (
    OSError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError, EOFError, RuntimeError, MemoryError,
    AssertionError, struct.error, zlib.error,
)  # fmt: skip


def of_npy(image: bytes, channels: int | None, max_pixels: int) -> np.ndarray:
    """(H, W, C) of an array (H, W), (H, W, C) or (C, H, W). Raises BadImage."""
    array = _header(image)
    if len(array.shape) not in (2, 3):
        raise BadImage("no array of an image")
    first = _come_first(array.shape, channels)
    return _channels_last(_values(array, array.shape[1:] if first else array.shape[:2], max_pixels), first)


def volume_of_npy(volume: bytes, channels: int, max_voxels: int) -> np.ndarray:
    """(H, W, Z, C) of an array (H, W, Z), (H, W, Z, C) or (C, H, W, Z). Raises BadImage."""
    array = _header(volume)
    shape = array.shape
    if len(shape) not in (3, 4):
        raise BadImage("no array of a volume")
    there = [1] if len(shape) == 3 else [shape[3], shape[0]]
    if channels not in there:
        raise OtherChannels(min(there), channels)
    first = len(shape) == 4 and shape[3] != channels
    values = _values(array, shape[1:] if first else shape[:3], max_voxels)
    values = values[..., None] if values.ndim == 3 else np.moveaxis(values, 0, -1) if first else values
    return np.ascontiguousarray(values, values.dtype.newbyteorder("="))


class _Array(NamedTuple):
    """What a .npy says of its values, and where they are."""

    content: bytes
    offset: int
    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype


def _header(content: bytes) -> _Array:
    file = io.BytesIO(content)
    try:
        version = np.lib.format.read_magic(file)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read_header(file)
    except _NPY_ERRORS as error:
        raise BadImage("undecodable") from error
    if dtype.kind not in _KINDS or not shape or min(shape) < 0:
        raise BadImage("no array of an image")
    return _Array(content, file.tell(), shape, fortran, dtype)


def _values(array: _Array, sides: tuple[int, ...], max_pixels: int) -> np.ndarray:
    """sides: without channels."""
    height, *others = sides
    check_size(height, int(np.prod(others, dtype=object)), len(array.content), max_pixels)
    count = int(np.prod(array.shape, dtype=object))
    if count == 0:
        raise BadImage("no pixels")
    if len(array.content) - array.offset < count * array.dtype.itemsize:
        raise BadImage("truncated")
    values = np.frombuffer(array.content, array.dtype, count, array.offset)
    return values.reshape(array.shape, order="F" if array.fortran else "C")


def of_tiff(image: bytes, num_pages: int | None, max_pixels: int) -> np.ndarray:
    """(H, W, C) of the first page, or of all grey ones where there are `num_pages`. Raises BadImage."""
    tifffile = _tifffile()
    try:
        with tifffile.TiffFile(io.BytesIO(image)) as tiff:
            pages = [tiff.pages[0]]
            if num_pages not in (None, 1) and pages[0].samplesperpixel == 1 and len(tiff.pages) == num_pages:
                pages = [tiff.pages[number].aspage() for number in range(num_pages)]
            for page in pages:
                _check(page, len(pages), image, max_pixels)
            values = [page.asarray(maxworkers=1) for page in pages]  # one: threads are ours to start
            planes = pages[0].planarconfig == 2  # channel after channel
    except _TIFF_ERRORS as error:
        raise BadImage("needs prelude-ssl[tiff]" if "imagecodecs" in str(error) else "undecodable") from error
    if any((page.shape, page.dtype) != (values[0].shape, values[0].dtype) for page in values):
        raise BadImage("pages that differ")
    stacked = values[0] if len(values) == 1 else np.stack(values)
    if stacked.ndim not in (2, 3) or stacked.dtype.kind not in _KINDS:
        raise BadImage("no array of an image")
    return _channels_last(stacked, planes or len(values) > 1)


def _check(page, num_pages: int, image: bytes, max_pixels: int) -> None:
    """Before anything of a page is decoded, because tifffile fills with zeros what a file lacks."""
    check_size(page.imagelength * page.imagedepth, page.imagewidth, len(image) // num_pages, max_pixels)
    if page.nbytes * num_pages > MAX_BYTES_PER_PIXEL * max_pixels:
        raise BadImage("too many pixels")
    parts = list(zip(page.dataoffsets, page.databytecounts, strict=True))
    if not parts or any(not 0 < start < start + count <= len(image) for start, count in parts):
        raise BadImage("truncated")


def _come_first(shape: tuple[int, ...], channels: int | None) -> bool:
    """Whether the first axis has the channels. Raises OtherChannels where neither it nor the last has as many."""
    if len(shape) == 2:
        return False
    if channels is None:
        return shape[0] < shape[2]
    fitting = (channels, 1) if channels == 3 else (channels,)  # grey is repeated
    for there in fitting:
        if there in (shape[2], shape[0]):
            return shape[2] != there
    raise OtherChannels(min(shape[0], shape[2]), channels)


def _channels_last(values: np.ndarray, first: bool) -> np.ndarray:
    values = values[:, :, None] if values.ndim == 2 else values.transpose(1, 2, 0) if first else values
    return np.ascontiguousarray(values, values.dtype.newbyteorder("="))


@functools.cache
def _tifffile():
    try:
        import tifffile
    except ImportError as error:
        raise BadImage("needs prelude-ssl[tiff]") from error
    logging.getLogger("tifffile").setLevel(logging.CRITICAL + 1)  # what is wrong is told by those who ask us
    return tifffile
