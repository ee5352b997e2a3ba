"""Frozen features on disk: computed once, then read by every evaluator that wants them.

- An entry is one kind of feature of every readable sample of a set of shards, in the order of their index. It is named
  by a hash of the encoder's weights, of what it does with them (heads, ε, code of one's own), the data's fingerprint,
  the view, the normalisation, the kind and the precision: what could change a value changes the name. Images written
  again in place have another fingerprint, copies have not.
- What could not be read when an entry was made is tried at each use of it: where some of it can be read by now, the
  entry is made again. Kinds of feature that lack different samples are given without these.
- Values are kept as they were computed, in float32, so that an evaluation from the bank is the one without it.
- An entry exists whole or not at all: it is written to the side, synced and renamed. Its files carry checksums, which
  are verified before it is used; a damaged one is made again.
- Ranks share the work by contiguous parts of the index, each writing its own rows. No sample comes twice or is lost,
  and the entry is that of one process, but for rounding in the encoder.
- What is read is a snapshot: an entry that is removed, cut or written into while it is evaluated changes nothing.
  Making holds one batch.
- Labels are not in it; see `evaluators.features.labels`.
"""

import hashlib
import json
import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from prelude.data.batch import ViewPlan
from prelude.data.counting import counted
from prelude.data.errors import RunStopped, UserError, cause_of
from prelude.data.host import cache_folder
from prelude.data.loader import one_pass
from prelude.data.progress import progress_bar
from prelude.data.shards import ShardIndex
from prelude.data.whole_files import sync_to_disk
from prelude.evaluators.features.extraction import Extractor, NothingReadable
from prelude.evaluators.features.snapshot import snapshot
from prelude.evaluators.features.unfinished import UNFINISHED, unfinished_folder
from prelude.pretrain import distributed
from prelude.pretrain.collectives import row_counts
from prelude.pretrain.sameness import refuse_differences

FORMAT = 3
VALUES, SAMPLE_IDS, ABOUT = "values.f32", "sample_ids.i64", "about.json"
FITS = "fits"  # folder of what was found on them, see `evaluators.kept_fits`
COPY_BYTES = 2**24
_ENTRY = re.compile(rf"[0-9a-f]{{24}}|{re.escape(UNFINISHED)}[0-9a-f]+")  # nothing else is ours
_FIT = re.compile(r"\.?[0-9a-f]{32}\.json(\.\d+)?")  # among what was found on them, its drafts too


@dataclass(frozen=True)
class Rows:
    """One kind of feature of n <= N samples, out of an entry."""

    values: Tensor  # (n, D) float32
    sample_ids: Tensor  # (n,) int64, ascending
    recipe: dict  # how the images were seen and in which precision


@dataclass(frozen=True)
class Entry:
    """What lies in a bank, for people to look at."""

    folder: Path
    about: dict  # empty for one that was never finished
    num_bytes: int


