"""Retrieval: how well the images nearest to one are of its class.

A query is compared with every image of a gallery by the cosine of their features, centred by the gallery's mean as for
k-NN. What is relevant to it are the gallery's images of its class.

- recall@k: the share of queries with a relevant image among the k nearest (Jegou et al., "Product Quantization for
  Nearest Neighbor Search", 2011, and the metric learning literature; not the share of relevant images found).
- mAP: the mean over queries of the average precision over the whole gallery. R-precision: the share of relevant images
  among the R nearest, R being how many there are.
- An image is never an answer to itself: where gallery and queries are the same images, each is left out in turn, and
  where some queries are in the gallery too, each of these is left out of its own. Where groups are known (a patient, a
  camera), all images of the query's group are left out of its gallery.
- A query without a relevant image has no answer; it is left out, counted and told of. One that has nothing else to be
  found is always right; it is told of, and refused where all are. So is a k that reaches the whole gallery.
- Between several kinds of feature the choice is made on a tenth of the gallery; in leaving one out nothing may be
  chosen, and the first kind is the headline. Uncentred features stand beside it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prelude.data.counting import counted
from prelude.data.errors import UserError
from prelude.evaluators.features.extraction import Features
from prelude.evaluators.frozen.exact_search import Neighbours
from prelude.evaluators.frozen.ranking import bootstrapped, group_warnings
from prelude.evaluators.frozen.splits import HELD_OUT, hold_out
from prelude.evaluators.results import Outcome, Percent

KS = (1, 5, 10)
ELEMENTS = 2**23  # cosines that are ranked at once


@dataclass(frozen=True)
class Ranked:
    """What was found for Q queries that have something to be found."""

    numbers: dict[str, Tensor]  # (Q,) float64 in 0..1 by the name of a number
    groups: Tensor | None  # (Q,)
    num_without: int  # queries that were left out
    num_sure: int  # queries that have nothing irrelevant to be found


def retrieval(
    train: dict[str, Features],
    test: dict[str, Features],
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    ks: Sequence[int] | None = None,
) -> Outcome:
    """recall@k, mAP and R-precision of the test images as queries, train being the gallery, by kind of feature.

    ks: by default those of `KS` that the gallery has room for. seed: of the part that is held out where a kind is
    chosen, and of the bootstrap behind the standard errors. Raises UserError where no query has anything to be found,
    or nothing else, and for a k that is no choice.
    """
    same = _same_images(train, test)
    gallery, by_kind, details, held_out = next(iter(train.values())), {}, {}, None
    ks = _ks(ks, _most_answers(gallery, next(iter(test.values()))))
    if len(train) > 1 and not same:
        held_out = _held_out_map(train, seed, device)
    for kind in train:
        found = {centred: ranked(train[kind], test[kind], device=device, centred=centred, ks=ks) for centred in (1, 0)}
        by_kind[kind] = {name: _percent(values, found[1].groups, seed) for name, values in found[1].numbers.items()}
        details[kind] = {name: 100 * values.mean().item() for name, values in found[0].numbers.items()}
        refuse_one_class(found[1])
    chosen = max(held_out, key=held_out.get) if held_out else next(iter(train))
    return Outcome(
        evaluator="retrieval",
        numbers=by_kind[chosen],
        chosen={"features": chosen},
        recipe={
            "ks": ks,
            "features": list(train),
            "held_out": HELD_OUT if held_out else None,
            "leave_one_out": same,
            "grouped": gallery.groups is not None,
            "seed": seed,
        },
        details={
            "held_out_map": held_out or {},
            "by_features": by_kind,
            "uncentred": details,
            "num_without": found[1].num_without,
        },
        by_kind=by_kind,
        warnings=_warnings(found[1]) + ([_NO_CHOICE] if held_out == {} else []),
    )


_NO_CHOICE = (
    "No held-out image of the gallery has another of its class to be found there, so the kind of feature is the first "
    "of those asked for, and not chosen."
)


def _held_out_map(gallery: dict[str, Features], seed: int, device: torch.device | str) -> dict[str, float]:
    """By kind of feature, of a held-out part of the gallery in the rest of it; empty where nothing is to be found."""
    labels = next(iter(gallery.values())).labels.unique(return_inverse=True)[1]
    try:
        fit, held = hold_out(labels, seed)
        found = {kind: ranked(of, of, device=device, rows=fit, queries=held, ks=()) for kind, of in gallery.items()}
    except UserError:
        return {}
    return {kind: each.numbers["map"].mean().item() for kind, each in found.items()}


def _most_answers(gallery: Features, queried: Features) -> int:
    """That any query has to choose from."""
    if gallery.groups is not None:
        sizes = torch.bincount(gallery.groups, minlength=int(queried.groups.max()) + 1)
        return len(gallery) - int(sizes[queried.groups].min())
    itself = gallery.data_fingerprint == queried.data_fingerprint or queried.same_as is not None
    return len(gallery) - itself


def _ks(wanted: Sequence[int] | None, most: int) -> list[int]:
    """Growing. Where k is all that can be found, every query is right."""
    if wanted is None:
        return [k for k in KS if k < most] or [1]
    if max(wanted) >= most:
        raise UserError(
            f"--k {max(wanted)} is the whole gallery, in which a query finds {counted(most, 'image')}, so that each "
            f"is right; "
            f"write less."
        )
    return sorted(set(wanted))


def refuse_one_class(found: Ranked) -> None:
    """Raises UserError where no answer could have been wrong."""
    if found.num_sure == len(next(iter(found.numbers.values()))):
        raise UserError(
            "Every query has images of its own class only to be found, so that each answer is right; write a gallery "
            "of two classes or more."
        )


def _warnings(found: Ranked) -> list[str]:
    warnings = []
    if found.num_without:
        warnings.append(
            f"{counted(found.num_without, 'query')} without an image of the same class to be found, left out."
        )
    if found.num_sure:
        warnings.append(
            f"{counted(found.num_sure, 'query')} with nothing but images of the same class to be found, and so right."
        )
    return warnings + group_warnings(found.groups)


def ranked(
    gallery: Features,
    queried: Features,
    *,
    device: torch.device | str = "cpu",
    rows: Tensor | None = None,
    queries: Tensor | None = None,
    centred: bool = True,
    ks: Sequence[int] = KS,
) -> Ranked:
    """How `queries` (rows of `queried`, default: all) fare in the gallery (its `rows`, default: all).

    Equal cosines rank in the order of the gallery. Raises UserError where no query has anything to be found.
    """
    bank = Neighbours(gallery.values, rows=rows, centred=bool(centred), device=device)
    rows = torch.arange(len(gallery)) if rows is None else rows
    queries = torch.arange(len(queried)) if queries is None else queries
    same = gallery.data_fingerprint == queried.data_fingerprint
    found: dict[str, list[Tensor]] = {}
    kept, num_sure = [], 0
    for some in queries.split(max(ELEMENTS // len(rows), 1)):
        cosines = bank.cosines(queried.values[some]).cpu()
        relevant = queried.labels[some][:, None] == gallery.labels[rows]  # (q, N)
        out = torch.zeros_like(relevant)
        if same:
            out |= queried.sample_ids[some][:, None] == gallery.sample_ids[rows]
        elif queried.same_as is not None:
            out |= queried.same_as[some][:, None] == gallery.sample_ids[rows]
        if gallery.groups is not None:
            out |= queried.groups[some][:, None] == gallery.groups[rows]
        has = (relevant & ~out).any(1)
        num_sure += int((has & (relevant | out).all(1)).sum())
        order = cosines.masked_fill(out, -torch.inf)[has].argsort(dim=1, descending=True, stable=True)
        for name, values in _numbers((relevant & ~out)[has].gather(1, order), ks).items():
            found.setdefault(name, []).append(values)
        kept.append(some[has])
    kept = torch.cat(kept)
    if not len(kept):
        outside, or_else = "", ""
        if gallery.groups is not None:
            outside, or_else = " outside its own group", ", or leave --group out"
        raise UserError(
            f"No test image has another of its class to be found in the gallery{outside}; write shards with classes in "
            f"common{or_else}."
        )
    groups = None if queried.groups is None else queried.groups[kept]
    numbers = {name: torch.cat(values) for name, values in found.items()}
    return Ranked(numbers, groups, len(queries) - len(kept), num_sure)


def _numbers(hit: Tensor, ks: Sequence[int]) -> dict[str, Tensor]:
    """hit: (q, N) bool, whether the nth nearest is relevant, at least one in each row. Returns (q,) by name."""
    so_far = hit.cumsum(1)
    total = so_far[:, -1:]  # R
    precision = so_far.double() / torch.arange(1, hit.shape[1] + 1)
    numbers = {f"recall@{k}": hit[:, :k].any(1).double() for k in ks}
    numbers["map"] = (precision * hit).sum(1) / total[:, 0]
    numbers["r_precision"] = precision.gather(1, total - 1)[:, 0]
    return numbers


def _percent(values: Tensor, groups: Tensor | None, seed: int) -> Percent:
    """The mean, and its standard error by bootstrap over queries, or over groups of them."""
    return bootstrapped(lambda weights: (weights @ values) / weights.sum(1), len(values), seed, groups)


def _same_images(train: dict[str, Features], test: dict[str, Features]) -> bool:
    return next(iter(train.values())).data_fingerprint == next(iter(test.values())).data_fingerprint
