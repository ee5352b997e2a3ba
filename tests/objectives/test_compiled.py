"""Under torch.compile, by the compiler that a run uses."""

import copy
import shutil
from pathlib import Path

import pytest
import torch
import waiting_cases
from torch import nn

from prelude.launch.made_up_data import made_up_batch
from prelude.objectives.building import build_objective
from prelude.objectives.sparse_encoder import SparseEncoder
from prelude.pretrain.compiling import compile_objective
from prelude.pretrain.config import EncoderConfig
from prelude.pretrain.draws import random_bits
from prelude.pretrain.encoders import build_encoder, forward_tokens
from prelude.pretrain.schedules import Progress

pytestmark = pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="needs a C++ compiler")


class Pooled(nn.Module):
    """As a ResNet's stem: windows of the pooling reach over hidden positions, and over the border of the image."""

    def __init__(self):
        super().__init__()
        self.conv, self.pool = nn.Conv2d(3, 4, 3, padding=1), nn.MaxPool2d(3, stride=2, padding=1)

    def forward_intermediates(self, images, intermediates_only):
        return [self.pool(self.conv(images))]


def test_compiled_pooling_of_active_positions_has_the_same_gradients():
    torch.manual_seed(0)
    model, images = Pooled(), torch.randn(2, 3, 16, 16)
    encoder, visible = SparseEncoder(model), torch.tensor([[1, 2], [0, 3]])

    def gradients(encode):
        model.zero_grad()
        encode(images).square().sum().backward()
        return [parameter.grad for parameter in model.parameters()]

    def encode(images):
        return encoder(images, visible, (2, 2)).maps[0]

    for plain, compiled in zip(gradients(encode), gradients(torch.compile(encode, fullgraph=True)), strict=True):
        torch.testing.assert_close(compiled, plain)


def test_compiled_draws_are_the_same_bits():
    def draw(seeds):
        return random_bits(seeds, 8, 3).view(-1, 4, 2)[..., 1] % 5  # every second: as the columns of blocks are drawn

    for seeds in (torch.arange(4), torch.arange(7) * 10**17):
        assert torch.equal(torch.compile(draw, fullgraph=True)(seeds), draw(seeds))


@pytest.mark.parametrize(
    ("name", "kwargs"), [("vit_small_patch16_dinov3", {}), ("beit_base_patch16_224", {"global_pool": "token"})]
)
def test_compiled_kept_patches_have_the_same_features(name, kwargs):
    small = {"embed_dim": 16, "depth": 1, "num_heads": 2}
    encoder = build_encoder(EncoderConfig(name=name, image_size=16, patch_size=4, kwargs=small | kwargs), seed=0)
    images, keep = torch.randn(2, 3, 16, 16), torch.tensor([[3, 1, 7], [0, 15, 2]])
    compiled = torch.compile(forward_tokens, fullgraph=True)
    torch.testing.assert_close(compiled(encoder, images, keep), forward_tokens(encoder, images, keep))


@pytest.mark.parametrize(
    ("case", "graphs"),
    [
        # The blocks of the context's encoder, of the teacher, and of the predictor, whatever lengths a step has drawn
        ("ijepa zero0", 3),
        ("dseqjepa zero0", 3),
        ("mae zero0", 1),
        ("mae gradient", 1),
        ("rotation sgd", 1),
        ("barlow zero0", 2),
        ("lejepa", 3),  # views of two sizes
        ("msbreg", 5),  # encoder, projector and predictor, and the teacher's two
        ("simmim", 1),
        ("fcmae", 1),
    ],
)
def test_what_a_run_compiles_is_compiled_once_and_is_the_same(case, graphs):
    torch._dynamo.reset()
    torch.manual_seed(0)
    plain = build_objective(waiting_cases.config_of(case, Path("x")))
    compiled, seen = copy.deepcopy(plain), []

    def backend(graph, inputs):
        seen.append(graph)
        return graph.forward

    compile_objective(compiled, backend)
    assert list(compiled.state_dict()) == list(plain.state_dict())
    for step in range(3):
        batch = made_up_batch(torch.arange(8) + 8 * step, plain.views, 64)
        losses = [objective(batch, Progress(step, 40, 8.0)).total for objective in (plain, compiled)]
        torch.testing.assert_close(*losses)
        assert len(seen) == graphs
