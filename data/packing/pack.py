"""From a source to shards in a folder, by several processes, to be killed and started again at any time.

- A shard is a function of the source, the seed and the options; a resumed packing writes what is missing, and ends with
  the same bytes as one that was left alone, at any number of workers.
- NAME.pack.json says what was packed. Another packing under the same name is refused, never mixed with it.
- NAME.index.npz says where everything lies, for those who read the shards from elsewhere.
- NAME.samples.jsonl has every sample with its key and where it came from, NAME.left_out.jsonl everything that was not
  packed and why, NAME.sha256 the shards' checksums, classes.txt the names of classes in the order of their numbers.
"""

import contextlib
import errno
import fcntl
import glob
import hashlib
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from prelude.data.class_list import read_classes
from prelude.data.counting import counted
from prelude.data.errors import RunStopped, UserError, cause_of
from prelude.data.image_files import PassedOver
from prelude.data.packing.open import open_source
from prelude.data.packing.plan import VAL, Shard, deal
from prelude.data.packing.source import Source, SourceOptions
from prelude.data.packing.workers import write_shards
from prelude.data.packing.writer import Outcome, ShardWriter, write_json
from prelude.data.remote_index import write_for as write_index_files
from prelude.data.shards import ShardIndex
from prelude.data.whole_files import write_whole

VERSION = 1
CLASSES = "classes.txt"
_PATIENCE = 5.0  # seconds
_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class Packing:
    """Where shards go and how they are made."""

    to: str
    name: str = "train"
    per_shard: int = 1000  # samples
    seed: int = 0
    val_share: float = 0.0
    short_side: int | None = None  # pixels; larger images are re-coded as JPEG
    quality: int = 90  # of those JPEGs
    workers: int = 1

    def path(self, ending: str) -> str:
        return os.path.join(self.to, self.name + ending)

    @property
    def records(self) -> str:
        """The folder of a packing that is not finished."""
        return os.path.join(self.to, f".{self.name}.packing")

    @property
    def splits(self) -> tuple[str, ...]:
        return (self.name, VAL) if self.val_share else (self.name,)

    def check(self, named_by: str = "--name") -> None:
        """Raises UserError for what cannot be; `named_by` is the argument that the name was taken from."""
        for flag, value, least, most in (
            ("per-shard", self.per_shard, 1, 10**6),
            ("seed", self.seed, 0, 2**63 - 1),
            ("val-share", self.val_share, 0, 0.999),
            ("short-side", self.short_side or 1, 1, 10**5),
            ("quality", self.quality, 1, 100),
            ("workers", self.workers, 1, 1024),
        ):
            if not least <= value <= most:
                raise UserError(f"--{flag} {value} cannot be; write a value from {least} to {most}.")
        if not self.name or set(self.name) & set("/\\{}[]*?:. ") or (self.val_share and self.name == VAL):
            instead = "a plain word" if named_by == "--name" else "a plain word, or --name beside it"
            raise UserError(f"{named_by} {self.name!r} cannot be the start of a shard's name; write {instead}.")


def pack(
    name: str, options: SourceOptions, packing: Packing, progress: Callable[[int, int], None] = lambda done, of: None
) -> tuple[dict[str, Any], list[str]]:
    """Packs the source `name`; returns (summary, what was understood of the source).

    progress: called with the number of images done, and of all, now and then. Raises UserError for what cannot be
    packed, and RunStopped where the disk is full or a worker dies: the same command goes on from there.
    """
    packing.check()
    _refuse_inside(name, packing)
    written = _written_classes(packing)
    if options.classes and written and options.classes[: len(written)] != written:
        raise UserError(
            f"--classes numbers the classes otherwise than {os.path.join(packing.to, CLASSES)}, by which other shards "
            f"of the folder have their labels; leave it out, begin with those names, or write another --to."
        )
    source = open_source(
        name, replace(options, classes=options.classes or written, whole=_is_of_before(options.split, packing))
    )
    _check_classes(source)
    plan = deal(
        len(source.names), name=packing.name, per_shard=packing.per_shard, seed=packing.seed,
        val_share=packing.val_share, groups=source.groups, blocks=source.blocks,
    )  # fmt: skip
    try:
        with _alone(packing):
            summary = _begin(name, options.split, source, plan, packing) or _write(source, plan, packing, progress)
            shutil.rmtree(packing.records, ignore_errors=True)
            return summary, source.notes
    except OSError as error:
        raise _stopped(error, packing) from error


