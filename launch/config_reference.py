"""Every key of a config: what it takes, its default and its meaning, read off the typed models that check a config."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from prelude.evaluators.finetuning.recipe import NAME as FINE_TUNE
from prelude.evaluators.finetuning.recipe import FineTuneOptions
from prelude.launch.key_meanings import meaning
from prelude.objectives.options import OPTIONS
from prelude.pretrain.annotations import section_by_name, section_in
from prelude.pretrain.config import Config
from prelude.pretrain.config_words import wanted

OF_OBJECTIVES: dict[str, type[BaseModel]] = {
    **OPTIONS,
    FINE_TUNE: FineTuneOptions,
}  # what `objective` may hold, by name


@dataclass(frozen=True)
class Key:
    name: str  # in full: data.shuffle.window
    owner: type[BaseModel]
    field: FieldInfo
    objective: str | None = None  # whose option it is

    @property
    def section(self) -> type[BaseModel] | None:
        return section_in(self.field)

    @property
    def takes(self) -> str:
        return "a section" if self.section else wanted(self.field)

    @property
    def is_required(self) -> bool:
        return self.field.is_required()

    @property
    def default(self) -> str | None:
        """As JSON; None where there is none, or where it is that of the section's own keys."""
        if self.is_required:
            return None
        value = self.field.get_default(call_default_factory=True)
        return None if self.section and value is not None else json.dumps(value)

    @property
    def meaning(self) -> str:
        """A sentence, with YAML's words."""
        text = meaning(self.owner, self.name.rpartition(".")[2]).replace("None:", "null:")
        text = text[0].upper() + text[1:] if re.match(r"[a-z]+[ ,]", text) else text
        return text if not text or text.endswith(".") else f"{text}."


def keys_of(model: type[BaseModel], above: str, objective: str | None = None) -> Iterator[Key]:
    """Every key of a section, and of the sections below it. above: what its keys begin with."""
    for name, field in model.model_fields.items():
        yield Key(f"{above}{name}", model, field, objective)
        if below := section_in(field):
            yield from keys_of(below, f"{above}{name}.", objective)
        elif below := section_by_name(field):
            yield from keys_of(below, f"{above}{name}.NAME.", objective)


def all_keys() -> list[Key]:
    """Those of every run, then those of each objective."""
    found = list(keys_of(Config, ""))
    for objective, model in OF_OBJECTIVES.items():
        found += keys_of(model, "objective.", objective)
    return found
