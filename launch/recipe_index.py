"""What the shipped recipes are: read off their headers and settings, for a table, a page and other tools.

- A recipe opens with four lines, `Trains`, `Takes`, `Reaches` and `Command`: what is said of it has no other home.
- Image size and batch are those of its settings, what it is built on included.
- Speeds that were measured lie in configs/figures.json, with the machine. Nothing here imports torch.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from prelude.evaluators.finetuning.recipe import check_recipe
from prelude.objectives import options_for
from prelude.pretrain.recipes import SHIPPED, bases_of, find_recipe, is_of_fine_tuning, load_config, read_recipe

FINE_TUNING = "fine-tuning"
_HEADER = ("Trains", "Takes", "Reaches", "Command")
_PUBLISHED, _NOT_MEASURED = "published", "not measured"


@dataclass(frozen=True)
class Recipe:
    name: str
    objective: str  # or fine-tuning
    encoder: str  # of timm; empty where the source has it
    image_size: int | list[int] | None  # pixels: of a side, or height and width; None: as the source has it
    global_batch: int | None  # as far as they are written
    epochs: float | None
    trains: str
    takes: str
    reaches: str
    command: str
    bases: list[str]  # what it is built on, the nearest first
    result: str  # measured, published or not measured
    images_per_second: list[int] | None = None  # measured: least and most; None: it was not
    measured_on: str | None = None  # the machine
    precision: str | None = None  # of the measurement

    @property
    def pixels(self) -> str:
        """For a person."""
        sides = self.image_size if isinstance(self.image_size, list) else [self.image_size]
        return " x ".join(map(str, sides)) if self.image_size else "of the source"

    @property
    def speed(self) -> str:
        """For a person; empty where it was not measured."""
        if not self.images_per_second:
            return ""
        least, most = self.images_per_second
        return f"{least} to {most} images/s on {self.measured_on} in {self.precision}"


def shipped() -> list[Recipe]:
    """All of them, by name."""
    figures = json.loads((SHIPPED / "figures.json").read_text())
    return [_recipe(path, figures) for path in sorted(SHIPPED.glob("*.yaml"))]


def described(recipe: str) -> Recipe:
    """One of them, or any other file, which needs no header. Raises UserError for settings that cannot be."""
    path = find_recipe(recipe)
    if is_of_fine_tuning(read_recipe(path)):
        check_recipe(path)
    else:
        load_config(path, [], options_for)
    return _recipe(path, json.loads((SHIPPED / "figures.json").read_text()))


def header_of(path: Path) -> dict[str, str]:
    """The four lines, as far as they are there."""
    lines = path.read_text().splitlines()[: len(_HEADER)]
    found = {}
    for name, line in zip(_HEADER, [*lines, *[""] * len(_HEADER)], strict=False):
        found[name.lower()] = line.removeprefix(f"# {name}: ") if line.startswith(f"# {name}: ") else "not said"
    return found


def as_typed(command: str) -> str:
    """A command of a recipe's header as it works here: in a checkout as it stands, else by the names that an installed
    package has for its doors and its recipes."""
    if (SHIPPED.parent / "pyproject.toml").is_file():
        return command
    command = re.sub(r"\blaunch/(\w+)\.py", r"--module prelude.launch.\1", command)
    return re.sub(r"\bconfigs/(\w+)\.yaml", r"\1", command)


def as_json(recipes: Iterable[Recipe]) -> str:
    return json.dumps([asdict(recipe) for recipe in recipes], indent=1)


def as_page(recipes: Iterable[Recipe]) -> str:
    """docs/recipes.md."""
    groups: dict[str, list[Recipe]] = {}
    for recipe in recipes:
        groups.setdefault(recipe.objective, []).append(recipe)
    lines = [_PAGE]
    for objective in sorted(groups, key=lambda name: (name == FINE_TUNING, name)):
        lines += [
            f"## {objective}",
            "",
            "| recipe | trains | pixels | batch | takes | result |",
            "|---|---|---|---|---|---|",
        ]
        lines += [_row(recipe) for recipe in groups[objective]]
        lines.append("")
    return "\n".join(lines)


def _recipe(path: Path, figures: dict) -> Recipe:
    header, values = header_of(path), read_recipe(path)
    header |= {"command": as_typed(header["command"])}
    objective, encoder = values.get("objective") or {}, values.get("encoder") or {}
    train, figure = values.get("train") or {}, figures.get(path.stem, {})
    return Recipe(
        name=path.stem,
        objective=objective.get("name", FINE_TUNING),
        encoder=encoder.get("name", ""),
        image_size=encoder.get("image_size") or objective.get("image_size"),
        global_batch=train.get("global_batch"),
        epochs=train.get("epochs"),
        **header,
        bases=[base.stem for base in bases_of(path)[1:]],
        result=_kind(header["reaches"]),
        **figure,
    )


def _kind(reaches: str) -> str:
    if reaches.startswith(_PUBLISHED):
        return _PUBLISHED
    return _NOT_MEASURED if _NOT_MEASURED in reaches else "measured"


def _row(recipe: Recipe) -> str:
    takes = "; ".join(filter(None, [recipe.takes.rstrip("."), recipe.speed]))
    reaches = recipe.reaches.rstrip(".")
    result = reaches if reaches.startswith((_PUBLISHED, _NOT_MEASURED)) else f"**{recipe.result}**: {reaches}"
    cells = [f"`{recipe.name}`", recipe.trains.rstrip("."), recipe.pixels, str(recipe.global_batch), takes, result]
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


_PAGE = """# Recipes

