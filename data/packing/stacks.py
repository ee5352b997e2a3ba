"""Stacks of images of one size: `.npy` files, and arrays of a Zarr store.

Shapes are (N, H, W), (N, H, W, C) or (N, C, H, W). With 1 or 3 channels of 8 bits, or one channel of 16 bits, images
are packed as PNG, all others as `.npy`; neither loses anything.
"""

import os
import zipfile

import numpy as np

from prelude.data.counting import counted
from prelude.data.errors import UserError, in_one_line
from prelude.data.image_files import ARRAY_EXTENSION
from prelude.data.packing.blocks import CACHE_BYTES, BlockCache
from prelude.data.packing.extras import needed
from prelude.data.packing.images import as_npy, as_png
from prelude.data.packing.labels import class_labels
from prelude.data.packing.source import Source, SourceOptions, damaged, stamp_of


class StackSource(Source):
    what = "a stack of images"

    def __init__(self, array, path: str, name: str, labels, options: SourceOptions):
        """array: numpy or Zarr, which lies at `path`. labels: (N,) numbers or text, or None."""
        super().__init__()
        self.array, self.path, self.cache = array, path, BlockCache()
        self.layout, self.as_png = _layout(array, name)
        count = array.shape[0]
        self.rows = getattr(array, "chunks", (1,))[0]  # images that are read at once
        if self.rows > 1 and np.dtype(array.dtype).itemsize * int(np.prod(array.shape)) > CACHE_BYTES:
            self.blocks = list(range(0, count, self.rows))
        self.names = [f"{name}/{number:08d}" for number in range(count)]
        self.notes.append(
            f"{counted(count, 'image')} of shape {tuple(array.shape[1:])}, {np.dtype(array.dtype)}, {self.layout}"
        )
        if labels is not None:
            if labels.shape != (count,):
                raise UserError(
                    f"{name} holds {counted(count, 'image')}, but labels of shape {labels.shape}; write one an image."
                )
            self.labels = class_labels(labels.tolist(), options.classes, f"The labels of {name}")

    def read(self, number: int) -> tuple[bytes, str]:
        block, place = divmod(number, self.rows)
        try:
            image = self.cache.get(block, lambda: self._block(block))[place]
        except (ValueError, RuntimeError, OSError) as error:  # what Zarr's codecs raise
            raise damaged(self.path, error, "damaged chunk") from error
        if self.layout == "channels first":
            image = image.transpose(1, 2, 0)
        if image.ndim == 3 and image.shape[2] == 1:
            image = image[:, :, 0]
        if self.as_png:
            return as_png(np.ascontiguousarray(image)), "png"
        return as_npy(image if image.ndim == 3 else image[:, :, None]), ARRAY_EXTENSION

    def _block(self, block: int):
        images = np.asarray(self.array[block * self.rows : (block + 1) * self.rows])
        return images, images.nbytes


def open_npy(path: str, options: SourceOptions) -> Source:
    """Labels lie in another `.npy` file, which `--label` names."""
    options.allow(StackSource.what, "label")
    array, labels, stamps = _load(path, "r"), None, [stamp_of(path)]
    if options.label and not options.unlabelled:
        labels = _load(options.label[0], None)
        stamps.append(stamp_of(options.label[0]))
    source = StackSource(array, path, os.path.splitext(os.path.basename(path))[0], labels, options)
    source.stamps = stamps
    return source


def open_zarr(path: str, options: SourceOptions) -> Source:
    """`--image` and `--label` name arrays where the store is a group."""
    needed("zarr", "zarr", path)
    import zarr

    options.allow(StackSource.what, "image", "label")
    try:
        opened = zarr.open(path, mode="r")
    except (ValueError, OSError, KeyError) as error:
        raise UserError(f"{path} is no Zarr store ({in_one_line(error, 80)}); correct its name.") from None
    arrays = {"": opened} if hasattr(opened, "shape") else dict(opened.arrays())
    stacks = [name for name, array in arrays.items() if array.ndim >= 3]
    image = options.image or (stacks[0] if len(stacks) == 1 else None)
    if image not in arrays:
        raise UserError(f"{path} holds the arrays {', '.join(arrays) or 'none'}; write --image with one of them.")
    label = None if options.unlabelled or not options.label else options.label[0]
    if label is not None and label not in arrays:
        raise UserError(f"{path} holds the arrays {', '.join(arrays)}; write --label with one of them.")
    name, labels = os.path.basename(os.path.normpath(path)), None if label is None else np.asarray(arrays[label][:])
    source = StackSource(arrays[image], path, name, labels, options)
    source.stamps = [f"{image} {label} {_newest(path)}"]
    return source


def _load(path: str, mmap_mode: str | None) -> np.ndarray:
    try:
        loaded = np.load(path, mmap_mode=mmap_mode, allow_pickle=False)
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be read as .npy ({in_one_line(error, 80)}); correct it.") from None
    if not isinstance(loaded, np.ndarray):
        loaded.close()
        raise UserError(f"{path} cannot be read as .npy (it is an .npz archive); save one array with np.save.")
    return loaded


def _layout(array, name: str) -> tuple[str, bool]:
    """Where the channels are, and whether PNG can hold an image."""
    shape, dtype = array.shape, np.dtype(array.dtype)
    last, first = (array.ndim == 4 and shape[axis] in (1, 3) for axis in (3, 1))
    if array.ndim == 4 and last and first:
        raise UserError(f"{name} has the shape {shape}, with two axes that may be the channels; write (N, H, W, C).")
    if array.ndim == 4 and not (last or first):  # the shortest axis of an image
        last, first = shape[3] < min(shape[1], shape[2]), shape[1] < min(shape[2], shape[3])
    channels = shape[3] if last else shape[1] if first else 1 if array.ndim == 3 else 0
    if not channels or dtype.kind not in "buif":
        raise UserError(
            f"{name} has the shape {shape} and type {dtype}; write an array of numbers of the shape (N, H, W), "
            f"(N, H, W, C) or (N, C, H, W)."
        )
    png = (dtype == np.uint8 and channels in (1, 3)) or (dtype == np.uint16 and channels == 1)
    return "channels last" if last else "channels first" if first else "grey", png


def _newest(path: str) -> str:
    """The files of a store and their newest time of change."""
    files = [os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names]
    return f"{len(files)} {max((os.stat(file).st_mtime_ns for file in files), default=0)}"
