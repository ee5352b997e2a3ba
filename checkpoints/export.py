"""An encoder as others open it: timm's folder, a folder of transformers, an ONNX file, a `torch.export` archive.

- Nothing of ours is needed to load it.
- Published only after its reader has opened it in this process and its features agree with ours.
- The folder appears whole, or not at all (`exporting/publish.py`).
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import get_args

from prelude.checkpoints.exporting.card import Card, check_card, write_card
from prelude.checkpoints.exporting.formats import VOLUMES, DType, Format
from prelude.checkpoints.exporting.parity import Proof
from prelude.checkpoints.exporting.programs import Traced, trace, write_program
from prelude.checkpoints.exporting.publish import published
from prelude.checkpoints.exporting.timm_folder import takes_any_size, write_timm
from prelude.checkpoints.exporting.transformers_folder import is_converted, parts_turned_off, write_transformers
from prelude.checkpoints.source_names import bare, has_folder, path_of
from prelude.checkpoints.sources import OpenedEncoder, open_encoder
from prelude.data.errors import UserError
from prelude.pretrain.own_encoder import is_own


@dataclass(frozen=True)
class ExportReport:
    path: Path
    architecture: str  # timm's name, or module:function
    fingerprint: str  # of the weights
    max_difference: float  # absolute, between features of the reloaded model and of ours
    num_parameters: int
    reader: str  # who opened it
    note: str = ""

    def __str__(self) -> str:
        more = f"; {self.note}" if self.note else ""
        return (
            f"{self.path}: {self.architecture}, {self.num_parameters:,} parameters; features of {self.reader} differ "
            f"from ours by at most {self.max_difference:.1e}{more}"
        )


def export_encoder(
    source: str,
    to: str | Path,
    *,
    format: Format = "timm",
    dtype: DType = "float32",
    license: str | None = None,
    check_hub: bool = False,
) -> ExportReport:
    """Writes the encoder of `source` (see `open_encoder`) to the folder `to`, replacing an earlier export there.

    dtype: of the weights; of a program also what it computes in. license: an identifier of the hub's, for README.md.
    check_hub: whether README.md must be what the hub takes.

    Raises UserError when `to` holds anything that is not an export of ours, or the only weights of `source`, the disk
    refuses, the format cannot hold this encoder, or the hub would refuse; RunStopped when the features differ from
    ours. Nothing is then published.
    """
    (report,) = export_formats(source, to, (format,), dtype=dtype, license=license, check_hub=check_hub)
    return report


def export_formats(
    source: str,
    to: str | Path,
    formats: Sequence[Format],
    *,
    dtype: DType = "float32",
    license: str | None = None,
    check_hub: bool = False,
) -> list[ExportReport]:
    """`export_encoder` to one format or more. Several lie in folders of `to`, each named as its format, and all of them
    appear together or none does."""
    to, formats = Path(to), list(dict.fromkeys(formats))
    replaced = _lies_in(source, to)
    if replaced:
        _refuse_loss(source, to, formats)
    with published(to) as draft:
        encoder = open_encoder(source)
        for format in formats:
            _refuse(encoder, source, format)
        if replaced:
            _refuse_loss_of_volumes(encoder, source, to, formats)
        traced = cache(lambda: trace(encoder, dtype, takes_any_size(encoder)))  # of two programs only once
        reports = []
        for format in formats:
            within = "" if len(formats) == 1 else format
            folder, name = draft / within, str(Path(to.absolute().name) / within)
            folder.mkdir(exist_ok=True)
            proof = _write(encoder, folder, format, dtype, traced)
            write_card(Card(encoder, name, source, format, dtype, proof, license), folder)
            if check_hub:
                check_card(folder)
            reports.append(_report(encoder, to / within, proof))
    return reports


def _report(encoder: OpenedEncoder, path: Path, proof: Proof) -> ExportReport:
    fixed = [tensor for name, tensor in encoder.model.named_buffers() if name == "pos_embed"]  # a parameter of timm's
    numel = sum(tensor.numel() for tensor in [*encoder.model.parameters(), *fixed])
    name, fingerprint = encoder.config.name, encoder.fingerprint
    return ExportReport(path, name, fingerprint, proof.difference, numel, proof.reader, proof.note)


def _write(encoder: OpenedEncoder, draft: Path, format: Format, dtype: DType, traced: Callable[[], Traced]) -> Proof:
    section = _section(encoder) | {"format": format, "dtype": dtype}
    match format:
        case "timm":
            return write_timm(encoder, draft, dtype, section)
        case "transformers":
            if not is_converted(encoder):
                write_timm(encoder, draft, dtype, section | {"format": "timm"})
            return write_transformers(encoder, draft, dtype, section)
        case _:
            return write_program(encoder, draft, format, dtype, section, traced)


def _section(encoder: OpenedEncoder) -> dict:
    """Of ours, in config.json: all that opens the folder here."""
    return {
        "encoder": encoder.config.model_dump(mode="json"),
        "mean": list(encoder.mean),
        "std": list(encoder.std),
        "fingerprint": encoder.fingerprint,
        "origin": encoder.origin,
        **({"shown_channels": list(encoder.shown)} if encoder.shown else {}),
    }


def _lies_in(source: str, to: Path) -> bool:
    """Whether what takes the place of `to` takes the source away, however the two are spelled."""
    return has_folder(source) and Path(os.path.realpath(path_of(source))).is_relative_to(os.path.realpath(to))


def _refuse_loss(source: str, to: Path, formats: Sequence[Format]) -> None:
    """Of the source's weights, where it lies in `to` and none are written that could be opened in their place."""
    if not {"timm", "transformers"} & set(formats):
        raise UserError(f"{to} would be replaced by programs, whose weights are not read back; name another folder.")
    if bare(source) != source:
        raise UserError(f"{to} would be replaced by other weights than those of {bare(source)}; name another folder.")


def _refuse_loss_of_volumes(encoder: OpenedEncoder, source: str, to: Path, formats: Sequence[Format]) -> None:
    """As `_refuse_loss`, of what lies beside an encoder's weights in a file that not every format has."""
    held = [*to.glob(VOLUMES), *to.glob(f"*/{VOLUMES}")]
    if held and not (encoder.volume_embed and any(_has_timm(encoder, format) for format in formats)):
        raise UserError(
            f"{held[0]} would be lost, for what is written of {source} has none; write --format timm of the folder "
            f"{held[0].parent}, or name another folder than {to}."
        )


def _has_timm(encoder: OpenedEncoder, format: Format) -> bool:
    """Whether timm's folder is written, as it is for transformers too where that has no such architecture."""
    return format == "timm" or (format == "transformers" and not is_converted(encoder))


def _refuse(encoder: OpenedEncoder, source: str, format: Format) -> None:
    if is_own(encoder.config) and format != "timm":
        raise UserError(
            f"{encoder.config.name} is exported as weights and the name of its function, not as {format}; leave out "
            "--format."
        )
    if format == "transformers" and not is_converted(encoder) and (turned_off := parts_turned_off(encoder.config)):
        raise UserError(
            f"{source} has encoder.kwargs.{turned_off[0]}=null, which transformers drops when it builds "
            f"{encoder.config.name}; write --format timm."
        )
    if encoder.config.norm_eps is not None and _has_timm(encoder, format):
        others = ", ".join(name for name in get_args(Format) if name not in ("timm", format))
        raise UserError(
            f"{source} has LayerNorms of eps {encoder.config.norm_eps:g}, which timm's config.json cannot say; write "
            f"--format with one of {others}, or open the weights that it comes from as SOURCE#norm_eps=1e-6, whose "
            "features differ in the sixth digit."
        )
