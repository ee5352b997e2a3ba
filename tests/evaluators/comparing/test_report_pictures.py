"""Pictures that need an encoder, against loops and against timm's own attention."""

import copy
import io

import numpy as np
import pytest
import timm
import torch
from extracting import extract
from PIL import Image

from prelude.checkpoints.sources import OpenedEncoder, fingerprint
from prelude.data.shapes import write_shards
from prelude.data.shards import ShardIndex
from prelude.evaluators.comparing.report import pictures
from prelude.evaluators.comparing.report.pictures import pictures_of
from prelude.evaluators.dense import attention, drawing
from prelude.evaluators.dense.samples import read_samples
from prelude.evaluators.features.extraction import evaluation_plan
from prelude.evaluators.features.pixels import open_pixels
from prelude.pretrain.config import EncoderConfig

SIDE = pictures.TILE + 2 * pictures.GAP


def vit(name="vit_tiny_patch16_224", **changes):
    torch.manual_seed(0)
    settings = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 0}
    model = timm.create_model(name, **settings | changes).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():  # or attention is all but even
        parameter.normal_() if name.endswith("bias_table") else parameter.mul_(3)
    return model


def opened(model, size=16):
    return OpenedEncoder(model, EncoderConfig(name="a", image_size=size), (0.5,) * 3, (0.2,) * 3, "vit", "weights")


def timms_own(model, pixels):
    """The weights that timm's unfused attention hands to its dropout."""
    model, seen = copy.deepcopy(model), []
    model.blocks[-1].attn.fused_attn = False
    model.blocks[-1].attn.attn_drop.register_forward_hook(lambda module, inputs, output: seen.append(output))
    model(pixels)
    return seen[0]


@pytest.fixture
def pixels():
    return torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


ATTENTION = {
    "plain": {},
    "norms and registers": {"qk_norm": True, "reg_tokens": 2},
    "rotary": {"name": "vit_small_patch16_dinov3", "num_heads": 2},
    "rotary, interleaved": {"name": "eva02_base_patch14_224", "num_heads": 2},
    "biases of pairs": {"name": "beit_base_patch16_224"},
}


@pytest.mark.parametrize("changes", ATTENTION.values(), ids=ATTENTION)
def test_attention_is_what_timm_computes_without_fusing(pixels, changes):
    model = vit(**changes)
    found = attention.attention(model, pixels)
    assert torch.allclose(found, timms_own(model, pixels), atol=1e-6)
    assert found.std() > 0.01


def test_a_map_is_what_the_class_token_pays_to_patches_or_what_patches_do_without_one(pixels):
    model = vit(reg_tokens=2)
    weights = timms_own(model, pixels)  # (B, heads, 1 + 2 + 16, 1 + 2 + 16)
    found = attention.maps(model, pixels)
    assert torch.allclose(found.values, weights[:, :, 0, 3:].mean(1).reshape(4, 4, 4), atol=1e-6)
    assert "class token" in found.what
    model = vit(class_token=False, global_pool="avg")
    found = attention.maps(model, pixels)
    assert torch.allclose(found.values, timms_own(model, pixels).mean((1, 2)).reshape(4, 4, 4), atol=1e-6)
    assert "patches pay" in found.what


def test_of_a_convnet_the_deepest_stage_with_enough_places_is_shown():
    torch.manual_seed(0)
    model = timm.create_model("resnet18", num_classes=0, channels=(8, 8, 8, 8), layers=(1, 1, 1, 1)).eval()
    found = attention.maps(model, torch.randn(2, 3, 64, 64))
    stages = model.forward_intermediates(torch.zeros(2, 3, 64, 64), intermediates_only=True)
    assert [stage.shape[-1] for stage in stages] == [32, 16, 8, 4, 2]
    assert found.values.shape == (2, 8, 8) and "stage 2 of 5" in found.what and bool((found.values >= 0).all())


def test_looking_leaves_the_model_as_it_was(pixels):
    model = vit()
    before, block = fingerprint(model), model.blocks[-1].attn
    fused = block.fused_attn
    attention.maps(model, pixels)
    assert fingerprint(model) == before and not model.training and block.fused_attn == fused
    assert not block._forward_pre_hooks and not any(p.requires_grad for p in model.parameters())
    with pytest.raises(RuntimeError):
        attention.maps(model, torch.zeros(1, 5, 16, 16))
    assert not block._forward_pre_hooks


def brute_force(train, queries, k):
    mean = train.double().mean(0)
    rows = []
    for query in queries.double() - mean:
        cosines = [float(query @ other / query.norm() / other.norm()) for other in train.double() - mean]
        rows.append(sorted(range(len(train)), key=lambda i: -cosines[i])[:k])
    return rows


