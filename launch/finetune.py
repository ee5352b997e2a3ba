"""Fine-tune an encoder on labelled shards, and test it.

    prelude finetune runs/mae --config finetune_vit_cifar10 \\
        --train 'train-*.tar' --test 'test-*.tar'
    deepspeed --num_gpus 8 --module prelude.launch.finetune runs/mae \\
        --config finetune_vit_base run_dir=runs/tuned
    deepspeed --num_gpus 8 --module prelude.launch.finetune runs/mae \\
        --config finetune_vit_base --from-scratch

The same command, run again, goes on from the run's newest checkpoint. Exit
codes as those of pretraining.
"""

if __name__ == "__main__" and not __package__:
    import as_script  # noqa: F401  a launched script's folder would hide the package `prelude`

import argparse
import shlex
import sys

from prelude.evaluators.finetuning.recipe import check_recipe
from prelude.launch.arguments import (
    ENCODERS,
    add_config,
    add_labelled,
    documented_parser,
    parse_present,
    refuse_without_dry_run,
    source,
)
from prelude.launch.exit_codes import door, leave


def main(argv: list[str] | None = None) -> int:
    args = parse_present(parser(), argv)
    refuse_without_dry_run(args)
    if args.balanced:
        args.overrides.insert(0, "objective.class_weights=balanced")
    check_recipe(args.config, args.overrides)
    from prelude.evaluators.finetuning import finetune
    from prelude.launch import finetuning
    from prelude.launch.planning import dry_run
    from prelude.pretrain import distributed
    from prelude.pretrain.trackers import tracker

    task = finetune.prepare(
        args.source,
        args.config,
        args.overrides,
        train=args.train,
        test=args.test,
        label=args.label,
        from_scratch=args.from_scratch,
        **({} if args.dry_run else {"before_indexing": finetuning.join}),
    )
    finetune.check(task, args.ranks or distributed.launched_world_size())
    tracker.check(task.config.log)
    if args.dry_run:
        return dry_run(args, task.config, lambda config, asked: finetuning.dry_run(task, asked))
    command = shlex.join(["prelude", "finetune", *(sys.argv[1:] if argv is None else argv)])
    return finetuning.run(task, command)


def parser() -> argparse.ArgumentParser:
    parser = documented_parser(__doc__)
    parser.add_argument(
        "source",
        type=source,
        metavar="SOURCE",
        help=ENCODERS,
    )
    add_labelled(parser, default="the recipe's or the run's evaluate section")
    parser.add_argument(
        "--from-scratch",
        action="store_true",
        help="the same recipe on the same architecture untrained, in RUN_DIR_from_scratch",
    )
    parser.add_argument(
        "--balanced", action="store_true", help="classes, or presence and absence of a finding, weigh alike in the loss"
    )
    add_config(parser)
    return parser


if __name__ == "__main__":
    leave(door(main))
