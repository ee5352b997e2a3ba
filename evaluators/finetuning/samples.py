"""Which labelled samples are trained on, which are held out, and which are tested; and what their labels are.

- Few labels are drawn first (`per_class`, `fraction`); of those, `hold_out` are kept apart.
- Where groups are known (`evaluate.label_group`), a group is held out whole; else a share of each class is.
- Test shards are never part of a choice. That they share groups with the training shards is told.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from prelude.data.counting import counted
from prelude.data.errors import UserError
from prelude.data.findings import VectorFormat
from prelude.data.shards import ShardIndex
from prelude.evaluators.features.labels import (
    Labels,
    class_numbers,
    grouped,
    label_group,
    label_vectors,
    no_group,
)
from prelude.evaluators.features.low_label import low_label
from prelude.evaluators.finetuning.recipe import FineTuneOptions
from prelude.evaluators.finetuning.targets import weights_of_classes, weights_of_findings
from prelude.evaluators.frozen.multilabel import both_there
from prelude.evaluators.frozen.splits import hold_out, hold_out_groups, lacking, share_warnings
from prelude.evaluators.labelled import Labelled, leaks, left_out, ungrouped
from prelude.pretrain.config import EvaluateConfig


@dataclass(frozen=True)
class Part:
    """Samples that are scored."""

    index: ShardIndex
    groups: Tensor | None = None  # (N,) int64: samples of one group must not be told apart as independent
    num_unlabelled: int = 0  # of its samples, which are not scored
    num_lacking: int = 0  # classes of its samples that are not trained on


@dataclass(frozen=True)
class Samples:
    train: ShardIndex  # that are trained on
    held_out: Part | None
    test: Part
    label: str
    classes: Tensor  # (C,) int64, growing: the class numbers; of findings, their places
    weights: Tensor | None  # of the loss: (C,), or (2, L) of absence and presence
    findings: VectorFormat | None  # where an image may show several
    answers: Tensor | None  # (N, L) of the training images, NaN where a finding is not known
    warnings: tuple[str, ...]


def labelled_samples(labelled: Labelled, section: EvaluateConfig, options: FineTuneOptions, seed: int) -> Samples:
    """section: of the config. seed: of the draws. Raises UserError for shards, or labels, that cannot be used."""
    whole, test = labelled.indexes()
    of_train, of_test = (_findings if labelled.vectors else _classes)(labelled, whole, test, options)
    if group := label_group(section.label, section.label_group):
        of_train, of_test = grouped([of_train, of_test], [whole, test], group, asked=False)
        if of_train.groups is None and of_test.groups is None:
            raise no_group(whole, group)
    values, known = of_train.values, np.flatnonzero(of_train.known.numpy())
    warnings = leaks(whole, test) or _shared_groups(of_train.groups, of_test.groups)
    warnings += ungrouped("train", of_train) + ungrouped("test", of_test)
    warnings += left_out("train", whole, whole.num_samples - len(known))
    strata = np.zeros(len(known), np.int64) if labelled.vectors else values.numpy()[known]
    ids = known[low_label(strata, per_class=options.per_class, fraction=options.fraction, seed=seed)]
    fit, held = ids, None
    if options.hold_out:
        fit, held = _held_out(ids, values, of_train.groups, options.hold_out, seed)
        warnings += [] if of_train.groups is None else share_warnings(len(held), len(ids), options.hold_out)
    values = values[fit]
    classes = torch.arange(values.shape[1]) if labelled.vectors else values.unique()
    if not labelled.vectors and len(classes) < 2:
        raise UserError(f"The train shards hold one class only ({classes.tolist()}); write shards with two or more.")
    num_lacking = 0
    if not labelled.vectors:
        there = of_test.values[of_test.known].unique()
        warnings += lacking(classes, of_test.values[of_test.known])
        num_lacking = int((~torch.isin(there, classes)).sum())
    return Samples(
        train=_subset(whole, fit),
        # Without `num_lacking`: the same factor for all validations, which runs that go on have not had.
        held_out=None if held is None else Part(_subset(whole, held), _of(of_train.groups, held)),
        test=Part(test, of_test.groups, int((~of_test.known).sum()), num_lacking),
        label=labelled.label,
        classes=classes,
        weights=_weights(options, values, classes, labelled.vectors, whole.classes),
        findings=labelled.vectors,
        answers=values if labelled.vectors else None,
        warnings=tuple(warnings),
    )


def _classes(labelled: Labelled, whole: ShardIndex, test: ShardIndex, options: FineTuneOptions) -> list[Labels]:
    """Of train and test."""
    if options.uncertain != "ignore":
        raise UserError(
            f"objective.uncertain={options.uncertain} is of several findings an image; name them in "
            f"evaluate.label_names, or leave it out."
        )
    labels = class_numbers(whole)
    if labels.values.min() < 0:
        raise UserError(
            f"Members .{labelled.label} hold the class number {labels.values.min().item()}; write 0 or more."
        )
    return [labels, class_numbers(test)]


def _findings(labelled: Labelled, whole: ShardIndex, test: ShardIndex, options: FineTuneOptions) -> list[Labels]:
    """Of train and test."""
    if options.loss != "sigmoid":
        raise UserError(
            f"objective.loss={options.loss} learns one class an image, and evaluate.label_names says that there are "
            f"several findings; write objective.loss=sigmoid."
        )
    if options.per_class is not None:
        raise UserError(
            "objective.per_class takes images of each class, and evaluate.label_names says that they show several "
            "findings; write objective.fraction."
        )
    labels = label_vectors(whole, labelled.vectors)
    of_test = label_vectors(test, labelled.vectors)
    if not both_there(of_test.values).any():
        raise UserError("The test shards have no label that is present in some images and absent in others.")
    return [labels, of_test]


def _held_out(ids: np.ndarray, values: Tensor, groups: Tensor | None, share: float, seed: int):
    """Ids of those that are trained on, and of those that are held out."""
    if groups is not None or values.ndim == 2:  # of several findings, each sample is a group without a known one
        own = torch.arange(len(ids)) if groups is None else groups[ids]
        fit, held = hold_out_groups(own, seed, share)
    else:
        fit, held = hold_out(values[ids].unique(return_inverse=True)[1], seed, share)
    if values.ndim == 2 and not both_there(values[ids[held.numpy()]]).any():
        raise UserError(
            f"objective.hold_out={share} leaves {counted(len(held), 'image')}, in which every finding is always "
            f"there or never; "
            f"write a larger one."
        )
    return ids[fit.numpy()], ids[held.numpy()]


def _weights(options: FineTuneOptions, values: Tensor, classes: Tensor, findings, names) -> Tensor | None:
    if findings:
        return weights_of_findings(options.class_weights, values, findings.names)
    weights = weights_of_classes(options.class_weights, values, classes, names)
    if weights is not None and options.loss == "sigmoid":
        return torch.stack([torch.ones_like(weights), weights])
    return weights


def _shared_groups(of_train: Tensor | None, of_test: Tensor | None) -> list[str]:
    if of_train is None or of_test is None or not (count := int(torch.isin(of_test, of_train).sum())):
        return []
    return [f"{count} test images are of groups that are in the train shards too, so they say little about new ones."]


def _of(groups: Tensor | None, ids: np.ndarray) -> Tensor | None:
    return None if groups is None else groups[ids]


def _subset(index: ShardIndex, ids: np.ndarray) -> ShardIndex:
    return index if len(ids) == index.num_samples else index.subset(ids)
