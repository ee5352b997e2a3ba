"""What an objective promises, checked in one process: on made-up images, on the CPU, without shards or an engine.

Each check is a function of a `Subject`. It returns a sentence that says what was found to be right, or raises `Broken`
with one that says what is wrong and where to look. What needs an engine, ranks or ZeRO is in `objective_ranks`.
"""

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from prelude.data.batch import Batch, ViewPlan
from prelude.data.counting import named
from prelude.launch.made_up_data import made_up_batch, made_up_volumes
from prelude.objectives.building import build_objective
from prelude.pretrain.batch_norm import has_batch_norms
from prelude.pretrain.config import Config
from prelude.pretrain.encoders import build_encoder
from prelude.pretrain.host_waits import counting_waits
from prelude.pretrain.objective import Loss, Objective
from prelude.pretrain.schedules import Progress

NUM_SAMPLES = 16
NUM_STEPS = 4
TOLERANCE = 1e-3  # of a gradient's norm: float32, summed in another order
_LEAST = 1e-4  # of all gradients' norm: what is smaller is compared with this much
_RATE = 0.02  # of the weights' norm, moved by a step


class Broken(Exception):
    """A promise that is not kept."""


class Unusable(Broken):
    """There is no pass that other checks could look at."""


@dataclass(frozen=True)
class Subject:
    """An objective under check."""

    config: Config  # as the checks run it: small batch, float32, plain SGD
    of_volumes: bool = False  # whether it is shown volumes, where it learns from both

    @property
    def global_batch(self) -> int:
        return self.config.train.global_batch

    def fresh(self) -> Objective:
        return build_objective(self.config)

    def batch(self, plan: ViewPlan, step: int = 0, salt: int = 0) -> Batch:
        """The global batch of a step."""
        positions = step * self.global_batch + torch.arange(self.global_batch)
        if self.of_volumes:
            return made_up_volumes(positions, plan.volumes, NUM_SAMPLES, salt)
        return made_up_batch(positions, plan, NUM_SAMPLES, salt)

    def progress(self, step: int = 0) -> Progress:
        return Progress(step, NUM_STEPS, NUM_SAMPLES / self.global_batch)


@dataclass(frozen=True)
class Found:
    """Of one forward and backward pass."""

    loss: Loss
    gradients: dict[str, Tensor] = field(default_factory=dict)  # by parameter

    @property
    def total(self) -> float:
        return self.loss.total.item()


def run(objective: Objective, batch: Batch, progress: Progress, *, seed: int = 0, generators: str = "all") -> Found:
    """One pass, with torch's, NumPy's and Python's generators (or one of them) seeded by `seed`, the others by 0."""
    for name, seed_it in _GENERATORS.items():
        seed_it(seed if generators in ("all", name) else 0)
    objective.zero_grad(set_to_none=True)
    loss = objective(batch, progress)
    loss.total.backward()
    held = {name: p.grad.clone() for name, p in objective.named_parameters() if p.grad is not None}
    return Found(loss, held)


_GENERATORS: dict[str, Callable] = {"torch": torch.manual_seed, "NumPy": np.random.seed, "Python": random.seed}


def largest_difference(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float = TOLERANCE) -> str:
    """The tensor in which two sets of gradients or weights differ most, with by how much; empty where in none.

    Each difference is a share of the tensor's norm, or of a small part of the norm of all, where that is more.
    """
    if one.keys() != other.keys():
        return f"{min(one.keys() ^ other.keys())} (which one of them lacks)"
    whole = sum(value.double().square().sum() for value in one.values()) ** 0.5
    worst, where = tolerance, ""
    for name, value in one.items():
        size = max(value.double().norm().item(), _LEAST * float(whole), 1e-30)
        share = (value.double() - other[name].double()).norm().item() / size
        if not share <= worst:
            worst, where = share, f"{name} (by {share:.0%} of its size)"
    return where


# ---- the checks


