"""What one worker process of ``fastat pack`` does: decode, measure, and write rows where it is
told.

The samples never travel between processes. A worker decodes a batch of files, reports what it
found, keeps the samples, and writes them into the shard when the parent has decided their row
numbers. The parent's decision needs all earlier files, so the set does not depend on the number of
workers.
"""

import ctypes
import errno
import os
import signal
import sys
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits
from zlib_ng import zlib_ng

from fastat.data.bad_audio import BadAudio
from fastat.data.decode import decode, to_int16
from fastat.data.flac import encode
from fastat.data.hdf5_source import Hdf5Rows, is_row
from fastat.data.moments import Meter
from fastat.data.pack_messages import (
    Bad,
    Clip,
    Decode,
    Decoded,
    Forget,
    Good,
    Job,
    Message,
    Refused,
    Reply,
    Write,
    Written,
)
from fastat.data.shards import SAMPLE_RATE

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h


def serve(connection: Connection, job: Job) -> None:
    """Answers the parent's messages until it closes the connection or is gone."""
    # Ctrl-C reaches the whole group; the parent ends the workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _keep_freed_memory()
    threadpool_limits(1)  # numpy's BLAS would take every core in every worker
    # mpg123 and FFmpeg print warnings into the progress bar; Python's tracebacks stay visible.
    sys.stderr = os.fdopen(os.dup(2), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    measure = Meter()
    hdf5 = Hdf5Rows()
    held: dict[int, list[bytes]] = {}
    target = _Target()
    while True:
        try:
            message: Message = connection.recv()
        except (EOFError, ConnectionResetError):
            return
        match message:
            case Decode():
                held[message.batch] = []
                reply: Reply = _decode(message, job, hdf5, measure, held[message.batch])
            case Write():
                rows = held[message.batch][message.first : message.first + message.num_clips]
                reply = target.write(message, rows)
            case Forget():
                del held[message.batch]
                continue
        try:
            connection.send(reply)
        except (BrokenPipeError, ConnectionResetError):
            return


def _keep_freed_memory() -> None:
    """Has glibc's malloc keep what is freed.

    Giving a clip's megabytes back to the system and faulting them in for the next clip costs a
    quarter of its decoding: 10.2 ms against 7.8.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # glibc alone has it, and needs it
        mallopt(M_MMAP_THRESHOLD, 1 << 30)
        mallopt(M_TRIM_THRESHOLD, 1 << 30)


def cut(samples: NDArray[np.float32], job: Job) -> list[NDArray[np.int16]]:
    """A file's samples [S] -> its clips, each at most clip_samples long, rounded to int16."""
    starts = range(0, len(samples), job.clip_samples) if job.segments else (0,)
    pieces = [samples[start : start + job.clip_samples] for start in starts]
    return [
        to_int16(p)
        for p in pieces[:1] + [p for p in pieces[1:] if len(p) >= job.min_segment_samples]
    ]


def _decode(
    message: Decode, job: Job, hdf5: Hdf5Rows, measure: Meter, rows: list[bytes]
) -> Decoded | Refused:
    files: list[Good | Bad] = []
    for path, stats_clips in zip(message.paths, message.stats_clips, strict=True):
        try:
            files.append(_decode_file(path, stats_clips, job, hdf5, measure, rows))
        except BadAudio as bad:
            files.append(Bad(bad.reason, bad.detail))
        except MemoryError:
            return Refused(errno.ENOMEM, path)
    return Decoded(message.batch, files)


def _decode_file(
    path: str, stats_clips: int, job: Job, hdf5: Hdf5Rows, measure: Meter, rows: list[bytes]
) -> Good:
    """The file's clips, ``stats_clips`` of them measured; their bytes go to ``rows``."""
    seconds = None if job.segments else job.clip_samples / SAMPLE_RATE
    if is_row(path):
        audio = hdf5.decode(path, SAMPLE_RATE, seconds)
    else:
        audio = decode(Path(path), SAMPLE_RATE, seconds)
    pieces = cut(audio.samples, job)
    # Evenly spread over the file.
    step = max(1.0, len(pieces) / stats_clips) if stats_clips else 0.0
    measured = {int(i * step) for i in range(stats_clips)}
    clips = []
    for number, piece in enumerate(pieces):
        row = np.zeros(job.clip_samples, np.int16)
        row[: len(piece)] = piece
        moments = measure(row, len(piece)) if number in measured else None
        start = number * job.clip_samples / SAMPLE_RATE
        stored = encode(piece, SAMPLE_RATE) if job.codec == "flac" else row.tobytes()
        rows.append(stored)
        clips.append(Clip(start, len(piece), len(stored), zlib_ng.crc32(stored), moments))
    return Good(clips, audio.notes)


class _Target:
    """The shard being written, kept open."""

    def __init__(self) -> None:
        self.path, self.fd = "", -1

    def write(self, message: Write, rows: Sequence[bytes]) -> Written | Refused:
        try:
            if message.path != self.path:
                if self.fd >= 0:
                    os.close(self.fd)
                self.path, self.fd = "", -1
                self.fd = os.open(message.path, os.O_WRONLY | os.O_CLOEXEC)
                self.path = message.path
            offset = message.offset
            for row in rows:
                left = memoryview(row)
                while left:  # a disk that fills takes part of a row first
                    count = os.pwrite(self.fd, left, offset)
                    left, offset = left[count:], offset + count
        except OSError as error:
            return Refused(error.errno or 0, message.path)
        return Written(message.path)
