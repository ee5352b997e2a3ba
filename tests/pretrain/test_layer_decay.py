"""Layers and multipliers against tables worked out by hand from the published recipes."""

import pytest
import timm
import torch

from prelude.pretrain.layer_decay import layer_numbers, lr_scales


def built(name, **kwargs):
    with torch.device("meta"):
        return timm.create_model(name, num_classes=0, **kwargs)


def test_every_parameter_of_a_vit_base_has_the_published_multiplier():
    encoder = built("vit_base_patch16_224", global_pool="avg")
    scales = lr_scales(encoder, 0.65)
    assert set(scales) == {name for name, _ in encoder.named_parameters()}
    for name in ("cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"):
        assert scales[name] == pytest.approx(0.003697, rel=1e-3)
    table = [0.0056880, 0.0087508, 0.0134627, 0.0207119, 0.0318644, 0.0490222]
    table += [0.0754188, 0.1160291, 0.1785063, 0.274625, 0.4225, 0.65]
    for block, scale in enumerate(table):
        names = [name for name in scales if name.startswith(f"blocks.{block}.")]
        assert len(names) == 12
        assert all(scales[name] == pytest.approx(scale, rel=1e-5) for name in names)
    assert scales["fc_norm.weight"] == 1.0


@pytest.mark.parametrize(
    ("name", "decay", "first"),
    [("vit_large_patch16_224", 0.75, 7.53e-4), ("vit_huge_patch14_224", 0.75, 7.53e-5)],
)
def test_the_deepest_layers_of_larger_vits(name, decay, first):
    assert lr_scales(built(name), decay)["patch_embed.proj.weight"] == pytest.approx(first, rel=1e-3)


def test_the_final_norm_of_a_vit_goes_with_the_head():
    layers, head = layer_numbers(built("vit_tiny_patch16_224", depth=2))
    assert head == 3 and layers["norm.weight"] == 3 and layers["blocks.1.mlp.fc2.bias"] == 2


@pytest.mark.parametrize(
    ("name", "last", "third"),
    [
        ("resnet50", 6, [4, 4, 4, 5, 5, 5]),
        ("resnet101", 12, [4 + b // 3 for b in range(23)]),
        ("resnet152", 13, [4 + b // 4 for b in range(36)]),
        ("resnet200", 17, [8 + b // 4 for b in range(36)]),
    ],
)
def test_the_groups_of_a_resnet_are_sparks(name, last, third):
    layers, head = layer_numbers(built(name))
    assert head == last + 1
    assert layers["conv1.weight"] == layers["bn1.bias"] == 0
    assert layers["layer1.0.conv1.weight"] == layers["layer1.2.bn3.weight"] == 1
    assert layers["layer2.0.downsample.0.weight"] == layers["layer2.1.conv1.weight"] == 2
    assert [layers[f"layer3.{b}.conv2.weight"] for b in range(len(third))] == third
    assert {layers[n] for n in layers if n.startswith("layer4")} == {last}
    chunk = 4 if name in ("resnet152", "resnet200") else 2
    assert layers[f"layer2.{chunk}.conv1.weight"] == 3


@pytest.mark.parametrize(("name", "last", "depth"), [("convnext_tiny", 6, 9), ("convnext_base", 12, 27)])
def test_the_groups_of_a_convnext_are_the_papers(name, last, depth):
    layers, head = layer_numbers(built(name))
    assert head == last + 1
    assert layers["stem.0.weight"] == layers["stem.1.weight"] == 0
    assert layers["stages.0.blocks.2.gamma"] == 1
    assert layers["stages.1.downsample.1.weight"] == layers["stages.1.blocks.0.gamma"] == 2
    assert layers["stages.2.downsample.1.weight"] == 3
    assert [layers[f"stages.2.blocks.{b}.gamma"] for b in range(depth)] == [3 + b // 3 for b in range(depth)]
    assert layers["stages.3.downsample.0.bias"] == layers["stages.3.blocks.2.gamma"] == last
    assert layers["head.norm.weight"] == last + 1


def test_no_layer_of_a_very_deep_convnext_learns_as_fast_as_the_head():
    kwargs = {"depths": [1, 1, 40, 1], "dims": [8, 8, 8, 8], "num_classes": 0}
    layers, head = layer_numbers(timm.create_model("convnext_tiny", **kwargs))
    deep = [layers[f"stages.2.blocks.{block}.gamma"] for block in range(40)]
    assert deep == sorted(deep) and deep[-1] < layers["stages.3.blocks.0.gamma"] < head


def test_other_encoders_have_a_layer_a_block_as_timm_groups_them():
    encoder = built("swin_tiny_patch4_window7_224")
    layers, head = layer_numbers(encoder)
    blocks = [f"layers.{s}.blocks.{b}.mlp.fc1.weight" for s, depth in enumerate((2, 2, 6, 2)) for b in range(depth)]
    numbers = [layers[name] for name in blocks]
    assert numbers == sorted(set(numbers)) and head > numbers[-1] and layers["patch_embed.proj.weight"] == 0
    assert set(layers) == {name for name, _ in encoder.named_parameters()}


def test_without_decay_every_rate_is_the_same():
    assert set(lr_scales(built("resnet18"), 1.0).values()) == {1.0}


SHARED = "rel_pos_bias.relative_position_bias_table"  # by all blocks; BEiT's and SimMIM's recipes put it with the head


@pytest.mark.parametrize(
    ("name", "kwargs", "positions", "place"),
    [
        ("vit_small_patch16_rope_mixed_224", {}, "rope.freqs", 0),
        ("eva02_base_patch14_224", {}, "pos_embed", 0),
        ("beitv2_base_patch16_224", {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": True}, SHARED, 3),
        ("beitv2_base_patch16_224", {}, "blocks.0.attn.relative_position_bias_table", 1),
    ],
)
def test_transformers_with_rotations_and_biases_decay_as_a_vit_does(name, kwargs, positions, place):
    layers, head = layer_numbers(built(name, depth=2, **kwargs))
    assert head == 3 and set(layers.values()) == {0, 1, 2, 3}
    others = [key for key in layers if not key.startswith(("blocks.", "norm.", "fc_norm.")) and key != positions]
    assert {layers[key] for key in others} == {0} and layers[positions] == place
    assert {layer for key, layer in layers.items() if key.startswith("blocks.1.")} == {2}
