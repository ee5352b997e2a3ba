"""Weights for other images: each method's own way with its table of positions, patches and channels of other sizes."""

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from published import GRID, HEADS, METHODS, WIDTH, Published, dinov2, drawn, fair_shapes, fair_tokens, fixed_table, mae

from prelude.checkpoints.convert.fit import fit
from prelude.checkpoints.convert.resample import adapt_channels, resample_patches, resample_table
from prelude.checkpoints.sources import open_encoder, open_weights
from prelude.data.errors import UserError
from prelude.pretrain.config import EncoderConfig
from prelude.pretrain.encoders import build_encoder
from prelude.pretrain.position import sincos_table

TABLE = torch.randn(1, 1 + GRID * GRID, WIDTH, generator=torch.Generator().manual_seed(0)) * 0.2


def architecture(published: Published, tmp_path, size, **changes) -> tuple[torch.nn.Module, object]:
    """The published encoder, built for another image."""
    torch.save(published.tree, tmp_path / "weights.pth")
    source = f"{tmp_path}/weights.pth{published.words}"
    config = open_encoder(source).config.model_copy(update={"image_size": size, "pos_embed": "learned", **changes})
    return build_encoder(config, seed=0), open_weights(source)


def grown(rows, size, **how):
    """(N, D) rows of a square grid to `size`, by torch alone."""
    maps = rows.T.reshape(1, WIDTH, GRID, GRID)
    return F.interpolate(maps, mode="bicubic", **({"size": size} | how)).flatten(2)[0].T


@pytest.mark.parametrize("sides", [(2, 3), (7, 4), (6, 6)])
def test_each_rule_is_that_of_its_methods_code(sides):
    rows, prefix = TABLE[0, 1:], TABLE[0, :1]
    scale = tuple((side + 0.1) / GRID for side in sides)
    expected = {
        "plain": grown(rows, sides),  # mae: util/pos_embed.py
        "offset": grown(rows, None, scale_factor=scale),  # dino: interpolate_pos_encoding
        "corners": grown(rows, sides, align_corners=True),  # torchvision: interpolate_embeddings
        "timm": timm.layers.resample_abs_pos_embed(TABLE, list(sides), [GRID, GRID])[0, 1:],
        "sincos": sincos_table(WIDTH, sides),
    }
    found = {rule: resample_table(TABLE, (GRID, GRID), sides, rule, 1)[0] for rule in expected}
    for rule, table in expected.items():
        assert torch.equal(found[rule][:1], prefix)
        torch.testing.assert_close(found[rule][1:], table, rtol=0, atol=1e-6, msg=rule)
    for rule in ("plain", "offset", "corners"):
        assert (found[rule] - found["timm"]).abs().max() > 1e-3 or sides == (6, 6) and rule != "corners"


def test_the_rule_of_torchvision_is_torchvisions():
    interpolate = torchvision.models.vision_transformer.interpolate_embeddings
    expected = interpolate(24, 4, {"encoder.pos_embedding": TABLE})["encoder.pos_embedding"]
    assert (resample_table(TABLE, (GRID, GRID), (6, 6), "corners", 1) - expected).abs().max() <= 1e-6


def test_equal_counts_are_not_equal_grids(tmp_path):
    encoder, weights = architecture(METHODS["DINO"](), tmp_path, (8, 32))
    changes = fit(encoder, weights, "it").changes
    assert changes == ("position table resampled from 4 x 4 to 2 x 8 (bicubic, by the scale (target + 0.1) / grid)",)
    assert not torch.equal(encoder.pos_embed, weights.tensors["pos_embed"])


RULES = {
    "DINO": ("offset", True),
    "DINOv2": ("offset", True),
    "DINOv2 with registers": ("timm", False),
    "MAE, fine-tuned": ("plain", True),
    "MAE": ("plain", True),
    "torchvision ViT": ("corners", True),
    "I-JEPA": ("sincos", False),
    "DSeq-JEPA": ("sincos", False),
}


