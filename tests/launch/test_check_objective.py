"""The contract of objectives: those that ship and the one that the docs build keep it, and what breaks it is caught."""

import inspect
import os
import re
import subprocess
import sys

import broken_objectives
import pytest
import yaml
from runs import LAUNCHED, ROOT

from prelude.data.errors import UserError
from prelude.launch import check_objective, objective_report
from prelude.launch.objective_checks import CHECKS, Subject
from prelude.objectives import OURS

VIT = {
    "name": "vit_tiny_patch16_224",
    "image_size": 16,
    "patch_size": 4,
    "kwargs": {"depth": 1, "embed_dim": 16, "num_heads": 2, "drop_path_rate": 0.2},
}
WITH_CLASS_TOKEN = VIT | {"kwargs": VIT["kwargs"] | {"class_token": True, "global_pool": "avg", "fc_norm": False}}
RESNET = {
    "name": "resnet10t",
    "image_size": 32,
    "kwargs": {"channels": [4, 6, 8, 12], "stem_width": 8, "layers": [1, 1, 1, 1], "output_stride": 8},
}
CONVNEXT = {
    "name": "convnextv2_atto",
    "image_size": 32,
    "patch_size": 1,
    "kwargs": {"depths": [1, 1, 1, 1], "dims": [4, 6, 8, 12]},
}
SWIN = {
    "name": "swin_tiny_patch4_window7_224",
    "image_size": 16,
    "patch_size": 2,
    "kwargs": {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4},
}
MAE = {"name": "mae", "decoder_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2}
SHIPPED = {
    "mae": (MAE, VIT),
    "ijepa": ({"name": "ijepa", "predictor_dim": 16, "predictor_depth": 1}, VIT),
    "dseqjepa": (
        {"name": "dseqjepa", "predictor_dim": 16, "predictor_depth": 1, "lambda_start": 1.0},
        WITH_CLASS_TOKEN,
    ),
    "barlow_twins": ({"name": "barlow_twins", "projector": [24, 12]}, RESNET),
    "vicreg": ({"name": "vicreg", "projector": [24, 12]}, RESNET),
    "fcmae": ({"name": "fcmae", "decoder_dim": 16}, CONVNEXT),
    "simmim": ({"name": "simmim", "mask_patch": 4, "target_window": 7}, SWIN),
    "lejepa": ({"name": "lejepa", "projector": [24, 12], "num_directions": 16, "num_local": 2}, RESNET),
    "msbreg": ({"name": "msbreg", "projector": [24, 12], "predictor": [16]}, RESNET),
    "rotation": ({"name": "rotation"}, RESNET),
    "spark": ({"name": "spark", "decoder_dim": 16}, CONVNEXT),
    "uni4eye": (MAE | {"name": "uni4eye", "volume_size": [8, 8, 8], "volume_patch": 4}, VIT),
    "broken_objectives:Sound": ({"name": "broken_objectives:Sound"}, RESNET),
}


def recipe_of(folder, objective, encoder):
    path = folder / "recipe.yaml"
    data = {"shards": "nowhere-{000..003}.tar"}
    train, optimizer = {"epochs": 1, "global_batch": 16}, {"lr": 1e-3}
    values = {"run_dir": "runs/none", "data": data, "encoder": encoder, "objective": objective}
    path.write_text(yaml.safe_dump(values | {"train": train, "optimizer": optimizer}))
    return path


def quick(folder, name, objective=None, encoder=VIT) -> dict[str, objective_report.Verdict]:
    recipe = recipe_of(folder, objective or {"name": name}, encoder)
    subject = Subject(objective_report.checked_config(name, str(recipe), []))
    return {verdict.name: verdict for verdict in objective_report.verdicts(subject, quick=True)}


ENVIRONMENT = LAUNCHED | {"CUDA_VISIBLE_DEVICES": ""}  # as the door sets it, for this process alone


@pytest.fixture
def door(monkeypatch, capsys):
    """`door(arguments)`: (exit code, what it told). The ranks that it starts are processes of their own."""
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)

    def door(*arguments) -> tuple[int, str]:
        code = check_objective.main([*map(str, arguments)])
        return code, capsys.readouterr().out

    return door