def forward(subject: Subject) -> str:
    objective = subject.fresh()
    if not isinstance(getattr(objective, "views", None), ViewPlan):
        raise Unusable("self.views is no ViewPlan; __init__ says there which crops of an image it wants.")
    batch = subject.batch(objective.views)
    before = copy.deepcopy(batch)
    loss = objective(batch, subject.progress())
    if not isinstance(loss, Loss):
        raise Unusable(
            f"forward returns a {type(loss).__name__}; return prelude.pretrain.objective.Loss(total, parts)."
        )
    if loss.total.ndim or not loss.total.isfinite():
        raise Unusable(f"The loss is {loss.total.tolist()}; it is one finite number, the mean over the batch.")
    if not loss.total.requires_grad:
        raise Unusable("The loss has no gradient; look for a no_grad, or a detach(), on its way.")
    wrong = [
        f"The part {name} of the loss is no detached scalar tensor; write .detach().mean() or the like."
        for name, part in loss.parts.items()
        if not isinstance(part, Tensor) or part.ndim or part.requires_grad
    ]
    wrong += [
        f"forward changes batch.{name} in place; work on a copy."
        for name in ("views", "seeds", "flips", "boxes")
        if any(not torch.equal(a, b) for a, b in zip(_tensors(batch, name), _tensors(before, name), strict=True))
    ]
    if wrong:
        raise Broken(" ".join(wrong))
    parts = f"{len(loss.parts)} {named(len(loss.parts), 'part')}"
    return f"the loss is {loss.total.item():.4g} at the start, with {parts} for the log"


def draws(subject: Subject) -> str:
    """Masks, noise and colours depend on the samples' seeds alone."""
    objective = subject.fresh()
    batch = subject.batch(objective.views)
    reference = run(objective, batch, subject.progress())
    for name in _GENERATORS:
        other = run(subject.fresh(), batch, subject.progress(), seed=1, generators=name)
        if _far(reference.total, other.total) or largest_difference(reference.gradients, other.gradients):
            raise Broken(
                f"The loss of the same batch is {reference.total:.6g}, and {other.total:.6g} where {name}'s global "
                "generator is seeded otherwise; draw masks and noise from batch.seeds, by prelude.pretrain.draws."
            )
    return "masks and noise depend on nothing but the samples' seeds and the step"


def responds(subject: Subject) -> str:
    objective = subject.fresh()
    one, other = (run(objective, subject.batch(objective.views, salt=salt), subject.progress()) for salt in (0, 1))
    if not _far(one.total, other.total, 1e-6):
        raise Broken(f"The loss is {one.total:.6g} for other images too; look where batch.views is lost.")
    reached = [p for name, p in one.gradients.items() if name.startswith("encoder.") and p.abs().max() > 0]
    trained = [p for p in objective.encoder.parameters() if p.requires_grad]
    if not reached:
        raise Broken("No gradient reaches the encoder; look for a detach(), or a no_grad, between it and the loss.")
    return f"other images give another loss, and {len(reached)} of {len(trained)} tensors of the encoder a gradient"


def ignores_labels(subject: Subject) -> str:
    objective = subject.fresh()
    batch = subject.batch(objective.views)
    totals = []
    for labels in (None, torch.arange(len(batch)), torch.arange(len(batch)).flip(0)):
        with_labels = copy.copy(batch)
        object.__setattr__(with_labels, "labels", labels)
        totals.append(run(subject.fresh(), with_labels, subject.progress()).total)
    if _far(totals[0], totals[1]) or _far(totals[0], totals[2]):
        raise Broken(f"The loss depends on batch.labels ({totals}); they are for evaluations alone.")
    return "labels are not read"


