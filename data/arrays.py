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
    file = io.BytesIO(image)
    try:
        version = np.lib.format.read_magic(file)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read_header(file)
    except _NPY_ERRORS as error:
        raise BadImage("undecodable") from error
    if dtype.kind not in _KINDS or len(shape) not in (2, 3) or min(shape) < 0:
        raise BadImage("no array of an image")
    first = _come_first(shape, channels)
    check_size(*(shape[1:] if first else shape[:2]), len(image), max_pixels)
    count = int(np.prod(shape, dtype=object))
    if count == 0:
        raise BadImage("no pixels")
    if len(image) - file.tell() < count * dtype.itemsize:
        raise BadImage("truncated")
    values = np.frombuffer(image, dtype, count, file.tell()).reshape(shape, order="F" if fortran else "C")
    return _channels_last(values, first)


def of_tiff(image: bytes, channels: int | None, max_pixels: int) -> np.ndarray:
    """(H, W, C) of the first page, or of as many grey pages as channels are asked for. Raises BadImage."""
    tifffile = _tifffile()
    try:
        with tifffile.TiffFile(io.BytesIO(image)) as tiff:
            pages = [tiff.pages[0]]
            if channels not in (None, 1) and pages[0].samplesperpixel == 1 and len(tiff.pages) == channels:
                pages = [tiff.pages[number].aspage() for number in range(channels)]
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
