"""From what a config says of its data to one index: shards or several data sets, and what is taken of them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from prelude.data.absent import told_as
from prelude.data.counting import counted
from prelude.data.decode import MAX_PIXELS, ValueRange
from prelude.data.errors import RunStopped, UserError
from prelude.data.image_folder import ImageFolder
from prelude.data.remote_shards import RemoteShard
from prelude.data.select import Selection, selected
from prelude.data.shards import ShardIndex, expand_shards, is_stream


@dataclass(frozen=True)
class DataSet:
    """One of several. weight: relative to those of the others that it is mixed with, above 0."""

    shards: str | list[str]
    weight: float = 1.0
    image: str = ""  # extension of the image's member, "" for any
    select: Selection | None = None


Data = str | list[str] | Mapping[str, DataSet]
"""Shards, or several data sets by name."""


def check_there(data: Data, allow_commands: bool = False) -> None:
    """Refuses shards that this node lacks. Raises UserError, and RunStopped for what a store does not give."""
    if not isinstance(data, Mapping):
        expand_shards(data, allow_commands)
        return
    for name, one in data.items():
        _told_as(f"data.mix.{name}", lambda one=one: _counted(one.shards))


def index_of(
    data: Data,
    *,
    label: str = "",
    image: str = "",
    select: Selection | None = None,
    max_bad_share: float = 1.0,
    value_range: ValueRange | Literal["auto"] | None = None,
    max_pixels: int = MAX_PIXELS,
    channels: int | None = None,
) -> ShardIndex:
    """The samples that a run learns from; several data sets lie in the order of their names.

    image, select: of shards; each data set of several has its own. max_bad_share: that damage may have cost, of each.
    channels: of `ShardIndex`.
    Raises UserError where too much is lost, nothing is left, or a part of several is a stream, and as `ShardIndex`.
    """
    read_as = {"value_range": value_range, "max_pixels": max_pixels}
    if not isinstance(data, Mapping):
        index = _sound(ShardIndex(data, label, **read_as, image=image, channels=channels), data, max_bad_share)
        return selected(index, select, "data.select")
    parts = {}
    for name in sorted(data):
        one = data[name]

        def part(name: str = name, one: DataSet = one) -> ShardIndex:
            shards = _counted(one.shards)
            index = ShardIndex(shards, label, max_pixels=max_pixels, image=one.image, channels=channels)
            return selected(_sound(index, one.shards, max_bad_share), one.select, f"data.mix.{name}.select")

        parts[name] = _told_as(f"data.mix.{name}", part)
    return ShardIndex.joined(parts, {name: data[name].weight for name in parts}, **read_as)


def check_volumes_there(shards: str | list[str]) -> None:
    """As `check_there` does of images."""
    _told_as("data.volumes", lambda: _counted(shards))


def index_of_volumes(
    data: DataSet,
    *,
    label: str = "",
    max_bad_share: float = 1.0,
    value_range: ValueRange | None = None,
    max_pixels: int = MAX_PIXELS,
) -> ShardIndex:
    """The volumes beside a run's images. Parameters and errors as those of `index_of`."""

    def read() -> ShardIndex:
        shards = _counted(data.shards)
        index = ShardIndex(shards, label, value_range=value_range, max_pixels=max_pixels, image=data.image)
        return selected(_sound(index, data.shards, max_bad_share), data.select, "data.volumes.select")

    return _told_as("data.volumes", read)


def found(shards: str | list[str], urls: list[str]) -> str | list[str]:
    """`urls`, to which `shards` expand, where these tell what was asked of a store or a folder; it is asked once."""
    return urls if any(isinstance(url, RemoteShard | ImageFolder) for url in urls) else shards


def _counted(shards: str | list[str]) -> str | list[str]:
    urls = expand_shards(shards, allow_commands=True)  # none is run: it is refused here
    if stream := next(filter(is_stream, urls), None):
        raise UserError(f"{stream} is a stream, whose samples nobody can count; copy it to a disk.")
    return found(shards, urls)


def _sound(index: ShardIndex, shards: str | list[str], max_bad_share: float) -> ShardIndex:
    if index.num_lost > max_bad_share * (index.num_samples + index.num_lost):
        raise UserError(
            f"{counted(index.num_lost, 'sample')} of data.shards={shards!r} lost or damaged, beside "
            f"{index.num_samples} sound "
            f"ones (the first: {index.first_problem()}); mend the shards, or raise data.max_bad_share."
        )
    return index


def _told_as(key: str, function):
    """`function()`, whose complaints name the key of a config."""
    try:
        with told_as(f"{key}.shards=", image=f"{key}.image="):
            return function()
    except (UserError, RunStopped) as error:
        raise type(error)(f"{key} cannot be used: {error}") from None
