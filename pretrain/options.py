"""What settings are made of: strict models, and the kinds of value that several have. Nothing here needs torch."""

import os
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from prelude.pretrain.annotations import takes


class Strict(BaseModel):
    """Refuses a key that nobody reads, a number that is not finite, and true or false for a number."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        annotation = cls.model_fields[info.field_name].annotation
        given = value if isinstance(value, (list, tuple)) else [value]
        if any(isinstance(one, bool) for one in given) and not (takes(annotation, bool) or takes(annotation, Any)):
            raise PydanticCustomError("not_a_number", "true and false are no numbers")
        return value

    def _is_set(self, key: str) -> bool:
        return getattr(self, key) != type(self).model_fields[key].default


class Section(Strict):
    """A section of a config, whose defaults are as strict as what is written."""

    model_config = ConfigDict(validate_default=True)


class Options(Strict):
    """Base of an objective's settings."""


def _plain(value: str) -> str:
    if not value.strip() or "\0" in value:
        raise PydanticCustomError("no_text", "write some text")
    return value


@dataclass(frozen=True)
class Called:
    """What a text is, for whoever is told to write one."""

    one: str
    many: str


Text = Annotated[str, AfterValidator(_plain)]
Texts = Annotated[list[Text], Field(min_length=1)]
FilePath = Annotated[Text, AfterValidator(os.path.expanduser), Called("a path", "paths")]  # of a file or a folder
Shards = Annotated[Text, Called("a path or pattern", "paths or patterns")]
AnyShards = Shards | Annotated[list[Shards], Field(min_length=1)]
Count = Annotated[int, Field(ge=1)]
Index = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]


def _ordered_shares(value: tuple[float, float]) -> tuple[float, float]:
    if not 0 < value[0] <= value[1] <= 1:
        raise ValueError("write two shares of the area, such as [0.2, 1.0]")
    return value


# The least and the largest area of a crop or block, as shares of the image.
AreaRange = Annotated[tuple[float, float], AfterValidator(_ordered_shares)]


def number(bound: float) -> str:
    """In full: a bound of 2147483648 is written as that."""
    return str(int(bound)) if float(bound).is_integer() and abs(bound) < 1e16 else f"{bound:.15g}"
