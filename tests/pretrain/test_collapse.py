"""The watch for collapse: what each sign is, when it is told, and what becomes of the last healthy checkpoint."""

import json
from dataclasses import asdict, replace

import pytest
import torch
from collapse_cases import HEALTHY, a_record, a_watch, an_evaluation
from engine_cases import NUM_SAMPLES, Regression, batch_at, config_of
from in_memory import MemoryLoader, NoStore

from prelude.pretrain import distributed
from prelude.pretrain.collapse import REMEDIES, signs
from prelude.pretrain.collapse_config import CollapseConfig
from prelude.pretrain.engine import Engine
from prelude.pretrain.feature_health import feature_health, teacher_cosine
from prelude.pretrain.monitors import Monitor, Report, ReportsMonitor
from prelude.pretrain.schedules import Progress

SIGNS = [
    ({"feature_cosine": 0.9995}, "same_features"),
    ({"feature_std": 1e-6}, "same_features"),
    ({"feature_rank_share": 0.001}, "few_dimensions"),
    ({"embedding_rank_share": 0.01}, "redundant_embedding"),
    ({"teacher_cosine": 0.05}, "lost_teacher"),
    ({"loss": 1.39, "trivial_loss": 1.3863}, "trivial_loss"),
]


@pytest.mark.parametrize(("numbers", "cause"), SIGNS)
def test_each_sign_has_its_cause_and_a_setting_to_change(numbers, cause):
    (sign,) = signs(HEALTHY | numbers, CollapseConfig())
    assert sign.cause == cause
    assert any(section in REMEDIES[cause] for section in ("optimizer.", "objective."))


def test_healthy_numbers_and_numbers_that_are_not_there_are_no_sign():
    healthy = {"embedding_rank_share": 0.1, "teacher_cosine": 0.9, "loss": 1.2, "trivial_loss": 1.3863}
    assert signs(HEALTHY | healthy, CollapseConfig()) == []
    assert signs({}, CollapseConfig()) == []


@pytest.mark.parametrize(
    ("threshold", "numbers"),
    [
        ({"max_cosine": 0.5}, {}),
        ({"min_std": 0.5}, {}),
        ({"min_rank": 0.5}, {}),
        ({"min_embedding_rank": 0.5}, {"embedding_rank_share": 0.3}),
        ({"min_teacher_cosine": 0.5}, {"teacher_cosine": 0.3}),
        ({"trivial_tolerance": 0.5}, {"loss": 0.8, "trivial_loss": 1.0}),
    ],
)
def test_every_threshold_can_be_moved(threshold, numbers):
    assert signs(HEALTHY | numbers, CollapseConfig()) == []
    assert len(signs(HEALTHY | numbers, CollapseConfig(**threshold))) == 1


def told(watch, steps, **parts) -> list:
    """Of 2,000 steps the first 500 are the grace, and a window is 100 steps long."""
    reports = []
    for step in steps:
        watch.record(a_record(step, **parts))
        reports += watch.found()
    return reports


def verdict(watch):
    watch.finish()
    (report,) = watch.found()
    assert report.kind == "verdict" and not report.stop
    return report


def test_a_cause_is_told_once_after_it_has_stood_and_not_in_the_beginning():
    watch = a_watch()
    assert told(watch, range(10, 501, 10), feature_cosine=0.9999) == []  # as joint-embedding methods start
    assert told(watch, range(510, 600, 10), feature_cosine=0.9999) == []
    (report,) = told(watch, range(600, 1000, 10), feature_cosine=0.9999)
    assert (report.step, report.kind, report.cause, report.stop) == (600, "collapse", "same_features", False)
    assert "same_features" in report.text and "optimizer.lr" in report.text and "0.99990" in report.text
    (other,) = told(watch, range(1000, 1200, 10), teacher_cosine=0.0)
    assert other.cause == "lost_teacher"


@pytest.mark.parametrize("blind_to", ["images", "volumes"])
def test_an_encoder_that_is_blind_to_one_kind_is_told_of_it(blind_to):
    """Volumes take turns with images, three steps of four: a median over both would be that of the images."""
    watch, found = a_watch(), []
    for step in range(10, 1001, 10):
        of_volumes = step % 40 == 0
        health = HEALTHY | ({"feature_cosine": 0.9999} if of_volumes == (blind_to == "volumes") else {})
        parts = {f"volume_{name}" if of_volumes else name: value for name, value in health.items()}
        watch.record(replace(a_record(step), parts=parts))
        found += watch.found()
    (report,) = found
    assert report.cause == "same_features" and ("on volumes" in report.text) == (blind_to == "volumes")
    assert verdict(watch).cause == "collapsed"


