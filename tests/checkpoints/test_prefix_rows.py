"""Tables of positions with and without rows for the class token and registers, as timm's ViTs may have them."""

import itertools

import pytest
import timm
import torch

from prelude.checkpoints.sources import open_encoder
from prelude.data.errors import UserError


def vit(**kwargs):
    small = {"patch_size": 8, "depth": 1, "num_classes": 0, "global_pool": "token" if kwargs["class_token"] else "avg"}
    return timm.create_model("vit_tiny_patch16_224", **small, **kwargs).eval()


@pytest.mark.parametrize("size, words", [((32, 32), ""), ((32, 64), ",grid=4x8")])
def test_rows_of_prefix_tokens_are_told_from_the_table(size, words, tmp_path):
    for no_rows, class_token, registers in itertools.product((True, False), (True, False), (0, 2, 4)):
        if not class_token and not registers and no_rows:
            continue  # the same as with rows
        if class_token and not registers and no_rows:
            words = words or ",grid=4x4"  # 16 rows could be a class token's and 3 x 5 patches'
        model = vit(img_size=size, class_token=class_token, reg_tokens=registers, no_embed_class=no_rows)
        torch.save(model.state_dict(), tmp_path / "weights.pth")
        opened = open_encoder(f"{tmp_path / 'weights.pth'}#pixels=half{words}").model
        images = torch.randn(2, 3, *size)
        with torch.no_grad():
            assert torch.equal(opened.forward_features(images), model.forward_features(images))
            assert torch.equal(opened(images), model(images))  # pooled alike


def test_a_class_token_that_is_lost_is_named(tmp_path):
    state = vit(img_size=32, class_token=True).state_dict()
    del state["cls_token"]
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(UserError, match="lacks cls_token, for which its table of positions has a row"):
        open_encoder(f"{tmp_path / 'weights.pth'}#pixels=half")


def test_a_file_of_zeros_is_refused(tmp_path):
    state = {name: torch.zeros_like(tensor) for name, tensor in vit(img_size=32, class_token=True).state_dict().items()}
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(UserError, match="holds zeros where weights should be"):
        open_encoder(f"{tmp_path / 'weights.pth'}#pixels=half")


def test_what_is_wrong_with_many_tensors_is_said_in_one_line(tmp_path):
    blocks = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=4, num_classes=0).state_dict()
    del blocks["blocks.0.norm1.weight"]
    lost = {name: tensor for name, tensor in blocks.items() if not name.startswith(("blocks.1.", "blocks.2."))}
    torch.save(lost, tmp_path / "weights.pth")
    with pytest.raises(UserError, match=": 25 tensors of blocks.0 to blocks.2 are missing; write"):
        open_encoder(f"{tmp_path / 'weights.pth'}#pixels=half")
