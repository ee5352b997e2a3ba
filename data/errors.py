"""The kinds of failure that a person is told about in one sentence, and the stop that is none.

They stand on the lowest floor so that every folder can raise them; the doors in `launch/` print the
sentence without a traceback and leave with the exit code of the class.
"""

import os

from prelude.data.signed_urls import shown

OTHER_FOLDER = "PRELUDE_OTHER_FOLDER"  # in the environment of runs whose `run_dir` is not the user's to write


class _Told(Exception):
    """What it says goes to logs and records, so that URLs in it are `shown`."""

    def __str__(self) -> str:
        return shown(super().__str__())


class UserError(_Told):
    """A mistake that the user can mend. The message says what is wrong, where, and what to write instead."""

    exit_code = 2


class RunStopped(_Told):
    """A run that cannot go on (too many bad samples, a loss that stays non-finite); says what to look at."""

    exit_code = 3


class Stopped(_Told):
    """A wait that ended because the process was asked to end; says what was waited for. Run again, it goes on."""

    exit_code = 75


def another_folder() -> str:
    """What the user writes for a run that is to lie elsewhere."""
    return os.environ.get(OTHER_FOLDER) or "another run_dir"


def in_one_line(error: BaseException, longest: int | None = None, *, typed: bool = False) -> str:
    """What somebody else's error says, `longest` characters of it; with its type if `typed`, or if it says nothing."""
    kind, text = type(error).__name__, " ".join(str(error).split())
    return (f"{kind}: {text}" if typed and text else text or kind)[:longest]


def cause_of(error: OSError) -> str:
    """Why the system did not do it, in a few words. What raises an OSError need not give it the system's words."""
    words = error.strerror or (os.strerror(error.errno) if error.errno else str(error))
    return words or type(error).__name__
