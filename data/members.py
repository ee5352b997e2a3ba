"""The label members of an index, read without their images."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from prelude.data.decode import BadImage
from prelude.data.shards import ShardIndex
from prelude.data.source import OpenFiles

_CHUNK = 4096


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

    with ThreadPoolExecutor(8) as threads:  # waits for the disk overlap
        for start in range(0, index.num_samples, _CHUNK):
            yield from threads.map(content, range(start, min(start + _CHUNK, index.num_samples)))
