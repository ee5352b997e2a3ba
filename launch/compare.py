"""Objectives or checkpoints side by side: same data, same budget, one page.

    prelude compare runs/mae runs/barlow \\
        --train 'train-{0..9}.tar' --test test-0.tar
    prelude compare runs/mine --train 'train-*.tar' --test 'test-*.tar' \\
        --keep 'old/train-*.tar' 'old/test-*.tar'
    prelude compare mae_cifar10 barlow_cifar10 --images 200000 \\
        --pretraining-seeds 3 --train 'train-{0..9}.tar' --test test-0.tar
    deepspeed --num_gpus 8 --module prelude.launch.compare \\
        runs/mae runs/barlow

A recipe among the sources is pretrained first, into OUT/runs; ranks of a
launcher share the work of encoders that are. The same command, run again, goes
on where it stopped. Writes OUT/report.html, OUT/table.md and
OUT/comparison.json. Exit codes as those of pretraining, and 4 where a source
could not be compared. docs/evaluators.md says how it is measured.
"""

if __name__ == "__main__" and not __package__:
    import as_script  # noqa: F401  a launched script's folder would hide the package `prelude`

import argparse

from prelude.evaluators.defaults import COMPARABLE, COMPARED
from prelude.launch.arguments import SOURCES, Shards, door_parser, parse_present, whole
from prelude.launch.exit_codes import door


def main(argv: list[str] | None = None) -> int:
    args = parse_present(parser(), argv)
    from prelude.launch.comparing import compare

    return compare(args, argv)


def parser() -> argparse.ArgumentParser:
    parser = door_parser(
        __doc__,
        sources=f"{SOURCES}; or a recipe, to be pretrained first: a YAML file, or its name in configs/",
        out="folder of the report and of what is trained (default: runs/compare)",
    )
    parser.set_defaults(out="runs/compare")
    parser.add_argument(
        "--evaluators",
        nargs="+",
        choices=COMPARABLE,
        metavar="NAME",
        help=f"of {', '.join(COMPARABLE)} (default: {' '.join(COMPARED)})",
    )
    parser.add_argument("--no-floors", action="store_true", help="without untrained encoders and pixels beside them")
    parser.add_argument(
        "--keep",
        nargs=2,
        metavar=("TRAIN", "TEST"),
        help="labelled shards of the old images: what was won on the new ones, and lost on these, by runs that started "
        "from weights",
    )
    recipes = parser.add_argument_group("recipes that are pretrained first")
    recipes.add_argument(
        "--images", type=whole(1), metavar="N", help="that each sees, repeats counted (default: its own)"
    )
    recipes.add_argument(
        "--shards", action=Shards, metavar="SHARDS", help="without labels, for all (default: those of --train)"
    )
    recipes.add_argument("--set", nargs="+", default=[], metavar="key.sub=value", help="settings, for all of them")
    recipes.add_argument(
        "--pretraining-seeds",
        type=whole(1),
        default=1,
        metavar="N",
        help="pretrain each with N seeds: means, and the deviation between pretrainings apart (default: 1)",
    )
    recipes.add_argument(
        "--ranks", type=whole(1), metavar="N", help="processes that train (default: one for each GPU, else one)"
    )
    parser.add_argument(
        "--finetune",
        nargs="+",
        action="append",
        default=[],
        metavar=("RECIPE", "key.sub=value"),
        help="fine-tune each pretrained and each untrained encoder too; of several recipes, written one after another, "
        "each takes the first that suits it",
    )
    findings = parser.add_argument_group("several findings an image, as for prelude multilabel")
    findings.add_argument("--names", nargs="+", metavar="NAME")
    findings.add_argument("--field", metavar="KEY")
    findings.add_argument("--group", metavar="KEY")
    return parser


if __name__ == "__main__":
    raise SystemExit(door(main))
