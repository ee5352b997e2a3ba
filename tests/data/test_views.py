import io
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from random import Random

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from prelude.data import views as views_module
from prelude.data.batch import AutoAugment, View, ViewPlan
from prelude.data.decode import BadImage
from prelude.data.views import draw, read_views, view_generator, write_views

MODES = {"bicubic": InterpolationMode.BICUBIC, "bilinear": InterpolationMode.BILINEAR}


def photograph(height: int, width: int) -> np.ndarray:
    """Smooth colours, edges and a little noise."""
    y, x = np.mgrid[:height, :width]
    red = 128 + 100 * np.sin(x / 17 + y / 31)
    green = 255 * ((x // 20 + y // 15) % 2)
    blue = 255 * y / height
    noise = np.random.default_rng(0).normal(0, 6, (height, width, 3))
    return (np.stack([red, green, blue], axis=-1) + noise).clip(0, 255).astype(np.uint8)


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", compress_level=1)
    return file.getvalue()


def read(image: bytes, *views: View, seed: int = 0):
    out = [np.full((*view.size, 3), 77, np.uint8) for view in views]
    boxes, flips = read_views(image, ViewPlan(views), seed, out)
    assert boxes.shape == (len(views), 4) and boxes.dtype == np.int32
    assert flips.shape == (len(views),) and flips.dtype == np.bool_
    return boxes, flips, out


def mean_difference(a, b) -> float:
    a, b = np.asarray(a), np.asarray(b)
    assert a.shape == b.shape
    return np.abs(a.astype(int) - b).mean()


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [(64, 64), (40, 96), (300, 280)])
@pytest.mark.parametrize("direct", [True, False])
def test_resizing_agrees_with_pil(interpolation, size, direct, monkeypatch):
    """Shrinking, stretching and enlarging, both straight into the slot and through F.interpolate."""
    assert set(views_module._RESIZE_INTO) == {"bicubic", "bilinear"}
    if not direct:
        monkeypatch.setattr(views_module, "_RESIZE_INTO", {})
    pixels = photograph(250, 333)
    for seed in range(5):
        boxes, _, (crop,) = read(png(pixels), View(size, interpolation=interpolation), seed=seed)
        top, left, height, width = boxes[0].tolist()
        by_pil = Image.fromarray(pixels[top : top + height, left : left + width]).resize(
            size[::-1], Image.Resampling[interpolation.upper()]
        )
        assert mean_difference(crop, by_pil) <= 0.1


def test_a_view_is_written_into_the_callers_memory_and_nowhere_else():
    batch = np.full((3, 32, 32, 3), 77, np.uint8)
    read_views(png(photograph(50, 60)), ViewPlan((View((32, 32)),)), 0, [batch[1]])
    assert (batch[[0, 2]] == 77).all() and not (batch[1] == 77).all()


def test_a_crop_of_the_views_size_is_copied_exactly():
    pixels = photograph(48, 48)
    boxes, _, (crop,) = read(png(pixels), View((48, 48), "center"))
    assert boxes.tolist() == [[0, 0, 48, 48]]
    np.testing.assert_array_equal(crop, pixels)

    boxes, _, (crop,) = read(png(photograph(96, 96)), View((48, 48), "center", crop_share=0.5))
    assert boxes.tolist() == [[24, 24, 48, 48]]
    np.testing.assert_array_equal(crop, photograph(96, 96)[24:72, 24:72])


@pytest.mark.parametrize("shape", [(500, 375), (256, 256), (300, 1000)])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_center_is_resize_and_center_crop(shape, interpolation):
    """Not to the pixel: the box is whole pixels of the source, where torchvision cuts after resizing."""
    y, x = np.mgrid[: shape[0], : shape[1]] / 50
    pixels = (127 + 60 * np.stack([np.sin(x), np.cos(y), np.sin(x + y)], axis=-1)).astype(np.uint8)
    _, _, (crop,) = read(png(pixels), View((224, 224), "center", crop_share=0.875, interpolation=interpolation))
    classical = transforms.Compose([transforms.Resize(256, MODES[interpolation]), transforms.CenterCrop(224)])
    assert mean_difference(crop, classical(Image.fromarray(pixels))) <= 0.7


def test_center_keeps_the_outputs_aspect_ratio():
    boxes, _, _ = read(png(photograph(100, 300)), View((32, 64), "center"))
    assert boxes.tolist() == [[0, 50, 100, 200]]
    boxes, _, _ = read(png(photograph(100, 300)), View((32, 64), "center", crop_share=0.5))
    assert boxes.tolist() == [[25, 100, 50, 100]]


def test_center_draws_no_box():
    view = View((16, 16), "center")
    assert len({draw(view, 40, 50, Random(seed))[0] for seed in range(20)}) == 1


@pytest.mark.parametrize("shape, scale", [((375, 500), (0.2, 1.0)), ((500, 333), (0.08, 1.0)), ((60, 200), (0.2, 1.0))])
def test_boxes_have_the_distribution_of_torchvision(shape, scale):
    """Two-sample Kolmogorov-Smirnov on every quantity, the share of fallbacks (in the last shape) included."""
    view = View((224, 224), scale=scale)
    ours = np.array([draw(view, *shape, view_generator(seed, 0))[0] for seed in range(3000)])
    torch.manual_seed(0)
    image = torch.empty(3, *shape)
    theirs = [transforms.RandomResizedCrop.get_params(image, list(scale), [3 / 4, 4 / 3]) for _ in range(3000)]
    theirs = np.array(theirs)
    for boxes in (ours, theirs):
        assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] >= 1).all()
        assert (boxes[:, :2] + boxes[:, 2:] <= shape).all()
    for quantity in (
        lambda boxes: boxes[:, 0],
        lambda boxes: boxes[:, 1],
        lambda boxes: boxes[:, 2],
        lambda boxes: boxes[:, 3],
        lambda boxes: boxes[:, 2] * boxes[:, 3],
        lambda boxes: boxes[:, 3] / boxes[:, 2],
    ):
        assert stats.ks_2samp(quantity(ours), quantity(theirs)).pvalue > 1e-3


