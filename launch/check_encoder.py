"""Say which objectives an encoder can serve, and why not the others.

    prelude check-encoder resnet50
    prelude check-encoder my_networks:small encoder.kwargs.width=32

ENCODER is an architecture of timm, or module:function of your own, found on
the import path or in the current folder; docs/encoders.md says what it has to
give.
Exit codes: 0 some objective can use it, 1 none can, 2 it is no encoder.
"""

if __name__ == "__main__" and not __package__:
    import as_script  # noqa: F401  a launched script's folder would hide the package `prelude`

import argparse

from prelude.launch.alone import refuse_ranks
from prelude.launch.arguments import documented_parser, parse
from prelude.launch.exit_codes import door


def main(argv: list[str] | None = None) -> int:
    args = parse(parser(), argv)
    refuse_ranks("check-encoder")
    from prelude.launch import encoder_report

    return encoder_report.main(args.encoder, args.overrides)


def parser() -> argparse.ArgumentParser:
    parser = documented_parser(__doc__)
    parser.add_argument("encoder", metavar="ENCODER", help="encoder.name of a config")
    parser.add_argument(
        "overrides", nargs="*", metavar="encoder.key=value", help="its settings (default: encoder.image_size=224)"
    )
    return parser


if __name__ == "__main__":
    raise SystemExit(door(main))
