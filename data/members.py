"""The label members of an index, read without their images."""

import logging
from collections.abc import Iterator, Sequence

import numpy as np

from prelude.data.counting import counted
from prelude.data.decode import BadImage
from prelude.data.open_files import OpenFiles
from prelude.data.remote_shards import read_some
from prelude.data.shards import ShardIndex
from prelude.data.waiting import in_threads, moved

log = logging.getLogger(__name__)

_AT_ONCE = 256  # that a thread reads


def label_members(
    index: ShardIndex, sample_ids: Sequence[int] | None = None, peek: bool = False
) -> Iterator[bytes | None]:
    """The bytes of each sample's label member, in the order of the index, or of `sample_ids`; None where there is none
    to be had. peek: a few from all over, for which no remote shard is fetched."""
    files = OpenFiles(index.paths)
    samples = range(index.num_samples) if sample_ids is None else sample_ids

    def content(sample: int) -> bytes | None:
        offset, size = index.labels[sample].tolist()
        if offset < 0:
            return None
        try:
            if peek:
                return read_some(index.shard_of(sample), offset, size)
            return files.read(int(np.searchsorted(index.ends, sample, side="right")), offset, size)
        except (BadImage, OSError):
            return None

    def contents(start: int) -> list[bytes | None]:
        return [content(sample) for sample in samples[start : start + _AT_ONCE]]

    starts = range(0, len(samples), _AT_ONCE)
    for found in in_threads(contents, starts, lambda start: f"the labels in {index.shard_of(samples[start])}"):
        yield from found
        moved()  # what is made of them may take longer than to read them


def warn_unread(index: ShardIndex, unread: int, then: str) -> None:
    """Of samples that have a label member, whose bytes could not be had."""
    if unread:
        log.warning(
            "%s of %s cannot be read: %s, and the next start looks again", counted(unread, "label"), index.named, then
        )
