"""Dense features against timm's own ways to the same numbers."""

import pytest
import timm
import torch

from prelude.data.errors import UserError
from prelude.evaluators.features.dense import Layout, check_dense, dense, layout_of, patches_like
from prelude.evaluators.features.extraction import check_kinds, pool
from prelude.evaluators.features.pixels import Pixels
from prelude.pretrain.config import EncoderConfig
from prelude.pretrain.encoders import build_encoder


def vit(**changes):
    torch.manual_seed(0)
    settings = {"img_size": (32, 48), "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2, "num_classes": 0}
    return timm.create_model("vit_tiny_patch16_224", **settings | changes).eval()


def convnet():
    torch.manual_seed(0)
    return timm.create_model("resnet18", num_classes=0, channels=(8, 12, 16, 20), layers=(1, 1, 1, 1)).eval()


@pytest.fixture
def pixels():
    return torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "changes", [{}, {"reg_tokens": 2}, {"class_token": False, "global_pool": "avg", "fc_norm": False}]
)
@torch.no_grad()
def test_tokens_are_the_patch_tokens_of_timm_in_raster_order(changes, pixels):
    model = vit(**changes)
    found = dense(model, pixels, ["tokens", "tokens2"])
    kept = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, inputs, output: kept.append(output))
    final = model.forward_features(pixels)[:, model.num_prefix_tokens :]
    assert found["tokens"].shape == (2, 4, 6, 24)
    assert torch.allclose(found["tokens"].flatten(1, 2), final, atol=1e-5)
    before = model.norm(kept[1])[:, model.num_prefix_tokens :]
    assert torch.allclose(found["tokens2"].flatten(1, 2), torch.cat([before, final], 2), atol=1e-5)
    assert torch.equal(pool(model, pixels, ["tokens", "mean"])["tokens"], found["tokens"].flatten(1))


@torch.no_grad()
def test_tokens_have_the_final_norm_where_it_comes_after_the_mean(pixels):
    model = vit(global_pool="avg")
    torch.nn.init.normal_(model.fc_norm.weight)
    kept = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, inputs, output: kept.append(output))
    found = dense(model, pixels, ["tokens", "tokens2"])
    weight, normed = model.fc_norm.weight, torch.nn.functional.layer_norm
    before, last = (normed(tokens, (24,), weight, eps=1e-6) for tokens in kept[1:])
    assert torch.allclose(found["tokens"].flatten(1, 2), last[:, 1:], atol=1e-5)
    assert torch.allclose(found["tokens2"].flatten(1, 2), torch.cat([before, last], 2)[:, 1:], atol=1e-5)


@torch.no_grad()
def test_maps_are_those_of_features_only(pixels):
    model = convnet()
    maps = timm.create_model(
        "resnet18", features_only=True, channels=(8, 12, 16, 20), layers=(1, 1, 1, 1)
    ).eval()  # fmt: skip
    maps.load_state_dict(model.state_dict(), strict=False)
    stages = maps(pixels)
    found = dense(model, pixels, ["map", "map0", "map4"])
    for kind, stage in (("map0", 0), ("map4", 4), ("map", 1)):  # 16 x 24, 8 x 12, 4 x 6: the second has 8 rows
        assert torch.allclose(found[kind], stages[stage].permute(0, 2, 3, 1), atol=1e-5)
    assert layout_of(model, "map", (32, 48), 3) == Layout(8, 12, 8)


def test_patches_are_the_pixels_of_each():
    pixels = torch.arange(2 * 3 * 8 * 12.0).view(2, 3, 8, 12)
    found = dense(Pixels(), pixels, ["patches4x3"])["patches4x3"]
    assert found.shape == (2, 4, 3, 3 * 2 * 4)
    assert torch.equal(found[1, 2, 1], pixels[1, :, 4:6, 4:8].flatten())
    assert patches_like(Layout(8, 12, 5), (32, 48)) == "patches8x12" and patches_like(Layout(7, 7, 5), (32, 32)) == (
        "patches4x4"
    )


@torch.no_grad()
def test_networks_of_the_users_have_tokens_or_maps(pixels):
    images = pixels[..., :32]
    transformer, convnet = (
        build_encoder(EncoderConfig(name=f"own_networks:{name}", image_size=32), seed=0).eval()
        for name in ("small_transformer", "small_convnet")
    )
    found = dense(transformer, images, ["tokens"])["tokens"]
    assert torch.equal(found.flatten(1, 2), transformer.forward_tokens(images)[:, 1:]) and found.shape[1:3] == (8, 8)
    found = dense(convnet, images, ["map", "map2"])
    stages = convnet.forward_maps(images)  # 16 x 16, 8 x 8, 4 x 4
    assert torch.equal(found["map"], stages[1].permute(0, 2, 3, 1))
    assert torch.equal(found["map2"], stages[2].permute(0, 2, 3, 1))


@pytest.mark.parametrize(
    ("model", "kind", "told"),
    [
        (vit, "map", "write tokens"),
        (vit, "tokens9", "has 3 blocks"),
        (vit, "patches4x4", "write tokens"),
        (convnet, "tokens", "write map"),
        (convnet, "map7", "map0 to map4"),
        (Pixels, "tokens", "patches8x8"),
        (torch.nn.Identity, "tokens", "neither patch tokens nor maps"),
    ],
)
def test_what_an_encoder_does_not_have_is_refused(model, kind, told):
    with pytest.raises(UserError, match=told):
        check_dense(model(), kind, "encoder")
    with pytest.raises(UserError):
        check_kinds(model(), [kind], "encoder")
