"""A source and shards, or a folder of images, to a file of features.

- Features are those of an evaluation, made by the same bank: a piece of the samples at a time, by all ranks together.
- A piece that is done is kept, with checksums, in a folder beside the file, so that after a kill the same command goes
  on, at any number of ranks. The folder is gone once the file is there.
- The file appears whole or not at all. Memory holds a batch, and what the format wants to have at once.
- Images without features are listed, each with its reason, in `NAME.left_out.jsonl`.
"""

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from prelude.checkpoints.sources import OpenedEncoder
from prelude.data.absent import told_as
from prelude.data.class_names import with_class_names
from prelude.data.decode import ValueRange
from prelude.data.errors import UserError
from prelude.data.select import Selection, selected
from prelude.data.shards import ShardIndex
from prelude.data.value_range import tell_if_dark
from prelude.data.whole_files import remove, whole, write_whole
from prelude.evaluators.embedding.formats import LEFT_OUT_ENDING, beside, format_of, refuse_anothers_files
from prelude.evaluators.embedding.samples import Keys, pixels_of, place_of, places_of
from prelude.evaluators.embedding.table import Table
from prelude.evaluators.embedding.writing import write
from prelude.evaluators.features.bank import Bank, Rows
from prelude.evaluators.features.extraction import NothingReadable, check_kinds, suited_kinds
from prelude.evaluators.features.labels import Labels, class_numbers
from prelude.evaluators.judging import described, open_source, read_as
from prelude.evaluators.results import versions
from prelude.pretrain import distributed
from prelude.pretrain.files import reason, refuse_to_overwrite
from prelude.pretrain.run_lock import NAME as LOCK
from prelude.pretrain.run_lock import RunLock

LABEL = "cls"  # looked for unless told otherwise
PIECE = 8192  # samples a rank, which is what a kill costs at most
SELECT = "--select"
_PLAN = "plan.json"


@dataclass(frozen=True)
class Embedding:
    """What to take of which images, and where to."""

    source: str
    shards: str | Sequence[str]
    to: Path
    _: KW_ONLY
    kinds: Sequence[str] | None = None  # of feature; None: what suits the encoder
    dtype: str = "float32"
    label: str = ""  # where the class is, such as txt or json:FIELD; "": `cls`, where there are such
    image: str = ""  # extension of the image's member; "": any
    select: Selection | None = None  # a part of the shards
    value_range: ValueRange | Literal["auto"] | None = None  # None: that of the source's run
    bank: str | Path | None = None  # where pieces are kept meanwhile; None: beside the file
    seed: int = 0  # of `random:` sources
    batch_size: int = 256
    num_workers: int = 0
    say: Callable[[str], None] = lambda text: None
    told: Callable[[int, int], None] = lambda done, of: None  # of the images of all ranks, about

    @property
    def kept(self) -> Path:
        """The folder of the pieces."""
        return Path(self.bank or self.to.absolute().parent) / f".{self.to.name}.unfinished"


@dataclass(frozen=True)
class Written:
    path: Path
    num_rows: int
    kinds: dict[str, int]  # widths
    left_out: Counter  # by reason
    listed: Path  # where each is named


def embed(embedding: Embedding) -> Written | None:
    """Writes the file. Every rank calls this; all but the first get None, as soon as the features are there.

    Raises UserError for whatever cannot be used or written, and where the file is there already.
    """
    refuse_to_overwrite(embedding.to, "--to")
    refuse_anothers_files(embedding.to, "--to")
    index, labels = labelled_index(embedding)
    encoder = open_source(embedding.source, [embedding.source], embedding.seed)
    kinds = _kinds(embedding, encoder)
    if encoder.loaded:
        embedding.say(encoder.loaded)
    with _held(embedding) as size:
        pieces = list(_pieces(embedding, encoder, index, kinds, size))
        if not distributed.is_main():
            return None
        distributed.stop()  # nobody waits for what one rank writes
        pieces = [(start, rows) for start, rows in pieces if rows]
        if not pieces:
            _clear(embedding.kept)
            raise NothingReadable(index.named)
        about = _about(embedding, encoder, index, pieces[0][1])
        written = _write(embedding, Table(index, pieces, labels, embedding.dtype, about))
        _clear(embedding.kept)
    return written


def labelled_index(embedding: Embedding) -> tuple[ShardIndex, Labels | None]:
    """Raises UserError for labels that were asked for and are none."""
    label = embedding.label or LABEL
    seen_as = embedding.value_range, embedding.image
    index = index_as_seen([embedding.source], embedding.shards, label, *seen_as, select=embedding.select)
    if embedding.label:
        (index,) = with_class_names([index])
        return index, class_numbers(index)
    if not (index.labels[:, 0] >= 0).any():
        return index, None
    try:
        (index,) = with_class_names([index])
        return index, class_numbers(index)
    except UserError as error:
        embedding.say(f"without labels: {error}")
        return index, None


def index_as_seen(
    sources: Sequence[str],
    shards: str | Sequence[str],
    label: str = "",
    value_range: ValueRange | Literal["auto"] | None = None,
    image: str = "",
    select: Selection | None = None,
    option: str = SELECT,
    named: str = "",
) -> ShardIndex:
    """With `data.range` and `data.max_pixels` of the runs of the sources that are to see it, unless a range is given.
    option: which says `select`. named: how shards are spelled where they were given, see `told_as`.

    Raises UserError where runs differ in their range."""
    value_range, max_pixels, channels = read_as(sources, value_range)
    shards = shards if isinstance(shards, str) else list(shards)
    with told_as(named):
        index = ShardIndex(shards, label, value_range, max_pixels, image, channels)
    if distributed.is_main():
        tell_if_dark(index)
    return selected(index, select, option)


