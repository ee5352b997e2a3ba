"""The label members of an index, read without their images."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from prelude.data.decode import BadImage
from prelude.data.shards import ShardIndex
from prelude.data.source import OpenFiles

_CHUNK = 4096


def label_members(index: ShardIndex, sample_ids: Sequence[int] | None = None) -> Iterator[bytes | None]:
    """The bytes of each sample's label member, in the order of the index, or of `sample_ids`; None where there is none
    to be had."""
    files = OpenFiles(index.paths)
    samples = range(index.num_samples) if sample_ids is None else sample_ids

    def content(sample: int) -> bytes | None:
        offset, size = index.labels[sample].tolist()
        if offset < 0:
            return None
        try:
            return files.read(int(np.searchsorted(index.ends, sample, side="right")), offset, size)
        except BadImage:
            return None

    with ThreadPoolExecutor(8) as threads:  # waits for the disk overlap
        for start in range(0, len(samples), _CHUNK):
            yield from threads.map(content, samples[start : start + _CHUNK])
