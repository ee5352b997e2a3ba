"""Semantic segmentation by frozen features of places: a linear head, and the nearest train patches without training.

- The head is DINOv2's "linear" (Oquab et al., 2023, section 7.4): batch norm (features standardised by train, without
  affine) and one linear layer on the places of the last layer; its logits are enlarged bilinearly to the view. It is
  trained to its optimum by `evaluators.frozen.convex`, and not by SGD: its loss is the mean cross-entropy over all
  pixels, each under the logits of the place that it lies in, + wd / 2 * |W|^2.
- The patches: the k nearest of train's by cosine, centred, vote with what their pixels are, weighted by exp(s / T) as
  in k-NN classification. They are drawn from train by the seed where there are more than `num_patches`.
- Weight decay, and the kind of feature, are chosen by mIoU on a tenth of the train images; then the head is fit on all.
  Test masks are read once for each kind.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from prelude.data.errors import UserError
from prelude.evaluators.defaults import TEMPERATURE, K
from prelude.evaluators.dense.masks import IGNORED
from prelude.evaluators.dense.overlap import Overlap
from prelude.evaluators.dense.places import Places, predicted, shares
from prelude.evaluators.dense.share_loss import ShareLoss
from prelude.evaluators.frozen.convex import MAX_PASSES, TOLERANCE, Space
from prelude.evaluators.frozen.exact_search import QUERIES, Neighbours
from prelude.evaluators.frozen.knn import few_warnings
from prelude.evaluators.frozen.splits import HELD_OUT, edge_warnings, first_few
from prelude.evaluators.results import Outcome

WEIGHT_DECAYS = (1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
CHOOSE_ON, HELD_IMAGES = 50_000, 200  # patches that decays are compared on, and images that compare them, at most
NUM_PATCHES = 20_000


class Classes:
    """The class numbers of train and test masks as 0..C-1; those that train lacks come last and are never predicted."""

    def __init__(self, train: Places, test: Places):
        of_train, of_test = (part.labels[part.labels != IGNORED].unique().tolist() for part in (train, test))
        for name, found in (("train", of_train), ("test", of_test)):
            if not found:
                raise UserError(
                    f"The {name} masks hold no pixel that counts ({IGNORED} does not, nor what --ignore names); write "
                    f"other masks, or leave --ignore out."
                )
        if len(of_train) < 2:
            raise UserError(
                f"The train masks hold class {of_train[0]} only, so there is nothing to tell apart; write masks with "
                f"two classes or more, and leave out of --ignore what is one of them."
            )
        self.numbers = [*of_train, *sorted(set(of_test) - set(of_train))]
        self.num_known, self._table = len(of_train), torch.full((256,), IGNORED, dtype=torch.uint8)
        self._table[torch.tensor(self.numbers)] = torch.arange(len(self.numbers), dtype=torch.uint8)

    def __len__(self) -> int:
        return len(self.numbers)

    def warnings(self) -> list[str]:
        """Where test has classes that train lacks."""
        strange = self.numbers[self.num_known :]
        if not strange:
            return []
        return [f"Test masks hold classes that train lacks ({first_few(strange)}), and each counts with an IoU of 0."]

    def of(self, masks: Tensor) -> Tensor:
        return self._table[masks.long()]


Drawn = Callable[[str, Callable[[Tensor], Tensor]], None]  # (what, test images (n,) to class numbers (n, H, W))
Scores = Callable[[Tensor], Tensor]  # features of places (m, D) to scores (m, C)


def segment_linear(
    train: dict[str, Places],
    test: dict[str, Places],
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    weight_decays: Sequence[float] = WEIGHT_DECAYS,
    names: Sequence[str] = (),
    drawn: Drawn | None = None,
) -> Outcome:
    """mIoU and pixel accuracy of the head by kind of feature. names: of the class numbers, for the record. drawn: is
    told what predicts with the chosen kind.

    seed: of the held-out images and the bootstrap. Raises UserError for masks of one class, and fewer than two images.
    """
    classes, (fit, held) = _classes(train, test), _held_out(train, seed)
    by_kind, grid, heads, judged = {}, [], {}, {}
    for kind, places in train.items():
        wanted = shares(classes.of(places.labels), places.grid, classes.num_known)
        loss, space = ShareLoss(wanted.to(device)), Space.of(places.each, "batch", device)
        few = fit[: max(CHOOSE_ON // places.num_places, 1)]
        found = space.fit(loss, weight_decays, places.rows_of(few))
        for h, decay in enumerate(weight_decays):
            miou = _overlap(_logits(found.only(h)), places, held, classes).iou().nanmean().item()
            converged = found.converged[h]
            grid.append({"features": kind, "weight_decay": decay, "held_out_miou": 100 * miou, "converged": converged})
        best = max(grid[-len(weight_decays) :], key=lambda row: (row["held_out_miou"], row["weight_decay"]))
        start = found.only(list(weight_decays).index(best["weight_decay"]))
        head = space.fit(loss, (best["weight_decay"],), start=start)
        heads[kind] = {**best, "converged": head.converged[0]}
        judged[kind] = _logits(head)
        by_kind[kind] = _tested(judged[kind], test[kind], classes, seed, names)
    chosen = max(heads, key=lambda kind: heads[kind]["held_out_miou"])
    if drawn:
        drawn("linear head", partial(_maps, judged[chosen], test[chosen], classes))
    told = (
        [] if heads[chosen]["converged"] else [f"The head was stopped after {MAX_PASSES} passes, before its optimum."]
    )
    return _outcome(
        "segment_linear",
        {"features": chosen, "weight_decay": heads[chosen]["weight_decay"]},
        {"weight_decays": list(weight_decays), "features": list(train), "held_out": HELD_OUT, "tolerance": TOLERANCE},
        {"grid": grid},
        by_kind,
        seed,
        warnings=classes.warnings() + told + _edge(heads[chosen], grid, weight_decays),
    )


def _edge(head: dict, grid: Sequence[dict], weight_decays: Sequence[float]) -> list[str]:
    scores = [row["held_out_miou"] for row in grid if row["features"] == head["features"]]
    return edge_warnings("weight decay", head["weight_decay"], weight_decays, scores=scores)


def segment_knn(
    train: dict[str, Places],
    test: dict[str, Places],
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    k: int = K,
    temperature: float = TEMPERATURE,
    num_patches: int = NUM_PATCHES,
    names: Sequence[str] = (),
    drawn: Drawn | None = None,
) -> Outcome:
    """The same of the nearest patches. seed: of the patches too. Errors as above, and UserError for a k or a
    temperature that is not above 0."""
    if min(k, temperature) <= 0:
        raise UserError(f"k={k} and temperature={temperature:g} must be above 0; write k={K} and {TEMPERATURE}.")
    classes, (fit, held) = _classes(train, test), _held_out(train, seed)
    by_kind, held_out, judged = {}, {}, {}
    for kind, places in train.items():
        if len(train) > 1:
            scores = _voting(places, classes, fit, k, temperature, num_patches, seed, device)
            held_out[kind] = 100 * _overlap(scores, places, held, classes).iou().nanmean().item()
        everything, count = torch.arange(len(places)), min(len(places.each), num_patches)
        judged[kind] = _voting(places, classes, everything, k, temperature, num_patches, seed, device)
        by_kind[kind] = _tested(judged[kind], test[kind], classes, seed, names)
    chosen = max(held_out, key=held_out.get) if held_out else next(iter(train))
    if drawn:
        drawn("nearest patches", partial(_maps, judged[chosen], test[chosen], classes))
    told = classes.warnings() + few_warnings([k], count, "train patches")
    recipe = {"k": k, "temperature": temperature, "num_patches": num_patches, "features": list(train)}
    details = {"held_out_miou": held_out}
    return _outcome("segment_knn", {"features": chosen}, recipe, details, by_kind, seed, warnings=told)


def _logits(head) -> Scores:
    return lambda values: head.logits(values)[0]


def _voting(places: Places, classes: Classes, images: Tensor, k, temperature, num_patches, seed, device) -> Scores:
    rows = places.rows_of(images)
    wanted = shares(classes.of(places.labels[images]), places.grid, classes.num_known)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    chosen = order[wanted[order].sum(1) > 0][:num_patches].sort().values
    bank = Neighbours(places.each[rows[chosen]], device=device)
    wanted = wanted[chosen].to(device)

    def scores(values: Tensor) -> Tensor:
        found = []
        for some in values.split(QUERIES):
            similar, near = bank.nearest(some, k)
            weights = ((similar - similar[:, :1]) / temperature).exp()
            found.append((weights[..., None] * wanted[near]).sum(1) / weights.sum(1, keepdim=True))
        return torch.cat(found)

    return scores


def _classes(train: dict[str, Places], test: dict[str, Places]) -> Classes:
    return Classes(next(iter(train.values())), next(iter(test.values())))


def _held_out(train: dict[str, Places], seed: int) -> tuple[Tensor, Tensor]:
    """Images to fit and to choose on, in an order of the seed's: of those with a pixel that counts, as the others would
    choose nothing."""
    counts = (next(iter(train.values())).labels != IGNORED).flatten(1).any(1).nonzero()[:, 0]
    if len(counts) < 2:
        raise UserError(
            "The train shards hold one image with a mask in which a pixel counts, so none can be held out; write more "
            "of them."
        )
    order = counts[torch.randperm(len(counts), generator=torch.Generator().manual_seed(seed))]
    held = max(round(len(counts) * HELD_OUT), 1)
    return order[held:], order[:held][:HELD_IMAGES]


def _overlap(scores: Scores, places: Places, images: Tensor, classes: Classes) -> Overlap:
    parts = []
    for some, found in predicted(scores, places, images, classes.num_known):
        parts.append(Overlap.of(found, classes.of(places.labels[some]), len(classes)))
    return Overlap.joined(parts)


def _maps(scores: Scores, places: Places, classes: Classes, images: Tensor) -> Tensor:
    """(n, H, W) uint8 class numbers as the masks have them."""
    numbers = torch.tensor(classes.numbers, dtype=torch.uint8)
    return torch.cat([numbers[found] for _, found in predicted(scores, places, images, classes.num_known)])


def _tested(scores: Scores, places: Places, classes: Classes, seed: int, names: Sequence[str]) -> dict:
    overlap = _overlap(scores, places, torch.arange(len(places)), classes)
    true = overlap.true.sum(0)
    by_class = {}
    for number, iou, share in zip(
        classes.numbers, overlap.iou()[0].tolist(), (true / true.sum()).tolist(), strict=True
    ):
        if share:
            name = names[number] if number < len(names) else str(number)
            told = f"{name} ({number})" if name in by_class else name
            by_class[told] = {"iou": 100 * iou, "share_of_pixels": 100 * share}
    return {
        "numbers": overlap.numbers(seed),
        "by_class": by_class,
        "most_frequent": 100 * (true.max() / true.sum()).item(),
    }


def _outcome(name: str, chosen: dict, recipe: dict, details: dict, by_kind: dict, seed: int, **more) -> Outcome:
    numbers = {kind: found["numbers"] for kind, found in by_kind.items()}
    by_features = {kind: {key: found[key] for key in ("by_class", "most_frequent")} for kind, found in by_kind.items()}
    return Outcome(
        evaluator=name,
        numbers=numbers[chosen["features"]],
        chosen=chosen,
        recipe={**recipe, "seed": seed},
        details={**details, "by_features": by_features},
        by_kind=numbers,
        **more,
    )
