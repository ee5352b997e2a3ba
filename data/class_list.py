"""A file of class names, one a line, in the order of their numbers."""

from collections import Counter
from collections.abc import Sequence

from prelude.data.errors import UserError


def read_classes(path: str) -> tuple[str, ...]:
    """The names, without the spaces around them; one may come twice. Raises UserError where the file cannot be read."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            return tuple(line.strip() for line in file if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}); write a text file with one class a line.") from None


def refuse_repeats(names: Sequence[str], where: str) -> None:
    """For labels that are such names, of which one that comes twice has no number. Raises UserError."""
    twice = next((name for name, count in Counter(names).items() if count > 1), None)
    if twice is not None:
        raise UserError(
            f"{where} has the class {twice!r} more than once, and a label that is a name does not say which is meant; "
            "give each a name of its own, there and in the labels, and keep every line, for lines are the numbers."
        )
