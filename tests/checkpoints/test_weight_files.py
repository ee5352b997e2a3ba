"""Files of weights as people have them: of other kinds of numbers, damaged, misnamed, with more in them."""

import pytest
import torch
from published import METHODS
from safetensors.torch import save_file

from prelude.checkpoints.convert.files import read_file
from prelude.checkpoints.sources import open_encoder
from prelude.data.errors import UserError

NAME = "blocks.1.mlp.fc1.weight"


def state() -> dict[str, torch.Tensor]:
    return {name: tensor.float().contiguous() for name, tensor in METHODS["timm ViT"]().tree.items()}


def opened(content, path):
    torch.save(content, path)
    return open_encoder(f"{path}{METHODS['timm ViT']().words}")


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.bool, torch.complex64])
def test_codes_are_no_weights(dtype, tmp_path):
    tensors = state()
    tensors[NAME] = (100 * tensors[NAME]).abs().to(dtype)
    with pytest.raises(UserError, match=f"another kind than .*{NAME} is {str(dtype).removeprefix('torch.')}"):
        opened(tensors, tmp_path / "weights.pth")


def test_a_sparse_tensor_is_refused_by_name(tmp_path):
    tensors = state()
    tensors[NAME] = tensors[NAME].to_sparse()
    with pytest.raises(UserError, match=f"{NAME} in a sparse or quantised form"):
        opened(tensors, tmp_path / "weights.pth")


def test_one_bit_that_has_changed_is_found(tmp_path):
    path, tensors = tmp_path / "weights.pth", state()
    opened(tensors, path)
    content = bytearray(path.read_bytes())
    at = content.find(tensors[NAME].numpy().tobytes()[:64])
    content[at + 5] ^= 4
    path.write_bytes(content)
    with pytest.raises(UserError, match="weights.pth is damaged: .* does not match its checksum"):
        open_encoder(f"{path}{METHODS['timm ViT']().words}")


def test_keys_that_are_no_names_are_passed_over(tmp_path):
    assert "30 of 30 tensors loaded" in opened(state() | {3: torch.zeros(2)}, tmp_path / "weights.pth").loaded


def test_safetensors_by_another_name_are_read(tmp_path):
    path = tmp_path / "weights.pth"
    save_file(state(), path)
    assert "30 of 30 tensors loaded" in open_encoder(f"{path}{METHODS['timm ViT']().words}").loaded


def test_a_pickle_named_safetensors_is_read(tmp_path):
    assert "30 of 30 tensors loaded" in opened(state(), tmp_path / "weights.safetensors").loaded


def test_a_wrapped_encoder_alone_is_not_taken_for_a_fine_tuned_one(tmp_path):
    encoder = {name: tensor for name, tensor in state().items() if not name.startswith("head.")}
    assert opened({"model": encoder, "epoch": 3}, tmp_path / "weights.pth").origin["format"] == "ViT, timm layout"


@pytest.mark.parametrize(
    "content", [b"step-00000320", b".", b"hello", b"run_dir: runs/mae\nseed: 0\n", b"\x80\x02", b"(" * 50]
)
def test_a_file_of_something_else_is_a_sentence(content, tmp_path):
    (tmp_path / "latest").write_bytes(content)
    with pytest.raises(
        UserError, match=f"{tmp_path / 'latest'} (is no file of weights|is no plain file|cannot be read)"
    ):
        read_file(tmp_path / "latest")
