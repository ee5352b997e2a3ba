"""What a run would be, without running it: size, cost, length and memory, for `--dry-run`."""

from dataclasses import dataclass, replace

from prelude.data.counting import counted
from prelude.pretrain import deepspeed_config
from prelude.pretrain.config import Config
from prelude.pretrain.devices import USUAL_MFU, Figures
from prelude.pretrain.objective import Objective
from prelude.pretrain.rank_memory import Held, RankMemory, held_by, zero_stages
from prelude.pretrain.schedules import beginning
from prelude.pretrain.step_cost import StepCost, step_cost

_MIB = 2**20


@dataclass(frozen=True)
class Preview:
    """A run at a number of ranks, whose steps were watched on the CPU."""

    config: Config
    objective: Objective
    num_samples: int  # an epoch
    world_size: int
    precision: str
    costs: dict[bool, StepCost]  # without and with activation checkpointing, where the encoder offers it

    @property
    def batching(self) -> tuple[int, int]:
        """(micro-batch, accumulation)."""
        return self.config.batching(self.world_size)

    @property
    def cost(self) -> StepCost:
        return self.costs[self.config.train.gradient_checkpointing]

    @property
    def held(self) -> Held:
        """What does not depend on the images."""
        micro_batch, accumulation = self.batching
        numel = sum(p.numel() for p in self.objective.parameters())
        built = deepspeed_config.build(
            self.config, micro_batch=micro_batch, accumulation=accumulation, precision=self.precision, numel=numel
        )
        zero = built["zero_optimization"]
        num_buckets = 2 if zero.get("overlap_comm") and self.world_size > 1 else 1
        return held_by(self.config, self.objective, accumulation, 4 * num_buckets * zero["reduce_bucket_size"])

    def rank_memory(self, stage: int | None = None, checkpointing: bool | None = None) -> RankMemory:
        """At this stage and with or without checkpointing; as configured where that is not said."""
        cost = self.cost if checkpointing is None else self.costs[checkpointing]
        stage = self.config.train.zero_stage if stage is None else stage
        return self.held.rank_memory(cost, self.batching[0], stage, self.world_size)

    def rows(self) -> list[tuple[str, str]]:
        """(what, how much), one for each line."""
        config, micro_batch = self.config, self.batching[0]
        trained = sum(p.numel() for p in self.objective.parameters() if p.requires_grad)
        encoder = sum(p.numel() for p in self.objective.encoder.parameters())
        flops = self.cost.flops.largest(micro_batch) / micro_batch
        steps = beginning(config, self.num_samples)
        return [
            ("parameters", f"{_count(trained)} trained, {_count(encoder)} of them in the encoder"),
            (f"cost of {self._a_sample}", f"{_count(flops)}FLOPs forward and backward"),
            ("batch", self._batch_in_words()),
            ("length", f"{counted(f'{steps.steps_per_epoch:.1f}', 'step')} an epoch, {steps.num_steps} in all"),
            ("peak learning rate", f"{config.peak_lr:.3g}"),
            ("memory a rank", self._memory_in_words()),
        ]

    def _batch_in_words(self) -> str:
        micro_batch, accumulation = self.batching
        ranks, images = counted(self.world_size, "rank"), counted(micro_batch, "image")
        return f"{self.config.train.global_batch} = {ranks} x {images} x {accumulation}"

    @property
    def _a_sample(self) -> str:
        return "a sample, on average" if self.objective.takes_volumes else "an image"

    def _memory_in_words(self) -> str:
        memory, micro_batch = self.rank_memory(), self.batching[0]
        parts = ("weights", "optimizer", "frozen", "gradients", "activations")
        named = {"frozen": "frozen weights and buffers"}
        listed = ", ".join(f"{mib(getattr(memory, part))} {named.get(part, part)}" for part in parts)
        checkpointed = " with checkpointing" if self.config.train.gradient_checkpointing else ""
        return (
            f"{mib(memory.peak)} at most, {counted(micro_batch, 'image')} in {self.precision}{checkpointed} at ZeRO "
            f"stage {self.config.train.zero_stage}: {listed}"
        )

    def alternatives(self, figures: Figures) -> list[tuple[str, ...]]:
        """One row for each ZeRO stage that this run could be given, without and with checkpointing: (stage,
        checkpointing, weights, optimizer, activations, peak, largest micro-batch that keeps the global batch, and that
        of any size in brackets)."""
        rows = []
        for stage in zero_stages(self.config, self.objective):
            for checkpointing in self.costs:
                memory = self.rank_memory(stage, checkpointing)
                keeping, largest = self.largest_micro_batches(figures, stage, checkpointing)
                sizes = (memory.weights + memory.frozen, memory.optimizer, memory.activations, memory.peak)
                fits = f"{keeping or 'none'} ({largest})" if largest else "none"
                rows.append((str(stage), "yes" if checkpointing else "no", *map(mib, sizes), fits))
        return rows

    def largest_micro_batches(self, figures: Figures, stage: int, checkpointing: bool) -> tuple[int, int]:
        """That fit: the one that makes the global batch in whole steps of accumulation, as far as the objective can
        accumulate, and the one of any size. 0 where none does."""
        cost, share = self.costs[checkpointing], self.config.train.global_batch // self.world_size
        sizes = range(share, 0, -1) if self.objective.accumulates else [share]

        def fits(size: int) -> bool:
            held = replace(self.held, accumulates=size < share)
            return held.rank_memory(cost, size, stage, self.world_size).peak <= figures.memory

        keeping = next((size for size in sizes if share % size == 0 and fits(size)), 0)
        return keeping, max(keeping, self.held.largest_micro_batch(cost, figures.memory, stage, self.world_size))

    def expected_time(self, figures: Figures) -> str:
        """From a device's data sheet alone."""
        micro_batch, _ = self.batching
        flops = self.cost.flops.largest(micro_batch) / micro_batch  # with what checkpointing computes again
        low, high = USUAL_MFU
        per_epoch = [self.num_samples * flops / (share * figures.peak * self.world_size) for share in (high, low)]
        in_all = [seconds * self.config.train.epochs for seconds in per_epoch]
        return (
            f"{duration(*per_epoch)} an epoch, {duration(*in_all)} in all, where {high:.0%} to {low:.0%} of "
            f"{figures.source} are reached on each of {self.world_size}: an estimate, not measured"
        )


