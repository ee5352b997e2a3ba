"""Linear probe of frozen encoders.

    prelude probe runs/mae random:runs/mae pixels \\
        --train 'train-{0..9}.tar' --test test-0.tar
    prelude probe runs/mae --norm batch none --features cls mean last4 --seeds 3
    deepspeed --num_gpus 8 --module prelude.launch.linear_probe runs/mae \\
        --protocol mae

Without --protocol, heads are trained to their optimum on features of one fixed
view. With it, they are trained as in that paper, on augmented images. Several
sources give one table; each result is also written as JSON.
docs/evaluators.md says how it is measured.
"""

if __name__ == "__main__" and not __package__:
    import as_script  # noqa: F401  a launched script's folder would hide the package `prelude`

import argparse
from functools import partial

from prelude.data.errors import UserError
from prelude.evaluators.defaults import PROTOCOLS
from prelude.launch.arguments import door_parser, finite, from_zero, parse_present
from prelude.launch.exit_codes import door

OF_PROTOCOLS = ("learning_rates", "epochs", "global_batch")


def main(argv: list[str] | None = None) -> int:
    args = parse_present(parser(), argv)
    if args.protocol:
        return by_protocol(args, argv)
    without_effect = [f"--{name.replace('_', '-')}" for name in OF_PROTOCOLS if getattr(args, name) is not None]
    if without_effect:
        raise UserError(f"{' and '.join(without_effect)} has no effect without --protocol; write one, or leave it out.")
    from prelude.evaluators.frozen.linear_probe import WEIGHT_DECAYS, linear_probe
    from prelude.launch.frozen import judge

    decays = args.weight_decays or WEIGHT_DECAYS
    return judge(args, [partial(linear_probe, weight_decays=decays, norms=args.norm or ["batch"])], "probe", argv)


def by_protocol(args: argparse.Namespace, argv) -> int:
    if args.norm:
        raise UserError("--norm is the protocol's own; leave it out, or leave out --protocol.")
    from prelude.evaluators.protocols.papers import protocol_of
    from prelude.evaluators.protocols.stream_probe import evaluate_protocol
    from prelude.evaluators.results import print_table
    from prelude.launch.frozen import common, labelled_of
    from prelude.pretrain import distributed

    changes = {name: getattr(args, name) for name in (*OF_PROTOCOLS, "weight_decays")}
    tuples = {key: tuple(value) if isinstance(value, list) else value for key, value in changes.items()}
    protocol, labelled = protocol_of(args.protocol, **tuples), labelled_of(args)
    settings = common(args, "probe", argv)
    results = evaluate_protocol(args.sources, protocol, labelled, kinds=args.features, bank=args.bank, **settings)
    if distributed.is_main():
        print_table(results)
    distributed.stop()
    return 0


def parser() -> argparse.ArgumentParser:
    parser = door_parser(__doc__)
    parser.add_argument(
        "--norm",
        nargs="+",
        choices=["batch", "none"],
        help="heads on features of variance 1, as BatchNorm without affine makes them (default), or on plain ones",
    )
    parser.add_argument(
        "--weight-decays", nargs="+", type=from_zero, metavar="WD", help="(default: 16, or the protocol's)"
    )
    parser.add_argument("--protocol", choices=PROTOCOLS, help="train heads as in a paper, on augmented images")
    parser.add_argument("--learning-rates", nargs="+", type=finite, metavar="LR", help="(default: the protocol's)")
    parser.add_argument("--epochs", type=finite, metavar="N", help="(default: the protocol's)")
    parser.add_argument("--global-batch", type=int, metavar="N", help="(default: the protocol's)")
    return parser


if __name__ == "__main__":
    raise SystemExit(door(main))
