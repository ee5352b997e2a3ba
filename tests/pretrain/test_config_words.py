"""Any mistake in a config is told in a sentence that says what to write, whatever the key and whatever the value."""

import copy
import math
from collections import Counter
from pathlib import Path

import pytest
import yaml
from pydantic import Field

from prelude.data.errors import UserError
from prelude.evaluators.finetuning import recipe as finetune_recipe
from prelude.objectives import check_objective, options_for
from prelude.pretrain.config_keys import Keys
from prelude.pretrain.foreign_keys import NAMES
from prelude.pretrain.options import Options
from prelude.pretrain.recipes import load_config, read_recipe, validate_config

CONFIGS = Path(__file__).parents[2] / "configs"
ABSENT, MISSPELT = object(), object()
MUTATIONS = [ABSENT, MISSPELT, "abc", -1, 0, math.inf, math.nan, [1, "x", None], {"a": {"b": 1}}, True, None, 0.5]


def mutated(values: dict, key: str, mutation) -> dict:
    values = copy.deepcopy(values)
    *sections, leaf = key.split(".")
    place = values
    for section in sections:
        if not isinstance(place.get(section), dict):
            place[section] = {}
        place = place[section]
    found = place.pop(leaf, 1)
    if mutation is MISSPELT:
        place[f"{leaf[:-1]}_q"] = found
    elif mutation is not ABSENT:
        place[leaf] = mutation
    return values


def written(values: dict, above: tuple[str, ...] = ()) -> list[str]:
    """The keys of a recipe, its sections among them."""
    keys = []
    for key, value in values.items():
        keys.append(".".join([*above, key]))
        keys += written(value, (*above, key)) if isinstance(value, dict) else []
    return keys


def whole(path: Path) -> tuple[dict, object]:
    values = read_recipe(path)
    if not path.stem.startswith("finetune"):
        return values, options_for
    return finetune_recipe.completed(values, finetune_recipe.Unknown("a", "b")), finetune_recipe.options_for


def answer(values: dict, of) -> str | None:
    """The refusal, None where there is none; what is neither fails the test."""
    try:
        validate_config(values, "a recipe", of)
    except UserError as error:
        return str(error)


times_seen = Counter()  # of a key, written or left out, and of a setting of an objective in recipes of that one


def new_mutations(key: str, values: dict, is_written: bool) -> list:
    """All of them where a key is met for the first time, and then one in turn: what many recipes have is refused by
    the same code in each."""
    one = key, is_written, values["objective"]["name"] if key.startswith("objective.") else None
    times_seen[one] += 1
    return MUTATIONS if times_seen[one] == 1 else [MUTATIONS[times_seen[one] % len(MUTATIONS)]]


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_no_value_of_any_key_of_a_recipe_is_a_traceback(path):
    values, of = whole(path)
    for key in written(values):
        for mutation in new_mutations(key, values, is_written=True):
            message = answer(mutated(values, key, mutation), of)
            never = isinstance(mutation, float) and not math.isfinite(mutation)
            assert message or not never, f"{key}={mutation} is taken"
            for sentence in (message or "").splitlines()[1:]:
                assert sentence.endswith((".", "?")) and "parse" not in sentence and "nput should" not in sentence, (
                    sentence
                )


ONE_OF_EACH = ["mae_cifar10", "ijepa_cifar10", "dseqjepa_cifar10", "barlow_cifar10", "rotation_cifar10",
               "spark_resnet18_cifar10", "vicreg_cifar10", "lejepa_cifar10", "msbreg_cifar10", "simmim_cifar10",
               "fcmae_cifar10", "uni4eye_shapes", "finetune_vit_cifar10"]  # fmt: skip


@pytest.mark.parametrize("stem", ONE_OF_EACH)
def test_nor_is_a_key_that_recipes_leave_out(stem):
    values, of = whole(CONFIGS / f"{stem}.yaml")
    model = of(values["objective"]["name"])
    for key in sorted(set(Keys(model).all()) - set(written(values))):
        for mutation in new_mutations(key, values, is_written=False):
            answer(mutated(values, key, mutation), of)


