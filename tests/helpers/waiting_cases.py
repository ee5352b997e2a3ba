"""Run through the real launcher: what makes the host wait in a step, for every objective at every ZeRO stage.

`deepspeed --num_gpus 2 waiting_cases.py OUT` writes OUT/2/RANK.json, and OUT/1/0.json where the first rank is then
alone: for each case, what was found in a step that is not logged.
"""

import json
import sys
from pathlib import Path

import torch
from convnet_cases import (
    ADAMW,
    BARLOW,
    CONVNEXT,
    FCMAE,
    LAMB,
    LARS,
    LEJEPA,
    MSBREG,
    RESNET,
    ROTATION,
    SGD,
    SIMMIM,
    SPARK,
    STRIDE_8,
    SWIN,
    VICREG,
)
from in_memory import MemoryLoader, NoStore, Recorder
from two_and_one import at_two_ranks_and_one

from prelude.data.batch import Batch
from prelude.objectives import options_for
from prelude.objectives.building import build_objective
from prelude.pretrain import distributed
from prelude.pretrain.config import Config
from prelude.pretrain.engine import Engine
from prelude.pretrain.host_waits import counting_waits
from prelude.pretrain.meter import Meter
from prelude.pretrain.recipes import validate_config

VIT = {
    "name": "vit_tiny_patch16_224",
    "image_size": 32,
    "patch_size": 4,
    "kwargs": {
        "depth": 2,
        "embed_dim": 16,
        "num_heads": 2,
        "class_token": True,
        "global_pool": "avg",
        "fc_norm": False,
    },
}
EVA = VIT | {"name": "vit_small_patch16_dinov3", "kwargs": {"depth": 2, "embed_dim": 16, "num_heads": 2}}
MAE = {"name": "mae", "decoder_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2}
IJEPA = {"name": "ijepa", "predictor_dim": 16, "predictor_depth": 1}
# From the first step on, all images are predicted in regions
DSEQ = IJEPA | {"name": "dseqjepa", "lambda_start": 1.0}
CASES = {
    **{f"mae zero{stage}": (MAE, VIT, ADAMW, stage) for stage in range(4)},
    "mae gradient": (MAE | {"gradient_weight": 1.0}, VIT, ADAMW, 0),
    **{f"ijepa zero{stage}": (IJEPA, VIT, ADAMW, stage) for stage in range(3)},
    **{f"dseqjepa zero{stage}": (DSEQ, VIT, ADAMW, stage) for stage in range(3)},
    "ijepa rotary": (IJEPA, EVA, ADAMW, 0),
    "dseqjepa sample reencode": (DSEQ | {"context": "reencode", "lambda_granularity": "sample"}, VIT, ADAMW, 0),
    "dseqjepa contrastive": (DSEQ | {"contrastive_weight": 0.001, "contrastive_projector": [8]}, VIT, ADAMW, 0),
    **{f"barlow zero{stage}": (BARLOW, RESNET, ADAMW, stage) for stage in range(4)},
    "barlow lars": (BARLOW, RESNET, LARS, 0),
    "vicreg": (VICREG, RESNET, LARS, 0),
    "vicreg zero3": (VICREG | {"projector": [16, 4]}, RESNET, ADAMW, 3),
    "lejepa": (LEJEPA, RESNET, ADAMW, 0),
    "lejepa zero3": (LEJEPA, RESNET, ADAMW, 3),
    "msbreg": (MSBREG, RESNET, ADAMW, 0),
    "msbreg zero2": (MSBREG, RESNET, ADAMW, 2),
    "barlow with dynamics": (BARLOW | {"singular_value_weight": 0.1, "brownian_weight": 0.1}, RESNET, ADAMW, 0),
    "fcmae": (FCMAE, CONVNEXT, ADAMW, 0),
    "fcmae zero3": (FCMAE, CONVNEXT, ADAMW, 3),
    "simmim": (SIMMIM | {"target_window": 7}, SWIN, ADAMW, 0),
    "simmim zero3": (SIMMIM, VIT, ADAMW, 3),
    "spark lamb": (SPARK, STRIDE_8, LAMB, 0),
    **{f"spark zero{stage}": (SPARK, CONVNEXT, ADAMW, stage) for stage in range(4)},
    "rotation sgd": (ROTATION, RESNET, SGD | {"milestones": []}, 0),
    **{f"rotation zero{stage}": (ROTATION, VIT, ADAMW, stage) for stage in range(1, 4)},
}


def config_of(case: str, out: Path) -> Config:
    objective, encoder, optimizer, stage = CASES[case]
    values = {
        "run_dir": str(out),
        "data": {"shards": "none"},
        "encoder": encoder,
        "objective": objective,
        "train": {
            "epochs": 5,
            "global_batch": 8,
            "precision": "fp32",
            "zero_stage": stage,
            "gradient_clipping": 1.0,
        },
        "optimizer": optimizer,
        "log": {"every_steps": 100, "pictures_every_steps": 0},
    }
    return validate_config(values, case, options_for)


def found_in(case: str, out: Path) -> list[str]:
    config = config_of(case, out)
    objective = build_objective(config)
    micro_batch, _ = config.batching(distributed.world_size())
    loader = MemoryLoader(micro_batch, 64, lambda positions: batch_at(positions, objective.views))
    engine = Engine(config, objective, loader, NoStore(), [Recorder()])
    batches, meter = iter(loader), Meter(config.train.global_batch)
    engine._fetch_first(batches, meter)
    for _ in range(2):  # what is made once, such as constants, is made by then
        engine._watch(engine._step(batches, meter), meter)
    with counting_waits() as found:
        engine._watch(engine._step(batches, meter), meter)
    return found


def batch_at(positions: torch.Tensor, views) -> Batch:
    generator = torch.Generator().manual_seed(7)
    shape = (64, 3, *views.views[0].size)
    pixels = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)[positions % 64]
    count, num_views = len(positions), len(views.views)
    return Batch(
        tuple(pixels[..., : view.size[0], : view.size[1]] for view in views.views),
        torch.zeros(count, num_views, 4, dtype=torch.int32),
        torch.zeros(count, num_views, dtype=torch.bool),
        seeds=positions * 31,
        sample_ids=positions % 64,
        positions=positions,
    )


def cases(out: Path) -> None:
    found = {case: found_in(case, out) for case in CASES}
    (out / f"{distributed.rank()}.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    at_two_ranks_and_one(cases, Path(sys.argv[-1]))
