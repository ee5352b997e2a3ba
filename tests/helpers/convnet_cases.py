"""Objectives that read whole images or maps, trained by the engine for a few steps on the ranks there are.

`cases(OUT)` writes OUT/CASE.pt on rank 0: the weights and buffers, and what was logged. Cases in `RESUMED` run a second
time from a checkpoint in their middle, into OUT/CASE resumed.pt.
"""

import json
from pathlib import Path

import torch
import torch.distributed as dist
from in_memory import MemoryLoader, NoStore, Recorder

from prelude.checkpoints.store import Store
from prelude.data.batch import Batch, ViewPlan
from prelude.objectives import options_for
from prelude.objectives.building import build_objective
from prelude.pretrain import distributed
from prelude.pretrain.config import Config
from prelude.pretrain.engine import Engine
from prelude.pretrain.recipes import validate_config

NUM_SAMPLES = 48
GLOBAL_BATCH = 16
NUM_STEPS = 3
RESNET = {
    "name": "resnet10t",
    "image_size": 32,
    "kwargs": {"channels": [4, 6, 8, 12], "stem_width": 8, "layers": [1, 1, 1, 1]},
}
VIT = {
    "name": "vit_tiny_patch16_224",
    "image_size": 32,
    "patch_size": 16,
    # A bias of the keys moves every attention score alike: its gradient is rounding, which Adam would amplify.
    "kwargs": {"depth": 1, "embed_dim": 16, "num_heads": 2, "qkv_bias": False},
}
BARLOW = {
    "name": "barlow_twins",
    "projector": [24, 20],
    "off_diagonal_weight": 0.02,
    "view_1": {"blur": 0.5},
}
# A loss by samples where the batch is smaller than the embedding, by columns where it is not
NARROW = BARLOW | {"projector": [24, 12]}
VICREG = {"name": "vicreg", "projector": [24, 20], "view_1": {"blur": 0.5}}
MAE_GRADIENT = {
    "name": "mae",
    "gradient_weight": 1.0,
    "decoder_dim": 16,
    "decoder_depth": 1,
    "decoder_num_heads": 2,
    "mask_ratio": 0.5,
}
MSBREG = {
    "name": "msbreg",
    "projector": [24, 12],
    "predictor": [16],
    "num_views": 3,
    "momentum": 0.9,
    "view_1": {"blur": 0.5},
}
SWIN = {
    "name": "swin_tiny_patch4_window7_224",
    "image_size": 32,
    "kwargs": {
        "embed_dim": 8,
        "depths": [1, 1],
        "num_heads": [1, 2],
        "window_size": 4,
        "drop_path_rate": 0.0,
        "qkv_bias": False,
    },
}
SIMMIM = {"name": "simmim", "mask_patch": 8}
LEJEPA = {"name": "lejepa", "projector": [24, 12], "num_directions": 16, "num_local": 2, "local_size": 16}
ROTATION = {"name": "rotation", "crop_scale": None, "shift": 4}
SPARK = {"name": "spark", "decoder_dim": 16}
# Cells of 8 pixels: 32 is no more than one of a plain ResNet's
STRIDE_8 = RESNET | {"kwargs": RESNET["kwargs"] | {"output_stride": 8}}
CONVNEXT = {
    "name": "convnextv2_atto",
    "image_size": 32,
    "patch_size": 1,
    "kwargs": {"depths": [1, 1, 1, 1], "dims": [4, 6, 8, 12]},
}
# With initial weights of 0.02 hardly a gradient would reach the first stage of narrower ones.
WIDER = CONVNEXT | {"kwargs": {"depths": [1, 1, 1, 1], "dims": [16, 24, 32, 48]}}
FCMAE = {"name": "fcmae", "decoder_dim": 32}
LAMB = {"name": "lamb", "lr": 1e-2, "weight_decay": 0.04, "weight_decay_end": 0.2}
SGD = {"name": "sgd", "lr": 0.005, "nesterov": True, "decay_vectors": True, "milestones": [0.4]}
LARS = {"name": "lars", "lr": 1.0, "weight_decay": 1e-4, "spared_lr_ratio": 0.02}
ADAMW = {"name": "adamw", "lr": 1e-3}
CASES = {
    "barlow resnet sgd": (BARLOW, RESNET, SGD, 0),
    "barlow resnet lars": (NARROW, RESNET, LARS, 0),
    "barlow vit adamw": (BARLOW, VIT, ADAMW, 0),
    "barlow vit adamw zero1": (BARLOW, VIT, ADAMW, 1),
    "barlow vit adamw zero2": (NARROW, VIT, ADAMW, 2),
    "rotation resnet sgd": (ROTATION, RESNET, SGD, 0),
    "rotation vit adamw zero1": (ROTATION, VIT, ADAMW, 1),
    "rotation vit adamw zero2": (ROTATION, VIT, ADAMW, 2),
    "spark resnet lamb": (SPARK, STRIDE_8, LAMB, 0),
    "spark convnext adamw zero2": (SPARK, CONVNEXT, ADAMW, 2),
    "barlow resnet sgd zero3": (BARLOW, RESNET, SGD, 3),
    "rotation vit adamw zero3": (ROTATION, VIT, ADAMW, 3),
    "spark resnet adamw zero3": (SPARK, STRIDE_8, ADAMW, 3),
    "spark convnext adamw zero3": (SPARK, CONVNEXT, ADAMW, 3),
    "vicreg resnet lars": (VICREG, RESNET, LARS, 0),
    "vicreg vit adamw zero2": (VICREG | {"projector": [24, 12]}, VIT, ADAMW, 2),
    "lejepa resnet adamw": (LEJEPA, RESNET, ADAMW, 0),
    "mae gradient vit adamw": (MAE_GRADIENT, VIT | {"patch_size": 8}, ADAMW, 0),
    "msbreg resnet lars": (MSBREG, RESNET, LARS, 0),
    "msbreg vit adamw zero2": (MSBREG | {"centroid": "mean"}, VIT, ADAMW, 2),
    "vicreg with dynamics adamw": (VICREG | {"singular_value_weight": 0.1, "brownian_weight": 0.1}, RESNET, ADAMW, 0),
    "fcmae convnext adamw": (FCMAE, WIDER, ADAMW, 0),
    "simmim swin adamw": (SIMMIM | {"target_window": 7}, SWIN, ADAMW, 0),
    "simmim vit adamw zero3": (SIMMIM | {"mask_patch": 16}, VIT, ADAMW, 3),
}
RESUMED = (
    "vicreg resnet lars",
    "lejepa resnet adamw",
    "msbreg resnet lars",
    "mae gradient vit adamw",
    "simmim swin adamw",
    "fcmae convnext adamw",
)


