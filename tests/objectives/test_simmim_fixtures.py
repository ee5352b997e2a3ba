"""SimMIM against numbers of the official code (microsoft/SimMIM, microsoft/Swin-Transformer) in double precision."""

import pytest
import torch
from simmim_models import SWIN, VIT, closed_form, outcome, swin_names, vit_names

from prelude.pretrain.config import EncoderConfig
from prelude.pretrain.encoders import lay_out_encoder


def norms(objective) -> dict[str, float]:
    found = {name: p.grad.norm().item() for name, p in objective.named_parameters()}
    return found | {"all": torch.tensor(list(found.values()), dtype=torch.float64).norm().item()}


def test_the_swin_s_map_and_prediction_are_the_official_ones():
    objective = closed_form(SWIN, swin_names())
    assert len(swin_names()) == 64 and sum(p.numel() for p in objective.parameters()) == 13_180
    features, predicted, _ = outcome(objective)
    assert features[0, :4, 0, 0].tolist() == pytest.approx(
        [-1.150023235, -0.650401031, 1.496894962, 1.474773257], abs=6e-10
    )
    assert features[1, :2, 3, 3].tolist() == pytest.approx([-1.116366417, -0.593165685], abs=6e-10)
    assert predicted[0, 0, 0, :4].tolist() == pytest.approx(
        [0.493889060, 0.601438210, 0.629692782, 0.574837040], abs=6e-10
    )
    assert predicted[1, 2, 31, 29:].tolist() == pytest.approx([0.416305916, 0.534708732, 0.582409453], abs=6e-10)
    assert predicted[1, 1, 13, 5].item() == pytest.approx(0.074540699, abs=6e-10)


@pytest.mark.parametrize(
    ("window", "loss", "patch", "every"),
    [
        (None, 0.694179805402995, 3.340113686e-3, 1.2663016997),
        (47, 0.938274186873572, 2.312162563e-3, 0.9421445818),
        (7, 1.062679484713744, 2.196591627e-3, 0.9181099801),
    ],
)
def test_the_swin_s_loss_and_gradient_are_the_official_ones(window, loss, patch, every):
    objective = closed_form(SWIN, swin_names(), target_window=window)
    total = outcome(objective)[2]
    assert total.item() == pytest.approx(loss, abs=1e-14)
    total.backward()
    found = norms(objective)
    assert found["encoder.patch_embed.proj.weight"] == pytest.approx(patch, abs=6e-13)
    assert found["all"] == pytest.approx(every, abs=6e-11)
    if window is None:
        table = "encoder.layers.0.blocks.1.attn.relative_position_bias_table"
        assert found["mask_token"] == pytest.approx(2.585613085e-3, abs=6e-13)
        assert found[table] == pytest.approx(1.023627024e-5, abs=6e-15)
        assert found["encoder.layers.1.downsample.reduction.weight"] == pytest.approx(1.195811236, abs=6e-10)
        assert found["head.weight"] == pytest.approx(0.2272677124, abs=6e-11)
        assert found["head.bias"] == pytest.approx(0.05538493766, abs=6e-12)


@pytest.mark.parametrize(("only", "loss"), [(0, 0.696327123), (1, 0.692032488)])
def test_an_image_alone_has_the_official_loss(only, loss):
    assert outcome(closed_form(SWIN, swin_names()), only)[2].item() == pytest.approx(loss, abs=6e-10)


def test_a_plain_transformer_s_numbers_are_the_official_ones():
    objective = closed_form(VIT, vit_names())
    features, predicted, total = outcome(objective)
    assert features[0, :4, 0, 0].tolist() == pytest.approx(
        [0.807571311, 1.421957397, 0.323140383, -0.403941519], abs=6e-10
    )
    assert predicted[0, 0, 0, :4].tolist() == pytest.approx(
        [-1.220724731, -0.991450698, -0.632167101, -0.189532188], abs=6e-10
    )
    assert predicted[1, 1, 13, 5].item() == pytest.approx(0.641319199, abs=6e-10)
    assert total.item() == pytest.approx(1.020495782628762, abs=1e-14)
    total.backward()
    for layer in (0, 1):
        objective.encoder.blocks[layer].attn.qkv.bias.grad[16:32] = 0  # no parameter there
    found = norms(objective)
    expected = {
        "encoder.patch_embed.proj.weight": 0.04115671471,
        "mask_token": 0.7417850548,
        "encoder.cls_token": 1.521423472e-3,
        "encoder.pos_embed": 0.2780292991,
        "encoder.blocks.0.attn.qkv.weight": 0.2237324665,
        "head.weight": 0.4396043804,
        "head.bias": 0.1219917977,
        "all": 1.3121870118,
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("name", "size", "parameters", "kwargs"),
    [
        ("swin_base_patch4_window7_224", 192, 86_725_304, {"window_size": 6}),
        ("swinv2_base_window12_192", 192, 86_893_944, {}),
        (
            "beit_base_patch16_224",
            224,
            85_666_128,
            {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": True, "init_values": 0.1, "use_fc_norm": False},
        ),
    ],
)
def test_the_encoders_of_the_paper_have_their_published_size(name, size, parameters, kwargs):
    model = lay_out_encoder(EncoderConfig(name=name, image_size=size, kwargs=kwargs))
    mask_token = model.patch_embed.proj.out_channels  # which the official code counts to the encoder
    assert sum(p.numel() for p in model.parameters()) + mask_token == parameters
