"""Linear heads trained by SGD or LARS, many at once, from the same batches of features.

- Heads of one kind of feature and norm lie in one tensor; learning rate and weight decay differ from head to head.
- Batch norm takes its statistics from the whole global batch. Its running averages have the usual momentum of 0.1 and
  are divided by the weight that they have gathered, so that a short run is not judged by their start.
- LARS as in the MAE code (You et al., arXiv 1708.03888): a weight's step g + wd * w is multiplied by
  0.001 * |w| / |g + wd * w|, then gathered by momentum; biases and norms get neither that nor decay.
- SGD decays weights and biases, not norms.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from prelude.evaluators.frozen.convex import Heads
from prelude.evaluators.protocols.papers import Protocol

TRUST = 0.001
INIT_STD = 0.01
NORM_MOMENTUM = 0.1
LOGITS = 2**24  # held at once; 64 MiB of float32


class SGDHeads:
    """The heads of one kind of feature and one norm, one for each (learning rate, weight decay)."""

    def __init__(
        self, protocol: Protocol, norm: str, width: int, num_classes: int, settings: Sequence[tuple], seed: int, device
    ):
        self.protocol, self.norm, self.num_classes = protocol, norm, num_classes
        generator = torch.Generator().manual_seed(seed)
        start = torch.nn.init.trunc_normal_(torch.empty(num_classes, width), std=INIT_STD, generator=generator)
        num_heads = len(settings)
        self.params = {  # every head begins from the same weights, so that only its setting tells it apart
            "weight": start.to(device).repeat(num_heads, 1, 1),  # (H, C, D)
            "bias": torch.zeros(num_heads, num_classes, device=device),
        }
        if norm == "batch_affine":
            self.params["gamma"] = torch.ones(num_heads, width, device=device)
            self.params["beta"] = torch.zeros(num_heads, width, device=device)
        self.buffers = {name: torch.zeros_like(param) for name, param in self.params.items()}
        self.lr = torch.tensor([protocol.peak_lr(lr) for lr, _ in settings], device=device)
        self.decay = torch.tensor([decay for _, decay in settings], device=device)
        self.running = torch.zeros(2, width, device=device)  # mean and unbiased variance, times `gathered`
        self.gathered = 0.0

    def step(self, values: Tensor, labels: Tensor, lr_factor: float) -> None:
        """One update from a global batch of features (B, D) with labels (B,)."""
        self._update(self._gradients(self._normalised(values), labels), lr_factor)

    def heads(self) -> Heads:
        """As they are now, with running averages for statistics."""
        weights, biases = self._folded(self.params)
        mean, variance = self.running / self.gathered if self.gathered else (0 * self.running[0], None)
        eps = self.protocol.norm_eps
        scale = torch.ones_like(mean) if variance is None else (variance + eps).rsqrt()
        never = torch.zeros(len(weights), 1, dtype=torch.long)
        return Heads(weights, biases, mean, scale, never, never.float())

    def _normalised(self, values: Tensor) -> Tensor:
        if self.norm == "none":
            return values
        variance, mean = torch.var_mean(values, 0, correction=0)
        unbiased = variance * len(values) / max(len(values) - 1, 1)
        self.running = torch.lerp(self.running, torch.stack([mean, unbiased]), NORM_MOMENTUM)
        self.gathered += NORM_MOMENTUM * (1 - self.gathered)
        return (values - mean) * (variance + self.protocol.norm_eps).rsqrt()

    def _folded(self, params: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """(weights (H, C, D), biases (H, C)) with the norm's own scale and shift in them."""
        weights, biases = params["weight"], params["bias"]
        if "gamma" not in params:
            return weights, biases
        return weights * params["gamma"][:, None], biases + torch.einsum("hcd,hd->hc", weights, params["beta"])

    def _gradients(self, values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Of each head's mean cross-entropy over the batch."""
        params = {name: param.detach().requires_grad_() for name, param in self.params.items()}
        gradients = {name: torch.zeros_like(param) for name, param in params.items()}
        rows = max(LOGITS // self.params["bias"].numel(), 1)
        with torch.enable_grad():
            for piece, wanted in zip(values.split(rows), labels.split(rows), strict=True):
                weights, biases = self._folded(params)
                logits = torch.einsum("nd,hcd->hnc", piece, weights) + biases[:, None]  # (H, n, C)
                each = F.cross_entropy(logits.flatten(0, 1), wanted.repeat(len(logits)), reduction="sum")
                found = torch.autograd.grad(each / len(values), list(params.values()))
                for name, gradient in zip(params, found, strict=True):
                    gradients[name] += gradient
        return gradients

    def _update(self, gradients: dict[str, Tensor], lr_factor: float) -> None:
        lars, momentum = self.protocol.optimizer == "lars", self.protocol.momentum
        for name, gradient in gradients.items():
            param, buffer = self.params[name], self.buffers[name]
            each = (-1, *[1] * (param.ndim - 1))  # a head's number, against its parameters
            if name == "weight" or (name == "bias" and not lars):
                gradient = gradient + self.decay.view(each) * param
            if name == "weight" and lars:
                sizes, steps = param.flatten(1).norm(dim=1), gradient.flatten(1).norm(dim=1)
                trust = torch.where((sizes > 0) & (steps > 0), TRUST * sizes / steps, 1.0)
                gradient = gradient * trust.view(each)
            buffer.mul_(momentum).add_(gradient)
            moved = gradient + momentum * buffer if self.protocol.nesterov else buffer
            self.params[name] = param - (lr_factor * self.lr).view(each) * moved
