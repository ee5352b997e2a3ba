"""I-JEPA and DSeq-JEPA, small models trained by the engine in several ways on the ranks there are.

`cases(OUT)` writes, for each case: CASE.pt (weights, rank 0), CASE.json (what was logged) and CASE.rank*.jsonl (for
every sample of every step, what was drawn and decided for it). `RESUMED` is run a second time, into OUT/resumed.*.
"""

import hashlib
import json
from pathlib import Path

import torch
from in_memory import MemoryLoader, Recorder
from jepa_models import MEAN, STD, a_batch, encoder_config

from prelude.checkpoints.store import Store
from prelude.objectives.dseqjepa import DSeqJEPA
from prelude.objectives.ijepa import IJEPA
from prelude.pretrain import distributed
from prelude.pretrain.config import Config
from prelude.pretrain.encoders import build_encoder, seeded
from prelude.pretrain.engine import Engine

NUM_SAMPLES = 40
SAMPLES = a_batch(NUM_SAMPLES)
STEPS = 4
PREDICTOR = {"predictor_dim": 16, "predictor_depth": 1, "predictor_num_heads": 2}
# One step moves weights by their gradient.
GRADIENT = {"name": "sgd", "momentum": 0.0, "lr": 1.0, "min_lr": 1.0, "weight_decay": 0.0, "weight_decay_end": 0.0}
CASES = {
    "ijepa": {"train": {"micro_batch": 2}},
    "ijepa_gradient": {"optimizer": GRADIENT, "steps": 1},
    "ijepa_zero1": {"train": {"zero_stage": 1}},
    "ijepa_zero2": {"train": {"zero_stage": 2}},
    "dseq": {"cls": DSeqJEPA, "options": {"lambda_start": 0.5}},
    "dseq_gradient": {"cls": DSeqJEPA, "optimizer": GRADIENT, "steps": 1, "options": {"lambda_start": 1.0}},
    "dseq_sample_zero2": {
        "cls": DSeqJEPA,
        "train": {"zero_stage": 2, "micro_batch": 2},
        "options": {"lambda_start": 0.5, "lambda_granularity": "sample"},
    },
    "dseq_region": {"cls": DSeqJEPA, "options": {"lambda_start": 0.5, "lambda_granularity": "region"}},
    "dseq_reencode_gradient": {
        "cls": DSeqJEPA,
        "optimizer": GRADIENT,
        "steps": 1,
        "options": {"lambda_start": 1.0, "context": "reencode"},
    },
    "dseq_contrastive_gradient": {
        "cls": DSeqJEPA,
        "optimizer": GRADIENT,
        "steps": 1,
        "options": {"lambda_start": 1.0, "contrastive_weight": 0.01, "contrastive_projector": [12, 10]},
    },
}
RESUMED = "dseq_sample_zero2"


def recording(cls):
    """The same objective, writing down what it drew and decided for every sample."""

    class Recording(cls):
        def forward(self, batch, progress):
            self.current = batch, progress
            self.note("masks", [*zip(*self.drawn(batch, progress), strict=True)])
            return super().forward(batch, progress)

        def drawn(self, batch, progress):
            masks = self.blocks.draw(batch.seeds, progress.step)
            return masks.context.tolist(), masks.targets.tolist()

        def note(self, what, values):
            batch, progress = self.current
            with open(self.file, "a") as file:
                for position, value in zip(batch.positions.tolist(), values, strict=True):
                    digest = hashlib.blake2b(json.dumps(value).encode(), digest_size=8).hexdigest()
                    file.write(json.dumps([what, progress.step, position, digest]) + "\n")

        def choose(self, saliency, seeds, progress):
            regions = super().choose(saliency, seeds, progress)
            self.note("lambda", [self.curriculum(progress)] * len(seeds))
            self.note("regions", [None] * len(seeds) if regions is None else regions.rid.tolist())
            return regions

    return Recording


def batch_at(positions):
    ids = positions % NUM_SAMPLES
    batch = SAMPLES._map(lambda tensor: tensor[ids])
    return type(batch)(batch.views, batch.boxes, batch.flips, positions * 31, ids, positions)


def config_of(name: str, out: Path) -> Config:
    case = CASES[name]
    cls = case.get("cls", IJEPA)
    optimizer = {"lr": 2e-3, "lr_rule": "absolute", "weight_decay": 0.04, "weight_decay_end": 0.4, "first_step": 1}
    steps = case.get("steps", STEPS)
    return Config.model_validate(
        {
            "run_dir": str(out / name),
            "data": {"shards": "none"},
            "encoder": encoder_config(class_token=cls is DSeqJEPA).model_dump(),
            "objective": {"name": "tested", **PREDICTOR, "momentum": 0.9, **case.get("options", {})},
            "train": {
                "epochs": steps * 8 / NUM_SAMPLES,
                "global_batch": 8,
                "precision": "fp32",
                **case.get("train", {}),
            },
            "optimizer": optimizer | case.get("optimizer", {}),
            "log": {"every_steps": 1, "pictures_every_steps": 0},
            "checkpoint": {"every_steps": 2},
        }
    )


def objective_of(name: str, config: Config, wrap=lambda cls: cls):
    cls = wrap(CASES[name].get("cls", IJEPA))
    given = {key: value for key, value in config.objective.items() if key != "name"}
    with seeded(5):
        encoder = build_encoder(config.encoder, seed=0)
        return cls(encoder, cls.Options(**given), image_size=(32, 32), mean=MEAN, std=STD)


def run_case(name: str, out: Path, label: str, **changes) -> None:
    config = config_of(name, out)
    config = config.model_copy(update={"run_dir": str(out / label), **changes})
    objective = objective_of(name, config, recording)
    objective.file = out / f"{label}.rank{distributed.rank()}.jsonl"
    recorder = Recorder()
    loader = MemoryLoader(config.batching(distributed.world_size())[0], NUM_SAMPLES, batch_at)
    store = Store(out / label / "checkpoints")
    distributed.barrier()
    Engine(config, objective, loader, store, [recorder]).run()
    if distributed.is_main():
        torch.save(objective.state_dict(), out / f"{label}.pt")
        (out / f"{label}.json").write_text(json.dumps([vars(record) for record in recorder.records]))


def cases(out: Path) -> None:
    for name in CASES:
        run_case(name, out, name)
    half_way = out / RESUMED / "checkpoints" / f"step-{STEPS // 2:08d}"
    resume = config_of(RESUMED, out).resume.model_copy(update={"checkpoint": str(half_way)})
    run_case(RESUMED, out, "resumed", resume=resume)