Every file of `configs/`, by the objective that it trains with. The page is written by
`prelude recipes --markdown > docs/recipes.md`; `prelude recipes NAME` shows one recipe with everything that it sets.

- **measured** figures are this project's own, with their commands in [results.md](results.md). Published ones are those
  of the authors, and were not repeated here.
- Every time and memory is given with its device and precision. A time is that of a run from its first to its last step
  unless stated otherwise; for published ones, device and precision are as far as the authors tell.
- Planned memory is what `prelude pretrain --config NAME --dry-run --device rtx4090` says: neither a GPU nor the
  method's result was measured. Where it is given, the micro-batch is the largest power of two that leaves a tenth of 24
  GiB free.
- Pixels are the side of what the encoder sees. The batch is that of an optimizer step, over all ranks.

Which one to begin with: for photographs of 64 to 128 pixels `mae_vit_small_96`, or `vicreg_resnet50_96` where a convnet
is wanted; `mae_vit_small_224` and `vicreg_resnet50_224` for larger ones; `mae_cifar10` to try things out on a CPU.

## A recipe of your own

```
base: mae_vit_small_96 # a shipped recipe, or a file beside this one
run_dir: runs/mine
data: {shards: shards/train-*.tar}
train: {epochs: 100}
```

A recipe takes everything from its `base` except the run folder; the file only says what differs. Without a `run_dir`
the run lies beside that of the base, under the name of the file (`runs/mine` for `mine.yaml`). Sections are merged key
by key, and a list is replaced as a whole. A section that names another encoder, objective or optimizer begins anew, and
an empty one (`mix: {}`) empties it. A base may have a base. A run keeps the resolved settings in its `config.yaml`.
`prelude keys` lists the names of all keys; `prelude keys optimizer` prints a section's with defaults and meanings.

### Batch and learning rate

- `train.global_batch` is the number of images in an optimizer step, over all GPUs together.
- With `optimizer.lr_rule: per_256`, the default, the peak learning rate is `optimizer.lr` × `train.global_batch` / 256,
  so it follows the batch. `absolute` takes `optimizer.lr` as it is.
- By default (`train.micro_batch: auto`) each GPU holds its whole share of the batch at once. `train.micro_batch=64`
  splits the share into pieces of 64 images, whose gradients are added up before the step: less memory, the same result
  (except that batch norms see the pieces). Barlow Twins, VICReg, LeJEPA and MSBReg refuse this, as their loss compares
  the images of the batch with each other; they need a smaller `train.global_batch`.
- `--dry-run` tells which micro-batch fits; [Memory](cluster.md#memory) has what else saves memory.
"""
