"""A file of class names, one a line, in the order of their numbers."""

from collections import Counter

from prelude.data.errors import UserError


def read_classes(path: str) -> tuple[str, ...]:
    """The names, without the spaces around them. Raises UserError where the file cannot be read or has a name twice."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            names = [line.strip() for line in file if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}); write a text file with one class a line.") from None
    twice = next((name for name, count in Counter(names).items() if count > 1), None)
    if twice is not None:
        raise UserError(f"{path} has the class {twice!r} twice; write each once.")
    return tuple(names)
