"""The labelled shards that encoders are judged on: which, which part of them, and what their labels are."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache
from typing import Literal

import numpy as np
import torch

from prelude.data.absent import told_as
from prelude.data.class_names import with_class_names
from prelude.data.counting import counted
from prelude.data.decode import MAX_PIXELS, ValueRange
from prelude.data.image_folder import ImageFolder
from prelude.data.labels import in_words
from prelude.data.remote_shards import RemoteShard
from prelude.data.select import Selection, selected
from prelude.data.shards import ShardIndex
from prelude.data.signed_urls import shown_in
from prelude.evaluators.features.extraction import Features
from prelude.evaluators.features.labels import Labels, VectorFormat
from prelude.pretrain.config import EvaluateConfig, SelectConfig

_SECTION = "evaluate."
IMAGE_OF_SECTION = f"{_SECTION}image="
FEW = 20  # images: of fewer, one alone is 5 points or more


@dataclass(frozen=True)
class Labelled:
    """The shards that encoders are judged on."""

    train: str | Sequence[str]
    test: str | Sequence[str]
    label: str  # where the class is: extension of the member (cls, txt), or json:FIELD
    vectors: VectorFormat | None = None  # where that member says which of several findings there are
    value_range: ValueRange | Literal["auto"] | None = None  # of images with more than 8 bits, see `ShardIndex`
    max_pixels: int = MAX_PIXELS
    image: str = ""  # extension of the image's member; "": any
    classes: tuple[str, ...] = ()  # names in the order of their numbers; (): sorted, where labels are text
    train_select: Selection | None = None  # a part of the shards
    test_select: Selection | None = None
    group: str = ""  # a label whose value samples that belong together share, such as json:patient
    # The same as the section says it that train is of: what holds out goes by it, and no evaluation does
    label_group: str = field(default="", compare=False)
    # With which images will be read, where that is known: no other shards, see `ShardIndex`
    channels: int | None = field(default=None, compare=False)
    one_set: bool = False  # test alone, which is train as well: for what leaves each sample out in turn
    # How they are spelled where they were given, see `told_as`
    named: tuple[str, str] = field(default=("--train ", "--test "), compare=False)
    image_named: str = field(default="--image ", compare=False)
    has_options: bool = field(default=True, compare=False)  # --train and --test, in the place of what a section says

    def opened(self) -> list[ShardIndex]:
        """Of train and test. Raises UserError as `ShardIndex`, and for a part that is not there."""
        if self.one_set:
            return 2 * [self._part("test", self.value_range)]
        if self.value_range == "auto":  # found among train, so that the same values are black and white in test
            train = self._part("train", "auto")
            return [train, self._part("test", train.value_range)]
        test = self._part("test", self.value_range)
        return [self._part("train", self.value_range), test]

    def _part(self, side: str, value_range: ValueRange | Literal["auto"] | None) -> ShardIndex:
        with told_as(*self.named_as(side)):
            shards, seen_as = getattr(self, side), (value_range, self.max_pixels, self.image, self.channels)
            index = ShardIndex(shards, self.label, *seen_as)
        select = f"{side}_select"
        return selected(index, getattr(self, select), select)

    def named_as(self, side: str) -> tuple[str, str, str]:
        """How train or test is spelled, what else may be written where that is a section's, and how an image is."""
        name = self.named[("train", "test").index(side)]
        otherwise = f"--{side} SHARDS" if self.has_options and name.startswith(_SECTION) else ""
        return name, otherwise, self.image_named

    def indexes(self) -> list[ShardIndex]:
        """The same, which agree on the numbers of class names. Raises UserError for labels that are no classes, too."""
        return self.opened() if self.vectors else with_class_names(self.opened(), self.classes)

    def described(self, name: str, index: ShardIndex) -> dict:
        """Of train or test, for the record."""
        select = getattr(self, f"{name}_select")
        chosen = {"select": select.said()} if select else {}
        return {"shards": shown_in(getattr(self, name)), **chosen, "fingerprint": index.fingerprint}

    def described_labels(self, index: ShardIndex) -> dict:
        """What labels are, for the record: names of classes in the order of their numbers, where they have any."""
        found = {"label": self.label}
        if index.classes:
            found["classes"] = list(index.classes)
        if self.image:
            found["image"] = self.image
        if self.vectors:
            found["names"] = list(self.vectors.names)
            asked = {"field": self.vectors.field, "group": self.vectors.group_field}
            found |= {name: value for name, value in asked.items() if value}
        return found


def labelled_section(
    section: EvaluateConfig, value_range=None, max_pixels: int = MAX_PIXELS, channels: int | None = None
) -> Labelled:
    """What a config's own section says."""
    selects = {name: selection(getattr(section, name)) for name in ("train_select", "test_select")}
    named = {"image": section.image or "", "classes": tuple(section.classes), "channels": channels}
    shards = section.train_shards, section.test_shards
    found = Labelled(*shards, section.label, None, value_range, max_pixels, **named, **selects)
    return replace(found, named=named_by_section(), image_named=IMAGE_OF_SECTION, has_options=False)


def named_by_section(train: bool = True, test: bool = True) -> tuple[str, str]:
    """How shards are spelled of which a run's evaluate section names train, test, or both."""
    return f"{_SECTION}train_shards=" if train else "--train ", f"{_SECTION}test_shards=" if test else "--test "


def selection(section: SelectConfig | None) -> Selection | None:
    return Selection(**section.model_dump()) if section else None