def a_volume(step, **health):
    parts = {f"volume_{name}": value for name, value in (HEALTHY | health).items()}
    return replace(a_record(step), parts=parts)


def test_volumes_are_told_of_though_images_were_told_of_before_and_have_recovered():
    watch = a_watch()
    (first,) = told(watch, range(10, 1001, 10), feature_cosine=0.9999)
    assert told(watch, range(1010, 1401, 10)) == []
    for step in range(1410, 2001, 10):
        watch.record(a_volume(step, feature_cosine=0.9999))
    (second,) = watch.found()
    assert first.cause == second.cause == "same_features" and "on volumes" in second.text


def test_volumes_that_were_logged_too_rarely_are_said_to_be_unjudged():
    watch = a_watch()
    assert told(watch, range(10, 1991, 10)) == []
    watch.record(a_volume(1995, feature_cosine=0.9999))
    watch.record(a_volume(2000, feature_cosine=0.9999))
    said = verdict(watch)
    assert said.cause == "healthy" and said.text.endswith("of volumes too few steps were logged to judge them")


def test_a_part_of_a_loss_that_happens_to_begin_like_those_of_volumes_is_no_sign_of_any():
    watch = a_watch()
    (report,) = told(watch, range(10, 1001, 10), feature_cosine=0.9999, volume_flow=1.0)
    assert "on volumes" not in report.text


@pytest.mark.parametrize("num_steps", [60, 300, 1250, 20_000])
def test_a_run_of_any_length_is_judged(num_steps):
    every = 1 if num_steps < 100 else 10
    steps = range(every, num_steps + 1, every)
    collapsed, healthy = a_watch(), a_watch()
    (report,) = told(collapsed, steps, num_steps=num_steps, feature_rank_share=0.001)
    assert report.cause == "few_dimensions" and 0.1 < report.step / num_steps < 0.8
    assert told(healthy, steps, num_steps=num_steps) == []
    assert (verdict(collapsed).cause, verdict(healthy).cause) == ("collapsed", "healthy")


def test_the_shares_can_be_changed():
    bad, length = {"feature_cosine": 0.9999}, {"num_steps": 100_000}
    (early,) = told(a_watch(), range(500, 50_000, 500), **bad, **length)
    (late,) = told(a_watch(grace=0.2), range(500, 50_000, 500), **bad, **length)
    (slow,) = told(a_watch(sustained=0.3), range(500, 50_000, 500), **bad, **length)
    assert (early.step, late.step, slow.step) == (15_000, 25_000, 40_000)


def test_a_few_records_on_the_right_side_clear_no_doubt():
    watch, found = a_watch(), []
    for step in range(10, 1260, 10):  # one record in four is just below the threshold
        cosine = 0.9988 if step % 40 == 0 else 0.9991 + step % 7 / 10_000
        found += told(watch, (step,), num_steps=1250, feature_cosine=cosine, feature_rank_share=0.002)
    assert [report.cause for report in found][:1] == ["same_features"]
    assert verdict(watch).cause == "collapsed"


def test_a_sign_in_the_minority_is_not_told():
    watch = a_watch()
    for step in range(10, 2001, 10):
        assert told(watch, (step,), feature_cosine=0.9 if step % 30 else 0.9999) == []
    assert verdict(watch).cause == "healthy"


def test_a_loss_is_judged_by_its_mean():
    watch, found = a_watch(), []
    for step in range(10, 1001, 10):
        found += told(watch, (step,), loss=1.05 if step % 20 else 0.95, trivial_loss=1.0)
    assert [report.cause for report in found] == ["trivial_loss"]


def test_few_records_are_not_enough_however_far_apart():
    watch = a_watch()
    assert told(watch, (1000, 1500), feature_cosine=0.9999) == []
    assert verdict(watch).cause == "too short"
    assert len(told(watch, (1999,), feature_cosine=0.9999)) == 1


