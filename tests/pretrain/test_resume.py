"""Where a run goes on, what its progress is worth under other settings, and what it is told."""

import json
from pathlib import Path

import engine_cases
import pytest
from collapse_cases import a_watch
from in_memory import MemoryLoader

from prelude.checkpoints.store import Store
from prelude.data.counting import counted
from prelude.data.errors import OTHER_FOLDER, UserError
from prelude.evaluators.comparing import run_record
from prelude.evaluators.comparing.run_record import is_finished_as
from prelude.launch.outlook import outlook
from prelude.pretrain import distributed
from prelude.pretrain.config import ResumeConfig
from prelude.pretrain.engine import Engine
from prelude.pretrain.monitors import JsonlMonitor, Monitor
from prelude.pretrain.options import Strict
from prelude.pretrain.recipes import validate_config
from prelude.pretrain.resume import accept, progress_after, starting_point
from prelude.pretrain.schedules import Progress, beginning

NUM_SAMPLES = 1600
OWN = Path("runs/x/checkpoints/step-00000010")


def config_of(batch=16, epochs=1.0, checkpoint="auto", **optimizer):
    values = {
        "run_dir": "runs/x",
        "data": {"shards": "none"},
        "encoder": {"name": "none", "image_size": 8},
        "objective": {"name": "toy"},
        "train": {"epochs": epochs, "global_batch": batch},
        "optimizer": {"lr": 0.1} | optimizer,
        "resume": {"checkpoint": checkpoint},
    }
    return validate_config(values, "a test")


def start_of(config) -> Progress:
    steps_per_epoch = NUM_SAMPLES / config.train.global_batch
    return Progress(0, round(config.train.epochs * steps_per_epoch), steps_per_epoch)


def meta_of(config, step: int) -> dict:
    num_steps = start_of(config).num_steps
    loader = {"num_samples": NUM_SAMPLES, "samples": step * config.train.global_batch}
    return {"step": step, "num_steps": num_steps, "config": config.model_dump(mode="json"), "loader": loader}


def after(then, now, step=10, checkpoint=OWN):
    return progress_after(meta_of(then, step), now, start_of(now), checkpoint)


def test_the_same_settings_go_on_at_the_same_step_and_nothing_is_told():
    assert after(config_of(), config_of()) == (Progress(10, 100, 100.0), [])


@pytest.mark.parametrize(("batch", "step"), [(32, 5), (8, 20), (160, 1), (48, 3)])
def test_another_batch_counts_in_samples(batch, step):
    absolute = {"lr_rule": "absolute", "min_lr": 0.1}
    progress, notices = after(config_of(**absolute), config_of(batch, **absolute))
    assert progress.step == step and progress.num_steps == round(NUM_SAMPLES / batch)
    assert notices == [f"train.global_batch 16 -> {batch}: 10 steps, or 160 images, count as {counted(step, 'step')}"]


@pytest.mark.parametrize(
    "changed",
    [
        {"batch": 32},  # the rate follows the batch
        {"lr": 0.2},
        {"epochs": 3},
        {"warmup_epochs": 0.5},
        {"milestones": [0.05]},
        {"lr_rule": "absolute"},
    ],
)
def test_a_jump_of_the_learning_rate_is_told_whatever_causes_it(changed):
    _, notices = after(config_of(), config_of(**changed))
    assert "the learning rate jumps here" in notices[-1]


def test_settings_that_leave_the_rate_alone_are_no_jump():
    assert after(config_of(), config_of(weight_decay=0.3))[1] == []


@pytest.mark.parametrize("changed", [{"epochs": 0.05}, {"epochs": 0.1}, {"batch": 800, "epochs": 0.5}])
def test_nothing_left_to_train_is_refused(changed):
    with pytest.raises(UserError, match="Nothing is left to train.*larger train.epochs"):
        after(config_of(), config_of(**changed), step=60 if "batch" in changed else 10)


def test_only_a_run_that_came_to_its_own_end_may_start_again_and_do_nothing():
    finished, _ = after(config_of(), config_of(), step=100)
    assert finished.step == finished.num_steps
    with pytest.raises(UserError, match="Nothing is left to train"):
        after(config_of(), config_of(), step=100, checkpoint=Path("runs/y/checkpoints/step-00000100"))


