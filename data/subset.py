"""A few samples of a labelled index, as many of each class as far as it goes.

- Which ones is a function of the index and a seed.
- Labels are read of a bounded number of candidates, so that a small subset of a large data set is found quickly.
"""

from collections import Counter

import numpy as np

from prelude.data.class_names import label_reader
from prelude.data.decode import BadImage
from prelude.data.open_files import OpenFiles
from prelude.data.shards import ShardIndex
from prelude.data.waiting import in_threads

CANDIDATES = 10  # for each sample that is wanted


def balanced_subset(index: ShardIndex, label: str, num_samples: int, seed: int) -> np.ndarray:
    """(n,) int64 sample ids in the order of the index; all labelled ones where there are no more than `num_samples`.

    Classes take turns until enough samples are found, so that a class that runs out is made up for by the others.
    label: extension of the member with the class number. Raises UserError where there is no such member.
    """
    index = index.with_label(label)
    read, files = label_reader(index, label), OpenFiles(index.paths)
    with_member = np.flatnonzero(index.labels[:, 0] >= 0)
    order = np.random.default_rng(seed).permutation(len(with_member))
    candidates = with_member[order[: CANDIDATES * num_samples]]

    def class_of(sample: int) -> bytes | None:
        offset, size = index.labels[sample].tolist()
        try:
            shard = int(np.searchsorted(index.ends, sample, side="right"))
            return read(files.read(shard, offset, size)).tobytes()
        except BadImage:
            return None

    seen: Counter = Counter()
    turns, labelled = [], []
    in_order = sorted(candidates.tolist())  # of the index: a remote shard is fetched once
    numbers = in_threads(class_of, in_order, lambda sample: f"a label in {index.shard_of(sample)}")
    number_of = dict(zip(in_order, numbers, strict=True))
    for sample in candidates.tolist():
        number = number_of[sample]
        if number is not None:
            turns.append(seen[number])
            labelled.append(sample)
            seen[number] += 1
    first = np.argsort(np.array(turns, np.int64), kind="stable")[:num_samples]
    return np.sort(np.array(labelled, np.int64)[first])