def ungrouped(name: str, labels: Labels) -> list[str]:
    """Of train or test, whose images do not all have the label that a config groups by. name: which."""
    if not labels.num_ungrouped:
        return []
    total, what = int(labels.known.sum()), in_words(labels.group)
    if labels.num_ungrouped == total:
        return [f"No {name} image has a {what}, so each counts as a group of its own."]
    of = counted(total, f"{name} image")
    have = "has" if labels.num_ungrouped == 1 else "have"
    return [f"{labels.num_ungrouped} of {of} {have} no {what}, so each of these counts as a group of its own."]


def describe_data(
    labelled: Labelled,
    indexes: Sequence[ShardIndex],
    labels: Sequence[Labels],
    train: dict[str, Features],
    test: dict[str, Features],
) -> tuple[dict, list[str]]:
    """What the images were, for the record, and what to be told about them."""
    data, warnings = labelled.described_labels(indexes[0]), []
    if labelled.group:
        data["group"] = labelled.group
    if labelled.value_range:
        data["range"] = indexes[0].value_range
    for name, index, label, features in zip(("train", "test"), indexes, labels, (train, test), strict=True):
        one = next(iter(features.values()))
        unlabelled = int((~label.known).sum())
        unreadable = index.num_samples - unlabelled - len(one)
        warnings += left_out(name, index, unlabelled, unreadable)
        warnings += ungrouped(name, label)
        data[name] = {
            **labelled.described(name, index),
            "fingerprint": one.data_fingerprint,
            "num_samples": len(one),
            "num_unreadable": unreadable,
            "num_unlabelled": unlabelled,
        }
    return data, warnings + few_warnings(data["test"]["num_samples"]) + ([] if labelled.one_set else leaks(*indexes))


def left_out(name: str, index: ShardIndex, unlabelled: int, unreadable: int = 0) -> list[str]:
    """What of train or test is not there. name: which."""
    found, of = [], counted(index.num_samples, f"{name} image")
    if unlabelled:
        found.append(f"{unlabelled} of {of} left out, without a label.")
    if index.num_lost:
        found.append(f"Damage in the {name} shards has cost about {counted(index.num_lost, 'image')}, left out.")
    if unreadable:
        found.append(f"{unreadable} of {of} left out, unreadable.")
    return found


def few_warnings(num_test: int) -> list[str]:
    if num_test >= FEW:
        return []
    return [f"{num_test} test images are few: one of them alone is {100 / max(num_test, 1):.0f} points."]


def num_in_both(first: ShardIndex, second: ShardIndex) -> int:
    """How many samples of the first are in the second."""
    return int((same_images(first, second) >= 0).sum())


def with_overlap(labels: Sequence[Labels], indexes: Sequence[ShardIndex]) -> list[Labels]:
    """The labels of train and of test; those of test with which of its images are in train, where some are."""
    (train, test), (of_train, of_test) = indexes, labels
    same = None if train.fingerprint == test.fingerprint else same_images(test, train)
    if same is not None and (same >= 0).any():
        of_test = replace(of_test, same_as=torch.from_numpy(same))
    return [of_train, of_test]


@lru_cache(maxsize=1)  # what judges by it and what warns of it ask after each other, and folders take long
def same_images(first: ShardIndex, second: ShardIndex) -> np.ndarray:
    """(N,) int64: which sample of the second each of the first is, -1 for none, by where they lie: a copy of a shard is
    another one."""
    found = np.full(first.num_samples, -1, np.int64)
    of_first, of_second = (_by_file(index) for index in (first, second))
    for file in of_first.keys() & of_second.keys():
        (begin, offsets), (other_begin, others) = _offsets(first, of_first[file]), _offsets(second, of_second[file])
        _, here, there = np.intersect1d(offsets, others, return_indices=True)
        found[begin + here] = other_begin + there
    if all(any(isinstance(path, ImageFolder) for path in index.paths) for index in (first, second)):
        samples = {path: sample for sample, path in _in_folders(second)}
        for sample, path in _in_folders(first):
            found[sample] = samples.get(path, -1)
    return found


def _by_file(index: ShardIndex) -> dict[str, int]:
    """The numbers of its shards, but for folders, of which one may lie in another."""
    real = lambda path: path.identity if isinstance(path, RemoteShard) else os.path.realpath(path)  # noqa: E731
    return {real(path): number for number, path in enumerate(index.paths) if not isinstance(path, ImageFolder)}


def _in_folders(index: ShardIndex) -> Iterator[tuple[int, str]]:
    """The samples of folders that are read in place, and where their images really lie."""
    real = cache(os.path.realpath)  # of the folders: a million images lie in few
    for number, folder in enumerate(index.paths):
        if not isinstance(folder, ImageFolder):
            continue
        begin, offsets = _offsets(index, number)
        for sample, place in enumerate(np.searchsorted(folder.ends, offsets, side="right").tolist(), start=begin):
            parent, name = os.path.split(os.path.join(folder, folder.names[place]))
            path = os.path.join(real(parent), name)
            yield sample, os.path.realpath(path) if os.path.islink(path) else path


def _offsets(index: ShardIndex, shard: int) -> tuple[int, np.ndarray]:
    """The first of a shard's samples, and where the images of all of them lie in it."""
    end = int(index.ends[shard])
    begin = end - int(index.counts[shard])
    return begin, index.images[begin:end][:, 0]


def leaks(train: ShardIndex, test: ShardIndex) -> list[str]:
    """What train and test have in common, and must not."""
    if train.fingerprint == test.fingerprint:
        return ["Train and test are the same shards, so this says nothing about new images."]
    both = num_in_both(test, train)
    return [f"{both} of {test.num_samples} test images are train images too, and nothing new."] if both else []
