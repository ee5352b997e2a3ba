"""A folder of images read in place, as if it were one shard: its images laid end to end in the order of their names.

- Offsets in the index are places in that row, so that order, resume, labels and damage work as they do for a tar.
- The listing is made once and travels with the path: a file that is added later moves no other, and one that is
  changed later is a bad sample.
- Class folders are labels (`cls`), numbered in the order of their names.
"""

import errno
import hashlib
import os

import numpy as np

from prelude.data.decode import BadImage
from prelude.data.errors import UserError
from prelude.data.image_files import folders_of, list_images
from prelude.data.tar_index import Problem, TarIndex

LABEL = "cls"
_SAMPLED = 64  # images whose bytes are part of the fingerprint


class ImageFolder(str):
    """The path of a folder, with what lay in it when it was listed. Raises OSError where it cannot be read."""

    def __init__(self, path: str):
        listing = list_images(path)
        self.names = listing.names
        self.problems = [Problem(passed.reason, passed.where) for passed in listing.passed_over if passed.is_image]
        self.sizes = np.array(listing.sizes, np.int64)
        self.ends = np.cumsum(self.sizes)
        self.label_text = b""  # follows the images: the class numbers, one after the other

    def index(self, label: str) -> TarIndex:
        """Where the images lie in the row, and their labels behind them. Raises UserError for labels that no folder
        gives."""
        images = np.stack([self.ends - self.sizes, self.sizes], 1)
        labels = self._index_labels(label) if label else np.empty((0, 2), np.int64)
        return TarIndex(images, labels, tuple(self.problems), True, self._content(), self._label_content())

    def read(self, offset: int, size: int) -> bytes:
        """Raises BadImage where the file is no longer what was listed."""
        end = int(self.ends[-1])
        if offset >= end:
            return self.label_text[offset - end : offset - end + size]
        name = self.names[int(np.searchsorted(self.ends, offset, side="right"))]
        with open(os.path.join(self, name), "rb") as file:
            content = file.read(size + 1)
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

    def _label_content(self) -> str:
        return hashlib.blake2b(self.label_text, digest_size=16).hexdigest()

    def _index_labels(self, label: str) -> np.ndarray:
        if label != LABEL:
            raise UserError(
                f"{self} is a folder of images, whose only labels are class folders (cls), not {label}; pack it with "
                f"`prelude shards pack` to have others."
            )
        folders = folders_of(self.names, "", self)
        if folders is None:
            return np.full((len(self.names), 2), -1, np.int64)
        number = {folder: str(n).encode() for n, folder in enumerate(sorted(set(folders)))}
        texts = [number[folder] for folder in folders]
        self.label_text = b"".join(texts)
        sizes = np.array([len(text) for text in texts], np.int64)
        return np.stack([self.ends[-1] + np.cumsum(sizes) - sizes, sizes], 1)


def open_folder(path: str) -> ImageFolder:
    """Raises UserError where the folder holds shards, or no image at all."""
    try:
        names = os.listdir(path)
        if any(name.endswith(".tar") for name in names):
            raise UserError(f"{path} in data.shards is a folder of shards; write {os.path.join(path, '*.tar')!r}.")
        folder = ImageFolder(path)
    except OSError as error:
        reason = error.strerror or errno.errorcode.get(error.errno, "")
        raise UserError(f"{path} in data.shards cannot be read ({reason}); correct data.shards.") from None
    if not folder.names:
        raise UserError(
            f"{path} in data.shards is a folder without an image; write a folder of images, or make shards of what is "
            f"there: prelude shards pack {path} --to DIR."
        )
    return folder
