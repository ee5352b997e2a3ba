"""One shard: the same bytes for the same images, whole under its name or not there.

- Headers hold nothing but names and sizes: no times, no owners.
- Images are read in the order of their source, which disks and blocks like, and written in that of the plan.
- What became of each image is written beside the shard before the shard gets its name.
"""

import contextlib
import hashlib
import io
import json
import os
import tarfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

from prelude.data.image_files import PassedOver
from prelude.data.packing.images import prepare
from prelude.data.packing.plan import Shard
from prelude.data.packing.source import LeftOut, Source
from prelude.data.whole_files import write_whole

PARTIAL = ".partial"


@dataclass
class Outcome:
    """What became of a shard's images."""

    shard: str
    num_bytes: int = 0
    sha256: str = ""
    samples: list[tuple] = field(default_factory=list)  # (key, label, name in the source)
    passed_over: list[PassedOver] = field(default_factory=list)


@dataclass(frozen=True)
class ShardWriter:
    """Writes shards into `folder`, and their outcomes into `records`. keys: of all images of the source."""

    source: Source
    keys: list[str]
    folder: str
    records: str
    short_side: int | None
    quality: int

    def write(self, shard: Shard, say: Callable[[], None] = lambda: None) -> Outcome:
        """`say` is called after each image. Raises OSError where the shard cannot be written."""
        outcome, samples = Outcome(shard.name), {}
        for number in sorted(shard.numbers.tolist()):
            members = self._members(number, outcome)
            if members:
                samples[number] = members
            say()
        path = os.path.join(self.folder, shard.name)
        try:
            with open(path + PARTIAL, "wb") as file:
                self._write_tar(file, shard, samples, outcome)
                file.flush()
                os.fsync(file.fileno())
            write_json(self.record(shard), asdict(outcome))
            os.replace(path + PARTIAL, path)
        except OSError:
            with contextlib.suppress(OSError):  # a full disk has use for the room
                os.unlink(path + PARTIAL)
            raise
        return outcome

    def finished(self, shard: Shard) -> Outcome | None:
        """The outcome of a shard that an earlier run has finished."""
        try:
            with open(self.record(shard)) as file:
                outcome = Outcome(**json.load(file))
            if os.path.getsize(os.path.join(self.folder, shard.name)) != outcome.num_bytes:
                return None
        except (OSError, ValueError, TypeError):
            return None
        outcome.passed_over = [PassedOver(*passed) for passed in outcome.passed_over]
        return outcome

    def record(self, shard: Shard) -> str:
        return os.path.join(self.records, f"{shard.name}.json")

    def _write_tar(self, file, shard: Shard, samples: dict, outcome: Outcome) -> None:
        hashed = _Hashed(file)
        with tarfile.open(fileobj=hashed, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for number in shard.numbers.tolist():
                if number in samples:
                    self._add(tar, number, samples.pop(number))
                    outcome.samples.append((self.keys[number], self._label(number), self.source.names[number]))
        outcome.num_bytes, outcome.sha256 = hashed.num_bytes, hashed.digest.hexdigest()

    def _members(self, number: int, outcome: Outcome) -> list[tuple[str, bytes]] | None:
        """(extension, content) of a sample's members: the image first, then labels."""
        name = self.source.names[number]
        try:
            image, extension, remark = prepare(*self.source.read(number), self.short_side, self.quality)
            others = self.source.members(number)
        except LeftOut as reason:
            outcome.passed_over.append(PassedOver(name, str(reason), True))
            return None
        if remark:
            outcome.passed_over.append(PassedOver(name, remark, False))
        members = [(extension, image)]
        label, fields = self._label(number), dict(self.source.fields[number]) if self.source.fields else {}
        if isinstance(label, int):
            members.append(("cls", b"%d" % label))
        elif label is not None:
            fields = {"labels": label, **fields}
        if fields:
            members.append(("json", json.dumps(fields).encode()))
        return members + list(others.items())

    def _label(self, number: int):
        return self.source.labels.values[number] if self.source.labels else None

    def _add(self, tar: tarfile.TarFile, number: int, members: list[tuple[str, bytes]]) -> None:
        for extension, content in members:
            info = tarfile.TarInfo(f"{self.keys[number]}.{extension}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


class _Hashed:
    """A file for writing that knows what was written."""

    def __init__(self, file):
        self.file, self.digest, self.num_bytes = file, hashlib.sha256(), 0

    def write(self, content: bytes) -> int:
        self.digest.update(content)
        self.num_bytes += len(content)
        return self.file.write(content)

    def tell(self) -> int:
        return self.num_bytes


def write_json(path: str, content: dict) -> None:
    write_whole(path, json.dumps(content, indent=1, default=str) + "\n")
