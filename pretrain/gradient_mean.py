"""The mean of gradients over ranks at ZeRO stage 0, on its way while the backward pass still computes.

DeepSpeed sums at this stage only after the whole backward pass. Here gradients are sent in pieces, in about the order
in which they are computed, as torch's DistributedDataParallel does it:

- Parameters are put into buckets from the last to the first. A bucket whose gradients are all there is sent, by an
  asynchronous all-reduce, once those before it are: ranks send in the same order, whatever each has computed first.
- `finish` sends what is left, waits, and hands every parameter its part of a bucket as its gradient. On an accelerator
  the host does not wait: the stream does.
- Until then a parameter keeps the gradient of this rank. One that is added to after its bucket has left, as reentrant
  checkpointing does it, has that bucket sent again at the end.
- A parameter that the loss does not reach counts as one with a gradient of zeros, as at the other stages and with one
  rank, so that weight decay does not depend on how many ranks there are.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from prelude.pretrain.distributed import world_size


class GradientMean:
    """Watches the parameters from now on; `is_wanted` says whether gradients are complete after this backward pass."""

    def __init__(self, parameters: list[nn.Parameter], bucket_size: int, is_wanted: Callable[[], bool]):
        self.parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self.is_wanted, self.buckets = is_wanted, []
        if world_size() == 1:
            return
        self.buckets = [_Bucket(members) for members in _in_buckets(self.parameters, bucket_size)]
        for bucket in self.buckets:
            for parameter in bucket.members:
                parameter.register_post_accumulate_grad_hook(self._arrived(bucket))

    def finish(self) -> None:
        """From here on every gradient is the mean over ranks. Collective."""
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        for bucket in self.buckets:
            if bucket.sent is None or bucket.is_outdated:
                bucket.send()
        for bucket in self.buckets:
            bucket.hand_out()

    def _arrived(self, bucket: "_Bucket") -> Callable[[Tensor], None]:
        def arrived(parameter: Tensor) -> None:
            if not self.is_wanted():
                return
            bucket.missing -= 1
            bucket.is_outdated = bucket.sent is not None
            for one in self.buckets:
                if one.sent is None and one.missing > 0:
                    break
                if one.sent is None:
                    one.send()

        return arrived


class _Bucket:
    def __init__(self, members: list[nn.Parameter]):
        self.members = members
        self._reset()

    def _reset(self) -> None:
        self.missing, self.sent, self.flat, self.is_outdated = len(self.members), None, None, False

    @torch.no_grad()
    def send(self) -> None:
        if self.sent is not None:
            self.sent.wait()
        self.flat = torch.cat([parameter.grad.flatten() for parameter in self.members]).div_(world_size())
        self.sent = dist.all_reduce(self.flat, async_op=True)

    @torch.no_grad()
    def hand_out(self) -> None:
        self.sent.wait()
        parts = self.flat.split([parameter.numel() for parameter in self.members])
        for parameter, part in zip(self.members, parts, strict=True):
            if parameter.grad.is_contiguous():
                parameter.grad = part.view_as(parameter)
            else:  # fused optimizers want weights and gradients laid out alike
                parameter.grad.copy_(part.view_as(parameter))
        self._reset()


def _in_buckets(parameters: list[nn.Parameter], size: int) -> list[list[nn.Parameter]]:
    """From the last to the first, `size` elements in each or a little more; of one type in each."""
    buckets: list[list[nn.Parameter]] = []
    room = 0
    for parameter in reversed(parameters):
        if room <= 0 or buckets[-1][0].dtype != parameter.dtype:
            buckets.append([])
            room = size
        buckets[-1].append(parameter)
        room -= parameter.numel()
    return buckets
