"""Multi-block masks: what every draw must satisfy, and the statistics that the method is defined by."""

import pytest
import torch
from scipy import stats

from prelude.data.errors import UserError
from prelude.objectives.blocks import BlockSizes, MultiBlock, block_size, context_length
from prelude.objectives.ijepa import IJEPA, IJEPAOptions
from prelude.objectives.official_blocks import OfficialMultiBlock
from prelude.pretrain.config import EncoderConfig

GRIDS = [(14, 14), (16, 16), (8, 8), (6, 6), (7, 9), (4, 16), (28, 28)]
SEEDS = torch.arange(64) * 7919


def masks(sampler, num_steps, num_samples=64):
    """Independent samples of `num_steps` steps."""
    for step in range(num_steps):
        yield sampler.draw(torch.arange(num_samples) + step * 10_007, step)


def profile(chosen, grid, samples) -> torch.Tensor:
    """How often each patch was chosen, as a share of `samples`. chosen: list of index tensors."""
    counts = sum(torch.bincount(ids.flatten(), minlength=grid[0] * grid[1]) for ids in chosen)
    return counts.view(grid) / samples


@pytest.mark.parametrize("grid", GRIDS)
def test_context_and_targets_are_disjoint_sets_inside_the_grid(grid):
    for drawn in masks(MultiBlock(grid), 12):
        for ids in (drawn.context, drawn.targets.flatten(0, 1)):
            assert ids.min() >= 0 and ids.max() < grid[0] * grid[1]
            assert (ids[:, 1:] > ids[:, :-1]).all()
        context = torch.zeros(64, grid[0] * grid[1]).scatter_(1, drawn.context, 1.0)
        assert context.gather(1, drawn.targets.flatten(1)).sum() == 0


@pytest.mark.parametrize("grid", GRIDS)
def test_every_target_is_a_rectangle_of_the_steps_size(grid):
    sampler = MultiBlock(grid)
    for step, drawn in enumerate(masks(sampler, 6)):
        height, width = sampler.sizes(step).target
        assert drawn.targets.shape == (64, 4, height * width)
        rows, columns = drawn.targets // grid[1], drawn.targets % grid[1]
        assert (rows.amax(-1) - rows.amin(-1) == height - 1).all()
        assert (columns.amax(-1) - columns.amin(-1) == width - 1).all()


def test_a_samples_masks_depend_on_its_seed_and_the_step_alone():
    sampler = MultiBlock((14, 14), salt=5)
    whole = sampler.draw(SEEDS, 3)
    for part in (SEEDS[::2], SEEDS[1::2], SEEDS[:5], SEEDS[63:]):
        rows = torch.isin(SEEDS, part)
        drawn = sampler.draw(part, 3)
        assert torch.equal(drawn.context, whole.context[rows])
        assert torch.equal(drawn.targets, whole.targets[rows])
    assert sampler.draw(SEEDS, 4).targets.shape != whole.targets.shape or not torch.equal(
        sampler.draw(SEEDS + 1, 3).targets, whole.targets
    )


def test_sizes_belong_to_the_step_and_the_run():
    steps = range(200)
    run = [MultiBlock((14, 14), salt=1).sizes(step) for step in steps]
    assert run == [MultiBlock((14, 14), salt=1).sizes(step) for step in steps]
    assert run != [MultiBlock((14, 14), salt=2).sizes(step) for step in steps]


def test_scale_and_aspect_are_drawn_apart():
    sampler = MultiBlock((28, 28))
    heights, widths = zip(*(sampler.sizes(step).target for step in range(400)), strict=True)
    area = torch.tensor(heights) * torch.tensor(widths)
    aspect = torch.tensor(heights) / torch.tensor(widths)
    correlation = torch.corrcoef(torch.stack([area.float(), aspect]))[0, 1]
    assert abs(correlation) < 0.15
    assert {size[0] for size in zip(heights, widths, strict=True)} >= set(range(10, 15))
    official = [OfficialMultiBlock((28, 28)).sizes(step).target for step in range(400)]
    assert len(set(official)) == 9 < len(set(zip(heights, widths, strict=True)))


