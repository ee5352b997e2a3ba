"""The settings of an objective, as the config knows them: strict, and readable without torch."""

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict


class Options(BaseModel):
    """Base of an objective's settings: strict, so that a key nobody reads is refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def _ordered_shares(value: tuple[float, float]) -> tuple[float, float]:
    if not 0 < value[0] <= value[1] <= 1:
        raise ValueError("write two shares of the area, such as [0.2, 1.0]")
    return value


# The least and the largest area of a crop or block, as shares of the image.
AreaRange = Annotated[tuple[float, float], AfterValidator(_ordered_shares)]
