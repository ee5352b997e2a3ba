"""What the ViT of the recipe `uni4eye_shapes` has learned of volumes, beside the same one untrained.

For each seed: pretrains on pictures and volumes of shapes, made here, then fits a linear head, and k-NN, to the frozen
features of labelled volumes: the mean of all patches, of the run and of its untrained twin, and plain voxels. The table
has top-1 % on held-out volumes. Run again, it goes on where it stopped. It says nothing about speed.

python benchmarks/volumes.py --out runs/volumes --seeds 0 1 2
"""

import argparse
from pathlib import Path

import torch
from going_on import pretrain, table

from prelude.checkpoints.saved import open_tensors
from prelude.checkpoints.store import Store
from prelude.data.batch import VolumePlan
from prelude.data.data_sets import DataSet, index_of_volumes
from prelude.data.loader import one_pass
from prelude.data.shape_volumes import write_volumes
from prelude.data.shapes import write_shards
from prelude.evaluators.features.extraction import Features
from prelude.evaluators.frozen.knn import knn
from prelude.evaluators.frozen.linear_probe import linear_probe
from prelude.objectives import options_for
from prelude.objectives.building import build_objective
from prelude.pretrain.recipes import load_config
from prelude.pretrain.volumes import volumes as device_volumes

COUNTS = {"train": 2000, "test": 1000}
EVALUATORS = {"linear_probe": linear_probe, "knn": knn}


def main() -> None:
    args = parser().parse_args()
    out = Path(args.out)
    for split, count in COUNTS.items():
        write_volumes(out / "shapes", split, count)
        write_shards(out / "shapes", split, 2 * count)
    found = []
    for seed in args.seeds:
        run, of_volumes = out / f"run-{seed}", f"data.volumes.shards={out}/shapes/volumes-train-*.tar"
        shards = f"{out}/shapes/train-*.tar"
        settings = [of_volumes, "log.every_steps=20", *args.set]
        pretrain(run, seed, shards, args.epochs, *settings, recipe="uni4eye_shapes", warmup=args.warmup_epochs)
        if not args.train_only:
            found.append(judged(out, run, seed))
    if found:
        print(table(found, [*EVALUATORS]))


def judged(out: Path, run: Path, seed: int) -> dict[str, dict[str, float]]:
    """Top-1 % of volumes by encoder and evaluator."""
    torch.set_num_threads(1)
    config = load_config(run / "config.yaml", [], options_for)
    trained, untrained = build_objective(config).eval(), build_objective(config).eval()
    trained.load_state_dict(dict(open_tensors(Store(run / "checkpoints").newest())))
    plan = trained.views.volumes
    parts = {split: features(out, split, plan, {"trained": trained, "untrained": untrained}) for split in COUNTS}
    return {
        name: {
            evaluator: judge({"mean": parts["train"][name]}, {"mean": parts["test"][name]}, seed=seed)
            .numbers["top1"]
            .value
            for evaluator, judge in EVALUATORS.items()
        }
        for name in parts["train"]
    }


@torch.no_grad()
def features(out: Path, split: str, plan: VolumePlan, encoders: dict) -> dict[str, Features]:
    still = VolumePlan(plan.size, plan.channels, flip=0.0)
    index = index_of_volumes(DataSet(f"{out}/shapes/volumes-{split}-*.tar"), label="cls")
    rows: dict[str, list] = {name: [] for name in (*encoders, "voxels")}
    labels, ids = [], []
    for batch in one_pass(index, still, batch_size=50, label="cls"):
        seen = device_volumes(batch, still).standardised
        for name, encoder in encoders.items():
            rows[name].append(encoder.volume_features(seen))
        rows["voxels"].append(torch.nn.functional.avg_pool3d(seen, 2).flatten(1))
        labels.append(batch.labels)
        ids.append(batch.sample_ids)
    labels, ids = torch.cat(labels), torch.cat(ids)
    return {name: Features(torch.cat(row), labels, ids, index.fingerprint, name) for name, row in rows.items()}


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--epochs", type=float, default=12, metavar="N", help="(default: 12, as the recipe)")
    parser.add_argument("--warmup-epochs", type=float, default=1, metavar="N", help="(default: 1, as the recipe)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="(default: 0 1 2)")
    parser.add_argument("--set", nargs="+", default=[], metavar="key.sub=value", help="settings of all runs")
    parser.add_argument("--train-only", action="store_true", help="judge nothing yet")
    parser.add_argument("--out", default="runs/volumes", metavar="DIR", help="(default: runs/volumes)")
    return parser


if __name__ == "__main__":
    main()
