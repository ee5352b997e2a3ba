"""RandAugment (arXiv 1909.13719) and TrivialAugment Wide (arXiv 2103.10158) on one view's uint8 pixels.

- What happens to a view is a function of the generator that is handed in, and of nothing else: neither of a thread,
  a worker or the order of samples. Only `random()` is called, whose sequence Python guarantees across versions.
- The pixel operations are timm's, hence PIL's; strengths are drawn here, because timm draws from the global generator.
- Geometric operations resample bicubically and fill with the policy's colour.
- Every operation with a direction takes both alike, so it does not matter that the view is flipped afterwards.
"""

import random
from statistics import NormalDist

import numpy as np
from PIL import Image

from prelude.data.batch import AutoAugment

MOST = 10.0  # the largest magnitude of `rand`
_BINS = 30  # strengths of `trivial` are k / 30 of the largest, k = 0..30


def augment(pixels: np.ndarray, policy: AutoAugment, generator: random.Random) -> np.ndarray:
    """pixels: (H, W, 3) uint8, left as they are. Returns the same shape."""
    image = Image.fromarray(pixels)
    for name, arguments in draw_operations(policy, generator):
        image = apply(image, name, arguments, policy.fill)
    return np.asarray(image)


def draw_operations(policy: AutoAugment, generator: random.Random) -> list[tuple[str, tuple]]:
    """The operations that happen, in order: timm's name of each, and its argument if it has one."""
    if policy.policy == "trivial":
        name = _pick(_TRIVIAL, generator)
        level = int(generator.random() * (_BINS + 1)) / _BINS
        return [(name, _TRIVIAL[name](level, _sign(generator)))] if name else []
    drawn = []
    for _ in range(policy.num_ops):
        name, happens = _pick(_RAND, generator), generator.random() < policy.probability
        noise = NormalDist().inv_cdf(max(generator.random(), 2.0**-53))
        magnitude = min(max(policy.magnitude + policy.magnitude_std * noise, 0.0), MOST)
        arguments = _RAND[name](magnitude / MOST, _sign(generator))
        if happens:
            drawn.append((name, arguments))
    return drawn


def apply(image: Image.Image, name: str, arguments: tuple, fill: tuple[int, int, int]) -> Image.Image:
    """One of timm's operations."""
    from timm.data.auto_augment import NAME_TO_OP  # here: plain views need no timm, and importing it takes seconds

    return NAME_TO_OP[name](image, *arguments, fillcolor=fill, resample=Image.Resampling.BICUBIC)


def _pick(table: dict, generator: random.Random) -> str:
    return list(table)[int(generator.random() * len(table))]


def _sign(generator: random.Random) -> int:
    return -1 if generator.random() < 0.5 else 1


def _nothing(level: float, sign: int) -> tuple:
    return ()


def _either_way(most: float):
    return lambda level, sign: (sign * most * level,)


def _factor(most: float, least: float):
    """Of colour, contrast, brightness and sharpness: 1 changes nothing."""
    return lambda level, sign: (max(least, 1 + sign * most * level),)


# By timm's names: (level in 0..1, sign) to the operation's arguments.
_RAND = {
    "AutoContrast": _nothing,
    "Equalize": _nothing,
    "Invert": _nothing,
    "Rotate": _either_way(30.0),  # degrees
    "PosterizeIncreasing": lambda level, sign: (4 - int(level * 4),),  # bits that are kept
    "SolarizeIncreasing": lambda level, sign: (256 - min(256, int(level * 256)),),  # inverted from here up
    "SolarizeAdd": lambda level, sign: (min(128, int(level * 110)),),  # added below 128
    "ColorIncreasing": _factor(0.9, 0.1),
    "ContrastIncreasing": _factor(0.9, 0.1),
    "BrightnessIncreasing": _factor(0.9, 0.1),
    "SharpnessIncreasing": _factor(0.9, 0.1),
    "ShearX": _either_way(0.3),
    "ShearY": _either_way(0.3),
    "TranslateXRel": _either_way(0.45),  # of the side
    "TranslateYRel": _either_way(0.45),
}
_TRIVIAL = {
    "": _nothing,
    "ShearX": _either_way(0.99),
    "ShearY": _either_way(0.99),
    "TranslateX": lambda level, sign: (int(sign * 32 * level),),  # pixels
    "TranslateY": lambda level, sign: (int(sign * 32 * level),),
    "Rotate": _either_way(135.0),
    "Brightness": _factor(0.99, 0.0),
    "Color": _factor(0.99, 0.0),
    "Contrast": _factor(0.99, 0.0),
    "Sharpness": _factor(0.99, 0.0),
    "Posterize": lambda level, sign: (8 - round(level * 6),),
    "Solarize": lambda level, sign: (round(255 * (1 - level)),),
    "AutoContrast": _nothing,
    "Equalize": _nothing,
}
