import importlib.metadata
import re
import types
from pathlib import Path

import pytest
import torch
from shallow import one_block_a_stage

from prelude import objectives
from prelude.data.errors import UserError
from prelude.objectives import building, check_objective, objective_class, options_for
from prelude.objectives.building import build_objective
from prelude.pretrain.objective import Loss, Objective
from prelude.pretrain.recipes import load_config, validate_config

CONFIGS = Path(__file__).parents[2] / "configs"
RECIPES = sorted(set(CONFIGS.glob("*.yaml")) - set(CONFIGS.glob("finetune_*.yaml")))  # these have no objective of ours


class Constant(Objective):
    """A third party's objective, of which the registry knows nothing."""

    def forward(self, batch, progress):
        return Loss(torch.zeros(()))


def a_config(seed=0, image_size=32, encoder=None, **objective):
    tiny = {"embed_dim": 32, "depth": 1, "num_heads": 2}
    return validate_config(
        {
            "run_dir": "runs/test",
            "seed": seed,
            "data": {"shards": "nowhere-{000000..000001}.tar", "mean": [0.1, 0.2, 0.3]},
            "encoder": encoder
            or {"name": "vit_base_patch16_224", "image_size": image_size, "patch_size": 8, "kwargs": tiny},
            "objective": {"name": "mae", "decoder_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2, **objective},
            "train": {"epochs": 1, "global_batch": 2},
            "optimizer": {"lr": 1e-3},
        },
        "a test",
        options_for,
    )


@pytest.mark.parametrize("name", sorted(objectives.OURS))
def test_every_objective_of_ours_is_found_and_has_strict_options(name):
    assert issubclass(objective_class(name), Objective)
    assert options_for(name).model_config["extra"] == "forbid"


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(UserError, match="objective.name=mea is not known; did you mean mae?"):
        objective_class("mea")


def test_a_class_is_found_by_module_and_name(monkeypatch):
    module = types.ModuleType("third_party")
    module.Constant, module.not_one = Constant, dict
    monkeypatch.setitem(__import__("sys").modules, "third_party", module)
    assert objective_class("third_party:Constant") is Constant
    with pytest.raises(UserError, match="not an Objective"):
        objective_class("third_party:not_one")
    with pytest.raises(UserError, match="cannot be imported"):
        objective_class("third_party:Missing")
    with pytest.raises(UserError, match="cannot be imported"):
        objective_class("no_such_package_at_all:Missing")


def test_a_class_is_found_through_the_entry_points_of_installed_packages(monkeypatch):
    module = types.ModuleType("third_party")
    module.Constant = Constant
    monkeypatch.setitem(__import__("sys").modules, "third_party", module)
    entry = importlib.metadata.EntryPoint("constant", "third_party:Constant", "prelude.objectives")
    monkeypatch.setattr(objectives, "entry_points", lambda group: [entry] if group == entry.group else [])
    assert objective_class("constant") is Constant


def test_a_mistyped_option_is_refused_with_the_nearest():
    with pytest.raises(UserError, match="objective.mask_rate does not exist; did you mean objective.mask_ratio"):
        a_config(mask_rate=0.5)


def test_an_objective_is_built_as_configured():
    mae = build_objective(a_config(image_size=[32, 48]))
    assert mae.views.views[0].size == (32, 48)
    assert mae.views.mean == (0.1, 0.2, 0.3)
    assert mae.grid == (4, 6)


def test_weights_depend_on_the_seed_alone():
    torch.manual_seed(0)
    one = build_objective(a_config(seed=1)).state_dict()
    state = torch.get_rng_state()
    two = build_objective(a_config(seed=1)).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    other = build_objective(a_config(seed=2)).state_dict()
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert not torch.equal(one["decoder_pred.weight"], other["decoder_pred.weight"])


CONVNET = {"name": "resnet18", "image_size": 32}
IMPOSSIBLE = [
    ({"encoder": CONVNET}, "encoder.name=resnet18 builds a ResNet, .* write a timm VisionTransformer"),
    ({"image_size": 33}, "image_size=33 is not a whole number of patches .*write encoder.image_size=32 or 40"),
    ({"mask_ratio": 0.99}, "mask_ratio=0.99 of 16 patches leaves none to see; write"),
    ({"mask_ratio": 0.01}, "mask_ratio=0.01 of 16 patches leaves none to hide; write"),
    ({"image_size": [8, 16]}, "mask_ratio=0.75 of 2 patches leaves none to see; write objective.mask_ratio=0.5"),
    ({"image_size": 8}, "mask_ratio=0.75 of 1 patches leaves none to see; write a smaller encoder.patch_size"),
    ({"decoder_dim": 18}, "decoder_dim=18 must be a multiple of 4"),
    ({"decoder_num_heads": 3}, "decoder_dim=16 must be a multiple of 4 and of objective.decoder_num_heads=3"),
]


@pytest.mark.parametrize(("changes", "message"), IMPOSSIBLE)
def test_what_cannot_work_is_refused_before_anything_is_built(changes, message, monkeypatch):
    monkeypatch.setattr(building, "build_encoder", lambda *args, **kwargs: pytest.fail("built"))
    with pytest.raises(UserError, match=message):
        check_objective(a_config(**changes))


@pytest.mark.parametrize(
    ("recipe", "overrides", "message"),
    [
        (
            "barlow_cifar10",
            ["encoder.name=dla34", "encoder.kwargs={}", "train.gradient_checkpointing=true"],
            "encoder.name=dla34 has no gradient checkpointing; write train.gradient_checkpointing=false.",
        ),
        (
            "ijepa_cifar10",
            ["objective.contrastive_weight=0.001", "train.global_batch=1"],
            "objective.name=ijepa compares the samples of a batch, and train.global_batch=1 has one",
        ),
        (
            "dseqjepa_cifar10",
            ["objective.region_strategy=quantiles", "objective.region_min_area=0.1"],
            "region_min_area has no effect with region_strategy=quantiles",
        ),
    ],
)
def test_settings_that_cannot_work_together_are_refused(recipe, overrides, message):
    with pytest.raises(UserError, match=re.escape(message)):
        check_objective(load_config(recipe, overrides, options_for))


def test_a_target_of_one_value_is_not_standardised():
    config = a_config(encoder={"name": "vit_tiny_patch16_224", "image_size": 8, "patch_size": 1})
    check_objective(config)
    grey = config.model_copy(update={"encoder": config.encoder.model_copy(update={"in_chans": 1})})
    with pytest.raises(UserError, match="patches of an image, which has .* write objective.norm_pix_loss=false"):
        check_objective(grey)


def test_what_works_passes_the_check():
    check_objective(a_config())


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_valid_and_opens_with_what_it_trains(path):
    few = one_block_a_stage(load_config(path, [], options_for).encoder)  # a survey of all of a ResNet-200 takes seconds
    check_objective(load_config(path, few, options_for))
    opening = path.read_text().splitlines()[:4]
    assert all(line.startswith("# ") for line in opening)
    assert path.stem in opening[3]  # the exact command
