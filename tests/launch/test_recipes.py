"""The index of recipes says what the files say, and the recipes of one GPU are what their names promise."""

import json
import re
import subprocess
import sys

import pytest
from runs import ROOT
from shallow import one_block_a_stage

from prelude.data.errors import UserError
from prelude.launch import prelude, recipe_index, recipes
from prelude.launch.recipe_index import as_page, as_typed, shipped
from prelude.objectives import OURS, objective_class, options_for
from prelude.objectives.sparse_check import total_stride
from prelude.pretrain.encoders import lay_out_encoder
from prelude.pretrain.recipes import load_config

RECIPES = {recipe.name: recipe for recipe in shipped()}
ONE_GPU = [name for name, recipe in RECIPES.items() if "on one GPU of 24 GiB" in recipe.trains]
VITS, CONVNETS = {"mae", "simmim", "ijepa", "dseqjepa"}, {"spark", "fcmae"}  # alone; the others take all three
# Cells, and how many of them stay so: a share of 0.4, by SparK to the nearest number, by FCMAE rounded down
VISIBLE = {
    "spark_convnext_base": (49, 20),
    "spark_convnext_cifar10": (16, 6),
    "spark_convnext_large": (49, 20),
    "spark_convnext_small": (49, 20),
    "spark_convnext_tiny_224": (49, 20),
    "spark_convnext_tiny_96": (36, 14),
    "spark_resnet101": (49, 20),
    "spark_resnet152": (49, 20),
    "spark_resnet18_cifar10": (16, 6),
    "spark_resnet200": (49, 20),
    "spark_resnet50": (49, 20),
    "spark_resnet50_224": (49, 20),
    "spark_resnet50_96": (9, 4),
    "fcmae_cifar10": (16, 6),
    "fcmae_convnext_tiny_224": (49, 19),
    "fcmae_convnext_tiny_96": (36, 14),
    "fcmae_convnextv2_base": (49, 19),
    "fcmae_resnet50_224": (49, 19),
    "fcmae_resnet50_96": (9, 3),
}


def told(capsys, *argv: str) -> str:
    assert prelude.main(["recipes", *argv]) == 0
    return capsys.readouterr().out


def test_the_page_is_what_the_recipes_say():
    page = (ROOT / "docs" / "recipes.md").read_text()
    assert page == as_page(shipped()), "prelude recipes --markdown > docs/recipes.md"


