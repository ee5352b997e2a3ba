"""Which training samples are held out to choose a setting, how classes are numbered, and a choice at a grid's edge.

Whatever an evaluator chooses, it chooses on the held-out part of train; test labels are read once, at the end.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from prelude.data.counting import counted
from prelude.data.errors import UserError
from prelude.evaluators.features.extraction import Features

HELD_OUT = 0.1  # share of each class
FAR = 2  # times the share that was asked for
LEVEL = 0.1  # points, by which neighbours in a grid are told apart
MOST_LISTED = 10  # classes in a sentence


def contiguous_labels(train: dict[str, Features], test: dict[str, Features]) -> tuple[Tensor, Tensor, int]:
    """Train and test labels as 0..C-1 in the order of the class numbers of train, and C.

    A test sample of a class that train does not have gets -1, which no prediction can match; see `lacking_warnings`.
    Raises UserError where train has fewer than two classes.
    """
    raw, test_raw = next(iter(train.values())).labels, next(iter(test.values())).labels
    classes, labels = raw.unique(return_inverse=True)
    if len(classes) < 2:
        raise UserError(
            f"The train shards hold one class only ({classes.tolist()}); write shards with two classes or more."
        )
    place = torch.searchsorted(classes, test_raw).clamp(max=len(classes) - 1)
    return labels, torch.where(classes[place] == test_raw, place, -1), len(classes)


def lacking_warnings(train: dict[str, Features], test: dict[str, Features]) -> list[str]:
    """A warning where test has class numbers that train lacks."""
    return lacking(*(next(iter(part.values())).labels for part in (train, test)))


def lacking(known: Tensor, found: Tensor) -> list[str]:
    """The same of class numbers alone. known: (N,) of train; found: (M,) of test."""
    strange = ~torch.isin(found, known)
    if not strange.any():
        return []
    return [
        f"{int(strange.sum())} of {len(found)} test images are of classes that train lacks "
        f"({first_few(found[strange].unique().tolist())}), and count as missed."
    ]


def first_few(numbers: Sequence[int]) -> str:
    return ", ".join([*map(str, numbers[:MOST_LISTED]), *(["…"] if len(numbers) > MOST_LISTED else [])])


def hold_out(labels: Tensor, seed: int, share: float = HELD_OUT) -> tuple[Tensor, Tensor]:
    """Indices (fit, held out) of a seeded split that takes `share` of each class.

    A class of at least two samples gives at least one and keeps at least one; a class of one keeps it.
    """
    count = torch.bincount(labels)
    wanted = torch.where(count > 1, (count * share).round().long().clamp(min=1), 0)
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    by_class = shuffled[labels[shuffled].argsort(stable=True)]
    first = count.cumsum(0) - count
    sorted_labels = labels[by_class]
    place_in_class = torch.arange(len(labels)) - first[sorted_labels]
    held = place_in_class < wanted[sorted_labels]
    if not held.any():
        raise UserError("The train shards hold one sample a class, so nothing can be held out; write more of them.")
    return by_class[~held].sort().values, by_class[held].sort().values


def hold_out_groups(groups: Tensor, seed: int, share: float) -> tuple[Tensor, Tensor]:
    """The same of whole groups, without regard to classes: in a seeded order, until they have `share` of the samples.

    A group with which they would have more than `FAR` times that is passed over while others remain; where there is no
    other, the smallest is held out. groups: (N,) int64. Raises UserError for a single group.
    """
    group, size = groups.unique(return_inverse=True, return_counts=True)[1:]
    if len(size) < 2:
        raise UserError("The train shards hold one group only, so nothing can be held out; write more of them.")
    turn = torch.randperm(len(size), generator=torch.Generator().manual_seed(seed))
    wanted, count, taken = share * len(groups), 0, []
    for place, own in zip(turn.tolist(), size[turn].tolist(), strict=True):
        if count >= wanted or len(taken) == len(size) - 1:
            break
        if count + own <= FAR * wanted:
            count += own
            taken.append(place)
    is_held = torch.isin(group, torch.tensor(taken or [int(turn[size[turn].argsort(stable=True)[0]])]))
    return (~is_held).nonzero()[:, 0], is_held.nonzero()[:, 0]


def share_warnings(num_held: int, total: int, share: float) -> list[str]:
    """A warning where whole groups made the held-out part another one than was asked for."""
    if share * total / FAR <= num_held <= FAR * share * total:
        return []
    return [
        f"{num_held} of {counted(total, 'train image')} are held out, {100 * num_held / total:.2g} % where "
        f"{100 * share:g} % were asked for: groups are held out whole, and these are few or large."
    ]


def edge_warnings(
    setting: str,
    value: float,
    grid: Sequence[float],
    how_often: str = "",
    scores: Sequence[float] = (),
    losses: Sequence[float] = (),
) -> list[str]:
    """A warning where `value`, which was chosen for `setting`, is the least or the largest of a grid of several.

    scores: held-out, in percent, of the grid's values. What a weight decay does vanishes with it: where the least one
    is `LEVEL` or less above the next, no lesser one can be better by much, and there is none. losses: held-out, of the
    grid's values. They are smooth where scores jump by single images: where the loss rises towards the least value
    already, what lies beyond fits the training images alone, and there is no warning either.
    """
    if len(set(grid)) < 2 or value not in (min(grid), max(grid)):
        return []
    if scores and value == min(grid):
        by_value = dict(sorted(zip(grid, scores, strict=True)))
        least, following, *_ = by_value.values()
        if least - following <= LEVEL:
            return []
    if losses and value == min(grid):
        least, following, *_ = dict(sorted(zip(grid, losses, strict=True))).values()
        if least > following:
            return []
    return [
        f"The chosen {setting} {value:g} is at the edge of the grid ({min(grid):g} to {max(grid):g}){how_often}, so a "
        f"better one may lie outside."
    ]
