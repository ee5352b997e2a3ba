"""`prelude keys` finds what it is asked for, and tells of each key what a config is checked by."""

import pytest
from pydantic import ValidationError

from prelude.data.errors import UserError
from prelude.launch import prelude
from prelude.launch.config_reference import OF_OBJECTIVES, all_keys
from prelude.launch.keys import found
from prelude.pretrain.config import OptimizerConfig
from prelude.pretrain.config_keys import Keys


def told(capsys, *argv: str) -> str:
    assert prelude.main(["keys", *argv]) == 0
    return capsys.readouterr().out


def names(word: str) -> list[str]:
    return [key.name for key in found(word, all_keys())]


def test_the_names_of_all_keys_are_listed(capsys):
    listed, row = {}, ""
    for line in told(capsys).partition("\n\n")[0].splitlines():
        row = row if line[0] == " " else line.split()[0]
        listed.setdefault(row, []).extend(line.removeprefix(row).replace(",", " ").split())
    assert listed.pop("") == ["run_dir", "seed", "objective", "deepspeed"]
    shown = [f"{section}.{name}".replace(".NAME.", ".") for section, names in listed.items() for name in names]
    wanted = {key for key in Keys().all() if key.partition(".")[0] not in ("objective", "run_dir", "seed", "deepspeed")}
    assert wanted - {key.rpartition(".")[0] for key in wanted} <= set(shown) and len(shown) == len(set(shown))
    for objective, model in OF_OBJECTIVES.items():
        assert set(model.model_fields) == {name.partition(".")[0] for name in listed[objective]}


def test_a_key_is_told_with_what_it_takes_its_default_and_its_meaning(capsys):
    mask_ratio, required = told(capsys, "objective.mask_ratio"), told(capsys, "optimizer.lr")
    assert "objective.mask_ratio (mae)\n    a number above 0 and below 1; default 0.75\n" in mask_ratio
    assert "    Share of the patches that is hidden." in mask_ratio
    assert required.startswith("optimizer.lr\n    a number above 0; must be written\n")
    with pytest.raises(ValidationError):  # as it says
        OptimizerConfig(lr=0)


@pytest.mark.parametrize(
    ("word", "first", "without"),
    [
        ("optimizer", "optimizer", "train.epochs"),
        ("data.shuffle", "data.shuffle", "data.shards"),
        ("mae", "objective.mask_ratio", "optimizer.lr"),
        ("objective.mae", "objective.mask_ratio", "optimizer.lr"),
        ("finetune", "objective.weights", "optimizer.lr"),
        ("batch_size", "train.global_batch", "train.epochs"),  # as other tools call it
        ("data.range=[0,4095]", "data.range", "data.shards"),
        ("objective.name", "objective", "optimizer.lr"),
        ("method", "objective", "optimizer.lr"),
        ("depth", "encoder.kwargs", "optimizer.lr"),
        ("weights", "encoder.weights", "optimizer.lr"),  # of which other tools have keys that are none here
        ("deepspeed.zero_optimization", "deepspeed", "optimizer.lr"),
        ("k-NN", "evaluate.every_steps", "optimizer.lr"),
        ("data.*", "data", "optimizer.lr"),
    ],
)
def test_a_word_finds_a_section_a_key_an_objective_or_what_it_is_part_of(word, first, without):
    assert names(word)[0] == first and without not in names(word)


def test_any_other_word_finds_the_keys_whose_names_or_meanings_have_it():
    keys = found("Warm", all_keys())
    assert {"optimizer.warmup_epochs", "optimizer.warmup_lr"} <= {key.name for key in keys}
    assert all("warm" in f"{key.name} {key.meaning}".lower() for key in keys)


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("mometum", "did you mean momentum"),
        ("max_steps", "a run is as long as train.epochs says"),
        ("tensorboard", "a run writes metrics.jsonl and tensorboard/"),
        ("steps", "a run is as long as train.epochs says"),
        ("objective.mask_ration", "did you mean mask_ratio"),
        ("*", "`prelude keys` lists the names of all"),
        ("qqqq", "`prelude keys` lists the names of all"),
        ("mae_cifar10", "it is a recipe: `prelude recipes mae_cifar10`"),
    ],
)
def test_a_word_that_finds_nothing_says_what_to_write(word, sentence):
    with pytest.raises(UserError, match=sentence):
        found(word, all_keys())
