"""Run by test_engine.py through the real launcher: trains a small model in several ways and saves the weights.

`deepspeed --num_gpus 2 engine_cases.py OUT` writes OUT/2/CASE.pt on rank 0, the weights, and what was logged; and OUT/1
where that rank is then alone.
"""

import json
import math
import os
import signal
import sys
from pathlib import Path
from unittest import mock

import torch
from in_memory import MemoryLoader, NoStore, Recorder
from torch import nn
from two_and_one import at_two_ranks_and_one

from prelude.checkpoints import saving
from prelude.checkpoints.store import Store
from prelude.data.batch import Batch, View, ViewPlan
from prelude.data.errors import RunStopped
from prelude.pretrain import distributed, precision
from prelude.pretrain.batch_norm import synchronise
from prelude.pretrain.config import Config
from prelude.pretrain.engine import Engine
from prelude.pretrain.images import images
from prelude.pretrain.objective import Loss, Objective, Options

NUM_SAMPLES = 40
SIZE = 8
COMMON = {"epochs": 1.2, "global_batch": 8, "precision": "fp32"}
CASES = {
    "plain": {"train": {}},
    "accumulated": {"train": {"micro_batch": 2}},
    "clipped": {"train": {"gradient_clipping": 0.05}},
    "zero1": {"train": {"zero_stage": 1, "micro_batch": 2, "gradient_clipping": 0.05}},
    "zero2": {"train": {"zero_stage": 2}},
    "one_bad_step": {"train": {}, "bad_steps": [2]},
    "one_bad_step_accumulated": {"train": {"micro_batch": 2}, "bad_steps": [2]},
    "one_bad_step_zero1": {"train": {"zero_stage": 1}, "bad_steps": [2]},
    # Optimizers that know nothing of refused steps; the first step makes their moments
    "bad_steps_sgd": {"train": {}, "bad_steps": [0, 3], "optimizer": {"name": "sgd", "nesterov": True}},
    "bad_steps_lars": {"train": {"gradient_clipping": 0.05}, "bad_steps": [0, 3], "optimizer": {"name": "lars"}},
    "bad_steps_sgd_zero2": {"train": {"zero_stage": 2}, "bad_steps": [2], "optimizer": {"name": "sgd"}},
    # Activations that overflow, before a norm that keeps statistics of them
    "bad_activations": {"train": {}, "bad_steps": [2], "norm": True},
    "bad_activations_zero1": {"train": {"zero_stage": 1}, "bad_steps": [2], "norm": True},
    "all_bad": {"train": {"max_nonfinite_steps": 3}, "bad_steps": range(100)},
    "bf16": {"train": {"precision": "bf16"}},
    # What each rank measures; and what a second start of the run does, on another machine
    "auto_by_rank_0": {"train": {"precision": "auto"}, "ratios": [0.5, 9.0]},
    "auto_and_on_elsewhere": {"train": {"precision": "auto"}, "ratios": [0.5, 0.5], "later": 9.0, "store": "plain"},
    "asked_while_saving": {"train": {}, "saves_every": 2, "store": "asked"},
    "full_disk_while_training": {"train": {}, "saves_every": 2, "store": "full"},
}


class Regression(Objective):
    """A model small enough to be checked by hand, with an EMA copy and a loss, or activations, that can be poisoned."""

    def __init__(self, bad_steps=(), norm=False):
        super().__init__(nn.Linear(3 * SIZE * SIZE, 4), Options(), image_size=(SIZE, SIZE), mean=None, std=None)
        self.views = ViewPlan((View((SIZE, SIZE)),))
        self.head = nn.Linear(4, 1)
        self.register_buffer("average", self.head.weight.detach().clone())
        self.bad_steps = set(bad_steps)
        self.norm = nn.BatchNorm1d(4) if norm else None
        synchronise(self)

    def forward(self, batch, progress):
        hidden = self.encoder(images(batch, self.views)[0].flatten(1)).tanh()
        # Poisoned on one rank only: every rank must still decide alike.
        bad = progress.step in self.bad_steps and distributed.rank() == distributed.world_size() - 1
        if self.norm is not None:
            hidden = self.norm(hidden * math.inf if bad else hidden)
        target = (batch.seeds % 7).float()[:, None] / 7
        loss = (self.head(hidden).float() - target).square().mean()
        if bad:
            loss = loss * math.nan
        return Loss(loss, {"mean_output": hidden.detach().mean()})

    def after_step(self, progress, applied):
        self.average.lerp_(self.head.weight.detach(), 0.5 * applied)


