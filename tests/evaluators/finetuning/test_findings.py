"""Several findings an image: how labels are read, and macro AUC and mAP against scikit-learn."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from findings import NAMES
from sklearn.metrics import average_precision_score, roc_auc_score

from prelude.data.errors import UserError
from prelude.data.findings import FindingsReader, VectorFormat
from prelude.data.loader import Loader, one_pass
from prelude.data.members import label_members
from prelude.evaluators.finetuning import finetune
from prelude.evaluators.finetuning.testing import Testing

SEVERAL = ["evaluate.label_names=[odd, small, rare]", "evaluate.label_field=findings", "evaluate.label_group=patient"]
SIGMOID = [*SEVERAL, "objective.loss=sigmoid"]


@pytest.fixture
def task(prepared, findings):
    return prepared(*SIGMOID, **findings)


def scoring(task, classifier) -> Testing:
    samples = task.samples
    return Testing(classifier, samples.test, samples.label, samples.findings, batch_size=16, num_workers=0)


def told(index) -> list[dict]:
    return [json.loads(content)["findings"] for content in label_members(index.with_label("json"))]


def test_a_batch_has_the_answers_of_its_samples(task):
    samples = task.samples
    loader = Loader(
        samples.train, finetune.build(task).views, seed=0, micro_batch=30, label="json", findings=samples.findings
    )
    batch, expected = next(loader), told(samples.train)
    loader.close()
    seen = set()
    for row, sample in zip(batch.labels.tolist(), batch.sample_ids.tolist(), strict=True):
        for value, name in zip(row, NAMES, strict=True):
            answer = expected[sample][name]
            assert math.isnan(value) if answer is None else value == answer
            seen.add(answer)
    assert seen == {1, 0, -1, None}
    assert loader.identity()["findings"] == ["findings", *NAMES]  # other questions are another run


def test_what_holds_no_findings_is_spoilt():
    from prelude.data.decode import BadImage

    reader = FindingsReader("json", VectorFormat(("a", "b"), "found"))
    assert reader(b'{"found": ["b"]}').tolist() == [0, 1] and reader(b'{"found": [1, -1]}').tolist() == [1, -1]
    for content in (b"{", b"3", b'{"other": []}', b'{"found": [1]}', b'{"found": {"a": 2}}'):
        with pytest.raises(BadImage):
            reader(content)


def test_macro_auc_and_map_are_scikit_learns_without_what_is_uncertain(task):
    classifier = finetune.build(task)
    with torch.no_grad():
        classifier.head.weight.normal_(generator=torch.Generator().manual_seed(0))
    found, quick = scoring(task, classifier)(intervals=True), scoring(task, classifier)()
    classifier.eval()
    pixels = one_pass(task.samples.test.index, classifier.test_views, batch_size=1)
    scores = np.concatenate([classifier.scores(batch).numpy() for batch in pixels])
    answers = [[row[name] for name in NAMES] for row in told(task.samples.test.index)]
    labels = np.array([[np.nan if answer in (-1, None) else answer for answer in row] for row in answers])
    assert np.isnan(labels).sum() > 5
    assert [found.by_label[name]["counted"] for name in NAMES] == [True, True, False]
    for name, metric in (("auc", roc_auc_score), ("map", average_precision_score)):
        each = []
        for column in (0, 1):
            known = np.isfinite(labels[:, column])
            each.append(100 * metric(labels[known, column], scores[known, column]))
        assert found.numbers[name].value == pytest.approx(np.mean(each), abs=1e-4)
        assert quick.values[name] == found.numbers[name].value and found.numbers[name].interval
    assert (found.total, found.unreadable) == (45, 0)
    one_patient = replace(task.samples.test, groups=torch.zeros(45, dtype=torch.int64))
    of_one = replace(scoring(task, classifier), part=one_patient)(intervals=True)
    assert of_one.numbers["auc"].interval is of_one.numbers["auc"].se is None
    assert "of one group" in of_one.warnings[0] and not found.warnings


def test_the_loss_of_a_batch_is_of_its_answers(task):
    """From the shards to the loss: the uncertain and the unknown are told apart."""
    from prelude.pretrain.images import images
    from prelude.pretrain.schedules import Progress

    samples = task.samples
    totals = {}
    for policy in ("ignore", "zeros", "ones"):
        classifier = finetune.build(task)
        classifier.options = classifier.options.model_copy(update={"uncertain": policy})
        loader = Loader(
            samples.train, classifier.views, seed=0, micro_batch=30, label="json", findings=samples.findings
        )
        batch = next(loader)
        loader.close()
        with torch.no_grad():
            classifier.head.weight.normal_(generator=torch.Generator().manual_seed(0))
            loss = classifier.eval()(batch, Progress(0, 10, 1.0))
            logits = classifier.head(classifier.encoder(images(batch, classifier.views)[0])).tolist()
        total = right = known = 0
        for row, answers in zip(logits, batch.labels.tolist(), strict=True):
            for x, answer in zip(row, answers, strict=True):
                answer = {"ignore": math.nan, "zeros": 0, "ones": 1}[policy] if answer == -1 else answer
                if not math.isnan(answer):
                    p = 1 / (1 + math.exp(-x))
                    total -= math.log(p if answer else 1 - p)
                    right, known = right + ((x > 0) == bool(answer)), known + 1
        totals[policy] = loss.total.item()
        assert totals[policy] == pytest.approx(total / 90, rel=1e-4)
        assert loss.parts["accuracy"].item() == pytest.approx(right / known)
    assert len(set(totals.values())) == 3


def test_a_part_of_the_images_is_taken_whatever_they_show(prepared, findings):
    few = prepared(*SIGMOID, "objective.fraction=0.4", **findings).samples
    assert few.train.num_samples == 36 and few.classes.tolist() == [0, 1, 2]
    assert prepared(*SIGMOID, "objective.fraction=0.4", "seed=1", **findings).samples.train.fingerprint != (
        few.train.fingerprint
    )


MISTAKES = {
    "one class an image": (SEVERAL, "several findings; write objective.loss=sigmoid."),
    "so many of each class": ([*SIGMOID, "objective.per_class=2"], "write objective.fraction."),
    "a finding that never occurs": ([*SIGMOID, "evaluate.label_names=[nothing]"], "None of nothing ever occurs in"),
    "too few held out": (
        [*SIGMOID, "evaluate.label_names=[rare]", "objective.hold_out=0.02"],
        "in which every finding is always there or never",
    ),
    "a weight of nothing": ([*SIGMOID, "objective.class_weights={big: 2}"], "write some of odd, small, rare."),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_sentence(mistake, prepared, findings):
    overrides, expected = MISTAKES[mistake]
    names = [word for word in overrides if word.startswith("evaluate.label_names")][:-1]
    with pytest.raises(UserError) as error:
        prepared(*[word for word in overrides if word not in names], **findings)
    assert expected in str(error.value) and len(str(error.value).splitlines()) == 1