def blocks(language: str) -> list[str]:
    page = (ROOT / "docs" / "adding_an_objective.md").read_text()
    return re.findall(rf"^```{language}\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("name", SHIPPED)
def test_every_objective_that_ships_keeps_the_contract(name, tmp_path):
    found = quick(tmp_path, name, *SHIPPED[name])
    of_volumes = [f"{check} (volumes)" for check in CHECKS] if name == "uni4eye" else []
    assert list(found) == [*CHECKS, *of_volumes]
    assert [str(verdict) for verdict in found.values() if not verdict.passed] == []


def test_no_objective_that_ships_is_left_out():
    assert set(OURS) < set(SHIPPED)


CAUGHT = {
    "UsesTorchsGenerator": ("draws", "where torch's global generator is seeded otherwise; draw masks and noise from"),
    "UsesNumpysGenerator": ("draws", "where NumPy's global generator"),
    "UsesPythonsGenerator": ("draws", "where Python's global generator"),
    "IgnoresItsInput": ("responds", "for other images too"),
    "StopsTheGradient": ("responds", "No gradient reaches the encoder"),
    "SumsOverTheBatch": ("average", "take the mean over samples"),
    "DrawsByPlaceInTheBatch": ("average", "draw by seeds and not by places in the batch"),
    "ComparesWithinTheBatch": ("average", "write accumulates=False"),
    "ReadsAValue": ("host waits", "1 time a step, first by _local_scalar_dense at helpers/broken_objectives.py:"),
    "ChoosesByAValue": ("host waits", "broken_objectives.py:"),
    "IndexesByAMask": ("host waits", "3 times a step, first by index at helpers/broken_objectives.py:"),
    "CountsInAnAttribute": ("state", "After a resume the third step has the loss"),
    "KeepsAnAverageInAnAttribute": ("state", "in parameters or buffers"),
    "FollowsRefusedSteps": ("refused step", "changes teacher"),
    "CountsRefusedSteps": ("refused step", "after_step changes steps though the step was refused"),
    "ExportsItsHeadToo": ("exported encoder", "is not the config's encoder"),
    "ExportsACopy": ("exported encoder", "no submodule"),
    "DividesByNothingInBf16": ("bf16", "In bf16 the loss is not finite"),
    "TakesItsLossInBf16": ("bf16", "the loss is taken in bf16"),
    "MovesWhenItDraws": ("pictures", "changes head.weight"),
    "DrawsInAnotherMode": ("pictures", "in another mode"),
    "ReadsLabels": ("labels", "depends on batch.labels"),
    "ReturnsANumber": ("forward", "returns a Tensor"),
    "ReturnsALossASample": ("forward", "it is one finite number"),
    "LogsWithAGradient": ("forward", "The part error of the loss is no detached scalar"),
    "ChangesTheBatch": ("forward", "changes batch.views in place"),
    "HasNoViews": ("forward", "self.views is no ViewPlan"),
    "RaisesInForward": ("forward", r"It raises RuntimeError in line \d+ of broken_objectives.py"),
}


@pytest.mark.parametrize("name", CAUGHT)
def test_a_broken_promise_is_caught_by_its_check(name, tmp_path, monkeypatch):
    check, words = CAUGHT[name]
    monkeypatch.setattr(objective_report, "CHECKS", {each: CHECKS[each] for each in dict.fromkeys(["forward", check])})
    found = quick(tmp_path, f"broken_objectives:{name}")
    assert not found[check].passed and re.search(words, found[check].sentence), found[check].sentence


@pytest.mark.parametrize(
    ("name", "failing"),
    [
        ("LogsWithAGradient", {"forward"}),  # a pass that other checks can look at
        ("FailsTwice", {"forward", "refused step", "exported encoder"}),
        ("RaisesInForward", {"forward"}),
        ("HasNoViews", {"forward"}),
        ("RaisesAtTheStart", {"forward"}),
        ("ReturnsANumberOfACopy", {"forward", "exported encoder"}),
    ],
)
def test_what_can_still_be_asked_after_a_failure_is_asked(name, failing, tmp_path):
    found = quick(tmp_path, f"broken_objectives:{name}")
    assert list(found) == list(CHECKS)
    assert {check for check, verdict in found.items() if verdict.passed is False} == failing
    skipped = {check for check, verdict in found.items() if verdict.passed is None}
    needs_a_pass = set(CHECKS) - {"forward", "exported encoder"}
    expected = set() if name in ("LogsWithAGradient", "FailsTwice") else needs_a_pass
    assert skipped - {"exported encoder"} == expected
    assert ("exported encoder" in skipped) == (name == "RaisesAtTheStart")
    assert all(str(found[check]).startswith("skip") for check in skipped)


def test_what_was_not_run_is_counted(tmp_path, door):
    code, said = door("broken_objectives:RaisesInForward", "--config", recipe_of(tmp_path, MAE, VIT))
    assert code == 1 and len(re.findall("^skip", said, re.MULTILINE)) == len(CHECKS) - 2 + 5
    assert (
        said.splitlines()[-1]
        == f"broken_objectives:RaisesInForward: 1 check failed, {len(CHECKS) + 3} could not be run"
    )


def test_every_broken_objective_is_looked_at():
    classes = {
        n for n, c in vars(broken_objectives).items() if inspect.isclass(c) and issubclass(c, broken_objectives.Sound)
    }
    several = {"FailsTwice", "RaisesAtTheStart", "ReturnsANumberOfACopy"}
    assert classes == {*CAUGHT, *several, "Sound", "KeepsStatisticsOfARank"}
    assert {check for check, _ in CAUGHT.values()} == set(CHECKS)


def test_what_only_ranks_and_zero_show_is_caught_there(tmp_path, door):
    recipe = recipe_of(tmp_path, MAE, VIT)
    code, said = door("broken_objectives:KeepsStatisticsOfARank", "--config", recipe)
    words = " ".join(said.split())
    assert code == 1, said
    assert "FAIL ranks: The first step's gradient at 2 ranks is another in" in words
    assert re.search(r"FAIL ZeRO: .*max_zero_stage = 2", words), said
    assert "pass resume:" in words and "pass export:" in words
    assert words.endswith("2 checks failed")


def test_the_objective_of_the_page_keeps_the_contract(tmp_path):
    (tmp_path / "denoising.py").write_text(blocks("python")[0])
    (tmp_path / "denoising.yaml").write_text(blocks("yaml")[0])
    small = ["encoder.kwargs.depth=1", "encoder.kwargs.embed_dim=16", "encoder.kwargs.num_heads=2"]
    command = [sys.executable, "-m", "prelude.launch.prelude", "check-objective", "denoising:Denoising"]
    done = subprocess.run(
        [*command, "--config", "denoising.yaml", *small, "objective.noise=0.7"],
        cwd=tmp_path, env=os.environ | ENVIRONMENT, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    said = done.stdout
    assert done.returncode == 0, said + done.stderr
    lines = [line for line in said.splitlines() if line.startswith("pass")]
    assert len(lines) == len(CHECKS) + len(objective_report.RUN_CHECKS)
    assert (said + done.stderr).splitlines()[-1] == "denoising:Denoising keeps the contract"


def test_mae_around_a_users_own_network_keeps_it_at_ranks_and_under_zero(tmp_path, door):
    own = {"name": "own_networks:small_transformer", "image_size": 16}
    code, said = door("mae", "--config", recipe_of(tmp_path, MAE, own))
    assert code == 0, said
    assert "ZeRO stages 0 to 3 end at the same weights" in said


def test_the_page_names_every_check_and_every_part():
    page = (ROOT / "docs" / "adding_an_objective.md").read_text()
    named = re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)
    assert set(named) >= {*CHECKS, *objective_report.RUN_CHECKS}
    from prelude.pretrain.objective import Objective

    own = {
        n for n, v in vars(Objective).items() if not n.startswith("_") and (inspect.isfunction(v) or n in ("check",))
    }
    assert own <= set(named)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["mea"], "objective.name=mea is not known; did you mean mae?"),
        (["broken_objectives:Nothing"], "has no Nothing"),
        (["mae", "objective.mask_rate=0.5"], "did you mean objective.mask_ratio"),
        (["barlow_twins", "--quick", "objective.projector=[1]"], "write the widths of one or more layers"),
    ],
)
def test_a_mistake_in_the_command_is_one_sentence(arguments, words, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # as the door sets it, for this process alone
    with pytest.raises(UserError) as caught:
        check_objective.main([*arguments, "--config", str(recipe_of(tmp_path, MAE, VIT))])
    assert words in str(caught.value)
