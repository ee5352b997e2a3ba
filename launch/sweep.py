"""One recipe with every combination of some settings, and what came of each.

    prelude sweep mae_cifar10 'optimizer.lr=[1e-3,3e-3]' \\
        'objective.mask_ratio=[0.6,0.75]' 'data.shards=train-*.tar'
    prelude sweep mae_cifar10 'optimizer.lr=[1e-3,3e-3]' --slurm > sweep.sh

A list is what a setting goes through; where a setting is a list itself, a list
of lists is. Runs go one after another, each as by `prelude pretrain`; run
again, the command goes on, and repeats no run that is finished. Writes
OUT/sweep.md and OUT/sweep.json, best first by the online probe. Exit codes as
those of pretraining, and 4 where a run failed. docs/cluster.md says more.
"""

if __name__ == "__main__" and not __package__:
    import as_script  # noqa: F401  a launched script's folder would hide the package `prelude`

import argparse

from prelude.launch.arguments import documented_parser, parse, path, whole
from prelude.launch.combinations import combinations_of
from prelude.launch.exit_codes import door
from prelude.launch.pretrain import refuse_absent_data


def main(argv: list[str] | None = None) -> int:
    args = parse(parser(), argv)
    combinations = combinations_of(args.recipe, args.overrides, args.out)
    if not (args.slurm or args.table):
        for combination in combinations:
            refuse_absent_data(combination.config)
    from prelude.launch.sweeping import sweep

    return sweep(args, combinations)


def parser() -> argparse.ArgumentParser:
    parser = documented_parser(__doc__)
    parser.add_argument("recipe", type=path, metavar="RECIPE", help="a YAML file, or the name of one in configs/")
    parser.add_argument("--out", type=path, metavar="DIR", help="folder of the runs (default: runs/sweep_RECIPE)")
    parser.add_argument(
        "--ranks", type=whole(1), metavar="N", help="processes that train (default: one for each GPU, else one)"
    )
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--slurm", action="store_true", help="train nothing, print a batch script for an array")
    instead.add_argument("--table", action="store_true", help="train nothing, gather the table of what is there")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="settings of all runs; a list: of each")
    return parser


if __name__ == "__main__":
    raise SystemExit(door(main))
