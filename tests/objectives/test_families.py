"""Both objectives on many families of timm: forward, backward, and the encoder's weights back in plain timm."""

import pytest
import timm
import torch

from objectives import build_objective, options_for
from pretrain.config import validate_config
from pretrain.preview import blank_batch
from pretrain.schedules import Progress

FAMILIES = {  # name: (pixels, further keys of the encoder)
    "resnet10t": (32, {}),
    "resnetv2_18": (32, {}),
    "convnext_atto": (32, {"patch_size": 2, "kwargs": {"depths": [1, 1, 1, 1]}}),
    "vit_tiny_patch16_224": (32, {"kwargs": {"depth": 2}}),
    "deit_tiny_distilled_patch16_224": (32, {"kwargs": {"depth": 2}}),
    "eva02_tiny_patch14_224": (28, {"pos_embed": "learned", "kwargs": {"depth": 2}}),
    "swin_tiny_patch4_window7_224": (32, {"kwargs": {"depths": [1, 1, 1, 1], "embed_dim": 48, "window_size": 4}}),
    "mobilenetv3_small_050": (32, {}),
    "efficientnet_lite0": (32, {}),
    "regnety_002": (32, {}),
    "repvgg_a0": (32, {}),
    "mobileone_s0": (32, {}),
    "resnet33ts": (32, {"kwargs": {"stem_type": "3x3", "stem_pool": ""}}),
    "dla46_c": (32, {}),
    "densenet121": (32, {"kwargs": {"block_config": [1, 2, 2, 1]}}),
    "levit_128s": (64, {}),
    "poolformer_s12": (32, {"kwargs": {"layers": [1, 1, 1, 1]}}),
    "mixer_s32_224": (32, {"kwargs": {"num_blocks": 2}}),
    "edgenext_xx_small": (64, {}),
    "xcit_nano_12_p16_224": (32, {"pos_embed": "learned", "kwargs": {"depth": 2}}),
    "ghostnet_050": (32, {}),
    "starnet_s1": (32, {}),
}


@pytest.mark.parametrize("objective", ["barlow_twins", "rotation"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_trains_and_goes_back_to_timm(name, objective, tmp_path):
    image_size, more = FAMILIES[name]
    options = {"projector": [8, 8]} if objective == "barlow_twins" else {}
    config = validate_config(
        {
            "run_dir": "x",
            "data": {"shards": "x"},
            "encoder": {"name": name, "image_size": image_size} | more,
            "objective": {"name": objective} | options,
            "train": {"epochs": 1, "global_batch": 4},
            "optimizer": {"lr": 1e-3},
        },
        name,
        options_for,
    )
    built = build_objective(config)
    batch = blank_batch(built.views, 4)
    for v, view in enumerate(batch.views):
        view.copy_(torch.randint(0, 256, view.shape, generator=torch.Generator().manual_seed(v)))
    loss = built(batch, Progress(0, 10, 1.0))
    loss.total.backward()
    assert loss.total.isfinite()
    grads = [p.grad for p in built.encoder.parameters() if p.grad is not None]
    assert sum(grad.abs().sum() for grad in grads) > 0 and all(grad.isfinite().all() for grad in grads)

    torch.save(built.exported_encoder().state_dict(), tmp_path / "encoder.pt")
    kwargs = dict(config.encoder.kwargs) | ({"patch_size": 2} if config.encoder.patch_size else {})
    if "img_size" in built.encoder.default_cfg or hasattr(built.encoder, "pos_embed") or "swin" in name:
        kwargs["img_size"] = image_size
    try:
        plain = timm.create_model(name, num_classes=0, **kwargs)
    except TypeError:
        kwargs.pop("img_size")
        plain = timm.create_model(name, num_classes=0, **kwargs)
    plain.load_state_dict(torch.load(tmp_path / "encoder.pt", weights_only=True))
    images = torch.randn(2, 3, image_size, image_size)
    with torch.no_grad():
        assert torch.equal(plain.eval()(images), built.exported_encoder().eval()(images))
