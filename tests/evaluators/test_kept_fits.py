"""Fits are kept by all that decides them, found as they were, and made again where a file is damaged."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch

from prelude.evaluators.features.bank import Bank
from prelude.evaluators.features.extraction import Features
from prelude.evaluators.frozen.anomaly import anomaly
from prelude.evaluators.frozen.fewshot import fewshot
from prelude.evaluators.frozen.knn import knn
from prelude.evaluators.frozen.ncm import ncm
from prelude.evaluators.kept_fits import KeptFits, content_of, key_of
from prelude.evaluators.results import Result

KEY = "0123456789abcdef" * 2  # as `key_of` gives them
CPU = torch.device("cpu")


def features(seed: int, count: int) -> dict[str, Features]:
    labels = torch.arange(count) % 3
    values = torch.randn(count, 4, generator=torch.Generator().manual_seed(seed))
    values[torch.arange(count), labels] += 2
    return {"pool": Features(values, labels, torch.arange(count), "f", "pool", groups=torch.arange(count) // 2)}


def result_of(outcome) -> dict:
    return Result("s", {}, {}, {}, outcome, "", 0.0, {}).to_json()


FEW = partial(fewshot, per_class=(2,), shares=(), draws=2)


@pytest.mark.parametrize("evaluator", [knn, ncm, anomaly, FEW], ids=["knn", "ncm", "anomaly", "few"])
def test_what_is_found_is_what_was_kept(evaluator, tmp_path):
    fits, outcome = KeptFits(tmp_path), evaluator(features(0, 30), features(1, 12))
    assert fits.found("key") is None
    kept = fits.keep("key", outcome, 1.25)
    found, seconds = fits.found("key")
    assert seconds == 1.25 and result_of(found) == result_of(kept) and found.numbers == outcome.numbers
    assert json.loads(json.dumps(result_of(outcome))) == result_of(found)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found.right, outcome.right, strict=True))


def test_whatever_decides_a_fit_names_it():
    train, test = features(0, 30), features(1, 12)
    one = train["pool"]
    moved, label, order = one.values.clone(), one.labels.clone(), one.groups.clone()
    moved[29, 3] += 1e-3
    label[7] = 2
    order[5] = 9
    changes = [{"pool": replace(one, values=moved)}, {"pool": replace(one, labels=label)},
               {"pool": replace(one, groups=order)}, {"pool": replace(one, groups=None)}, {"mean": one},
               {"pool": one, "mean": one}]  # fmt: skip
    contents = [content_of(train, test), content_of(test, train), *(content_of(change, test) for change in changes)]
    assert len(set(contents)) == len(contents) and content_of(features(0, 30), features(1, 12)) == contents[0]
    same = [key_of(knn, contents[0], 0, CPU) for _ in range(2)]
    others = [key_of(ncm, contents[0], 0, CPU), key_of(knn, contents[0], 1, CPU), key_of(knn, contents[1], 0, CPU),
              key_of(partial(knn, ks=[5]), contents[0], 0, CPU), key_of(partial(knn, ks=[6]), contents[0], 0, CPU),
              key_of(knn, contents[0], 0, torch.device("cuda"))]  # fmt: skip
    assert len({*same, *others}) == 7


def test_a_damaged_fit_is_none_and_one_that_cannot_be_kept_is_told(tmp_path, caplog):
    fits, outcome = KeptFits(tmp_path), ncm(features(0, 30), features(1, 12))
    fits.keep(KEY, outcome, 1.0)
    path = tmp_path / "fits" / f"{KEY}.json"
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole.replace(b'"value": ', b'"value": 1', 1), b"", b"\xff\n{}", whole[40:]):
        path.write_bytes(damaged)
        assert fits.found(KEY) is None
    fits.keep(KEY, outcome, 1.0)
    assert path.read_bytes() == whole
    Bank(tmp_path).clear()
    assert not path.exists()
    (tmp_path / "fits").write_text("in the way")
    assert fits.keep(KEY, outcome, 1.0).numbers == outcome.numbers and len(caplog.messages) == 1
