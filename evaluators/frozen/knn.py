"""Weighted k-nearest-neighbour classification on frozen features.

Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance Discrimination", CVPR 2018, section 3.4:
the k training images that are nearest by cosine s vote for their class with weight exp(s / T).

- Headline: k = 20, T = 0.07, features centred by the mean of the train set, votes weighted. It is fixed
  beforehand. Other k, unweighted votes and uncentred features are reported beside it, and never chosen from.
- Where several k or T are asked for, the choice among them is made on a tenth of the train set, as is the choice
  between several kinds of feature; never on the test set.
- The search is exact, see `evaluators.frozen.exact_search`, and there is one for each centring: weighted and unweighted
  votes, all k and all temperatures are counted from it.
"""

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from prelude.data.errors import UserError
from prelude.evaluators.defaults import TEMPERATURE, K
from prelude.evaluators.features.extraction import Features
from prelude.evaluators.frozen.exact_search import QUERIES, Neighbours
from prelude.evaluators.frozen.splits import HELD_OUT, contiguous_labels, hold_out, lacking_warnings
from prelude.evaluators.results import Outcome, Percent, among_first, hits, percent

KS = (1, 5, 10, 20, 50, 100, 200)
HEADLINE = "cosW, centred"
VARIANTS = {  # name: (votes weighted, features centred)
    "cosW, centred": (True, True),
    "cos, centred": (False, True),
    "cosW": (True, False),
    "cos": (False, False),
}


def knn(
    train: dict[str, Features],
    test: dict[str, Features],
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    ks: Sequence[int] = (K,),
    temperatures: Sequence[float] = (TEMPERATURE,),
) -> Outcome:
    """Test accuracy of k-NN for each kind of feature, headed by what a held-out part of train prefers.

    ks, temperatures: what to choose from. seed: of the held-out part; without effect where there is nothing to choose.
    Raises UserError for values of either that are not above 0.
    """
    if min(*ks, *temperatures) <= 0:
        raise UserError(f"k={list(ks)} and temperature={list(temperatures)} must be above 0; write k=20, 0.07.")
    labels, test_labels, num_classes = contiguous_labels(train, test)
    ks, temperatures = sorted(set(ks)), sorted(set(temperatures))
    reported = tuple(sorted({*KS, *ks}))
    sweep, by_features, right = [], {}, {}
    for kind in train:
        values, queries = train[kind].values, test[kind].values
        if len(train) * len(ks) * len(temperatures) > 1:
            fit, held = hold_out(labels, seed)
            bank = Neighbours(values, labels, rows=fit, device=device)
            found = classify(bank, values[held], labels[held], num_classes, ks, temperatures, always=ks)
            sweep += [
                {"features": kind, "k": k, "temperature": t, "held_out_top1": number["top1"].value}
                for (k, t), number in found.items()
            ]
        by_features[kind] = {}
        for centred in (True, False):
            bank = Neighbours(values, labels, centred=centred, device=device)
            wanted = (*temperatures, None)  # the neighbours are the same, however they vote
            guessed = right.setdefault(kind, {}) if centred else None  # of the headline's variant
            found = classify(bank, queries, test_labels, num_classes, reported, wanted, always=(K, *ks), right=guessed)
            for name, (weighted, of_centred) in VARIANTS.items():
                if of_centred == centred:
                    by_features[kind][name] = {key: n for key, n in found.items() if (key[1] is not None) == weighted}
            del bank
    alone = {"features": next(iter(train)), "k": ks[0], "temperature": temperatures[0]}
    best = max(sweep, key=lambda row: row["held_out_top1"]) if sweep else alone
    chosen = {key: best[key] for key in alone}
    by_kind = {kind: found[HEADLINE][chosen["k"], chosen["temperature"]] for kind, found in by_features.items()}
    return Outcome(
        evaluator="knn",
        numbers=by_kind[chosen["features"]],
        chosen=chosen,
        recipe={
            "k": ks,
            "temperature": temperatures,
            "variant": HEADLINE,
            "features": list(train),
            "held_out": HELD_OUT,
            "seed": seed,
        },
        details={"held_out": sweep, "by_features": {kind: _nested(found) for kind, found in by_features.items()}},
        by_kind=by_kind,
        warnings=lacking_warnings(train, test) + few_warnings(ks, len(labels), "train images"),
        right=[torch.cat(right[chosen["features"]][chosen["k"], chosen["temperature"]])],
    )


def few_warnings(ks: Sequence[int], count: int, of_what: str) -> list[str]:
    """A warning where there are not as many neighbours as are asked for."""
    beyond = [k for k in ks if k > count]
    return [f"k={max(beyond)} asks for more than the {count} {of_what}, so that all of them vote."] if beyond else []


def classify(
    bank: Neighbours,
    queries: Tensor,
    query_labels: Tensor,
    num_classes: int,
    ks: Sequence[int],
    temperatures: Sequence[float | None],
    always: Sequence[int] = (),
    right: dict | None = None,
) -> dict[tuple[int, float | None], dict[str, Percent]]:
    """Accuracy by (k, temperature), of one search; a temperature None gives every neighbour one vote.

    A k above N means all N; such are left out unless they are `always` wanted. right: gets, by (k, temperature), which
    queries are right, in pieces.
    """
    ks = [k for k in sorted(ks) if k <= len(bank) or k in always]
    counts = {(k, t): Counter() for k in ks for t in temperatures}
    query_labels = query_labels.to(bank.device)
    for chunk, chunk_labels in zip(queries.split(QUERIES), query_labels.split(QUERIES), strict=True):
        similar, classes = bank.nearest(chunk, max(ks))
        for temperature in temperatures:
            _vote(similar, classes, chunk_labels, num_classes, temperature, ks, counts, right)
    return {key: {name: percent(count[name], len(queries)) for name in count} for key, count in counts.items()}


def _vote(similar: Tensor, classes: Tensor, labels: Tensor, num_classes: int, temperature, ks, counts, right) -> None:
    """Adds to `counts` and `right`. similar, classes: (q, max k), nearest first; each k adds to the votes of the one
    before."""
    plain = temperature is None
    # Less the largest, or small temperatures overflow; all of a query's votes shrink alike.
    weights = (similar if plain else (similar - similar[:, :1]) / temperature).double()
    weights = torch.ones_like(weights) if plain else weights.exp()
    votes, voted = weights.new_zeros(2, len(similar), num_classes)
    counted = 0
    for k in ks:
        votes.scatter_add_(1, classes[:, counted:k], weights[:, counted:k])
        voted.scatter_(1, classes[:, counted:k], 1)
        counted = k
        scores = votes.masked_fill(voted == 0, -torch.inf)
        counts[k, temperature].update(hits(scores, labels))
        if right is not None and not plain:
            right.setdefault((k, temperature), []).append(among_first(1, scores, labels).cpu())


def _nested(found: dict[str, dict]) -> dict:
    """By variant, then k; and by temperature where there are several."""
    nested = {}
    for variant, numbers in found.items():
        several = len({temperature for _, temperature in numbers}) > 1
        for (k, temperature), number in numbers.items():
            if several:
                nested.setdefault(variant, {}).setdefault(k, {})[temperature] = number
            else:
                nested.setdefault(variant, {})[k] = number
    return nested
