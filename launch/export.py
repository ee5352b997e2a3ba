"""Write an encoder as others open it, having compared its features.

prelude export runs/mae --to encoder
python -c "import timm
print(timm.create_model('local-dir:encoder', pretrained=True))"
prelude export runs/ijepa#student --format onnx --dtype float16 --to onnx
prelude export runs/mae --format timm onnx torch --to encoders
"""

if __name__ == "__main__" and not __package__:
    import as_script  # noqa: F401  a launched script's folder would hide the package `prelude`

import argparse
from pathlib import Path
from typing import get_args

from prelude.checkpoints.exporting.formats import DType, Format
from prelude.checkpoints.source_names import FOLDER, RANDOM, START, path_of
from prelude.data.errors import UserError
from prelude.launch.alone import refuse_ranks
from prelude.launch.arguments import documented_parser, offering, parse, path, source
from prelude.launch.exit_codes import door


def main(argv: list[str] | None = None) -> int:
    args = parse(parser(), argv)
    refuse_ranks("export")
    source, formats = _source_and_formats(args)
    to = destination(args)
    from prelude.checkpoints.export import export_formats

    reports = export_formats(source, to, formats, dtype=args.dtype, license=args.license, check_hub=args.check_hub)
    for report in reports:
        print(report)
        if args.check_hub:
            print(f"{report.path / 'README.md'}: as the Hugging Face hub takes it")
    return 0


def destination(args: argparse.Namespace) -> Path:
    """The folder that is written. Raises UserError."""
    source, formats = _source_and_formats(args)
    return Path(args.to) if args.to else _within(source, formats)


def _source_and_formats(args: argparse.Namespace) -> tuple[str, list[str]]:
    """The source may stand behind the formats, as behind any other option. Raises UserError."""
    words, known = list(args.format), get_args(Format)
    named = args.source
    if named is None and len(words) > 1 and words[-1] not in known:
        named = source(words.pop())
    if wrong := [word for word in words if word not in known]:
        raise UserError(f"--format {wrong[0]} is none; write one or more of {', '.join(known)}.")
    if named is None:
        raise UserError("There is no source; write a run's folder, or any other source of an encoder.")
    return named, list(dict.fromkeys(words))


def _within(source: str, formats: list[str]) -> Path:
    """Where an export lies unless it is said: in its run. Raises UserError for a source that is no run, whose folder
    may be replaced or removed with all that is in it."""
    folder = path_of(source)
    if source.startswith((RANDOM, START, FOLDER)) or not (folder / "checkpoints").is_dir():
        raise UserError(f"{source} is no run that an export could lie in; write --to DIR.")
    if len(formats) > 1:
        return folder / "exports"
    return folder / ("export" if formats == ["timm"] else f"export-{formats[0]}")


def parser() -> argparse.ArgumentParser:
    parser = documented_parser(__doc__)
    parser.add_argument(
        "source",
        nargs="?",
        type=source,
        metavar="SOURCE",
        help="a run, or any other source of an encoder; of I-JEPA and DSeq-JEPA, which export their teacher, "
        "RUN#student is the encoder that was trained",
    )
    parser.add_argument("--to", type=path, metavar="DIR", help="where to write it (default: RUN/export)")
    formats = parser.add_argument(
        "--format",
        nargs="+",
        default=["timm"],
        metavar="FORMAT",
        help=f"who is to open it, of {', '.join(get_args(Format))}; several lie in folders of DIR (default: timm)",
    )
    offering(formats, get_args(Format))
    parser.add_argument("--dtype", choices=get_args(DType), default="float32", help="of the weights (default: float32)")
    parser.add_argument("--license", metavar="ID", help="of the weights, for README.md, such as apache-2.0")
    parser.add_argument("--check-hub", action="store_true", help="refuse what the Hugging Face hub would not take")
    return parser


if __name__ == "__main__":
    raise SystemExit(door(main))
