"""The label members of an index, read without their images."""

from collections.abc import Iterator

import numpy as np

from data.decode import BadImage
from data.shards import ShardIndex
from data.source import OpenFiles


def label_members(index: ShardIndex) -> Iterator[bytes | None]:
    """The bytes of each sample's label member, in the order of the index; None where there is none to be had."""
    files = OpenFiles(index.paths)
    shards = np.searchsorted(index.ends, np.arange(index.num_samples), side="right")
    for shard, (offset, size) in zip(shards.tolist(), index.labels.tolist(), strict=True):
        if offset < 0:
            yield None
            continue
        try:
            yield files.read(shard, offset, size)
        except BadImage:
            yield None
