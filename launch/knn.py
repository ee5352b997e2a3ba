"""k-nearest-neighbour accuracy of frozen encoders.

    prelude knn runs/mae random:runs/mae pixels --train 'train-{0..9}.tar' --test test-0.tar

Several sources give one table; each result is also written as JSON. docs/evaluators.md says how it is measured.
"""

if __name__ == "__main__" and not __package__:
    import as_script  # noqa: F401  a launched script's folder would hide the package `pretrain`

import argparse

from evaluators.knn import knn
from evaluators.results import print_table
from launch.exit_codes import door
from launch.frozen import add_arguments, results_of


def main(argv: list[str] | None = None) -> int:
    print_table(results_of(parser().parse_args(argv), [knn], "knn", argv))
    return 0


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n\n")[0],
        epilog=__doc__.partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    return parser


if __name__ == "__main__":
    raise SystemExit(door(main))
