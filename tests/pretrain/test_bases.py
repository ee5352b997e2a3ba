"""A recipe that is built on another one says what differs, and is otherwise a recipe like any."""

import pytest

from prelude.data.errors import UserError
from prelude.evaluators.finetuning.recipe import check_recipe
from prelude.objectives import options_for
from prelude.pretrain.recipes import bases_of, find_recipe, load_config, read_recipe


def write(folder, **files: str) -> None:
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)


def test_sections_are_merged_and_lists_are_replaced(tmp_path):
    write(
        tmp_path, mine="base: mae_vit_base\nrun_dir: runs/mine\ntrain: {epochs: 40}\noptimizer: {betas: [0.8, 0.9]}\n"
    )
    mine, theirs = (load_config(recipe, [], options_for) for recipe in (tmp_path / "mine.yaml", "mae_vit_base"))
    assert mine.train.epochs == 40 and mine.train.global_batch == theirs.train.global_batch
    assert mine.optimizer.betas == (0.8, 0.9) and mine.optimizer.lr == theirs.optimizer.lr
    assert mine.encoder == theirs.encoder and mine.objective == theirs.objective and mine.run_dir == "runs/mine"
    assert [path.stem for path in bases_of(tmp_path / "mine.yaml")] == ["mine", "mae_vit_base"]
    assert "base" not in mine.to_yaml().splitlines()[0]


@pytest.mark.parametrize("section", ["encoder: {name: resnet18, image_size: 32}", "optimizer: {name: sgd, lr: 0.1}"])
def test_a_section_of_another_kind_begins_anew(section, tmp_path):
    write(tmp_path, mine=f"base: ijepa_vit_base\n{section}\n")
    name, _, given = section.partition(": ")
    assert read_recipe(tmp_path / "mine.yaml")[name].keys() == {
        key.split(":")[0].strip() for key in given[1:-1].split(",")
    }


def test_a_tracker_whose_run_is_named_keeps_what_the_base_says_of_it(tmp_path):
    write(
        tmp_path,
        base="base: quickstart\nlog: {wandb: {project: cells, name: one}, mlflow: {experiment: cells}}\n",
        mine="base: base.yaml\nlog: {wandb: {name: two}, mlflow: {name: two}}\n",
    )
    log = load_config(tmp_path / "mine.yaml", [], options_for).log
    assert (log.wandb.project, log.wandb.name) == ("cells", "two")
    assert (log.mlflow.experiment, log.mlflow.name) == ("cells", "two")


def test_an_override_changes_one_of_the_places_that_share_an_anchor(tmp_path):
    part = "{label: cls, values: [0, 1]}"
    evaluate = "{train_shards: a, test_shards: b, train_select: *part, test_select: *part}"
    write(tmp_path, mine=f"base: quickstart\ndata: {{shards: x, select: &part {part}}}\nevaluate: {evaluate}\n")
    told = ["data.select.share=0.5", "evaluate.train_select.values.0=7"]
    config = load_config(tmp_path / "mine.yaml", told, options_for)
    train, test = config.evaluate.train_select, config.evaluate.test_select
    assert (config.data.select.share, train.share, test.share) == (0.5, None, None)
    assert (config.data.select.values, train.values, test.values) == ([0, 1], [7, 1], [0, 1])


def test_an_empty_section_takes_away_what_the_base_has(tmp_path):
    write(
        tmp_path,
        base="data: {mix: {a: {shards: x, weight: 1}}}\n",
        mine="base: base.yaml\ndata: {shards: y, mix: {}}\n",
    )
    assert read_recipe(tmp_path / "mine.yaml")["data"] == {"mix": {}, "shards": "y"}


