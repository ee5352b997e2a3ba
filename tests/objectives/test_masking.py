import pytest
import torch
from scipy import stats

from prelude.objectives.masking import mask_noise, num_kept, random_mask

NUM_PATCHES, NUM_KEEP = 16, 4


def masks(seeds):
    return random_mask(mask_noise(torch.as_tensor(seeds), NUM_PATCHES), NUM_KEEP)


def test_exactly_the_same_number_of_patches_is_kept_in_every_image():
    mask = masks(range(100))
    assert mask.keep.shape == (100, NUM_KEEP) and mask.removed.shape == (100, NUM_PATCHES - NUM_KEEP)
    assert (mask.hidden.sum(1) == NUM_PATCHES - NUM_KEEP).all()


def test_kept_and_removed_are_a_permutation_that_restore_inverts():
    mask = masks(range(100))
    shuffled = torch.cat([mask.keep, mask.removed], dim=1)
    identity = torch.arange(NUM_PATCHES).expand(100, -1)
    assert torch.equal(shuffled.sort(1).values, identity)
    assert torch.equal(shuffled.gather(1, mask.restore), identity)
    assert not mask.hidden.gather(1, mask.keep).any() and mask.hidden.gather(1, mask.removed).all()


def test_the_patches_with_the_smallest_noise_are_kept_and_ties_keep_the_first():
    mask = random_mask(torch.tensor([[0.3, 0.1, 0.3, 0.2, 0.3]]), 3)
    assert mask.keep.tolist() == [[1, 3, 0]]
    assert mask.removed.tolist() == [[2, 4]]


def test_a_mask_depends_on_its_sample_alone():
    together = masks(range(50)).hidden
    alone = torch.cat([masks([seed]).hidden for seed in range(50)])
    reversed_ = masks(list(range(49, -1, -1))).hidden.flip(0)
    assert torch.equal(together, alone) and torch.equal(together, reversed_)


def test_masks_are_not_drawn_from_a_global_generator():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    one = masks(range(5)).keep
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert torch.equal(masks(range(5)).keep, one)


def test_every_patch_is_kept_equally_often():
    count = 40_000
    kept = count - masks(range(count)).hidden.sum(0)  # (L,)
    share = NUM_KEEP / NUM_PATCHES
    # Counts of a draw without replacement: covariance n p (1 - p) (I - 1/L) L / (L - 1).
    variance = count * share * (1 - share) * NUM_PATCHES / (NUM_PATCHES - 1)
    statistic = ((kept - count * share) ** 2).sum().item() / variance
    assert 1e-3 < stats.chi2.sf(statistic, NUM_PATCHES - 1) < 1 - 1e-3


def test_every_pair_of_patches_is_kept_together_equally_often():
    count = 40_000
    kept = (~masks(range(count)).hidden).double()
    together = (kept.T @ kept)[torch.triu_indices(NUM_PATCHES, NUM_PATCHES, 1).unbind()]
    share = NUM_KEEP * (NUM_KEEP - 1) / (NUM_PATCHES * (NUM_PATCHES - 1))
    z = (together / count - share) / (share * (1 - share) / count) ** 0.5
    assert z.abs().max() < 4.5  # of 120 pairs


def test_masks_of_neighbouring_samples_are_independent():
    hidden = masks(range(40_001)).hidden.double()
    centred = hidden - hidden.mean()
    correlation = (centred[1:] * centred[:-1]).mean() / centred.var()
    assert abs(correlation) < 4.5 / (40_000 * NUM_PATCHES) ** 0.5


@pytest.mark.parametrize(
    ("num_patches", "ratio", "kept"),
    [(196, 0.75, 49), (256, 0.75, 64), (100, 0.9, 10), (196, 0.9, 20), (1024, 0.8, 205), (16, 0.75, 4)],
)
def test_the_number_kept_is_rounded_not_truncated(num_patches, ratio, kept):
    assert num_kept(num_patches, ratio) == kept
