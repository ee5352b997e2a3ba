"""An export under `features_only=True` gives the maps that pretraining read: those that SparK's decoder is fed, and
the tokens that MAE's is, but for the final norm, which timm's maps of transformers leave out."""

import pytest
import timm
import torch

from prelude.checkpoints.export import export_encoder
from prelude.checkpoints.store import Store
from prelude.objectives import options_for
from prelude.objectives.building import build_objective
from prelude.pretrain.encoders import forward_tokens
from prelude.pretrain.recipes import validate_config

VIT = {"name": "vit_tiny_patch16_224", "image_size": 32, "patch_size": 8}
ENCODERS = {
    "spark, ResNet": ("spark", {"name": "resnet18", "kwargs": {"channels": [8, 12, 16, 20], "layers": [1, 1, 1, 1]}}),
    "spark, ConvNeXt": (
        "spark",
        {"name": "convnext_atto", "patch_size": 2, "kwargs": {"depths": [1, 1, 1, 1], "dims": [8, 12, 16, 20]}},
    ),
    "mae": ("mae", VIT | {"kwargs": {"embed_dim": 24, "depth": 3, "num_heads": 2}}),
    "mae, registers": ("mae", VIT | {"kwargs": {"embed_dim": 24, "depth": 3, "num_heads": 2, "reg_tokens": 2}}),
}
OPTIONS = {"spark": {"decoder_dim": 32}, "mae": {"decoder_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2}}


def pretrained(objective, encoder):
    """An objective whose weights are not those that it starts with, statistics of batch norms included."""
    config = validate_config(
        {
            "run_dir": "x",
            "data": {"shards": "x"},
            "encoder": {"image_size": 64} | encoder,
            "objective": {"name": objective} | OPTIONS[objective],
            "train": {"epochs": 1, "global_batch": 4},
            "optimizer": {"lr": 1e-3},
        },
        "a test",
        options_for,
    )
    model = build_objective(config).eval()
    generator = torch.Generator().manual_seed(7)
    for name, tensor in model.encoder.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 1.5, generator=generator)
        elif tensor.is_floating_point() and name != "pos_embed":
            tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator))
    return model, config


def exported(model, config, folder, save) -> str:
    meta = {
        "encoder": config.encoder.model_dump(mode="json"),
        "exported": "encoder.",
        "mean": [0.5] * 3,
        "std": [0.2] * 3,
        "loader": {"fingerprint": "0123abcd"},
        "config": {"objective": {"name": config.objective["name"]}},
    }
    tensors = {f"encoder.{name}": tensor for name, tensor in model.encoder.state_dict().items()}
    save(Store(folder / "run" / "checkpoints"), 3, meta=meta, encoder=tensors)
    export_encoder(str(folder / "run"), folder / "export")
    return f"local-dir:{folder / 'export'}"


@pytest.mark.parametrize(("objective", "encoder"), ENCODERS.values(), ids=ENCODERS)
def test_features_only_gives_the_maps_that_were_pretrained(objective, encoder, tmp_path, save):
    model, config = pretrained(objective, encoder)
    source = exported(model, config, tmp_path, save)
    size = config.encoder.size
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found, maps = opened_and_pretrained(objective, model, source, images)
    assert len(found) == len(maps) >= 1
    for one, other in zip(found, maps, strict=True):
        assert other.std() > 0.01
        torch.testing.assert_close(one, other, atol=2e-5 * other.abs().max().item(), rtol=0)


def opened_and_pretrained(objective, model, source, images):
    """The maps that timm gives of the export, and those that pretraining reads."""
    if objective == "spark":
        everything = torch.arange(model.num_cells).expand(2, -1)
        encoded = model.sparse_encoder(images, everything, model.grid)
        maps = [encoded.positions.unpack(packed) for packed in encoded.maps]
        found = timm.create_model(source, pretrained=True, features_only=True).eval()(images)
    else:
        layout = model.encoder.patch_embed.grid_size
        prefix = model.encoder.num_prefix_tokens
        everything = torch.arange(model.num_patches).expand(2, -1)
        tokens = forward_tokens(model.encoder, images, everything)[:, prefix:]  # what the decoder is handed
        maps = [tokens.transpose(1, 2).unflatten(2, layout)]
        whole = timm.create_model(source, pretrained=True).eval()
        found = whole.forward_intermediates(images, indices=1, norm=True, intermediates_only=True)
        (bare,) = timm.create_model(source, pretrained=True, features_only=True, out_indices=[-1]).eval()(images)
        assert not torch.allclose(bare, maps[0], atol=0.1)  # timm leaves the final norm out
        found += [whole.norm(bare.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)]
        maps *= 2
    return found, maps
