"""The watch for collapse: what each sign is, when it is told, and what becomes of the last healthy checkpoint."""

import pytest
import torch
from collapse_cases import HEALTHY, a_record, a_watch, an_evaluation

from prelude.pretrain.collapse import REMEDIES, signs
from prelude.pretrain.config import CollapseConfig
from prelude.pretrain.feature_health import feature_health, teacher_cosine

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
    reports = []
    for step in steps:
        watch.record(a_record(step, **parts))
        reports += watch.found()
    return reports


def test_a_cause_is_told_once_after_it_has_stood_and_not_in_the_beginning():
    watch = a_watch()
    assert told(watch, range(10, 101, 10), feature_cosine=0.9999) == []  # as joint-embedding methods start
    assert told(watch, (110, 120), feature_cosine=0.9999) == []
    (report,) = told(watch, range(130, 400, 10), feature_cosine=0.9999)
    assert (report.step, report.kind, report.cause, report.stop) == (130, "collapse", "same_features", False)
    assert "same_features" in report.text and "optimizer.lr" in report.text and "0.99990" in report.text
    (other,) = told(watch, range(400, 500, 10), teacher_cosine=0.0)
    assert other.cause == "lost_teacher"


def test_a_sign_that_comes_and_goes_is_not_told():
    watch = a_watch()
    for step in range(110, 500, 10):
        assert told(watch, (step,), feature_cosine=0.9999 if step % 30 else 0.9) == []


def test_a_loss_is_judged_by_its_running_mean():
    watch, found = a_watch(), []
    for step in range(110, 500, 10):
        found += told(watch, (step,), loss=1.05 if step % 20 else 0.95, trivial_loss=1.0)
    assert [report.cause for report in found] == ["trivial_loss"]


def test_few_records_are_not_enough_however_far_apart():
    assert told(a_watch(), (1000, 2000), feature_cosine=0.9999) == []
    assert len(told(a_watch(), (1000, 2000, 3000), feature_cosine=0.9999)) == 1


def test_evaluations_are_judged_too_on_their_own():
    watch = a_watch()
    for step in (200, 300):
        watch.report(an_evaluation(step, feature_cosine=0.99999))
        watch.record(a_record(step))  # the batch looks well all the while
    (report,) = watch.found()
    assert report.step == 300 and report.cause == "same_features"


def test_the_last_healthy_checkpoint_is_kept_from_the_first_doubt_on():
    watch = a_watch()
    told(watch, (110, 120))
    assert watch.store.held is None
    told(watch, (130,), feature_cosine=0.9999)
    assert watch.store.held == 120
    told(watch, (140,))
    assert watch.store.held is None  # a doubt that passed
    (report,) = told(watch, (150, 160, 170, 180), feature_cosine=0.9999)
    assert watch.store.held == 140 and "step-00000140" in report.text
    told(watch, (190, 200, 210))
    assert watch.store.held == 140  # told of, so kept


def test_without_an_older_checkpoint_it_says_so():
    (report,) = told(a_watch(), (110, 120, 130), feature_cosine=0.9999)
    assert "the beginning" in report.text


def test_the_run_is_stopped_only_if_asked_to_and_an_objective_has_its_own_advice():
    watch = a_watch({"same_features": "raise objective.momentum"}, stop=True)
    (report,) = told(watch, (110, 120, 130), feature_cosine=0.9999)
    assert report.stop and "raise objective.momentum, and start again" in report.text


def test_the_rank_is_measured_against_what_is_attainable():
    generator = torch.Generator().manual_seed(0)
    for count, width in ((8, 400), (400, 8)):
        full = feature_health(torch.randn(count, width, generator=generator))
        assert full["feature_rank_share"] > 0.9
    line = torch.randn(64, 1, generator=generator) * torch.ones(16)
    assert feature_health(line)["feature_rank_share"].item() == pytest.approx(0, abs=1e-5)
    assert feature_health(torch.ones(1, 16))["feature_rank_share"].isfinite()


def test_a_teacher_is_compared_image_by_image():
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(4, 9, 16, generator=generator)
    expected = torch.stack([torch.dot(a.mean(0), (a.mean(0) + 1)) for a in student])
    expected /= student.mean(1).norm(dim=1) * (student.mean(1) + 1).norm(dim=1)
    torch.testing.assert_close(teacher_cosine(student, student + 1), expected)
    torch.testing.assert_close(teacher_cosine(student, -student), torch.full((4,), -1.0))