def test_a_run_of_few_steps_is_too_short():
    watch = a_watch()
    assert told(watch, range(1, 41), num_steps=40, feature_cosine=0.9999) == []
    report = verdict(watch)
    assert report.cause == "too short" and "too short to be judged" in report.text and report.step == 40


def test_without_signs_there_is_no_verdict_on_health():
    watch = a_watch()
    for step in range(10, 2001, 10):
        watch.record(replace(a_record(step), parts={"accuracy": 1.0}))
    assert verdict(watch).cause == "not judged"


def test_a_run_that_has_recovered_ends_healthy_and_says_so():
    watch = a_watch()
    told(watch, range(10, 800, 10), feature_cosine=0.9999)
    told(watch, range(800, 2001, 10))
    report = verdict(watch)
    assert report.cause == "healthy" and "same_features was told of at step 600" in report.text


def test_evaluations_are_judged_too_on_their_own():
    watch = a_watch()
    for step in range(10, 901, 10):
        if step in (800, 900):
            watch.report(an_evaluation(step, feature_cosine=0.99999))
        watch.record(a_record(step))  # the batch looks well all the while
    (report,) = watch.found()
    assert report.step == 900 and report.cause == "same_features"


def test_the_verdict_knows_of_evaluations_that_come_after_the_last_step(tmp_path):
    heard = []

    class Probe(Monitor):
        late: list = []

        def finish(self):
            self.late = [an_evaluation(step, feature_cosine=0.99999) for step in (49, 50)]

        def found(self):
            late, self.late = self.late, []
            return late

    class Listener(Monitor):
        def report(self, report):
            heard.append((report.kind, report.cause))

    distributed.start()
    config, loader = config_of({"train": {"epochs": 10}}, tmp_path), MemoryLoader(8, NUM_SAMPLES, batch_at)
    Engine(config, Regression(), loader, NoStore(), [Probe(), a_watch(), Listener()]).run()
    distributed.stop()
    told = [one for one in heard if one[0] != "notice"]
    assert told == [("evaluation", "")] * 2 + [("collapse", "same_features"), ("verdict", "collapsed")]


def test_a_teacher_that_averages_over_many_steps_has_time_to_follow():
    lagging = {"teacher_cosine": -0.5}
    assert len(told(a_watch(), range(10, 1001, 10), **lagging)) == 1
    patient = a_watch(teacher_steps=250)
    assert told(patient, range(10, 1251, 10), **lagging) == []
    assert [report.step for report in told(patient, range(1260, 2001, 10), **lagging)] == [1260]
    following = a_watch(teacher_steps=250)
    told(following, range(10, 1001, 10), **lagging)
    assert told(following, range(1010, 2001, 10), teacher_cosine=0.9) == []


def test_a_resumed_run_remembers_what_it_has_logged(tmp_path):
    logged = [asdict(a_record(step, feature_cosine=0.9999)) for step in range(10, 1001, 10)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in logged) + '{"step": 1010, "lo')
    earlier = a_watch(run_dir=tmp_path)
    earlier.start(Progress(550, 2000, 10.0))
    assert earlier.found() == [] and earlier.store.held is None
    assert [report.step for report in told(earlier, range(560, 700, 10), feature_cosine=0.9999)] == [600]
    later = a_watch(run_dir=tmp_path)
    later.start(Progress(1000, 2000, 10.0))
    assert told(later, range(1010, 1200, 10), feature_cosine=0.9999) == []  # it was told of before
    assert verdict(later).cause == "collapsed"


def test_a_run_that_is_to_stop_is_stopped_in_every_start_that_finds_it_collapsed(tmp_path):
    logged = [asdict(a_record(step, feature_cosine=0.9999)) for step in range(10, 601, 10)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in logged))
    told_before = Report(600, "collapse", "collapsed", cause="same_features", stop=True)
    (tmp_path / "online.jsonl").write_text(json.dumps(asdict(told_before)) + "\n")
    again = a_watch(run_dir=tmp_path, stop=True)
    again.start(Progress(600, 2000, 10.0))
    (report,) = told(again, range(610, 700, 10), feature_cosine=0.9999)
    assert (report.step, report.cause, report.stop) == (610, "same_features", True)
    recovered = a_watch(run_dir=tmp_path, stop=True)
    recovered.start(Progress(600, 2000, 10.0))
    assert all(report.step < 660 for report in told(recovered, range(610, 2001, 10)))
    assert verdict(recovered).text.endswith("though same_features was told of at step 600")