class Bank:
    """The features kept in `folder`, which every rank must see; by default in the cache folder of this machine.

    private: nobody else has to do with the folder, so entries are mapped where they lie, at no cost in memory or room.
    """

    def __init__(self, folder: str | Path | None = None, *, private: bool = False):
        self.folder = Path(folder) if folder else cache_folder() / "bank"
        self.private = private

    def rows(
        self,
        encoder,
        index: ShardIndex,
        kinds: Sequence[str] | None = None,
        *,
        batch_size: int = 256,
        num_workers: int = 0,
        device: torch.device | str = "cpu",
        told: Callable[[int], None] | None = None,
        plan: ViewPlan | None = None,
    ) -> dict[str, Rows]:
        """The features of `index` by kind; what is missing is computed, by all ranks together.

        encoder, kinds: as for `Extractor`. Every rank calls this and gets the whole.
        told: hears, after each batch, how many images this rank has encoded; by default a progress bar. plan: of the
        one view to look at; by default the evaluation's.
        Raises NothingReadable on all ranks, UserError as `Extractor` does, where the folder cannot be written, and
        where a rank does not see it, and RunStopped where an entry is changed while it is read.
        """
        extractor = Extractor(encoder, kinds, device, plan)
        identities = {kind: _identity(extractor, index, kind) for kind in extractor.kinds}
        folders = {kind: self.folder / _digest(identity) for kind, identity in identities.items()}
        missing = []
        if distributed.is_main():
            lacking = {kind: _lacking(folders[kind], identities[kind], index.num_samples) for kind in folders}
            missing = _to_be_made(lacking, index, extractor.plan, batch_size)
        distributed.gather()  # one may have had its shards to index
        if missing := distributed.from_main(missing):
            extractor.kinds = tuple(missing)
            identities_of_missing = {kind: identities[kind] for kind in missing}
            self._fill(extractor, index, identities_of_missing, batch_size, num_workers, told)
        return _common({kind: self._read(folders[kind], extractor.recipe) for kind in folders}, index)

    def entries(self) -> list[Entry]:
        found = sorted(self.folder.iterdir()) if self.folder.is_dir() else []
        ours = [path for path in found if path.is_dir() and _ENTRY.fullmatch(path.name)]
        return [Entry(path, _about(path) or {}, _num_bytes(path)) for path in ours]

    def clear(self) -> None:
        """Removes every entry, what was never finished, and what was found on them. Raises UserError where the folder
        does not let it."""
        fits = self.folder / FITS
        try:
            for entry in self.entries():
                shutil.rmtree(entry.folder)
            for path in fits.iterdir() if fits.is_dir() else ():
                if _FIT.fullmatch(path.name):
                    path.unlink()
            with suppress(OSError):  # it holds something that is not ours, or is not there
                fits.rmdir()
        except OSError as error:
            raise UserError(
                f"{self.folder} cannot be cleared ({cause_of(error)}: {error.filename}); ask its owner to do it."
            ) from None

    def _fill(self, extractor: Extractor, index: ShardIndex, identities: dict, batch_size, num_workers, told) -> None:
        refuse_differences({"features": identities})
        try:
            with unfinished_folder(self.folder) as unfinished:
                self._refuse_unless_shared(unfinished)
                part = _Part(unfinished, index, distributed.rank(), distributed.world_size())
                with encoding(index.num_samples, told) as heard:
                    part.write(extractor, batch_size, num_workers, heard)
                counts = row_counts(part.count)  # every rank has written when this returns
                if not sum(counts):
                    raise NothingReadable(index.named)
                if distributed.is_main():
                    for kind, identity in identities.items():
                        self._finish(unfinished / kind, part.starts, counts, identity)
                distributed.barrier()
        except OSError as error:
            raise UserError(
                f"Features cannot be kept in {self.folder} ({cause_of(error)}); write --bank with a folder "
                f"that has room."
            ) from error

    def _read(self, folder: Path, recipe: dict) -> Rows:
        about = _about(folder)
        if about is None:
            raise UserError(f"{folder} vanished while it was read; run the command again.")
        count, width = about["num_samples"], about["width"]
        if self.private:  # copy on write: torch wants writable memory, and nothing may reach the file
            values = np.memmap(folder / VALUES, "<f4", "c", shape=(count, width))
            return Rows(torch.from_numpy(values), torch.from_numpy(np.fromfile(folder / SAMPLE_IDS, "<i8")), recipe)
        try:
            values = snapshot(folder / VALUES, "<f4", (count, width), checksum=about["checksums"][VALUES])
            ids = snapshot(folder / SAMPLE_IDS, "<i8", (count,), checksum=about["checksums"][SAMPLE_IDS])
        except ValueError as error:
            raise RunStopped(
                f"{folder} was changed by somebody else while it was read ({error}); run the same command again, which "
                f"makes it anew."
            ) from None
        except OSError as error:
            raise UserError(
                f"{folder} cannot be read, or copied where memory is small ({cause_of(error)}); run the "
                f"command again, or write --bank with a folder that has room."
            ) from None
        return Rows(torch.from_numpy(values), torch.from_numpy(ids), recipe)

    def _refuse_unless_shared(self, unfinished: Path) -> None:
        (blind,) = distributed.total(not unfinished.is_dir())
        if blind:
            raise UserError(
                f"{self.folder} is not seen by {counted(f'{blind:g}', 'rank')}; write --bank with a folder that all "
                f"nodes share."
            )

    def _finish(self, written: Path, starts: list[int], counts: list[int], identity: dict) -> None:
        """Closes the gaps that unreadable samples left at the ends of the ranks' parts, and names the entry."""
        width = json.loads((written / ABOUT).read_text())["width"]
        for name, row_bytes in ((VALUES, 4 * width), (SAMPLE_IDS, 8)):
            _close_gaps(written / name, starts, counts, row_bytes)
        about = {**identity, "num_samples": sum(counts), "width": width, "checksums": _checksums(written)}
        with open(written / ABOUT, "w") as file:
            json.dump(about, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        final = self.folder / _digest(identity)
        if not (_is_sound(final, identity) and _covers(_about(final) or {}, about)):
            shutil.rmtree(final, ignore_errors=True)  # a damaged one, or one that lacks images
        with suppress(FileExistsError):  # another process was faster, and has the same
            try:
                os.rename(written, final)
            except OSError as error:
                if not final.is_dir():
                    raise
                raise FileExistsError from error
        sync_to_disk(self.folder)


@contextmanager
def encoding(num_images: int, told: Callable[[int], None] | None) -> Iterator[Callable[[int], None]]:
    """Who is told of the images of this rank: a progress bar of the first one's, unless somebody else."""
    if told is not None or not distributed.is_main():
        yield told or (lambda count: None)
        return
    with progress_bar("encoding images", num_images) as advance:
        yield lambda count: advance(count * distributed.world_size())


class _Part:
    """A rank's share of an entry, written into rows of its own."""

    def __init__(self, folder: Path, index: ShardIndex, rank: int, world_size: int):
        self.folder, self.index, self.rank, self.world_size = folder, index, rank, world_size
        self.starts = [index.num_samples * r // world_size for r in range(world_size)]
        self.count = 0  # rows written, from the start of this rank's part on

    def write(self, extractor: Extractor, batch_size: int, num_workers: int, told: Callable[[int], None]) -> None:
        batches = one_pass(
            self.index,
            extractor.plan,
            batch_size=batch_size,
            rank=self.rank,
            world_size=self.world_size,
            num_workers=num_workers,
        )
        files: dict[tuple[str, str], int] = {}
        try:
            for batch in batches:
                place = self.starts[self.rank] + self.count
                ids = batch.sample_ids.cpu().numpy()
                for kind, rows in extractor(batch).items():
                    values = rows.cpu().contiguous().numpy()
                    if (kind, VALUES) not in files:
                        files |= self._opened(kind, values.shape[1])
                    _write_at(files[kind, VALUES], values, place)
                    _write_at(files[kind, SAMPLE_IDS], ids, place)
                self.count += len(batch)
                told(len(batch))
            for file in files.values():
                os.fsync(file)
        finally:
            for file in files.values():
                os.close(file)

    def _opened(self, kind: str, width: int) -> dict[tuple[str, str], int]:
        folder = self.folder / kind
        folder.mkdir(exist_ok=True)
        (folder / ABOUT).write_text(json.dumps({"width": width}))
        return {(kind, name): os.open(folder / name, os.O_WRONLY | os.O_CREAT, 0o644) for name in (VALUES, SAMPLE_IDS)}


def _identity(extractor: Extractor, index: ShardIndex, kind: str) -> dict:
    return {
        "format": FORMAT,
        "encoder": extractor.encoder.fingerprint,
        "computation": extractor.encoder.computation,
        "name": extractor.encoder.name,
        "data": index.fingerprint,
        "kind": kind,
        **extractor.recipe,
    }


def _digest(identity: dict) -> str:
    decides = {key: value for key, value in identity.items() if key != "name"}
    return hashlib.blake2b(json.dumps(decides, sort_keys=True).encode(), digest_size=12).hexdigest()


def _about(folder: Path) -> dict | None:
    """What an entry says of itself; None where there is none, or it makes no sense."""
    try:
        about = json.loads((folder / ABOUT).read_text())
        known = all(isinstance(about[key], str) for key in ("name", "kind", "data"))
        counts = [about[key] for key in ("num_samples", "width")]
        sizes = [(folder / name).stat().st_size for name in (SAMPLE_IDS, VALUES)]
        sensible = known and all(type(count) is int and count > 0 for count in counts)
        return about if sensible and sizes == [8 * counts[0], 4 * counts[0] * counts[1]] else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _is_sound(folder: Path, identity: dict) -> bool:
    """Whether an entry is whole, what it ought to be, and as it was written. Reads all of it, once."""
    about = _about(folder)
    if about is None or _digest({key: about.get(key) for key in identity}) != _digest(identity):
        return False
    try:
        return about.get("checksums") == _checksums(folder)
    except OSError:
        return False


def _covers(entry: dict, about: dict) -> bool:
    """Whether an entry is of the same samples as another, or of more of them, by what they say of themselves."""
    same = entry.get("checksums", {}).get(SAMPLE_IDS) == about["checksums"][SAMPLE_IDS]
    return same or entry.get("num_samples", 0) > about["num_samples"]


def _lacking(folder: Path, identity: dict, num_samples: int) -> np.ndarray | None:
    """(n,) ids of the samples that an entry has no rows of; None where it is not sound."""
    if not _is_sound(folder, identity):
        return None
    without = np.ones(num_samples, bool)
    with suppress(OSError):  # it has gone meanwhile, and lacks all
        without[np.fromfile(folder / SAMPLE_IDS, "<i8")] = False
    return without.nonzero()[0]


def _to_be_made(lacking: dict[str, np.ndarray | None], index: ShardIndex, plan: ViewPlan, batch_size: int) -> list[str]:
    """Kinds without a sound entry, and those whose entry lacks samples of which some can be read by now."""
    asked = {ids.tobytes(): ids for ids in lacking.values() if ids is not None and len(ids)}
    readable = set()
    for key, ids in asked.items():
        with closing(iter(one_pass(index, plan, batch_size=batch_size, samples=ids))) as batches:
            if next(batches, None) is not None:
                readable.add(key)
    return [kind for kind, ids in lacking.items() if ids is None or ids.tobytes() in readable]


def _common(found: dict[str, Rows], index: ShardIndex) -> dict[str, Rows]:
    """The rows of samples that all kinds have: what is paired by place is of the same images."""
    first, *others = (rows.sample_ids for rows in found.values())
    if all(ids.equal(first) for ids in others):
        return found
    shared = first[torch.stack([torch.isin(first, ids) for ids in others]).all(0)]
    if not len(shared):
        raise NothingReadable(index.named)
    kept = {kind: torch.isin(rows.sample_ids, shared) for kind, rows in found.items()}
    return {kind: Rows(r.values[kept[kind]], r.sample_ids[kept[kind]], r.recipe) for kind, r in found.items()}


def _checksums(folder: Path) -> dict[str, int]:
    """CRC-32 of each file: against decay and mistakes, at the speed of memory."""
    found = {}
    for name in (VALUES, SAMPLE_IDS):
        found[name] = 0
        with open(folder / name, "rb", buffering=0) as file:
            while chunk := file.read(COPY_BYTES):
                found[name] = zlib.crc32(chunk, found[name])
    return found


def _write_at(file: int, rows: np.ndarray, place: int) -> None:
    """rows: (n, ...) C-contiguous, to row `place` of the file."""
    content = memoryview(rows).cast("B")
    offset = place * (len(content) // len(rows))
    while content:
        written = os.pwrite(file, content, offset)
        content, offset = content[written:], offset + written


def _close_gaps(path: Path, starts: list[int], counts: list[int], row_bytes: int) -> None:
    """Moves each part's rows up to the end of the part before; a part is read before it is written over."""
    file, end = os.open(path, os.O_RDWR), 0
    try:
        for start, count in zip(starts, counts, strict=True):
            source, size = start * row_bytes, count * row_bytes
            for done in range(0, size if source != end else 0, COPY_BYTES):
                chunk = os.pread(file, min(COPY_BYTES, size - done), source + done)
                os.pwrite(file, chunk, end + done)
            end += size
        os.ftruncate(file, end)
        os.fsync(file)
    finally:
        os.close(file)


def _num_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
