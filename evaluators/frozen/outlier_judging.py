"""Encoders on known classes and on images of another data set, which stand behind the test images."""

from dataclasses import dataclass, replace
from functools import cached_property

import torch

from prelude.data.shards import ShardIndex
from prelude.evaluators.features.labels import Labels, class_numbers
from prelude.evaluators.frozen.outliers import OTHER
from prelude.evaluators.judging import Judging

NAMES = ("test", "others")


@dataclass(frozen=True)
class OutlierJudging(Judging):
    others: str | list[str] | None = None  # shards of what is none of the classes; their labels are not read

    @cached_property
    def _others(self) -> ShardIndex | None:
        said = self.labelled
        return (
            ShardIndex(self.others, said.label, said.value_range, said.max_pixels, said.image) if self.others else None
        )

    @cached_property
    def indexes(self) -> list[ShardIndex]:
        train, test = self.labelled.indexes()
        if self._others is None:
            return [train, test]
        parts = dict(zip(NAMES, (test, self._others), strict=True))
        both = ShardIndex.joined(parts, dict.fromkeys(NAMES, 1.0), test.value_range, test.max_pixels)
        return [train, both.with_classes(train.classes)]

    @cached_property
    def labels(self) -> list[Labels]:
        if self._others is None:
            return super().labels
        train, test = (class_numbers(index) for index in self.labelled.indexes())
        count = self._others.num_samples
        values = torch.cat([test.values, torch.full((count,), OTHER)])
        return [train, replace(test, values=values, known=torch.cat([test.known, torch.ones(count, dtype=torch.bool)]))]
