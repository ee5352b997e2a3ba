"""MAE against numbers of the official code (github.com/facebookresearch/mae) in double precision.

Weights, image and noise are closed forms, so no random generator has to agree: trainable tensors sorted by
their official name, number i filled with 0.05 sin(0.37 j + 0.11 i), norm weights one more.
"""

import pytest
import torch

from prelude.objectives.mae import MAE, MAEOptions
from prelude.pretrain.config import EncoderConfig
from prelude.pretrain.encoders import build_encoder, forward_tokens

ENCODER = EncoderConfig(
    name="vit_base_patch16_224",
    image_size=32,
    patch_size=8,
    kwargs={"embed_dim": 32, "depth": 2, "num_heads": 4},
)


def count(size):
    return torch.arange(size, dtype=torch.float64)


def official_names(mae):
    return sorted((name.removeprefix("encoder."), parameter) for name, parameter in mae.named_parameters())


def closed_form_mae(norm_pix_loss):
    options = MAEOptions(norm_pix_loss=norm_pix_loss, decoder_dim=16, decoder_depth=1, decoder_num_heads=2)
    encoder = build_encoder(ENCODER, seed=0)
    mae = MAE(encoder, options, image_size=(32, 32), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)).double()
    for i, (name, parameter) in enumerate(official_names(mae)):
        values = 0.05 * torch.sin(0.37 * count(parameter.numel()) + 0.11 * i)
        if "norm" in name and name.endswith("weight"):
            values += 1
        parameter.data.copy_(values.view_as(parameter))
    return mae


def closed_form_images():
    b, c, r, s = torch.meshgrid(count(2), count(3), count(32), count(32), indexing="ij")
    return torch.sin(0.05 * (32 * r + s) + c + 0.7 * b)


def closed_form_noise():
    b, patch = torch.meshgrid(count(2), count(16), indexing="ij")
    values = 43758.5453 * torch.sin(12.9898 * (patch + 1) + 78.233 * (b + 1))
    return values - values.floor()


def test_the_trainable_tensors_are_the_official_ones():
    names = [name for name, _ in official_names(closed_form_mae(False))]
    assert len(names) == 48
    for name in ("cls_token", "mask_token", "decoder_embed.weight", "decoder_blocks.0.attn.qkv.weight", "norm.bias"):
        assert name in names


def test_the_mask_is_the_official_one():
    mask = closed_form_mae(False).reconstruct(closed_form_images(), closed_form_noise()).mask
    assert mask.hidden.int().tolist() == [
        [1, 1, 1, 0, 1, 1, 1, 1, 1, 0, 1, 1, 0, 1, 0, 1],
        [0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 1, 1, 1],
    ]
    assert mask.restore.tolist() == [
        [12, 9, 5, 1, 14, 13, 6, 8, 7, 0, 10, 11, 3, 15, 2, 4],
        [0, 3, 2, 14, 5, 8, 6, 9, 7, 4, 13, 12, 1, 11, 10, 15],
    ]


def test_the_encoder_and_the_prediction_are_the_official_ones():
    mae, images = closed_form_mae(False), closed_form_images()
    result = mae.reconstruct(images, closed_form_noise())
    encoded = forward_tokens(mae.encoder, images, result.mask.keep)[0, 0, :4]
    expected = torch.tensor([1.91280435, 0.22224003, 1.24181976, 0.05711828], dtype=torch.float64)
    torch.testing.assert_close(encoded, expected, rtol=0, atol=6e-9)
    place = result.mask.restore[1, 5] - mae.num_keep  # of patch 5 among the hidden ones
    expected = torch.tensor([-0.00405278, 0.02156422, 0.04460879, 0.0620435], dtype=torch.float64)
    torch.testing.assert_close(result.predicted[1, place, :4], expected, rtol=0, atol=6e-9)


@pytest.mark.parametrize(
    ("norm_pix_loss", "loss", "gradient_norm"),
    [(False, 0.5106453402838204, 0.3003129652), (True, 1.005676647145952, 0.4187424684)],
)
def test_the_loss_and_its_whole_gradient_are_the_official_ones(norm_pix_loss, loss, gradient_norm):
    mae = closed_form_mae(norm_pix_loss)
    total = mae.loss(mae.reconstruct(closed_form_images(), closed_form_noise())).total
    assert total.item() == pytest.approx(loss, abs=1e-14)
    total.backward()
    norms = torch.stack([parameter.grad.norm() for parameter in mae.parameters()])
    assert norms.norm().item() == pytest.approx(gradient_norm, abs=6e-11)


def test_gradients_of_single_tensors_are_the_official_ones():
    mae = closed_form_mae(False)
    mae.loss(mae.reconstruct(closed_form_images(), closed_form_noise())).total.backward()
    norms = {name: parameter.grad.norm().item() for name, parameter in official_names(mae)}
    assert norms["patch_embed.proj.weight"] == pytest.approx(0.00070332, abs=6e-9)
    assert norms["blocks.0.attn.qkv.weight"] == pytest.approx(3.681e-05, abs=6e-9)
    assert norms["mask_token"] == pytest.approx(0.01926587, abs=6e-9)
    assert norms["cls_token"] == pytest.approx(6.671e-05, abs=6e-9)
    assert norms["decoder_pred.bias"] == pytest.approx(0.08062706, abs=6e-9)