@pytest.mark.parametrize("method", RULES)
def test_every_format_is_resampled_by_its_own_rule(method, tmp_path):
    rule, has_class_row = RULES[method]
    encoder, weights = architecture(METHODS[method](), tmp_path, 24)
    fitted = fit(encoder, weights, "it")
    table = weights.tensors["pos_embed"]
    assert torch.equal(encoder.pos_embed, resample_table(table, (4, 4), (6, 6), rule, int(has_class_row)))
    assert fitted.loaded == fitted.total and "resampled from 4 x 4 to 6 x 6" in fitted.changes[0]


def test_features_at_another_size_are_those_of_the_methods_code(tmp_path):
    """DINO's own way, written out: a forward at 24 pixels over the resampled table."""
    published = METHODS["DINO"]()
    encoder, weights = architecture(published, tmp_path, 24)
    fit(encoder, weights, "it")
    teacher = {name.removeprefix("backbone."): t for name, t in published.tree["teacher"].items()}
    table = teacher["pos_embed"][0]
    rows = grown(table[1:], None, scale_factor=(6.1 / 4, 6.1 / 4))
    images = torch.randn(2, 3, 24, 24, dtype=torch.float64)
    expected = fair_tokens(teacher | {"pos_embed": torch.cat([table[:1], rows])[None]}, images)[:, 0]
    with torch.no_grad():
        assert (encoder.eval().double()(images) - expected).abs().max() <= 1e-6


def test_an_unknown_rule_is_asked_for_only_where_it_matters(tmp_path):
    encoder, weights = architecture(METHODS["timm ViT"](), tmp_path, 16)
    fit(encoder, weights, "it")
    encoder, weights = architecture(METHODS["timm ViT"](), tmp_path, 24)
    with pytest.raises(UserError, match="does not tell by which method .*half,resampling=offset for DINO"):
        fit(encoder, weights, "it")
    told = open_weights(f"{tmp_path}/weights.pth#num_heads={HEADS},resampling=offset")
    fit(encoder, told, "it")
    assert torch.equal(encoder.pos_embed, resample_table(told.tensors["pos_embed"], (4, 4), (6, 6), "offset", 1))


def test_a_grid_that_is_no_square_is_asked_for(tmp_path):
    model = drawn(fair_shapes(1 + 8))
    torch.save(model, tmp_path / "weights.pth")
    words = f"#num_heads={HEADS},pixels=half"
    with pytest.raises(UserError, match="fits no square of patches; write .*half,grid=ROWSxCOLUMNS"):
        open_encoder(f"{tmp_path}/weights.pth{words}")
    opened = open_encoder(f"{tmp_path}/weights.pth{words},grid=2x4")
    assert opened.config.size == (8, 16)
    images = torch.randn(2, 3, 8, 16, dtype=torch.float64)
    with torch.no_grad():
        assert (opened.model.double()(images) - fair_tokens(model, images)[:, 0]).abs().max() <= 1e-6
    with pytest.raises(UserError, match="table of 8 positions, whose grid it does not tell"):
        open_encoder(f"{tmp_path}/weights.pth{words},grid=3x4")


@pytest.mark.parametrize("method", ["MAE", "torchvision ViT", "DINOv2", "I-JEPA"])
def test_patches_of_another_size_answer_to_resized_patches_as_before(method, tmp_path):
    published = METHODS[method]()
    encoder, weights = architecture(published, tmp_path, 32, patch_size=8)
    assert "patch projection resampled from 4 x 4 to 8 x 8 pixels" in fit(encoder, weights, "it").changes[0]
    old = weights.tensors["patch_embed.proj.weight"].double()
    new = encoder.patch_embed.proj.weight.detach().double()
    patches = torch.randn(5, 3, 4, 4, dtype=torch.float64)
    larger = F.interpolate(patches, size=(8, 8), mode="bicubic", antialias=True)
    before, after = (torch.einsum("nchw,dchw->nd", *pair) for pair in ((patches, old), (larger, new)))
    assert (before - after).abs().max() <= 1e-5


