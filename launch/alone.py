"""For doors whose work one process does."""

from prelude.data.errors import UserError
from prelude.pretrain import launchers


def refuse_ranks(command: str) -> None:
    """Before anything is done, which each rank would do. Raises UserError where a launcher has started several."""
    count = launchers.world_size()
    if count > 1:
        raise UserError(
            f"prelude {command} is the work of one process, and {count} were started; start it without a launcher."
        )
