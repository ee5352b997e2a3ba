"""The pages that are made from the code say what the code does: every key, every command, every error."""

import ast
import json
import re
from pathlib import Path

import commands
import configuration
import messages
import pytest

from prelude.data.errors import RunStopped, UserError
from prelude.evaluators.finetuning.recipe import FineTuneOptions, options_for
from prelude.launch import prelude
from prelude.launch.exit_codes import door
from prelude.launch.key_meanings import meaning
from prelude.objectives import options_for as objective_options
from prelude.objectives.options import OPTIONS
from prelude.pretrain.config import Config
from prelude.pretrain.config_keys import Keys
from prelude.pretrain.recipes import SHIPPED, load_config, read_recipe

ROOT = Path(__file__).resolve().parents[2]
MODELS = {None: Config, **OPTIONS, "fine_tune": FineTuneOptions}


@pytest.fixture(scope="module")
def page() -> str:
    return configuration.page()


@pytest.mark.parametrize("name", MODELS, ids=str)
def test_every_key_has_a_meaning(name):
    """Write it as a comment at the key's line: it is what the reference says."""
    keys = list(configuration.keys_of(MODELS[name], ""))
    assert [key.name for key in keys if not key.meaning] == []
    assert all(len(key.meaning.split()) > 1 or key.meaning[0].isalpha() for key in keys)


def test_every_key_that_a_config_takes_is_on_the_page(page):
    told = set(re.findall(r'<dt id="([^"]+)">', page))
    for name, model in MODELS.items():
        if name is None:
            wanted = {key for key in Keys().all() if not key.startswith("objective")} | {"objective"}
        else:
            own = {key.removeprefix("objective.") for key in Keys(model).all() if key.startswith("objective.")}
            wanted = {f"{name}.objective.{key}" for key in own - {"name"}}
        assert wanted <= {key.replace(".NAME.", ".") for key in told} | told
    assert "data.mix.NAME.weight" in told


def entry(page: str, anchor: str) -> str:
    return re.search(rf'<dt id="{re.escape(anchor)}">.*?</dd>', page, re.DOTALL)[0]


def test_an_entry_has_type_default_meaning_and_recipes(page):
    mask_ratio = entry(page, "mae.objective.mask_ratio")
    assert "a number above 0 and below 1; default <code>0.75</code>" in mask_ratio
    assert "Share of the patches that is hidden." in mask_ratio
    assert "must be written" in entry(page, "optimizer.lr")
    epochs = entry(page, "train.epochs")
    for path in SHIPPED.glob("*.yaml"):
        value = json.dumps(read_recipe(path)["train"]["epochs"])
        assert re.search(rf"<li><code>{re.escape(value)}</code> [^<]*\b{path.stem}\b", epochs)


def test_a_key_that_is_defined_anew_keeps_its_meaning():
    second = OPTIONS["vicreg"].model_fields["view_2"].annotation
    assert meaning(second, "solarise") == meaning(second.__mro__[1], "solarise") != ""


@pytest.mark.parametrize("recipe", ["mae_vit_base", "vicreg_cifar10", "quickstart"])
def test_what_recipes_set_is_what_they_are_loaded_with(recipe):
    """The page is read off the files; what a run takes is read off its config."""
    config = load_config(recipe, ["data.shards=any"], objective_options)
    found = configuration.settings_of_recipes()
    own = {key: value for (of, key), used in found.items() for value, names in used.items() if recipe in names
           and of in (None, config.objective["name"])}  # fmt: skip
    assert len(own) > 8
    plain = json.loads(config.model_dump_json())
    for key, value in own.items():
        if key not in ("data.shards", "evaluate.train_shards"):
            section = plain
            for part in key.split("."):
                section = section[part]
            assert section == json.loads(value) or type(section) is float and section == float(json.loads(value))


def test_the_page_of_commands_has_the_help_of_every_command():
    page = commands.page()
    for name in prelude.COMMANDS:
        assert f"\n## `prelude {name}`\n" in page and f"usage: prelude {name}" in page
    assert "### `prelude shards verify`" in page and "--val-share" in page


@pytest.fixture(scope="module")
def told() -> list[messages.Message]:
    return [message for path in messages.sources() for message in messages.messages(path)]


def as_pattern(text: str) -> re.Pattern:
    """What a sentence on the page allows where something is filled in, and where the code chooses between texts."""
    put = {"⟨": "(?:", "|": "|", "⟩": ")", "…": ".*"}
    parts = re.findall(r"‹.*?›|[⟨|⟩…]|[^‹⟨|⟩…]+", text)
    return re.compile("".join(put.get(part, ".*" if part[0] == "‹" else re.escape(part)) for part in parts), re.DOTALL)


