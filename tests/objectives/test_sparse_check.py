"""Which architectures are accepted for sparse encoding, and by what name the others are refused."""

import pytest
import timm
import torch
from torch import nn

from prelude.data.errors import UserError
from prelude.objectives.sparse_check import Stage, survey, total_stride

REFUSED = {
    "resnetblur18": r"layer maxpool\.1 \(BlurPool2d\): it calls pad",
    "tresnet_m": r"layer body\.s2d \(SpaceToDepth\): it calls view",
    "skresnet18": r"layer layer1\.0\.conv1 \(SelectiveKernel\): it calls stack",
    "gcresnet50t": r"layer stages\.0\.0\.attn \(GlobalContext\): it calls reshape",
    "edgenext_xx_small": r"layer stages\.1\.blocks\.1 \(SplitTransposeBlock\): it calls",
    "vit_tiny_patch16_224": r"layer patch_embed \(PatchEmbed\)",
}


def laid_out(name, **kwargs):
    with torch.device("meta"):
        return timm.create_model(name, num_classes=0, **kwargs)


@pytest.mark.parametrize("name", REFUSED)
def test_an_architecture_with_an_unknown_layer_is_refused_by_its_name(name):
    with pytest.raises(
        UserError, match=f"encoder.name={name} cannot be encoded sparsely because of its {REFUSED[name]}"
    ):
        survey(laid_out(name), name, (224, 224), (7, 7))


class Unseen(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class Encoder(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.stem, self.unseen = nn.Conv2d(3, 4, 2, 2), Unseen(function)

    def forward_intermediates(self, x, intermediates_only):
        return [self.unseen(self.stem(x))]


WRONG = {
    "a shift": lambda x: x.roll(1, -1),
    "every second position": lambda x: x[:, :, :, ::2],
    "a mean over columns alone": lambda x: x - x.mean(3, keepdim=True),
    "local pooling": lambda x: nn.functional.max_pool2d(x, 3, 1, 1),
    "a convolution without a layer": lambda x: nn.functional.conv2d(
        x, torch.empty(4, 4, 3, 3, device=x.device), padding=1
    ),
    "a sort": lambda x: x.sort(dim=3).values,
    "joining maps side by side": lambda x: torch.cat([x, x], dim=3),
    "attention": lambda x: x.transpose(1, 3) @ x.transpose(1, 3).mT,
    "pooling to four": lambda x: x * nn.functional.adaptive_avg_pool2d(x, 2).mean(),
    "interpolation": lambda x: nn.functional.interpolate(x, scale_factor=2, mode="bilinear"),
}
RIGHT = {
    "a gate": lambda x: x * torch.sigmoid(x.mean((2, 3), keepdim=True)),
    "a gate of channels": lambda x: x * x.mean(1, keepdim=True),
    "halves of the channels": lambda x: torch.cat(x.chunk(2, dim=1)[::-1], dim=1),
    "part of the channels": lambda x: x[:, :2],
    "a convolution of one position": lambda x: nn.functional.conv2d(x, torch.empty(4, 4, 1, 1, device=x.device)),
    "in place": lambda x: x.add_(1).mul_(2).relu_(),
    "channels last and back": lambda x: x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
    "pooling to one": lambda x: x + nn.functional.adaptive_avg_pool2d(x, 1),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_function_that_mixes_positions_is_refused_in_a_layer_never_seen_before(what):
    with pytest.raises(UserError, match=r"because of its layer unseen \(Unseen\)"):
        survey(Encoder(WRONG[what]), "mine", (16, 16), (4, 4))


@pytest.mark.parametrize("what", RIGHT)
def test_a_function_that_treats_positions_alike_is_accepted(what):
    (stage,) = survey(Encoder(RIGHT[what]), "mine", (16, 16), (4, 4)).stages
    assert stage.stride == 2


def test_a_convolution_that_reflects_its_input_is_refused():
    model = Encoder(lambda x: x)
    model.unseen = nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")
    with pytest.raises(UserError, match=r"layer unseen \(Conv2d\)"):
        survey(model, "mine", (16, 16), (4, 4))


def test_stages_are_counted_from_the_coarsest_and_what_none_of_them_reads_is_named():
    model = timm.create_model("convnext_atto", depths=[1, 1, 1, 1], dims=[8, 12, 16, 20], num_classes=0)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = survey(model, "convnext_atto", (64, 96), (2, 3))
    assert found.stages == (Stage(3, 20, 32), Stage(2, 16, 16), Stage(1, 12, 8), Stage(0, 8, 4))
    assert found.idle == ("head.norm.weight", "head.norm.bias")
    assert not found.uses_batch_norm
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(("kwargs", "stride"), [({}, 32), ({"output_stride": 8}, 8), ({"output_stride": 16}, 16)])
@pytest.mark.parametrize("pixels", [64, 100])
def test_the_total_stride_is_found_at_sizes_that_it_does_not_divide(kwargs, stride, pixels):
    assert total_stride(laid_out("resnet18", **kwargs), "resnet18", (pixels, pixels)) == stride


def test_the_last_stage_of_a_stride_is_taken():
    found = survey(laid_out("resnet18", output_stride=8), "resnet18", (64, 64), (4, 4))
    assert found.stages[0] == Stage(4, 512, 8) and [stage.stride for stage in found.stages] == [8, 4, 2]
    assert found.uses_batch_norm