@pytest.mark.parametrize("stem", ["mae_cifar10", "rotation_cifar10"])
def test_nor_is_what_only_the_encoder_can_tell(stem):
    values, of = whole(CONFIGS / f"{stem}.yaml")
    names = ["resnet18", "convnext_tiny", "vgg11", "vit_tiny_patch16_224", "deit3_small_patch16_224", "mixer_s32_224"]
    changes = [("encoder.name", name) for name in names] + [("encoder.kwargs.nothing", 3), ("encoder.patch_size", 3)]
    changes += [
        (key, value) for key in written(values) if key.startswith("encoder.kwargs.") for value in MUTATIONS[2:5]
    ]
    for key, value in changes:
        try:
            check_objective(validate_config(mutated(values, key, value), "a recipe", of))
        except UserError as error:
            assert str(error).rstrip()[-1] in ".?"


def refusal(recipe: str, *overrides: str) -> str:
    with pytest.raises(UserError) as error:
        check_objective(load_config(recipe, list(overrides), options_for))
    return str(error.value)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("lr=1", "lr does not exist; did you mean optimizer.lr?"),
        ("train.learning_rate=1", "did you mean optimizer.lr?"),
        ("epochs=3", "epochs does not exist; did you mean train.epochs?"),
        ("optimizer.max_epochs=3", "did you mean train.epochs?"),
        ("data.batch_size=3", "did you mean train.global_batch?"),
        ("accumulate_grad_batches=3", "did you mean train.micro_batch?"),
        ("train.max_steps=3", "write train.epochs = steps x train.global_batch / images."),
        ("encoder.pretrained=true", "encoder.weights=SOURCE starts it from weights that exist"),
        ("log.wandb=true", "write settings below it: project, entity, name, group, tags, mode"),
        ("wandb=true", "did you mean log.wandb.project?"),
        ("wandb_project=x", "did you mean log.wandb.project?"),
        ("tracking_uri=x", "did you mean log.mlflow.tracking_uri?"),
        ("log.wandb={project: x, mode: disabled}", "write one of online, offline"),
        ("log.wandb.entity=us", "log.wandb.project is missing: write text."),
        ("log.comet=true", "log.wandb.project or log.mlflow.experiment is set; write one of these"),
        ("encoder.in_chans=1", "follows from data.channels=3; write data.channels alone"),
        ("data.in_channels=1", "did you mean data.channels?"),
        ("data.mean=[0.5]", "mean has 1 value and channels=3"),
        (
            "data.mean=[123.7, 116.3, 103.5]",
            "mean and std are of pixels from 0 to 1; divide those of pixels from 0 to 255",
        ),
        ("data.std=[58.4, 57.1, 57.4]", "mean and std are of pixels from 0 to 1; divide those of pixels from 0 to 255"),
        ("optimizer={name: sgd, lr: 1, nesterov: true, momentum: 0}", "nesterov has no effect at momentum=0"),
        ("data.std=[1, 0, 1]", "write a list of numbers above 0"),
        ("encoder.depth=3", "did you mean encoder.kwargs.depth?"),
        ("mask_ratio=0.5", "did you mean objective.mask_ratio?"),
        ("optimizer.crop_scale=[0.5, 1]", "did you mean objective.crop_scale?"),
        ("log.nothing_of_the_kind=1", "the keys here are every_steps, pictures_every_steps, wandb, mlflow."),
        ("train.epochs=many", "train.epochs='many' is refused: write a number above 0 and of 1000000 or less."),
        ("train.epochs=inf", "train.epochs=inf is refused: write a finite number above 0 and of 1000000 or less."),
        ("train.epochs=1e30", "train.epochs=1e+30 is refused: write a number above 0 and of 1000000 or less."),
        ("train.epochs=true", "train.epochs=true is refused: write a number above 0 and of 1000000 or less."),
        ("data.std=[0,0,0]", "data.std=[0, 0, 0] is refused: write a list of numbers above 0, one for each channel."),
        ("data.std=[0.5]", "std has 1 value and channels=3; write one for each channel"),
        ("data.mean=[1, 2, 3, 4]", "mean has 4 values and channels=3; write one for each channel"),
        (
            "optimizer.betas=[0.9]",
            "=[0.9] is refused: write a list of 2 numbers of 0 or more and below 1.",
        ),
        ("encoder.image_size=[32]", "or a list of 2 whole numbers of 1 or more."),
        ("objective.crop_scale=[0.5]", "objective.crop_scale=[0.5] is refused: write a list of 2 numbers."),
        ("data.range=[1]", "data.range=[1] is refused: write a list of 2 numbers, or auto, or null."),
        (
            "data.shards=[]",
            "data.shards=[] is refused: write a path or pattern, or a list of paths or patterns, at least 1",
        ),
        ("seed=-1", "seed=-1 is refused: write a whole number of 0 or more and below 2147483648."),
        (
            "data={allow_commands: true}",
            "data=... would replace the whole section, and lose shards; write data.allow_commands=true.",
        ),
        ("train={}", "train=... would replace the whole section, and lose epochs, global_batch"),
        ("objective={name: mae}", "write objective.name=mae."),
        ("encoder.name=vit_bse_patch16_224", "did you mean vit_base_patch16_224?"),
        ("encoder.name=resnet_50", "did you mean resnet50?"),
        ("encoder.name=ConvNeXt-Tinny", "did you mean convnext_tiny?"),
        ("encoder.name=deit_small", "did you mean deit_small_patch16_224"),
        ("encoder.name=wrongnet_9", 'timm.list_models("*wrongnet*") names what there is.'),
        ("encoder.image_size=x", "write a whole number of 1 or more, or a list of 2 whole numbers of 1 or more."),
        (
            "encoder.patch_size=0",
            "encoder.patch_size=0 is refused: write a whole number of 1 or more, or a list of 2 whole numbers of 1 or "
            "more, or null.",
        ),
        ("train.micro_batch=-4", "train.micro_batch=-4 is refused: write a whole number of 1 or more, or auto."),
        ("objective.decoder_depth=2.5", "objective.decoder_depth=2.5 is refused: write a whole number of 1 or more."),
        ("optimizer.betas.1=x", "optimizer.betas=[0.9, 'x'] is refused: write a list of 2 numbers"),
        ("optimizer.betas.2=0.9", "names none of the 2 values of optimizer.betas"),
        ("optimizer.warmup_epochs=13", "optimizer.warmup_epochs=13 is longer than the run of train.epochs=12"),
        ("train.epochs.x=1", "sets a key below 'epochs', which is a plain value; write train.epochs="),
        ("train..epochs=1", "is not an override; write key.sub=value"),
        ("objective.name=[mae]", "write the name of an objective"),
        ("encoder.name=resnet18", "encoder.name=resnet18 builds a ResNet, which cannot run on a part of its patches"),
        ("encoder.kwargs.heads=3", "encoder.kwargs.heads is no setting of encoder.name=vit_tiny_patch16_224"),
        ("encoder.kwargs.num_heads=-3", "write a finite number of 0 or more for num_heads"),
        ("encoder.kwargs.drop_path_rate=1", "write a number of 0 or more and below 1 for drop_path_rate"),
    ],
)
def test_a_sentence_says_what_to_write(override, sentence):
    message = refusal("mae_cifar10", override)
    assert sentence in message
    assert len(message.splitlines()) <= 2