@pytest.mark.parametrize("num_steps", [2000, 4000])  # the other one was ended by its objective
def test_a_finished_run_that_is_started_again_has_one_verdict_unless_it_is_judged_anew(num_steps, tmp_path):
    logged = [asdict(a_record(step)) for step in range(10, 2001, 10)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in logged))
    for evaluations, expected in ((0, 1), (0, 1), (1, 2)):
        watch, kept = a_watch(run_dir=tmp_path), ReportsMonitor(tmp_path / "online.jsonl")
        for monitor in (watch, kept):
            monitor.start(Progress(2000, num_steps, 10.0))
        for _ in range(evaluations):
            watch.report(an_evaluation(2000))
        watch.finish()
        for report in watch.found():
            kept.report(report)
        kept.close()
        lines = map(json.loads, (tmp_path / "online.jsonl").read_text().splitlines())
        assert [(line["kind"], line["cause"]) for line in lines] == [("verdict", "healthy")] * expected


def test_the_last_healthy_checkpoint_is_kept_from_the_first_doubt_on():
    watch = a_watch()
    told(watch, (510, 520))
    assert watch.store.held is None
    told(watch, (530,), feature_cosine=0.9999)
    assert watch.store.held == 520
    told(watch, (540,))
    assert watch.store.held == 520  # one record on the right side says little
    told(watch, range(550, 700, 10))
    assert watch.store.held is None  # a doubt that passed
    (report,) = told(watch, range(700, 800, 10), feature_cosine=0.9999)
    assert watch.store.held == 690 and "step-00000690" in report.text
    told(watch, range(800, 1000, 10))
    assert watch.store.held == 690  # told of, so kept


def test_without_an_older_checkpoint_it_says_so():
    (report,) = told(a_watch(), range(10, 1000, 10), feature_cosine=0.9999)
    assert "the beginning" in report.text


def test_the_run_is_stopped_only_if_asked_to_and_an_objective_has_its_own_advice():
    watch = a_watch({"same_features": "raise objective.momentum"}, stop=True)
    (report,) = told(watch, range(10, 1000, 10), feature_cosine=0.9999)
    assert report.stop and "raise objective.momentum, and start again" in report.text


def test_the_rank_is_measured_against_what_is_attainable():
    generator = torch.Generator().manual_seed(0)
    for count, width in ((8, 400), (400, 8)):
        full = feature_health(torch.randn(count, width, generator=generator))
        assert full["feature_rank_share"] > 0.9
    line = torch.randn(64, 1, generator=generator) * torch.ones(16)
    assert feature_health(line)["feature_rank_share"].item() == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_healthy_features_of_few_images_are_no_collapse(count):
    """Of one there is nothing to compare, and two have one direction between them, whatever they are."""
    health = feature_health(torch.randn(count, 64, generator=torch.Generator().manual_seed(0)))
    assert all(value.isfinite() for value in health.values())
    assert signs({name: value.item() for name, value in health.items()}, CollapseConfig()) == []
    assert set(health) >= {"feature_std", "feature_cosine"} if count > 1 else health == {}
    alike = {name: value.item() for name, value in feature_health(torch.ones(count, 64)).items()}
    assert [sign.cause for sign in signs(alike, CollapseConfig())] == ["same_features"] * (count > 1)


def test_a_teacher_is_compared_image_by_image():
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(4, 9, 16, generator=generator)
    expected = torch.stack([torch.dot(a.mean(0), (a.mean(0) + 1)) for a in student])
    expected /= student.mean(1).norm(dim=1) * (student.mean(1) + 1).norm(dim=1)
    torch.testing.assert_close(teacher_cosine(student, student + 1), expected)
    torch.testing.assert_close(teacher_cosine(student, -student), torch.full((4,), -1.0))


def test_a_damaged_log_of_an_earlier_start_ends_no_later_one(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1, "loss": 1.0, "parts": {}}\n\xff\xfe\n{"step": 2, "lo')
    (tmp_path / "online.jsonl").mkdir()
    watch = a_watch(run_dir=tmp_path)
    watch.start(Progress(2, 100, 10.0))
    assert watch.found() == []
