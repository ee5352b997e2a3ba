"""The images whose features are nearest to those of given ones.

- Nearest by cosine, without centring. The search is exact: every image is compared; see
  `evaluators.frozen.exact_search`.
- An image of the set is no neighbour of itself; a copy of it is.
- Images that are not of the set pass through the same encoder, in the same view, as those of the set did.
"""

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from prelude.checkpoints.sources import OpenedEncoder
from prelude.data.absent import told_as
from prelude.data.decode import BadImage, ValueRange, decode
from prelude.data.errors import UserError
from prelude.data.loader import one_pass
from prelude.data.select import Selection, selected
from prelude.data.shards import ShardIndex
from prelude.evaluators.embedding.embed import SELECT, data_of, index_as_seen
from prelude.evaluators.embedding.reading import Embedded
from prelude.evaluators.embedding.samples import Keys
from prelude.evaluators.features.bank import Bank
from prelude.evaluators.features.extraction import Extractor, check_kinds, suited_kinds
from prelude.evaluators.frozen.exact_search import Neighbours
from prelude.evaluators.frozen.pieces import pieces
from prelude.evaluators.judging import described
from prelude.pretrain import distributed


@dataclass(frozen=True)
class Query:
    """An image whose neighbours are looked for: of the set, or a file."""

    name: str
    row: int | None  # in the set
    path: str | None = None


@dataclass(frozen=True)
class Found:
    query: Query
    rows: list[int]  # in the set, nearest first
    cosines: list[float]


def queries_among(embedded: Embedded, names: Sequence[str]) -> list[Query]:
    """names: keys, `SHARD:KEY` where a key is in several shards, SHARD being its file's name or its path as the set has
    it, or image files.

    Raises UserError for what is none of these.
    """
    rows: dict[str, list[int]] = {name: [] for name in names}
    short = [os.path.basename(shard) for shard in embedded.shards]
    for row, key in enumerate(embedded.keys):
        shard = embedded.shard[row]
        for name in {key, f"{short[shard]}:{key}", f"{embedded.shards[shard]}:{key}"} & rows.keys():
            rows[name].append(row)
    return [_query(embedded, short, name, rows[name]) for name in rows]


def nearest(embedded: Embedded, queries: Sequence[Query], vectors: Tensor, k: int) -> list[Found]:
    """vectors: (Q, D), the features of the queries. Fewer than k where the set has fewer.

    Raises UserError for a k below 1, other widths, and features that are not finite.
    """
    if k < 1:
        raise UserError(f"--k {k} asks for no neighbour; write 1 or more.")
    values, width = embedded.values, embedded.values.shape[1]
    if vectors.shape[1] != width:
        raise UserError(
            f"The features of the given images have width {vectors.shape[1]}, those of {embedded.name} {width}; write "
            f"--encoder with the source that {embedded.name} was made by."
        )
    for places, piece in pieces(values, None, width):
        bad = (~piece.isfinite().all(1)).nonzero()
        if len(bad):
            key = embedded.keys[places.start + int(bad[0])]
            raise UserError(f"The features of {key} in {embedded.name} are not finite; make the file again.")
    search = Neighbours(values, centred=False)
    found = []
    for start in range(0, len(queries), 1024):
        some = queries[start : start + 1024]
        cosines, rows = search.nearest(vectors[start : start + 1024], k + 1)
        for query, near, which in zip(some, cosines.tolist(), rows.tolist(), strict=True):
            others = [(row, cosine) for row, cosine in zip(which, near, strict=True) if row != query.row][:k]
            found.append(Found(query, [row for row, _ in others], [cosine for _, cosine in others]))
    return found


def vectors_of(embedded: Embedded, queries: Sequence[Query], encoder: OpenedEncoder | None) -> Tensor:
    """(Q, D) float32. encoder: that of the set; only needed where a query is a file."""
    files = [query.path for query in queries if query.path]
    encoded = iter(encode_files(embedded, files, encoder) if files else ())
    return torch.stack([next(encoded) if query.path else embedded.values[query.row].float() for query in queries])


