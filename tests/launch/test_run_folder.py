"""What a start does to its run folder: nothing where it is refused, and no log is worth a run."""

import errno
import json
import os
import re
import shutil
import stat
import sys
from pathlib import Path

import pytest
import several_starts
from runs import Run, deepspeed

from prelude.checkpoints.manifest import MANIFEST
from prelude.checkpoints.sources import open_encoder
from prelude.checkpoints.store import Store
from prelude.evaluators.judging import first_section
from prelude.launch.run_folder import not_written
from prelude.pretrain.run_lock import NAME, RunLock

LOGS = ("config.yaml", "environment.json", "metrics.jsonl", "online.jsonl", "deepspeed.log")
SHORT = ["checkpoint.every_steps=3", "log.pictures_every_steps=2", "train.epochs=0.5", "optimizer.warmup_epochs=0.1"]


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def given(overrides: list[str]) -> list[str]:
    """These, and what makes a run short where they do not say otherwise."""
    keys = {override.partition("=")[0] for override in overrides}
    return [*(setting for setting in SHORT if setting.partition("=")[0] not in keys), *overrides]


def in_format(number: int, run: Path) -> None:
    """As if another version had written the run's checkpoints."""
    for path in run.glob(f"checkpoints/*/{MANIFEST}"):
        path.write_text(json.dumps({"format": number, "serial": 9, "parts": "elsewhere"}))


@pytest.fixture(scope="module")
def start(recipe, tmp_path_factory):
    """`start(folder, {name: overrides})`: starts one after another in one process; returns {name: (code, told)}."""

    def start(folder: Path, overrides: dict[str, list[str]], **more) -> dict[str, tuple]:
        plan = [
            {"name": name, "argv": ["--config", str(recipe), *given(each)], **more} for name, each in overrides.items()
        ]
        answers = several_starts.made([sys.executable], folder, plan)
        return {name: (code, told) for name, ((code,), told) in answers.items()}

    return start


@pytest.fixture(scope="module")
def folder(start, tmp_path_factory) -> Path:
    """A finished run of 7 steps (half an epoch of 12.5) in `run`, and copies of it to be spoilt."""
    folder = tmp_path_factory.mktemp("starts")
    ((code, told),) = start(folder, {"first": [f"run_dir={folder / 'run'}"]}, umask=0o002).values()
    assert code == 0, told
    for name in ("changed", "foreign", "batch"):
        shutil.copytree(folder / "run", folder / name)
    in_format(4, folder / "foreign")
    return folder


REFUSED = {
    "another seed": ("run", ["seed=1"], "seed: 0 -> 1"),
    "another depth": ("run", ["encoder.kwargs.depth=1"], r"depth: \d -> 1\); write another run_dir, .*allow_changed"),
    "another model": (
        "run",
        ["encoder.kwargs.depth=1", "resume.allow_changed_config=true"],
        "run/checkpoints/step-00000007 belongs to another model: .* write another run_dir",
    ),
    "past its end": ("run", ["train.epochs=0.25", "resume.allow_changed_config=true"], "done 7 steps, .* at step 4"),
    "back to its own": ("run", ["resume.checkpoint=RUN/checkpoints/step-00000006"], "goes on from step-00000007"),
    "of another format": ("foreign", [], "step-00000007: it is of format 4.*step-00000006"),
    "begun at an end": ("fresh", ["resume.checkpoint=RUN/checkpoints/step-00000007"], "Nothing is left to train"),
    "begun nowhere": ("deep/fresh", ["resume.checkpoint=/nowhere/step-00000005"], "/nowhere/step-00000005"),
    "a stop that stays": ("stuck", [], "STOP ended an earlier start.* remove it"),
    "through a link": ("linked", [], "checkpoints is a symbolic link"),
}