def test_a_section_that_a_recipe_leaves_out_may_be_written_whole():
    config = load_config("mae_cifar10", ["data.shuffle={window: 3}", "encoder.kwargs={}"], options_for)
    assert config.data.shuffle.window == 3 and config.encoder.kwargs == {}


def test_a_transformer_under_the_recipe_of_a_convnet_is_told_by_the_setting_that_does_not_fit():
    message = refusal("rotation_cifar10", "encoder.name=vit_tiny_patch16_224", "encoder.image_size=224")
    assert "is no setting of encoder.name=vit_tiny_patch16_224" in message and "encoder.kwargs={}" in message


def test_every_name_of_another_tool_leads_to_a_key_that_there_is():
    keys = set(Keys(options_for("mae")).all()) | {f"encoder.kwargs.{name}" for name in
                                                  ("depth", "embed_dim", "num_heads", "drop_path_rate")}  # fmt: skip
    assert set(NAMES.values()) <= keys


def test_online_evaluation_of_several_findings_is_refused_at_the_start():
    message = refusal("mae_cxr", "evaluate.every_steps=100")
    assert "judges by class numbers" in message and "write evaluate.every_steps=0" in message


class Foreign(Options):
    """Settings of an objective from elsewhere; its sentences come from its types."""

    temperature: float = Field(0.1, gt=0, lt=2)
    widths: list[int] = [1]
    mode: str | None = None


