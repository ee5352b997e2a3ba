"""From the name of a source to what it is."""

import glob
import os
import re
from collections.abc import Iterable

from prelude.data.counting import counted
from prelude.data.errors import UserError, cause_of
from prelude.data.image_files import ARRAY_EXTENSION, image_extension_of, list_images
from prelude.data.packing.arrow import ArrowSource, open_arrow
from prelude.data.packing.binaries import is_binary, open_binary
from prelude.data.packing.folder import FolderSource
from prelude.data.packing.source import Source, SourceOptions
from prelude.data.packing.stacks import open_npy, open_zarr
from prelude.data.packing.table import TableSource, read_table
from prelude.data.packing.tars import TarSource
from prelude.data.packing.within import files_within

KINDS = (
    "a folder of images, a .csv, .tsv or .jsonl table of paths, .parquet files, a Hugging Face dataset saved to disk, "
    "the binary files of CIFAR or MNIST, a .npy or .zarr stack, or tar shards"
)
_TABLES = (".csv", ".tsv", ".jsonl", ".ndjson")
_ZARR = (".zgroup", ".zarray", "zarr.json")
_PICKLES = re.compile(r"data_batch_\d+|batches\.meta")


def open_source(source: str, options: SourceOptions) -> Source:
    """Lists the images of a source. Raises UserError where it is nothing that can be packed, or holds no image."""
    try:
        opened = _open(source, options)
    except OSError as error:
        raise UserError(f"{error.filename or source} cannot be read ({cause_of(error)}); mend it.") from None
    if not opened.names:
        lost = [passed for passed in opened.passed_over if passed.is_image]
        first = f" (the first that was left out: {lost[0].where}, {lost[0].reason})" if lost else ""
        raise UserError(f"{source} holds no image that can be packed{first}; write {KINDS}.")
    return opened


def _open(source: str, options: SourceOptions) -> Source:
    lower = source.lower()
    if os.path.isdir(source):
        return _open_folder(source, options)
    if lower.endswith(".tar") or "::" in source or "{" in source:
        return TarSource(source, options)
    if lower.endswith((".parquet", ".arrow")):
        return open_arrow(source, options)
    if not os.path.exists(source):
        raise UserError(f"{source} does not exist; write {KINDS}.")
    if lower.endswith(_TABLES):
        return TableSource(source, read_table(source), options)
    if lower.endswith(".npy"):
        return open_npy(source, options)
    if is_binary(source):
        return open_binary(source, options)
    raise UserError(f"{source} is nothing that can be packed; write {KINDS}.")


def _open_folder(source: str, options: SourceOptions) -> Source:
    names = set(os.listdir(source))
    if names & {"dataset_dict.json", "state.json"}:
        return open_arrow(source, options)
    if names.intersection(_ZARR):
        return open_zarr(source, options)
    if is_binary(source):
        return _beside_images(open_binary(source, options), source)
    if any(_PICKLES.fullmatch(name) for name in names):
        raise UserError(
            f"{source} holds CIFAR as pickles, whose reading can run code; load its binary version (cifar-10-binary)."
        )
    tables = [os.path.relpath(table, source) for table in files_within(source, ".parquet")]
    if any(name.endswith(".tar") for name in names):
        shards = os.path.join(source, "*.tar")
        if beside := next(iter(tables or _image_files(source)), None):
            raise UserError(
                f"{source} holds tar shards and, beside them, {beside}; write {shards!r} for the shards, or move them "
                f"out."
            )
        top = glob.iglob("*.tar", root_dir=source)  # all that was looked for once
        return TarSource(source, options, _joined(source, top) if options.whole else files_within(source, ".tar"))
    if tables:
        opened = open_arrow(source, options)
        return _beside_images(opened, source) if isinstance(opened, ArrowSource) else opened
    nested = files_within(source, ".tar")
    if nested and options.whole:
        nested = _joined(source, glob.iglob("**/*.tar", root_dir=source, recursive=True))
    if nested and not _image_files(source):
        return TarSource(source, options, nested)
    return FolderSource(source, options)


def _joined(folder: str, names: Iterable[str]) -> list[str]:
    return sorted(os.path.join(folder, name) for name in names)


def _beside_images(opened: Source, folder: str) -> Source:
    """Tells of images in the folder of what holds images itself."""
    if images := _image_files(folder):
        opened.notes.append(f"without {counted(len(images), 'image file')} that lie beside, such as {images[0]}")
    return opened


def _image_files(folder: str) -> list[str]:
    """Arrays are as often labels or features."""
    return [name for name in list_images(folder).names if image_extension_of(name) != ARRAY_EXTENSION]