def test_context_length_and_row_profile_are_those_of_the_corrected_sampler():
    """Against a simulation with 14 x 14 patches: 61 context patches cut to the shortest of 64 images, 57 of 256."""
    sampler = MultiBlock((14, 14))
    drawn = list(masks(sampler, 400, 32))
    lengths = torch.tensor([d.context.shape[1] for d in drawn]).float()
    assert 57 < lengths.mean() < 62
    rows = profile([d.context for d in drawn], (14, 14), 400 * 32).mean(1)
    expected = torch.tensor([0.38, 0.42, 0.35, 0.29, 0.24, 0.20, 0.19])
    torch.testing.assert_close(rows, torch.cat([expected, expected.flip(0)]), rtol=0, atol=0.03)
    sampler = MultiBlock((16, 16))
    assert sum(d.context.shape[1] for d in masks(sampler, 300, 1)) / 300 == pytest.approx(78, abs=4)


def test_before_it_is_cut_the_context_has_the_expected_size():
    from prelude.objectives.blocks import _place

    for grid, expected in [((14, 14), 91), ((16, 16), 120)]:
        sampler = MultiBlock(grid)
        free = [
            _place(torch.arange(32) + 999 * step, grid, 4, sampler.sizes(step), 1).num_free.float().mean()
            for step in range(300)
        ]
        assert sum(free) / 300 == pytest.approx(expected, abs=3)


def test_every_patch_can_be_context_and_target_and_no_side_is_favoured():
    drawn = list(masks(MultiBlock((14, 14)), 250))
    samples = 250 * 64
    for chosen in ([d.context for d in drawn], [d.targets[:, 0] for d in drawn]):
        share = profile(chosen, (14, 14), samples)
        assert share.min() > 0.01
        counts = share * samples
        for mirrored in (counts.flip(0), counts.flip(1)):
            half = counts.flatten()[:98], mirrored.flatten()[:98]
            # Patches of a block come together, which widens a count's spread by up to the side of a block.
            statistic = ((half[0] - half[1]) ** 2 / (half[0] + half[1])).sum() / 8
            assert stats.chi2.sf(statistic.item(), 98) > 1e-4
        assert (share.mean(1) - share.mean(1).flip(0)).abs().max() < 0.012


def test_an_oblong_image_can_be_context_from_end_to_end():
    assert block_size((4, 16), 1.0, 4 / 16) == (4, 16)
    share = profile([d.context for d in masks(MultiBlock((4, 16)), 60)], (4, 16), 60 * 64)
    assert share.min() > 0.02


def test_where_targets_cover_too_much_the_context_is_filled_up_to_its_length():
    """No attempt leaves 60 patches free of targets that cover nearly everything."""
    from prelude.objectives.blocks import _random_subset

    in_context = torch.ones(2, 100, dtype=torch.bool)
    in_context[:, 90:] = False
    free = torch.zeros(2, 100, dtype=torch.bool)
    free[:, :20] = True
    chosen = _random_subset(torch.tensor([1, 2]), in_context, free, 60)
    assert chosen.shape == (2, 60) and chosen.max() < 90
    assert torch.equal(chosen[:, :20], torch.arange(20).expand(2, 20))
    assert not torch.equal(chosen[0], chosen[1])


def test_the_subset_of_the_context_is_uniform():
    """The released code keeps the lowest indices, so that the lower rows of an image are hardly ever context."""
    from prelude.objectives.blocks import _random_subset

    free = torch.ones(4000, 50, dtype=torch.bool)
    chosen = _random_subset(torch.arange(4000), free, free, 20)
    counts = torch.bincount(chosen.flatten(), minlength=50)
    assert stats.chisquare(counts.numpy()).pvalue > 1e-4


def test_the_length_leaves_one_draw_in_128_short():
    from prelude.objectives.blocks import _place

    sizes = BlockSizes((6, 6), (13, 13))
    length = context_length((14, 14), 4, sizes)
    free = _place(torch.arange(20_000) + 10**9, (14, 14), 4, sizes, 1).num_free
    assert (free < length).float().mean() == pytest.approx(1 / 128, abs=0.003)


# As the released code draws


