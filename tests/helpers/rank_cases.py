"""Run by tests of everything that computes across ranks: the same few computations in worlds of several sizes.

`python rank_cases.py OUT` writes OUT/WORLD-CASE-RANK.pt for every case, world and rank. Float64, so that only the
order of sums is left to differ. Worlds are forked processes that talk over gloo.
"""

import multiprocessing
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from timm.layers import BatchNormAct2d
from torch import nn
from torch.utils.checkpoint import checkpoint

from prelude.objectives import cross_correlation
from prelude.objectives.cross_correlation import barlow_loss
from prelude.objectives.embedding_dynamics import kicks
from prelude.objectives.lejepa import LeJEPA
from prelude.objectives.msbreg import MSBReg
from prelude.objectives.options import LeJEPAOptions, MSBRegOptions, VICRegOptions
from prelude.objectives.projector import projector
from prelude.objectives.vicreg import VICReg
from prelude.pretrain.batch_norm import normalise_columns, synchronise
from prelude.pretrain.collectives import row_counts
from prelude.pretrain.gradient_mean import GradientMean
from prelude.pretrain.schedules import Progress

WORLDS = {1: [8], 2: [5, 3], 4: [2, 2, 3, 1]}  # how the 8 samples are shared
NUM = 8


class Norms(nn.Module):
    """Every kind of batch norm, with convolutions between them, and one that keeps a plain average."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm_act = BatchNormAct2d(4, act_layer=nn.SiLU)
        self.norm_2d = nn.BatchNorm2d(4, momentum=None)
        self.norm_1d = nn.BatchNorm1d(4 * 5 * 5)
        self.norm_sequence = nn.BatchNorm1d(4, affine=False)
        self.norm_3d = nn.BatchNorm3d(4, momentum=0.3)

    def forward(self, images):
        x = self.norm_act(self.conv(images)).contiguous(memory_format=torch.channels_last)  # (n, 4, 5, 5)
        x = self.norm_2d(x)
        x = self.norm_3d(x[:, :, None])[:, :, 0]
        x = self.norm_sequence(x.flatten(2)) + 3
        return self.norm_1d(x.flatten(1)).sin()


def images() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return 5 + torch.randn(NUM, 3, 5, 5, generator=generator, dtype=torch.float64)


def norms_of(rows: slice) -> dict:
    """A sum of losses, two steps deep, so that running statistics move twice."""
    torch.manual_seed(0)
    model = Norms().double()
    synchronise(model)
    pixels = images()[rows].requires_grad_()
    target = torch.linspace(0, 1, NUM, dtype=torch.float64)[rows, None]
    for scale in (1.0, 2.0):
        out = model(pixels * scale)
        (out * target).sum().backward()
    return results(model, out=out, input_grad=pixels.grad)


def twins_of(rows: slice, samples_below: float) -> dict:
    cross_correlation.SAMPLES_BELOW, cross_correlation.BLOCK_ELEMENTS = samples_below, 40
    torch.manual_seed(0)
    head = projector(3 * 5 * 5, [12, 10]).double()
    synchronise(head)
    pixels = images()[rows].flatten(1)
    first, second = head(pixels), head(pixels.cos() * 2 + pixels)
    both = normalise_columns(torch.cat([first, second], dim=1))
    terms = barlow_loss(*both.chunk(2, dim=1), 0.05, row_counts(len(pixels)))
    terms.total.backward()
    return results(head, **{name: getattr(terms, name) for name in terms.__dataclass_fields__})


class Flat(nn.Flatten):
    """An encoder without weights, whose features are the pixels."""

    head_hidden_size = 3 * 5 * 5


def vicreg_of(rows: slice, samples_below: float) -> dict:
    cross_correlation.SAMPLES_BELOW, cross_correlation.BLOCK_ELEMENTS = samples_below, 40
    objective, pixels = objective_of(VICReg, VICRegOptions(projector=[12, 10])), images()[rows].flatten(1)
    first, second = objective.projector(pixels), objective.projector(pixels.cos() * 2 + pixels)
    return of_loss(objective, objective.loss(first, second, row_counts(len(pixels))))


def lejepa_of(rows: slice) -> dict:
    objective = objective_of(LeJEPA, LeJEPAOptions(projector=[12, 10], num_local=1, num_directions=6))
    pixels = images()[rows].flatten(1)
    views = torch.cat([pixels, pixels.cos() * 2 + pixels, pixels.sin() + pixels])
    embeddings = objective.projector(views).unflatten(0, (3, -1))
    along = objective.directions(embeddings, Progress(7, 9, 1.0))
    return of_loss(objective, objective.loss(embeddings, along, row_counts(len(pixels)))) | {"along": along}


def msbreg_of(rows: slice, samples_below: float) -> dict:
    """Directions are functions of the samples' seeds, whatever rank they are on."""
    cross_correlation.SAMPLES_BELOW, cross_correlation.BLOCK_ELEMENTS = samples_below, 40
    objective = objective_of(MSBReg, MSBRegOptions(projector=[12, 10], predictor=[12], num_views=3))
    pixels = images()[rows].flatten(1)
    views = [pixels, pixels.cos() * 2 + pixels, pixels.sin() + pixels]
    predicted = torch.stack([objective.predictor(objective.projector(view)) for view in views])
    target = torch.stack([objective.teacher_projector(view) for view in views])
    along = kicks(torch.arange(NUM)[rows] * 7919, 10)
    return of_loss(objective, objective.loss(predicted, target, along, row_counts(len(pixels))))


