"""Say whether your own objective keeps the contract that runs rely on.

    prelude check-objective mine:Denoising --config mae_cifar10
    prelude check-objective mine:Denoising --config mine.yaml --quick

The config says which encoder, and options of the objective; what else is in
it, its data too, plays no part: images are made up, batches small, steps few,
and all is computed on the CPU. A small encoder makes it quick. `--quick` starts
no second process, and leaves ranks, ZeRO and the real resume and export out.
Each line says pass or FAIL, and what to look at. Exit codes: 0 all passed,
1 a check failed, 2 a mistake in the command or config.
"""

if __name__ == "__main__" and not __package__:
    import as_script  # noqa: F401  a launched script's folder would hide the package `prelude`

import argparse

from prelude.launch.alone import refuse_ranks
from prelude.launch.arguments import documented_parser, offering, parse, path
from prelude.launch.exit_codes import door
from prelude.objectives import OURS


def main(argv: list[str] | None = None) -> int:
    args = parse(parser(), argv)
    refuse_ranks("check-objective")
    from prelude.launch import objective_report

    return objective_report.main(args.objective, args.config, args.overrides, quick=args.quick)


def parser() -> argparse.ArgumentParser:
    parser = documented_parser(__doc__)
    named = "module:Class, or the name of one that is installed"
    offering(parser.add_argument("objective", metavar="OBJECTIVE", help=named), sorted(OURS))
    parser.add_argument("--config", required=True, type=path, help="a YAML file, or the name of a recipe in configs/")
    parser.add_argument("--quick", action="store_true", help="only what one process can say")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="settings that replace the config's")
    return parser


if __name__ == "__main__":
    raise SystemExit(door(main))
