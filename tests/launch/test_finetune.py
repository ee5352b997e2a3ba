"""Fine-tuning through the real launcher: killed and resumed, and two ranks against plain torch. Several findings an
image, stopped early: two ranks, one rank, and what goes on from them."""

import json
import re
import shutil
import signal
from pathlib import Path

import pytest
import several_starts
import torch
import yaml
from findings import NAMES, write_findings
from runs import Run, RunDir, deepspeed
from safetensors.torch import load_file, save_file

from prelude.data.errors import UserError
from prelude.data.loader import Loader
from prelude.data.order import Shuffle
from prelude.data.shapes import write_shards
from prelude.evaluators.finetuning import finetune
from prelude.launch import exit_codes
from prelude.launch import finetune as door
from prelude.launch.finetuning import recorded_source
from prelude.pretrain import attendance, distributed
from prelude.pretrain.config import EncoderConfig
from prelude.pretrain.encoders import build_encoder
from prelude.pretrain.optimizers import apply_schedule, build_optimizer
from prelude.pretrain.schedules import Progress

NUM_STEPS = 15  # ceil(2 epochs x 120 images / 16)
FINDINGS_STEPS = 24  # 6 epochs of 63 images in batches of 16
GONE_ON = 3  # a step whose checkpoint runs go on from
SHORT = ["train.epochs=0.5", "checkpoint.every_steps=4"]
MIXED = ["objective.mixup=0.8", "objective.cutmix=1.0", "objective.augment={}"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Labelled shapes, an exported encoder and a recipe."""
    folder = tmp_path_factory.mktemp("finetune")
    write_shards(folder / "shapes", "train", 200, image_size=16)
    write_shards(folder / "shapes", "test", 50, image_size=16)
    encoder = EncoderConfig(
        name="vit_tiny_patch16_224", image_size=16, patch_size=4, kwargs={"depth": 2, "embed_dim": 32, "num_heads": 2}
    )
    (folder / "encoder").mkdir()
    save_file(build_encoder(encoder, seed=0).state_dict(), folder / "encoder" / "model.safetensors")
    section = {"encoder": encoder.model_dump(mode="json"), "mean": [0.5] * 3, "std": [0.2] * 3, "origin": {}}
    (folder / "encoder" / "config.json").write_text(json.dumps({"prelude": section}))
    shards = {f"{part}_shards": f"{folder}/shapes/{part}-*.tar" for part in ("train", "test")}
    recipe = {
        "run_dir": str(folder / "run"),
        "data": {"num_workers": 1, "shuffle": {"window": 64}},
        "objective": {
            "per_class": 12,
            "layer_decay": 0.65,
            "label_smoothing": 0.1,
            "ema_decay": 0.8,
            "test_every_epochs": 1,
        },
        "train": {"epochs": 2, "global_batch": 16, "precision": "fp32"},
        "optimizer": {"lr": 0.02, "betas": [0.9, 0.999], "decay_tokens": False, "warmup_epochs": 0.5},
        "checkpoint": {"every_steps": 3},
        "log": {"every_steps": 1},
        "evaluate": shards,
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def start(folder: Path, name: str, *overrides: str) -> Run:
    door = ("finetune.py", str(folder / "encoder"))
    return Run(deepspeed(2), folder / "recipe.yaml", folder / name, *MIXED, *overrides, door=door)


@pytest.fixture(scope="module")
def arguments(folder, tmp_path_factory) -> list[str]:
    """Of a run on several findings an image that stops early."""
    shards = tmp_path_factory.mktemp("findings")
    recipe = {
        "run_dir": "tuned",
        "data": {"num_workers": 0, "shuffle": {"window": 64}},
        "evaluate": {
            "train_shards": write_findings(shards, "train", 90),
            "test_shards": write_findings(shards, "test", 45, first_patient=100),
            "label": "json",
            "label_names": NAMES,
            "label_field": "findings",
            "label_group": "patient",
        },
        "objective": {
            "loss": "sigmoid",
            "uncertain": "smoothed",
            "hold_out": 0.3,
            "patience": 1,
            "validate_every_epochs": 0.5,
            "ema_decay": 0.5,
        },
        "train": {"epochs": 6, "global_batch": 16, "precision": "fp32"},
        "optimizer": {"lr": 0.05, "betas": [0.9, 0.999]},
        "checkpoint": {"every_steps": 1, "keep": 30},
        "log": {"every_steps": 1},
    }
    (shards / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return [str(folder / "encoder"), "--config", str(shards / "recipe.yaml"), "--balanced"]


@pytest.fixture(scope="module")
def whole(folder, arguments) -> dict[str, RunDir]:
    """Three runs from start to end, one after the other in one launch."""
    given = [str(folder / "encoder"), "--config", str(folder / "recipe.yaml"), *MIXED]
    plan = [
        {"name": name, "door": "finetune", "argv": [*given, f"run_dir={folder / name}", *more]}
        for name, more in {"uninterrupted": ["objective.drop_path=0.2"], "two_ranks": SHORT}.items()
    ]
    plan.append({"name": "findings", "door": "finetune", "argv": [*arguments, f"run_dir={folder / 'findings'}"]})
    answers = several_starts.made(deepspeed(2), folder, plan)
    assert "stopped early, at step" in answers["findings"][1] and "AUC % by label" in answers["findings"][1]
    assert all(codes == [0, 0] for codes, _ in answers.values()), answers
    return {name: RunDir(folder / name) for name in answers}


@pytest.fixture(scope="module")
def uninterrupted(whole) -> RunDir:
    return whole["uninterrupted"]


@pytest.fixture(scope="module")
def killed(folder) -> Run:
    """The whole process group killed on its way, and the same command again."""
    start(folder, "killed", "objective.drop_path=0.2").at_step(7).signal_group(signal.SIGKILL).wait()
    assert not (folder / "killed" / "checkpoints" / f"step-{NUM_STEPS:08d}").exists()
    run = start(folder, "killed", "objective.drop_path=0.2")
    assert run.wait() == 0, run.output.read_text()[-3000:]
    return run


def result_of(run: RunDir) -> dict:
    (path,) = (run.run_dir / "evaluations").glob("fine_tune-*.json")
    return json.loads(path.read_text())


def test_killed_and_resumed_is_bitwise_the_uninterrupted_run(uninterrupted, killed):
    ours, theirs = killed.weights(NUM_STEPS), uninterrupted.weights(NUM_STEPS)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert [line["loss"] for line in killed.metrics()] == [line["loss"] for line in uninterrupted.metrics()]


def test_the_result_and_its_curve_are_the_same_after_a_kill(uninterrupted, killed):
    first, second = result_of(uninterrupted), result_of(killed)
    assert first["numbers"] == second["numbers"]
    assert first["details"]["curve"] == second["details"]["curve"]
    assert [line["step"] for line in first["details"]["curve"]] == [8, 15]
    assert first["data"]["train"]["num_samples"] == 120 and first["data"]["test"]["num_samples"] == 50
    assert first["details"]["curve"][-1]["top1"] == first["numbers"]["top1"]["value"]


def test_the_tuned_encoder_is_a_source_again(uninterrupted):
    from prelude.checkpoints.sources import open_encoder

    encoder = open_encoder(str(uninterrupted.run_dir))
    average = uninterrupted.weights(NUM_STEPS)["average.module.encoder.fc_norm.weight"]
    assert torch.equal(encoder.model.state_dict()["fc_norm.weight"], average)


def test_ranks_meet_before_they_index_and_gather_after(folder, tmp_path, monkeypatch):
    """Who meets, or is in a collective, has a limit; who gathers waits for a rank that indexes its shards."""
    happened, index = [], finetune.labelled_samples

    class Gathered(Exception):
        pass

    def gather():
        raise Gathered

    monkeypatch.setattr(distributed, "launched_world_size", lambda: 2)
    monkeypatch.setattr(distributed, "start", lambda rank_timeout: happened.append(f"met, for {rank_timeout:g} s"))
    monkeypatch.setattr(finetune, "labelled_samples", lambda *given: (happened.append("indexed"), index(*given))[1])
    monkeypatch.setattr(distributed, "gather", gather)
    monkeypatch.setattr(distributed, "from_main", lambda value: happened.append("a collective"))
    monkeypatch.setattr(attendance._Here, "moves", attendance._Here.moves)
    argv = [str(folder / "encoder"), "--config", str(folder / "recipe.yaml"), f"run_dir={tmp_path}"]
    with pytest.raises(Gathered):
        door.main([*argv, "train.rank_timeout_seconds=7"])
    assert happened[:2] == ["met, for 7 s", "indexed"] and "a collective" not in happened


def test_two_ranks_train_what_plain_torch_trains(folder, whole):
    """The same order, crops, operations, partners and mixtures; without drop path, which draws by rank."""
    run = whole["two_ranks"]
    recipe, overrides = folder / "recipe.yaml", [f"run_dir={folder / 'two_ranks'}", *MIXED, *SHORT]
    task = finetune.prepare(str(folder / "encoder"), recipe, overrides)
    model, config = finetune.build(task).train(), task.config
    initial = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = build_optimizer(model, config, model.lr_scales())
    shuffle = Shuffle(**config.data.shuffle.model_dump())
    loader = Loader(task.samples.train, model.views, seed=config.seed, micro_batch=16, shuffle=shuffle, label="cls")
    losses = []
    for step in range(4):
        progress = Progress(step, 4, 120 / 16)
        apply_schedule(optimizer.param_groups, config, progress)
        loss = model(next(loader), progress).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.after_step(progress, torch.ones(()))
        losses.append(loss.item())
    loader.close()
    assert [line["loss"] for line in run.metrics()] == pytest.approx(losses, rel=1e-5)
    ours = run.weights(4)
    for name, value in model.state_dict().items():
        if name == "classes" or name.endswith(
            "qkv.bias"
        ):  # keys' biases have no gradient but rounding, which Adam amplifies
            continue
        moved, apart = (value - initial[name]).abs().max(), (ours[name] - value).abs().max()
        assert apart <= 0.02 * moved + 1e-7, f"{name}: moved {moved:.2e}, apart {apart:.2e}"


def run_here(arguments: list[str], run_dir: Path) -> RunDir:
    assert door.main([*arguments, f"run_dir={run_dir}"]) == 0
    return RunDir(run_dir)


@pytest.fixture(scope="module")
def one(arguments, tmp_path_factory) -> RunDir:
    return run_here(arguments, tmp_path_factory.mktemp("one") / "run")


@pytest.fixture(scope="module")
def two(whole) -> RunDir:
    return whole["findings"]


def gone_on(run: RunDir, arguments: list[str], run_dir: Path) -> RunDir:
    """A run of one rank that goes on from a checkpoint of another's."""
    name = f"step-{GONE_ON:08d}"
    shutil.copytree(run.run_dir / "checkpoints" / name, run_dir / "checkpoints" / name)
    return run_here(arguments, run_dir)


def last_step(run: RunDir) -> int:
    return max(int(path.name.removeprefix("step-")) for path in (run.run_dir / "checkpoints").glob("step-*"))


def validations(run: RunDir) -> list[dict]:
    return [json.loads(line) for line in (run.run_dir / "validation.jsonl").read_text().splitlines()]


def test_the_run_ends_early_and_its_result_is_of_the_best_weights(one):
    result, curve = result_of(one), validations(one)
    best = max(curve, key=lambda line: line["auc"])
    assert last_step(one) == curve[-1]["step"] < FINDINGS_STEPS
    assert result["chosen"]["step"] == best["step"] and result["chosen"]["held_out"] == best["auc"]
    assert "early stopping" in result["chosen"]["chosen_by"]
    assert result["details"]["held_out_curve"] == curve
    assert result["data"]["held_out"]["num_samples"] == 27 and result["data"]["train"]["num_samples"] == 63
    final, then = one.weights(last_step(one)), one.weights(best["step"])
    assert torch.equal(final["held_out.kept.head.weight"], then["average.module.head.weight"])
    assert not torch.equal(final["average.module.head.weight"], then["average.module.head.weight"])
    for name in ("auc", "map"):
        low, high = result["numbers"][name]["interval"]
        assert low <= result["numbers"][name]["value"] <= high
    assert set(result["details"]["by_features"]["all weights"]["by_label"]) == set(NAMES)


def test_the_encoder_of_the_best_weights_is_what_is_taken_further(one):
    from prelude.checkpoints.sources import open_encoder

    kept = one.weights(last_step(one))["held_out.kept.encoder.fc_norm.weight"]
    assert torch.equal(open_encoder(str(one.run_dir)).model.state_dict()["fc_norm.weight"], kept)


def test_what_goes_on_is_bitwise_the_run_that_was_never_interrupted(one, arguments, tmp_path):
    again = gone_on(one, arguments, tmp_path / "run")
    end = last_step(one)
    assert last_step(again) == end
    ours, theirs = again.weights(end), one.weights(end)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert result_of(again)["numbers"] == result_of(one)["numbers"]
    assert result_of(again)["chosen"] == result_of(one)["chosen"]


def test_a_run_that_has_ended_early_trains_no_more(one, arguments):
    before = result_of(one)
    run_here(arguments, one.run_dir)
    assert result_of(one)["numbers"] == before["numbers"] and last_step(one) < FINDINGS_STEPS


def test_a_folder_that_fine_tunes_another_encoder_is_told_by_the_names_of_both(one, arguments, tmp_path):
    held, source = arguments[0], str(tmp_path / "other")
    shutil.copytree(held, source)
    weights = load_file(f"{held}/model.safetensors")
    save_file(weights | {"norm.bias": weights["norm.bias"] + 1}, f"{source}/model.safetensors")
    asked = [source, *arguments[1:], f"run_dir={one.run_dir}"]
    told = re.escape(f"{one.run_dir} holds the fine-tuning of {held}; write run_dir=... for that of {source}.")
    with pytest.raises(UserError, match=told):
        door.main(asked)
    with pytest.raises(UserError, match=told):
        door.main([*asked, "--dry-run"])
    (one.run_dir / "environment.json").rename(tmp_path / "away")
    try:
        assert recorded_source(one.run_dir) == held  # by its result, as in runs of before
    finally:
        (tmp_path / "away").rename(one.run_dir / "environment.json")
    shutil.copytree(one.run_dir / "checkpoints", tmp_path / "bare" / "checkpoints")
    with pytest.raises(UserError, match="bare holds the fine-tuning of another encoder; write run_dir="):
        door.main([*asked[:-1], f"run_dir={tmp_path / 'bare'}"])


def test_a_curve_that_cannot_be_read_is_missing_in_the_result_and_ends_no_run(one, arguments, tmp_path, monkeypatch):
    shutil.copytree(one.run_dir, tmp_path / "run", ignore=shutil.ignore_patterns("evaluations"))
    read = Path.read_bytes

    def refused(path):
        if path.name == "validation.jsonl":
            raise PermissionError(13, "Permission denied")
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", refused)
    again = run_here(arguments, tmp_path / "run")
    assert result_of(again)["details"]["held_out_curve"] == []
    assert result_of(again)["numbers"] == result_of(one)["numbers"]


def test_two_ranks_train_and_decide_as_one(one, two):
    assert [line["loss"] for line in two.metrics()] == pytest.approx([line["loss"] for line in one.metrics()], rel=1e-4)
    assert last_step(two) == last_step(one)
    assert len(validations(two)) == len(validations(one))
    for ours, theirs in zip(validations(two), validations(one), strict=True):
        assert ours == pytest.approx(theirs)
    assert result_of(two)["numbers"]["auc"]["value"] == pytest.approx(result_of(one)["numbers"]["auc"]["value"])


def test_one_rank_goes_on_from_two(two, arguments, tmp_path):
    again = gone_on(two, arguments, tmp_path / "run")
    assert last_step(again) == last_step(two) and result_of(again)["chosen"]["step"] == result_of(two)["chosen"]["step"]
    expected = [line["loss"] for line in two.metrics() if line["step"] > GONE_ON]
    assert [line["loss"] for line in again.metrics()] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("mixing", ["mixup", "cutmix"])
def test_a_dry_run_plans_images_that_are_mixed(mixing, arguments, tmp_path, capsys):
    assert door.main([*arguments, f"run_dir={tmp_path / 'run'}", f"objective.{mixing}=0.8", "--dry-run"]) == 0
    assert "memory" in capsys.readouterr().out


def test_a_dry_run_tells_what_is_held_out(arguments, tmp_path, capsys):
    assert door.main([*arguments, f"run_dir={tmp_path / 'run'}", "--dry-run"]) == 0
    told = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "63 images of 3 findings" in told and "held out 27 images" in told and not (tmp_path / "run").exists()


def test_a_dry_run_says_what_a_start_would_find_and_changes_nothing(one, arguments, tmp_path, capsys):
    def told(run_dir: Path, *overrides: str) -> tuple[int, str]:
        code = exit_codes.door(lambda: door.main([*arguments, f"run_dir={run_dir}", *overrides, "--dry-run"]))
        said = capsys.readouterr()
        return code, " ".join(f"{said.out} {said.err}".split())

    def there(run_dir: Path) -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")}

    half, name = tmp_path / "half", f"step-{GONE_ON:08d}"
    shutil.copytree(one.run_dir / "checkpoints" / name, half / "checkpoints" / name)
    before = there(half) | there(one.run_dir)
    for run_dir, overrides, code, expected in (
        (tmp_path / "new", [], 0, "a start would begin anew:"),
        (half, [], 0, f"a start would resume at step {GONE_ON} of {FINDINGS_STEPS}, from {name}"),
        (one.run_dir, [], 0, f"ended early, at step {last_step(one)} of {FINDINGS_STEPS}: a start would train nothing"),
        (half, ["optimizer.lr=0.5"], 2, "optimizer.lr: 0.05 -> 0.5"),
        (
            half,
            ["train.epochs=0.5", "resume.allow_changed_config=true"],
            2,
            f"{name} has done {GONE_ON} steps, and this run ends at step 2",
        ),
    ):
        found, said = told(run_dir, *overrides)
        assert found == code and expected in said and ("a start would be refused" in said) == (code == 2), said
    assert there(half) | there(one.run_dir) == before and not (tmp_path / "new").exists()


def test_steps_are_measured_of_a_run_that_holds_out_and_holds_its_encoder_still(arguments, tmp_path, capsys):
    command = [*arguments, f"run_dir={tmp_path / 'run'}", "train.freeze_encoder_steps=12", "--dry-run", "--measure"]
    assert door.main(command) == 0
    assert "measured with 1 rank on cpu" in " ".join(capsys.readouterr().out.split())
    assert not (tmp_path / "run").exists()


def test_what_deepspeed_refuses_is_a_sentence_before_anything_is_built(arguments, tmp_path):
    passed = ["train.zero_stage=1", "deepspeed.zero_optimization.mics_shard_size=2"]
    with pytest.raises(UserError, match="is refused by DeepSpeed: MiCS"):
        door.main([*arguments, f"run_dir={tmp_path / 'run'}", *passed])
    distributed.stop()
    assert not (tmp_path / "run").exists()