def test_bases_may_have_bases_and_lie_beside_the_file(tmp_path):
    write(tmp_path, a="base: quickstart\nseed: 1\n", b="base: a.yaml\ntrain: {epochs: 3}\n")
    values = read_recipe(tmp_path / "b.yaml", ["train.global_batch=32"], options_for)
    assert (values["seed"], values["train"]["epochs"], values["train"]["global_batch"]) == (1, 3, 32)


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        ({"mine": "base: mae_vit_bse\n"}, "No config at mae_vit_bse; did you mean mae_vit_base?"),
        ({"mine": "base: [a, b]\n"}, "base=.* is no recipe; write the name or the file of one"),
        ({"mine": "base: mine.yaml\n"}, "which is built on it; leave one base out"),
        ({"mine": "base: other.yaml\n", "other": "base: mine.yaml\n"}, "which is built on it; leave one base out"),
        ({"mine": "base: other.yaml\n", "other": "data: {allow_commands: true}\n"}, "other.yaml cannot allow itself"),
        ({"mine": "base: other.yaml\n", "other": "- 1\n"}, "other.yaml holds no settings"),
    ],
)
def test_a_base_that_cannot_be_is_one_sentence(files, sentence, tmp_path):
    write(tmp_path, **files)
    with pytest.raises(UserError, match=sentence):
        read_recipe(tmp_path / "mine.yaml")


def test_a_mistake_in_a_base_is_told_with_the_recipe_that_was_asked_for(tmp_path):
    write(tmp_path, mine="base: other.yaml\n", other="base: quickstart\ntrain: {epoch: 3}\n")
    with pytest.raises(UserError, match=r"mine.yaml:\n  train.epoch does not exist; did you mean train.epochs"):
        load_config(tmp_path / "mine.yaml", [], options_for)


def test_a_recipe_writes_into_a_folder_of_its_own_beside_that_of_its_base(tmp_path):
    write(tmp_path, top="run_dir: disk/top\ntrain: {epochs: 2}\n", a="base: top.yaml\n", b="base: a.yaml\n")
    write(tmp_path, c="base: b.yaml\nrun_dir: disk/top\n")
    assert [read_recipe(tmp_path / f"{name}.yaml")["run_dir"] for name in ("top", "a", "b", "c")] == [
        "disk/top", "disk/a", "disk/b", "disk/top",
    ]  # fmt: skip
    assert read_recipe(tmp_path / "a.yaml", ["run_dir=else/where"])["run_dir"] == "else/where"


@pytest.mark.parametrize(("name", "check"), [
    ("mae_cifar10", lambda *told: load_config(*told, options_for)), ("finetune_vit_cifar10", check_recipe),
])  # fmt: skip
def test_a_recipe_named_as_its_base_has_to_say_its_folder(name, check, tmp_path):
    file = tmp_path / f"{name}.yaml"
    file.write_text(f"base: {find_recipe(name)}\n")
    with pytest.raises(UserError, match=f"{name}.yaml would write into run_dir=runs/{name} as /.*, on which it is"):
        check(file, [])
    check(file, ["run_dir=runs/other"])
    file.write_text(f"base: {find_recipe(name)}\nrun_dir: runs/{name}\n")  # meant
    check(file, [])


def test_a_recipe_of_the_other_kind_is_told_as_that(tmp_path):
    write(tmp_path, mine="base: finetune_vit_base\n", whole="base: mae_cifar10\nobjective: {name: fine_tune}\n")
    for recipe in ("finetune_vit_base", tmp_path / "mine.yaml", tmp_path / "whole.yaml"):
        with pytest.raises(
            UserError, match=f"{recipe} is a recipe of fine-tuning.*write `prelude finetune SOURCE --conf"
        ):
            load_config(recipe, [], options_for)
    with pytest.raises(
        UserError, match=r"recipe of pretraining \(objective.name=mae\); write `prelude pretrain --config"
    ):
        check_recipe("mae_cifar10")
    with pytest.raises(UserError, match="objective.name=mea is no way to fine-tune"):  # a slip is no other kind
        check_recipe("finetune_vit_base", ["objective.name=mea"])
    with pytest.raises(UserError, match="objective.name is missing"):
        load_config("mae_cifar10", ["objective.name=null"], options_for)
