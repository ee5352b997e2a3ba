"""The keys that a config has, the objective's own among them, and what each takes."""

from collections.abc import Iterator
from dataclasses import dataclass

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from prelude.pretrain.annotations import section_in
from prelude.pretrain.config import Config


@dataclass(frozen=True)
class Keys:
    objective: type[BaseModel] | None = None  # the settings of the config's objective; None: not known

    def section(self, path: list[str]) -> type[BaseModel] | None:
        """The model at a place such as [data, shuffle]; None where there is none."""
        model = Config
        for depth, part in enumerate(path):
            if model is None or part not in model.model_fields:
                return None
            model = self.objective if path[: depth + 1] == ["objective"] else section_in(model.model_fields[part])
        return model

    def field(self, path: list[str]) -> FieldInfo | None:
        model = self.section(path[:-1])
        return model.model_fields.get(path[-1]) if model and path else None

    def names(self, path: list[str]) -> list[str]:
        """What may be written at a place."""
        model = self.section(path)
        own = list(model.model_fields) if model else []
        return ["name", *own] if path == ["objective"] and "name" not in own else own

    def all(self, path: tuple[str, ...] = ()) -> Iterator[str]:
        """Every key of every section, in full."""
        for name in self.names(list(path)):
            here = (*path, name)
            if self.section(list(here)) is None:
                yield ".".join(here)
            else:
                yield from self.all(here)
