"""Regions against OpenCV and scipy, and against numbers computed with the official routine."""

import cv2
import numpy as np
import pytest
import torch
from scipy import ndimage
from torch.nn import functional as F

from prelude.objectives.regions import (
    Regions,
    find_regions,
    first_patch,
    normalised_saliency,
    otsu_threshold,
    usual_rounds,
    with_rectangles,
)

GRID = (14, 14)


def levels_of(saliency):
    return (saliency * 255).long()


def smooth_fields(count, grid=GRID, seed=0):
    """Random maps of all degrees of smoothness, flat ones and checkerboards among them. (B, N) in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    maps = []
    for i in range(count):
        coarse = torch.randn(1, 1, 2 + i % 13, 2 + i % 11, generator=generator)
        maps.append(F.interpolate(coarse, size=grid, mode=("bilinear", "nearest", "bicubic")[i % 3]).flatten())
    maps[0] = torch.zeros(grid[0] * grid[1])
    maps[1] = (torch.arange(grid[0] * grid[1]) % 2).float()
    return normalised_saliency(torch.stack(maps))


def gaussians():
    """Four blobs on 14 x 14 patches, as (row, column, width, height)."""
    rows, columns = torch.meshgrid(torch.arange(14.0), torch.arange(14.0), indexing="ij")
    blobs = [(3, 3, 1.8, 1.0), (3, 10, 1.6, 0.8), (10, 4, 1.5, 0.7), (10, 10, 1.4, 0.6)]
    distance = [(((rows - r) ** 2 + (columns - c) ** 2) / (2 * s * s), a) for r, c, s, a in blobs]
    return normalised_saliency(sum(a * torch.exp(-d) for d, a in distance).reshape(1, -1))


def find(saliency, grid=GRID, num_regions=5, min_area=0.02, **options):
    return find_regions(saliency, grid, num_regions=num_regions, min_area=min_area, **options)


# Oracles


def test_the_threshold_is_opencvs_to_the_level():
    for grid in [(14, 14), (8, 8), (7, 9), (24, 24)]:
        levels = levels_of(smooth_fields(250, grid))
        ours = otsu_threshold(levels)
        for i, level in enumerate(ours.tolist()):
            image = levels[i].view(grid).numpy().astype(np.uint8)
            expected, _ = cv2.threshold(image, 0, 255, cv2.THRESH_BINARY + cv2.THRESH_OTSU)
            assert level == expected


def test_components_are_those_of_scipy():
    serpentine = torch.zeros(13, 13, dtype=torch.bool)
    serpentine[::2] = True
    for row in range(1, 13, 2):
        serpentine[row, 12 if row % 4 == 1 else 0] = True
    maps = [(serpentine[None], (13, 13)), (torch.ones(1, 13, 13, dtype=torch.bool), (13, 13))]
    generator = torch.Generator().manual_seed(0)
    for grid in [(14, 14), (8, 8), (5, 17), (2, 2), (1, 9)]:
        maps += [(torch.rand(60, *grid, generator=generator) < density, grid) for density in (0.2, 0.45, 0.7)]
    for foreground, grid in maps:
        ours, complete = first_patch(foreground.flatten(1), grid, usual_rounds(grid))
        assert complete
        for mask, names in zip(foreground.numpy(), ours, strict=True):
            labels, count = ndimage.label(mask, np.ones((3, 3)))
            first = [np.flatnonzero(labels == label)[0] for label in range(1, count + 1)]
            expected = np.array([mask.size, *first])[labels]
            assert np.array_equal(names.view(grid).numpy(), expected)


def test_ranking_is_that_of_a_loop_over_images():
    for grid, min_area, num_regions in [((14, 14), 0.02, 5), ((14, 14), 0.05, 3), ((8, 8), 0.02, 5), ((7, 9), 0.1, 2)]:
        saliency = smooth_fields(80, grid, seed=3)
        found = find(saliency, grid, num_regions, min_area)
        levels, thresholds = levels_of(saliency), otsu_threshold(levels_of(saliency))
        for i in range(80):
            values = saliency[i].view(grid).numpy().astype(np.float64)
            labels, count = ndimage.label((levels[i] > thresholds[i]).view(grid).numpy(), np.ones((3, 3)))
            parts = [labels == label for label in range(1, count + 1)]
            parts = [part for part in parts if part.sum() >= min_area * values.size - 1e-9]
            parts.sort(key=lambda part: -values[part].mean())
            parts = parts[: num_regions - 1]
            expected = np.full(grid, len(parts) + 1)
            for rank, part in enumerate(parts, start=1):
                expected[part] = rank
            assert found.count[i] == len(parts)
            assert np.array_equal(found.rid[i].view(grid).numpy(), expected)


# Numbers computed with the official routine


def test_four_blobs():
    saliency = gaussians()
    assert otsu_threshold(levels_of(saliency)).item() == 80
    found = find(saliency)
    assert found.count.tolist() == [4]
    assert found.sizes(4).tolist() == [[21, 13, 9, 9, 144]]
    places = torch.arange(196)
    for rank, centre in enumerate([(3, 3), (3, 10), (10, 4), (10, 10)], start=1):
        inside = places[found.rid[0] == rank]
        assert ((inside // 14).float().mean(), (inside % 14).float().mean()) == centre
    means = [saliency[0][found.rid[0] == k].mean().item() for k in range(1, 6)]
    assert means == pytest.approx([0.6298, 0.5447, 0.5265, 0.4329, 0.1366], abs=6e-5)
    contexts = [(found.rid <= k).sum().item() for k in range(1, 5)]
    assert contexts == [21, 34, 43, 52]


def test_the_papers_least_area_leaves_one_blob_or_none():
    one = find(gaussians(), min_area=0.08)
    assert one.count.tolist() == [1] and one.sizes(4).tolist() == [[21, 175, 0, 0, 0]]
    assert gaussians()[one.rid == 2].mean().item() == pytest.approx(0.2022, abs=6e-5)
    none = find(gaussians(), min_area=0.15)
    assert none.count.tolist() == [0] and (none.rid == 1).all()


# What always holds


@pytest.mark.parametrize("strategy", ["otsu_components", "quantiles"])
def test_regions_partition_the_grid_and_none_is_empty(strategy):
    saliency = smooth_fields(120)
    found = find(saliency, strategy=strategy)
    sizes = found.sizes(4)
    assert (sizes.sum(1) == 196).all()
    assert (found.rid >= 1).all() and (found.rid.amax(1) == found.count + 1).all()
    for i, n in enumerate(found.count.tolist()):
        assert (sizes[i, : n + 1] > 0).all() and (sizes[i, n + 1 :] == 0).all()
        means = [saliency[i][found.rid[i] == k].double().mean().item() for k in range(1, n + 1)]
        assert all(a >= b - 1e-6 for a, b in zip(means, means[1:], strict=False))


def test_regions_are_connected_large_enough_and_above_the_threshold():
    saliency = smooth_fields(120)
    found, levels = find(saliency, min_area=0.05), levels_of(saliency)
    thresholds = otsu_threshold(levels)
    for i, n in enumerate(found.count.tolist()):
        for k in range(1, n + 1):
            region = (found.rid[i] == k).view(GRID)
            assert ndimage.label(region.numpy(), np.ones((3, 3)))[1] == 1
            assert region.sum() >= 0.05 * 196
            assert (levels[i].view(GRID)[region] > thresholds[i]).all()


def test_mirroring_the_map_mirrors_the_regions():
    saliency = smooth_fields(60, seed=5).view(-1, *GRID)
    found = find(saliency.flatten(1)).rid.view(-1, *GRID)
    for axis in (1, 2):
        mirrored = find(saliency.flip(axis).flatten(1)).rid.view(-1, *GRID)
        # Regions of exactly equal saliency go by their first patch, which a mirror changes.
        same = (mirrored == found.flip(axis)).flatten(1).all(1)
        assert same.float().mean() > 0.9
        generic = torch.arange(60) % 3 == 2  # bicubic maps, without equal values
        assert same[generic].all()


def test_scale_and_offset_of_the_similarity_do_not_matter():
    similarity = smooth_fields(60, seed=7).double() * 3
    found = find(normalised_saliency(similarity))
    for scale, offset in [(1.0, 5.0), (40.0, 0.0), (7.0, -3.0)]:
        other = find(normalised_saliency(similarity * scale + offset))
        assert (other.rid == found.rid).all(1).float().mean() > 0.95  # equation 1 adds 1e-6 to the range


def test_quantiles_give_every_image_all_regions_by_falling_saliency():
    saliency = smooth_fields(30)
    found = find(saliency, strategy="quantiles")
    assert (found.count == 4).all()
    assert (found.sizes(4) - 196 / 5).abs().max() < 1
    for i in range(30):
        for k in range(1, 5):
            assert saliency[i][found.rid[i] == k].min() >= saliency[i][found.rid[i] == k + 1].max()


def test_constant_maps_and_extreme_areas():
    flat = torch.full((2, 196), 0.5)
    assert normalised_saliency(flat).abs().max() == 0
    assert find(normalised_saliency(flat)).count.tolist() == [0, 0]
    assert (find(smooth_fields(20), min_area=1.0).count == 0).all()
    everything = find(smooth_fields(20), min_area=0.0)
    assert everything.count[1:].min() >= 1 and everything.count.max() <= 4


# Rectangles in place of regions


def mixed(acceptance, count=200):
    saliency = smooth_fields(count)
    regions = find(saliency)
    seeds = torch.arange(count) * 31
    return regions, with_rectangles(regions, seeds, GRID, most=4, acceptance=acceptance, size=(5, 6))


def test_accepting_all_regions_changes_none():
    regions, result = mixed(1.0)
    assert torch.equal(result.rid, regions.rid) and torch.equal(result.count, regions.count)


def test_accepting_none_gives_rectangles_in_a_random_place():
    _, result = mixed(0.0)
    first = (result.rid == 1).view(-1, *GRID)
    assert (first.flatten(1).sum(1) == 30).all()
    assert (first.any(2).sum(1) == 5).all() and (first.any(1).sum(1) == 6).all()
    assert first.float().mean(0).min() > 0


@pytest.mark.parametrize("acceptance", [0.0, 0.3, 0.7, 1.0])
def test_mixed_regions_partition_the_grid_too(acceptance):
    regions, result = mixed(acceptance)
    sizes = result.sizes(4)
    assert (sizes.sum(1) == 196).all() and (result.rid.amax(1) == result.count + 1).all()
    for row, n in zip(sizes.tolist(), result.count.tolist(), strict=True):
        assert all(row[: n + 1]) and not any(row[n + 1 :])
    kept = (result.rid == 1) & (regions.rid == 1)
    share = (kept.sum(1) == (regions.rid == 1).sum(1)).float()[regions.count > 0].mean().item()
    assert share == pytest.approx(acceptance, abs=0.15)


def test_where_nothing_is_left_the_last_region_becomes_the_background():
    regions = Regions(torch.tensor([[1, 1, 1, 2]]), torch.tensor([1]))
    seeds = torch.arange(50)
    many = Regions(regions.rid.expand(50, 4), regions.count.expand(50))
    result = with_rectangles(many, seeds, (2, 2), most=4, acceptance=0.5, size=(1, 1))
    assert (result.rid.amax(1) == result.count + 1).all()
    assert (result.rid == 1).any(1).all()
