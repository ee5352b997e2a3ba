"""A folder of images read in place, as if it were one shard: its images laid end to end in the order of their names.

- Offsets in the index are places in that row, so that order, resume, labels and damage work as they do for a tar.
- The listing is made once and travels with the path: a file that is added later moves no other, and one that is
  changed later is a bad sample.
- Labels are the names of class folders (`cls`; `parent` or `top` where folders lie within folders), or files beside
  the images, named as members of a tar are: `7.txt` and `7.json` for `7.jpg`.
"""

import hashlib
import io
import os
import zlib

import numpy as np

from prelude.data.decode import BadImage
from prelude.data.errors import UserError, cause_of
from prelude.data.host import own_fault
from prelude.data.image_files import folders_of, list_images
from prelude.data.labels import FOLDERS
from prelude.data.tar_index import Problem, TarIndex

LABEL = "cls"
_LARGEST_LABEL = 2**20  # bytes
_LABELS = 2**30  # bytes of all labels of a name
_SAMPLED = 64  # images whose bytes are part of the fingerprint


class ImageFolder(str):
    """The path of a folder, with what lay in it when it was listed. name: of the folder, however its path is written:
    `photos`, `photos/` and, inside of it, `.` are one data set. Raises OSError where it cannot be read."""

    def __init__(self, path: str):
        self.name = os.path.basename(os.path.abspath(path))
        listing = list_images(path)
        self.names = listing.names
        self.others = [passed.where for passed in listing.passed_over if not passed.is_image]
        self.problems = [Problem(passed.reason, passed.where) for passed in listing.passed_over if passed.is_image]
        self.sizes = np.array(listing.sizes, np.int64)
        self.ends = np.cumsum(self.sizes)
        self.label_texts: dict[int, bytes] = {}  # far behind the images: those of a name, one after the other

    def index(self, label: str, image: str = "") -> TarIndex:
        """Where the images lie in the row, and their labels behind them. image: what their names end with, from the
        first dot on (`left.jpg`); "" for all. Raises UserError for labels that no folder gives."""
        images = np.stack([self.ends - self.sizes, self.sizes], 1)
        labels = self._index_labels(label) if label else np.empty((0, 2), np.int64)
        if image:
            named = [name.rpartition("/")[2].partition(".")[2].lower() == image for name in self.names]
            images, labels = images[named], labels[named] if label else labels
        label_text = self.label_texts[zlib.crc32(label.encode())] if label else b""
        label_content = hashlib.blake2b(label_text, digest_size=16).hexdigest()
        return TarIndex(images, labels, tuple(self.problems), True, self._content(), label_content)

    def read(self, offset: int, size: int) -> bytes:
        """Raises BadImage where the file is no longer what was listed, OSError, and NoMoreFiles."""
        end = int(self.ends[-1])
        if offset >= end:
            name, begin = divmod(offset - end, _LABELS)
            return self.label_texts[name][begin : begin + size]
        name = self.names[int(np.searchsorted(self.ends, offset, side="right"))]
        try:
            with open(os.path.join(self, name), "rb") as file:
                content = file.read(size + 1)
        except OSError as error:
            own_fault(error)
            raise
        if len(content) != size:
            raise BadImage("the file has changed since it was listed")
        return content

    peek = read

    def keys_by_offset(self) -> dict[int, str]:
        return dict(zip((self.ends - self.sizes).tolist(), self.names, strict=True))

    def _content(self) -> str:
        """A hash of all names, and of the bytes of a few images; sizes are in the index."""
        digest = hashlib.blake2b(digest_size=16)
        for name in self.names:
            digest.update(name.encode("utf-8", "surrogateescape") + b"\0")
        for number in range(0, len(self.names), max(len(self.names) // _SAMPLED, 1)):
            try:
                content = self.read(int(self.ends[number] - self.sizes[number]), int(self.sizes[number]))
            except (OSError, BadImage) as error:
                content = str(error).encode()  # the image will be a bad sample
            digest.update(hashlib.blake2b(content, digest_size=16).digest())
        return digest.hexdigest()

    def _index_labels(self, label: str) -> np.ndarray:
        """(N, 2) int64."""
        texts = self._labels(label)
        sizes = np.array([len(text) for text in texts], np.int64)
        begin = self.ends[-1] + zlib.crc32(label.encode()) * _LABELS  # wherever other labels lie
        self.label_texts[zlib.crc32(label.encode())] = b"".join(texts)
        places = np.stack([begin + np.cumsum(sizes) - sizes, sizes], 1)
        return np.where(sizes[:, None] > 0, places, -1)

    def _labels(self, label: str) -> list[bytes]:
        """Of each image; b"" where it has none."""
        folders = None
        if label in (LABEL, *FOLDERS):
            folders = folders_of(self.names, "" if label == LABEL else label, self)
        if folders is not None:
            return [_text(folder) for folder in folders]
        texts = self._beside(label)
        if not any(texts) and label != LABEL:
            raise UserError(
                f"{self} has no .{label} file beside an image; its labels are class folders (cls, or parent and top "
                f"where folders lie within folders) or files named as images are, such as 7.{label} for 7.jpg."
            )
        return texts

    def _beside(self, extension: str) -> list[bytes]:
        """What is in the file with this extension beside each image; b"" where there is none to be had."""
        end = f".{extension}"
        there = {f"{name[: -len(end)]}{end}": name for name in self.others if name.lower().endswith(end)}
        there |= {name: name for name in self.others if name.endswith(end)}  # before another that is `.TXT`
        found = []
        for name in self.names:
            folder, slash, file = name.rpartition("/")
            stems = (os.path.splitext(name)[0], f"{folder}{slash}{file.partition('.')[0]}")
            beside = next((there[stem + end] for stem in stems if stem + end in there), None)
            try:
                with open(os.path.join(self, beside), "rb") if beside else io.BytesIO() as file:
                    found.append(file.read(_LARGEST_LABEL))
            except OSError as error:
                own_fault(error)
                found.append(b"")
        return found


def _text(folder: str) -> bytes:
    """A name that is no UTF-8 is written out, so that any reader can show it."""
    return folder.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace").encode()


def open_folder(path: str) -> ImageFolder:
    """Raises UserError where the folder holds shards, or no image at all."""
    try:
        names = os.listdir(path)
        if any(name.endswith(".tar") for name in names):
            raise UserError(
                f"{path} in data.shards is a folder of shards; write {os.path.join(path, '*.tar')!r}, or move them out "
                f"where its images are meant."
            )
        folder = ImageFolder(path)
    except OSError as error:
        own_fault(error)
        reason = cause_of(error)
        raise UserError(f"{path} in data.shards cannot be read ({reason}); correct data.shards.") from None
    if not folder.names:
        raise UserError(
            f"{path} in data.shards is a folder without an image; write a folder of images, or make shards of what is "
            f"there: prelude shards pack {path} --to DIR."
        )
    return folder
