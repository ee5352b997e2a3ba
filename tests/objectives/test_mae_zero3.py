"""MAE under ZeRO stage 3, in a process of its own: `python test_mae_zero3.py` prints both runs' losses."""

import json
import os
import subprocess
import sys

import pytest
from runs import LAUNCHED

ENCODERS = {  # with parameters that are read outside the module that holds them
    "vit_base_patch16_224": ({"reg_tokens": 2}, "learned"),
    "vit_small_patch16_rope_mixed_224": ({}, "sincos"),
    "beit_base_patch16_224": ({"global_pool": "token"}, "sincos"),
}


def test_training_with_split_parameters_equals_plain_torch():
    # The mask token is the objective's own parameter, outside any submodule that would gather it.
    environment = os.environ | LAUNCHED | {"DS_ACCELERATOR": "cpu"}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    for name in ENCODERS:
        plain, split = found[name]
        assert len(set(plain)) == len(plain) > 2, name  # it trained
        assert split == pytest.approx(plain, rel=1e-6), name


def train(name: str, split: bool) -> list[float]:
    import deepspeed
    import torch

    from prelude.data.batch import Batch
    from prelude.objectives.mae import MAE, MAEOptions
    from prelude.pretrain.config import EncoderConfig
    from prelude.pretrain.encoders import build_encoder, seeded
    from prelude.pretrain.schedules import Progress

    kwargs, pos_embed = ENCODERS[name]
    kwargs = {"embed_dim": 32, "depth": 2, "num_heads": 4} | kwargs
    config = EncoderConfig(name=name, image_size=32, patch_size=8, pos_embed=pos_embed, kwargs=kwargs)
    options = MAEOptions(decoder_dim=16, decoder_depth=1, decoder_num_heads=2)
    with seeded(0):
        mae = MAE(build_encoder(config, seed=0), options, image_size=(32, 32), mean=(0.5,) * 3, std=(0.2,) * 3)
        pixels = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    ids = torch.arange(4)
    batch = Batch((pixels,), torch.zeros(4, 1, 4, dtype=torch.int32), torch.zeros(4, 1, dtype=torch.bool), *[ids] * 3)
    optimizer = torch.optim.AdamW(mae.parameters(), lr=1e-2)
    if split:
        zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
        settings = {"train_micro_batch_size_per_gpu": 4, "zero_optimization": zero, "log_level": "error"}
        engine, *_ = deepspeed.initialize(model=mae, optimizer=optimizer, config=settings)
    losses = []
    for step in range(4):
        progress = Progress(step, 4, 1.0)
        if split:
            loss = engine(batch, progress).total
            engine.backward(loss)
            engine.step()
        else:
            optimizer.zero_grad()
            loss = mae(batch, progress).total
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    from prelude.pretrain import distributed

    distributed.start()
    print(json.dumps({name: [train(name, split=False), train(name, split=True)] for name in ENCODERS}))
    distributed.stop()
