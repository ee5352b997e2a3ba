"""What a training step costs: FLOPs, and the bytes that tensors hold while it runs.

A real forward and backward of a few blank images is watched, operation by operation, so that whatever an objective
does is counted as it does it: an own decoder, a teacher without gradients, autocast, activation checkpointing. Two
sizes are enough for any other, because the same operations come in the same order: at each of them bytes and FLOPs
grow linearly with the images, and the peak is that of the operation that needs most.

Not seen: what a kernel takes for itself while it runs, such as a workspace of cuDNN or oneDNN.
"""

import copy
import weakref
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from prelude.data.batch import Batch, ViewPlan, VolumePlan
from prelude.pretrain.objective import Objective
from prelude.pretrain.schedules import Progress

_SIZES = (4, 6)  # images; a batch norm refuses one, of two no rank of features is told, and mixing pairs them
_LONG = 10**9  # steps, of which any that is looked at is at the beginning of all schedules
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
# Of attention, torch's registry has only the kernels of accelerators.
_ON_CPU = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_ON_CPU_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
_aten = torch.ops.aten
_PRODUCTS = {_aten.mm, _aten.addmm, _aten.bmm, _aten.baddbmm, _aten.convolution, _aten.convolution_backward,
             _ON_CPU, _ON_CPU_BACKWARD}  # fmt: skip
_HALVES = {torch.bfloat16, torch.float16}


@dataclass(frozen=True)
class Growth:
    """Numbers, (places,), that each grow linearly with the images of a micro-batch."""

    fixed: np.ndarray
    an_image: np.ndarray

    def largest(self, num_images: int) -> float:
        return float((self.fixed + num_images * self.an_image).max())


@dataclass(frozen=True)
class StepCost:
    """Of one micro-batch on one rank. Bytes are beyond weights and optimizer, which are there before."""

    flops: Growth  # forward and backward
    held: Growth  # bytes after each operation
    beside_gradients: Growth  # the same without the gradients of weights
    kept: Growth  # bytes of activations that the forward keeps for the backward


def step_cost(
    objective: Objective, precision: str = "fp32", checkpointing: bool = False, volume_share: float = 0.5
) -> StepCost:
    """Of `objective`, on its device. It is left as it was: a copy takes the steps. Collective, where its forward is.

    volume_share: of the steps, where volumes take turns with images. FLOPs are then the mean of both kinds, and bytes
    those of either, whichever needs more.
    """
    images = _cost(objective, objective.views, precision, checkpointing)
    if not objective.takes_volumes:
        return images
    volumes = _cost(objective, objective.views.volumes, precision, checkpointing)
    return StepCost(
        flops=Growth(
            (1 - volume_share) * images.flops.fixed + volume_share * volumes.flops.fixed,
            (1 - volume_share) * images.flops.an_image + volume_share * volumes.flops.an_image,
        ),
        held=_either(images.held, volumes.held),
        beside_gradients=_either(images.beside_gradients, volumes.beside_gradients),
        kept=_either(images.kept, volumes.kept),
    )


def _either(one: Growth, other: Growth) -> Growth:
    return Growth(np.concatenate([one.fixed, other.fixed]), np.concatenate([one.an_image, other.an_image]))


def _cost(objective: Objective, plan: ViewPlan | VolumePlan, precision: str, checkpointing: bool) -> StepCost:
    usual, heaviest = objective.telling_steps()
    small, large = (_watched(objective, plan, size, precision, checkpointing, heaviest) for size in _SIZES)
    flops = [small.flops, large.flops]
    if usual != heaviest:
        flops = [_watched(objective, plan, size, precision, checkpointing, usual).flops for size in _SIZES]
    shorter = min(len(small.operations), len(large.operations))
    front = _alike(small.operations, large.operations, shorter)
    back = _alike(small.operations[::-1], large.operations[::-1], shorter - front)
    of_small, of_large = (ledger.joined(front, back) for ledger in (small, large))
    return StepCost(
        flops=_growth(flops[:1], flops[1:]),
        held=_growth(of_small.sum(0), of_large.sum(0)),
        beside_gradients=_growth(of_small[0], of_large[0]),
        kept=_growth([small.kept], [large.kept]),
    )


def flops_an_image(objective: Objective, precision: str) -> float:
    """Forward and backward, without what activation checkpointing computes again. Collective, where its forward is."""
    usual, _ = objective.telling_steps()
    return _watched(objective, objective.views, _SIZES[0], precision, checkpointing=False, step=usual).flops / _SIZES[0]


class ProductsInFloat32(TorchDispatchMode):
    """While it is entered: products of 16 bits are computed in 32, and handed over in 16 as before. Who watches above
    it sees the same tensors; a CPU without units for bf16 takes minutes otherwise."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket not in _PRODUCTS:
            return function(*args, **(kwargs or {}))
        halves = {value.dtype for value in tree_iter((args, kwargs)) if isinstance(value, Tensor)} & _HALVES
        widened = tree_map_only(Tensor, _widened, (args, kwargs or {}))
        result = function(*widened[0], **widened[1])
        if not halves:
            return result
        (half,) = halves
        own = isinstance(result, tuple) and function.overloadpacket is _ON_CPU  # beside it is a logarithm of 32 bits
        return (result[0].to(half), *result[1:]) if own else tree_map_only(Tensor, lambda value: value.to(half), result)


def _widened(value: Tensor) -> Tensor:
    return value.float() if value.dtype in _HALVES else value


class Flops(TorchDispatchMode):
    """While it is entered: FLOPs by torch's formulas."""

    def __init__(self):
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if formula := _formula(function.overloadpacket):
            self.flops += formula(*args, **(kwargs or {}), out_val=result)
        return result


