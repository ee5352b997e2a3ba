"""What is held out, and what early stopping makes of it."""

import errno
import io
import json
import os
import tarfile
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from prelude.data.errors import Stopped, UserError
from prelude.data.groups import group_names
from prelude.evaluators.features.labels import class_numbers
from prelude.evaluators.finetuning.early_stopping import HeldOut, HeldOutCurve
from prelude.evaluators.finetuning.recipe import FineTuneOptions
from prelude.evaluators.finetuning.testing import Found
from prelude.evaluators.frozen.splits import hold_out_groups
from prelude.evaluators.results import percent
from prelude.pretrain.schedules import Progress

NUM_STEPS, A_EPOCH = 20, 2.0


def test_groups_are_held_out_whole_until_they_have_their_share():
    groups = torch.tensor([5] * 7 + [1] * 2 + [9] * 4 + [2] * 3 + [8] * 4).roll(3)
    held_of_seeds = set()
    for seed in range(8):
        fit, held = hold_out_groups(groups, seed, 0.3)
        assert sorted(fit.tolist() + held.tolist()) == list(range(20))
        assert not set(groups[fit].tolist()) & set(groups[held].tolist())
        largest = max(int((groups == group).sum()) for group in set(groups[held].tolist()))
        assert 6 <= len(held) < 6 + largest
        assert torch.equal(held, hold_out_groups(groups, seed, 0.3)[1])
        held_of_seeds.add(tuple(held.tolist()))
    assert len(held_of_seeds) > 2
    assert len(set(groups[hold_out_groups(groups, 0, 0.99)[0]].tolist())) == 1  # one group is always left
    with pytest.raises(UserError, match="one group only"):
        hold_out_groups(torch.zeros(5, dtype=torch.int64), 0, 0.1)


def test_each_class_gives_its_share_where_no_groups_are_known(prepared):
    samples = prepared("objective.hold_out=0.2").samples
    held = samples.held_out.index
    assert torch.bincount(class_numbers(held).values).tolist() == [2] * 10
    assert torch.bincount(class_numbers(samples.train).values).tolist() == [8] * 10
    of_one = prepared("objective.hold_out=0.2", "objective.per_class=5").samples
    assert torch.bincount(class_numbers(of_one.train).values).tolist() == [4] * 10


@pytest.mark.parametrize("several", [True, False], ids=["findings", "classes"])
def test_no_patient_is_on_both_sides(several, prepared, findings):
    labels = findings if several else findings | {"label": "json:kind"}
    names = ["evaluate.label_names=[odd, small, rare]", "evaluate.label_field=findings", "objective.loss=sigmoid"]
    overrides = ["evaluate.label_group=patient", "objective.hold_out=0.3", *(names if several else [])]
    samples = prepared(*overrides, **labels).samples
    of_train, of_held = (group_names(index, "json:patient") for index in (samples.train, samples.held_out.index))
    assert not set(of_train) & set(of_held)
    assert samples.train.num_samples + samples.held_out.index.num_samples == 90
    assert samples.held_out.groups.unique(return_counts=True)[1].tolist() == [3] * 9
    assert not samples.warnings
    (told,) = prepared(*overrides, **labels | {"test": labels["train"].replace("-*", "-000000")}).samples.warnings
    assert "same shards" in told or "test images are of groups that are in the train shards too" in told


class Weights(nn.Module):
    def __init__(self):
        super().__init__()
        self.value = nn.Parameter(torch.zeros(()))


def held_out(trained, scores, **options) -> HeldOut:
    """One whose validations find these scores, in turn; an exception is raised."""
    module = HeldOut(FineTuneOptions(hold_out=0.1, **options), nn.ModuleDict(trained))
    turn = iter(scores)

    def test(current):
        assert current
        score = next(turn)
        if isinstance(score, Exception):
            raise score
        return Found({"top1": percent(score, 100)}, total=100, unreadable=0)

    module.test = test
    return module


def trained_until(module, trained, step, last=NUM_STEPS) -> int:
    """Steps, whose number is the weight, until the end."""
    while step < last:
        step += 1
        with torch.no_grad():
            trained["head"].value.fill_(step)
        if module.has_ended(Progress(step, NUM_STEPS, A_EPOCH), lambda: trained):
            break
    return step


