from dataclasses import replace

import pytest
import torch
from PIL import Image
from torchvision import transforms

from prelude.data.batch import Batch, Photometric, View, ViewPlan
from prelude.pretrain.host_waits import counting_waits
from prelude.pretrain.images import denormalise, images, normalise

PLAN = ViewPlan((View((16, 24)), View((8, 8))))
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here"))]


def batch(size: int = 6, plan: ViewPlan = PLAN) -> Batch:
    generator = torch.Generator().manual_seed(0)
    pixels = [
        torch.randint(0, 256, (size, 3, *view.size), generator=generator, dtype=torch.uint8) for view in plan.views
    ]
    return Batch(
        views=tuple(view.contiguous(memory_format=torch.channels_last) for view in pixels),
        boxes=torch.zeros(size, len(plan.views), 4, dtype=torch.int32),
        flips=torch.rand(size, len(plan.views), generator=generator) < 0.5,
        seeds=torch.arange(size),
        sample_ids=torch.arange(size),
        positions=torch.arange(size),
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("plan", [PLAN, replace(PLAN, mean=(0.5, 0.1, 0.9), std=(0.5, 1.0, 0.1))])
def test_normalise_is_to_tensor_and_normalize(device, plan):
    every_value = torch.arange(256, dtype=torch.uint8).reshape(16, 16).expand(3, 16, 16).contiguous()
    pixels = torch.cat([every_value[None], torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)])
    classical = transforms.Compose([transforms.ToTensor(), transforms.Normalize(plan.mean, plan.std)])
    expected = torch.stack([classical(Image.fromarray(image.permute(1, 2, 0).numpy())) for image in pixels])
    normalised = normalise(pixels.to(device), plan)
    assert normalised.dtype == torch.float32 and normalised.device.type == device
    # Absolute where values are of order one, relative where a small std makes them larger.
    torch.testing.assert_close(normalised.cpu(), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
def test_denormalise_gives_back_every_pixel(device):
    pixels = torch.arange(256, dtype=torch.uint8, device=device).reshape(1, 1, 16, 16).expand(2, 3, 16, 16)
    torch.testing.assert_close(denormalise(normalise(pixels, PLAN), PLAN), pixels, atol=0, rtol=0)


def test_denormalise_clamps_what_no_pixel_can_be():
    normalised = torch.full((1, 3, 2, 2), 50.0)
    assert (denormalise(normalised, PLAN) == 255).all()
    assert (denormalise(-normalised, PLAN) == 0).all()


@pytest.mark.parametrize("device", DEVICES)
def test_images_are_flipped_where_drawn_and_only_there(device):
    one = batch()
    assert one.flips.any(0).all() and not one.flips.all(0).any()  # both cases in both views
    made = images(one.to(device), PLAN)
    assert [image.shape for image in made] == [(6, 3, 16, 24), (6, 3, 8, 8)]
    layout = torch.channels_last if device == "cuda" else torch.contiguous_format
    assert all(image.is_contiguous(memory_format=layout) for image in made)
    for v, view in enumerate(one.views):
        for b in range(len(one)):
            pixels = view[b].flip(-1) if one.flips[b, v] else view[b]
            torch.testing.assert_close(made[v][b].cpu(), normalise(pixels[None], PLAN)[0], atol=1e-6, rtol=1e-6)


def test_normalise_leaves_its_input_as_it_was():
    for pixels in (torch.full((1, 3, 2, 2), 9, dtype=torch.uint8), torch.full((1, 3, 2, 2), 9.0)):
        normalise(pixels, PLAN)
        assert (pixels == 9).all()


def test_on_a_cpu_images_are_contiguous_whatever_the_layout_of_the_crops():
    one = batch()
    assert not one.views[0].is_contiguous()
    assert all(image.is_contiguous() for image in images(one, PLAN))


def test_images_leave_the_batch_as_it_was():
    one, same = batch(), batch()
    images(one, PLAN)
    for view, untouched in zip(one.views, same.views, strict=True):
        assert torch.equal(view, untouched)


def test_an_image_does_not_depend_on_its_neighbours():
    one = batch()
    together = images(one, PLAN)
    for b in range(len(one)):
        row = replace(one, views=tuple(view[b : b + 1] for view in one.views), flips=one.flips[b : b + 1])
        for v, alone in enumerate(images(row, PLAN)):
            assert torch.equal(alone[0], together[v][b])


def test_an_image_is_the_same_whatever_comes_with_it():
    """Large ones are done a few at a time on a CPU: each with its own draws, whichever comes first."""
    colours = Photometric(jitter=0.8, brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, grey=0.2, blur=0.5)
    plan = ViewPlan((View((200, 300), photometric=colours), View((200, 300), shift=9)))
    one = batch(7, plan)
    made = images(one, plan)
    for b in range(len(one)):
        alone = Batch(**{name: of_one(value, b) for name, value in vars(one).items()})
        for together, by_itself in zip(made, images(alone, plan), strict=True):
            torch.testing.assert_close(together[b : b + 1], by_itself, atol=0, rtol=0)


def of_one(value, b: int):
    if isinstance(value, tuple):
        return tuple(of_one(view, b) for view in value)
    return None if value is None else value[b : b + 1]


def test_on_a_cpu_images_are_contiguous_though_waits_are_counted_and_images_shifted():
    plan = ViewPlan((View((16, 24), shift=3), View((8, 8))))
    with counting_waits():
        assert all(image.is_contiguous() for image in images(batch(6, plan), plan))
    assert all(image.is_contiguous() for image in images(batch(6, plan), plan))
