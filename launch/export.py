"""Write an encoder as others open it, having compared its features.

prelude export runs/mae --to encoder
python -c "import timm
print(timm.create_model('local-dir:encoder', pretrained=True))"
prelude export runs/mae#student --format onnx --dtype float16 --to encoder-onnx
"""

if __name__ == "__main__" and not __package__:
    import as_script  # noqa: F401  a launched script's folder would hide the package `prelude`

import argparse
from pathlib import Path
from typing import get_args

from prelude.checkpoints.exporting.formats import DType, Format
from prelude.data.errors import UserError
from prelude.launch.arguments import documented_parser, parse, path, source
from prelude.launch.exit_codes import door


def main(argv: list[str] | None = None) -> int:
    args = parse(parser(), argv)
    from prelude.checkpoints.export import export_encoder

    to = Path(args.to) if args.to else _within(args.source, args.format)
    report = export_encoder(
        args.source, to, format=args.format, dtype=args.dtype, license=args.license, check_hub=args.check_hub
    )
    print(report)
    if args.check_hub:
        print(f"{to / 'README.md'}: as the Hugging Face hub takes it")
    return 0


def _within(source: str, format: str) -> Path:
    """Where an export lies unless it is said. Raises UserError for a source that is no folder."""
    folder = Path(source.partition("#")[0])
    if not folder.is_dir():
        raise UserError(f"{source} is no folder that an export could lie in; write --to DIR.")
    return folder / ("export" if format == "timm" else f"export-{format}")


def parser() -> argparse.ArgumentParser:
    parser = documented_parser(__doc__)
    parser.add_argument(
        "source", type=source, metavar="SOURCE", help="a run, RUN#student, or any other source of an encoder"
    )
    parser.add_argument("--to", type=path, metavar="DIR", help="where to write it (default: RUN/export)")
    parser.add_argument("--format", choices=get_args(Format), default="timm", help="who is to open it (default: timm)")
    parser.add_argument("--dtype", choices=get_args(DType), default="float32", help="of the weights (default: float32)")
    parser.add_argument("--license", metavar="ID", help="of the weights, for README.md, such as apache-2.0")
    parser.add_argument("--check-hub", action="store_true", help="refuse what the Hugging Face hub would not take")
    return parser


if __name__ == "__main__":
    raise SystemExit(door(main))
