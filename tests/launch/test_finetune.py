"""Fine-tuning through the real launcher: killed and resumed, and two ranks against plain torch."""

import json
import signal
from pathlib import Path

import pytest
import several_starts
import torch
import yaml
from runs import Run, RunDir, deepspeed
from safetensors.torch import save_file

from prelude.data.loader import Loader
from prelude.data.order import Shuffle
from prelude.data.shapes import write_shards
from prelude.evaluators.finetuning import finetune
from prelude.pretrain.config import EncoderConfig
from prelude.pretrain.encoders import build_encoder
from prelude.pretrain.optimizers import apply_schedule, build_optimizer
from prelude.pretrain.schedules import Progress

NUM_STEPS = 15  # ceil(2 epochs x 120 images / 16)
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
def whole(folder) -> dict[str, RunDir]:
    """Two runs from start to end, one after the other in one launch."""
    given = [str(folder / "encoder"), "--config", str(folder / "recipe.yaml"), *MIXED]
    plan = [
        {"name": name, "door": "finetune", "argv": [*given, f"run_dir={folder / name}", *more]}
        for name, more in {"uninterrupted": ["objective.drop_path=0.2"], "two_ranks": SHORT}.items()
    ]
    answers = several_starts.made(deepspeed(2), folder, plan)
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
