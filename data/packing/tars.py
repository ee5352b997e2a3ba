"""Samples of other shards, re-packed: every member goes along, byte for byte.

- `--image` names the image's extension where a sample holds several, such as `left.jpg`; other images are then
  packed as `other.jpg` and so on.
- `--label` makes class numbers (`.cls`) of a text member (`txt`) or of a field of a JSON member (`json:species`);
  without it, labels stay as they are.
"""

import json
import os

from prelude.data.errors import RunStopped, UserError
from prelude.data.image_files import ARRAY_EXTENSION, IMAGE_EXTENSIONS, PassedOver
from prelude.data.labels import field_of
from prelude.data.packing.labels import class_labels
from prelude.data.packing.source import Source, SourceOptions, kept_keys, short_names, stamp_of, strings, unreadable
from prelude.data.packing.splits import of_one_split, splits_of
from prelude.data.remote_shards import named
from prelude.data.shards import expand_shards, is_remote
from prelude.data.tar_index import SEVERAL, image_extension, samples_of


class TarSource(Source):
    what = "shards"

    def __init__(self, source: str, options: SourceOptions, shards: list[str] | None = None):
        """shards: those of `source` where that is a folder; else it is their name, a pattern, or several with `::`."""
        super().__init__()
        options.allow(self.what, "image", "label", "group", "split")
        self.paths = expand_shards(source if shards is None else shards)
        remote = next(filter(is_remote, self.paths), None)
        if remote:
            raise UserError(f"{remote} is no local file and cannot be packed; copy it to a disk.")
        self.places: list[tuple[int, str, dict]] = []  # shard, extension of the image, {extension: (offset, size)}
        shorts = dict(zip(self.paths, short_names(self.paths), strict=True))  # of all, so that no splits share a key
        self.paths = self._of_one_split(source, options)
        keys = []
        for shard, short in enumerate(map(shorts.__getitem__, self.paths)):
            keys += self._add_shard(shard, short, options.image.lower().removeprefix("."))
        self.keys = kept_keys(keys, self.names)
        self.stamps = [stamp_of(path) for path in self.paths]
        self.named, self.replaced = bool(options.image), False
        self._label(options)

    def read(self, number: int) -> tuple[bytes, str]:
        shard, extension, files = self.places[number]
        return self._content(shard, *files[extension]), extension.rpartition(".")[2]

    def members(self, number: int) -> dict[str, bytes]:
        shard, image, files = self.places[number]
        left_out = {image, "cls"} if self.replaced else {image}
        # The labels of `left.jpg` are `left.cls`: packed, the image is `jpg`, and they are `cls`
        start = f"{image.rpartition('.')[0]}."
        # Where the image was named, another one must not come before it in the index's order of preference
        found = {}
        for ext in sorted(files.keys() - left_out):
            own = ext.removeprefix(start) if "." in image else ext
            renamed = f"other.{ext}" if self.named and ext in IMAGE_EXTENSIONS else ext if own in files else own
            if renamed not in left_out:
                found[renamed] = self._content(shard, *files[ext])
        return found

    def _of_one_split(self, source: str, options: SourceOptions) -> list[str]:
        if "::" in source and not options.split:  # by which they are joined on purpose
            return self.paths
        splits = splits_of(source, self.paths)
        return [self.paths[n] for n in of_one_split(source, self.paths, splits, options, "shard", self.notes)]

    def _add_shard(self, shard: int, short: str, image: str) -> list[str]:
        keys, problems = [], []
        samples = samples_of(self.paths[shard], problems)
        arrays = not any(map(image_extension, samples.values()))
        known = (ARRAY_EXTENSION,) if arrays else IMAGE_EXTENSIONS
        for key, files in samples.items():
            extension = image if image in files else None if image else image_extension(files, arrays)
            name = f"{short}/{key}"
            images = [ext for ext in files if ext.rpartition(".")[2] in known]
            several = not image and extension is not None and "." in extension and len(images) > 1
            if extension is None or several:
                reason = SEVERAL if several else f"no {image or 'image'}"
                self.passed_over.append(PassedOver(name, reason, True))
                continue
            self.names.append(name)
            self.places.append((shard, extension, files))
            keys.append(key)
        self.passed_over += [PassedOver(f"{short}/{p.where}", p.reason, True) for p in problems]
        return keys

    def _label(self, options: SourceOptions) -> None:
        if options.group:
            field = options.group.removeprefix("json:")
            self.groups = strings(self._field(number, "json", field) for number in range(len(self.names)))
            if not any(self.groups):
                raise UserError(f"No sample of {named(self.paths)} has the field {field!r} in a .json member.")
        if not options.label:
            return
        if len(options.label) > 1:
            raise UserError("--label takes one member of shards, such as txt or json:species; write one.")
        extension, _, field = options.label[0].lower().removeprefix(".").partition(":")
        field = options.label[0].partition(":")[2]
        values = [self._field(number, extension, field) for number in range(len(self.names))]
        if all(value is None for value in values):
            raise UserError(f"No sample of {named(self.paths)} has a label in {options.label[0]}; correct it.")
        self.labels = class_labels(values, options.classes, f"The label {options.label[0]} of {self.paths[0]}")
        self.replaced = True

    def _field(self, number: int, extension: str, field: str):
        """The text of a member, or a field of its JSON object; None where there is none."""
        shard, _, files = self.places[number]
        if extension not in files:
            return None
        content = self._content(shard, *files[extension])
        try:
            if not field:
                return content.decode().strip()
            return field_of(json.loads(content), field)
        except (ValueError, RecursionError):
            return None

    def _content(self, shard: int, offset: int, size: int) -> bytes:
        path = self.paths[shard]
        try:
            with open(path, "rb") as file:
                content = os.pread(file.fileno(), size, offset)
        except OSError as error:
            raise unreadable(path, error) from error
        if len(content) < size:
            raise RunStopped(f"{path} has become shorter while it was packed; pack again when it is whole.")
        return content
