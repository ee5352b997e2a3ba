"""A small part of what `fuzz_data.py` can do."""

import fuzz_data
import pytest


@pytest.mark.parametrize("part", range(4))
def test_damaged_tars_give_right_pairs_and_lose_nothing_silently(part, tmp_path):
    for seed in range(part * 40, part * 40 + 40):
        fuzz_data.check_tar(seed, tmp_path)


@pytest.mark.filterwarnings("ignore")  # pytest replaces the filter that data.decode sets
def test_damaged_images_give_pixels_or_a_reason():
    for seed in range(200):
        fuzz_data.check_image(seed)
