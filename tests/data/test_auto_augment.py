import random

import numpy as np
import pytest
import torch
from timm.data import auto_augment as timms
from torchvision.transforms import TrivialAugmentWide

from prelude.data.auto_augment import _RAND, _TRIVIAL, apply, augment, draw_operations
from prelude.data.batch import AutoAugment, View, ViewPlan
from prelude.data.views import read_views

RAND = AutoAugment()


def picture(size=24) -> np.ndarray:
    y, x = np.mgrid[:size, :size]
    return np.stack([x * 10, y * 10, (x + y) * 5], -1).astype(np.uint8)


@pytest.fixture
def encoded() -> bytes:
    import io

    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(picture(40)).save(out, "PNG")
    return out.getvalue()


def test_the_operations_are_timms_increasing_set():
    assert list(_RAND) == timms._RAND_INCREASING_TRANSFORMS


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("magnitude", [0.0, 3.3, 9.0, 10.0])
@pytest.mark.parametrize("name", list(_RAND))
def test_strengths_are_timms(name, magnitude, sign, monkeypatch):
    monkeypatch.setattr(timms, "_randomly_negate", lambda value: sign * value)
    level = timms.LEVEL_TO_ARG[name]
    expected = level(magnitude, timms._HPARAMS_DEFAULT) if level else ()
    assert _RAND[name](magnitude / 10, sign) == pytest.approx(expected)


@pytest.mark.parametrize("name", list(_TRIVIAL))
def test_the_wide_space_is_torchvisions(name):
    magnitudes, signed = TrivialAugmentWide()._augmentation_space(31)[name or "Identity"]
    for k in range(31):
        expected = magnitudes[k].item() if magnitudes.ndim else None
        for sign in (-1, 1):
            arguments = _TRIVIAL[name](k / 30, sign)
            if expected is None:
                assert arguments == ()
            elif name in ("Brightness", "Color", "Contrast", "Sharpness"):
                assert arguments[0] == pytest.approx(1 + sign * expected, abs=1e-6)
            elif name.startswith("Translate"):
                assert abs(arguments[0]) in (int(expected), int(expected + 1e-5)) and arguments[0] * sign >= 0
            elif name in ("Posterize", "Solarize"):
                assert arguments[0] == pytest.approx(expected, abs=0.51)
            else:
                assert signed and arguments[0] == pytest.approx(sign * expected, abs=1e-5)


def test_pixels_are_those_of_timms_own_operation(monkeypatch):
    from PIL import Image

    monkeypatch.setattr(timms, "_randomly_negate", lambda value: value)
    hparams = {"img_mean": RAND.fill, "interpolation": Image.Resampling.BICUBIC}
    image = Image.fromarray(picture())
    for name in _RAND:
        expected = timms.AugmentOp(name, prob=1.0, magnitude=6, hparams=hparams)(image)
        ours = apply(image, name, _RAND[name](0.6, 1), RAND.fill)
        assert np.array_equal(np.asarray(ours), np.asarray(expected)), name


def test_as_many_operations_as_the_policy_says():
    generator = random.Random(0)
    drawn = [draw_operations(RAND, generator) for _ in range(4000)]
    names = [name for operations in drawn for name, _ in operations]
    assert len(names) / 4000 == pytest.approx(2 * 0.5, abs=0.05)
    share = {name: names.count(name) / len(names) for name in _RAND}
    assert all(value == pytest.approx(1 / len(_RAND), abs=0.015) for value in share.values())
    angles = np.array([arguments[0] for operations in drawn for name, arguments in operations if name == "Rotate"])
    assert abs(angles.mean()) < 6 and np.abs(angles).mean() == pytest.approx(27, abs=0.5)  # 9 of 10 of 30 degrees
    assert np.abs(angles).std() == pytest.approx(1.5 * 0.9, abs=0.4)  # half a step of 3 degrees, clipped at 30
    assert len(draw_operations(AutoAugment(num_ops=5, probability=1.0), generator)) == 5


def test_a_view_is_augmented_by_its_own_seed_and_nothing_else(encoded):
    plain, view = View((24, 24)), View((24, 24), augment=AutoAugment(probability=1.0))

    def read(plan: tuple[View, ...], seed: int) -> list[np.ndarray]:
        out = [np.empty((24, 24, 3), np.uint8) for _ in plan]
        read_views(encoded, ViewPlan(plan), seed, out)
        return out

    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    first = read((view,), 7)[0]
    random.seed(2), np.random.seed(2), torch.manual_seed(2)
    assert np.array_equal(read((view,), 7)[0], first)
    assert np.array_equal(read((view, plain), 7)[0], first)
    assert not np.array_equal(read((view,), 8)[0], first)
    crop = read((plain,), 7)[0]  # the crop is the same with and without
    assert not np.array_equal(crop, first)
    from prelude.data.views import AUGMENT_DRAWS, view_generator

    assert np.array_equal(augment(crop, view.augment, view_generator(7, AUGMENT_DRAWS)), first)


def test_a_plan_with_another_policy_is_another_plan():
    plans = [ViewPlan((View((8, 8), augment=a),)) for a in (None, AutoAugment(), AutoAugment(magnitude=5))]
    assert len({plan.fingerprint() for plan in plans}) == 3
