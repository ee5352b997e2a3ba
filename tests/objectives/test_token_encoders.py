"""Token objectives on families of timm beside the plain ViT: every weight learns, and all go back to plain timm."""

import pytest
import timm
import torch

from prelude.objectives import options_for
from prelude.objectives.building import build_objective
from prelude.pretrain import batch_norm
from prelude.pretrain.recipes import validate_config
from prelude.pretrain.schedules import Progress
from prelude.pretrain.step_cost import blank_batch

ENCODERS = {  # name: (further arguments of timm, whether there is a class token)
    "vit_small_patch16_dinov3": ({"drop_path_rate": 0.1}, True),
    "eva02_base_patch14_224": ({"use_fc_norm": False, "use_post_transformer_norm": True}, True),
    "vit_base_patch16_siglip_224": ({"global_pool": "avg", "fc_norm": False}, False),
    "vit_medium_patch16_reg4_gap_256": ({"fc_norm": False, "final_norm": True}, False),
    "vit_small_patch16_18x2_224": ({}, True),  # attentions side by side
    "vit_base_patch16_xp_224": ({}, True),  # attention beside its MLP
    "beit_base_patch16_224": ({"global_pool": "token", "drop_path_rate": 0.1}, True),
}
OBJECTIVES = {
    "mae": {"decoder_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2},
    "ijepa": {"predictor_dim": 16, "predictor_depth": 1, "predictor_num_heads": 2, "depth_scaled_init": True},
    "dseqjepa": {"predictor_dim": 16, "predictor_depth": 1, "predictor_num_heads": 2, "lambda_start": 1.0},
    "simmim": {"mask_patch": 8},
}
CASES = [(o, e) for o in OBJECTIVES for e, (_, has_class) in ENCODERS.items() if has_class or o != "dseqjepa"]


@pytest.mark.parametrize(("objective", "name"), CASES)
def test_a_family_trains_and_goes_back_to_timm(objective, name):
    kwargs = {"embed_dim": 32, "depth": 3, "num_heads": 2} | ENCODERS[name][0]
    config = validate_config(
        {
            "run_dir": "x",
            "data": {"shards": "x"},
            "encoder": {"name": name, "image_size": 32, "patch_size": 4, "kwargs": kwargs},
            "objective": {"name": objective} | OBJECTIVES[objective],
            "train": {"epochs": 1, "global_batch": 4},
            "optimizer": {"lr": 1e-3},
        },
        name,
        options_for,
    )
    built = build_objective(config)
    batch = blank_batch(built.views, 4)
    batch.views[0].copy_(torch.randint(0, 256, batch.views[0].shape, generator=torch.Generator().manual_seed(0)))
    loss = built(batch, Progress(0, 10, 1.0))
    loss.total.backward()
    assert loss.total.isfinite()
    silent = [n for n, p in built.encoder.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert silent == []
    assert built.pictures(batch)

    with torch.no_grad():
        for parameter in built.encoder.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    built.after_step(Progress(1, 10, 1.0), torch.tensor(1.0))
    exported = built.eval().exported_encoder()
    plain = timm.create_model(name, img_size=32, patch_size=4, num_classes=0, **kwargs).eval()
    plain.load_state_dict(exported.state_dict(), strict=True)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(plain(images), exported(images))


@pytest.mark.parametrize(("objective", "own"), [("mae", {}), ("ijepa", {"depth_scaled_init": False})])
def test_batch_norms_of_an_own_encoder_are_those_of_all_ranks_and_pictures_move_none(objective, own):
    config = validate_config(
        {
            "run_dir": "x",
            "data": {"shards": "x"},
            "encoder": {"name": "own_networks:normed", "image_size": 32},
            "objective": {"name": objective} | OBJECTIVES[objective] | own,
            "train": {"epochs": 1, "global_batch": 4},
            "optimizer": {"lr": 1e-3},
        },
        "normed",
        options_for,
    )
    built = build_objective(config).train()
    norms = [module for module in built.modules() if isinstance(module, torch.nn.BatchNorm1d)]
    assert norms and all(isinstance(norm, batch_norm._AcrossRanks) for norm in norms)
    before = {name: value.clone() for name, value in built.state_dict().items()}
    assert built.pictures(blank_batch(built.views, 4))
    assert all(value.equal(before[name]) for name, value in built.state_dict().items())
    assert built.encoder.bn.training
    built(blank_batch(built.views, 4), Progress(0, 10, 1.0))
    assert not built.encoder.bn.running_mean.equal(before["encoder.bn.running_mean"])
