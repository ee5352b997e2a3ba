"""A file of TensorBoard's events that no full disk can make the end of a run.

torch's SummaryWriter writes in a thread of its own, which prints a traceback and dies where the disk fails, and raises
in the training loop from then on. The events are the same here; the file grows as a run's other logs do.
"""

import io
import socket
import time
from os import getpid
from pathlib import Path

import numpy as np
from PIL import Image

from prelude.pretrain.files import Growing, make_folder


class EventFile(Growing):
    """Events in `folder`, in a file of this process. purge_step: earlier files count for nothing from there on."""

    def __init__(self, folder: Path, purge_step: int):
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        super().__init__(folder / f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{getpid()}.0")
        self._append(
            Event(wall_time=time.time(), step=purge_step, file_version="brain.Event:2"),
            Event(wall_time=time.time(), step=purge_step, session_log=SessionLog(status=SessionLog.START)),
        )

    def add_scalars(self, step: int, values: dict[str, float]) -> None:
        from torch.utils.tensorboard import summary

        self._append(*(_event(step, summary.scalar(name, value)) for name, value in values.items()))

    def add_text(self, step: int, name: str, text: str) -> None:
        from torch.utils.tensorboard import summary

        self._append(_event(step, summary.text(name, text)))

    def add_picture(self, step: int, name: str, picture: Image.Image) -> None:
        """Dropped where the disk does not take it: pictures are too large to wait in memory."""
        from torch.utils.tensorboard import summary

        pixels = np.asarray(picture.convert("RGB"))
        self._append(_event(step, summary.image(name, pixels, dataformats="HWC")), keep=False)

    def close(self) -> None:
        self.sync()

    def _append(self, *events, keep: bool = True) -> None:
        from tensorboard.summary.writer.record_writer import RecordWriter

        records = io.BytesIO()
        writer = RecordWriter(records)
        for event in events:
            writer.write(event.SerializeToString())
        self.append(records.getvalue(), keep)

    def _write(self, content: bytes) -> None:
        make_folder(self.path.parent)
        super()._write(content)


def _event(step: int, summary):
    from tensorboard.compat.proto.event_pb2 import Event

    return Event(wall_time=time.time(), step=step, summary=summary)
