"""What a frozen encoder is worth with few labels: some images a class, or some percent of all, drawn several times.

- A draw is a part of the train set, the same share of each class and at least one image. Draws depend on seed and
  labels alone, so every encoder is judged on the same ones; smaller draws are parts of larger ones.
- From a draw a linear head is learned, at its optimum. Its weight decay and the kind of feature are chosen by
  cross-validation inside the draw, as far as it has images to spare: labels outside of it are never looked at.
- Beside it stands the nearest class mean, which has nothing to choose.
- All draws are tested on the whole test set. The spread is the standard deviation over draws.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prelude.data.errors import UserError
from prelude.data.progress import progress_bar
from prelude.evaluators.defaults import DRAWS, PER_CLASS, SHARES
from prelude.evaluators.features.extraction import Features
from prelude.evaluators.frozen import ncm
from prelude.evaluators.frozen.convex import ClassLoss, FoldLoss, Space
from prelude.evaluators.frozen.linear_probe import right, score
from prelude.evaluators.frozen.splits import contiguous_labels, edge_warnings, hold_out, lacking_warnings
from prelude.evaluators.results import Outcome, Percent, by_frequency, mean_and_spread, percent

WEIGHT_DECAYS = tuple(float(f"{10 ** (-4 + i / 2):.3g}") for i in range(10))  # 1e-4 .. 3.16
UNTUNED_DECAY = 0.1  # where a draw has no image to spare for a choice
FOLDS = 5
ONE_FOLD_FROM = 1000  # images; from here on a tenth that is held out once is enough to choose on


@dataclass(frozen=True)
class Amount:
    """How much of each class is labelled."""

    per_class: int | None = None
    share: float | None = None  # percent

    @property
    def name(self) -> str:
        return f"{self.per_class} a class" if self.per_class else f"{self.share:g} %"

    def of(self, count: int) -> int:
        wanted = self.per_class or round(count * self.share / 100)
        return min(max(wanted, 1), count)


def fewshot(
    train: dict[str, Features],
    test: dict[str, Features],
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    per_class: Sequence[int] = PER_CLASS,
    shares: Sequence[float] = SHARES,
    draws: int = DRAWS,
) -> Outcome:
    """Test accuracy by amount of labels, the mean over `draws` with their spread. shares: percent.

    Raises UserError for amounts or numbers of draws that are none.
    """
    amounts = [Amount(per_class=n) for n in per_class] + [Amount(share=p) for p in shares]
    if draws < 1 or not amounts or min(per_class, default=1) < 1 or not all(0 < p <= 100 for p in shares):
        raise UserError("Few-shot needs one draw or more, of 1 image a class or more, or of 0 to 100 %; write others.")
    labels, test_labels, num_classes = contiguous_labels(train, test)
    task = _Task(train, test, labels, test_labels.to(device), num_classes, device)
    numbers, details, kinds, warnings, guessed = {}, {}, [], [], {}
    by_kind: dict[str, dict[str, Percent]] = {kind: {} for kind in train}
    for amount, found in task.judge_all(amounts, draws, seed).items():
        numbers[amount.name] = mean_and_spread([each["top1"] for each in found])
        guessed[amount.name] = [each.pop("right") for each in found]
        details[amount.name] = {
            "num_labels": len(draw_rows(labels, amount, seed, 0)),
            "draws": found,
            "ncm": {kind: mean_and_spread([each["ncm_top1"][kind] for each in found]) for kind in train},
        }
        for kind in train:
            by_kind[kind][amount.name] = mean_and_spread([each["by_features"][kind] for each in found])
        kinds += [each["features"] for each in found]
        warnings += _edge(found, amount)
    return Outcome(
        evaluator="fewshot",
        numbers=numbers,
        chosen={"features": by_frequency(kinds)},
        recipe={
            "per_class": list(per_class),
            "shares": list(shares),
            "draws": draws,
            "weight_decays": list(WEIGHT_DECAYS),
            "features": list(train),
            "seed": seed,
        },
        details={"by_amount": details},
        warnings=lacking_warnings(train, test)
        + _warnings(amounts, torch.bincount(labels))
        + list(dict.fromkeys(warnings)),
        by_kind=by_kind,
        right=guessed[headline_amount(list(numbers))],
    )


def headline_amount(names: Sequence[str]) -> str:
    """The amount that stands for all, by name: 1 % of the labels; else the largest number of images a class, as single
    images are mostly luck; else the last."""
    amounts = {int(match[1]): name for name in names if (match := re.fullmatch(r"(\d+) a class", name))}
    return "1 %" if "1 %" in names else amounts[max(amounts)] if amounts else names[-1]


def draw_rows(labels: Tensor, amount: Amount, seed: int, number: int) -> Tensor:
    """Which samples draw `number` labels: ascending places in labels (N,) of 0..C-1."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
    shuffled = torch.randperm(len(labels), generator=generator)
    by_class = shuffled[labels[shuffled].argsort(stable=True)]
    counts = torch.bincount(labels)
    taken = [part[: amount.of(len(part))] for part in by_class.split(counts.tolist()) if len(part)]
    return torch.cat(taken).sort().values


