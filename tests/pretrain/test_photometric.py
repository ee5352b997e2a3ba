"""Colour augmentation in bulk against torchvision on single images, and its draws against their seeds."""

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torchvision.transforms.v2 import functional as reference

from prelude.data.batch import Batch, Photometric, View, ViewPlan
from prelude.pretrain import photometric
from prelude.pretrain.images import images
from prelude.pretrain.photometric import augment, draw

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here"))]
FIRST = Photometric(jitter=0.8, brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, grey=0.2, blur=1.0)
SECOND = replace(FIRST, blur=0.1, solarise=0.2)
NUM = 24


def some_images(num: int = NUM, size=(17, 22)) -> torch.Tensor:
    """Smooth and rough, with grey pixels, and with channels that tie for the largest and the smallest."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(num, 3, *size, generator=generator)
    pixels[:, :, :3] = pixels[:, :1, :3]
    pixels[:, :2, 3:6] = pixels[:, :1, 3:6]
    pixels[:, 1:, 6:9] = pixels[:, 1:2, 6:9]
    pixels[:, 0, 9:12] = pixels[:, 2, 9:12]
    pixels[:, :, 12] = 0
    pixels[:, :, 13] = 1
    return pixels


def one_by_one(pixels, operation, *parameters):
    rows = zip(pixels, *(parameter.tolist() for parameter in parameters), strict=True)
    return torch.stack([operation(image, *values) for image, *values in rows])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["brightness", "contrast", "saturation"])
def test_brightness_contrast_and_saturation_are_torchvision_s(kind, device):
    pixels, factor = some_images(), torch.linspace(0, 2, NUM)
    is_kind = [torch.full((NUM,), kind == name, device=device) for name in ("contrast", "saturation")]
    ours = photometric.blend(pixels.to(device), factor.to(device), *is_kind)
    expected = one_by_one(pixels, getattr(reference, f"adjust_{kind}"), factor)
    torch.testing.assert_close(ours.cpu(), expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("device", DEVICES)
def test_hue_is_torchvision_s(device):
    pixels, turn = some_images(), torch.linspace(-0.5, 0.5, NUM)
    ours = photometric.turn_hue(pixels.to(device), turn.to(device))
    torch.testing.assert_close(ours.cpu(), one_by_one(pixels, reference.adjust_hue, turn), atol=5e-6, rtol=0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("radius", [1, 4, 16])
def test_blur_is_torchvision_s(radius, device):
    pixels, sigma = some_images(), torch.linspace(0.1, 2, NUM)
    ours = photometric.gaussian_blur(pixels.to(device), sigma.to(device), radius)
    expected = one_by_one(pixels, lambda x, s: reference.gaussian_blur(x, [2 * radius + 1] * 2, [s, s]), sigma)
    torch.testing.assert_close(ours.cpu(), expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("channels", [1, 4])
def test_other_channels_than_rgb_are_changed_each_like_a_grey_image(channels):
    pixels, seeds = torch.rand(NUM, channels, 17, 22, generator=torch.Generator().manual_seed(0)), torch.arange(NUM)
    wanted = Photometric(jitter=1.0, brightness=0.4, contrast=0.4, blur=0.5, solarise=0.5)
    drawn = draw(wanted, seeds, 0)
    expected = pixels.clone()
    for n in range(NUM):
        operations = [(drawn.order[n, 0], reference.adjust_brightness, drawn.brightness[n])]
        operations += [(drawn.order[n, 1], reference.adjust_contrast, drawn.contrast[n])]
        for c in range(channels):
            image = pixels[n, c : c + 1]
            for _, operation, factor in sorted(operations, key=lambda each: each[0]):
                image = operation(image, factor.item())
            if drawn.blur[n]:
                image = reference.gaussian_blur(image, [17, 17], [drawn.sigma[n].item()] * 2)
            expected[n, c] = torch.where(image >= 0.5, 1 - image, image) if drawn.solarise[n] else image
    ours = augment(pixels, wanted, seeds, 0)
    edge = (ours + expected - 1).abs() < 1e-5  # a value of just one half is inverted or not by its last bit
    assert ((ours - expected).abs() < 1e-5)[~edge].all() and edge.float().mean() < 0.01


@pytest.mark.parametrize("device", DEVICES)
def test_grey_is_torchvision_s(device):
    ours = augment(some_images().to(device), Photometric(grey=1.0), torch.arange(NUM, device=device), 0)
    expected = reference.rgb_to_grayscale(some_images(), num_output_channels=3)
    torch.testing.assert_close(ours.cpu(), expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("device", DEVICES)
def test_solarise_inverts_the_8_bit_values_that_pil_inverts(device):
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16).contiguous()
    solarised = augment(levels.to(device) / 255, Photometric(solarise=1.0), torch.zeros(1, dtype=torch.int64), 0)
    expected = reference.solarize(levels, 128)
    torch.testing.assert_close((solarised.cpu() * 255).round().to(torch.uint8), expected, atol=0, rtol=0)


def by_hand(image: torch.Tensor, drawn: photometric.Draws, b: int, radius: int) -> torch.Tensor:
    """The whole pipeline on one image with torchvision's functions."""
    if drawn.jitter[b]:
        jitters = [
            (reference.adjust_brightness, drawn.brightness),
            (reference.adjust_contrast, drawn.contrast),
            (reference.adjust_saturation, drawn.saturation),
            (reference.adjust_hue, drawn.hue),
        ]
        for place in range(4):
            operation, parameter = jitters[drawn.order[b].tolist().index(place)]
            image = operation(image, parameter[b].item())
    if drawn.grey[b]:
        image = reference.rgb_to_grayscale(image, num_output_channels=3)
    if drawn.blur[b]:
        image = reference.gaussian_blur(image, [2 * radius + 1] * 2, [drawn.sigma[b].item()] * 2)
    return torch.where(image >= 0.5, 1 - image, image) if drawn.solarise[b] else image


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("plan", [FIRST, SECOND])
def test_the_whole_equals_torchvision_image_by_image_in_each_sample_s_own_order(plan, device):
    num = 96  # every one of the 24 orders is likely, and each operation both done and left out
    generator = torch.Generator().manual_seed(3)
    pixels = torch.rand(num, 3, 20, 20, generator=generator)
    seeds = torch.arange(num) * 7919
    drawn = draw(plan, seeds, 1)
    ours = augment(pixels.to(device), plan, seeds.to(device), 1).cpu()
    for b in range(num):
        difference = (ours[b] - by_hand(pixels[b], drawn, b, radius=8)).abs().max().item()
        # At the threshold of solarise a difference in the last bit is a different pixel.
        assert difference < 2e-5 or drawn.solarise[b], (b, difference)
        if drawn.solarise[b]:
            close = (ours[b] - by_hand(pixels[b], drawn, b, radius=8)).abs() < 2e-5
            assert close.float().mean() > 0.99


