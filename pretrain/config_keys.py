"""The keys that a config has, the objective's own among them, and what each takes."""

from collections.abc import Iterator
from dataclasses import dataclass

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from prelude.pretrain.annotations import section_by_name, section_in
from prelude.pretrain.config import Config


@dataclass(frozen=True)
class Keys:
    objective: type[BaseModel] | None = None  # the settings of the config's objective; None: not known

    def section(self, path: list[str]) -> type[BaseModel] | None:
        """The model at a place such as [data, shuffle]; None where there is none."""
        model, by_name = Config, None
        for depth, part in enumerate(path):
            if by_name:
                model, by_name = by_name, None
                continue
            if model is None or part not in model.model_fields:
                return None
            field = model.model_fields[part]
            by_name = section_by_name(field)
            model = self.objective if path[: depth + 1] == ["objective"] else section_in(field)
        return model

    def holds_names(self, path: list[str]) -> bool:
        """Whether what is below a place are names that a person chooses, as those of data sets in [data, mix]."""
        field = self.field(path)
        return field is not None and section_by_name(field) is not None

    def field(self, path: list[str]) -> FieldInfo | None:
        if len(path) > 1 and self.holds_names(path[:-1]):
            return FieldInfo.from_annotation(self.section(path))
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
