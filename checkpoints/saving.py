"""The files of a checkpoint, written into a draft of its folder: all by rank 0, or each rank its part.

- The manifest comes last. It vouches for the other files, so their bytes reach the disk before it exists: after a power
  cut a file system may have kept the later of two writes and lost the earlier.
- Where ranks write their parts, rank 0 hears of each, and vouches for nothing unless all have written theirs.
"""

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

from prelude.checkpoints.manifest import FORMAT, FORMAT_OF_PARTS, MANIFEST, MODEL, OPTIMIZER, PIECES, STATE, part_name
from prelude.checkpoints.saved import listed_pieces
from prelude.checkpoints.state.parts import Part
from prelude.checkpoints.state.portable import PortableState
from prelude.checkpoints.tensor_files import write_json, write_tensors
from prelude.data.whole_files import sync_to_disk
from prelude.pretrain import distributed
from prelude.pretrain.meeting import first_line

_CONTENTS = {MODEL: "model", OPTIMIZER: "optimizer"}


class LostRank(OSError):
    """A rank that was to write its part cannot be asked about it."""


class Task:
    """One call in a thread of its own. It is given an event, to set when only other ranks keep it from its end."""

    def __init__(self, call: Callable[[threading.Event], str | None]):
        self.future, self.own_done = Future(), threading.Event()
        self.thread = threading.Thread(target=self._run, args=(call,), name="checkpoint")
        self.thread.start()

    def has_ended(self) -> bool:
        return self.future.done()

    def result(self, patience: float | None = None) -> str | None:
        """What the call returned, or raised. Waits for it. patience: seconds that other ranks are waited for; raises
        TimeoutError after them."""
        self.own_done.wait()
        return self.future.result(patience)

    def _run(self, call) -> None:
        try:
            self.future.set_result(call(self.own_done))
        except BaseException as error:  # it is the caller's
            self.future.set_exception(error)
        finally:
            self.own_done.set()


def write_state(draft: Path, state: PortableState) -> dict:
    """The tensors of a whole state; what the manifest says of their files. Raises OSError."""
    draft.mkdir()
    return {
        MODEL: write_tensors(draft / MODEL, state.tensors),
        OPTIMIZER: write_tensors(draft / OPTIMIZER, state.moments),
    }


def write_parts(draft: Path, part: Part, ranks: distributed.Aside, own_done: threading.Event) -> dict | None:
    """This rank's part of a state. Returns what the manifest says of the files of all ranks, on rank 0 and once all
    have written theirs; None elsewhere.

    Raises OSError on rank 0, naming the rank and why, where one could not write its part; LostRank on any.
    """
    files, why = {}, ""
    try:
        for content, key in _CONTENTS.items():
            name = part_name(content, ranks.rank, ranks.world_size)
            files[name] = write_tensors(draft / name, part.tensors[key])
    except OSError as error:
        why = f"rank {ranks.rank} on {distributed.host()}: {error}"
    own_done.set()
    try:
        answers = ranks.told_to_first((files, why))
    except RuntimeError as error:
        raise LostRank(f"a rank was lost: {first_line(error)}") from None
    if answers is None:
        return None
    if failures := [why for _, why in answers if why]:
        raise OSError("; ".join(failures[:3]))
    files = {name: entry for files, _ in answers for name, entry in files.items()}
    for name, entry in files.items():
        if (found := os.stat(draft / name).st_size) != entry["bytes"]:
            raise OSError(f"{name} was written with {entry['bytes']} bytes, and rank 0 sees {found}")
    laid = part.laid(ranks.world_size)
    pieces = {content: listed_pieces(laid[key]) for content, key in _CONTENTS.items()}
    return files | {PIECES: write_json(draft / PIECES, pieces)}


def seal(draft: Path, files: dict, rest: dict, serial: int, ranks: int = 0) -> None:
    """Writes what is not tensors, and the manifest of a draft that is whole thereby. ranks: that have written parts."""
    kind = {"format": FORMAT_OF_PARTS, "ranks": ranks} if ranks else {"format": FORMAT}
    files = files | {STATE: write_json(draft / STATE, {"format": kind["format"]} | rest)}
    write_json(draft / MANIFEST, kind | {"serial": serial, "files": files})
    # The folder's list of names is data of its own: without this, synced files may be missing from it.
    sync_to_disk(draft)