@pytest.mark.parametrize("size", [(17, 22), (40, 33), (2, 3)])
@pytest.mark.parametrize("plan", [FIRST, SECOND, Photometric(jitter=1.0, hue=0.5), Photometric(blur=1.0)])
def test_an_accelerator_s_way_equals_that_of_a_cpu(plan, size, monkeypatch):
    """Both run on the CPU: all samples at once, and one by one."""
    pixels, seeds = torch.rand(NUM, 3, *size, generator=torch.Generator().manual_seed(2)), torch.arange(NUM)
    chosen = augment(pixels, plan, seeds, 0)
    before = pixels.clone()
    monkeypatch.setattr(photometric, "is_counting", lambda: True)
    torch.testing.assert_close(augment(pixels, plan, seeds, 0), chosen, atol=5e-6, rtol=0)
    assert torch.equal(pixels, before)


@pytest.mark.parametrize("size", [1, 7, NUM])
def test_neither_the_batch_s_size_nor_its_order_changes_a_sample(size):
    pixels, seeds = some_images(), torch.arange(NUM) * 31
    whole = augment(pixels, SECOND, seeds, 0)
    backwards = torch.arange(NUM - 1, -1, -1)
    parts = [augment(pixels[rows], SECOND, seeds[rows], 0) for rows in backwards.split(size)]
    torch.testing.assert_close(torch.cat(parts)[backwards], whole, atol=1e-6, rtol=0)


def test_draws_differ_between_views_and_between_samples():
    seeds = torch.arange(500)
    first, second = draw(FIRST, seeds, 0), draw(FIRST, seeds, 1)
    for name in ("brightness", "contrast", "saturation", "hue", "sigma"):
        one, other = getattr(first, name), getattr(second, name)
        assert len(one.unique()) > 490
        assert abs(torch.corrcoef(torch.stack([one, other]))[0, 1]) < 0.15


