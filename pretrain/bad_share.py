"""When samples that cannot be read end a run."""

from pathlib import Path

from prelude.data.errors import RunStopped


def refuse_many(num_bad: int, num_read: int, share: float, few: int, listed: Path) -> None:
    """Raises RunStopped where more than a share of the samples read so far are bad, and more than a few, of which it
    says nothing yet. listed: the file that names them."""
    if num_read and num_bad / num_read > share and num_bad > (few if share else 0):
        raise RunStopped(
            f"{num_bad:.0f} of {num_read:.0f} samples could not be read, more than data.max_bad_share={share}; see "
            f"{listed}."
        )