def _refuse_inside(name: str, packing: Packing) -> None:
    """Shards among their own images would be taken for a part of the source."""
    source, to = os.path.realpath(name), os.path.realpath(packing.to)
    if os.path.isdir(name) and os.path.commonpath([source, to]) == source:
        raise UserError(f"--to {packing.to} lies in the source {name}; write a folder beside it.")


def _is_of_before(split: str, packing: Packing) -> bool:
    """Whether it was begun when some sources of several splits were packed as one; it ends as it began. Such a packing
    has no word of the split, or notes the start of its shards' names as one."""
    record = _read_json(packing.path(".pack.json"))
    return record is not None and record.get("split") != split


def _begin(name: str, split: str, source: Source, plan: list[Shard], packing: Packing) -> dict | None:
    """Notes what is packed; returns the summary where that is done already. Raises UserError where another one is."""
    order = hashlib.blake2b(digest_size=16)
    for shard in plan:
        order.update(shard.numbers.astype("<i8").tobytes())
    wanted = {
        "version": VERSION,
        "images": len(source.names),
        "source": source.stamp(),
        "order": order.hexdigest(),
        **{key.replace("_", "-"): getattr(packing, key) for key in ("per_shard", "seed", "val_share")},
        **({"short-side": packing.short_side, "quality": packing.quality} if packing.short_side else {}),
    }
    path = packing.path(".pack.json")
    record = _read_json(path)
    if record is None:
        for start in packing.splits:
            for found in sorted(glob.glob(os.path.join(glob.escape(packing.to), f"{start}-*.tar"))):
                raise UserError(f"{found} is there already and is not of this packing; write another --to or --name.")
        write_json(path, {"source": name, "split": split, "packing": wanted})
        return None
    was = record.get("packing", {})
    changed = [key for key in {**was, **wanted} if was.get(key) != wanted.get(key)]
    if changed:
        listed = ", ".join(
            f"another {key}" if key in ("source", "order") else f"{key} {was.get(key)} -> {wanted.get(key)}"
            for key in changed
        )
        raise UserError(
            f"{path} is of another packing ({listed}); write another --to or --name, or remove it and its shards."
        )
    for shard, size in record.get("sizes", {}).items():
        found = os.path.join(packing.to, shard)
        if not os.path.isfile(found) or os.path.getsize(found) != size:
            raise UserError(f"{found} is missing or has changed since it was packed; remove {path} and the shards.")
    return record.get("summary")


def _write(source: Source, plan: list[Shard], packing: Packing, progress) -> dict:
    _write_classes(source, packing)
    writer = ShardWriter(
        source, source.all_keys(), packing.to, packing.records, packing.short_side, packing.quality
    )  # fmt: skip
    done = {shard.name: outcome for shard in plan if (outcome := writer.finished(shard))}
    waiting = [shard for shard in plan if shard.name not in done]
    before, count = len(source.names) - sum(len(shard.numbers) for shard in waiting), len(source.names)
    for outcome in write_shards(writer, waiting, packing.workers, lambda new: progress(before + new, count)):
        done[outcome.shard] = outcome
    outcomes = [done[shard.name] for shard in plan]
    summary = _summary(source, outcomes, packing)
    if not any(outcome.samples for outcome in outcomes):
        first = outcomes[0].passed_over[0]
        raise RunStopped(
            f"None of {counted(count, 'image')} could be packed (the first: {first.where}, {first.reason})."
        )
    _check_written(outcomes, packing)
    _finish(source, outcomes, summary, packing)
    return summary


def _check_written(outcomes: list[Outcome], packing: Packing) -> None:
    """Reads the shards' headers again, which also fills the index that training starts from."""
    index = ShardIndex([os.path.join(packing.to, outcome.shard) for outcome in outcomes])
    expected = sum(len(outcome.samples) for outcome in outcomes)
    if index.num_problems or index.num_samples != expected:
        raise RunStopped(
            f"{counted(index.num_samples, 'sample')} found in {packing.to} after {expected} were written, and "
            f"{index.num_problems} problems; look at the disk, remove the shards and pack again."
        )