def test_area_is_uniform_and_aspect_ratio_log_uniform():
    view = View((224, 224), scale=(0.1, 0.4))  # small enough for the first try always to fit
    boxes = np.array([draw(view, 2000, 2000, view_generator(seed, 0))[0] for seed in range(3000)])
    areas = boxes[:, 2] * boxes[:, 3] / 2000**2
    assert stats.kstest(areas, stats.uniform(0.1, 0.3).cdf).pvalue > 1e-3
    ratios = np.log(boxes[:, 3] / boxes[:, 2])
    assert stats.kstest(ratios, stats.uniform(math.log(3 / 4), math.log(16 / 9)).cdf).pvalue > 1e-3


@pytest.mark.parametrize("shape", [(10, 1000), (1000, 10), (1, 400), (400, 1), (1, 1), (7, 7)])
def test_the_fallback_is_torchvisions(shape):
    """A scale that no try can meet, so that all ten fail."""
    box, _ = draw(View((224, 224), scale=(2.0, 3.0)), *shape, Random(0))
    theirs = transforms.RandomResizedCrop.get_params(torch.empty(3, *shape), [2.0, 3.0], [3 / 4, 4 / 3])
    assert box == theirs


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (300, 1), (3, 2)])
@pytest.mark.parametrize("crop", ["random_resized", "center"])
def test_the_smallest_images_give_full_views(shape, crop):
    pixels = np.full((*shape, 3), 200, np.uint8)
    _, _, (view,) = read(png(pixels), View((32, 48), crop, crop_share=0.5))
    assert (view == 200).all()


def test_flips_have_their_probability():
    for probability in (0.0, 0.3, 1.0):
        view = View((8, 8), flip=probability)
        flips = sum(draw(view, 20, 20, view_generator(seed, 0))[1] for seed in range(2000))
        assert stats.binomtest(flips, 2000, probability).pvalue > 1e-3


def test_pixels_are_not_flipped():
    never, always = (read(png(photograph(40, 40)), View((16, 16), flip=flip)) for flip in (0.0, 1.0))
    assert not never[1][0] and always[1][0]
    np.testing.assert_array_equal(never[2][0], always[2][0])


def test_a_seed_gives_the_same_views_always():
    image, view = png(photograph(90, 120)), View((32, 32))
    first, again, other = (read(image, view, view, seed=seed) for seed in (5, 5, 6))
    np.testing.assert_array_equal(first[0], again[0])
    np.testing.assert_array_equal(first[1], again[1])
    np.testing.assert_array_equal(first[2], again[2])
    assert (first[0] != other[0]).any()


