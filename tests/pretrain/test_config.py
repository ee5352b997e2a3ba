import pytest
import yaml
from pydantic import Field

from prelude.data.errors import UserError
from prelude.pretrain.config import Config
from prelude.pretrain.objective import Options
from prelude.pretrain.recipes import load_config, validate_config
from prelude.pretrain.resume import changed_settings

GOOD = {
    "run_dir": "runs/x",
    "data": {"shards": "x-{000..003}.tar"},
    "encoder": {"name": "vit_tiny_patch16_224", "image_size": 32, "patch_size": 4},
    "objective": {"name": "toy", "mask_ratio": 0.75},
    "train": {"epochs": 10, "global_batch": 512},
    "optimizer": {"lr": 1.5e-4},
}


class ToyOptions(Options):
    mask_ratio: float = Field(0.5, gt=0, lt=1)
    registers: int = 0


def options_for(name):
    if name != "toy":
        raise UserError(f"objective.name={name} is unknown; did you mean toy?")
    return ToyOptions


def refused(changes: dict, deletions=()) -> str:
    values = yaml.safe_load(yaml.safe_dump(GOOD))
    for key, value in changes.items():
        section, _, leaf = key.rpartition(".")
        target = values
        for part in filter(None, section.split(".")):
            target = target.setdefault(part, {})
        target[leaf] = value
    for key in deletions:
        section, _, leaf = key.rpartition(".")
        del (values[section] if section else values)[leaf]
    with pytest.raises(UserError) as error:
        validate_config(values, "x.yaml", options_for)
    return str(error.value)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"train.epoch": 3}, "train.epoch does not exist; did you mean train.epochs?"),
        ({"optimiser": {}}, "optimiser does not exist; did you mean optimizer?"),
        (
            {"data.shuffle.windows": 3},
            "data.shuffle.windows does not exist; did you mean data.shuffle.window?",
        ),
        ({"objective.mask_ration": 0.5}, "objective.mask_ration does not exist; did you mean objective.mask_ratio?"),
        ({"objective.mask_ratio": 1.5}, "objective.mask_ratio=1.5 is refused: write a number above 0 and below 1."),
        (
            {"encoder.kwargs": {"qkv_bias": "No"}},
            "encoder.kwargs.qkv_bias='No' is refused: it is text, which",
        ),
        (
            {"deepspeed": {"dump_state": "off"}},
            "deepspeed.dump_state='off' is refused: it is text, which",
        ),
        ({"objective.name": "toi"}, "objective.name=toi is unknown; did you mean toy?"),
        ({"train.global_batch": "many"}, "train.global_batch='many' is refused"),
        ({"data.num_workers": -1}, "data.num_workers=-1 is refused: write a whole number of 0 or more, or auto."),
        ({"optimizer.name": "lars", "train.zero_stage": 1}, "train.zero_stage=0, or optimizer.name=adamw"),
        ({"optimizer.name": "sgd", "optimizer.betas": [0.9, 0.9]}, "sgd has no betas; write momentum"),
        ({"optimizer.momentum": 0.5}, "adamw has no momentum; write betas"),
        ({"evaluate": {"train_shards": "a", "test_shard": "b"}}, "did you mean evaluate.test_shards?"),
    ],
)
def test_a_mistake_is_one_sentence_that_says_what_to_write(changes, sentence):
    assert sentence in refused(changes)


def test_all_mistakes_are_told_at_once():
    message = refused({"train.epoch": 3, "objective.mask_ratio": -1, "encoder.nam": "x"}, deletions=["optimizer.lr"])
    assert message.startswith("Found 4 errors in x.yaml:")
    assert len(message.splitlines()) == 5
    assert "optimizer.lr is missing" in message


def test_overrides_reach_nested_keys_and_read_as_yaml(tmp_path):
    recipe = tmp_path / "x.yaml"
    recipe.write_text(yaml.safe_dump(GOOD))
    overrides = [
        "train.epochs=2.5",
        "data.shards=../d/train-{000000..000019}.tar",
        "optimizer.lr=1e-3",
        "encoder.image_size=[32, 64]",
        "data.shuffle.window=7",
        "objective.mask_ratio=0.6",
        "encoder.kwargs.depth=3",
    ]
    config = load_config(recipe, overrides, options_for)
    assert config.train.epochs == 2.5
    assert config.data.shards == "../d/train-{000000..000019}.tar"
    assert config.optimizer.lr == 1e-3
    assert config.encoder.size == (32, 64)
    assert config.data.shuffle.window == 7
    assert config.objective == {"name": "toy", "mask_ratio": 0.6, "registers": 0}
    assert config.encoder.kwargs == {"depth": 3}
    with pytest.raises(UserError, match="is not an override"):
        load_config(recipe, ["train.epochs"], options_for)
    with pytest.raises(UserError, match="below 'run_dir'"):
        load_config(recipe, ["run_dir.x=1"], options_for)