def config_of(case: str, out: Path) -> Config:
    objective, encoder, optimizer, stage = CASES[case]
    values = {
        "run_dir": str(out),
        "data": {"shards": "none"},
        "encoder": encoder,
        "objective": objective,
        "train": {"epochs": 1, "global_batch": GLOBAL_BATCH, "precision": "fp32", "zero_stage": stage},
        "optimizer": {"lr_rule": "absolute"} | optimizer,
        "log": {"every_steps": 1, "pictures_every_steps": 1},
        "checkpoint": {"every_steps": 2},
    }
    if stage == 3:  # small parameters, which all of these are, would be kept whole
        values["deepspeed"] = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
    return validate_config(values, case, options_for)


def batch_at(positions: torch.Tensor, plan: ViewPlan) -> Batch:
    """Images with something to tell apart: noise of one colour a sample, brighter at the top."""
    generator = torch.Generator().manual_seed(1)
    size = (NUM_SAMPLES, 3, *plan.views[0].size)
    colours = torch.rand(NUM_SAMPLES, 3, 1, 1, generator=generator)
    noise = torch.rand(size, generator=generator)
    pixels = (255 * (0.4 * colours + 0.3 * noise + torch.linspace(0.3, 0, size[2])[:, None])).to(torch.uint8)
    ids = positions % NUM_SAMPLES
    sizes, num_views = [view.size for view in plan.views], len(plan.views)
    return Batch(
        views=tuple(pixels[ids].roll(2 * v, -1)[..., :height, :width] for v, (height, width) in enumerate(sizes)),
        boxes=torch.zeros(len(ids), num_views, 4, dtype=torch.int32),
        flips=(positions[:, None] + torch.arange(num_views)) % 3 == 0,
        seeds=positions * 31,
        sample_ids=ids,
        positions=positions,
    )


def run_case(name: str, out: Path, label: str, checkpoint: Path | None = None) -> None:
    import deepspeed  # after the start, which quiets it

    config = config_of(name, out)
    if checkpoint:
        config = config.model_copy(update={"resume": config.resume.model_copy(update={"checkpoint": str(checkpoint)})})
    objective = build_objective(config)
    # As in a run: only the main rank watches, and draws pictures.
    recorders = [Recorder()] if distributed.is_main() else []
    micro_batch, _ = config.batching(distributed.world_size())
    loader = MemoryLoader(micro_batch, NUM_SAMPLES, lambda positions: batch_at(positions, objective.views))
    store = Store(out / label / "checkpoints") if name in RESUMED else NoStore()
    distributed.barrier()
    Engine(config, objective, loader, store, recorders).run()
    gathered = distributed_buffers(objective)
    if config.train.zero_stage == 3:
        assert not any(parameter.numel() for parameter in objective.parameters())  # each rank keeps a part elsewhere
    with deepspeed.zero.GatheredParameters(list(objective.parameters())):
        weights = {key: value.clone() for key, value in objective.state_dict().items()}
    if distributed.is_main():
        torch.save(weights, out / f"{label}.pt")
        records = [vars(record) for record in recorders[0].records]
        same = all(torch.equal(gathered[0], other) for other in gathered)
        (out / f"{label}.json").write_text(json.dumps({"records": records, "same_buffers": same}))


def distributed_buffers(objective) -> list[torch.Tensor]:
    """Each rank's buffers, in one vector."""
    own = torch.cat([torch.zeros(1), *(buffer.flatten().float() for buffer in objective.buffers())])
    gathered = [torch.empty_like(own) for _ in range(distributed.world_size())]
    dist.all_gather(gathered, own)
    return gathered


def cases(out: Path) -> None:
    for name in CASES:
        run_case(name, out, name)
        if name in RESUMED:
            run_case(name, out, f"{name} resumed", out / name / "checkpoints" / "step-00000002")
