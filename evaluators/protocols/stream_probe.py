"""A linear probe by a paper's protocol: heads trained on augmented images, which the encoder sees anew in each epoch.

- All heads of the grid are trained together in one pass over the augmented stream.
- Where there are several, a tenth of each class of train is held out, seen by no head, and says which one is reported;
  that head is not trained again. One head alone is trained on all of train. Test is read once, after the choice.
- Train views are random crops and flips from the endless order's seeds. Held-out and test images are seen as in every
  other evaluation, through the bank.
- Ranks share the encoder's work. Every rank then has the whole batch's features, in the order of positions, and takes
  the same step: heads do not depend on the number of ranks, but for rounding in the encoder.
"""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict

import torch
from torch import Tensor

from prelude.checkpoints.sources import OpenedEncoder
from prelude.data.counting import counted
from prelude.data.errors import UserError
from prelude.data.loader import Loader
from prelude.data.shards import ShardIndex
from prelude.evaluators.features.extraction import Extractor, Features
from prelude.evaluators.features.pixels import is_pixels
from prelude.evaluators.frozen.linear_probe import score
from prelude.evaluators.frozen.splits import HELD_OUT, contiguous_labels, edge_warnings, hold_out, lacking_warnings
from prelude.evaluators.judging import Judging, Labelled, by_seed, keep, refuse_unknown
from prelude.evaluators.protocols.papers import Protocol
from prelude.evaluators.protocols.sgd_heads import SGDHeads
from prelude.evaluators.results import Outcome, Result, percent
from prelude.pretrain import distributed
from prelude.pretrain.collectives import gather_rows

FEW_STEPS = 500


def evaluate_protocol(
    sources: Sequence[str],
    protocol: Protocol,
    labelled: Labelled,
    *,
    kinds: Sequence[str] | None = None,
    **settings,
) -> list[Result]:
    """The protocol's result on every source. settings: of `evaluators.judging.Judging`. Every rank takes part to
    the end, and the first one alone writes; all get the results. Raises UserError as `judge_all`."""

    def chosen(encoder: OpenedEncoder) -> Sequence[str]:
        return protocol.kinds_of(encoder) if kinds is None or is_pixels(encoder.config.name) else kinds

    refuse_unknown(sources)
    judging, results = Judging((), labelled, kinds=chosen, **settings), []
    reading = {"batch_size": judging.batch_size, "num_workers": judging.num_workers}
    for source in sources:
        outcomes, judged, started = [], None, time.monotonic()
        for seed, encoder in by_seed(source, sources, judging.seeds):
            train, test = judging.features(source, sources, encoder)
            outcomes.append(stream_probe(encoder, judging.indexes[0], train, test, protocol, seed=seed, **reading))
            judged = judged or encoder
        (result,) = judging.told(source, judged, train, test, [outcomes], [time.monotonic() - started])
        results.append(result)
        if distributed.is_main():
            keep(result, sources, judging.out, judging.say)
    return results


def stream_probe(
    encoder: OpenedEncoder,
    index: ShardIndex,
    train: dict[str, Features],
    test: dict[str, Features],
    protocol: Protocol,
    *,
    seed: int = 0,
    batch_size: int = 256,
    num_workers: int = 0,
) -> Outcome:
    """Test accuracy of the protocol's best head. index: the train shards, which are seen augmented.

    train, test: features of the fixed view. batch_size: images that a rank encodes at once. seed: of the held-out part,
    the heads' first weights, the order and the crops. Raises UserError for a global batch that ranks cannot share.
    """
    device = distributed.device()
    labels, test_labels, num_classes = contiguous_labels(train, test)
    ids = next(iter(train.values())).sample_ids
    settings = [(lr, decay) for lr in protocol.learning_rates for decay in protocol.weight_decays]
    several = len(settings) * len(train) * len(protocol.norms) > 1
    fit, held = hold_out(labels, seed) if several else (torch.arange(len(labels)), None)
    part = index.subset(ids[fit].numpy())
    class_of = labels[fit]  # by the part's own sample ids

    heads: dict[tuple[str, str], SGDHeads] = {}
    num_steps = max(round(protocol.epochs * part.num_samples / protocol.global_batch), 1)
    extractor = Extractor(encoder, tuple(train), device, protocol.plan(encoder))
    for kind in train:
        width = train[kind].values.shape[1]
        for norm in protocol.norms:
            heads[kind, norm] = SGDHeads(protocol, norm, width, num_classes, settings, seed, device)
    batches = _global_batches(extractor, part, protocol.global_batch, num_steps, seed, batch_size, num_workers)
    for step, (values, sample_ids) in enumerate(batches):
        wanted = class_of[sample_ids].to(device)
        for (kind, _), group in heads.items():
            group.step(values[kind], wanted, protocol.lr_factor(step, num_steps))

    grid = []
    for (kind, norm), group in heads.items():
        grid += _rows(group, kind, norm, settings, train[kind].values, labels.to(device), held)
    best = max(grid, key=_preference) if several else grid[0]
    chosen = {key: best[key] for key in ("features", "norm", "learning_rate", "weight_decay")}
    setting = settings.index((best["learning_rate"], best["weight_decay"]))
    head = heads[best["features"], best["norm"]].heads().only(setting)
    (counts,), _ = score(head, test[best["features"]].values, test_labels.to(device))
    return Outcome(
        evaluator=f"linear_probe_{protocol.name}",
        numbers={name: percent(count, len(test_labels)) for name, count in counts.items()},
        chosen=chosen,
        recipe={
            **asdict(protocol),
            "features": list(train),
            "num_steps": num_steps,
            "held_out": HELD_OUT if several else 0,
            "seed": seed,
        },
        details={"grid": grid},
        warnings=lacking_warnings(train, test) + _warnings(num_steps, chosen, protocol),
    )


