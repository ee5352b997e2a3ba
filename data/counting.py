"""How things are counted where a person reads it: `1 image`, `2 images`. Every text that counts asks here."""

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