def test_official_target_sizes_for_the_released_generator():
    """What torch's generator seeded 0 .. 11 draws first, as the released code turns it into a size."""
    shares = [torch.rand(1, generator=torch.Generator().manual_seed(seed)).item() for seed in range(12)]
    expected = {
        14: [(6, 6), (7, 5), (7, 5), (5, 6), (6, 5), (7, 5), (6, 5), (6, 5), (6, 5), (7, 5), (6, 5), (5, 6)],
        16: [(7, 6), (8, 6), (7, 6), (5, 7), (7, 6), (8, 6), (7, 6), (7, 6), (7, 6), (8, 6), (7, 6), (6, 7)],
    }
    for side, sizes in expected.items():
        assert [OfficialMultiBlock((side, side)).target_size(share) for share in shares] == sizes
    by_scale = {0.15: (5, 6), 0.16: (5, 6), 0.17: (6, 6), 0.18: (6, 5), 0.19: (7, 5), 0.20: (8, 5)}
    for scale, size in by_scale.items():
        assert OfficialMultiBlock((14, 14)).target_size((scale - 0.15) / 0.05) == size


@pytest.mark.parametrize(("batch", "expected"), [(16, 60.5), (64, 55.9), (128, 53.2)])
def test_official_context_shrinks_with_the_batch(batch, expected):
    sampler = OfficialMultiBlock((14, 14))
    drawn = list(masks(sampler, 100, batch))
    assert sum(d.context.shape[1] for d in drawn) / 100 == pytest.approx(expected, abs=3)
    assert sum(d.targets.shape[2] for d in drawn) / 100 == pytest.approx(32.5, abs=0.7)


def test_official_masks_never_use_the_last_row_and_column_and_favour_the_top():
    drawn = list(masks(OfficialMultiBlock((14, 14)), 25, 256))
    context = profile([d.context for d in drawn], (14, 14), 25 * 256)
    targets = profile([d.targets for d in drawn], (14, 14), 25 * 256 * 4)
    for share in (context, targets):
        assert share[13].sum() == 0 and share[:, 13].sum() == 0
    expected = [0.75, 0.61, 0.49, 0.39, 0.29, 0.22, 0.19, 0.19, 0.20, 0.19, 0.13, 0.05, 0.01, 0.0]
    torch.testing.assert_close(context.mean(1), torch.tensor(expected), rtol=0, atol=0.06)
    expected = [0.05, 0.10, 0.15, 0.19, 0.24, 0.28, 0.30, 0.28, 0.24, 0.19, 0.14, 0.09, 0.05, 0.0]
    torch.testing.assert_close(targets.mean(1), torch.tensor(expected), rtol=0, atol=0.02)


def test_official_context_block_is_always_the_same_square():
    for step in range(50):
        assert OfficialMultiBlock((14, 14)).sizes(step).context == (13, 13)
        assert OfficialMultiBlock((16, 16)).sizes(step).context == (15, 15)


# What cannot work is refused before anything is built


def config(side, patch):
    return EncoderConfig(name="vit_base_patch16_224", image_size=side, patch_size=patch, kwargs={"depth": 1})


@pytest.mark.parametrize("masks", ["paper", "official"])
def test_the_papers_grids_are_accepted(masks):
    IJEPA.check(IJEPAOptions(masks=masks), config(224, 16))


def test_grids_on_which_the_official_sampler_hangs_are_refused_with_a_scale_that_works():
    for side, problem in [(24, "6 x 6"), (28, "7 x 7"), (32, "8 x 8")]:
        IJEPA.check(IJEPAOptions(), config(side, 4))  # the corrected sampler works there
        with pytest.raises(UserError, match=f"{problem} patches .* never ends") as refused:
            IJEPA.check(IJEPAOptions(masks="official"), config(side, 4))
        scale = eval(str(refused.value).partition("write objective.target_scale=")[2].partition("], ")[0] + "]")
        IJEPA.check(IJEPAOptions(masks="official", target_scale=scale), config(side, 4))


def test_targets_that_leave_no_context_are_refused_with_a_scale_that_works():
    with pytest.raises(UserError, match="patches of context") as refused:
        IJEPA.check(IJEPAOptions(target_scale=(0.4, 0.6)), config(32, 4))
    scale = eval(str(refused.value).partition("write objective.target_scale=")[2].partition("], ")[0] + "]")
    IJEPA.check(IJEPAOptions(target_scale=scale), config(32, 4))
    with pytest.raises(UserError, match="no scale does better"):
        IJEPA.check(IJEPAOptions(), config(8, 4))


def test_targets_of_hardly_a_patch_are_refused():
    with pytest.raises(UserError, match="target blocks of 1 patches"):
        IJEPA.check(IJEPAOptions(target_scale=(0.02, 0.03)), config(32, 4))
