"""The label members of an index, read without their images."""

from collections.abc import Iterator

import numpy as np

from prelude.data.decode import BadImage
from prelude.data.shards import ShardIndex
from prelude.data.source import OpenFiles
from prelude.data.waiting import in_threads

_AT_ONCE = 256  # that a thread reads


def label_members(index: ShardIndex) -> Iterator[bytes | None]:
    """The bytes of each sample's label member, in the order of the index; None where there is none to be had."""
    files = OpenFiles(index.paths)
    shards = np.searchsorted(index.ends, np.arange(index.num_samples), side="right")

    def content(sample: int) -> bytes | None:
        offset, size = index.labels[sample].tolist()
        if offset < 0:
            return None
        try:
            return files.read(int(shards[sample]), offset, size)
        except BadImage:
            return None

    def contents(start: int) -> list[bytes | None]:
        return [content(sample) for sample in range(start, min(start + _AT_ONCE, index.num_samples))]

    starts = range(0, index.num_samples, _AT_ONCE)
    for found in in_threads(contents, starts, lambda start: f"the labels in {index.shard_of(start)}"):
        yield from found