class Ledger(Flops):
    """And after each operation the bytes of tensors that it has seen made and that still exist."""

    def __init__(self, known: Iterable[Tensor] = ()):
        """known: tensors that were there before and are not counted."""
        super().__init__()
        self.operations: list = []
        self.course: list[int] = []  # bytes after each operation
        self.kept = 0
        self._held = 0
        self._made: dict[weakref.ref, tuple[int, int]] = {}  # storage: (bytes, operation)
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self._gradients: list[tuple[int, int]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = super().__torch_dispatch__(function, types, args, kwargs)
        for value in tree_iter(result):
            if isinstance(value, Tensor):
                self._enter(value)
        self.course.append(self._held)
        self.operations.append(function)
        return result

    def forward_done(self) -> None:
        self.kept = self._held

    def backward_done(self, parameters: Iterable[Tensor]) -> None:
        storages = [p.grad.untyped_storage() for p in parameters if p.grad is not None]
        self._gradients = [self._made[ref] for s in storages if (ref := weakref.ref(s, self._leave)) in self._made]

    def joined(self, front: int, back: int) -> np.ndarray:
        """(2, front + 1 + back): bytes beside the gradients of weights, and theirs. The operations between the first
        `front` and the last `back` count as one, with what they need at most."""
        gradients = np.zeros(len(self.course))
        for size, operation in self._gradients:
            gradients[operation:] += size
        beside, middle = np.array(self.course) - gradients, slice(front, len(self.course) - back)
        rows = [[*row[:front], max(row[middle], default=0), *row[middle.stop :]] for row in (beside, gradients)]
        return np.array(rows)

    def _enter(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        reference = weakref.ref(storage, self._leave)
        if storage._cdata not in self._known and reference not in self._made:
            self._made[reference] = storage.nbytes(), len(self.course)
            self._held += storage.nbytes()

    def _leave(self, reference: weakref.ref) -> None:
        self._held -= self._made.pop(reference)[0]


def blank_batch(plan: ViewPlan | VolumePlan, size: int, label_shape: tuple[int, ...] = ()) -> Batch:
    """label_shape: of a sample's label; () for a class number."""
    sizes = [plan.size] if isinstance(plan, VolumePlan) else [view.size for view in plan.views]
    return Batch(
        views=tuple(torch.zeros(size, plan.channels, *of_view, dtype=torch.uint8) for of_view in sizes),
        boxes=torch.zeros(size, len(sizes), 4, dtype=torch.int32),
        flips=torch.zeros(size, len(sizes), dtype=torch.bool),
        seeds=torch.arange(size),
        sample_ids=torch.arange(size),
        positions=torch.arange(size),
        labels=torch.zeros(size, *label_shape, dtype=torch.float32 if label_shape else torch.int64),
    )


def _watched(
    objective: Objective, plan: ViewPlan | VolumePlan, size: int, precision: str, checkpointing: bool, step: int
) -> Ledger:
    """One step of a copy, whose statistics and gradients may change. step: at the beginning of a long run."""
    objective = copy.deepcopy(objective)
    if hasattr(objective.encoder, "set_grad_checkpointing"):
        objective.encoder.set_grad_checkpointing(checkpointing)
    device = next(objective.parameters()).device
    batch = blank_batch(plan, size, objective.label_shape)
    # Seeds that are alike, so that no length depends on how many images there are.
    batch = replace(batch, seeds=torch.zeros_like(batch.seeds)).to(device)
    handed_over = [value for value in tree_iter(vars(batch)) if isinstance(value, Tensor)]
    ledger = Ledger([*objective.parameters(), *objective.buffers(), *handed_over])
    autocast = torch.autocast(device.type, _AUTOCAST[precision]) if precision in _AUTOCAST else nullcontext()
    products = ProductsInFloat32() if precision in _AUTOCAST and device.type == "cpu" else nullcontext()
    with torch.random.fork_rng([device] if device.type == "cuda" else []), products, ledger:
        torch.manual_seed(0)
        with autocast:
            total = objective(batch, Progress(step, _LONG, 1.0)).total
        ledger.forward_done()
        total.backward()
        ledger.backward_done(objective.parameters())
    return ledger


def _alike(first: list, second: list, at_most: int) -> int:
    """How many entries at the front are the same."""
    return next((place for place in range(at_most) if first[place] is not second[place]), at_most)


def _growth(small, large) -> Growth:
    small, large = np.array(small, dtype=np.float64), np.array(large, dtype=np.float64)
    an_image = (large - small) / (_SIZES[1] - _SIZES[0])
    return Growth(small - _SIZES[0] * an_image, an_image)


def _formula(operation):
    if operation is _ON_CPU:
        return _attention
    return _attention_backward if operation is _ON_CPU_BACKWARD else flop_registry.get(operation)


def _attention(query, key, value, *_, out_val=None, **__) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _attention_backward(grad, query, key, value, *_, out_val=None, **__) -> int:
    return sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape)
