"""Encoders on known classes and on images of another data set, which stand behind the test images."""

from dataclasses import dataclass, replace
from functools import cached_property

import torch

from prelude.data.absent import told_as
from prelude.data.counting import counted
from prelude.data.errors import UserError
from prelude.data.shards import ShardIndex
from prelude.data.signed_urls import shown_in
from prelude.evaluators.features.extraction import Features
from prelude.evaluators.features.labels import Labels, class_numbers
from prelude.evaluators.frozen.outliers import OTHER
from prelude.evaluators.judging import Judging
from prelude.evaluators.labelled import describe_data, num_in_both

NAMES = ("test", "others")


@dataclass(frozen=True)
class OutlierJudging(Judging):
    others: str | list[str] | None = None  # shards of what is none of the classes; their labels are not read

    @cached_property
    def _others(self) -> ShardIndex | None:
        said = self.labelled
        if not self.others:
            return None
        value_range = self._known[0].value_range if said.value_range == "auto" else said.value_range
        with told_as("--others "):
            return ShardIndex(self.others, said.label, value_range, said.max_pixels, said.image)

    @cached_property
    def _known(self) -> list[ShardIndex]:
        return self.labelled.indexes()

    @cached_property
    def indexes(self) -> list[ShardIndex]:
        """Of train, and of test with the others behind."""
        train, test = self._known
        if self._others is None:
            return [train, test]
        parts = dict(zip(NAMES, (test, self._others), strict=True))
        both = ShardIndex.joined(parts, dict.fromkeys(NAMES, 1.0), test.value_range, test.max_pixels)
        return [train, both.with_classes(train.classes)]

    @cached_property
    def labels(self) -> list[Labels]:
        train, test = self._labels_of_known
        if self._others is None:
            return [train, test]
        count = self._others.num_samples
        values = torch.cat([test.values, torch.full((count,), OTHER)])
        return [train, replace(test, values=values, known=torch.cat([test.known, torch.ones(count, dtype=torch.bool)]))]

    @cached_property
    def _labels_of_known(self) -> list[Labels]:
        return [class_numbers(index) for index in self._known]

    def check(self) -> None:
        """Raises UserError also for others that are known images."""
        if self._others is not None:
            for name, index in zip(("train", "test"), self._known, strict=True):
                if index.fingerprint == self._others.fingerprint or num_in_both(self._others, index):
                    raise UserError(
                        f"--others holds images of --{name}, and the same image cannot be known and another; write "
                        f"shards of another data set."
                    )
        super().check()

    def described_data(self, train: dict[str, Features], test: dict[str, Features]) -> tuple[dict, list[str]]:
        """The others stand beside test, each with its own count."""
        if self._others is None:
            return super().described_data(train, test)
        count = self._known[1].num_samples
        parts = [{kind: _counted(part, of_others, count) for kind, part in test.items()} for of_others in (False, True)]
        data, warnings = describe_data(self.labelled, self._known, self._labels_of_known, train, parts[0])
        data["test"]["fingerprint"] = self._known[1].fingerprint
        found = len(next(iter(parts[1].values())))
        unreadable = self._others.num_samples - found
        if unreadable:
            warnings.append(f"{unreadable} of {self._others.num_samples} others could not be read and are left out.")
        if self._others.num_lost:
            warnings.append(f"Damage in --others has cost about {counted(self._others.num_lost, 'image')}, left out.")
        about = {"fingerprint": self._others.fingerprint, "num_samples": found, "num_unreadable": unreadable}
        return {**data, "others": {"shards": shown_in(self.others), **about}}, warnings


def _counted(features: Features, of_others: bool, first: int) -> Features:
    """The test images, or the others, which come from sample id `first` on; to be counted, so without values."""
    rows = (features.sample_ids >= first) == of_others
    kept = {name: getattr(features, name)[rows] for name in ("labels", "sample_ids")}
    return replace(features, values=features.values[:0], **kept)