def _finish(source: Source, outcomes: list[Outcome], summary: dict, packing: Packing) -> None:
    samples = (
        json.dumps({"key": key, "shard": outcome.shard, "label": label, "source": where})
        for outcome in outcomes
        for key, label, where in outcome.samples
    )
    write_whole(packing.path(".samples.jsonl"), "".join(f"{line}\n" for line in samples))
    left_out = [
        json.dumps({"source": passed.where, "reason": passed.reason, "lost": passed.is_image})
        for passed in _passed_over(source, outcomes)
    ]
    write_whole(packing.path(".left_out.jsonl"), "".join(f"{line}\n" for line in left_out))
    write_whole(packing.path(".sha256"), "".join(f"{o.sha256}  {o.shard}\n" for o in outcomes))
    sha256 = {os.path.join(packing.to, outcome.shard): outcome.sha256 for outcome in outcomes}
    write_index_files(list(sha256), packing.to, sha256)
    record = _read_json(packing.path(".pack.json"))
    sizes = {outcome.shard: outcome.num_bytes for outcome in outcomes}
    write_json(packing.path(".pack.json"), record | {"summary": summary, "sizes": sizes})


def _summary(source: Source, outcomes: list[Outcome], packing: Packing) -> dict:
    passed = _passed_over(source, outcomes)
    labels = [label for outcome in outcomes for _, label, _ in outcome.samples]
    splits = {}
    for split in packing.splits:
        of_split = [outcome for outcome in outcomes if outcome.shard.startswith(f"{split}-")]
        splits[split] = {
            "shards": len(of_split),
            "images": sum(len(outcome.samples) for outcome in of_split),
            "bytes": sum(outcome.num_bytes for outcome in of_split),
        }
    return {
        "splits": splits,
        "classes": len(source.labels.classes) if source.labels else 0,
        "unlabelled": sum(label is None for label in labels) if source.labels else None,
        "lost": dict(Counter(p.reason for p in passed if p.is_image)),
        "remarks": dict(Counter(p.reason for p in passed if not p.is_image)),
    }


def _passed_over(source: Source, outcomes: list[Outcome]) -> list[PassedOver]:
    return source.passed_over + [passed for outcome in outcomes for passed in outcome.passed_over]


def _written_classes(packing: Packing) -> tuple[str, ...] | None:
    """Those of another packing in the same folder: the numbers of train and val must mean the same."""
    path = os.path.join(packing.to, CLASSES)
    return read_classes(path) if os.path.exists(path) else None


def _check_classes(source: Source) -> None:
    for name in source.labels.classes if source.labels else ():
        if not name.strip() or set(name) & set("\r\n") or name != name.encode("utf-8", "replace").decode():
            raise UserError(f"The class name {name!r} cannot be a line of {CLASSES}; rename the class.")


def _write_classes(source: Source, packing: Packing) -> None:
    if source.labels and source.labels.classes:
        written = _written_classes(packing) or ()
        names = written + tuple(name for name in source.labels.classes if name not in written)
        write_whole(os.path.join(packing.to, CLASSES), "".join(f"{name}\n" for name in names))


@contextlib.contextmanager
def _alone(packing: Packing) -> Iterator[None]:
    """Raises UserError where another process is packing into the same folder under the same name."""
    os.makedirs(packing.records, exist_ok=True)
    try:
        with open(os.path.join(packing.records, "lock"), "w") as file:
            _lock(file, packing)
            yield
    finally:
        with contextlib.suppress(OSError):
            if os.listdir(packing.records) == ["lock"]:  # nothing is begun, or all is done
                shutil.rmtree(packing.records)


def _lock(file, packing: Packing) -> None:
    """Workers hold the lock, too: those of a packing that was killed end a moment after it, and are waited for."""
    until = time.monotonic() + _PATIENCE
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > until:
                raise UserError(f"Another process is packing {packing.name} into {packing.to}; wait for it.") from None
            time.sleep(0.05)
        except OSError:
            return None  # a file system without locks


def _stopped(error: OSError, packing: Packing) -> RunStopped | UserError:
    if error.errno in _FULL:
        return RunStopped(
            f"There is no room left in {packing.to}; make some and give the same command again, which goes on with the "
            f"next shard."
        )
    return UserError(f"{error.filename or packing.to} cannot be written ({cause_of(error)}); mend that.")


def _read_json(path: str) -> dict | None:
    try:
        with open(path) as file:
            return json.load(file)
    except FileNotFoundError:
        return None
    except ValueError:
        return {}
