"""The optimizer's step, which is not taken where loss or gradient are not finite, and then leaves nothing behind.

The norm of all gradients decides. They are averaged over ranks already, so it is finite on every rank or on none; and
it is looked at on the device, so that the host can go on to the next step without knowing.

- AdamW's fused kernel leaves weights, moments and step counts as they are where it is told to.
- What any other optimizer changed is put back, which takes a second copy of weights and moments while it steps. A count
  of steps on the host, as timm's LAMB keeps one, counts refused steps too.
- So are the running statistics of norms, which the forward pass has moved: what is no number would stay in them for
  good, and show only where the encoder is evaluated.
"""

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from prelude.pretrain.collectives import sum_over_ranks
from prelude.pretrain.gradient_mean import GradientMean


class GuardedStep:
    """For an engine of DeepSpeed's around a torch optimizer, at any ZeRO stage.

    After a call at an accumulation boundary, `norm` is that of the gradients before clipping and `applied` is 1.0
    where the weights moved and 0.0 where the step was refused; both are scalars on the device, alike on all ranks.
    """

    def __init__(self, engine, parameters: list[nn.Parameter], clipping: float, bucket_size: int):
        self.engine, self.parameters, self.clipping = engine, parameters, clipping
        self.zero = engine.optimizer if engine.zero_optimization_stage() else None
        optimizer = self.zero.optimizer if self.zero else engine.optimizer
        # Under stage 3 DeepSpeed steps with what it holds, and a parameter that a step has left without gradient would
        # move by the one of the step before.
        self.held = getattr(self.zero, "grad_partitions_flat_buffer", None)
        if self.zero:
            _leave_refusing_to_us(self.zero, engine.device)
        else:
            engine.zero_grad = self._forget_gradients  # DeepSpeed's walks through all modules in every step
            engine.enable_backward_allreduce = False
            self.mean = GradientMean(parameters, bucket_size, engine.is_gradient_accumulation_boundary)
        self._before: dict[Tensor, Tensor] = {}
        norms = [module for module in engine.module.modules() if isinstance(module, _NormBase)]
        buffers = [buffer for norm in norms for buffer in norm.buffers(recurse=False)]
        kinds = {buffer.dtype for buffer in buffers}  # means and variances, and counts of batches
        self.statistics = [[buffer for buffer in buffers if buffer.dtype == kind] for kind in kinds]
        self._statistics_before: list[list[Tensor]] = []
        optimizer.register_step_pre_hook(self._begin)
        optimizer.register_step_post_hook(self._end)

    @torch.no_grad()
    def begin(self) -> None:
        """Before a step's first forward pass."""
        self._statistics_before = list(map(_copied, self.statistics))

    def __call__(self, at_boundary: bool) -> None:
        if at_boundary and self.zero is None:
            self._look_and_clip()
        self.engine.step()
        if at_boundary and self.held is not None:
            self.held.zero_()
        if at_boundary:
            for of_a_kind, before in zip(self.statistics, self._statistics_before, strict=True):
                self._put_back(of_a_kind, before)

    def _look_and_clip(self) -> None:
        """At stage 0, where nothing below us averages the gradients, looks at them or clips them."""
        self.mean.finish()
        scaler = self.engine.torch_autocast_z0_gradscaler
        if scaler:
            scaler.unscale_(self.engine.optimizer)
        held = [parameter for parameter in self.parameters if parameter.grad is not None]
        self._decide(torch.linalg.vector_norm(torch.stack(torch._foreach_norm([p.grad for p in held]))))
        if self.clipping:
            torch.nn.utils.clip_grads_with_norm_(held, self.clipping, self.norm)

    def _forget_gradients(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    def _decide(self, norm: Tensor) -> None:
        self.norm, self.refused = norm, ~torch.isfinite(norm)
        self.applied = (~self.refused).float()

    @torch.no_grad()
    def _begin(self, optimizer: torch.optim.Optimizer, *_) -> None:
        """Under ZeRO an optimizer steps once for each flat piece, after the norm of all is known."""
        if self.zero:
            self._decide(self.zero._global_grad_norm)
        if _is_fused(optimizer):
            optimizer.found_inf = self.refused.float()
            return
        if moved := _moved(optimizer):
            self._before = dict(zip(moved, _copied(moved), strict=True))

    @torch.no_grad()
    def _end(self, optimizer: torch.optim.Optimizer, *_) -> None:
        moved, kept = _moved(optimizer), self._before
        if _is_fused(optimizer) or not moved:
            return
        self._before = {}
        for tensor in moved:
            if tensor not in kept:  # a moment that this step has made; at 0, the next step treats it as new
                kept[tensor] = torch.zeros_like(_bits(tensor))
        self._put_back(moved, [kept[tensor] for tensor in moved])

    @torch.no_grad()
    def _put_back(self, tensors: list[Tensor], before: list[Tensor]) -> None:
        """Where the step is refused, what was there, as `_copied` has it; `before` is used up. As whole numbers: what
        was computed may be no number, and 0 times that is none either."""
        now = list(map(_bits, tensors))
        refused = self.refused.to(now[0].dtype)
        torch._foreach_mul_(now, 1 - refused)
        torch._foreach_mul_(before, refused)
        torch._foreach_add_(now, before)


def _copied(tensors: list[Tensor]) -> list[Tensor]:
    """Their bits, in a few kernels, where `clone` would take one for each tensor."""
    return torch._foreach_mul(list(map(_bits, tensors)), 1)


def _bits(values: Tensor) -> Tensor:
    """The same memory as whole numbers."""
    return values.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()])


def _is_fused(optimizer: torch.optim.Optimizer) -> bool:
    return bool(optimizer.param_groups[0].get("fused"))


def _stepped(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]


def _moved(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """What a step changes on the device: weights and moments."""
    weights = _stepped(optimizer)
    moments = [v for w in weights for v in optimizer.state[w].values() if torch.is_tensor(v) and v.ndim]
    return weights + moments


def _leave_refusing_to_us(zero, device: torch.device) -> None:
    """DeepSpeed's ZeRO optimizers make the host wait to mark a norm that is not finite, and to ask whether it is."""
    from deepspeed.runtime.zero import stage3, stage_1_and_2

    def norm_over_ranks(gradients: list[Tensor], *_) -> Tensor:
        """Of one group of parameters, of which each rank holds a part."""
        norms = torch._foreach_norm([part for part in gradients if not getattr(part, "_zero_padding", False)])
        return sum_over_ranks(torch.stack([torch.zeros((), device=device), *norms]).square().sum()).sqrt()

    zero.get_grad_norm_direct = norm_over_ranks
    for module in (stage_1_and_2, stage3):
        module.is_invalid_grad_norm = _taken_as_valid


def _taken_as_valid(norm) -> bool:
    return False
