"""Where the samples of an index come from: their keys, their pixels, and why some have none."""

import os
from collections.abc import Iterable, Iterator

import numpy as np

from prelude.data.decode import BadImage, decode
from prelude.data.open_files import OpenFiles
from prelude.data.remote_shards import RemoteShard
from prelude.data.shards import ShardIndex, keys_in
from prelude.data.signed_urls import without_signature
from prelude.data.waiting import called


class Keys:
    """Keys of samples by their ids. Holds those of one shard, so that it is meant for ids that grow."""

    def __init__(self, index: ShardIndex):
        self.index = index
        self._shard, self._keys = -1, {}

    def of(self, sample_ids: np.ndarray) -> list[str]:
        """sample_ids: (n,) int64. What is no UTF-8 in a name is escaped."""
        shards = self.shards(sample_ids).tolist()
        offsets = self.index.images[sample_ids, 0].tolist()
        return [_text(self._of_shard(shard).get(offset, "?")) for shard, offset in zip(shards, offsets, strict=True)]

    def shards(self, sample_ids: np.ndarray) -> np.ndarray:
        """(n,) int32: the number of each sample's shard among the paths of the index."""
        return np.searchsorted(self.index.ends, sample_ids, side="right").astype(np.int32)

    def _of_shard(self, shard: int) -> dict[int, str]:
        if shard != self._shard:
            path = self.index.paths[shard]
            self._keys, self._shard = called(lambda: keys_in(path), f"the headers of {path}"), shard
        return self._keys


def places_of(index: ShardIndex) -> list[str]:
    return [place_of(path) for path in index.paths]


def place_of(shard: str) -> str:
    """So that it is found from any folder; of a URL without what lets its holder in."""
    return without_signature(shard) if isinstance(shard, RemoteShard) else _text(os.path.abspath(shard))


def pixels_of(index: ShardIndex, sample_ids: Iterable[int], channels: int = 3) -> Iterator[np.ndarray | str]:
    """(H, W, channels) of each sample, as `data.decode` gives them, or in its place why there are none."""
    files = OpenFiles(index.paths)
    for sample in sample_ids:
        shard = int(np.searchsorted(index.ends, sample, side="right"))
        try:
            content = files.read(shard, *index.images[sample].tolist())
            yield decode(content, index.value_range, channels, index.max_pixels)
        except BadImage as error:
            yield str(error)


def _text(key: str) -> str:
    return key.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
