"""TensorBoard's curves of a run, written as they come.

tensorboard's own writer has a thread, which a full disk kills: the next call then raises, and what
was queued is lost. A scalar is a hundred bytes; writing it in place costs less than the queue.
"""

import io
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from fastat.atomic import append


class EventFile:
    """A file of scalars in ``folder``. On a full disk points are lost, with a note, not the run.

    Args:
        purge_step: points from this step on that earlier files hold are not shown.
        note: hears, once for each time that the disk becomes full, that points are lost.

    Raises:
        OSError: the file cannot be made.
    """

    def __init__(self, folder: Path, *, purge_step: int, note: Callable[[str], None]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        seconds, rest = divmod(time.time_ns(), 10**9)
        host = f"{socket.gethostname()}.{os.getpid()}.{rest}"
        name = f"events.out.tfevents.{seconds:010}.{host}"
        self._path, self._note, self._failing = folder / name, note, False
        self._file = self._path.open("wb", buffering=0)
        self._write(Event(file_version="brain.Event:2"))
        self._write(Event(step=purge_step, session_log=SessionLog(status=SessionLog.START)))

    def __enter__(self) -> "EventFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add_scalar(self, name: str, value: float, step: int) -> None:
        """A point of the curve ``name``."""
        self._write(Event(step=step, summary=Summary(value=[{"tag": name, "simple_value": value}])))

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        record = io.BytesIO()
        RecordWriter(record).write(event.SerializeToString())
        try:
            append(self._file, record.getvalue())
            self._failing = False
        except OSError as error:
            if not self._failing:
                self._note(f"cannot write {self._path}: {error.strerror}; its points are lost")
            self._failing = True
