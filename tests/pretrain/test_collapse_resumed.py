"""The watch for collapse in a long run: what a resumed one knows, and how much is looked at."""

import json
import random
from dataclasses import asdict, replace

import pytest
from collapse_cases import HEALTHY, a_record, a_watch, an_evaluation

from prelude.pretrain import collapse
from prelude.pretrain.schedules import Progress

NUM_STEPS = 2000


def a_random_run(seed: int) -> list:
    """Records and evaluations of features that are well for a while, then collapsed, and so on."""
    dice, run, bad = random.Random(seed), [], {}
    causes = [{"feature_cosine": 0.9999}, {"feature_rank_share": 0.001}, {"teacher_cosine": 0.0}, {"feature_std": 0.0}]
    for step in range(10, NUM_STEPS + 1, 10):
        if dice.random() < 0.05:
            bad = dice.choice([{}, *causes])
        parts = {"teacher_cosine": 0.9} | (bad if dice.random() < 0.8 else {})
        if dice.random() < 0.2:
            of_volumes = {f"volume_{name}": value for name, value in (HEALTHY | parts).items()}
            run.append(replace(a_record(step), parts=of_volumes))
        else:
            run.append(a_record(step, **parts))
        if step % 50 == 0:
            run.append(an_evaluation(step, **dice.choice([{}, bad])))
    return run


def fed(watch, run: list) -> list:
    told = []
    for one in run:
        (watch.report if hasattr(one, "kind") else watch.record)(one)
        told += watch.found()
    return told


def written(folder, run: list, told: list) -> None:
    steps = [asdict(one) for one in run if not hasattr(one, "kind")]
    reports = [asdict(one) for one in [*run, *told] if hasattr(one, "kind")]
    for name, lines in (("metrics.jsonl", steps), ("online.jsonl", reports)):
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.parametrize("seed", range(12))
def test_a_resumed_watch_knows_what_one_that_was_never_interrupted_knows(seed, tmp_path):
    run, settings = a_random_run(seed), {"teacher_steps": random.Random(seed).choice([0, 20, 80])}
    whole, resumed = a_watch(**settings), a_watch(run_dir=tmp_path, **settings)
    cut = random.Random(seed).randrange(300, NUM_STEPS, 10)
    before, after = ([one for one in run if (one.step <= cut) == earlier] for earlier in (True, False))
    written(tmp_path, before, fed(whole, before))
    resumed.start(Progress(cut, NUM_STEPS, 10.0))
    assert (resumed.healthy_step, resumed.standing, resumed.judged) == (
        whole.healthy_step,
        whole.standing,
        whole.judged,
    )
    assert fed(resumed, after) == fed(whole, after)
    assert (resumed.told, resumed.healthy_step) == (whole.told, whole.healthy_step)
    for watch in (whole, resumed):
        watch.finish()
    assert resumed.found() == whole.found()


@pytest.fixture
def looked_at(monkeypatch):
    """The numbers of records that a median was taken over."""
    counts, median = [], collapse.median

    def counting(values):
        values = list(values)
        counts.append(len(values))
        return median(values)

    monkeypatch.setattr(collapse, "median", counting)
    return counts


def test_a_start_judges_once_however_much_was_logged(tmp_path, looked_at):
    num_steps = 20_000
    written(tmp_path, [a_record(step, num_steps=num_steps) for step in range(10, num_steps, 10)], [])
    a_watch(run_dir=tmp_path).start(Progress(num_steps - 10, num_steps, 10.0))
    assert 0 < len(looked_at) <= 2 * len(HEALTHY)  # the window and its newest third


@pytest.mark.parametrize("share, causes", [(0.4, []), (0.6, ["same_features"])])
def test_of_a_huge_window_some_records_are_looked_at_and_the_majority_decides(share, causes, looked_at):
    watch, dice = a_watch(sustained=0.6), random.Random(0)
    run = [
        a_record(step, num_steps=30_000, feature_cosine=0.9999 if dice.random() < share else 0.9)
        for step in range(10, 30_001, 10)
    ]
    told = fed(watch, run[-1900:])
    assert [report.cause for report in told] == causes
    assert max(looked_at) == 300