def test_every_recipe_is_listed_and_torch_is_not_needed():
    command = [sys.executable, str(ROOT / "launch" / "prelude.py"), "recipes", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    listed = {one["name"]: one for one in json.loads(done.stdout)}
    assert listed.keys() == {path.stem for path in (ROOT / "configs").glob("*.yaml")}
    mae = listed["mae_vit_small_224"]
    assert (mae["objective"], mae["image_size"], mae["bases"]) == ("mae", 224, ["mae_vit_small_96", "mae_vit_base"])
    assert listed["finetune_vit_base"]["objective"] == "fine-tuning" and listed["mae_cifar10"]["result"] == "measured"
    assert listed["mae_vit_large"]["result"] == "published" and mae["result"] == "not measured"
    code = "import sys; import prelude.launch.recipes as door; door.main([]); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT / "src", check=True)
    assert done.stdout.splitlines()[-1] == "False"


def test_a_list_of_one_objective_and_a_recipe_in_full(capsys):
    lines = told(capsys, "--objective", "spark").splitlines()
    names = [line.split()[0] for line in lines[1:]]
    assert names == sorted(name for name, recipe in RECIPES.items() if recipe.objective == "spark")
    text = told(capsys, "barlow_convnext_tiny_224")
    for expected in (
        "barlow_convnext_tiny_96, built on barlow_resnet50",
        "image_size: 224",
        "lr: 0.0005",
        "not measured",
    ):
        assert expected in text
    assert "momentum" not in text and "\nbase:" not in text  # another optimizer begins anew; all is written out


def test_a_file_of_ones_own_is_shown_in_the_same_way(capsys, tmp_path):
    own = tmp_path / "own.yaml"
    own.write_text("base: quickstart\n")  # a header is for those that are shipped
    assert "trains   not said" in told(capsys, str(own)) and "base     quickstart" in told(capsys, str(own))
    for text, sentence in (
        ("base: quickstart\noptimizer: {lrr: 1}\n", "did you mean optimizer.lr?"),
        ("base: nosuch\n", f"base=nosuch in {own} cannot be built on: No config at nosuch"),
        ("bse: quickstart\n", "train is missing"),
    ):
        own.write_text(text)
        with pytest.raises(UserError, match=sentence):
            prelude.main(["recipes", str(own)])
    own.write_text("# Trains: a.\n# Takes: b.\n# Reaches: 5 %.\n# Command: d\nbase: quickstart\ntrain: {epochs: 3}\n")
    assert "trains   a." in told(capsys, str(own)) and "epochs: 3" in told(capsys, str(own))


def test_recipes_that_take_another_s_optimizer_take_all_of_it():
    """A section that names another optimizer begins anew, so that each of its keys has to be written."""
    theirs = load_config("barlow_vit_small", options_for=options_for).optimizer
    own = {
        path.stem for path in (ROOT / "configs").glob("*.yaml") if "AdamW as in barlow_vit_small" in path.read_text()
    }
    assert {"rotation_vit_small_96", "vicreg_vit_small_96"} <= own
    for name in own:
        optimizer = load_config(name, options_for=options_for).optimizer
        for key in ("name", "betas", "weight_decay", "decay_tokens", "decay_vectors"):
            assert getattr(optimizer, key) == getattr(theirs, key), (name, key)


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["mae_cifar1"], "No config at mae_cifar1; did you mean mae_cifar10?"),
        (["nowhere/mae_cifar10.yaml"], "No config at nowhere/mae_cifar10.yaml"),  # and not the one that ships
        (["nowhere/configs/mae_cifar10.yaml"], "No config at nowhere/configs/mae_cifar10.yaml"),
        (["../configs/mae_cifar10"], "No config at ../configs/mae_cifar10"),
        (["--objective", "sparc"], "no recipe is of it; did you mean spark?"),
        (["mae_cifar10", "--markdown"], "are of the whole list"),
    ],
)
def test_mistakes_are_one_sentence(argv, sentence):
    with pytest.raises(UserError, match=sentence):
        prelude.main(["recipes", *argv])


def test_measured_figures_are_of_recipes_that_are_there():
    figures = json.loads((ROOT / "configs" / "figures.json").read_text())
    assert figures.keys() <= RECIPES.keys()
    assert "300 to 336 images/s" in RECIPES["mae_cifar10"].speed


def test_there_is_a_recipe_of_one_gpu_for_every_objective_encoder_and_size_that_fit():
    named = {"barlow_twins": "barlow"}
    wanted = set()
    for objective in set(OURS) - {"uni4eye"}:  # which takes volumes beside the images
        encoders = {"vit_small"} if objective in VITS else {"resnet50", "convnext_tiny"}
        encoders |= set() if objective in VITS | CONVNETS else {"vit_small"}
        wanted |= {f"{named.get(objective, objective)}_{encoder}_{size}" for encoder in encoders for size in (96, 224)}
    assert wanted == set(ONE_GPU)


def test_all_of_them_open_with_what_they_train_take_and_reach():
    assert not [name for name, recipe in RECIPES.items() if "not said" in (recipe.trains, recipe.takes, recipe.reaches)]


def test_numbers_are_numbers_for_other_tools(capsys):
    for one in json.loads(told(capsys, "--json")):
        assert isinstance(one["image_size"], (int, list, type(None))), one["name"]
        assert isinstance(one["global_batch"], int) and isinstance(one["epochs"], (int, float)), one["name"]
        assert one["images_per_second"] is None or all(isinstance(speed, int) for speed in one["images_per_second"])
    assert next(iter(json.loads(told(capsys, "mae_cifar10", "--json"))))["images_per_second"] == [300, 336]


