"""Transformers of timm on a part of their patches: rotary positions, biases of pairs, no class token, registers.

The oracles are timm's own forward and the reference values of a fixture that was computed without either.
"""

import math

import pytest
import torch
from timm.models.eva import Eva

from prelude.data.errors import UserError
from prelude.pretrain.config import EncoderConfig
from prelude.pretrain.encoders import build_encoder, check_encoder, forward_tokens
from prelude.pretrain.kept_patches import token_features

TINY = {"embed_dim": 32, "depth": 2, "num_heads": 2}
SIZE, PATCHES = (16, 24), 6  # a grid of 2 x 3
NORMED = {"use_fc_norm": False, "use_post_transformer_norm": True}


def config(name, size=SIZE, patch=8, pos_embed="sincos", **kwargs):
    return EncoderConfig(name=name, image_size=size, patch_size=patch, pos_embed=pos_embed, kwargs=TINY | kwargs)


FAMILIES = {
    "DINOv3": config("vit_small_patch16_dinov3"),
    "DINOv3 for one size, gated, with biases": config("vit_small_plus_patch16_dinov3_qkvb", dynamic_img_size=False),
    "EVA-02": config("eva02_base_patch14_224", **NORMED),
    "EVA-02, packed, learned table": config("eva02_tiny_patch14_224", pos_embed="learned", **NORMED),
    "EVA, norm after each block": config("eva02_enormous_patch14_clip_224", **NORMED),
    "rotations learned by block and head": config("vit_small_patch16_rope_mixed_224", dynamic_img_size=True),
    "Perception Encoder": config("vit_pe_core_tiny_patch16_384", global_pool="avg", use_fc_norm=False),
    "SigLIP": config("vit_base_patch16_siglip_224", global_pool="avg", fc_norm=False),
    "registers": config("vit_medium_patch16_reg4_gap_256", fc_norm=False, final_norm=True),
    "DINOv2, patches of 14": config("vit_small_patch14_reg4_dinov2", (28, 42), None, "learned"),
    "BEiT": config("beit_base_patch16_224", global_pool="token"),
    "BEiT with a table and shared biases": config(
        "beitv2_base_patch16_224", global_pool="token", use_abs_pos_emb=True, use_shared_rel_pos_bias=True
    ),
}


TABLE_ALONE = ("EVA, norm after each block", "SigLIP", "registers", "DINOv2, patches of 14")


@pytest.fixture(params=FAMILIES)
def family(request):
    """(model, images (3, 3, H, W), keep (3, K)), in float64 with weights far from their initial values."""
    built = FAMILIES[request.param]
    check_encoder(built, tokens=True)
    model = randomised(build_encoder(built, seed=0))
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(3, 3, *built.size, generator=generator, dtype=torch.float64)
    return model, images, torch.tensor([[4, 1, 2], [0, 5, 3], [2, 3, 4]])


def randomised(model):
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.double().eval()


def at(tokens, keep):
    return tokens.gather(1, keep[..., None].expand(-1, -1, tokens.shape[-1]))


def close(one, two, tolerance=1e-12):
    torch.testing.assert_close(one, two, rtol=0, atol=tolerance)


@torch.no_grad()
def test_all_patches_in_any_order_have_timms_own_features(family):
    model, images, _ = family
    theirs, prefix = model.forward_features(images), model.num_prefix_tokens
    keep = torch.stack([torch.randperm(PATCHES, generator=torch.Generator().manual_seed(i)) for i in range(3)])
    ours = forward_tokens(model, images, keep)
    # timm computes the rotations of images of any size in the model's precision, here they are held in single.
    tolerance = 1e-6 if hasattr(model, "held_rotations") else 1e-12
    close(ours[:, :prefix], theirs[:, :prefix], tolerance)
    close(ours[:, prefix:], at(theirs[:, prefix:], keep), tolerance)
    close(forward_tokens(model, images), theirs, tolerance)


@torch.no_grad()
def test_hidden_pixels_change_nothing(family):
    model, images, keep = family
    before = forward_tokens(model, images, keep)
    (height, width), columns = model.patch_embed.patch_size, model.patch_embed.grid_size[1]
    for image, kept in zip(images, keep.tolist(), strict=True):
        for hidden in set(range(PATCHES)) - set(kept):
            top, left = hidden // columns * height, hidden % columns * width
            image[:, top : top + height, left : left + width] = math.nan
    assert torch.equal(forward_tokens(model, images, keep), before)


