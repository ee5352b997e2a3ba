"""What makes a run fit that does not: what to write instead, what changes least first."""

from itertools import product

from prelude.data.counting import counted
from prelude.pretrain.devices import Figures
from prelude.pretrain.preview import Preview, mib
from prelude.pretrain.rank_memory import zero_stages

Way = tuple[int, bool]  # ZeRO stage, checkpointing


def misfit(found: Preview, figures: Figures) -> str:
    """That a run does not fit, and what would; "" where it does."""
    peak = found.rank_memory().peak
    if peak <= figures.memory:
        return ""
    return (
        f"This run does not fit: a rank takes {mib(peak)} at its peak, of {mib(figures.memory)} usable by "
        f"{figures.source}; {_remedies(found, figures)}."
    )


def _remedies(found: Preview, figures: Figures) -> str:
    configured = found.config.train.zero_stage, found.config.train.gradient_checkpointing
    keeping, largest = found.largest_micro_batches(figures, *configured)
    ways = [_accumulated(found, keeping)] if keeping else []
    others = _ways_beside(found, configured)
    as_it_is = [way for way in others if found.rank_memory(*way).peak <= figures.memory]
    with_less = [(way, size) for way in others if (size := found.largest_micro_batches(figures, *way)[0])]
    if as_it_is:
        ways.append(f"{_written(as_it_is[0], configured)} with the micro-batch as it is")
    elif with_less and not ways:
        way, size = with_less[0]
        ways.append(f"{_written(way, configured)} {_accumulated(found, size)}")
    if ways:
        return f"write {', or '.join(ways)}"
    return _whole(found, largest) if largest else "it needs a device with more memory, or a smaller encoder"


def _ways_beside(found: Preview, configured: Way) -> list[Way]:
    """That share or spare more than the run does as it is configured."""
    every = product(zero_stages(found.config, found.objective), found.costs)
    return [way for way in every if way != configured and way[0] >= configured[0] and way[1] >= configured[1]]


def _accumulated(found: Preview, micro_batch: int) -> str:
    batch, world = found.config.train.global_batch, found.world_size
    steps = counted(batch // (micro_batch * world), "micro-batch")
    on_each = " on each rank" if world > 1 else ""
    return f"train.micro_batch={micro_batch}, which fits, and of which {steps}{on_each} make the same batch of {batch}"


def _written(way: Way, configured: Way) -> str:
    words = [f"train.zero_stage={way[0]}"] if way[0] != configured[0] else []
    words += ["train.gradient_checkpointing=true"] if way[1] != configured[1] else []
    return " ".join(words)


def _whole(found: Preview, largest: int) -> str:
    """Of an objective that has to see its batch as a whole. largest: micro-batch that fits."""
    batch, world = found.config.train.global_batch, found.world_size
    ranks = next(n for n in range(world, batch + 1) if batch % n == 0 and batch // n <= largest)
    return (
        f"start it on {counted(ranks, 'rank')}, or write train.global_batch={largest * world}, which is another run; "
        "micro-batches of this objective cannot be accumulated"
    )
