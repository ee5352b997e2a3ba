"""Batch norm whose statistics are those of the global batch, on CPU and GPU.

- Output, gradient and running statistics equal those of one process with the joined batch, whatever each rank's
  share of it; the running statistics are the same on all ranks to the last bit.
- Modules keep their names, parameters and buffers: only the class of an instance changes, to a subclass.
- One message forward and one backward, each a sum over ranks of two numbers a channel and a count.

torch's own SyncBatchNorm refuses tensors on the CPU and replaces modules.
"""

import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from prelude.data.errors import UserError
from prelude.pretrain.collectives import sum_over_ranks
from prelude.pretrain.distributed import world_size


def synchronise(module: nn.Module) -> None:
    """Makes every batch norm in `module` compute its statistics over all ranks, in place.

    Raises UserError for a batch norm with a forward of its own, which nothing here knows how to share.
    """
    for name, norm in module.named_modules():
        if not isinstance(norm, _BatchNorm) or isinstance(norm, _AcrossRanks):
            continue
        if type(norm) not in _SYNCHRONISED:
            raise UserError(
                f"{name} is a {type(norm).__name__}, whose statistics cannot be shared between ranks; choose an "
                "encoder with plain batch norm, or none."
            )
        norm.__class__ = _SYNCHRONISED[type(norm)]


def has_batch_norms(module: nn.Module) -> bool:
    return any(isinstance(part, _BatchNorm) for part in module.modules())


def normalise_columns(values: Tensor, eps: float = 1e-5) -> Tensor:
    """(n, D), this rank's rows, with each column brought to mean 0 and variance 1 over all ranks' rows.

    The variance is the biased one, plus eps; no affine. Differentiable.
    """
    if world_size() == 1:
        return F.batch_norm(values, None, None, training=True, eps=eps)
    return _Normalise.apply(values, None, None, *global_statistics(values)[:2], eps)


@torch.no_grad()
def global_statistics(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Biased (mean, variance) of each channel over all ranks, and the number of values behind them (a scalar).

    values: (n, C, ...). Merged from each rank's own mean and squared deviations, as sums of values and of squares in
    float64, whose difference loses nothing that float32 could hold. Returns (C,), (C,), () in float32 at least.
    """
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    mean, deviations = (numbers.double() for numbers in _mean_and_squared_deviations(values))
    count = mean.new_full((1,), values.numel() // values.shape[1])
    sums = sum_over_ranks(torch.cat([count, count * mean, deviations + count * mean.square()]))
    total = sums[0]
    mean, square = (sums[1:] / total).chunk(2)
    variance = (square - mean.square()).clamp(min=0)
    return mean.to(values.dtype), variance.to(values.dtype), total.to(values.dtype)


def _mean_and_squared_deviations(values: Tensor) -> tuple[Tensor, Tensor]:
    """Of each channel of this rank's values: mean and sum of (value - mean)^2. (n, C, ...) to (C,), (C,)."""
    dims = _reduced(values)
    if values.is_cuda:
        variance, mean = torch.var_mean(values, dim=dims, correction=0)
        return mean, variance * (values.numel() // values.shape[1])
    mean = values.mean(dims, keepdim=True)  # two passes: on CPUs a fifth of var_mean's time
    return mean.flatten(), (values - mean).square_().sum(dims)


class _Normalise(torch.autograd.Function):
    """Normalisation by statistics of the global batch, which the backward pass sees through."""

    @staticmethod
    def forward(ctx, values: Tensor, weight, bias, mean: Tensor, variance: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(values, weight, mean, variance)
        ctx.eps = eps
        return F.batch_norm(values, mean, variance, weight, bias, training=False, eps=eps)

    @staticmethod
    def backward(ctx, grad: Tensor):
        values, weight, mean, variance = ctx.saved_tensors
        inverse_std = (variance + ctx.eps).rsqrt()
        projection, grad_sum = _sums(grad, values, mean, inverse_std)
        count = mean.new_full((1,), values.numel() // values.shape[1])
        total = sum_over_ranks(torch.cat([count, grad_sum, projection]))
        mean_grad, mean_projection = (total[1:] / total[0]).chunk(2)
        scale = inverse_std if weight is None else inverse_std * weight
        # scale * (grad - mean_grad - normalised * mean_projection), in two passes over the values
        slope, offset = -scale * mean_projection, -scale * mean_grad
        grad_values = F.batch_norm(values, mean, variance, slope, offset, training=False, eps=ctx.eps)
        grad_values.addcmul_(grad, scale.view(-1, *[1] * (values.ndim - 2)))
        if weight is None:
            return grad_values, None, None, None, None, None
        return grad_values, projection, grad_sum, None, None, None  # the engine sums what belongs to parameters


def _sums(grad: Tensor, values: Tensor, mean: Tensor, inverse_std: Tensor) -> tuple[Tensor, Tensor]:
    """(C,) sums of grad * normalised values, and of grad, over this rank's values: one pass, where products and sums
    written out take four, each with a map of its own."""
    channels_last = values.ndim == 4 and values.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    grad, values = grad.contiguous(memory_format=layout), values.contiguous(memory_format=layout)
    wanted = [False, True, True]  # the gradients of weight and bias, and not that of the values
    ones = torch.ones_like(mean)
    _, projection, grad_sum = torch.ops.aten.native_batch_norm_backward(
        grad, values, ones, None, None, mean, inverse_std, True, 0.0, wanted
    )
    return projection, grad_sum


class _AcrossRanks:
    """Mixed in before a batch norm's class."""

    def forward(self, values: Tensor) -> Tensor:
        if world_size() == 1 or not self.training:
            return super().forward(values)
        self._check_input_dim(values)
        mean, variance, count = global_statistics(values)
        if self.track_running_stats:
            self._update_running_statistics(mean, variance, count)
        return self._finish(_Normalise.apply(values, self.weight, self.bias, mean, variance, self.eps))

    def _finish(self, normalised: Tensor) -> Tensor:
        return normalised

    @torch.no_grad()
    def _update_running_statistics(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        self.num_batches_tracked.add_(1)
        momentum = 1.0 / self.num_batches_tracked.float() if self.momentum is None else self.momentum
        unbiased = variance * (count / (count - 1))
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), momentum)


class _BatchNorm1d(_AcrossRanks, nn.BatchNorm1d):
    pass


class _BatchNorm2d(_AcrossRanks, nn.BatchNorm2d):
    pass


class _BatchNorm3d(_AcrossRanks, nn.BatchNorm3d):
    pass


class _BatchNormAct2d(_AcrossRanks, BatchNormAct2d):
    def _finish(self, normalised: Tensor) -> Tensor:
        return self.act(self.drop(normalised))


_SYNCHRONISED = {
    nn.BatchNorm1d: _BatchNorm1d,
    nn.BatchNorm2d: _BatchNorm2d,
    nn.BatchNorm3d: _BatchNorm3d,
    BatchNormAct2d: _BatchNormAct2d,
}


def _reduced(values: Tensor) -> list[int]:
    """All dimensions but the channels'."""
    return [dim for dim in range(values.ndim) if dim != 1]