def test_neighbours_are_those_of_a_loop():
    generator = torch.Generator().manual_seed(3)
    train, queries = torch.randn(60, 8, generator=generator) + 2, torch.randn(5, 8, generator=generator) + 2
    assert pictures.nearest(train, queries, 6).tolist() == brute_force(train, queries, 6)


def test_test_images_are_spread_over_classes_and_the_same_for_every_encoder():
    labels = torch.tensor([0] * 50 + [1] * 3 + [2] * 47)
    rows = pictures.spread_over_classes(labels, 6, seed=0)
    assert torch.bincount(labels[rows]).tolist() == [2, 2, 2] and len(set(rows.tolist())) == 6
    assert torch.equal(rows, pictures.spread_over_classes(labels, 6, seed=0))
    assert not torch.equal(rows, pictures.spread_over_classes(labels, 6, seed=1))
    assert len(pictures.spread_over_classes(torch.zeros(9, 4), 6, seed=0)) == 6


def test_findings_are_the_same_where_all_of_them_are():
    nan = torch.nan
    mine = torch.tensor([[[1, 0, nan], [1, 1, nan], [1, 0, 0]]])
    assert pictures.same_label(mine, torch.tensor([[[1, 0, nan]]])).tolist() == [[True, False, False]]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    for name, count in (("train", 40), ("test", 12)):
        write_shards(folder, name, count, image_size=16, samples_per_shard=30)
    return tuple(ShardIndex(f"{folder}/{name}-*.tar", "cls") for name in ("train", "test"))


def test_the_sheet_shows_each_query_beside_its_neighbours_framed_by_their_class(shards):
    encoder = opened(vit())
    train, test = (extract(encoder, index, batch_size=20)["mean"] for index in shards)
    near_sheet, looked_at, correspond = pictures_of(encoder, shards, train, test, seed=1)
    rows = pictures.spread_over_classes(test.labels, pictures.NUM_IMAGES, 1)
    near = brute_force(train.values, test.values[rows], pictures.NUM_NEIGHBOURS)
    images = read_samples(shards[0], evaluation_plan(encoder), train.sample_ids.tolist())  # (N, 3, 16, 16)
    page = np.asarray(Image.open(io.BytesIO(near_sheet.png)).convert("RGB")).astype(int)
    same = 0
    for r, (row, chosen) in enumerate(zip(rows.tolist(), near, strict=True)):
        for c, place in enumerate(chosen):
            left, top = (c + 1) * SIDE + 3 * pictures.GAP, r * SIDE + pictures.GAP
            alike = bool(train.labels[place] == test.labels[row])
            same += alike
            assert page[top + 40, left - 1].tolist() == list(pictures.SAME if alike else pictures.OTHER)
            assert page[top + 40, left - 4].tolist() == list(pictures.SAME if alike else drawing.PAPER)  # thickness
            middle = page[top + 3 : top + pictures.TILE : 6, left + 3 : left + pictures.TILE : 6]  # of enlarged pixels
            shown = images[place].permute(1, 2, 0).numpy()
            assert np.array_equal(middle[:12], shown[:12])
    assert f"({same} of {pictures.NUM_IMAGES * pictures.NUM_NEIGHBOURS})" in near_sheet.caption
    assert 0 < same < 36 and looked_at.title == "Where it looks"
    assert Image.open(io.BytesIO(looked_at.png)).size == (SIDE * 6, 2 * SIDE - pictures.GAP)
    assert correspond.title == "What it takes for alike" and "4 x 4 places" in correspond.caption
    assert Image.open(io.BytesIO(correspond.png)).size == (SIDE * 6, 3 * (pictures.TILE + pictures.GAP) + pictures.GAP)


def test_raw_pixels_have_neighbours_and_no_map(shards):
    encoder = open_pixels("pixels:16")
    train, test = (extract(encoder, index)["pixels"] for index in shards)
    assert [picture.title for picture in pictures_of(encoder, shards, train, test)] == ["Nearest neighbours"]


def test_a_picture_stays_small_even_of_noise():
    noise = torch.randint(0, 256, (660, 760, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    written = drawing.to_png(Image.fromarray(noise.numpy()))
    assert len(written) <= drawing.MAX_BYTES
    alone = drawing.to_png(Image.fromarray(noise.numpy()), drawing.FILE_BYTES)
    assert Image.open(io.BytesIO(alone)).size == (760, 660), "a file of its own need not fit a page"