def test_frequencies_and_ranges_are_those_that_are_asked_for():
    num = 4000
    seeds = torch.arange(num) * 104729
    for plan, view in ((FIRST, 0), (SECOND, 1)):
        drawn = draw(plan, seeds, view)
        for name in ("jitter", "grey", "blur", "solarise"):
            p, seen = getattr(plan, name), getattr(drawn, name).float().mean().item()
            assert abs(seen - p) <= 4 * math.sqrt(p * (1 - p) / num), name
        for name, (low, high) in {
            "brightness": (0.6, 1.4),
            "contrast": (0.6, 1.4),
            "saturation": (0.8, 1.2),
            "hue": (-0.1, 0.1),
            "sigma": (0.1, 2.0),
        }.items():
            values = getattr(drawn, name)
            assert low <= values.min() < low + 0.02 * (high - low)
            assert high >= values.max() > high - 0.02 * (high - low)
            assert abs(values.mean() - (low + high) / 2) < 4 * (high - low) / math.sqrt(12 * num)
        orders = Counter(map(tuple, drawn.order.tolist()))
        assert len(orders) == 24
        assert all(abs(count - num / 24) < 5 * math.sqrt(num / 24) for count in orders.values())
    assert not draw(FIRST, seeds, 0).solarise.any()


def test_strong_factors_start_at_zero():
    assert draw(Photometric(jitter=1.0, brightness=1.5), torch.arange(1000), 0).brightness.min() >= 0


def test_autocast_changes_nothing():
    pixels, seeds = some_images(), torch.arange(NUM)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        lower = augment(pixels, SECOND, seeds, 0)
    assert lower.dtype == torch.float32
    assert torch.equal(lower, augment(pixels, SECOND, seeds, 0))


def batch_of(pixels: torch.Tensor, seeds: torch.Tensor) -> Batch:
    num = len(pixels)
    none = torch.zeros(num, 2, dtype=torch.bool)
    return Batch((pixels, pixels), torch.zeros(num, 2, 4, dtype=torch.int32), none, seeds, seeds, seeds)


def test_a_view_plan_without_colour_changes_keeps_its_pixels_and_one_with_them_does_not():
    pixels = (some_images() * 255).round().to(torch.uint8)
    still = Photometric(jitter=1.0, blur=0.0)  # every strength 0
    plan = ViewPlan((View((17, 22)), View((17, 22), photometric=still)))
    plain, unchanged = images(batch_of(pixels, torch.arange(NUM)), plan)
    torch.testing.assert_close(unchanged, plain, atol=5e-6, rtol=0)
    plan = replace(plan, views=(plan.views[0], replace(plan.views[1], photometric=FIRST)))
    _, coloured = images(batch_of(pixels, torch.arange(NUM)), plan)
    assert (coloured - plain).abs().mean() > 0.05


def test_a_shift_is_torchvision_s_crop_of_the_padded_image_everywhere_in_its_range():
    num, shift, size = 400, 2, (5, 6)
    pixels = torch.randint(1, 256, (1, 3, *size), dtype=torch.uint8).expand(num, -1, -1, -1)
    plan = ViewPlan((View(size, shift=shift), View(size, shift=shift)), mean=(0.0,) * 3, std=(1.0,) * 3)
    views = images(batch_of(pixels, torch.arange(num)), plan)
    padded = reference.pad(pixels[0], [shift] * 4)
    places = [(top, left) for top in range(2 * shift + 1) for left in range(2 * shift + 1)]
    crops = torch.stack([reference.crop(padded, *place, *size) for place in places])  # (25, 3, H, W)
    seen = []
    for view in views:
        same = ((view * 255).round()[:, None] == crops).flatten(2).all(2)  # (num, 25)
        assert (same.sum(1) == 1).all()
        seen.append(same.int().argmax(1))
    assert len(seen[0].unique()) == len(seen[1].unique()) == 25
    assert (seen[0] == seen[1]).float().mean() < 0.15


def test_the_plan_s_fingerprint_knows_its_colours():
    plans = [ViewPlan((View((8, 8), photometric=p),)) for p in (None, FIRST, SECOND)]
    assert len({plan.fingerprint() for plan in plans}) == 3
