"""Write a run's encoder as a plain timm checkpoint.

prelude export runs/mae --to encoder
python -c "import timm
print(timm.create_model('local-dir:encoder', pretrained=True))"
"""

if __name__ == "__main__" and not __package__:
    import as_script  # noqa: F401  a launched script's folder would hide the package `prelude`

import argparse
from pathlib import Path

from prelude.launch.arguments import documented_parser, parse, path, source
from prelude.launch.exit_codes import door


def main(argv: list[str] | None = None) -> int:
    args = parse(parser(), argv)
    from prelude.checkpoints.export import export_encoder

    to = Path(args.to) if args.to else Path(args.source) / "export"
    report = export_encoder(args.source, to)
    print(report)
    return 0


def parser() -> argparse.ArgumentParser:
    parser = documented_parser(__doc__)
    parser.add_argument("source", type=source, metavar="RUN", help="a run folder, or one of its checkpoints")
    parser.add_argument("--to", type=path, metavar="DIR", help="where to write it (default: RUN/export)")
    return parser


if __name__ == "__main__":
    raise SystemExit(door(main))
