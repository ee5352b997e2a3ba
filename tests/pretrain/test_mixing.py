"""Mixup and CutMix against loops over single images, timm's boxes and scipy's Beta distribution."""

import numpy as np
import pytest
import torch
from scipy import stats
from timm.data import mixup as timms

from prelude.pretrain import collectives
from prelude.pretrain.draws import uniform
from prelude.pretrain.mixing import MIX_STREAM, BetaQuantile, Mixing, cut_boxes, kept_cells

B, H, W, C = 8, 20, 28, 5


def batch():
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(B, 3, H, W, generator=generator)
    targets = torch.nn.functional.one_hot(torch.arange(B) % C, C).float()
    return images, targets, torch.arange(100, 100 + B) * 7919


def loop(images, targets, seeds, mixup, cutmix):
    """One sample after the other, with the same four draws of each."""
    mixed, mixed_targets = images.clone(), targets.clone()
    for i in range(len(images)):
        j = i + 1 if i % 2 == 0 else i - 1
        which, share, row, column = uniform(seeds[i : i + 1], 4, MIX_STREAM)[0].double().tolist()
        cut = which < 0.5 if mixup and cutmix else bool(cutmix)
        lam = stats.beta.ppf(share, *[cutmix if cut else mixup] * 2)
        if cut:
            extents = [int(length * np.sqrt(1 - lam)) for length in (H, W)]
            begins = [int(c * length) - e // 2 for c, length, e in zip((row, column), (H, W), extents, strict=True)]
            top, left = (max(begin, 0) for begin in begins)
            bottom, right = (max(begin + e, 0) for begin, e in zip(begins, extents, strict=True))
            mixed[i, :, top:bottom, left:right] = images[j, :, top:bottom, left:right]
            changed = torch.zeros(H, W)
            changed[top:bottom, left:right] = 1
            lam = 1 - changed.mean().item()
        else:
            mixed[i] = lam * images[i] + (1 - lam) * images[j]
        mixed_targets[i] = lam * targets[i] + (1 - lam) * targets[j]
    return mixed, mixed_targets


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 1.0), (0.8, 0.0), (0.0, 1.0), (0.1, 1.0)])
def test_a_batch_is_mixed_as_its_samples_one_by_one(mixup, cutmix):
    images, targets, seeds = batch()
    ours, expected = Mixing(mixup, cutmix).mixed(images, targets, seeds), loop(images, targets, seeds, mixup, cutmix)
    torch.testing.assert_close(ours.images, expected[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.mixed_targets(), expected[1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.mixed_targets().sum(1), torch.ones(B))


def test_outside_of_a_box_and_inside_of_it_no_bit_changes():
    images, targets, seeds = batch()
    mixed = Mixing(0.0, 1.0).mixed(images, targets, seeds).images
    partner = images.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
    assert ((mixed == images) | (mixed == partner)).all()


def test_a_pair_is_mixed_alike_wherever_in_a_batch_it_lies():
    images, targets, seeds = batch()
    mixing = Mixing(0.8, 1.0)
    whole = mixing.mixed(images, targets, seeds)
    part = mixing.mixed(images[4:6], targets[4:6], seeds[4:6])
    assert torch.equal(part.images, whole.images[4:6])


@pytest.mark.parametrize("alpha", [0.1, 0.2, 0.8, 1.0, 2.0])
def test_quantiles_are_those_of_the_beta_distribution(alpha):
    share = torch.linspace(0, 1, 2001)[:-1]
    expected = stats.beta.ppf(share.double().numpy(), alpha, alpha)
    assert np.abs(BetaQuantile(alpha)(share).numpy() - expected).max() < 2e-4


def test_boxes_are_timms_for_the_same_share_and_centre(monkeypatch):
    for share, row, column in [(0.3, 0.12, 0.9), (0.74, 0.52, 0.52), (0.0, 0.0, 0.99), (0.96, 0.33, 0.37)]:
        centres = iter([int(row * H), int(column * W)])
        monkeypatch.setattr(timms.np.random, "randint", lambda *args, size=None, c=centres: next(c))
        top, bottom, left, right = timms.rand_bbox((H, W), share)
        expected = torch.zeros(H, W, dtype=torch.bool)
        expected[top:bottom, left:right] = True
        ours = cut_boxes(*(torch.tensor([value]) for value in (share, row, column)), H, W)[0]
        assert torch.equal(ours, expected)


def test_each_method_is_chosen_half_of_the_time():
    seeds = torch.arange(4000)
    cuts = Mixing(0.8, 1.0).cuts(uniform(seeds, 4, MIX_STREAM)[:, 0])
    assert cuts.float().mean().item() == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_partners_are_neighbours_in_the_global_batch_at_any_number_of_ranks(world, monkeypatch):
    """Every rank in turn, over an exchange that keeps all_to_all's promise: part q of rank r's goes to rank q."""
    rows = torch.arange(12 * world).view(-1, world)  # slot j of rank r is place j * world + r
    expected = torch.arange(12 * world).view(-1, 2).flip(1).reshape(-1, world)
    posted: dict[tuple[int, int], torch.Tensor] = {}
    monkeypatch.setattr(collectives, "world_size", lambda: world)

    def run(rank: int) -> torch.Tensor:
        def exchange(received, sent, received_counts, sent_counts):
            for peer, part in enumerate(sent.split(sent_counts)):
                posted[rank, peer] = part
            parts = [posted.get((peer, rank), torch.zeros(n)) for peer, n in enumerate(received_counts)]
            received.copy_(torch.cat(parts))

        monkeypatch.setattr(collectives.dist, "get_rank", lambda: rank)
        monkeypatch.setattr(collectives.dist, "all_to_all_single", exchange)
        return collectives.partners(rows[:, rank])

    for rank in range(world):
        run(rank)  # posts
    for rank in range(world):
        assert torch.equal(run(rank), expected[:, rank])


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 1.0])
def test_cells_of_a_grid_stay_in_the_number_that_the_share_asks_for(share):
    seeds = torch.arange(64) * 7919
    stays = kept_cells(torch.full((64,), share), seeds, 3, 4)
    assert stays.sum((1, 2)).tolist() == [int(np.ceil(np.float32(share) * 12))] * 64
    assert torch.equal(stays[7:9], kept_cells(torch.full((2,), share), seeds[7:9], 3, 4))
    if 0 < share < 1:  # any cell, in other images
        assert 0 < stays.float().mean(0).min() and stays.float().mean(0).max() < 1


def test_images_are_mixed_by_whole_cells_and_targets_by_their_number():
    images, targets, seeds = batch()
    mixed = Mixing(0.0, 1.0, cell=4).mixed(images, targets, seeds)
    partner = images.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
    for i in range(B):
        own = 0
        for row in range(0, H, 4):
            for column in range(0, W, 4):
                place = i, slice(None), slice(row, row + 4), slice(column, column + 4)
                is_own = torch.equal(mixed.images[place], images[place])
                assert is_own or torch.equal(mixed.images[place], partner[place])
                own += is_own
        assert mixed.share[i].item() == pytest.approx(own / 35)
    assert len(set(mixed.share.tolist())) > 4


def test_how_often_pixels_are_pasted_is_what_cutmix_share_says():
    seeds = torch.arange(4000) * 7919
    images, targets = torch.zeros(4000, 1, 2, 2), torch.ones(4000, 1)
    for share in (0.0, 0.2, 0.8):
        own = Mixing(0.8, 1.0, share).mixed(images, targets, seeds).own
        assert ((own == 0) | (own == 1)).all((1, 2)).float().mean().item() == pytest.approx(share, abs=0.03)
