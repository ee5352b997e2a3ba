"""How things are counted and listed where a person reads it: `1 image`, `2 images`, `a, b and c`, `3.0 GiB`. Every text
that counts asks here."""

from collections.abc import Sequence

_ENDINGS = ("s", "x", "ch", "sh")


def counted(number: float | str, what: str) -> str:
    """The number as it is given, and the word for so many. what: the word for one (`image`, `labelled image`)."""
    return f"{number} {named(number, what)}"


def named(number: float | str, what: str) -> str:
    """The word alone: for one, or for any other number."""
    if str(number) == "1":
        return what
    if what.endswith("y") and what[-2] not in "aeiou":
        return f"{what[:-1]}ies"
    return what + ("es" if what.endswith(_ENDINGS) else "s")


def listed(names: Sequence[str]) -> str:
    """The names in words; empty where there are none."""
    return f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else "".join(names)


def shortened(names: Sequence[str], most: int = 5, between: str = ", ") -> str:
    """The first names, and how many more there are."""
    return between.join([*names[:most], *([f"and {len(names) - most} more"] if len(names) > most else [])])


def size(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:,.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:,.0f} MiB"