def batch_at(positions: torch.Tensor) -> Batch:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (NUM_SAMPLES, 3, SIZE, SIZE), generator=generator, dtype=torch.uint8)
    ids = positions % NUM_SAMPLES
    flips = (positions % 3 == 0)[:, None]
    boxes = torch.zeros(len(ids), 1, 4, dtype=torch.int32)
    return Batch((pixels[ids],), boxes, flips, seeds=positions * 31, sample_ids=ids, positions=positions)


def config_of(case: dict, out: Path) -> Config:
    return Config.model_validate(
        {
            "run_dir": str(out),
            "data": {"shards": "none"},
            "encoder": {"name": "none", "image_size": SIZE},
            "objective": {"name": "regression"},
            "train": COMMON | case["train"],
            "optimizer": {"lr": 0.02, "lr_rule": "absolute", "warmup_epochs": 0.5, "weight_decay_end": 0.2}
            | case.get("optimizer", {}),
            "log": {"every_steps": 1},
            "checkpoint": {"every_steps": case.get("saves_every", 1000)},
        }
    )


class AskedWhileSaving(NoStore):
    """The last rank is asked to end while the second checkpoint is written."""

    def __init__(self):
        self.saved = []

    def save(self, step, engine, meta):
        self.saved.append(step)
        if len(self.saved) == 2 and distributed.rank() == distributed.world_size() - 1:
            os.kill(os.getpid(), signal.SIGTERM)


class FullDisk(Store):
    """The second checkpoint does not fit; the disk has said so before the next step ends."""

    def save(self, step, engine, meta):
        with mock.patch.object(saving, "write_tensors", refused if step == 4 else saving.write_tensors):
            super().save(step, engine, meta)
            if step == 4:
                self.wait()


def refused(path, tensors):
    raise OSError(28, "No space left on device")


def store_of(case: dict, out: Path):
    match case.get("store"):
        case "asked":
            return AskedWhileSaving()
        case "full":
            return FullDisk(out / "checkpoints")
        case "plain":
            return Store(out / "plain")
    return NoStore()


def run_case(name: str, out: Path) -> None:
    case = CASES[name]
    config = config_of(case, out)
    torch.manual_seed(0)
    objective = Regression(case.get("bad_steps", ()), case.get("norm", False))
    recorder, store = Recorder(), store_of(case, out)
    micro_batch, _ = config.batching(distributed.world_size())

    def engine_at(ratio: float) -> Engine:
        precision.product_ratio = lambda: ratio
        return Engine(config, objective, MemoryLoader(micro_batch, NUM_SAMPLES, batch_at), store, [recorder])

    engine = engine_at(case.get("ratios", [9.0, 9.0])[distributed.rank()])
    message, outcome = "", None
    try:
        outcome = engine.run()
    except RunStopped as error:
        message = str(error)
    if "later" in case:
        engine = engine_at(case["later"])
    if distributed.is_main():
        torch.save(objective.state_dict(), out / f"{name}.pt")
        records = [vars(record) for record in recorder.records]
        found = {"records": records, "message": message, "outcome": outcome and vars(outcome)}
        found |= {"precision": str(engine.precision), "notice": engine.notice}
        (out / f"{name}.json").write_text(json.dumps(found | {"saved": getattr(store, "saved", None)}))


def cases(out: Path) -> None:
    for name in CASES:
        run_case(name, out)


if __name__ == "__main__":
    at_two_ranks_and_one(cases, Path(sys.argv[-1]))
