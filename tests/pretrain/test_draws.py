import numpy as np
import pytest
import torch
from scipy import stats

from prelude.pretrain.draws import random_bits, uniform

SEEDS = torch.tensor([0, 1, 2, -1, 2**62, -(2**63), 2**63 - 1, 1234567890123456789])
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here"))]

# Seeds that a run would have (hashes), and the hardest ones for a counter-based generator.
FAMILIES = {
    "consecutive": torch.arange(200),
    "multiples of a power of two": torch.arange(200) << 40,
    "hashes": torch.randint(-(2**63), 2**63 - 1, (200,), generator=torch.Generator().manual_seed(0)),
}


def splitmix(seed: int, index: int, stream: int) -> int:
    """The same definition on Python's unbounded integers."""
    mask, golden = 2**64 - 1, 0x9E3779B97F4A7C15

    def mix(x: int) -> int:
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & mask
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB & mask
        return x ^ (x >> 31)

    start = mix((seed + golden * (2 * stream + 1)) & mask)
    return mix((start + golden * (index + 1)) & mask) >> 1


@pytest.mark.parametrize("device", DEVICES)
def test_bits_are_splitmix_on_every_device(device):
    bits = random_bits(SEEDS.to(device), 5, stream=3)
    assert bits.dtype == torch.int64 and bits.device.type == device
    assert bits.tolist() == [[splitmix(seed, i, 3) for i in range(5)] for seed in SEEDS.tolist()]


def test_known_values_are_pinned():
    """A change here changes every mask and colour of a run that is resumed."""
    assert random_bits(torch.tensor([0, 42]), 2, stream=0).tolist() == [
        [6017775124710473527, 6467540162864785327],
        [3166309114763032834, 8815207628119023658],
    ]
    assert uniform(torch.tensor([7]), 3, stream=1).tolist() == [
        [0.6114022731781006, 0.9604158401489258, 0.27820056676864624]
    ]


def test_uniform_lies_in_the_unit_interval_on_the_grid_of_float32():
    numbers = uniform(torch.arange(2000), 500, stream=0)
    assert numbers.dtype == torch.float32 and numbers.shape == (2000, 500)
    assert numbers.min() >= 0 and numbers.max() < 1
    assert torch.equal(numbers * 2**24, (numbers * 2**24).round())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("stream", [0, 1, 17])
def test_draws_are_uniform(family, stream):
    numbers = uniform(FAMILIES[family], 100, stream).double().numpy()
    assert stats.kstest(numbers.ravel(), "uniform").pvalue > 1e-3
    assert stats.kstest(numbers[:, 0], "uniform").pvalue > 1e-3  # across seeds
    assert stats.kstest(numbers[0], "uniform").pvalue > 1e-3  # across indices
    counts = np.bincount((numbers.ravel() * 64).astype(int), minlength=64)
    assert stats.chisquare(counts).pvalue > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_every_bit_is_a_fair_coin(family):
    bits = random_bits(FAMILIES[family], 50, stream=0)
    ones = torch.stack([(bits >> k & 1).sum() for k in range(63)])
    assert stats.chisquare(torch.stack([ones, bits.numel() - ones]), axis=0).pvalue.min() > 1e-4
    assert (bits >= 0).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_neighbouring_draws_are_uncorrelated(family):
    numbers = uniform(FAMILIES[family], 100, stream=0).double().numpy()
    beside = {
        "seed": (numbers[1:], numbers[:-1]),
        "index": (numbers[:, 1:], numbers[:, :-1]),
        "stream": (numbers, uniform(FAMILIES[family], 100, stream=1).double().numpy()),
        "seed and index": (numbers[1:, :-1], numbers[:-1, 1:]),
    }
    for a, b in beside.values():
        assert stats.pearsonr(a.ravel(), b.ravel()).pvalue > 1e-4


def test_pairs_fill_the_square():
    """Chi-squared on a 16 x 16 grid of successive draws: what one number at a time cannot show."""
    numbers = uniform(torch.arange(20_000), 2, stream=5).double().numpy()
    counts, _, _ = np.histogram2d(numbers[:, 0], numbers[:, 1], bins=16, range=[[0, 1], [0, 1]])
    assert stats.chisquare(counts.ravel()).pvalue > 1e-3


def test_a_row_does_not_depend_on_its_batch():
    together = random_bits(SEEDS, 7, stream=2)
    for b, seed in enumerate(SEEDS):
        assert torch.equal(random_bits(seed[None], 7, stream=2)[0], together[b])
    order = torch.randperm(len(SEEDS), generator=torch.Generator().manual_seed(0))
    assert torch.equal(random_bits(SEEDS[order], 7, stream=2), together[order])


def test_a_draw_does_not_depend_on_how_many_follow():
    assert torch.equal(random_bits(SEEDS, 3, stream=2), random_bits(SEEDS, 9, stream=2)[:, :3])


def test_streams_seeds_and_indices_share_no_value():
    seeds = torch.arange(100)
    drawn = torch.stack([random_bits(seeds, 50, stream) for stream in range(20)])
    assert drawn.unique().numel() == drawn.numel()


def test_the_global_generator_is_neither_read_nor_moved():
    torch.manual_seed(0)
    state, first = torch.get_rng_state(), uniform(SEEDS, 3, stream=0)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert torch.equal(uniform(SEEDS, 3, stream=0), first)


def test_no_seeds_and_no_draws_give_empty_tensors():
    assert random_bits(SEEDS[:0], 3, stream=0).shape == (0, 3)
    assert uniform(SEEDS, 0, stream=0).shape == (len(SEEDS), 0)
