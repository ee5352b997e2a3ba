"""What `prelude doctor` finds of one thing."""

from collections.abc import Callable
from dataclasses import dataclass, field

from prelude.data.errors import in_one_line


@dataclass
class Finding:
    """found: at least one line. wrong: a sentence for each thing that is, with what to do about it."""

    title: str
    found: list[str]
    wrong: list[str] = field(default_factory=list)


def looked_at(title: str, look: Callable[[], Finding]) -> Finding:
    """What `look` finds; where the machine does not even let it look, that is what is wrong."""
    try:
        return look()
    except Exception as error:  # whatever it is: all else is still to be told
        why = in_one_line(error, typed=True)
        return Finding(title, ["not known"], [f"Nothing can be found out of the {title} ({why}); mend that first."])