@dataclass(frozen=True)
class _Task:
    train: dict[str, Features]
    test: dict[str, Features]
    labels: Tensor  # (N,)
    test_labels: Tensor
    num_classes: int
    device: torch.device | str

    def judge_all(self, amounts: Sequence[Amount], draws: int, seed: int) -> dict[Amount, list[dict]]:
        found: dict[Amount, list[dict]] = {amount: [] for amount in amounts}
        with progress_bar("few-shot draws", len(found) * draws) as advance:
            for amount in found:
                for number in range(draws):
                    found[amount].append(self.judge(draw_rows(self.labels, amount, seed, number)))
                    advance(1)
        return found

    def judge(self, rows: Tensor) -> dict:
        """One draw: what was chosen inside of it, and the test accuracy."""
        labels = self.labels[rows]
        loss, best, ncm_top1, by_kind = ClassLoss(labels.to(self.device), self.num_classes), None, {}, {}
        for kind in self.train:
            values = self.train[kind].values[rows]
            space = Space.of(values, device=self.device)
            top1, decay = self._tuned(space, loss, labels)
            if best is None or top1 > best[0]:
                best = (top1, decay, kind)
            head = space.fit(loss, (decay,))
            if best[2] == kind:
                guessed = right(head, self.test[kind].values, self.test_labels)
            (counts,), _ = score(head, self.test[kind].values, self.test_labels)
            by_kind[kind] = percent(counts["top1"], len(self.test_labels))
            means = ncm.class_means(values, labels, self.num_classes, device=self.device)
            ncm_top1[kind] = ncm.accuracy(means, self.test[kind].values, self.test_labels.cpu())["top1"]
        top1, decay, kind = best
        return {
            "top1": by_kind[kind],
            "by_features": by_kind,
            "features": kind,
            "weight_decay": decay,
            "cross_validated_top1": top1,
            "ncm_top1": ncm_top1,
            "right": guessed,
        }

    def _tuned(self, space: Space, loss: ClassLoss, labels: Tensor) -> tuple[float, float]:
        """(accuracy in percent, weight decay) of the best head by cross-validation; (0, fixed) without one."""
        folds = _folds(labels)
        if not folds:
            return 0.0, UNTUNED_DECAY
        fit = torch.stack([~torch.isin(torch.arange(len(labels)), held) for held in folds], 1).to(self.device)
        heads = space.fit(FoldLoss(loss.classes, self.num_classes, fit), WEIGHT_DECAYS)
        correct, losses = torch.zeros(len(WEIGHT_DECAYS)), torch.zeros(len(WEIGHT_DECAYS))
        for fold, held in enumerate(folds):
            counts, loss_of = score(heads.part(fold, self.num_classes), space.values, loss.classes, held)
            correct += torch.tensor([count["top1"] for count in counts])
            losses += torch.tensor(loss_of) * len(held)
        best = max(range(len(WEIGHT_DECAYS)), key=lambda h: (correct[h].item(), -losses[h].item()))
        return 100 * correct[best].item() / sum(map(len, folds)), WEIGHT_DECAYS[best]


def _folds(labels: Tensor) -> list[Tensor]:
    """The places that are held out, by fold; every class of two images or more keeps one to learn from in each."""
    counts = torch.bincount(labels)
    if not (counts > 1).any():
        return []
    if len(labels) >= ONE_FOLD_FROM:
        return [hold_out(labels, 0)[1]]
    place = torch.arange(len(labels))  # samples of a draw come in the order of the shards
    by_class = labels.argsort(stable=True)
    first = (counts.cumsum(0) - counts)[labels[by_class]]
    turn = torch.empty_like(place)
    turn[by_class] = (place - first) % FOLDS
    spare = counts[labels] > 1
    held = [place[(turn == fold) & spare] for fold in range(FOLDS)]
    return [part for part in held if len(part)]


def _edge(draws: Sequence[dict], amount: Amount) -> list[str]:
    """A warning where most draws chose one end of the grid."""
    decays = [each["weight_decay"] for each in draws if each["cross_validated_top1"]]  # without one nothing was chosen
    decay = max(decays, key=decays.count, default=UNTUNED_DECAY)
    if 2 * decays.count(decay) <= len(draws):
        return []
    return edge_warnings("weight decay", decay, WEIGHT_DECAYS, f" in most draws of {amount.name}")


def _warnings(amounts: Sequence[Amount], counts: Tensor) -> list[str]:
    rare = int(counts[counts > 0].min())
    most = max((amount.per_class or 0 for amount in amounts), default=0)
    return [f"Some classes have only {rare} training images, fewer than {most}."] if rare < most else []
