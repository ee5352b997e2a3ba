"""Train an encoder on unlabelled shards.

    prelude pretrain --config mae_cifar10 'data.shards=/data/{000..099}.tar'
    deepspeed --num_gpus 8 --module prelude.launch.pretrain \\
        --config mae_vit_base 'data.shards=/data/{000..099}.tar'

The same command, run again, goes on from the run's newest checkpoint, at any
number of ranks. Exit codes: 0 finished, 2 a mistake in the command or config,
3 stopped itself, 75 pre-empted (run it again).
"""

if __name__ == "__main__" and not __package__:
    import as_script  # noqa: F401  a launched script's folder would hide the package `prelude`

import argparse

from prelude.data.absent import refuse_absent
from prelude.launch.arguments import add_config, documented_parser, parse, refuse_without_dry_run
from prelude.launch.exit_codes import door, leave
from prelude.objectives import options_for
from prelude.pretrain.config import Config
from prelude.pretrain.recipes import load_config


def main(argv: list[str] | None = None) -> int:
    args = parse(parser(), argv)
    refuse_without_dry_run(args)
    config = load_config(args.config, args.overrides, options_for)
    refuse_absent_data(config)
    from prelude.launch import training
    from prelude.launch.planning import dry_run

    training.check(config, args.ranks)
    return dry_run(args, config, training.dry_run) if args.dry_run else training.train(config)


def refuse_absent_data(config: Config) -> None:
    """Before torch is imported, what plainly is not there; `training.check` looks at the rest. Raises UserError."""
    named = {"data.shards=": config.data.shards}
    named |= {f"data.mix.{name}.shards=": part.shards for name, part in config.data.mix.items()}
    named |= {"data.volumes.shards=": config.data.volumes.shards} if config.data.volumes else {}
    if config.evaluate and config.evaluate.every_steps:
        named |= {f"evaluate.{name}=": getattr(config.evaluate, name) for name in ("train_shards", "test_shards")}
    for name, shards in named.items():
        refuse_absent(shards or (), name)


def parser() -> argparse.ArgumentParser:
    parser = documented_parser(__doc__)
    add_config(parser)
    return parser


if __name__ == "__main__":
    leave(door(main))
