"""I-JEPA against numbers of the official code (github.com/facebookresearch/ijepa) in double precision.

Weights and images are closed forms, so no random generator has to agree: the trainable tensors of encoder and
predictor, each sorted by its official name, number i filled with 0.05 sin(0.37 j + 0.11 i), norm weights one more.
"""

import pytest
import torch
from jepa_models import NO_CLASS_TOKEN, predictions_of

from prelude.objectives.blocks import BlockMasks
from prelude.objectives.dseqjepa import DSeqJEPA, DSeqJEPAOptions
from prelude.objectives.ijepa import IJEPA, IJEPAOptions, gather
from prelude.pretrain.config import EncoderConfig
from prelude.pretrain.encoders import build_encoder, forward_tokens

ENCODER = EncoderConfig(
    name="vit_base_patch16_224",
    image_size=32,
    patch_size=8,
    kwargs={"embed_dim": 32, "depth": 2, "num_heads": 4} | NO_CLASS_TOKEN,
)
OFFICIAL = {
    "embed.": "predictor_embed.",
    "norm.": "predictor_norm.",
    "proj.": "predictor_proj.",
    "blocks.": "predictor_blocks.",
}
MASKS = BlockMasks(
    context=torch.tensor([[0, 1, 4, 5, 8], [3, 7, 11, 12, 15]]),
    targets=torch.tensor([[[10, 11, 14, 15], [2, 3, 6, 7]], [[0, 1, 4, 5], [8, 9, 12, 13]]]),
)


def count(size):
    return torch.arange(size, dtype=torch.float64)


def official_name(name):
    for ours, theirs in OFFICIAL.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name


def fill(named_parameters):
    for i, (name, parameter) in enumerate(sorted(named_parameters)):
        values = 0.05 * torch.sin(0.37 * count(parameter.numel()) + 0.11 * i)
        if "norm" in name and name.endswith("weight"):
            values += 1
        parameter.data.copy_(values.view_as(parameter))


@pytest.fixture
def ijepa():
    options = IJEPAOptions(predictor_dim=16, predictor_depth=2)
    model = IJEPA(build_encoder(ENCODER, seed=0), options, image_size=(32, 32), mean=(0.0,) * 3, std=(1.0,) * 3)
    model.double()
    fill(model.encoder.named_parameters())
    fill((official_name(name), parameter) for name, parameter in model.predictor.named_parameters())
    model.teacher.load_state_dict(model.encoder.state_dict())
    return model


@pytest.fixture
def images():
    b, c, r, s = torch.meshgrid(count(2), count(3), count(32), count(32), indexing="ij")
    return torch.sin(0.05 * (32 * r + s) + c + 0.7 * b)


def near(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_the_trainable_tensors_are_the_official_ones(ijepa):
    names = {official_name(name) for name, _ in ijepa.predictor.named_parameters()}
    assert {"mask_token", "predictor_embed.bias", "predictor_blocks.1.mlp.fc2.weight", "predictor_proj.weight"} < names
    assert len(list(ijepa.encoder.parameters())) == 2 + 2 * 12 + 2
    assert len(names) == 1 + 2 + 2 * 12 + 2 + 2


def test_both_passes_of_the_encoder_are_the_official_ones(ijepa, images):
    full = ijepa.teach(images)[0, 0, :3]
    torch.testing.assert_close(full, near(0.1184598, -1.43473128, -0.72116223), rtol=0, atol=6e-9)
    context = forward_tokens(ijepa.encoder, images, MASKS.context)[0, 0, :3]
    torch.testing.assert_close(context, near(0.13849922, -1.41055529, -0.70926159), rtol=0, atol=6e-9)


def test_the_prediction_is_the_official_one(ijepa, images):
    predicted = predictions_of(ijepa, images, MASKS)[1, 1, 1, :3]  # sample 1, block B, its second patch
    torch.testing.assert_close(predicted, near(-0.18257795, -0.14857109, -0.0950824), rtol=0, atol=6e-9)


def test_the_loss_and_its_gradients_are_the_official_ones(ijepa, images):
    target = gather(ijepa.normalised(ijepa.teach(images)), MASKS.targets)
    error = ijepa.error(predictions_of(ijepa, images, MASKS), target)  # (B, M, T)
    assert error.mean().item() == pytest.approx(0.4764950520212388, abs=1e-14)
    assert error.mean((0, 2)).tolist() == pytest.approx([0.4784462841, 0.4745438199], abs=6e-11)
    error.mean().backward()
    norms = {f"encoder.{n}": p.grad.norm().item() for n, p in ijepa.encoder.named_parameters()}
    norms |= {official_name(n): p.grad.norm().item() for n, p in ijepa.predictor.named_parameters()}
    assert norms["encoder.patch_embed.proj.weight"] == pytest.approx(0.0047278253, abs=6e-11)
    assert norms["encoder.blocks.0.attn.qkv.weight"] == pytest.approx(1.684466e-4, abs=6e-11)
    assert norms["encoder.norm.weight"] == pytest.approx(1.951494e-4, abs=6e-11)
    assert norms["mask_token"] == pytest.approx(0.1130866784, abs=6e-11)
    assert norms["predictor_embed.weight"] == pytest.approx(0.0380713852, abs=6e-11)
    assert norms["predictor_proj.bias"] == pytest.approx(0.1266750501, abs=6e-11)


def test_the_random_branch_of_dseqjepa_has_the_same_loss(ijepa, images):
    """The class token aside: with an encoder that has none, the branch is I-JEPA to the last digit."""
    options = DSeqJEPAOptions(predictor_dim=16, predictor_depth=2)
    encoder = build_encoder(ENCODER, seed=0)
    model = DSeqJEPA(encoder, options, image_size=(32, 32), mean=(0.0,) * 3, std=(1.0,) * 3).double()
    model.load_state_dict(ijepa.state_dict())
    model.blocks = FixedMasks()
    target = model.normalised(model.teach(images))
    branch = model._in_blocks(images, target, torch.arange(2), FixedMasks)
    loss = (model.error(branch.predicted, branch.target) * branch.weight).sum() / 2
    assert loss.item() == pytest.approx(0.4764950520212388, abs=1e-14)


class FixedMasks:
    step = 0

    def draw(self, seeds, step):
        return MASKS