def data_of(index: ShardIndex, encoder: OpenedEncoder, select: Selection | None = None) -> dict:
    """What it takes to find the images again, and to see others in the same way."""
    image = next(filter(None, index.images_named), "")
    named = {"image": image} if image else {}
    named |= {"select": select.said()} if select else {}
    named |= {"classes": list(index.classes)} if index.classes else {}
    return {
        **named,
        "fingerprint": index.fingerprint,
        "value_range": index.value_range,
        "max_pixels": index.max_pixels,
        "channels": encoder.config.in_chans,
        **({"shown_channels": list(encoder.shown)} if encoder.shown else {}),
        "shards": places_of(index),
    }


def _kinds(embedding: Embedding, encoder: OpenedEncoder) -> tuple[str, ...]:
    kinds = tuple(dict.fromkeys(embedding.kinds or ()))
    single = format_of(embedding.to) == ".npy"
    if not kinds:
        kinds = suited_kinds(encoder)[: 1 if single else None]
    check_kinds(encoder.model, kinds, encoder.name)
    if single and len(kinds) > 1:
        raise UserError(f"{embedding.to} has room for one kind of feature, not {', '.join(kinds)}; write a .npz.")
    return kinds


@contextmanager
def _held(embedding: Embedding) -> Iterator[int]:
    """Holds the folder of pieces against a second start, and gives the samples of a piece: those of the first start,
    whose pieces may be there."""
    lock, size = RunLock(embedding.kept, embedding.say, option="--to"), None
    try:
        if distributed.is_main():
            try:
                lock.hold()
                size = _planned(embedding.kept / _PLAN)
            except OSError as error:
                raise UserError(
                    f"Nothing can be kept in {embedding.kept} ({reason(error)}); write --bank with a folder that has "
                    f"room."
                ) from None
        distributed.gather()  # one may have had its shards to index
        yield distributed.from_main(size)
    finally:
        lock.release()
        with suppress(OSError):
            embedding.kept.rmdir()  # where nothing is kept


def _planned(plan: Path) -> int:
    try:
        size = json.loads(plan.read_text())["samples"]
        if type(size) is int and size > 0:
            return size
    except (OSError, ValueError, KeyError, TypeError):
        pass  # there is none, or it makes no sense
    size = PIECE * distributed.world_size()
    write_whole(plan, json.dumps({"samples": size}))
    return size


def _pieces(
    embedding: Embedding, encoder: OpenedEncoder, index: ShardIndex, kinds: Sequence[str], size: int
) -> Iterator[tuple[int, dict[str, Rows]]]:
    """(first sample, rows by kind) of each piece; no rows where nothing in it can be read."""
    bank, total = Bank(embedding.kept, private=True), index.num_samples
    for start in range(0, total, size):
        stop, done = min(start + size, total), start

        def told(count: int, stop: int = stop) -> None:
            nonlocal done
            done = min(done + count * distributed.world_size(), stop)
            embedding.told(done, total)

        part = index if stop - start == total else index.subset(np.arange(start, stop))
        reading = {"batch_size": embedding.batch_size, "num_workers": embedding.num_workers}
        try:
            rows = bank.rows(encoder, part, kinds, device=distributed.device(), told=told, **reading)
        except NothingReadable:
            rows = {}
        embedding.told(stop, total)
        yield start, rows


def _about(embedding: Embedding, encoder: OpenedEncoder, index: ShardIndex, rows: dict[str, Rows]) -> dict:
    return {
        "source": embedding.source,
        "seed": embedding.seed,
        "encoder": described(encoder),
        "data": data_of(index, encoder, embedding.select),
        "kinds": list(rows),
        "features": next(iter(rows.values())).recipe,
        "dtype": embedding.dtype,
        "versions": versions(),
    }


def _write(embedding: Embedding, table: Table) -> Written:
    to, listed = embedding.to, beside(embedding.to, LEFT_OUT_ENDING)
    left_out: Counter = Counter()
    try:
        remove(listed)  # of an earlier file of this name
        found = _left_out(table)
        if first := next(found, None):
            with whole(listed) as file:
                for line in (first, *found):
                    left_out[line["reason"]] += 1
                    file.write(json.dumps(line).encode() + b"\n")
        write(table, to)
    except OSError as error:
        raise UserError(
            f"{to} cannot be written ({reason(error)}); make room there and run the same command again: what was "
            f"computed is kept."
        ) from error
    return Written(to, table.num_rows, table.kinds, left_out, listed)


def _left_out(table: Table) -> Iterator[dict]:
    """Shard, key and reason of what has no features: first what the index could not make out."""
    for shard, problems in table.index.problems.items():
        for problem in problems:
            yield {"shard": place_of(shard), "key": problem.where, "reason": problem.reason}
    missing, keys, channels = table.missing(), Keys(table.index), table.about["data"]["channels"]
    for sample, pixels in zip(missing, pixels_of(table.index, missing, channels), strict=True):
        why = pixels if isinstance(pixels, str) else "could not be read when its turn came"
        yield {
            "shard": place_of(table.index.shard_of(sample)),
            "key": keys.of(np.array([sample]))[0],
            "reason": why,
        }


def _clear(kept: Path) -> None:
    """What is left is no harm: the file is there."""
    with suppress(OSError):
        for path in kept.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != LOCK:
                path.unlink()