def test_a_run_ends_after_validations_in_a_row_that_were_not_better_and_keeps_the_best():
    trained = {"head": Weights()}
    module = held_out(trained, [10, 30, 20, 40, 40, 39, 12, 99], patience=3)
    assert trained_until(module, trained, 0) == 14  # the validations after 2, 4, .. steps; 40 for the first time at 8
    assert (module.best_step.item(), module.best.item()) == (8, 40.0)
    assert module.kept["head"].value.item() == 8 and trained["head"].value.item() == 14
    assert module.told()["step"] == 8 and "early stopping" in module.told()["chosen_by"]


def test_without_patience_nothing_is_chosen_and_nothing_ends():
    trained = {"head": Weights()}
    module = held_out(trained, [10, 30, *[5] * 8])
    assert trained_until(module, trained, 0) == NUM_STEPS
    assert module.kept is None and module.told() == {}


@pytest.mark.parametrize("every", [0.5, 0.75, 3.0])
def test_how_often_is_validated_is_the_recipes(every):
    module = held_out({"head": Weights()}, [], validate_every_epochs=every)
    due = [step for step in range(NUM_STEPS + 1) if module.is_due(Progress(step, NUM_STEPS, A_EPOCH))]
    expected = [step for step in range(1, 21) if step / 2 // every > (step - 1) / 2 // every or step == NUM_STEPS]
    assert due == expected


def test_a_part_of_an_epoch_that_ends_with_a_step_is_not_a_step_late_by_floating_point():
    module = held_out({"head": Weights()}, [], validate_every_epochs=0.1)
    due = [step for step in range(301) if module.is_due(Progress(step, 300, 100.0))]
    assert due == list(range(10, 301, 10))


def test_a_run_that_a_validation_of_before_has_ended_a_step_late_has_ended():
    trained = {"head": Weights()}
    before = held_out(trained, [10, 9, 8], patience=2)
    trained_until(before, trained, 0)
    after = held_out({"head": Weights()}, [], patience=2)
    after.load_state_dict(before.state_dict() | {"validated": torch.tensor(7)})
    assert after.has_ended(Progress(7, NUM_STEPS, A_EPOCH), lambda: trained)


@pytest.mark.parametrize("interrupted", [1, 6, 8, 11, 13])
def test_a_run_that_goes_on_decides_as_one_that_was_never_interrupted(interrupted):
    scores = [10, 30, 20, 40, 40, 39, 12, 99]
    trained = {"head": Weights()}
    before = held_out(trained, scores, patience=3)
    trained_until(before, trained, 0, last=interrupted)
    after = held_out({"head": Weights()}, scores[interrupted // 2 :], patience=3)
    after.load_state_dict(before.state_dict())
    assert not after.has_ended(Progress(interrupted, NUM_STEPS, A_EPOCH), lambda: trained)
    assert trained_until(after, trained, interrupted) == 14
    assert after.kept["head"].value.item() == 8


def test_a_run_that_has_ended_early_has_ended_when_it_is_started_again():
    trained = {"head": Weights()}
    before = held_out(trained, [10, 9, 8], patience=2)
    assert trained_until(before, trained, 0) == 6
    after = held_out({"head": Weights()}, [], patience=2)
    after.load_state_dict(before.state_dict())
    assert after.has_ended(Progress(6, NUM_STEPS, A_EPOCH), lambda: trained)


def test_a_validation_that_was_cut_short_is_made_up_for():
    trained = {"head": Weights()}
    module = held_out(trained, [10, Stopped("by a signal"), 20, 5, 5], patience=2)
    with pytest.raises(Stopped):
        trained_until(module, trained, 0)
    assert trained["head"].value.item() == 4
    assert not module.has_ended(Progress(4, NUM_STEPS, A_EPOCH), lambda: trained)  # the next start, at the same step
    assert module.best_step.item() == 4
    assert trained_until(module, trained, 4) == 8


def test_what_was_found_is_told_and_written_once(tmp_path):
    trained = {"head": Weights()}
    module = held_out(trained, [10, 9, 8], patience=2)
    curve = HeldOutCurve(module, tmp_path / "validation.jsonl")
    curve.start(Progress(0, NUM_STEPS, A_EPOCH))
    trained_until(module, trained, 0)
    reports = curve.found()
    assert [report.step for report in reports] == [2, 4, 6] and not curve.found()
    assert reports[0].text == "held-out images: top-1 % 10.0, the best so far" and reports[0].numbers == {"top1": 10.0}
    assert reports[1].text == "held-out images: top-1 % 9.0; the best was step 2's"
    ended = (
        "stopped early, at step 6 of 20: 2 validations in a row were not better; the weights of step 2 are the result"
    )
    assert reports[2].text.endswith(ended)
    lines = [json.loads(line) for line in (tmp_path / "validation.jsonl").read_text().splitlines()]
    assert lines[0] == {"step": 2, "epoch": 1.0, "top1": 10.0, "best": True} and len(lines) == 3


def test_a_line_that_a_full_disk_refused_is_there_when_the_run_ends(tmp_path, monkeypatch):
    trained = {"head": Weights()}
    module = held_out(trained, [10, 9, 8], patience=2)
    curve = HeldOutCurve(module, tmp_path / "validation.jsonl")
    curve.start(Progress(0, NUM_STEPS, A_EPOCH))
    trained_until(module, trained, 0)
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
        curve.found()
    curve.close()
    lines = (tmp_path / "validation.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2, 4, 6]


MISTAKES = {
    "patience without images": (["objective.patience=3"], "objective.patience has no effect where nothing is held out"),
    "no group of that name": (["evaluate.label_group=patient"], "'cls:patient' names no group; write json:FIELD"),
    "a share that leaves few": (["objective.hold_out=0.6"], "objective.hold_out=0.6 is refused"),
    "a policy for classes": (["objective.uncertain=ones"], "name them in evaluate.label_names, or leave it out."),
    "a class that is not there": (["objective.class_weights={11: 2}"], "write some of 0, 1, 2"),
    "a weight of nothing": (["objective.class_weights={1: 0}"], "objective.class_weights"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_sentence(mistake, prepared):
    overrides, expected = MISTAKES[mistake]
    with pytest.raises(UserError) as error:
        prepared(*overrides)
    assert expected in str(error.value)


def test_patients_of_the_section_that_the_shards_are_of_are_held_out_whole(prepared, findings, tmp_path):
    section = {"train_shards": findings["train"], "test_shards": findings["test"], "label": "json:kind"}
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    config = {"evaluate": section | {"label_group": "patient"}}
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(config))
    of_run = {"source": str(tmp_path / "run"), "train": None, "test": None, "label": None}
    task = prepared("objective.hold_out=0.3", **of_run)
    assert task.config.evaluate.label_group == "json:patient"
    assert task.samples.held_out.groups.unique(return_counts=True)[1].tolist() == [3] * 9
    for overrides, given in ((["evaluate.label_group=''"], {}), ([], {"train": findings["train"]})):
        other = prepared("objective.hold_out=0.3", *overrides, **of_run | given)
        assert other.config.evaluate.label_group == "" and other.samples.held_out.groups is None


def test_what_whole_groups_make_of_the_share_is_told(prepared, findings):
    overrides = ["evaluate.label_group=kind", "objective.hold_out=0.02"]
    told = prepared(*overrides, **findings | {"label": "json:kind"}).samples.warnings
    assert any("of 90 train images are held out" in warning and "2 % were asked for" in warning for warning in told)


def test_images_without_a_patient_among_others_with_one_are_told(prepared, findings, tmp_path):
    (source,) = Path(findings["test"]).parent.glob(Path(findings["test"]).name)
    with tarfile.open(source) as tar, tarfile.open(tmp_path / "some.tar", "w") as to:
        for number, member in enumerate(tar.getmembers()):
            content = tar.extractfile(member).read()
            if member.name.endswith(".json") and number % 5 == 0:
                content = content.replace(b'"patient"', b'"nobody"')
            member.size = len(content)
            to.addfile(member, io.BytesIO(content))
    labels = findings | {"label": "json:kind", "test": str(tmp_path / "some.tar")}
    (told,) = prepared("evaluate.label_group=patient", **labels).samples.warnings
    assert " of 45 test images have no field 'patient'" in told