def preview(config: Config, objective: Objective, *, num_samples: int, world_size: int, precision: str) -> Preview:
    """Runs forward and backward of a few blank images on the CPU."""
    ways = (False, True) if _can_checkpoint(objective) else (False,)
    share = config.data.volumes.share if config.data.volumes else 0.0
    costs = {checkpointing: step_cost(objective, precision, checkpointing, share) for checkpointing in ways}
    return Preview(config, objective, num_samples, world_size, precision, costs)


def _can_checkpoint(objective: Objective) -> bool:
    encoder = objective.encoder
    if not hasattr(encoder, "set_grad_checkpointing"):
        return False
    try:
        encoder.set_grad_checkpointing(True)
    except AssertionError:  # how timm's encoders say that they cannot
        return False
    encoder.set_grad_checkpointing(False)
    return True


def duration(*seconds: float) -> str:
    """One time, or two as a range, in the unit that suits the last: 90 s, 1.5 to 2.4 h, 12 days."""
    limits = ((172800, "days"), (7200, "h"), (120, "min"), (0, "s"))
    unit = next(unit for least, unit in limits if seconds[-1] >= least)
    scale = {"days": 86400, "h": 3600, "min": 60, "s": 1}[unit]
    return f"{' to '.join(f'{value / scale:.3g}' for value in seconds)} {unit}"


def mib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 10 * 2**30 else f"{size / _MIB:.0f} MiB"


def _count(number: float) -> str:
    """1234567 as `1.23 M`."""
    for factor, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= factor:
            return f"{number / factor:.2f} {unit}"
    return f"{number:.0f} "
