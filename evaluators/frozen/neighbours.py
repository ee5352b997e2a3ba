"""The nearest images of given ones, by cosine of their features, out of a file that `features.embedding` wrote.

The search is exact, and an image is no neighbour of itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from prelude.data.batch import ViewPlan
from prelude.data.decode import BadImage, decode
from prelude.data.errors import UserError
from prelude.data.pipeline import to_batch
from prelude.data.shards import ShardIndex
from prelude.data.source import MicroBatchBuffers, OpenFiles
from prelude.evaluators.features.embedding import ReadEmbedding
from prelude.evaluators.features.extraction import Extractor
from prelude.evaluators.frozen.knn import Neighbours


@dataclass(frozen=True)
class Query:
    """An image whose neighbours are wanted: a row of the file, or one of its own."""

    name: str
    values: Tensor  # (D,) float32
    row: int | None = None
    image: bytes | None = None  # where it is no row


@dataclass(frozen=True)
class Neighbour:
    row: int
    cosine: float


def nearest(
    read: ReadEmbedding, queries: Sequence[Query], k: int, centred: bool = False, device: torch.device | str = "cpu"
) -> list[list[Neighbour]]:
    """The k nearest of each query, nearest first; fewer where the file has fewer.

    centred: whether the mean of the file is taken off first. Raises UserError for features of another width.
    """
    if k < 1:
        raise UserError(f"--k {k} asks for no neighbour; write 1 or more.")
    for query in queries:
        if len(query.values) != read.values.shape[1]:
            raise UserError(
                f"{query.name} has {len(query.values)} features, the file's {read.kind} {read.values.shape[1]}; "
                f"write the --source that the file was made by."
            )
    rows = torch.arange(len(read.keys))
    bank = Neighbours(read.values, rows, len(rows), centred=centred, device=device)
    cosines, found = bank.nearest(torch.stack([query.values for query in queries]), k + 1)  # one may be itself
    together = zip(queries, cosines.tolist(), found.tolist(), strict=True)
    return [
        [Neighbour(row, cosine) for row, cosine in zip(its_rows, its, strict=True) if row != query.row][:k]
        for query, its, its_rows in together
    ]


def row_of(read: ReadEmbedding, name: str) -> int | None:
    """The row of `KEY`, or `SHARD:KEY` with the shard's file name; None where there is none.

    Raises UserError where several shards have the key.
    """
    rows = [row for row, key in enumerate(read.keys) if key == name]
    if not rows:
        ends = [row for row, key in enumerate(read.keys) if name.endswith(f":{key}")]
        rows = [row for row in ends if name == f"{Path(read.shards[row]).name}:{read.keys[row]}"]
    if len(rows) > 1:
        example = f"{Path(read.shards[rows[0]]).name}:{read.keys[rows[0]]}"
        raise UserError(f"{len(rows)} images have the key {name}; say which, with its shard, such as {example}.")
    return rows[0] if rows else None


def image_query(read: ReadEmbedding, name: str, encoder, device: torch.device | str = "cpu") -> Query:
    """A query of an image file, seen by the encoder as the file's images were.

    Raises UserError where it cannot be read, and where the encoder is another than the file's.
    """
    if encoder.fingerprint != read.about["encoder"]:
        raise UserError(
            f"The file was made by {read.about['name']} with other weights than {encoder.name} has; write --source "
            f"{read.about['source']}."
        )
    extractor = Extractor(encoder, [read.kind], device)
    try:
        content = Path(name).read_bytes()
        batch = _one_image(content, extractor.plan, read.about["range"])
    except (OSError, BadImage) as error:
        raise UserError(f"{name} cannot be read ({getattr(error, 'strerror', None) or error}).") from None
    return Query(name, extractor(batch)[read.kind][0].cpu(), image=content)


def _one_image(content: bytes, plan: ViewPlan, value_range):
    rows = MicroBatchBuffers(plan, 1, None, value_range and tuple(value_range))
    rows.write(0, content, 0, None)
    nothing = {name: np.zeros(1, np.int64) for name in ("seeds", "sample_ids", "positions")}
    return to_batch(rows.arrays() | nothing)


class Pictures:
    """The images behind the rows of a file, read from the shards that it names.

    Raises UserError where these are gone or hold other images by now.
    """

    def __init__(self, read: ReadEmbedding):
        about = read.about
        self.range = about["range"] and tuple(about["range"])
        self.index = ShardIndex(about["shards"], value_range=self.range)
        self.read = read
        if self.index.fingerprint != about["data"]:
            raise UserError(
                f"{about['shards'][0]} and the rest hold other images than when the file was made; embed them again."
            )
        self.files = OpenFiles(self.index.paths)

    def of_row(self, row: int) -> Image.Image:
        sample = int(self.read.sample_ids[row])
        shard = int(np.searchsorted(self.index.ends, sample, side="right"))
        return self.decoded(self.files.read(shard, *self.index.images[sample].tolist()))

    def decoded(self, content: bytes) -> Image.Image:
        return Image.fromarray(decode(content, value_range=self.range))
