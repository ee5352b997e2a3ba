"""From the name of a source to what it is."""

import glob
import os
import re

from prelude.data.errors import UserError
from prelude.data.packing.arrow import open_arrow
from prelude.data.packing.binaries import is_binary, open_binary
from prelude.data.packing.folder import FolderSource
from prelude.data.packing.source import Source, SourceOptions
from prelude.data.packing.stacks import open_npy, open_zarr
from prelude.data.packing.table import TableSource, read_table
from prelude.data.packing.tars import TarSource

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
        raise UserError(f"{error.filename or source} cannot be read ({error.strerror or error}); mend it.") from None
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
        return open_binary(source, options)
    if any(_PICKLES.fullmatch(name) for name in names):
        raise UserError(
            f"{source} holds CIFAR as pickles, whose reading can run code; load its binary version (cifar-10-binary)."
        )
    if any(name.endswith(".tar") for name in names):
        return TarSource(os.path.join(source, "*.tar"), options)
    if any(glob.iglob(os.path.join(glob.escape(source), "**", "*.parquet"), recursive=True)):
        return open_arrow(source, options)
    return FolderSource(source, options)
