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
from types import SimpleNamespace
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
from prelude.pretrain import engine as engines
from prelude.pretrain.batch_norm import synchronise
from prelude.pretrain.config import Config
from prelude.pretrain.engine import Engine
from prelude.pretrain.images import images
from prelude.pretrain.objective import Loss, Objective, Options

NUM_SAMPLES = 40
SIZE = 8
COMMON = {"epochs": 1.2, "global_batch": 8, "precision": "fp32"}
# Small parameters, which all of these are, would be kept whole
IN_PARTS = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
RARELY, HALF = {"every_steps": 100}, {"precision": "fp16"}
PEAK_MEMORY = 1000  # of rank 0; of rank 1 twice as much
BAD_A_STEP = 4  # samples that cannot be read, beside 8 that can
CASES = {
    "plain": {"train": {}},
    "accumulated": {"train": {"micro_batch": 2}},
    "clipped": {"train": {"gradient_clipping": 0.05}},
    "zero1": {"train": {"zero_stage": 1, "micro_batch": 2, "gradient_clipping": 0.05}},
    "zero2": {"train": {"zero_stage": 2}},
    "one_bad_step": {"train": {}, "bad_steps": [2]},
    "one_bad_step_accumulated": {"train": {"micro_batch": 2}, "bad_steps": [2]},
    "one_bad_step_zero1": {"train": {"zero_stage": 1}, "bad_steps": [2]},
    "one_bad_step_zero3": {"train": {"zero_stage": 3}, "bad_steps": [2], "deepspeed": IN_PARTS},
    # Of which the host learns a step later
    "one_bad_step_hardly_logged": {"train": {}, "bad_steps": [2], "log": RARELY},
    # Optimizers that know nothing of refused steps; the first step makes their moments
    "bad_steps_sgd": {"train": {}, "bad_steps": [0, 3], "optimizer": {"name": "sgd", "nesterov": True}},
    "bad_steps_lars": {"train": {"gradient_clipping": 0.05}, "bad_steps": [0, 3], "optimizer": {"name": "lars"}},
    "bad_steps_sgd_zero2": {"train": {"zero_stage": 2}, "bad_steps": [2], "optimizer": {"name": "sgd"}},
    # Activations that overflow, before a norm that keeps statistics of them
    "bad_activations": {"train": {}, "bad_steps": [2], "norm": True},
    "bad_activations_zero1": {"train": {"zero_stage": 1}, "bad_steps": [2], "norm": True},
    "bad_activations_accumulated": {"train": {"micro_batch": 2}, "bad_steps": [2], "norm": True},
    "all_bad": {"train": {"max_nonfinite_steps": 3}, "bad_steps": range(100)},
    "all_bad_hardly_logged": {"train": {"max_nonfinite_steps": 3}, "bad_steps": range(100), "log": RARELY},
    "bf16": {"train": {"precision": "bf16"}},
    # Whose gradients are scaled, and overflow at first unless the loss is small. Adam would not mind the scale, so that
    # it is SGD that shows whether they are brought back
    "fp16_clipped": {"train": HALF | {"gradient_clipping": 0.05}, "optimizer": {"name": "sgd"}, "loss_weight": 0.1},
    "fp16_one_bad_step": {"train": HALF, "bad_steps": [2], "loss_weight": 0.1},
    # What is drawn from torch's generator, as drop path does; then again, and with another seed
    "drawing": {"train": {}, "draws": True},
    "drawing_again": {"train": {}, "draws": True},
    "drawing_with_another_seed": {"train": {}, "draws": True, "seed": 1},
    # A third of what is read
    "bad_samples_above_the_share": {"train": {}, "data": {"max_bad_share": 0.3}},
    "bad_samples_below_the_share": {"train": {}, "data": {"max_bad_share": 0.4}},
    # What each rank measures; and what a second start of the run does, on another machine
    "auto_by_rank_0": {"train": {"precision": "auto"}, "ratios": [0.5, 9.0]},
    "auto_and_on_elsewhere": {"train": {"precision": "auto"}, "ratios": [0.5, 0.5], "later": 9.0, "store": "plain"},
    "asked_while_saving": {"train": {}, "saves_every": 2, "store": "asked"},
    "full_disk_while_training": {"train": {}, "saves_every": 2, "store": "full"},
}


