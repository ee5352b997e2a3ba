"""Both objectives on many families of timm: forward, backward, and the encoder's weights back in plain timm."""

import pytest
import timm
import torch

from prelude.objectives import options_for
from prelude.objectives.building import build_objective
from prelude.pretrain.recipes import validate_config
from prelude.pretrain.schedules import Progress
from prelude.pretrain.step_cost import blank_batch

FAMILIES = {  # name: (pixels, further keys of the encoder)
    "resnet10t": (32, {"kwargs": {"channels": [16, 32, 48, 64]}}),
    "resnetv2_18": (32, {"kwargs": {"channels": [16, 32, 48, 64]}}),
    "densenet121": (32, {"kwargs": {"block_config": [1, 2, 2, 1]}}),
    "convnext_atto": (32, {"patch_size": 2, "kwargs": {"depths": [1, 1, 1, 1]}}),
    "regnety_002": (32, {}),
    "repvgg_a0": (32, {}),
    "efficientnet_lite0": (32, {}),
    "mobilenetv3_small_050": (32, {}),
    "ghostnet_050": (32, {}),
    "dla46_c": (32, {}),
    "starnet_s1": (32, {}),
    "edgenext_xx_small": (64, {}),
    "vit_tiny_patch16_224": (32, {"kwargs": {"depth": 2}}),
    "deit_tiny_distilled_patch16_224": (32, {"kwargs": {"depth": 2}}),
    "eva02_tiny_patch14_224": (28, {"pos_embed": "learned", "kwargs": {"depth": 2}}),
    "swin_tiny_patch4_window7_224": (32, {"kwargs": {"depths": [1, 1, 1, 1], "embed_dim": 48, "window_size": 4}}),
    "levit_128s": (64, {}),
    "xcit_nano_12_p16_224": (32, {"kwargs": {"depth": 2}}),
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
    plain = in_plain_timm(
        name, image_size, **more.get("kwargs", {}), **{k: more[k] for k in ("patch_size",) if k in more}
    )
    plain.load_state_dict(torch.load(tmp_path / "encoder.pt", weights_only=True))
    images = torch.randn(2, 3, image_size, image_size)
    with torch.no_grad():
        assert torch.equal(plain.eval()(images), built.exported_encoder().eval()(images))


def in_plain_timm(name, image_size, **kwargs):
    try:
        return timm.create_model(name, num_classes=0, img_size=image_size, **kwargs)
    except TypeError:  # takes any size
        return timm.create_model(name, num_classes=0, **kwargs)


STEMS = [  # the table of docs/objectives.md: name, pixels, keys of timm, resolution of the last stages
    ("resnet18", 32, {}, [8, 4, 2, 1]),
    ("resnet18", 64, {}, [16, 8, 4, 2]),
    ("resnet18", 128, {}, [32, 16, 8, 4]),
    ("resnet33ts", 32, {"stem_type": "3x3", "stem_pool": ""}, [16, 8, 4, 2]),
    ("resnet18", 64, {"output_stride": 8}, [16, 8, 8, 8]),
    ("convnext_atto", 32, {"patch_size": 1}, [32, 16, 8, 4]),
]


@pytest.mark.parametrize(("name", "pixels", "kwargs", "resolutions"), STEMS)
def test_what_plain_timm_makes_of_small_images(name, pixels, kwargs, resolutions):
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=0, **kwargs)
        maps = model.forward_intermediates(torch.empty(2, 3, pixels, pixels), intermediates_only=True)
    assert [m.shape[-1] for m in maps[-4:]] == resolutions
