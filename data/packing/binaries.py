"""The binary files of CIFAR-10, CIFAR-100 and MNIST (and what has its format), packed as PNG, which loses nothing.

Sources: https://www.cs.toronto.edu/~kriz/cifar.html for CIFAR's rows, http://yann.lecun.com/exdb/mnist/ for IDX.
"""

import gzip
import os
import re

import numpy as np

from prelude.data.counting import counted
from prelude.data.errors import UserError
from prelude.data.packing.images import as_png
from prelude.data.packing.labels import class_labels, named_numbers
from prelude.data.packing.source import Source, SourceOptions, stamp_of
from prelude.data.packing.splits import one_split

_PIXELS = 32 * 32 * 3
_CIFAR_NAMES = {1: "batches.meta.txt", 2: "fine_label_names.txt"}  # by the number of label bytes
_CIFAR = re.compile(r"(data_batch_\d+|test_batch|train|test)\.bin")
_IDX = re.compile(r"(train|t10k|test)[-.]?images[-.]idx3-ubyte(\.gz)?")
_UBYTE_IMAGES, _UBYTE_LABELS = b"\0\0\x08\x03", b"\0\0\x08\x01"


class ArraySource(Source):
    """Images in one array (N, H, W) or (N, H, W, 3)."""

    what = "a binary data set"

    def __init__(self, images: np.ndarray, name: str):
        super().__init__()
        self.images = images
        self.names = [f"{name}/{number:08d}" for number in range(len(images))]

    def read(self, number: int) -> tuple[bytes, str]:
        return as_png(self.images[number]), "png"


def is_binary(path: str) -> bool:
    names = os.listdir(path) if os.path.isdir(path) else [os.path.basename(path)]
    return any(_CIFAR.fullmatch(name) or _IDX.fullmatch(name) for name in names)


def open_binary(path: str, options: SourceOptions) -> Source:
    """`path`: the folder, of which `--split` takes train or test, or one of its image files."""
    options.allow("a binary data set", "split", "label")
    folder = path if os.path.isdir(path) else os.path.dirname(path)
    names = sorted(os.listdir(path)) if os.path.isdir(path) else [os.path.basename(path)]
    splits: dict[str, list[str]] = {}
    for name in names:
        if _CIFAR.fullmatch(name) or _IDX.fullmatch(name):
            splits.setdefault("test" if name.startswith(("test", "t10k")) else "train", []).append(name)
    chosen = len(splits) == 1 and not options.split
    files = splits[next(iter(splits)) if chosen else one_split(path, sorted(splits), options.split)]
    read = _cifar if files[0].endswith(".bin") else _mnist
    source, labels, class_names = read(folder, files)
    source.stamps = [stamp_of(os.path.join(folder, name)) for name in files]
    if not options.unlabelled:
        if options.label:
            raise UserError(f"--label {options.label[0]} has no effect on a binary data set; write none, or nothing.")
        named = named_numbers(labels, class_names, options.classes, path) if class_names else None
        source.labels = named or class_labels(labels, options.classes, path)
    return source


def _cifar(folder: str, files: list[str]) -> tuple[Source, list[int], list[str]]:
    contents = []
    for name in files:
        with open(os.path.join(folder, name), "rb") as file:
            contents.append(file.read())
    label_bytes = next((n for n in (1, 2) if all(len(content) % (_PIXELS + n) == 0 for content in contents)), 0)
    if not label_bytes or not all(contents):
        raise UserError(f"{folder} holds CIFAR files of a length that no whole number of images has; load them anew.")
    rows = np.concatenate([np.frombuffer(c, np.uint8).reshape(-1, _PIXELS + label_bytes) for c in contents])
    pixels = rows[:, label_bytes:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    names = _names(os.path.join(folder, _CIFAR_NAMES[label_bytes]))
    return ArraySource(pixels, os.path.splitext(files[0])[0]), rows[:, label_bytes - 1].tolist(), names


def _mnist(folder: str, files: list[str]) -> tuple[Source, list[int], list[str]]:
    if len(files) > 1:
        raise UserError(f"{folder} holds {' and '.join(files)}; keep one of them.")
    labels_file = files[0].replace("images", "labels").replace("idx3", "idx1")
    images = _idx(os.path.join(folder, files[0]), _UBYTE_IMAGES, 3)
    labels = _idx(os.path.join(folder, labels_file), _UBYTE_LABELS, 1)
    if len(images) != len(labels):
        raise UserError(
            f"{files[0]} holds {counted(len(images), 'image')}, but {labels_file} {len(labels)} labels; load them anew."
        )
    return ArraySource(images, files[0].partition("images")[0].rstrip("-.")), labels.tolist(), []


def _idx(path: str, magic: bytes, dimensions: int) -> np.ndarray:
    try:
        with gzip.open(path) if path.endswith(".gz") else open(path, "rb") as file:
            content = file.read()
    except (OSError, EOFError) as error:
        raise UserError(f"{path} cannot be read ({error}); load it anew.") from None
    header = 4 + 4 * dimensions
    shape = np.frombuffer(content[4:header], ">u4").tolist() if len(content) >= header else []
    if content[:4] != magic or len(content) != header + int(np.prod(shape)):
        raise UserError(f"{path} is damaged: its length or its header is wrong; load it anew.")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def _names(path: str) -> list[str]:
    if not os.path.isfile(path):
        return []
    with open(path) as file:
        return [line.strip() for line in file if line.strip()]