def encode_files(embedded: Embedded, paths: Sequence[str], encoder: OpenedEncoder) -> Tensor:
    """(n, D) float32, seen as the set was. Raises UserError for another encoder, and for what is no image."""
    made_by = embedded.about.get("encoder", {})
    if encoder.fingerprint != made_by.get("fingerprint"):
        raise UserError(
            f"{embedded.name} was made by {made_by.get('name')}, and {encoder.name} has other weights; write --encoder "
            f"with the source that made it."
        )
    if encoder.computation != made_by.get("computation", encoder.computation):
        raise UserError(
            f"{encoder.name} does something else with its weights than when it made {embedded.name} (heads, ε, strides "
            f"or its own code), or an earlier version made the file; write --encoder with the source that made it, or "
            f"embed the set again."
        )
    check_kinds(encoder.model, [embedded.kind], encoder.name)
    extractor = Extractor(encoder, [embedded.kind], distributed.device())
    for path in paths:
        try:
            read_file(embedded, path)
        except (OSError, BadImage) as error:
            raise UserError(f"{path} is no image that can be read ({error}); write another file, or a key.") from None
    with tempfile.TemporaryDirectory() as folder:
        for number, path in enumerate(paths):
            os.symlink(os.path.abspath(path), Path(folder) / f"{number:08d}.png")  # what it is, its bytes say
        index = _index(embedded, folder, image="")  # each has one file, by whatever name
        names = [Path(key).stem for key in Keys(index).of(np.arange(index.num_samples))]
        rows = {}
        for batch in one_pass(index, extractor.plan, batch_size=64):
            encoded = extractor(batch)[embedded.kind]
            rows |= {int(names[i]): row for i, row in zip(batch.sample_ids.tolist(), encoded, strict=True)}
    return torch.stack([rows[number] for number in range(len(paths))]).cpu()


def embedded_of(
    encoder: OpenedEncoder,
    source: str,
    shards: str | Sequence[str],
    bank: str | Path | None,
    *,
    kind: str | None = None,
    value_range: ValueRange | None = None,
    image: str = "",
    select: Selection | None = None,
    batch_size: int = 256,
    num_workers: int = 0,
) -> Embedded:
    """The features of shards out of a bank, which makes those that it lacks. source: of the encoder."""
    index = index_as_seen([source], shards, "", value_range, image, select, named="--shards ")
    kind = kind or suited_kinds(encoder)[0]
    how = {"device": distributed.device(), "batch_size": batch_size, "num_workers": num_workers}
    rows = Bank(bank).rows(encoder, index, [kind], **how)[kind]
    ids, keys = rows.sample_ids.numpy(), Keys(index)
    about = {"encoder": described(encoder), "data": data_of(index, encoder, select), "kinds": [kind]}
    places = about["data"]["shards"], keys.shards(ids)
    return Embedded(encoder.name, kind, rows.values, keys.of(ids), *places, ids, None, about)


def index_of(embedded: Embedded, shards: str | Sequence[str] | None = None) -> ShardIndex:
    """Of the images themselves. shards: where they are now. Raises UserError where they are gone, or others."""
    there = shards if isinstance(shards, str) else list(shards or embedded.about["data"]["shards"])
    index = _part(_index(embedded, there), embedded)
    if embedded.about["data"]["fingerprint"] not in (index.fingerprint, index.as_written().fingerprint):
        raise UserError(
            f"The images in {index.named} are not those that {embedded.name} was made of; write "
            f"--shards with those, or leave --sheet out."
        )
    return index


def read_file(embedded: Embedded, path: str) -> np.ndarray:
    """(H, W, C) as the images of the set are read. Raises OSError and BadImage."""
    data = embedded.about["data"]
    limits = data["value_range"], data["channels"], data["max_pixels"]
    return decode(Path(path).read_bytes(), *limits)


def _index(embedded: Embedded, shards: str | list[str], image: str | None = None) -> ShardIndex:
    data = embedded.about["data"]
    image = data.get("image", "") if image is None else image
    value_range = tuple(data["value_range"]) if data["value_range"] else None
    with told_as("--shards "):
        return ShardIndex(shards, "", value_range, data["max_pixels"], image)


def _part(index: ShardIndex, embedded: Embedded) -> ShardIndex:
    """What the file was made of. What it names by a file of keys is where that lies now."""
    select = embedded.about["data"].get("select")
    return selected(index, Selection(**select), SELECT) if select else index


def _query(embedded: Embedded, short: Sequence[str], name: str, rows: list[int]) -> Query:
    if len(rows) == 1:
        return Query(name, rows[0])
    if rows:
        shards = [embedded.shard[row] for row in rows]
        alike = len({short[shard] for shard in shards}) < len(set(shards))
        written, key = (embedded.shards if alike else short)[shards[0]], embedded.keys[rows[0]]
        raise UserError(f"{len(rows)} images of {embedded.name} have the key {name}; write one as {written}:{key}.")
    if os.path.isfile(name):
        return Query(name, None, name)
    examples = ", ".join(embedded.keys[:3])
    raise UserError(f"{embedded.name} has no key {name!r}, and there is no such file; its keys are {examples}, …")
