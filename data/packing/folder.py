"""Images in a folder, at any depth, with class folders as labels."""

import os

from prelude.data.counting import counted
from prelude.data.errors import UserError
from prelude.data.image_files import folders_of, image_extension_of, list_images
from prelude.data.packing.labels import class_labels
from prelude.data.packing.source import Source, SourceOptions, read_file, strings

_WHICH = ("parent", "top", "none")


class FolderSource(Source):
    """`--label` and `--group` are `parent` (the folder of the image) or `top` (the first one)."""

    what = "a folder of images"

    def __init__(self, root: str, options: SourceOptions):
        super().__init__()
        options.allow(self.what, "label", "group")
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
        folders = None if which == "none" else folders_of(self.names, which, root)
        if folders:
            self.labels = class_labels(folders, options.classes, f"The folders of {root}", folders=True)
            self.notes.append(f"classes from the names of {counted(len(set(folders)), 'folder')}")
        if options.group:
            if options.group not in ("parent", "top"):
                raise UserError(f"--group {options.group} is no group of a folder of images; write parent or top.")
            self.groups = strings(_folder(name, options.group) for name in self.names)

    def read(self, number: int) -> tuple[bytes, str]:
        name = self.names[number]
        return read_file(os.path.join(self.root, name)), image_extension_of(name)


def _folder(name: str, which: str) -> str:
    return name.rpartition("/")[0] if which == "parent" else name.partition("/")[0] if "/" in name else ""