# Texts that are handed on: they are told by whoever raised them first, and stand on the page there.
HANDED_ON = re.compile(
    r"refusal|failure|verdict|stop_reason|no_data|store\.get|mistake|sentence\.replace|arrays\['stopped'\]|kind\)|why\)"
)


def test_no_error_that_the_code_raises_is_left_out(told):
    """Against a count of its own: every `UserError(` and `RunStopped(` of the source, line by line."""
    there = {(message.path, message.line) for message in told}
    for path in messages.sources():
        tree, name = ast.parse(path.read_text()), str(path.relative_to(ROOT))
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("UserError", "RunStopped", "Stopped"):
                at = name, node.lineno
                assert at in there or HANDED_ON.search(ast.unparse(node)), (at, ast.unparse(node))


MISTAKES = [
    ["knm"],
    ["--completion", "fish"],
    ["pretrain", "--config", "mae_cifr10"],
    ["pretrain", "--config", "mae_cifar10", "data.shards=/nowhere/{000..003}.tar"],
    ["pretrain", "--config", "mae_cifar10", "data.shards=/nowhere/*.tar"],
    ["pretrain", "--config", "mae_cifar10", "--ranks", "2"],
    ["pretrain", "--config", "mae_cifar10", "seed=1", "seed=2"],
    ["finetune", "runs/x", "--config", "finetune_vit_cifar10", "encoder.name=resnet18"],
    ["knn", "pixels", "--train", "nowhere.tar"],
    ["probe", "pixels", "--epochs", "3"],
]


@pytest.mark.parametrize("words", MISTAKES, ids=" ".join)
def test_what_a_door_says_is_on_the_page(words, told, capsys):
    assert door(lambda: prelude.main(words)) == 2
    (said,) = re.findall(r"^error: (.*)$", capsys.readouterr().err, re.MULTILINE)
    assert any(as_pattern(message.text).fullmatch(said) for message in told if message.code == "2"), said


@pytest.mark.parametrize("setting", ["train.epochs=0", "train.epoch=1", "optimizer.name=sgd", "objective.mask_block=a"])
def test_what_is_said_of_a_setting_is_on_the_page(setting, told):
    with pytest.raises(UserError) as refused:
        load_config("mae_cifar10", ["data.shards=any", "optimizer.betas=[0.9, 0.9]", setting], objective_options)
    for said in str(refused.value).splitlines()[1:]:
        patterns = [as_pattern(message.text) for message in told if "write" in message.text or "not" in message.text]
        assert any(
            pattern.fullmatch(said.strip().rstrip(".")) or pattern.fullmatch(said.strip()) for pattern in patterns
        )


def test_codes_are_those_of_the_classes(told):
    assert messages.CODES["UserError"] == str(UserError.exit_code)
    assert messages.CODES["RunStopped"] == str(RunStopped.exit_code)
    assert {message.code for message in told} == {"", "2", "3", "75"}


def test_every_file_has_a_topic_and_every_topic_has_sentences(told):
    assert {messages.topic_of(message.path) for message in told} == set(messages.TOPICS)


def test_what_troubleshooting_quotes_is_what_is_said(told):
    section = (ROOT / "docs" / "troubleshooting.md").read_text().partition("## What is met most")[2]
    first = [line.split("|")[1] for line in section.splitlines() if line.startswith("| ")][2:]
    quoted = [
        quote for cell in first for quote in re.findall(r"`([^`]+)`", cell) if " " in quote and "CUDA" not in quote
    ]
    assert len(quoted) > 10
    plain = [re.sub(r"‹.*?›|[⟨⟩|]", "", message.text) for message in told]
    for quote in quoted:
        fixed = [part.strip() for part in quote.split("…") if part.strip(" …")]
        assert any(all(part in text for part in fixed) for text in plain), quote


def test_troubleshooting_has_every_exit_code():
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    said = set(re.findall(r"^\| (\d+) \|", page, re.MULTILINE))
    assert {
        "0",
        "1",
        *re.findall(r"(\d+) [a-z]", (ROOT / "launch" / "exit_codes.py").read_text().partition('"""\n')[0]),
    } <= said


def test_fine_tuning_recipes_are_counted_as_such():
    assert options_for("fine_tune") is FineTuneOptions
    assert any(of == "fine_tune" for of, key in configuration.settings_of_recipes())
