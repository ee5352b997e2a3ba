import random

import numpy as np
import pytest

from prelude.data.mixed_order import order_of
from prelude.data.order import Order, Shuffle, sample_seed, substitute
from prelude.data.shards import ShardIndex
from prelude.data.source import EndlessSource, rank_positions


def random_cases(number, seed=0):
    """Shard sizes with empty and single-sample shards, and streams, spans and windows larger and smaller than they."""
    rng = random.Random(seed)
    for _ in range(number):
        counts = [rng.choice([0, 1, rng.randint(2, 40)]) for _ in range(rng.randint(1, 9))]
        if sum(counts):
            yield counts, Shuffle(rng.randint(1, 12), rng.randint(1, 50), rng.randint(1, 60))


def test_every_sample_comes_exactly_once_in_every_epoch():
    for counts, shuffle in random_cases(150):
        order, size = Order(counts, 3, shuffle), sum(counts)
        for epoch in (0, 1, 7):
            ids = order.samples_at(np.arange(epoch * size, (epoch + 1) * size))
            assert sorted(ids.tolist()) == list(range(size)), (counts, shuffle)


def test_any_part_can_be_computed_by_itself():
    for counts, shuffle in random_cases(30, seed=1):
        size = sum(counts)
        whole = Order(counts, 5, shuffle).samples_at(np.arange(3 * size))
        positions = np.random.default_rng(0).permutation(3 * size)
        again = Order(counts, 5, shuffle)
        assert all(again.samples_at(part).tolist() == whole[part].tolist() for part in np.array_split(positions, 5))


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("micro_batch", [1, 3])
def test_ranks_together_make_the_same_sequence(world_size, micro_batch):
    start, steps = 11, 6
    parts = [
        rank_positions(start, nth, micro_batch, rank, world_size) for nth in range(steps) for rank in range(world_size)
    ]
    assert sorted(np.concatenate(parts).tolist()) == list(range(start, start + steps * micro_batch * world_size))
    one_step = np.concatenate(parts[:world_size])  # what all ranks hold at once is contiguous
    assert sorted(one_step.tolist()) == list(range(start, start + micro_batch * world_size))


@pytest.mark.parametrize("micro_batch", [1, 300, 1500])  # some look up several micro-batches at once, some one
def test_a_source_yields_what_its_positions_hold(micro_batch, write_shards):
    index, start = ShardIndex(write_shards([20, 30])), 7
    order = order_of(index, 3, Shuffle(2, 4, 8))
    for rank in range(3):
        source = EndlessSource(index, Shuffle(2, 4, 8), 3, start, micro_batch, rank, 3)
        for nth, step in zip(range(2100 // micro_batch), source, strict=False):
            positions = rank_positions(start, nth, micro_batch, rank, 3)
            assert step["__key__"] == f"{nth:09}" and np.array_equal(step["positions"], positions)
            assert np.array_equal(step["sample_ids"], order.samples_at(positions))


def test_epochs_and_seeds_have_orders_of_their_own():
    order = Order([50, 50], 0, Shuffle(2, 10, 20))
    first, second = order.samples_at(np.arange(100)), order.samples_at(np.arange(100, 200))
    other_seed = Order([50, 50], 1, Shuffle(2, 10, 20)).samples_at(np.arange(100))
    assert (first != second).mean() > 0.5 and (first != other_seed).mean() > 0.5


def test_the_order_of_today_is_the_order_of_every_version():
    """A checkpoint must be resumed in the order in which it was begun: these numbers may never change."""
    order = Order([5, 0, 7, 1], 42, Shuffle(streams=3, span=2, window=4))
    assert order.samples_at(np.arange(26)).tolist() == GOLDEN_IDS
    assert sample_seed(42, 10**9) == GOLDEN_SEED
    assert [substitute(42, 7, attempt, 1000) for attempt in (1, 2, 3)] == GOLDEN_SUBSTITUTES


def test_other_processes_have_the_same_order(run_python):
    code = (
        "from prelude.data.order import *; import numpy as np\n"
        "print(Order([30, 40], 9, Shuffle()).samples_at(np.arange(140)).tolist(), sample_seed(9, 5))"
    )
    here = f"{Order([30, 40], 9, Shuffle()).samples_at(np.arange(140)).tolist()} {sample_seed(9, 5)}\n"
    processes = [run_python(code, PYTHONHASHSEED=seed) for seed in ("1", "2")]
    assert [process.communicate()[0] for process in processes] == [here, here]


def test_a_batch_mixes_many_shards():
    """1000 shards, each of one class: a batch of 1024 is drawn from several hundred of them."""
    order = Order([1281] * 1000, 0, Shuffle())
    middle = 600_000
    shards = order.samples_at(np.arange(middle, middle + 1024)) // 1281
    assert len(np.unique(shards)) > 350


def test_spans_of_whole_shards_are_read_one_after_the_other():
    order = Order([100] * 64, 0, Shuffle(streams=4, span=100, window=100))
    shards = order.samples_at(np.arange(6400)).reshape(-1, 400) // 100
    assert all(len(np.unique(part)) == 4 for part in shards)


def test_seeds_and_substitutes_spread():
    seeds = {sample_seed(run, position) for run in (0, 1) for position in range(1000)}
    assert len(seeds) == 2000 and min(seeds) >= 0 and max(seeds) < 2**63
    assert max(seeds) > 2**62  # the upper bits are used
    drawn = [substitute(0, 3, attempt, 10) for attempt in range(1, 200)]
    assert set(drawn) == set(range(10))


GOLDEN_IDS = [8, 0, 6, 4, 3, 5, 7, 2, 11, 12, 10, 1, 9, 11, 3, 5, 10, 12, 0, 4, 2, 1, 9, 8, 6, 7]
GOLDEN_SEED = 2176686267598222202
GOLDEN_SUBSTITUTES = [981, 265, 363]
