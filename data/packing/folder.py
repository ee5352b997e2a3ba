"""Images in a folder, at any depth, with class folders as labels."""

import os
from collections.abc import Sequence

from prelude.data.counting import counted
from prelude.data.errors import UserError
from prelude.data.image_files import folders_of, image_extension_of, list_images
from prelude.data.packing.labels import class_labels
from prelude.data.packing.source import Source, SourceOptions, read_file, strings
from prelude.data.packing.splits import of_one_split, place_of_split, split_in, splits_at

_WHICH = ("parent", "top", "none")


class FolderSource(Source):
    """`--label` and `--group` are `parent` (the folder of the image) or `top` (the first one)."""

    what = "a folder of images"

    def __init__(self, root: str, options: SourceOptions):
        super().__init__()
        options.allow(self.what, "label", "group", "split")
        which = options.label[0] if options.label else ""
        if len(options.label) > 1 or which not in ("", *_WHICH):
            raise UserError(
                f"--label {' '.join(options.label)} is no label of {root}, a folder of images; write one of "
                f"{', '.join(_WHICH)}."
            )
        self.root = root
        listing = list_images(root)
        self.names, self.passed_over = listing.names, listing.passed_over
        self.stamps = [f"{size} {time}" for size, time in zip(listing.sizes, listing.times, strict=True)]
        told, inside = root, self.names  # what messages call the folder, and the names without one of a split
        place = place_of_split(self.names, options.one_split)
        splits = [""] * len(self.names) if place is None else splits_at(place, self.names)
        numbers = of_one_split(root, self.names, splits, options, "image", self.notes)
        if options.one_split:
            self._take(numbers, set(splits) - {options.split, ""}, place)
            told = f"--split {options.split} of {root}"
            inside = [_without(name, place) for name in self.names]
        folders = None if which == "none" else folders_of(inside, which, told)
        if folders:
            self.labels = class_labels(folders, options.classes, f"The folders of {root}", folders=True)
            self.notes.append(f"classes from the names of {counted(len(set(folders)), 'folder')}")
        if options.group:
            if options.group not in ("parent", "top"):
                raise UserError(f"--group {options.group} is no group of a folder of images; write parent or top.")
            self.groups = strings(_folder(name, options.group) for name in inside)

    def _take(self, numbers: Sequence[int], others: set[str], place: int) -> None:
        """Leaves the images of one split, and of what was passed over all that is not of the others."""
        self.names = [self.names[number] for number in numbers]
        self.stamps = [self.stamps[number] for number in numbers]
        self.passed_over = [
            passed
            for passed in self.passed_over
            if not others.intersection(map(split_in, passed.where.split("/")[place:][:1]))
        ]

    def read(self, number: int) -> tuple[bytes, str]:
        name = self.names[number]
        return read_file(os.path.join(self.root, name)), image_extension_of(name)


def _without(name: str, place: int) -> str:
    """The name without the folder at this place."""
    parts = name.split("/")
    return name if place < 0 else "/".join(parts[:place] + parts[place + 1 :])


def _folder(name: str, which: str) -> str:
    return name.rpartition("/")[0] if which == "parent" else name.partition("/")[0] if "/" in name else ""
