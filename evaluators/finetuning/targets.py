"""From labels to what a classifier should say, and how far off it is.

    classes:  y = 1 - e + e / C for the class, e / C for the others
              loss = -w_c y_c log softmax(x)_c, summed over c
    findings: y = 1 - e / 2 for what is present, e / 2 for what is absent
              loss = -w1 y log sigmoid(x) - w0 (1 - y) log sigmoid(-x), averaged over all B x L answers

- A finding that is unknown is NaN in a target and adds nothing to the loss, which is divided by B x L all the same:
  a divisor of what is known would differ between ranks, and two ranks would not train what one trains.
- For the same reason weighted losses are divided by the number of samples, and not by their weights. Balanced weights
  are 1 on average over the training images.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from prelude.data.errors import UserError
from prelude.data.findings import UNCERTAIN
from prelude.pretrain.draws import uniform

UNCERTAIN_STREAM = 191  # of pretrain.draws
SMOOTHED = (0.55, 0.85)  # U-Ones with label smoothing: Pham et al., arXiv 1911.06475


def class_targets(labels: Tensor, classes: Tensor, smoothing: float) -> Tensor:
    """labels: (B,) class numbers. classes: (C,), growing. Returns (B, C)."""
    own = torch.searchsorted(classes, labels).clamp(max=len(classes) - 1)
    return F.one_hot(own, len(classes)) * (1 - smoothing) + smoothing / len(classes)


def finding_targets(answers: Tensor, seeds: Tensor, policy: str, smoothing: float) -> Tensor:
    """answers: (B, L) of 1, 0, UNCERTAIN and NaN. seeds: (B,) int64. Returns (B, L), NaN where nothing is known.

    policy: of what is uncertain, as `objective.uncertain` has it.
    """
    uncertain = answers == UNCERTAIN
    if policy == "smoothed":
        low, high = SMOOTHED
        instead = low + (high - low) * uniform(seeds, answers.shape[1], UNCERTAIN_STREAM)
    else:
        instead = torch.full_like(answers, {"ignore": torch.nan, "zeros": 0.0, "ones": 1.0}[policy])
    return torch.where(uncertain, instead, answers * (1 - smoothing) + smoothing / 2)


def softmax_loss(logits: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
    """logits, targets: (B, C). weights: (C,)."""
    return F.cross_entropy(logits, targets, weight=weights)


def sigmoid_loss(logits: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
    """logits, targets: (B, L), targets NaN where nothing is known. weights: (2, L) of absence and presence."""
    known, yes = targets.isfinite(), targets.nan_to_num(0.0)
    if weights is None:
        each = F.binary_cross_entropy_with_logits(logits, yes, reduction="none")
    else:
        absence, presence = weights
        each = presence * yes * F.softplus(-logits) + absence * (1 - yes) * F.softplus(logits)
    return (each * known).mean()


def weights_of_classes(given: str | Mapping, labels: Tensor, classes: Tensor, names: Sequence[str]) -> Tensor | None:
    """(C,) weights, None for equal ones. given: `objective.class_weights`. labels: (N,) of the training images.

    names: of class numbers, where they have any. Raises UserError for a class that is not there.
    """
    if given == "equal":
        return None
    if given == "balanced":
        count = torch.bincount(torch.searchsorted(classes, labels), minlength=len(classes))
        return len(labels) / (len(classes) * count.float())
    called = [names[number] if names else str(number) for number in classes.tolist()]
    return _by_name(given, called, "a class of the training images")


def weights_of_findings(given: str | Mapping, answers: Tensor, names: Sequence[str]) -> Tensor | None:
    """(2, L) weights of absence and presence, None for equal ones. answers: (N, L) of the training images, NaN where
    not known. A finding that is never or always present keeps the weight 1 for what there is."""
    if given == "equal":
        return None
    if given == "balanced":
        count = torch.stack([(answers == value).sum(0) for value in (0, 1)]).float()  # (2, L)
        both = (count > 0).all(0)
        return torch.where(both, count.sum(0) / (2 * count.clamp(min=1)), 1.0)
    presence = _by_name(given, names, "one of the findings")
    return torch.stack([torch.ones_like(presence), presence])


def _by_name(given: Mapping, names: Sequence[str], what: str) -> Tensor:
    given = {str(name): weight for name, weight in given.items()}
    if unknown := sorted(given.keys() - set(names)):
        shown = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
        raise UserError(f"objective.class_weights names {unknown[0]!r}, which is not {what}; write some of {shown}.")
    return torch.tensor([given.get(name, 1.0) for name in names])
