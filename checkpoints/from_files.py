"""Encoders from files in a published format, and from folders of `transformers`.

What no file tells is said after its name: `mae.pth#num_heads=4`, `ijepa.pth.tar#encoder,grid=14x28`.

| word | says |
|---|---|
| a name | which of the networks in the file (`encoder` of I-JEPA, `student` of DINO, `ema`) |
| `num_heads=N` | attention heads, where no published model is as wide |
| `grid=RxC` | rows and columns of the table of positions, where they are no square |
| `resampling=RULE` | how the table is brought to another grid: `offset` (DINO), `plain` (MAE), `corners`, `timm` |
| `pixels=imagenet`, `pixels=half`, `pixels=M/.../S/...` | means and standard deviations of the channels of pixels |
| `norm_eps=E` | of its LayerNorms, to take them as timm's 1e-6 where they were 1e-12 |
| `image_size=N` | pixels that a model without a table of positions is shown |
"""

import difflib
import math
from dataclasses import dataclass, replace
from pathlib import Path

from prelude.checkpoints.convert.architecture import encoder_config
from prelude.checkpoints.convert.files import CONFIG, read_file, read_folder, read_json
from prelude.checkpoints.convert.formats import weights_in
from prelude.checkpoints.convert.resample import RULES
from prelude.checkpoints.convert.weights import Weights, prefix_tokens
from prelude.checkpoints.description import Description, Pixels
from prelude.checkpoints.source_names import split
from prelude.data.batch import IMAGENET_MEAN, IMAGENET_STD
from prelude.data.counting import counted
from prelude.data.errors import UserError

_KEYS = ("num_heads", "grid", "resampling", "pixels", "norm_eps", "image_size")
_HALF = (0.5, 0.5, 0.5)
_AMBIGUOUS, _TRANSFORMERS = "ViT, timm layout", "transformers"
_OF_TWO_KINDS_OF_IMAGES = (1024, 4096)  # widths at which DINOv3 was also trained on satellite images, with other pixels


@dataclass(frozen=True)
class Words:
    """What stands after a file's name."""

    part: str | None = None
    num_heads: int | None = None
    grid: tuple[int, int] | None = None
    resampling: str | None = None
    pixels: tuple[Pixels, Pixels] | None = None
    norm_eps: float | None = None
    image_size: int | None = None


def describe_file(source: str) -> Description:
    """source: PATH or PATH#WORD,WORD of a file or a folder of `transformers`. Raises UserError."""
    path, words = _split(source)
    weights = read_weights(source)
    if weights.untold:
        raise UserError(
            f"{source} ({weights.format}) does not tell {weights.untold}; write timm:NAME, a folder with a "
            "config.json of timm's, or in a run encoder.name beside encoder.weights."
        )
    if weights.pixels is None:
        raise UserError(
            f"{source} ({weights.format}) does not tell how its pixels were normalised; write {weights.before_word}"
            "pixels=imagenet, or pixels=half for 0.5."
        )
    if words.image_size and "pos_embed" in weights.tensors:
        raise UserError(f"{source} has a table of positions, which tells its size; leave image_size out.")
    config = encoder_config(weights, words.image_size)
    if not len(weights.pixels[0]) == len(weights.pixels[1]) == config.in_chans:
        raise UserError(
            f"{source} reads {counted(config.in_chans, 'channel')}; write {weights.before_word}pixels=M/.../S/... "
            f"with a mean of "
            "each, then a standard deviation of each."
        )
    return Description(
        config=config,
        mean=weights.pixels[0],
        std=weights.pixels[1],
        name=path.name + (f"#{words.part}" if words.part else ""),
        read=lambda: weights,
        origin={"format": weights.format},
    )


def read_weights(source: str) -> Weights:
    """The weights of a file, whatever architecture they are for. Raises UserError."""
    path, words = _split(source)
    settings, home = (read_json(path / CONFIG), path) if path.is_dir() else (None, None)
    tree = read_folder(path) if settings is not None else read_file(path)
    weights = weights_in(tree, source, words.part, settings)
    if home is None and weights.format.startswith(_TRANSFORMERS) and is_transformers(path.parent):
        home = path.parent  # which says what no tensor does, of the file in it too
        weights = weights_in(tree, source, words.part, read_json(home / CONFIG))
    given = {"num_heads": words.num_heads, "grid": words.grid, "resampling": words.resampling}
    given["norm_eps"] = words.norm_eps
    given["prefix_rows"] = _rows_beside(weights, words.grid)
    given["pixels"] = words.pixels or weights.pixels or _published_pixels(home, weights)
    return replace(weights, **{key: value for key, value in given.items() if value is not None})