@pytest.fixture(scope="module")
def refused(start, folder) -> dict[str, tuple]:
    (folder / "run" / "STOP").touch()
    (folder / "linked").mkdir()
    (folder / "stuck" / "STOP").mkdir(parents=True)
    (folder / "linked" / "checkpoints").symlink_to(folder / "run" / "checkpoints")
    overrides = {
        name: [f"run_dir={folder / run}", *(each.replace("RUN", str(folder / "run")) for each in changes)]
        for name, (run, changes, _) in REFUSED.items()
    }
    before = {run: snapshot(folder / run) for run, *_ in REFUSED.values()}
    answers = start(folder, overrides)
    after = {run: snapshot(folder / run) for run, *_ in REFUSED.values()}
    (folder / "run" / "STOP").unlink()
    return {name: (*answers[name], before[run], after[run]) for name, (run, *_) in REFUSED.items()}


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_start_says_why_and_changes_nothing(refused, name):
    _, _, expected = REFUSED[name]
    code, told, before, after = refused[name]
    assert code == 2 and re.search(expected, told) and "Traceback" not in told
    assert after.keys() == before.keys()
    assert all(after[path] == before[path] for path in before)


def test_folders_that_were_made_for_a_refused_start_are_gone(refused, folder):
    assert not (folder / "deep").exists() and not (folder / "fresh").exists()


OUTLOOKS = {
    "anew": ("nowhere/yet", [], 0, "a start would begin anew: .* would be made"),
    "at its end": ("run", [], 0, "finished at step 7: a start would train nothing"),
    "half way": ("half", [], 0, "a start would resume at step 6 of 7, from step-00000006"),
    "longer": ("run", ["train.epochs=1", "resume.allow_changed_config=true"], 0, "would resume at step 7 of 13"),
    "other settings": ("run", ["optimizer.lr=0.5"], 2, "a start would be refused.*error: .*optimizer.lr: 0.01 -> 0.5"),
    "other data": ("run", ["data.shuffle.window=3"], 2, "a start would be refused.*shuffle.window"),
    "unread": ("foreign", [], 2, "error: .*it is of format 4"),
    "in use": ("held", [], 2, "would be refused.*is in use by process"),
    "no folder": ("taken", [], 2, "would be refused.*Not a directory.*; write another run_dir"),
    "from nowhere": ("anew", ["resume.checkpoint=/nowhere/step-00000005"], 2, "/nowhere/step-00000005 is no complete"),
}


@pytest.fixture(scope="module")
def foreseen(start, folder) -> dict[str, tuple]:
    """Each run folder looked at by --dry-run, and whether it is as it was."""
    shutil.copytree(folder / "run", folder / "half")
    shutil.rmtree(folder / "half" / "checkpoints" / "step-00000007")
    (folder / "taken").touch()
    lock = RunLock(folder / "held")
    lock.hold()
    before = snapshot(folder)
    answers = start(
        folder,
        {
            f"outlook {name}": ["--dry-run", f"run_dir={folder / run}", *more]
            for name, (run, more, *_) in OUTLOOKS.items()
        },
    )
    lock.release()
    (folder / "taken").unlink()
    after = snapshot(folder)
    ours = {path for path in after if path.endswith((".json", ".out", ".code")) and "/" not in path}
    changed = {path for path, content in after.items() if path not in ours and before.get(path) != content}
    return {name: (*answers[f"outlook {name}"], changed) for name in OUTLOOKS}


@pytest.mark.parametrize("name", OUTLOOKS)
def test_a_dry_run_says_what_a_start_would_find_and_changes_nothing(foreseen, name):
    *_, expected_code, expected = OUTLOOKS[name]
    code, told, changed = foreseen[name]
    assert code == expected_code and "Traceback" not in told
    assert re.search(expected, " ".join(told.replace("│", " ").split())), told
    assert not changed


def test_a_full_disk_is_to_be_freed_and_another_fault_is_not(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    full, closed = OSError(errno.ENOSPC, "No space left on device"), OSError(errno.EACCES, "Permission denied")
    assert "free space" in not_written(tmp_path, full) and "another" not in not_written(tmp_path, full)
    assert "make it writable" in not_written(tmp_path, closed)
    assert "write another run_dir" in not_written(tmp_path / "new", closed)


def test_files_honour_the_umask(folder):
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (folder / "run").rglob("*") if path.is_file()}
    assert {"model.safetensors", "manifest.json", "config.yaml", "metrics.jsonl", "latest"} <= modes.keys()
    assert set(modes.values()) == {0o664}