def averages(subject: Subject) -> str:
    """The loss of a batch is the mean over its samples, wherever in the batch, and with whom, they are."""
    objective = subject.fresh()
    if not objective.accumulates:
        return "the loss is one of the whole batch, as accumulates=False says, and micro-batches are refused"
    normed = has_batch_norms(objective)
    batch = subject.batch(objective.views)
    whole = run(subject.fresh().train(not normed), batch, subject.progress())
    halves = [
        run(subject.fresh().train(not normed), _taken(batch, rows), subject.progress())
        for rows in (torch.arange(0, len(batch), 2), torch.arange(1, len(batch), 2).flip(0))
    ]
    total = sum(half.total for half in halves) / 2
    if _far(whole.total, total):
        raise Broken(
            f"The loss of a batch is {whole.total:.6g}, and of its two halves {total:.6g} on average; take the mean "
            "over samples, draw by seeds and not by places in the batch, or write accumulates=False."
        )
    joined = {name: sum(half.gradients[name] for half in halves) / 2 for name in whole.gradients}
    if where := largest_difference(whole.gradients, joined):
        raise Broken(f"The gradient of a batch is not the mean of its halves' in {where}; look what mixes samples.")
    return "a batch is the mean of its parts, in any order" + (", batch norms held still" if normed else "")


def waits(subject: Subject) -> str:
    objective = subject.fresh()
    one = torch.ones(())
    for step in range(2):  # what is made once, such as constants, is made by then
        _step(objective, subject, step)
    batch, progress = subject.batch(objective.views, 2), subject.progress(2)
    with counting_waits() as found:
        objective(batch, progress).total.backward()
        objective.after_step(subject.progress(3), one)
    allowed, waits = objective.host_waits, f"{len(found)} {named(len(found), 'time')} a step"
    if len(found) > allowed:
        raise Broken(
            f"The host waits for the device {waits}, first by {found[allowed]}; keep values on the "
            "device (torch.where, masks by multiplication, parts of the loss as tensors)."
        )
    if allowed:
        return f"the host waits for the device {waits}, of the {allowed} that host_waits allows"
    return "the host never waits for the device"


def resumes(subject: Subject) -> str:
    """All that decides the next step is in parameters and buffers."""
    objective = subject.fresh()
    for step in range(2):
        _step(objective, subject, step)
    again = subject.fresh()
    again.load_state_dict({name: value.clone() for name, value in objective.state_dict().items()})
    one, other = (run(each, subject.batch(each.views, 2), subject.progress(2)) for each in (objective, again))
    where = largest_difference(one.gradients, other.gradients, 1e-6)
    if _far(one.total, other.total, 1e-6) or where:
        raise Broken(
            f"After a resume the third step has the loss {other.total:.6g} instead of {one.total:.6g}; keep what "
            "decides a step in parameters or buffers (register_buffer), or derive it from progress."
        )
    return "what decides the next step is in parameters and buffers"


def refuses(subject: Subject) -> str:
    """after_step of a step that was not applied changes nothing."""
    objective = subject.fresh()
    _step(objective, subject, 0)
    run(objective, subject.batch(objective.views, 1), subject.progress(1))
    before = {name: value.clone() for name, value in objective.state_dict().items()}
    objective.after_step(subject.progress(2), torch.zeros(()))
    if changed := _changed(before, objective):
        raise Broken(f"after_step changes {changed} though the step was refused; multiply what it adds by `applied`.")
    return "after a step that was refused nothing moves"


def exports(subject: Subject) -> str:
    objective = subject.fresh()
    exported = objective.exported_encoder()
    if not any(module is exported for module in objective.modules()):
        raise Broken("exported_encoder() returns what is no submodule; checkpoints would not hold its weights.")
    encoder = build_encoder(subject.config.encoder, seed=1)
    wanted, found = ({n: tuple(t.shape) for n, t in m.state_dict().items()} for m in (encoder, exported))
    if wanted != found:
        odd = min(wanted.items() ^ found.items())[0]
        raise Broken(
            f"exported_encoder() is not the config's encoder: they differ in {odd}; return that encoder alone."
        )
    encoder.load_state_dict(exported.state_dict())
    pixels = torch.rand(2, len(subject.config.data.mean), *subject.config.encoder.size)
    with torch.no_grad():
        if not torch.allclose(encoder.eval()(pixels), copy.deepcopy(exported).eval()(pixels), rtol=0, atol=1e-5):
            raise Broken("Features of exported_encoder() are not those of the config's encoder with its weights.")
    return "the exported encoder is the config's, and its weights load there"