class Regression(Objective):
    """A model small enough to be checked by hand, with an EMA copy and a loss, or activations, that can be poisoned.

    follows: whether the EMA copy does. draws: whether what torch's generator gives is logged. weight: of the loss.
    """

    def __init__(self, bad_steps=(), norm=False, follows=True, draws=False, weight=1.0):
        super().__init__(nn.Linear(3 * SIZE * SIZE, 4), Options(), image_size=(SIZE, SIZE), mean=None, std=None)
        self.views = ViewPlan((View((SIZE, SIZE)),))
        self.head = nn.Linear(4, 1)
        self.register_buffer("average", self.head.weight.detach().clone())
        self.bad_steps, self.follows, self.draws, self.weight = set(bad_steps), follows, draws, weight
        self.norm = nn.BatchNorm1d(4) if norm else None
        self.statistics: list[dict[str, list]] = []  # of the norm, after each step
        synchronise(self)

    def forward(self, batch, progress):
        hidden = self.encoder(images(batch, self.views)[0].flatten(1)).tanh()
        # Poisoned on one rank only: every rank must still decide alike; and in the first of a step's micro-batches.
        last, first = distributed.world_size() - 1, batch.positions[0] % 8 < distributed.world_size()
        bad = progress.step in self.bad_steps and distributed.rank() == last and first
        if self.norm is not None:
            hidden = self.norm(hidden * math.inf if bad else hidden)
        target = (batch.seeds % 7).float()[:, None] / 7
        loss = self.weight * (self.head(hidden).float() - target).square().mean()
        if bad:
            loss = loss * math.nan
        parts = {"mean_output": hidden.detach().mean()} | ({"drawn": torch.rand(())} if self.draws else {})
        return Loss(loss, parts)

    def after_step(self, progress, applied):
        if self.follows:
            self.average.lerp_(self.head.weight.detach(), 0.5 * applied)
        if self.norm is not None:
            self.statistics.append({name: buffer.tolist() for name, buffer in self.norm.named_buffers()})


def objective_of(case: dict, bad_steps=()) -> Regression:
    """At ZeRO stage 3 nothing can follow weights of which each rank has a part."""
    follows = case["train"].get("zero_stage", 0) < 3
    others = case.get("draws", False), case.get("loss_weight", 1.0)
    return Regression(bad_steps, case.get("norm", False), follows, *others)


class PartlyUnreadable(MemoryLoader):
    """Four samples of twelve cannot be read, all of them the last rank's; for a batch a step."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.bad = SimpleNamespace(num_bad=0, num_read=0)

    def __iter__(self):
        for batch in super().__iter__():
            bad = BAD_A_STEP if distributed.rank() == distributed.world_size() - 1 else 0
            self.bad.num_bad += bad
            self.bad.num_read += len(batch) + bad
            yield batch


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
            "seed": case.get("seed", 0),
            "data": {"shards": "none"} | case.get("data", {}),
            "encoder": {"name": "none", "image_size": SIZE},
            "objective": {"name": "regression"},
            "train": COMMON | case["train"],
            "optimizer": {"lr": 0.02, "lr_rule": "absolute", "warmup_epochs": 0.5, "weight_decay_end": 0.2}
            | case.get("optimizer", {}),
            "log": {"every_steps": 1} | case.get("log", {}),
            "checkpoint": {"every_steps": case.get("saves_every", 1000)},
            "deepspeed": case.get("deepspeed", {}),
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
    objective = objective_of(case, case.get("bad_steps", ())).eval()  # as a network of one's own may come
    recorder, store = Recorder(), store_of(case, out)
    micro_batch, _ = config.batching(distributed.world_size())
    loader = PartlyUnreadable if "data" in case else MemoryLoader

    def engine_at(ratio: float) -> Engine:
        precision.product_ratio = lambda: ratio
        return Engine(config, objective, loader(micro_batch, NUM_SAMPLES, batch_at), store, [recorder])

    engine = engine_at(case.get("ratios", [9.0, 9.0])[distributed.rank()])
    message, outcome = "", None
    try:
        outcome = engine.run()
    except RunStopped as error:
        message = str(error)
    step = engine.progress.step
    if "later" in case:
        engine = engine_at(case["later"])
    weights = whole_weights(objective)
    of_ranks = distributed.of_all({"message": message, "drawn": [r.parts.get("drawn") for r in recorder.records]})
    if distributed.is_main():
        torch.save(weights, out / f"{name}.pt")
        records = [vars(record) for record in recorder.records]
        found = {"records": records, "message": message, "outcome": outcome and vars(outcome), "step": step}
        found |= {"precision": str(engine.precision), "notice": engine.notice, "of_ranks": of_ranks}
        found |= {"statistics": objective.statistics, "saved": getattr(store, "saved", None)}
        (out / f"{name}.json").write_text(json.dumps(found))


def whole_weights(objective: Regression) -> dict[str, torch.Tensor]:
    """Collective: at ZeRO stage 3 each rank keeps a part of them elsewhere."""
    import deepspeed  # after the start, which quiets it

    with deepspeed.zero.GatheredParameters(list(objective.parameters())):
        return {key: value.clone() for key, value in objective.state_dict().items()}


def cases(out: Path) -> None:
    engines.peak_memory = lambda: PEAK_MEMORY * (1 + distributed.rank())
    for name in CASES:
        run_case(name, out)


if __name__ == "__main__":
    at_two_ranks_and_one(cases, Path(sys.argv[-1]))