def test_known_boxes_are_pinned():
    """A change here changes the crops of every run that is resumed."""
    view = View((224, 224), scale=(0.08, 1.0))
    drawn = [draw(view, 375, 500, view_generator(seed, v)) for seed, v in [(0, 0), (0, 1), (2**62, 0), (-1, 3)]]
    assert drawn == [
        ((53, 200, 243, 245), False),
        ((1, 33, 372, 433), True),
        ((33, 238, 132, 141), False),
        ((0, 226, 284, 254), True),
    ]


def test_a_views_draws_depend_on_no_other_view():
    image = png(photograph(90, 120))
    a, b, c = View((32, 32)), View((24, 40), scale=(0.05, 0.3), flip=0.9), View((16, 16), "center")
    for seed in range(5):
        boxes, flips, pixels = read(image, a, b, a, seed=seed)
        for others in ((c, b, c), (b, b, b), (replace(a, flip=0.0), b)):
            boxes_beside_others, flips_beside_others, pixels_beside_others = read(image, *others, seed=seed)
            np.testing.assert_array_equal(boxes_beside_others[1], boxes[1])
            assert flips_beside_others[1] == flips[1]
            np.testing.assert_array_equal(pixels_beside_others[1], pixels[1])


def test_the_views_of_a_sample_and_neighbouring_seeds_are_uncorrelated():
    view = View((8, 8))
    drawn = {v: [draw(view, 999, 999, view_generator(seed, v)) for seed in range(2000)] for v in (0, 1)}
    lefts = {v: np.array([box[1] for box, _ in draws]) for v, draws in drawn.items()}
    flips = {v: np.array([flip for _, flip in draws], float) for v, draws in drawn.items()}
    assert abs(np.corrcoef(lefts[0], lefts[1])[0, 1]) < 0.08
    assert abs(np.corrcoef(flips[0], flips[1])[0, 1]) < 0.08
    assert abs(np.corrcoef(lefts[0], flips[0])[0, 1]) < 0.08
    assert abs(np.corrcoef(lefts[0][1:], lefts[0][:-1])[0, 1]) < 0.08


def test_seeds_of_either_sign_are_distinct():
    view = View((8, 8))
    seeds = [0, 1, -1, 2**63 - 1, -(2**63), 2**62, -(2**62), 123456789, -123456789]
    assert len({draw(view, 9999, 9999, view_generator(seed, v)) for seed in seeds for v in (0, 1)}) == 2 * len(seeds)


def test_views_of_several_images_are_those_of_each():
    """Of several sizes, into rows in any order, one view of which draws operations too."""
    plan = ViewPlan((View((24, 20)), View((16, 16), interpolation="bilinear", augment=AutoAugment())))
    images, seeds, rows = [photograph(30 + 9 * n, 70 - 8 * n) for n in range(5)], [3, -1, 2**62, 3, 8], [4, 0, 3, 1, 2]
    out = [np.full((6, *view.size, 3), 77, np.uint8) for view in plan.views]
    boxes, flips = write_views(images, plan, seeds, out, rows)
    for n, (image, seed, row) in enumerate(zip(images, seeds, rows, strict=True)):
        alone_boxes, alone_flips, alone = read(png(image), *plan.views, seed=seed)
        np.testing.assert_array_equal(boxes[n], alone_boxes)
        np.testing.assert_array_equal(flips[n], alone_flips)
        for view, wanted in zip(out, alone, strict=True):
            np.testing.assert_array_equal(view[row], wanted)
    assert all((view[5] == 77).all() for view in out)


def test_threads_do_not_disturb_each_other():
    image, views = png(photograph(90, 120)), (View((32, 32)), View((24, 24)))
    expected = [read(image, *views, seed=seed) for seed in range(20)]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda seed: read(image, *views, seed=seed), range(20)))
    for (boxes, flips, pixels), (wanted_boxes, wanted_flips, wanted_pixels) in zip(results, expected, strict=True):
        np.testing.assert_array_equal(boxes, wanted_boxes)
        np.testing.assert_array_equal(flips, wanted_flips)
        for view, wanted in zip(pixels, wanted_pixels, strict=True):
            np.testing.assert_array_equal(view, wanted)


def test_a_bad_image_is_the_callers_to_replace():
    with pytest.raises(BadImage, match="empty"):
        read(b"", View((8, 8)))
