"""Weighted k-nearest-neighbour classification on frozen features.

Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance Discrimination", CVPR 2018, section 3.4:
the k training images that are nearest by cosine s vote for their class with weight exp(s / T).

- Headline: k = 20, T = 0.07, features centred by the mean of the train set, votes weighted. It is fixed
  beforehand. Other k, unweighted votes and uncentred features are reported beside it, and never chosen from.
- Between several kinds of feature the choice is made on a tenth of the train set, never on the test set.
- The search is exact: every test image is compared with every train image.
"""

from collections import Counter
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from evaluators.features import Features
from evaluators.results import Outcome, Percent, hits, percent
from evaluators.splits import HELD_OUT, contiguous_labels, hold_out

K = 20
TEMPERATURE = 0.07
KS = (1, 5, 10, 20, 50, 100, 200)
HEADLINE = "cosW, centred"
VARIANTS = {  # name: (votes weighted, features centred)
    "cosW, centred": (True, True),
    "cos, centred": (False, True),
    "cosW": (True, False),
    "cos": (False, False),
}
# Similarities held at once; 2**25 float32 are 128 MiB.
CHUNK_ELEMENTS = 2**25


def knn(
    train: dict[str, Features],
    test: dict[str, Features],
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Outcome:
    """Test accuracy of k-NN for each kind of feature, headed by the kind that a held-out part of train prefers.

    seed: of the held-out part; without effect where there is one kind.
    """
    labels, test_labels, num_classes = contiguous_labels(train, test)
    by_features, held_out_top1 = {}, {}
    for kind in train:
        bank = train[kind].values.to(device)
        if len(train) > 1:
            fit, held = hold_out(labels, seed)
            found = search(bank[fit], labels[fit], bank[held], labels[held], num_classes, (K,))
            held_out_top1[kind] = found[K]["top1"].value
        queries = test[kind].values
        by_features[kind] = {
            name: search(bank, labels, queries, test_labels, num_classes, KS, weighted=weighted, centred=centred)
            for name, (weighted, centred) in VARIANTS.items()
        }
    chosen = max(held_out_top1, key=held_out_top1.get) if held_out_top1 else next(iter(train))
    return Outcome(
        evaluator="knn",
        numbers=by_features[chosen][HEADLINE][K],
        chosen={"features": chosen},
        recipe={
            "k": K,
            "temperature": TEMPERATURE,
            "variant": HEADLINE,
            "features": list(train),
            "held_out": HELD_OUT,
            "seed": seed,
        },
        details={"held_out_top1": held_out_top1, "by_features": by_features},
    )


def search(
    bank: Tensor,
    labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    num_classes: int,
    ks: Sequence[int],
    *,
    weighted: bool = True,
    centred: bool = True,
) -> dict[int, dict[str, Percent]]:
    """Accuracy by k, on the bank's device.

    bank: (N, D) with labels (N,) in 0..C-1. queries: (Q, D) with query_labels (Q,), -1 where the bank lacks the
    class. A k above N means all N; of `ks`, those above N are left out, except the headline's.
    """
    ks = [k for k in sorted(ks) if k <= len(bank) or k == K]
    labels, query_labels = labels.to(bank.device), query_labels.to(bank.device)
    mean = bank.mean(0) if centred else bank.new_zeros(bank.shape[1])
    bank = F.normalize(bank - mean, dim=1)
    counts = {k: Counter() for k in ks}
    rows = max(CHUNK_ELEMENTS // len(bank), 1)
    for chunk, chunk_labels in zip(queries.split(rows), query_labels.split(rows), strict=True):
        similar = F.normalize(chunk.to(bank.device) - mean, dim=1) @ bank.T  # (q, N)
        for k, votes in _votes(similar, labels, num_classes, ks, weighted):
            counts[k].update(hits(votes.masked_fill(votes == 0, -torch.inf), chunk_labels))
    return {k: {name: percent(count[name], len(queries)) for name in count} for k, count in counts.items()}


def _votes(
    similar: Tensor, labels: Tensor, num_classes: int, ks: Sequence[int], weighted: bool
) -> Iterator[tuple[int, Tensor]]:
    """(k, votes (q, C)) for growing k: each k adds its further neighbours to the votes of the one before."""
    top = similar.topk(min(max(ks), similar.shape[1]), dim=1)
    weights = (top.values / TEMPERATURE).double().exp() if weighted else torch.ones_like(top.values).double()
    votes = weights.new_zeros(len(similar), num_classes)
    counted = 0
    for k in ks:
        votes.scatter_add_(1, labels[top.indices[:, counted:k]], weights[:, counted:k])
        counted = k
        yield k, votes
