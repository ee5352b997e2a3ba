"""Rotary positions beside a table of positions: does an EVA learn what a plain ViT learns?

For each seed, the recipes `mae_cifar10` and `ijepa_cifar10` twice: with their own encoder, a plain ViT with the fixed
table of sines and cosines, and with a timm EVA of DINOv3's kind, of the same depth and width, whose only positions are
the rotations of its attention. Images, order, masks, steps and rates are the same. Then `prelude compare` judges them
beside their untrained twins, and the table has mean and standard deviation over seeds. Run again, it goes on where it
stopped; `--train-only` leaves the judging to another time. It says nothing about speed.

python benchmarks/rotary.py --train 'DATA/train-{000000..000019}.tar' --test 'DATA/test-{000000..000004}.tar'
"""

import argparse
from itertools import product
from pathlib import Path

from going_on import EVALUATORS, compared, pretrain, table

RECIPES = {"mae": "mae_cifar10", "ijepa": "ijepa_cifar10"}
# The sizes of the recipes. DINOv3's registers are for large models. Its layer scale of 1e-5 is for training on; I-JEPA
# needs a small one from the start: without it the features collapse.
ROTARY = {
    "mae": "{depth: 4, embed_dim: 192, num_heads: 3, init_values: null, num_reg_tokens: 0}",
    "ijepa": "{depth: 4, embed_dim: 128, num_heads: 4, num_reg_tokens: 0, class_token: false, global_pool: avg, "
    "use_fc_norm: false, use_post_transformer_norm: true}",
}
ARMS = {"vit": [], "eva": ["encoder.name=vit_small_patch16_dinov3", "encoder.kwargs={rotary}"]}


def main() -> None:
    args = parser().parse_args()
    out = Path(args.out)
    for seed, objective, arm in product(args.seeds, args.objectives, ARMS):
        settings = [setting.replace("{rotary}", ROTARY[objective]) for setting in ARMS[arm]]
        settings += ["log.every_steps=50", *args.set]
        run, recipe = out / f"{objective}-{arm}-{seed}", RECIPES[objective]
        pretrain(run, seed, args.shards or args.train, args.epochs, *settings, recipe=recipe, warmup=args.warmup_epochs)
    if not args.train_only:
        for objective in args.objectives:
            print(
                f"\n{objective}\n\n{table([judged(args, out, objective, seed) for seed in args.seeds], [*EVALUATORS])}"
            )


def judged(args: argparse.Namespace, out: Path, objective: str, seed: int) -> dict[str, dict[str, float]]:
    """Top-1 % by encoder and evaluator."""
    runs = [str(out / f"{objective}-{arm}-{seed}") for arm in ARMS]
    command = [*runs, *(f"random:{run}" for run in runs), "--no-floors"]
    command += ["--train", args.train, "--test", args.test, "--features", *args.features]
    entries = compared(command, seed, out / f"compare-{objective}-{seed}")
    return {
        entry["name"].replace(f"-{seed}", ""): {
            evaluator: entry["results"][evaluator]["numbers"]["top1"]["value"] for evaluator in EVALUATORS
        }
        for entry in entries
    }


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--train", required=True, metavar="SHARDS", help="labelled; pretraining reads no label")
    parser.add_argument("--test", required=True, metavar="SHARDS")
    parser.add_argument("--shards", metavar="SHARDS", help="to pretrain on (default: those of --train)")
    parser.add_argument(
        "--objectives", nargs="+", choices=RECIPES, default=[*RECIPES], metavar="NAME", help="mae, ijepa"
    )
    parser.add_argument("--epochs", type=float, default=12, metavar="N", help="(default: 12, as the recipes)")
    parser.add_argument("--warmup-epochs", type=float, default=1, metavar="N", help="(default: 1, as the recipes)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="N", help="(default: 0)")
    parser.add_argument(
        "--features", nargs="+", default=["mean", "last4"], metavar="KIND", help="judged on (default: mean last4)"
    )
    parser.add_argument("--set", nargs="+", default=[], metavar="key.sub=value", help="settings, for all")
    parser.add_argument("--train-only", action="store_true", help="judge nothing yet")
    parser.add_argument("--out", default="runs/rotary", metavar="DIR", help="(default: runs/rotary)")
    return parser


if __name__ == "__main__":
    main()