def test_what_was_measured_or_planned_names_device_and_precision():
    """A time of this project's own is not told without them."""
    for name, recipe in RECIPES.items():
        if not re.search(r"\d (min|s|h|of 24 GiB)\b", recipe.takes) or "published" in recipe.takes:
            continue
        if "no cost is published" not in recipe.takes:
            assert re.search(r"GPU|RTX 4090", recipe.takes) and re.search(r"fp32|bf16|precision", recipe.takes), name


@pytest.mark.parametrize("name", ONE_GPU)
def test_a_recipe_of_one_gpu_is_what_its_name_says(name):
    config, recipe = load_config(name, [], options_for), RECIPES[name]
    assert config.encoder.size == (int(name.rpartition("_")[2]),) * 2 and config.run_dir == f"runs/{name}"
    assert config.encoder.name.startswith(name.partition("_")[2].rpartition("_")[0])
    assert recipe.reaches.startswith("not measured") and recipe.takes.startswith(
        ("planned, not measured: ", "not measured")
    )
    precision = "bf16" if config.train.precision == "auto" else config.train.precision
    assert "planned" not in recipe.takes or recipe.takes.endswith(f", in {precision} on an RTX 4090.")
    micro_batch, accumulation = config.batching(1)
    if config.objective["name"] in ("barlow_twins", "vicreg", "msbreg", "lejepa"):
        assert accumulation == 1  # the loss is a statistic of the whole batch
    if config.encoder.name == "resnet50" and config.objective["name"] in CONVNETS:
        assert accumulation == 1  # batch norm sees what is held at once
    assert micro_batch & (micro_batch - 1) == 0


def test_a_convnet_s_images_are_hidden_in_as_many_cells_as_its_recipe_says():
    """As it is resolved: most are built on others."""
    found = {}
    for name, recipe in RECIPES.items():
        if recipe.objective not in CONVNETS:
            continue
        config = load_config(name, [], options_for)
        settings, (height, width) = config.objective, config.encoder.size
        few = load_config(name, one_block_a_stage(config.encoder), options_for).encoder
        cell = settings.get("mask_patch") or total_stride(lay_out_encoder(few), name, (height, width))
        cells = (height // cell) * (width // cell)
        found[name] = (cells, objective_class(recipe.objective).kept(cells, settings["mask_ratio"]))
        published = {"spark": (0.67, 1.0), "fcmae": (0.2, 1.0)}[recipe.objective]
        assert (settings["mask_ratio"], settings["crop_scale"]) == (0.6, published), name
    assert found == VISIBLE


def test_a_line_that_does_not_fit_ends_with_a_whole_word(monkeypatch, capsys):
    monkeypatch.setattr(recipes.sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")
    recipes.main([])
    told = capsys.readouterr().out.splitlines()
    words = {word for one in RECIPES.values() for word in f"{one.takes} {one.result} {one.global_batch}".split()}
    words |= {"result", "batch"}
    cut = [line for line in told if line.endswith(" …")]
    assert cut and max(map(len, told)) <= 80
    assert all(line.split()[-2].rstrip(".;") in {word.rstrip(".;") for word in words} for line in cut)


def test_commands_work_where_there_is_no_checkout(monkeypatch, tmp_path):
    command = RECIPES["mae_vit_base"].command
    assert "launch/pretrain.py --config configs/mae_vit_base.yaml" in command and as_typed(command) == command
    monkeypatch.setattr(recipe_index, "SHIPPED", tmp_path / "prelude" / "configs")
    here = "launch/pretrain.py --config configs/mae_vit_base.yaml"
    assert as_typed(command) == command.replace(here, "--module prelude.launch.pretrain --config mae_vit_base")