def _global_batches(
    extractor: Extractor,
    index: ShardIndex,
    global_batch: int,
    num_steps: int,
    seed: int,
    batch_size: int,
    num_workers: int,
) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """(features (B, D) by kind on the device, sample ids (B,)) of each step, whole on every rank, in order."""
    world = distributed.world_size()
    if global_batch % world:
        near = max(round(global_batch / world), 1) * world
        raise UserError(
            f"A global batch of {global_batch} cannot be shared equally by {counted(world, 'rank')}; write "
            f"--global-batch {near}."
        )
    share = global_batch // world
    micro_batch = max(size for size in range(1, min(batch_size, share) + 1) if share % size == 0)
    loader = Loader(
        index,
        extractor.plan,
        seed=seed,
        micro_batch=micro_batch,
        rank=distributed.rank(),
        world_size=world,
        num_workers=num_workers,
    )
    try:
        for _ in range(num_steps):
            parts = []
            for _ in range(share // micro_batch):
                batch = next(loader)
                parts.append((extractor(batch), batch.sample_ids, batch.positions))
            ids, positions = (_gathered([part[i] for part in parts], extractor.device) for i in (1, 2))
            order = positions.argsort()
            values = {kind: _gathered([part[0][kind] for part in parts], extractor.device) for kind in parts[0][0]}
            yield {kind: rows[order] for kind, rows in values.items()}, ids[order].cpu()
    finally:
        loader.close()


def _gathered(parts: list[Tensor], device: torch.device) -> Tensor:
    """The rows of all micro-batches of all ranks."""
    rows = torch.cat(parts).to(device)
    return gather_rows(rows, [len(rows)] * distributed.world_size())


def _rows(
    group: SGDHeads,
    kind: str,
    norm: str,
    settings: Sequence[tuple],
    values: Tensor,
    labels: Tensor,
    held: Tensor | None,
) -> list[dict]:
    """A row of the grid for each head, with what it reaches on the held-out part where there is one."""
    counts, losses = score(group.heads(), values, labels, held) if held is not None else (None, None)
    rows = []
    for h, (learning_rate, weight_decay) in enumerate(settings):
        row = {"features": kind, "norm": norm, "learning_rate": learning_rate, "weight_decay": weight_decay}
        if counts:
            loss = losses[h] if math.isfinite(losses[h]) else None  # the head diverged
            row |= {"held_out_top1": percent(counts[h]["top1"], len(held)).value, "held_out_loss": loss}
        rows.append(row)
    return rows


def _preference(row: dict) -> tuple[float, float]:
    """Accuracy decides, and between equals the cross-entropy."""
    return row["held_out_top1"], -math.inf if row["held_out_loss"] is None else -row["held_out_loss"]


def _warnings(num_steps: int, chosen: dict, protocol: Protocol) -> list[str]:
    warnings = []
    if num_steps < FEW_STEPS:
        warnings.append(
            f"The protocol's global batch of {protocol.global_batch} gives {counted(num_steps, 'step')} on this data; "
            f"--global-batch takes a smaller one."
        )
    warnings += edge_warnings("learning rate", chosen["learning_rate"], protocol.learning_rates)
    if len(protocol.weight_decays) > 2:  # of two, each is at the edge
        warnings += edge_warnings("weight decay", chosen["weight_decay"], protocol.weight_decays)
    return warnings