def bf16(subject: Subject) -> str:
    objective = subject.fresh()
    batch = subject.batch(objective.views)
    torch.manual_seed(0)
    objective.zero_grad(set_to_none=True)
    with torch.autocast("cpu", torch.bfloat16):
        loss = objective(batch, subject.progress())
    loss.total.backward()
    gradients = {name: p.grad for name, p in objective.named_parameters() if p.grad is not None}
    named = {"the loss": loss.total, **{f"part {name}": part for name, part in loss.parts.items()}}
    named |= {f"the gradient of {name}": gradient for name, gradient in gradients.items()}
    for name, value in named.items():
        if not value.isfinite().all():
            raise Broken(f"In bf16 {name} is not finite; compute it in float32 (torch.autocast(..., enabled=False)).")
    if loss.total.dtype not in (torch.float32, torch.float64):
        raise Broken("Under autocast the loss is taken in bf16, which has three digits; take it with .float().")
    return "in bf16 loss, parts and gradients are finite, and the loss is float32"


def pictures(subject: Subject) -> str:
    objective = subject.fresh()
    _step(objective, subject, 0)
    before = {name: value.clone() for name, value in objective.state_dict().items()}
    training = [module.training for module in objective.modules()]
    with torch.no_grad():
        drawn = objective.pictures(subject.batch(objective.views))
    if not all(isinstance(picture, Image.Image) for picture in drawn.values()):
        raise Broken("pictures() returns a dictionary with values that are no PIL images.")
    if changed := _changed(before, objective):
        raise Broken(f"pictures() changes {changed}; put the network into eval mode, and back.")
    if training != [module.training for module in objective.modules()]:
        raise Broken("pictures() leaves modules in another mode; put them back into train mode.")
    return f"pictures ({', '.join(drawn) or 'none'}) change nothing"


CHECKS: dict[str, Callable[[Subject], str]] = {
    "forward": forward,
    "draws": draws,
    "responds": responds,
    "labels": ignores_labels,
    "average": averages,
    "host waits": waits,
    "state": resumes,
    "refused step": refuses,
    "exported encoder": exports,
    "bf16": bf16,
    "pictures": pictures,
}


WITHOUT_A_PASS = ("exported encoder",)  # what can be asked of an objective whose forward fails


# ---- what several use


def _step(objective: Objective, subject: Subject, step: int) -> None:
    """One step of SGD, whose size is a share of the weights'."""
    gradients = run(objective, subject.batch(objective.views, step), subject.progress(step)).gradients
    with torch.no_grad():
        for name, parameter in objective.named_parameters():
            if name in gradients:
                length = gradients[name].norm().clamp(min=1e-12)
                parameter -= _RATE * parameter.norm().clamp(min=1e-3) * gradients[name] / length
    objective.after_step(subject.progress(step + 1), torch.ones(()))


def _changed(before: dict[str, Tensor], objective: nn.Module) -> str:
    return next((n for n, value in objective.state_dict().items() if not torch.equal(before[n], value)), "")


def _taken(batch: Batch, rows: Tensor) -> Batch:
    return batch._map(lambda tensor: tensor[rows])


def _tensors(batch: Batch, name: str) -> tuple[Tensor, ...]:
    value = getattr(batch, name)
    return value if isinstance(value, tuple) else (value,)


def _far(one: float, other: float, tolerance: float = 1e-4) -> bool:
    return not abs(one - other) <= tolerance * max(abs(one), abs(other), 1e-12)
