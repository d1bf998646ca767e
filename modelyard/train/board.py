"""TensorBoard's event files, written in place: its own writer does so in a thread that ends in a traceback on a full disk."""

from __future__ import annotations

import io
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from modelyard.train.appending import AppendedFile


class Board:
    """Scalars of a run as one more event file in `folder`; TensorBoard drops what older files have from `first_step` on."""

    def __init__(self, folder: Path, *, first_step: int, complain: Callable[[str], None]):
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        self._file = AppendedFile(folder / name, complain)
        self._write(Event(file_version="brain.Event:2"))
        self._write(Event(step=first_step, session_log=SessionLog(status=SessionLog.START)))

    def add_scalars(self, values: dict[str, float], step: int) -> None:
        self._write(
            Event(
                step=step,
                summary=Summary(
                    value=[Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
                ),
            )
        )

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        record = io.BytesIO()
        RecordWriter(record).write(event.SerializeToString())
        self._file.write(record.getvalue())

    def close(self) -> None:
        self._file.close()
