"""Going on from an encoder that was pretrained on one data set with another: what is won there, and what is lost here.

The source is labelled shards of one's own; the target is the embedded data set of shapes, which is as far from
photographs as pictures get. Everything is the recipe `quickstart`: 32 pixels, 0.6 M parameters. For each seed, at one
budget:

- source: pretrained on the source without its labels; where `plain` and `careful` start, and what they are held
  against. One for each seed, or with `--one-source` that of the first seed for all
- scratch: pretrained on the target alone
- plain: `encoder.weights` is the source run, all else as from scratch
- careful: the same with `optimizer.layer_decay` and `train.freeze_encoder_steps`

Then `prelude compare --keep` judges each seed's three on both data sets, and the table has mean and standard deviation
over seeds. Run again, it goes on where it stopped; `--train-only` leaves the judging to another time. It says nothing
about speed.

python benchmarks/going_on.py --source-train 'DATA/train-*.tar' --source-test 'DATA/test-*.tar'
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))  # so that it runs as a script from anywhere

from prelude.data.shapes import write_shards  # noqa: E402
from prelude.launch import compare  # noqa: E402
from prelude.launch.children import Preempted, run_door  # noqa: E402
from prelude.launch.quickstart import NUM_TEST, NUM_TRAIN  # noqa: E402

ARMS = {
    "scratch": [],
    "plain": ["encoder.weights={source}"],
    "careful": ["encoder.weights={source}", "optimizer.layer_decay={decay}", "train.freeze_encoder_steps={frozen}"],
}
EVALUATORS = ("linear_probe", "knn")
COLUMNS = [f"{side} {evaluator}" for evaluator in EVALUATORS for side in ("new", "old")]


def main() -> None:
    args = parser().parse_args()
    out = Path(args.out)
    for split, count in (("train", NUM_TRAIN), ("test", NUM_TEST)):
        write_shards(out / "shapes", split, count)
    for seed in args.seeds:
        pretrain_all(args, out, seed)
    if not args.train_only:
        print(table([judged(args, out, seed) for seed in args.seeds], COLUMNS))


def pretrain_all(args: argparse.Namespace, out: Path, seed: int) -> None:
    source_seed = args.seeds[0] if args.one_source else seed
    source = out / f"source-{source_seed}"
    pretrain(source, source_seed, args.source or args.source_train, args.source_epochs)
    given = {"source": source, "decay": args.layer_decay, "frozen": args.freeze_steps}
    for name, settings in ARMS.items():
        settings = [setting.format(**given) for setting in settings]
        pretrain(out / f"{name}-{seed}", seed, f"{out}/shapes/train-*.tar", args.epochs, *settings)


def pretrain(
    run_dir: Path, seed: int, shards: str, epochs: float, *settings: str, recipe: str = "quickstart", warmup=0.5
) -> None:
    settings = [f"run_dir={run_dir}", f"seed={seed}", f"data.shards={shards}", f"train.epochs={epochs}", *settings]
    settings += ["evaluate=null", "log.pictures_every_steps=0", f"optimizer.warmup_epochs={warmup}"]
    try:
        problem = run_door("pretrain", ["--config", recipe, *settings], num_ranks=1, name=run_dir.name)
    except Preempted:
        problem = "stopped; the same command goes on from here"
    if problem:
        raise SystemExit(problem)


def judged(args: argparse.Namespace, out: Path, seed: int) -> dict[str, dict[str, float]]:
    """Top-1 % by encoder and by (pictures, evaluator)."""
    command = [str(out / f"{name}-{seed}") for name in ARMS]
    command += ["--train", f"{out}/shapes/train-*.tar", "--test", f"{out}/shapes/test-*.tar"]
    command += ["--keep", args.source_train, args.source_test, "--features", *args.features]
    entries = compared(command, seed, out / f"compare-{seed}")
    return {row(entry["name"], seed): numbers(entry) for entry in entries}


def compared(command: list[str], seed: int, out: Path) -> list[dict]:
    """The entries of `prelude compare`, by linear probe and k-NN."""
    command = [*command, "--evaluators", "probe", "knn", "--seed", str(seed), "--out", str(out)]
    if compare.main(command):
        raise SystemExit(f"prelude compare could not judge all in {out}")
    return json.loads((out / "comparison.json").read_text())["entries"]


def row(name: str, seed: int) -> str:
    return name.removesuffix(f"-{seed}") if name.startswith(tuple(ARMS)) else name.split()[0].split(":")[0]


def numbers(entry: dict) -> dict[str, float]:
    sides = {"new": entry["results"], "old": entry["kept"]}
    return {
        f"{side} {evaluator}": results[evaluator]["numbers"]["top1"]["value"]
        for side, results in sides.items()
        for evaluator in EVALUATORS
    }


def table(found: list[dict[str, dict[str, float]]], columns: list[str]) -> str:
    """found: for each seed, numbers by row and column."""
    head = "| encoder | " + " | ".join(column.replace("_", " ") for column in columns) + " |"
    lines = [head, "|---" * (1 + len(columns)) + "|"]
    for name in found[0]:
        cells = [over_seeds([each[name][column] for each in found]) for column in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def over_seeds(values: list[float]) -> str:
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread} ({', '.join(f'{value:.1f}' for value in values)})"


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--source", metavar="SHARDS", help="to pretrain on, where it is more than --source-train")
    parser.add_argument("--source-train", required=True, metavar="SHARDS", help="labelled; pretraining reads no label")
    parser.add_argument("--source-test", required=True, metavar="SHARDS")
    parser.add_argument("--source-epochs", type=float, default=4, metavar="N", help="(default: 4)")
    parser.add_argument("--epochs", type=float, default=3, metavar="N", help="of the target (default: 3)")
    parser.add_argument("--layer-decay", type=float, default=0.75, metavar="X", help="of `careful` (default: 0.75)")
    parser.add_argument(
        "--freeze-steps", type=int, default=40, metavar="N", help="of `careful` (default: 40, half an epoch)"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="(default: 0 1 2)")
    parser.add_argument("--one-source", action="store_true", help="that all seeds go on from")
    parser.add_argument("--features", nargs="+", default=["cls", "mean"], metavar="KIND", help="(default: cls mean)")
    parser.add_argument("--train-only", action="store_true", help="judge nothing yet")
    parser.add_argument("--out", default="runs/going_on", metavar="DIR", help="(default: runs/going_on)")
    return parser


if __name__ == "__main__":
    main()
