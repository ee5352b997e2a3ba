"""The class number of every sample of an index, read at once: what a run with labels has to know beforehand."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np

from data.decode import BadImage
from data.errors import UserError
from data.labels import LabelReader
from data.shards import ShardIndex
from data.source import OpenFiles

_CHUNK = 4096
UNKNOWN = -1


def class_numbers(index: ShardIndex) -> np.ndarray:
    """(N,) int64 by sample id; -1 where a sample has no label or a spoilt one.

    `index` was made with its label's extension. Raises UserError where no sample has a label, and for labels that are
    not one integer of 0 or more.
    """
    labelled = np.flatnonzero(index.labels[:, 0] >= 0)
    if not len(labelled):
        raise UserError(f"No sample in {index.paths[0]} and the rest has a .{index.label} member; write another label.")
    files = OpenFiles(index.paths)
    shard = np.searchsorted(index.ends, np.arange(index.num_samples), side="right")

    def content(sample: int) -> bytes:
        return files.read(int(shard[sample]), *index.labels[sample].tolist())

    read_label = LabelReader(index.label, content(int(labelled[0])))
    if read_label.shape or read_label.dtype != np.int64:
        raise UserError(
            f"Members .{index.label} hold {np.dtype(read_label.dtype).name} of shape {read_label.shape} instead of one "
            f"class number a sample; write --label with the extension of integer labels."
        )
    numbers = np.full(index.num_samples, UNKNOWN, np.int64)

    def fill(samples: np.ndarray) -> None:
        for sample in samples.tolist():
            try:
                numbers[sample] = read_label(content(sample))
            except BadImage:
                continue

    with ThreadPoolExecutor(8) as threads:  # waits for the disk overlap
        list(threads.map(fill, np.array_split(labelled, -(-len(labelled) // _CHUNK))))
    if (numbers[labelled] < UNKNOWN).any():
        raise UserError(f"Members .{index.label} hold the class number {numbers.min()}; write 0 or more.")
    return numbers