def test_an_objective_from_elsewhere_has_the_same_sentences():
    values, _ = whole(CONFIGS / "mae_cifar10.yaml")
    values["objective"] = {"name": "foreign", "temperature": "hot", "widths": 3, "mode": 5, "temprature": 1}
    message = answer(values, lambda name: Foreign)
    assert "objective.temperature='hot' is refused: write a number above 0 and below 2." in message
    assert "objective.widths=3 is refused: write a list of whole numbers." in message
    assert "objective.mode=5 is refused: write text, or null, in quotes where it looks like a number." in message
    assert "objective.temprature does not exist; did you mean objective.temperature?" in message


# ---- what an override's text means


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("runs/a #2", "runs/a #2"),
        ("a: b", "a: b"),
        ("2026-01-31", "2026-01-31"),
        ("0755", "0755"),
        ("1_000", "1_000"),
        ("7", "7"),
        ("yes", "yes"),
        ("'7'", "7"),
        ("{x}", "{x}"),
        ("[x", "[x"),
        ("~/runs/x", "/home/somebody/runs/x"),
    ],
)
def test_text_is_taken_as_it_stands_and_comes_back_from_the_copy(text, value, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    config = load_config("mae_cifar10", [f"run_dir={text}"], options_for)
    assert config.run_dir == value
    copied = tmp_path / "config.yaml"
    copied.write_text(config.to_yaml())
    assert load_config(copied, [], options_for) == config
    assert yaml.safe_load(copied.read_text())["run_dir"] == value  # for who reads it as YAML 1.1


def test_other_values_are_numbers_lists_and_mappings():
    overrides = [
        "optimizer.betas.0=0.8",
        "optimizer.min_lr=1e-6",
        "objective.crop_scale.1=9e-1",
        "objective.crop_scale.0=.3",
        'data.shards=["a", "b"]',
        "data.shards.0=7.tar",
        "encoder.kwargs={depth: 4, drop_path_rate: 1e-1}",
        "deepspeed={aio: {x: 1}}",
        "evaluate.train_shards=[7, a]",
        "evaluate.test_shards=b",
        "evaluate.label_names=[1, no]",
    ]
    config = load_config("mae_cifar10", overrides, options_for)
    assert config.optimizer.betas == (0.8, 0.95) and config.optimizer.min_lr == 1e-6
    assert config.objective["crop_scale"] == (0.3, 0.9)
    assert config.data.shards == ["7.tar", "b"]
    assert config.encoder.kwargs == {"depth": 4, "drop_path_rate": 0.1}
    assert config.deepspeed == {"aio": {"x": 1}}
    assert config.evaluate.train_shards == ["7", "a"] and config.evaluate.label_names == ["1", "no"]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"\xff\xfe\x00bin", "is no text"),
        (b"", "holds no settings"),
        (b"- a\n- b\n", "holds no settings"),
        (b"a: [1, 2\n", r"x.yaml is not valid YAML in line 2, column 1: expected ',' or '\]'"),
        (b"a:\n\tb: 1\n", r"in line 2, column 1: found character '\\t' that cannot start any token; correct it there"),
        (b"a: 'x\n\nb: 1\n", "in line 4, column 1: found .* scalar that begins in line 1, column 4; correct"),
        (b"a: 1\nb: \x07\n", r"in line 2, column 4: the character U\+0007 may not stand there"),
        (b"a: !!int many\n", "in line 1, column 4: !!int is not what stands there"),
        (b"a: !!set x\n", "in line 1, column 4: expected a mapping"),
        (b"[" * 1000, "brackets lie in one another too deep"),
        (b"train: {epochs: 1}\ntrain: {epochs: 2}\n", "train is there twice"),
        (b"seed: !!python/object:os.system x\n", "in line 1, column 7: .*os.system' is no tag that a recipe may have"),
        (b"1: 2\ntrain: 5\n", "train=5 is refused: write settings below it"),
    ],
)
def test_a_file_that_is_no_recipe_is_told_as_that(content, sentence, tmp_path):
    path = tmp_path / "x.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError, match=sentence) as refused:
        load_config(path, [], options_for)
    assert "unicode string" not in str(refused.value)