def objective_of(cls, options):
    torch.manual_seed(0)
    return cls(Flat(), options, image_size=(5, 5), mean=(0.5,) * 3, std=(0.5,) * 3).double()


def of_loss(objective, loss) -> dict:
    loss.total.backward()
    of_this_rank = ("embedding_std", "dead_dimensions", "embedding_rank_share")
    parts = {name: value for name, value in loss.parts.items() if name not in of_this_rank}
    return results(objective, total=loss.total, **parts)


def results(model: nn.Module, **more: torch.Tensor) -> dict:
    grads = {f"grad {name}": p.grad for name, p in model.named_parameters() if p.requires_grad}
    return grads | model.state_dict() | {name: value.detach() for name, value in more.items()}


class Awkward(nn.Module):
    """Gradients that come late, twice, in another layout or not at all."""

    def __init__(self):
        super().__init__()
        self.unused = nn.Parameter(torch.ones(3))
        self.conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        self.shared = nn.Linear(36, 36)
        self.head = nn.Linear(36, 2)

    def forward(self, images):
        x = self.conv(images).flatten(1)
        for _ in range(2):  # reentrant: each adds to the gradients of `shared` in a backward pass of its own
            x = checkpoint(self.shared, x, use_reentrant=True).tanh()
        return self.head(x)


def mean_of_gradients(rows: slice) -> dict:
    """Two micro-batches a step, two steps. A rank's loss is W times the sum over its rows, their mean that of all."""
    torch.manual_seed(0)
    model, world = Awkward().double(), dist.get_world_size()
    boundary, found = [False], {}
    mean = GradientMean(list(model.parameters()), 40, lambda: boundary[0])
    for step in range(2):
        for boundary[0] in (False, True):
            (world * model(images()[rows] * (1 + step + boundary[0])).sin().sum()).backward()
        under_way = [bucket.sent is not None for bucket in mean.buckets]
        assert world == 1 or (len(under_way) > 3 and under_way == [True] * (len(under_way) - 1) + [False])
        assert not any(bucket.is_outdated for bucket in mean.buckets) == (world == 1)
        mean.finish()
        assert model.conv.weight.grad.is_contiguous(memory_format=torch.channels_last)
        found |= {f"mean {step} {name}": p.grad.clone() for name, p in model.named_parameters()}
        model.zero_grad()
    return found


CASES = {
    "mean": mean_of_gradients,
    "norms": norms_of,
    "twins by columns": lambda rows: twins_of(rows, samples_below=0.0),
    "twins by samples": lambda rows: twins_of(rows, samples_below=1e9),
    "vicreg by columns": lambda rows: vicreg_of(rows, samples_below=0.0),
    "vicreg by samples": lambda rows: vicreg_of(rows, samples_below=1e9),
    "lejepa": lejepa_of,
    "msbreg by columns": lambda rows: msbreg_of(rows, samples_below=0.0),
    "msbreg by samples": lambda rows: msbreg_of(rows, samples_below=1e9),
}


def in_world(rank: int, world: int, out: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{out}/store-{world}", rank=rank, world_size=world)
    start = sum(WORLDS[world][:rank])
    for name, case in CASES.items():
        torch.save(case(slice(start, start + WORLDS[world][rank])), out / f"{world}-{name}-{rank}.pt")
    dist.destroy_process_group()


def main() -> None:
    out = Path(sys.argv[1])
    fork = multiprocessing.get_context("fork")
    for world in WORLDS:
        ranks = [fork.Process(target=in_world, args=(rank, world, out)) for rank in range(world)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(timeout=60)
            assert process.exitcode == 0, f"a rank of {world} failed"


if __name__ == "__main__":
    main()
