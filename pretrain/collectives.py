"""Sums over ranks that gradients pass through.

Every rank computes the loss of the global batch, or its share of it, and the engine averages gradients over ranks.
The gradient of `all_reduce` is therefore a sum over ranks as well: what reaches a parameter is the gradient of the
sum of all ranks' losses, and the average turns it into that of one process with the joined batch.
"""

from functools import cache

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from prelude.pretrain.distributed import rank, total, world_size
from prelude.pretrain.transfers import to_device


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor: Tensor) -> Tensor:
        return sum_over_ranks(tensor)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return sum_over_ranks(grad)


def all_reduce(tensor: Tensor) -> Tensor:
    """The sum of `tensor` over ranks, on every rank, with its gradient."""
    return tensor if world_size() == 1 else _AllReduce.apply(tensor)


@torch.no_grad()
def sum_over_ranks(tensor: Tensor) -> Tensor:
    """The same without gradient, as a new tensor."""
    total = tensor.clone(memory_format=torch.contiguous_format)
    if world_size() > 1:
        dist.all_reduce(total)
    return total


@torch.no_grad()
def gather_rows(rows: Tensor, counts: list[int]) -> Tensor:
    """Every rank's rows, in the order of ranks; ranks with fewer than the most are filled up with rows of zeros.

    rows: (n, ...), n = counts[this rank]. Returns (W * max(counts), ...), without gradient.
    """
    most = max(counts)
    padded = rows.new_zeros(most, *rows.shape[1:])
    padded[: len(rows)] = rows
    if world_size() == 1:
        return padded
    gathered = rows.new_empty(world_size() * most, *rows.shape[1:])
    dist.all_gather_into_tensor(gathered, padded)
    return gathered


def row_counts(count: int) -> list[int]:
    """Each rank's number of samples, on the host of every rank.

    Exchanged rather than assumed: dividing by a nominal batch is wrong for every batch that is not full.
    """
    own = [0] * world_size()
    own[rank()] = count
    return [int(number) for number in total(*own)]


@cache
def _by_partner(count: int, world: int, own: int, device: torch.device) -> tuple[Tensor, list[int]]:
    """The order in which a rank's samples are sent to their partners' ranks, and how many to each."""
    place = np.arange(count) * world + own  # in the global micro-batch
    peer = (place ^ 1) % world
    # By peer, and for each in the order of pairs: what a peer sends back comes in this same order.
    return to_device(peer.argsort(kind="stable"), device), np.bincount(peer, minlength=world).tolist()


@torch.no_grad()
def partners(rows: Tensor) -> Tensor:
    """Each sample's partner's row, without gradient. rows: (B, ...), the same B on every rank.

    The samples of the global micro-batch are paired in their order, (0, 1), (2, 3), ...; ranks take turns in it (see
    data/source.py). So who is paired with whom depends neither on the number of ranks nor on accumulation, as long
    as B x ranks is even, which the caller has checked.
    """
    world = world_size()
    if world == 1:
        return rows.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
    order, counts = _by_partner(len(rows), world, dist.get_rank(), rows.device)
    sent = rows[order].contiguous()
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, counts, counts)
    result = torch.empty_like(received)
    result[order] = received
    return result