def test_patches_agree_with_timms_at_any_size():
    weight = torch.randn(5, 3, 4, 4)
    for size in ([8, 8], [3, 3], [6, 2]):
        expected = timm.layers.resample_patch_embed(weight, size)
        assert (resample_patches(weight, tuple(size)) - expected).abs().max() <= 2e-5


def test_channels_are_summed_repeated_or_cut_off():
    weight = torch.randn(5, 3, 2, 2)
    assert torch.equal(adapt_channels(weight, 1), weight.sum(1, keepdim=True))
    two, four, six = (adapt_channels(weight, channels) for channels in (2, 4, 6))
    assert torch.equal(two, weight[:, :2] * 1.5)
    assert torch.equal(four, torch.cat([weight, weight[:, :1]], 1) * 0.75)
    torch.testing.assert_close(six.sum(1), weight.sum(1))
    for channels in (1, 2, 4, 6):
        expected = timm.models.adapt_input_conv(channels, weight)
        torch.testing.assert_close(adapt_channels(weight, channels), expected)


@pytest.mark.parametrize("channels", [1, 4])
def test_files_of_other_channels_open_with_as_many_where_their_pixels_are_said(channels, tmp_path):
    model = drawn(fair_shapes(channels=channels))
    torch.save(model, tmp_path / "weights.pth")
    with pytest.raises(UserError, match=f"reads {channels} channels?; write .*pixels=M/.../S/..."):
        open_encoder(f"{tmp_path}/weights.pth#num_heads={HEADS},pixels=half")
    pixels = "/".join(["0.5"] * 2 * channels)
    opened = open_encoder(f"{tmp_path}/weights.pth#num_heads={HEADS},pixels={pixels}")
    images = torch.randn(2, channels, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        expected = fair_tokens(model, images)[:, 0]
        assert (opened.model.double()(images) - expected).abs().max() <= 1e-6


def test_a_convnet_of_one_channel_opens_too(tmp_path):
    state = dict(METHODS["torchvision ResNet"]().tree)
    state["conv1.weight"] = state["conv1.weight"][:, :1].clone()
    torch.save(state, tmp_path / "weights.pth")
    opened = open_encoder(f"{tmp_path}/weights.pth#pixels=0.5/0.5")
    assert opened.config.in_chans == 1
    torch.testing.assert_close(opened.model.conv1.weight, state["conv1.weight"])


def test_a_table_that_is_a_formulas_is_known_by_its_values(tmp_path):
    torch.save(mae(full=False).tree["model"], tmp_path / "flat.pth")
    flat = open_weights(f"{tmp_path}/flat.pth")
    assert flat.format == "MAE (encoder)" and flat.has_sincos_table
    torch.save(mae().network | {"pos_embed": fixed_table(True) + 1e-3}, tmp_path / "moved.pth")
    assert not open_weights(f"{tmp_path}/moved.pth").has_sincos_table


def test_dinov2_at_its_published_grid_shrinks_to_an_images(tmp_path):
    """518 pixels in 37 x 37 patches of 14, as released, at another grid: 1370 rows into 257."""
    published = dinov2()
    published.tree["pos_embed"] = torch.randn(1, 1370, WIDTH, generator=torch.Generator().manual_seed(3))
    torch.save(published.tree, tmp_path / "weights.pth")
    kwargs = {"embed_dim": WIDTH, "depth": 2, "num_heads": HEADS, "init_values": 1e-5}
    config = EncoderConfig(name="vit_base_patch16_224", image_size=64, patch_size=4, pos_embed="learned", kwargs=kwargs)
    encoder = build_encoder(config, seed=0)
    fitted = fit(encoder, open_weights(f"{tmp_path}/weights.pth"), "it")
    assert encoder.pos_embed.shape == (1, 257, WIDTH)
    assert fitted.changes[0].startswith("position table resampled from 37 x 37 to 16 x 16")
