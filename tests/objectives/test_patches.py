"""What a model that ignores the image can reach on the pixels of hidden patches."""

from itertools import combinations

import pytest
import torch

from prelude.objectives.patches import blind_error


def test_the_error_of_one_prediction_for_all_images_does_not_depend_on_how_many_are_seen_at_once():
    target = torch.randn(7, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 2
    target += 3 * torch.randn(7, 1, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    within = (target - target.mean(1, keepdim=True)).square().mean()
    truth = (within + target.mean(1).var(0).mean()).item()
    assert blind_error(target, False).item() == pytest.approx(truth)
    for count in (2, 3, 6):
        found = [blind_error(target[list(chosen)], False) for chosen in combinations(range(7), count)]
        assert torch.stack(found).mean().item() == pytest.approx(truth)


@pytest.mark.parametrize(("images", "standardised"), [(1, False), (4, True)])
def test_standardised_patches_and_a_single_image_are_held_against_0(images, standardised):
    target = torch.arange(images * 6.0).reshape(images, 2, 3)
    assert blind_error(target, standardised).item() == pytest.approx((target**2).mean().item())