@pytest.fixture(scope="module")
def accepted(start, folder) -> dict[str, tuple]:
    """A begin at another run's checkpoint, twice the same command; a changed batch; a run that can write no log."""
    spoilt, linked = folder / "spoilt", folder / "linked_logs"
    for name in LOGS:
        (spoilt / name).mkdir(parents=True)
    for name in ("tensorboard", "pictures"):
        (spoilt / name).touch()
    linked.mkdir()
    for name in LOGS:
        (folder / f"precious-{name}").write_text("precious\n")
        (linked / name).symlink_to(folder / f"precious-{name}")
    (folder / "precious").mkdir()
    for name in ("tensorboard", "pictures"):
        (linked / name).symlink_to(folder / "precious")
    begin = [f"run_dir={folder / 'begun'}", f"resume.checkpoint={folder / 'run' / 'checkpoints' / 'step-00000006'}"]
    allowed = ["resume.allow_changed_config=true"]
    return start(
        folder,
        {
            "begun": [*begin, "train.epochs=0.75", *allowed],
            "begun again": [*begin, "train.epochs=0.75", *allowed],
            "batch": [f"run_dir={folder / 'batch'}", "train.global_batch=8", "train.epochs=1", *allowed],
            "spoilt": [f"run_dir={spoilt}"],
            "linked": [f"run_dir={linked}"],
        },
    )


def test_the_same_command_begins_at_a_checkpoint_once_and_then_goes_on_from_its_own(accepted, folder):
    code, told = accepted["begun"]
    assert code == 0 and "resumed at step 6 of 10" in told
    code, told = accepted["begun again"]
    assert code == 0 and "finished at step 10 of 10" in told and "nothing is left to train" in told


def test_a_changed_batch_counts_progress_in_samples_and_tells_what_it_does(accepted, folder):
    code, told = accepted["batch"]
    assert code == 0 and "resumed at step 14 of 25" in told
    assert "7 steps, or 112 images, count as 14 steps" in told and "the learning rate jumps here" in told
    state = json.loads((Store(folder / "batch" / "checkpoints").newest() / "state.json").read_text())
    assert state["meta"]["loader"]["samples"] == 25 * 8 == state["step"] * 8


def test_a_run_that_can_write_no_log_goes_on_and_tells_each_once(accepted, folder):
    code, told = accepted["spoilt"]
    assert code == 0 and "Traceback" not in told, told
    assert Store(folder / "spoilt" / "checkpoints").newest().name == "step-00000007"
    assert not (folder / "spoilt" / NAME).exists()


def test_nothing_is_written_through_a_link(accepted, folder):
    code, told = accepted["linked"]
    assert code == 0, told
    assert all((folder / f"precious-{name}").read_text() == "precious\n" for name in LOGS)
    assert not list((folder / "precious").iterdir())
    assert len((folder / "linked_logs" / "metrics.jsonl").read_text().splitlines()) == 7


def test_a_run_whose_config_is_lost_is_still_of_use(folder, recipe):
    run = folder / "changed"
    (run / "config.yaml").write_bytes(b"")
    assert open_encoder(str(run)).origin["step"] == 7
    assert first_section([str(run)]) is None  # asked of the checkpoint, which has no such section
    (run / "config.yaml").unlink()
    assert first_section([str(run)]) is None


def test_two_ranks_are_refused_together_where_another_start_holds_the_folder(recipe, tmp_path):
    lock = RunLock(tmp_path / "run")
    lock.hold()
    try:
        run = Run(deepspeed(2), recipe, tmp_path / "run")
        assert run.wait() != 0
    finally:
        lock.release()
    told = run.output.read_text()
    assert f"is in use by process {os.getpid()} on" in told and "and this is process" in told
    assert "Traceback (most recent call last)" not in told.partition("error: ")[0]
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").iterdir())
