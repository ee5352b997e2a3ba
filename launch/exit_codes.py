"""How a door ends: 0 done, 2 a user's mistake, 3 a run that stopped itself, 4 done in part, 75 pre-empted (run it
again)."""

import sys
from collections.abc import Callable
from typing import NoReturn

from prelude.data.errors import RunStopped, UserError

INCOMPLETE = 4  # some of what was asked for is missing, and what there is says which
PREEMPTED = 75  # EX_TEMPFAIL: schedulers that requeue on a code can use it


def leave(code: int) -> NoReturn:
    """Ends a launched rank. What failed leaves as usual, which also ends the loader's workers."""
    if code in (0, PREEMPTED):
        from prelude.pretrain import distributed  # whose torch a rank that ran has, and a refusal needs not

        distributed.leave(code)
    raise SystemExit(code)


def door(main: Callable[[], int]) -> int:
    """Runs `main`, telling a foreseen failure in its own sentence instead of a traceback."""
    try:
        return main()
    except (UserError, RunStopped) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