def test_a_run_of_whole_steps_has_no_step_more_unless_it_was_begun_with_it():
    config = config_of(batch=48, epochs=15.0)
    start = beginning(config, 50_000)
    assert start.num_steps == 15_625 == 15 * 50_000 / 48
    assert beginning(config_of(batch=48, epochs=15.001), 50_000).num_steps == 15_627  # 15,626.04
    for num_steps in (15_625, 15_626):
        meta = meta_of(config, 10) | {"num_steps": num_steps}
        assert progress_after(meta, config, start, OWN)[0] == Progress(10, num_steps, start.steps_per_epoch)
        finished, _ = progress_after(meta | {"step": num_steps}, config, start, OWN)
        assert finished.step == finished.num_steps == num_steps


def test_what_is_logged_is_counted_as_the_run_that_goes_on_counts(tmp_path):
    distributed.start()
    for epochs, batch in ((1, 8), (2, 16)):
        train = {"epochs": epochs, "global_batch": batch}
        config = engine_cases.config_of({"train": train, "saves_every": 5}, tmp_path)
        config = config.model_copy(update={"resume": ResumeConfig(allow_changed_config=True)})
        loader = MemoryLoader(batch, engine_cases.NUM_SAMPLES, engine_cases.batch_at)
        monitors = [JsonlMonitor(tmp_path / "metrics.jsonl")]
        Engine(config, engine_cases.Regression(), loader, Store(tmp_path / "checkpoints"), monitors).run()
    distributed.stop()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 1, 2, 2, 3, 4, 5]  # 5 steps of 8 images are 2 of 16


class Has:
    """A store whose newest checkpoint is this one."""

    def __init__(self, newest):
        self.newest_for_all = lambda: newest


def test_a_named_checkpoint_is_where_a_run_without_its_own_begins():
    named = "runs/y/checkpoints/step-00000005"
    assert starting_point(Has(None), config_of(checkpoint=named)) == Path(named)
    assert starting_point(Has(OWN), config_of(checkpoint=named)) == OWN
    assert starting_point(Has(OWN), config_of(checkpoint=str(OWN))) == OWN
    assert starting_point(Has(OWN), config_of()) == OWN and starting_point(Has(None), config_of()) is None
    with pytest.raises(UserError, match="goes on from step-00000010; leave it out, or .* in another run_dir"):
        starting_point(Has(OWN), config_of(checkpoint="runs/x/checkpoints/step-00000005"))


class EndsAtTwo(engine_cases.Regression):
    def has_ended(self, progress):
        return progress.step == 2


def test_a_run_that_its_objective_has_ended_is_finished(tmp_path, monkeypatch):
    """To a sweep, a comparison and `--dry-run`; and the verdict is of the last step that was taken."""
    distributed.start()
    config = engine_cases.config_of({"train": {"epochs": 1}, "saves_every": 100}, tmp_path)
    objective, loader = EndsAtTwo(), MemoryLoader(8, engine_cases.NUM_SAMPLES, engine_cases.batch_at)
    heard, options = [], type(objective.options)
    watch = a_watch()
    Engine(config, objective, loader, Store(tmp_path / "checkpoints"), [watch, _Listener(heard)]).run()
    told = outlook(config, loader, options)
    distributed.stop()
    (newest,) = (tmp_path / "checkpoints").glob("step-*")
    assert newest.name == "step-00000002" and [step for kind, step in heard if kind == "verdict"] == [2]
    assert is_finished_as(config, options) and told == "ended early, at step 2 of 5: a start would train nothing"
    other = config.model_copy(update={"seed": 7})
    assert not is_finished_as(other, options)
    saved = json.loads((newest / "state.json").read_text())
    assert saved["meta"].pop("ended") is True
    monkeypatch.setattr(run_record, "_saved", lambda _: saved)
    assert not is_finished_as(config, options)  # one of before, of which nobody can tell


class _Listener(Monitor):
    def __init__(self, heard):
        self.heard = heard

    def report(self, report):
        self.heard.append((report.kind, report.step))


def test_where_no_run_dir_is_the_users_to_choose_another_out_is_named(monkeypatch):
    meta = meta_of(config_of(), 10)
    with pytest.raises(UserError, match=r"optimizer.lr: 0.1 -> 0.2\); write another run_dir, restore"):
        accept(meta, OWN, config_of(lr=0.2), Strict, loader=None)
    monkeypatch.setenv(OTHER_FOLDER, "another --out")
    with pytest.raises(UserError, match=r"optimizer.lr: 0.1 -> 0.2\); write another --out, restore"):
        accept(meta, OWN, config_of(lr=0.2), Strict, loader=None)
