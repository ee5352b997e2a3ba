"""What a start would meet in its run folder, which `--dry-run` reads and leaves as it is."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

from pydantic import BaseModel

from prelude.checkpoints.saved import read_meta, refuse_incomplete
from prelude.checkpoints.store import Store
from prelude.data.errors import UserError
from prelude.launch.planning import Planned
from prelude.launch.run_folder import not_written, through_a_link
from prelude.pretrain import distributed, precision
from prelude.pretrain.config import Config
from prelude.pretrain.resume import accept, changed_settings, is_own, progress_after, starting_point
from prelude.pretrain.run_lock import RunLock
from prelude.pretrain.schedules import beginning


def print_with_outlook(planned: Planned, *run) -> None:
    """With what is said of `run`, the arguments of `outlook`. Raises UserError as that does, once all else is told."""
    try:
        planned.add_row("run folder", outlook(*run))
    except UserError:
        planned.add_row("run folder", "a start would be refused")
        planned.print()
        raise
    planned.print()


def outlook(config: Config, loader, options: type[BaseModel], has_ended: Callable[[Path], bool] | None = None) -> str:
    """Whether a start would begin anew or go on, and from where. `loader` is moved there.

    options: what the objective's own settings are read by. has_ended: whether the run of a checkpoint is over before
    its last step; by default, whether it was when it was saved. Raises UserError, in the words of the start, where it
    would be refused.
    """
    path = Path(config.run_dir)
    RunLock(path).refuse_held()
    if refusal := through_a_link(path) or _not_writable(path):
        raise UserError(refusal)
    checkpoint = starting_point(Store(path / "checkpoints"), config)
    if checkpoint is None:
        return f"a start would begin anew: {path} {'has no checkpoint' if path.exists() else 'would be made'}"
    refuse_incomplete(checkpoint)
    meta = read_meta(checkpoint)
    accept(meta, checkpoint, config, options, loader)
    progress, notices = progress_after(meta, config, beginning(config, loader.num_samples), checkpoint)
    if progress.step == progress.num_steps:
        return f"finished at step {progress.step}: a start would train nothing"
    if has_ended is None:
        ended = meta.get("ended", False) and not changed_settings(meta["config"], config, options)
    else:
        ended = has_ended(checkpoint)
    if ended:
        return f"ended early, at step {progress.step} of {progress.num_steps}: a start would train nothing"
    place = checkpoint.name if is_own(checkpoint, config) else checkpoint
    _, otherwise = precision.resolve(config, distributed.device(), meta)
    notices += filter(None, [otherwise])
    found = f"a start would resume at step {progress.step} of {progress.num_steps}, from {place}"
    return "; ".join([found, *notices])


def _not_writable(path: Path) -> str | None:
    there = next(place for place in (path, *path.parents) if os.path.lexists(place))
    if not there.is_dir():
        return not_written(path, NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)))
    if not os.access(there, os.W_OK | os.X_OK):
        return not_written(path, PermissionError(errno.EACCES, os.strerror(errno.EACCES)))
    return None
