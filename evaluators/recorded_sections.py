"""What runs and recipes among the sources say of how they are judged: their `evaluate` and `data` sections."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from prelude.checkpoints import source_names
from prelude.checkpoints.store import recorded_config
from prelude.data.errors import UserError
from prelude.evaluators.features.pixels import is_pixels
from prelude.pretrain.config import DataConfig, EvaluateConfig
from prelude.pretrain.config_keys import Keys
from prelude.pretrain.config_words import sentences
from prelude.pretrain.recipes import read_recipe

READ = "range", "max_pixels", "channels"  # keys of a data section, of what its images are


def run_of(source: str) -> Path | None:
    """As `source_names.run_of`; pixels belong to no run."""
    return None if is_pixels(source) else source_names.run_of(source)


def first_section(sources: Sequence[str]) -> EvaluateConfig | None:
    """The first `evaluate` section among the runs of the sources, and the sources that are themselves recipes. Raises
    UserError for a mistake in it."""
    return next((EvaluateConfig.model_validate(section) for section in sections_of(sources, "evaluate")), None)


def sections_of(sources: Sequence[str], name: str) -> Iterator[dict]:
    """The sections of this name, evaluate or data, in the runs of the sources, and in sources that are themselves
    recipes. Raises UserError for a mistake in what evaluations read of one."""
    for path in filter(None, (Path(source) if is_recipe(source) else run_of(source) for source in sources)):
        recipe = read_recipe(path) if path.is_file() else recorded_config(path)
        if section := recipe.get(name):
            _refuse_mistakes(name, section, path if path.is_file() else path / "config.yaml")
            yield section


def _refuse_mistakes(name: str, section: Any, where: Path) -> None:
    """All of an evaluate section is read. Of data, `READ`: a run of before may have keys that are gone."""
    model, read = DataConfig if name == "data" else EvaluateConfig, section
    if name == "data" and isinstance(section, dict):
        read = {"shards": "any"} | {key: section[key] for key in READ if section.get(key)}
    try:
        model.model_validate(read)
    except ValidationError as error:
        if name == "data" and isinstance(section, dict) and not error.errors()[0]["loc"]:
            return  # of keys together, of which some are not looked at
        (sentence, *_) = sentences(error, {name: section}, Keys(), above=(name,))
        raise UserError(f"{where} has a mistake: {sentence}") from None


def is_recipe(source: str) -> bool:
    """Whether this is the file of a recipe, and not one of weights."""
    return Path(source).suffix in (".yaml", ".yml") and Path(source).is_file()
