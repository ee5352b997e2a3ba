"""Several encoders on the same shards with masks: what `evaluators.judging` does, for features of places."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from prelude.checkpoints.sources import OpenedEncoder
from prelude.data.counting import counted
from prelude.data.errors import UserError
from prelude.data.shards import ShardIndex
from prelude.evaluators.dense.masks import every_sample, mask_labels, masks_of
from prelude.evaluators.dense.places import Places
from prelude.evaluators.features.bank import Bank
from prelude.evaluators.features.dense import (
    check_dense,
    default_dense_kind,
    dense_plan,
    is_dense,
    layout_of,
    patches_like,
)
from prelude.evaluators.features.extraction import evaluation_plan
from prelude.evaluators.features.joining import joined
from prelude.evaluators.features.labels import Labels
from prelude.evaluators.features.pixels import is_pixels, open_pixels
from prelude.evaluators.judging import Judging, bank_folder, open_source
from prelude.pretrain import distributed


@dataclass(frozen=True)
class DenseJudging(Judging):
    """Evaluators get `Places` by kind. Raw pixels are those of the patches, or of the places, of the encoder beside
    them, at its size."""

    ignored: Sequence[int] = ()  # classes of the masks that count for nothing
    of_defects: bool = False  # masks say where a defect is, and images without one have none

    @cached_property
    def indexes(self) -> list[ShardIndex]:
        return self.labelled.opened()

    @cached_property
    def labels(self) -> list[Labels]:
        return [every_sample(index) if self.of_defects else mask_labels(index) for index in self.indexes]

    def opened(self, source: str, sources: Sequence[str], seed: int) -> OpenedEncoder:
        if not is_pixels(source):
            return open_source(source, sources, seed)
        beside = _beside(sources, seed)
        return open_pixels(source, beside, largest=max(beside.config.size) if beside else 0)

    def features(self, source: str, sources: Sequence[str], encoder: OpenedEncoder) -> list[dict[str, Places]]:
        kinds, plan = self._kinds(source, sources, encoder), dense_plan(evaluation_plan(encoder))
        reading = {"batch_size": self.batch_size, "num_workers": self.num_workers, "device": distributed.device()}
        kept, found = Bank(self.bank or bank_folder(source, sources)), []
        size, channels = encoder.config.size, encoder.config.in_chans
        grids = {kind: layout_of(encoder.model, kind, size, channels) for kind in kinds}
        for index, labels in zip(self.indexes, self.labels, strict=True):
            part = joined(kept.rows(encoder, index, kinds, plan=plan, **reading), labels, index)
            ids = next(iter(part.values())).sample_ids
            seen_as = plan.views[0], self.ignored, channels, self.of_defects
            masks, unreadable, unseen = masks_of(index, ids, *seen_as)
            if unreadable:
                self.say(f"{counted(unreadable, 'mask')} of {index.named} unreadable, which count for nothing.")
            if unseen:
                only = "with defects outside of the centre square only"
                self.say(f"{counted(unseen, 'image')} of {index.named} {only}, left out.")
            found.append({kind: _places(of_kind, masks, grids[kind]) for kind, of_kind in part.items()})
        return found

    def described_data(self, train: dict[str, Places], test: dict[str, Places]) -> tuple[dict, list[str]]:
        data, warnings = super().described_data(train, test)
        return data | ({"ignored": sorted(set(self.ignored))} if self.ignored else {}), warnings

    def _kinds(self, source: str, sources: Sequence[str], encoder: OpenedEncoder) -> Sequence[str]:
        if is_pixels(source):
            beside = _beside(sources, self.seed)
            size = encoder.config.size
            if beside is None:
                return [f"patches{max(size[0] // 4, 1)}x{max(size[1] // 4, 1)}"]
            kind = default_dense_kind(beside.model, beside.name)
            return [patches_like(layout_of(beside.model, kind, beside.config.size, beside.config.in_chans), size)]
        kinds = list(self.kinds or [default_dense_kind(encoder.model, encoder.name)])
        for kind in kinds:
            if not is_dense(kind):
                raise UserError(
                    f"features={kind} says nothing of places; write tokens or tokens4 of a vision transformer, map or "
                    "map2 of others."
                )
            check_dense(encoder.model, kind, encoder.name)
        return kinds


def _beside(sources: Sequence[str], seed: int) -> OpenedEncoder | None:
    """The encoder that raw pixels look like."""
    first = next((other for other in sources if not is_pixels(other)), None)
    return open_source(first, sources, seed) if first else None


def _places(features, masks, layout) -> Places:
    shown = vars(features) | {"labels": masks, "grid": (layout.rows, layout.columns)}
    return Places(**shown)
