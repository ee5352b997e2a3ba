"""What does not fit, in words that stay short where a whole block or the width of everything is wrong."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import groupby

from prelude.data.counting import counted

Shape = tuple[int, ...]
_BY_NAME = 5  # mistakes of one kind, up to which each tensor is named


def mistakes_in_words(
    missing: Iterable[str], unplaced: Iterable[str], misshapen: Mapping[str, tuple[Shape, Shape]]
) -> list[str]:
    """misshapen: name -> (shape in the file, shape in the model)."""
    words = [f"{what} {'are' if many else 'is'} missing" for what, many in _together(list(missing))]
    words += [f"{what} {'have' if many else 'has'} no place" for what, many in _together(list(unplaced))]
    each = [f"{name} is {has} instead of {wants}" for name, (has, wants) in misshapen.items()]
    if len(each) <= _BY_NAME:
        return words + each
    sides = Counter(pair for shapes in misshapen.values() for pair in zip(*shapes, strict=False) if pair[0] != pair[1])
    most = f" ({sides.most_common(1)[0][0][0]} instead of {sides.most_common(1)[0][0][1]} in most)" if sides else ""
    return [*words, f"{counted(len(each), 'tensor')} with another shape{most}, of which {each[0]}"]


def _together(names: list[str]) -> list[tuple[str, bool]]:
    """(the tensors in words, whether they are several): neighbours of one part together where there are many."""
    if len(names) <= _BY_NAME:
        return [(name, False) for name in names]
    parts: dict[str, list[str]] = {}
    for name in names:
        parts.setdefault(_part(name), []).append(name)
    found = []
    for _, neighbours in groupby(enumerate(parts), lambda at: _in_a_row(*at)):
        run = [part for _, part in neighbours]
        held = [name for part in run for name in parts[part]]
        if len(held) == 1:
            found.append((held[0], False))
        else:
            span = run[0] if len(run) == 1 else f"{run[0]} to {run[-1]}"
            found.append((f"{counted(len(held), 'tensor')} of {span}", True))
    return found


def _part(name: str) -> str:
    """`blocks.3` of a numbered part, else what stands before the first dot."""
    numbered = re.match(r"(?:[^.]*[^.\d][^.]*\.)+?\d+(?=\.)", name)
    return numbered[0] if numbered else name.partition(".")[0]


def _in_a_row(place: int, part: str) -> tuple[str, int]:
    """The same for parts that stand and count on together: blocks.1, blocks.2."""
    stem, _, number = part.rpartition(".")
    return (stem, int(number) - place) if number.isdigit() else (part, place)