@torch.no_grad()
def test_permuted_patches_have_permuted_features(family):
    model, images, keep = family
    order, prefix = torch.tensor([2, 0, 1]), model.num_prefix_tokens
    one, two = forward_tokens(model, images, keep), forward_tokens(model, images, keep[:, order])
    close(two[:, :prefix], one[:, :prefix])
    close(two[:, prefix:], one[:, prefix:][:, order])


@torch.no_grad()
@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in TABLE_ALONE], indirect=True)
def test_the_same_pixels_at_other_places_have_other_features(family):
    """So that positions which are ignored, or taken from the number of kept patches, are found out."""
    model, images, _ = family
    model.pos_embed = None  # what is asked is whether rotations and biases arrive
    images = images.new_zeros(images.shape)
    (height, width) = model.patch_embed.patch_size
    patches = torch.randn(3, 3, height, width, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    images[:, :, :height, :width] = patches  # patch 0; patch 5 has the same pixels
    images[:, :, -height:, -width:] = patches
    near, far = (forward_tokens(model, images, torch.tensor([[0, one]] * 3)) for one in (1, 2))
    assert (near[:, -1] - far[:, -1]).abs().max() > 1e-3
    here, there = (forward_tokens(model, images, torch.tensor([ids] * 3)) for ids in ([0, 1], [5, 1]))
    assert (here - there).abs().max() > 1e-3


@torch.no_grad()
def test_what_is_not_visible_changes_nothing(family):
    """DSeq-JEPA's order: the last of the kept patches is seen by itself alone."""
    model, images, keep = family
    count = model.num_prefix_tokens + 3
    visible = torch.ones(3, count, count, dtype=torch.bool)
    visible[:, :-1, -1] = False
    seen = forward_tokens(model, images, keep, visible)
    close(seen[:, :-1], forward_tokens(model, images, keep[:, :-1]))
    assert (seen[:, :-1] - forward_tokens(model, images, keep)[:, :-1]).abs().max() > 1e-3


def test_recomputed_activations_have_the_same_gradients(family):
    model, images, keep = family
    gradients = []
    for enable in (False, True):
        model.zero_grad()
        model.set_grad_checkpointing(enable)
        forward_tokens(model, images, keep).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
    assert all(torch.equal(one, two) for one, two in zip(*gradients, strict=True))
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert without == []  # everything that a teacher follows and an export holds is trained


def test_positions_are_no_weights(family):
    model, *_ = family
    assert not [name for name in model.state_dict() if "rot" in name or "rope" in name and name != "rope.freqs"]


def test_rotations_of_images_of_any_size_are_computed_once():
    """timm computes them at every call, in part on the CPU, where the host would wait for the device."""
    model = build_encoder(FAMILIES["DINOv3"], seed=0)
    images, keep = torch.randn(1, 3, *SIZE), torch.tensor([[1, 4]])
    expected = forward_tokens(model, images), forward_tokens(model, images, keep)
    model.rope.get_embed = None
    assert torch.equal(forward_tokens(model, images), expected[0])
    assert torch.equal(forward_tokens(model, images, keep), expected[1])


# ---- the published fixture: parameters, images and outputs by formula, 8 x 16 pixels in patches of 4

FULL_AND_KEPT = {
    "DINOv3": (
        {
            "init_values": 1e-5,
            "rope_type": "dinov3",
            "rope_temperature": 100.0,
            "rope_rotate_half": True,
            "use_abs_pos_emb": False,
            "num_reg_tokens": 2,
            "qkv_bias": True,
            "use_fc_norm": False,
            "global_pool": "token",
            "dynamic_img_size": True,
        },
        36,
        1e-5,
        {
            "class": (1.5417536, -0.1357693, -0.3003867, -2.4368221),
            "patch 5": (1.1041455, 0.2046801, -0.4972445, -0.9297368),
            "sums": (1.882561, 373.921767),
            "kept class": (0.6554403, 0.1501821, -0.1511719, -2.4504422),
            "kept patch 4": (-0.5344690, 1.0943864, -0.3972771, -0.2815466),
            "kept patch 7": (1.8992311, 0.6670013, -0.0680800, -1.7955119),
            "kept sums": (0.607404, 199.315562),
        },
    ),
    "EVA-02": (
        {
            "swiglu_mlp": True,
            "scale_mlp": True,
            "qkv_fused": False,
            "rope_type": "cat",
            "ref_feat_shape": (2, 2),
            "global_pool": "avg",
        },
        44,
        1e-6,
        {
            "class": (5.0981574, 0.2473966, 1.2712479, -1.8617332),
            "patch 5": (4.1573284, 0.4416015, 0.3958573, 3.7384403),
            "sums": (72.080341, 2176.414577),
            "kept class": (3.2778146, -0.3762354, -1.5925143, -1.1663027),
            "kept patch 4": (3.9837423, -2.4128321, 0.0197284, 2.6045750),
            "kept patch 7": (3.9039704, 8.3722291, -0.4888045, -0.5881740),
            "kept sums": (91.412593, 1143.262174),
        },
    ),
}


def formula(shape, number):
    place = torch.arange(1, math.prod(shape) + 1, dtype=torch.float64)
    return 0.6 * ((43758.5453 * (12.9898 * place + 78.233 * number).sin()) % 1 - 0.5).view(shape)


@torch.no_grad()
def by_formula(arguments, num_tensors, eps):
    model = Eva(
        img_size=(8, 16), patch_size=4, embed_dim=16, depth=2, num_heads=2, mlp_ratio=2, num_classes=0,
        use_rot_pos_emb=True, **arguments,
    )  # fmt: skip
    names = sorted(model.state_dict())
    assert len(names) == num_tensors
    for number, name in enumerate(names, start=1):
        value = formula(model.state_dict()[name].shape, number)
        is_norm = "norm" in name
        value += float(is_norm and name.endswith("weight")) + 0.5 * ("gamma" in name)
        value *= 2.0 if "attn" in name and not is_norm and name.endswith("weight") else 1.0
        model.state_dict()[name].copy_(value)
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = eps
    return model.double().eval()


@torch.no_grad()
@pytest.mark.parametrize("name", FULL_AND_KEPT)
def test_the_fixtures_values_come_out(name):
    arguments, num_tensors, eps, expected = FULL_AND_KEPT[name]
    model = by_formula(arguments, num_tensors, eps)
    n = torch.arange(8 * 16, dtype=torch.float64).view(8, 16)
    pixels = [[(1.7 * n * (c + 1) + 0.9 * b).sin() + 0.3 * (0.11 * n**1.5 + c).cos() for c in range(3)] for b in (0, 1)]
    images = torch.stack([torch.stack(image) for image in pixels])
    prefix, keep = model.num_prefix_tokens, torch.tensor([[1, 4, 6], [0, 3, 7]])
    full, kept = token_features(model, images), token_features(model, images, keep)
    found = {
        "class": full[0, 0],
        "patch 5": full[0, prefix + 5],
        "kept class": kept[0, 0],
        "kept patch 4": kept[0, prefix + 1],
        "kept patch 7": kept[1, prefix + 2],
    }
    for where, values in found.items():
        torch.testing.assert_close(values[:4], torch.tensor(expected[where]).double(), rtol=1e-6, atol=1e-6)
    for where, tokens in (("sums", full), ("kept sums", kept)):
        close(torch.stack([tokens.sum(), tokens.square().sum()]), torch.tensor(expected[where]).double(), 1e-4)


# ---- what is refused

REFUSED = [
    (config("eva02_tiny_patch14_224"), r"norms only what .*\{use_fc_norm: false, use_post_transformer_norm: true\}"),
    (config("beit_base_patch16_224"), r"norms only what it pools, .*\{global_pool: token\}"),
    (config("vit_base_patch16_siglip_224"), r"pools with attention, .*\{global_pool: avg, fc_norm: false\}"),
    (config("vit_pe_core_tiny_patch16_384"), r"pools with attention, .*\{global_pool: token, use_fc_norm: false\}"),
    (config("vit_small_patch16_dinov3", use_rot_pos_emb=False), r"no table of positions; .*use_abs_pos_emb: true"),
    (
        config("beit_base_patch16_224", global_pool="token", use_rel_pos_bias=False),
        r"no table of positions; .*use_rel_pos_bias: true",
    ),
    (config("vit_small_patch16_dinov3", patch_drop_rate=0.5), "patch_drop_rate drops patches a second time"),
    (config("vit_small_patch16_dinov3", rope_rescale_coords=2.0), "rope_rescale_coords moves positions at random"),
    (
        EncoderConfig(name="naflexvit_base_patch16_gap", image_size=32, kwargs=TINY),
        "builds a NaFlexVit, which takes the grid's size from the patches that it is shown",
    ),
]


@pytest.mark.parametrize(("refused", "message"), REFUSED)
def test_what_would_compute_something_else_is_refused_with_what_to_write(refused, message):
    with pytest.raises(UserError, match=message):
        check_encoder(refused, tokens=True)
    check_encoder(refused, tokens=False)
