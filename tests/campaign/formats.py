"""Every published format in a line, as it was found to load: tensors, features, changes of positions and of channels,
and what is said of three damaged files. `python tests/campaign/formats.py` prints a table in Markdown.

The files are those of `tests/helpers/published.py`: the layouts of the methods' own code, at small widths, with
features that are computed without the code under test. Ends with 1 where one of them is wrong.
"""

import copy
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

from published import METHODS, SIDE, Published
from published_rotary import ROTARY

from prelude.checkpoints.convert.fit import fit
from prelude.checkpoints.sources import open_encoder, open_weights
from prelude.data.errors import UserError
from prelude.pretrain.encoders import build_encoder

HEAD = (
    "format",
    "tensors",
    "features differ by",
    "positions",
    "one channel",
    "a tensor missing",
    "one too many",
    "cut",
)
LIMIT = 1e-6  # of the largest feature


def main() -> int:
    print(f"| {' | '.join(HEAD)} |\n|{'---|' * len(HEAD)}")
    wrong = 0
    for name, published in (METHODS | ROTARY).items():
        with tempfile.TemporaryDirectory() as folder:
            row, right = _row(name, published(), Path(folder) / "weights.pth")
        print(f"| {' | '.join(row)} |", flush=True)
        wrong += not right
    return int(wrong > 0)


def _row(name: str, published: Published, path: Path) -> tuple[list[str], bool]:
    torch.save(published.tree, path)
    opened = open_encoder(f"{path}{published.words}")
    side = SIDE if hasattr(opened.model, "patch_embed") else 64
    images = torch.randn(2, 3, side, side, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        model = opened.model.double()
        found, expected = (
            model.forward_features(images) if published.maps else model(images),
            published.features(images),
        )
    difference = ((found - expected).abs().max() / expected.abs().max()).item()
    total = len(opened.model.state_dict())
    damaged = [_refusal(published, path, damage) for damage in (_missing, _one_too_many, _cut)]
    changes = [_change(published, path, opened.config, key, value) for key, value in _changes(side)]
    row = [name, f"{published.loaded} of {total}", f"{difference:.0e}", *changes, *damaged]
    return row, difference <= LIMIT and f"{published.loaded} of {total} tensors" in opened.loaded and all(damaged)


def _changes(side: int) -> list[tuple[str, int]]:
    return [("image_size", side * 3 // 2), ("in_chans", 1)]


def _change(published: Published, path: Path, config, key: str, value: int) -> str:
    """What is said of the same weights in an encoder for other images."""
    torch.save(published.tree, path)
    model = build_encoder(config.model_copy(update={key: value}), seed=0)
    try:
        fitted = fit(model, open_weights(f"{path}{published.words}"), "it")
    except UserError as error:
        return f"refused: {str(error).partition(') ')[2].partition(';')[0]}"
    said = [change for change in fitted.changes if "resampled" in change or "channels" in change]
    return said[0] if said else "as they are"


def _missing(network: dict, name: str) -> None:
    del network[name]


def _one_too_many(network: dict, name: str) -> None:
    network[f"{name}_too"] = network[name]


def _cut(network: dict, name: str) -> None:
    network[name] = network[name][:-1]


def _refusal(published: Published, path: Path, damage: Callable[[dict, str], None]) -> str:
    """The sentence without the file's name; empty where the file was taken."""
    whole = copy.copy(published.network)
    try:
        damage(published.network, published.needs[0])
        torch.save(published.tree, path)
        open_encoder(f"{path}{published.words}")
        return ""
    except UserError as error:
        return str(error).partition(": ")[2].removesuffix("; write the encoder that they were trained with.")
    finally:
        published.network.clear()
        published.network.update(whole)


if __name__ == "__main__":
    raise SystemExit(main())
