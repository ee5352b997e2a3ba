"""Features and the labels of their samples, put together."""

from torch import Tensor

from prelude.data.errors import UserError
from prelude.data.shards import ShardIndex
from prelude.evaluators.features.bank import Rows
from prelude.evaluators.features.extraction import Features
from prelude.evaluators.features.labels import Labels

_ROWS = 1024  # that are looked at in one go
_MORE = ("groups", "same_as")  # of each sample, where they are known


def joined(rows: dict[str, Rows], labels: Labels, index: ShardIndex) -> dict[str, Features]:
    """Features with labels, of the samples that have both. Values stay mapped where that is all of them.

    Raises UserError for features that are no numbers, which would spoil means and votes of all others in silence.
    """
    found = {}
    for kind, part in rows.items():
        has_label = labels.known[part.sample_ids]
        values, ids = part.values, part.sample_ids
        if not has_label.all():
            values, ids = values[has_label], ids[has_label]
        if (bad := _first_not_finite(values)) is not None:
            sample = int(ids[bad])
            raise UserError(
                f"The {kind} features of {index.key(sample)} in {index.shard_of(sample)} are not finite; mend the "
                "encoder, or leave such images out."
            )
        more = {name: of[ids] for name in _MORE if (of := getattr(labels, name)) is not None}
        found[kind] = Features(values, labels.values[ids], ids, index.fingerprint, kind, part.recipe, **more)
    return found


def _first_not_finite(values: Tensor) -> int | None:
    for start in range(0, len(values), _ROWS):
        bad = (~values[start : start + _ROWS].flatten(1).isfinite().all(1)).nonzero()
        if len(bad):
            return start + int(bad[0])
    return None
