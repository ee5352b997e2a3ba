"""The work of `prelude segment`: every source judged by its masks, and a sheet of some of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor

from prelude.evaluators.dense.drawing import cells, class_colours
from prelude.evaluators.dense.masks import IGNORED
from prelude.evaluators.features.dense import dense_plan
from prelude.evaluators.features.extraction import evaluation_plan
from prelude.evaluators.results import Result
from prelude.launch.place_sheets import DrawnJudging, Row


@dataclass(frozen=True)
class SegmentJudging(DrawnJudging):
    def results(self, source: str, sources: Sequence[str]) -> list[Result]:
        found: dict[str, Callable[[Tensor], Tensor]] = {}
        evaluators = [partial(evaluator, drawn=found.__setitem__) for evaluator in self.evaluators]
        results = DrawnJudging.results(replace(self, evaluators=evaluators), source, sources)
        if self.num_shown:
            self._draw(source, sources, found)
        return results

    def _draw(self, source: str, sources: Sequence[str], found: dict) -> None:
        encoder = self.opened(source, sources, self.seed)
        _, test = self.features(source, sources, encoder)
        places = next(iter(test.values()))
        masks = places.labels
        rows = self.rows(places.sample_ids, lambda: _with_most_classes(masks, self.num_shown))
        plan, ids = dense_plan(evaluation_plan(encoder)), places.sample_ids[rows]

        def block() -> list[Row]:
            images, line = self.images(plan, ids)
            size = tuple(images.shape[2:])
            drawn = {"masks": masks[rows]} | {what: predict(rows) for what, predict in found.items()}
            return [line, *((what, [cells(class_colours(one), size) for one in maps]) for what, maps in drawn.items())]

        self.add(encoder.name, ids, block)


def _with_most_classes(masks: Tensor, count: int) -> Tensor:
    """Rows of (N, H, W), in their order: those that show most, and of equals the first."""
    counts = [len(mask[mask != IGNORED].unique()) for mask in masks]
    return Tensor(sorted(sorted(range(len(counts)), key=lambda row: -counts[row])[:count])).long()