def test_a_missing_recipe_names_the_nearest_one():
    with pytest.raises(UserError, match="did you mean mae_vit_base"):
        load_config("configs/mae_vit_bas.yaml", [], options_for)


def test_the_resolved_copy_reads_back_to_the_same_config(tmp_path):
    config = validate_config(GOOD, "x", options_for)
    copy = tmp_path / "config.yaml"
    copy.write_text(config.to_yaml())
    assert load_config(copy, [], options_for) == config


def test_learning_rate_follows_the_rule_of_the_recipe():
    config = validate_config(GOOD, "x", options_for)
    assert config.peak_lr == pytest.approx(3e-4)
    absolute = validate_config(GOOD | {"optimizer": {"lr": 0.1, "lr_rule": "absolute"}}, "x", options_for)
    assert absolute.peak_lr == 0.1


def test_batching_makes_the_global_batch_or_says_what_would():
    config = Config.model_validate(GOOD)
    assert config.batching(4) == (128, 1)
    micro = Config.model_validate(GOOD | {"train": {"epochs": 1, "global_batch": 512, "micro_batch": 64}})
    assert micro.batching(2) == (64, 4)
    assert micro.batching(8) == (64, 1)
    with pytest.raises(UserError, match="write train.global_batch=513"):
        config.batching(3)
    with pytest.raises(UserError, match="write train.global_batch=576"):
        micro.batching(3)


def test_what_changes_the_run_is_told_from_what_does_not():
    config = validate_config(GOOD, "x", options_for)
    saved = config.model_dump(mode="json")
    saved["data"]["num_workers"], saved["train"]["zero_stage"], saved["data"]["shards"] = 7, 2, "elsewhere.tar"
    assert changed_settings(saved, config, ToyOptions) == []
    saved["optimizer"]["lr"], saved["encoder"]["kwargs"] = 1.0, {"depth": 3}
    assert changed_settings(saved, config, ToyOptions) == [
        "encoder.kwargs.depth: 3 -> None",
        "optimizer.lr: 1.0 -> 0.00015",
    ]


def test_what_counted_as_true_goes_on_as_true():
    encoder = GOOD["encoder"] | {"kwargs": {"qkv_bias": True}}
    config = validate_config(GOOD | {"encoder": encoder}, "x", options_for)
    saved = config.model_dump(mode="json")
    saved["encoder"]["kwargs"]["qkv_bias"] = "no"
    assert changed_settings(saved, config, ToyOptions) == []
    text = GOOD | {"encoder": GOOD["encoder"] | {"kwargs": {"qkv_bias": "no"}}}
    assert validate_config(text, "x", options_for, recorded=True).encoder.kwargs == {"qkv_bias": "no"}
    with pytest.raises(UserError, match="write true or false"):
        validate_config(text, "x", options_for)


def test_a_range_of_values_is_two_growing_numbers_or_auto():
    config = validate_config(GOOD | {"data": GOOD["data"] | {"range": [0, 4095]}}, "x", options_for)
    assert config.data.range == (0, 4095)
    assert validate_config(GOOD | {"data": GOOD["data"] | {"range": "auto"}}, "x", options_for).data.range == "auto"
    for wrong in ([4095, 0], [1, 1], [0], "12bit", [0, float("inf")]):
        assert "data.range" in refused({"data.range": wrong})


def test_a_run_from_before_there_were_some_settings_goes_on():
    config = validate_config(GOOD, "x", options_for)
    saved = config.model_dump(mode="json")
    del saved["data"]["range"]
    del saved["objective"]["registers"]
    assert changed_settings(saved, config, ToyOptions) == []
    ranged = validate_config(GOOD | {"data": GOOD["data"] | {"range": [0, 4095]}}, "x", options_for)
    assert len(changed_settings(saved, ranged, ToyOptions)) == 1
    other = validate_config(GOOD | {"objective": GOOD["objective"] | {"registers": 4}}, "x", options_for)
    assert changed_settings(saved, other, ToyOptions) == ["objective.registers: 0 -> 4"]
    saved["collapse"] |= {"grace_steps": 200}  # which is no longer, and changes nothing of what is computed
    assert changed_settings(saved, config, ToyOptions) == []
    saved["train"]["warp"] = saved["objective"]["weft"] = 2
    assert changed_settings(saved, config, ToyOptions) == ["objective.weft: 2 -> None", "train.warp: 2 -> None"]
    plain = validate_config(GOOD, "x")  # of code that names no options
    assert changed_settings(config.model_dump(mode="json"), plain, ToyOptions) == []
