"""Data that stop coming in the middle of a run: every rank ends between two steps, with nothing lost."""

import shutil

import pytest
from runs import Run, deepspeed


def once(recipe, flags) -> list[str]:
    """A stream that gives each rank one whole shard, and then nothing, for ever: some steps of three micro-batches, and
    a part of one, while the rest waits to be shuffled."""
    flags.mkdir()
    (shard,) = (recipe.parent / "shapes").glob("train-*.tar")
    command = f"mkdir {flags}/$RANK 2> /dev/null && exec cat {shard}; exec sleep 1000"
    return [
        f"data.shards=pipe:{command}", "data.allow_commands=true", "data.num_samples=200", "checkpoint.every_steps=100",
        "train.global_batch=24", "train.micro_batch=4", "train.epochs=8",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def stopped(recipe, tmp_path_factory) -> Run:
    """Two ranks whose data have run out, and a file that asks them to stop."""
    folder = tmp_path_factory.mktemp("runs")
    data = once(recipe, folder / "first")
    run = Run(deepspeed(2), recipe, folder / "stalled", *data, "data.timeout_seconds=30")
    waiting = "waiting for the next batch of data worker 0"
    said = run.at_step(1).output.read_text().count(waiting)  # a slow machine waits for the first batch too
    run.until_said(waiting, said + 1)
    (run.run_dir / "STOP").touch()
    run.code = run.wait()
    return run


def saved(run: Run) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (run.run_dir / "checkpoints").glob("step-*"))


def test_a_stop_is_obeyed_by_all_ranks_though_no_batch_comes(stopped):
    assert stopped.code == 75, stopped.output.read_text()[-3000:]
    assert "Traceback" not in stopped.output.read_text()


def test_it_leaves_a_checkpoint_of_the_last_step(stopped):
    steps = [line["step"] for line in stopped.metrics()]
    assert steps and saved(stopped) == [steps[-1]]


def test_a_run_whose_data_do_not_come_saves_and_says_so(recipe, stopped, tmp_path):
    before, data = saved(stopped)[-1], once(recipe, tmp_path / "second")
    shutil.copytree(stopped.run_dir, tmp_path / "run")
    run = Run(deepspeed(2), recipe, tmp_path / "run", *data, "data.timeout_seconds=4", "data.num_workers=0")
    run.wait()
    said = run.output.read_text()
    assert "error: Nothing has come for 4 seconds while waiting for the next batch" in said and "sleep 1000" in said
    assert saved(run)[-1] == run.metrics()[-1]["step"] > before
    assert "Traceback" not in said