def _rows_beside(weights: Weights, grid: tuple[int, int] | None) -> int | None:
    """Rows of prefix tokens beside a grid that the user names; None: the table says nothing of it."""
    table = weights.tensors.get("pos_embed")
    rest = None if grid is None or table is None or table.ndim != 3 else table.shape[1] - grid[0] * grid[1]
    return rest if rest in (0, prefix_tokens(weights.tensors)) else None


def is_transformers(folder: Path) -> bool:
    return (folder / CONFIG).is_file() and "model_type" in read_json(folder / CONFIG)


def _split(source: str) -> tuple[Path, Words]:
    path, text = split(source)
    found: dict = {}
    for word in filter(None, text.split(",")):
        key, equals, value = word.partition("=")
        if not equals:
            key, value = "part", word
        elif key not in _KEYS:
            near = difflib.get_close_matches(key, _KEYS, 1, 0.5)
            hint = f"did you mean {near[0]}?" if near else f"write one of {', '.join(_KEYS)}."
            raise UserError(f"{source}: {key} is no word about a file of weights; {hint}")
        found[key] = _value(source, key, value)
    return path, Words(**found)


def _value(source: str, key: str, value: str):
    try:
        match key:
            case "num_heads" | "image_size":
                return _positive(int(value))
            case "norm_eps":
                return _positive(float(value))
            case "grid":
                rows, columns = value.split("x")
                return _positive(int(rows)), _positive(int(columns))
            case "pixels" if value in ("imagenet", "half"):
                return (IMAGENET_MEAN, IMAGENET_STD) if value == "imagenet" else (_HALF, _HALF)
            case "pixels":
                numbers = tuple(float(number) for number in value.split("/"))
                std = numbers[len(numbers) // 2 :]
                if len(numbers) % 2 or not all(map(math.isfinite, numbers)) or min(std) <= 0:
                    raise ValueError
                return numbers[: len(numbers) // 2], numbers[len(numbers) // 2 :]
            case "resampling" if value not in RULES:
                raise ValueError
    except ValueError:
        right = {
            "num_heads": "num_heads=12",
            "image_size": "image_size=224",
            "norm_eps": "norm_eps=1e-6",
            "grid": "grid=14x28",
            "pixels": "pixels=imagenet, pixels=half, or pixels=M/M/M/S/S/S",
            "resampling": "resampling=" + ", ".join(RULES),
        }[key]
        raise UserError(f"{source}: {key}={value} cannot be read; write {right}.") from None
    return value


def _positive(number):
    if not number > 0:
        raise ValueError
    return number


def _published_pixels(home: Path | None, weights: Weights) -> tuple[Pixels, Pixels] | None:
    """All formats with a name take ImageNet's, but for those that were trained with several; a folder of `transformers`
    says its own. home: that folder."""
    if home is not None:
        return _told_pixels(home / "preprocessor_config.json")
    several = weights.format.endswith("DINOv3") and _width(weights) in _OF_TWO_KINDS_OF_IMAGES
    if weights.format in (_AMBIGUOUS, _TRANSFORMERS) or weights.untold or several:
        return None
    return IMAGENET_MEAN, IMAGENET_STD


def _told_pixels(path: Path) -> tuple[Pixels, Pixels] | None:
    """By a folder of `transformers`; None where it does not tell. Raises UserError for pixels of another scale."""
    says = read_json(path) if path.is_file() else {}
    try:
        return _pixels_in(says, path)
    except (AttributeError, TypeError, ValueError):
        raise UserError(
            f"{path} does not say mean and standard deviation of pixels in numbers; write #pixels=M/M/M/S/S/S."
        ) from None


def _pixels_in(says: dict, path: Path) -> tuple[Pixels, Pixels] | None:
    scale = says.get("rescale_factor") or 1 / 255
    if abs(scale * 255 - 1) > 1e-3 or says.get("do_rescale") is False:
        raise UserError(
            f"{path} has pixels that are not from 0 to 1, which are what an encoder here is shown; write "
            "#pixels=M/M/M/S/S/S with mean and standard deviation of such pixels."
        )
    if says.get("do_normalize") is False:
        return (0.0,) * 3, (1.0,) * 3
    told = says.get("image_mean"), says.get("image_std")
    if None in told:
        return None
    mean, std = (tuple(map(float, v)) if isinstance(v, list) else (float(v),) * 3 for v in told)
    if not all(map(math.isfinite, mean + std)) or min(std) <= 0:
        raise ValueError
    return mean, std


def _width(weights: Weights) -> int:
    return len(weights.tensors.get("patch_embed.proj.bias", ()))
