"""Rows of the shards' waveforms, from their files straight into a batch.

A row is one range of one file. A batch's rows are read in file order by a few threads; each runs a
loop of preadv into the row's place in the batch and of its CRC-32, while the row is still in the
core's cache. Both calls release the GIL; zlib-ng computes the CRC of every row at several times
the speed of the copy out of the page cache, zlib's takes longer than that copy.

A disk gives its best only to many requests at a time. ``advise`` makes them for rows that a later
batch needs, without a thread for each: the kernel reads them while other rows are being copied.
"""

import errno
import os
import resource
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from zlib_ng import zlib_ng

from fastat.system.errors import Failure
from fastat.system.host import cores_of_rank

READ_THREADS = min(8, cores_of_rank())
"""A core reads and checks 9 GB/s of cached rows (measured on two cores), so eight cores read more
than any model needs. With more threads than cores, throughput falls, from the page cache and from
the disk."""
ROWS_PER_JOB = 8
"""Least number of rows in a job: jobs are short, so that a thread that is held up does not hold up
the batch."""
JOBS_PER_THREAD = 4

OUT_OF_RESOURCES = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})
"""Errors that are not about the row that was being read."""


class RowFile(NamedTuple):
    """Where the rows of a shard lie."""

    path: Path
    first_row: int
    """Number of its first row in the set."""
    offset: int
    """Byte of the file where the rows begin."""


class RowSpans(NamedTuple):
    """Where each row lies, for a set whose rows differ in length."""

    offset: NDArray[np.int64]  # [N] in its file, bytes
    size: NDArray[np.int32]  # [N] bytes


class RowReader:
    """Reads rows of ``files``, which are in the order of the set. Thread-safe.

    Args:
        row_crc: [N] CRC-32 of each row.
        row_bytes: length of each row; unused with ``spans``.
        spans: where the rows lie; None if all have ``row_bytes`` and follow one another.
    """

    def __init__(
        self,
        files: Sequence[RowFile],
        row_crc: NDArray[np.uint32],
        row_bytes: int,
        spans: RowSpans | None = None,
    ) -> None:
        self.paths = [file.path for file in files]
        self.row_crc = row_crc
        self.row_bytes = row_bytes
        self.spans = spans
        self._first_rows = np.array([file.first_row for file in files])
        self._offsets = np.array([file.offset for file in files])
        self._fds = np.full(len(files), -1)
        self._threads: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()
        self._blocks_read = -1
        _allow_open_files(len(files))

    def read(
        self, rows: NDArray[np.int64], out: memoryview, starts: NDArray[np.int64] | None = None
    ) -> dict[int, str]:
        """Reads ``rows`` [R], in any order and with repeats, into ``out``, R x row_bytes bytes.

        With ``starts`` [R], each row goes to ``out`` from that byte on.

        Returns:
            Reasons why rows could not be read, end early, or differ from their CRC, by their place
            in ``rows``. The content of ``out`` is undefined there.

        Raises:
            Failure: the system is out of open files or memory.
        """
        order = np.argsort(rows, kind="stable")
        wanted = rows[order]
        files, offsets, sizes = self._locate(wanted)
        bad: dict[int, str] = {}
        for index, reason in self._open(files).items():
            bad |= dict.fromkeys(order[files == index].tolist(), reason)
        if bad:
            opened = self._fds[files] >= 0
            order, wanted = order[opened], wanted[opened]
            files, offsets, sizes = files[opened], offsets[opened], sizes[opened]
        begin = order * self.row_bytes if starts is None else starts[order]
        columns = (order, begin, sizes, self._fds[files], offsets, self.row_crc[wanted])
        num_jobs = min(JOBS_PER_THREAD * READ_THREADS, len(order) // ROWS_PER_JOB)
        if num_jobs < 2:
            return bad | self._read_in_turn(out, *columns)
        jobs = zip(*(np.array_split(column, num_jobs) for column in columns), strict=True)
        for found in self._pool().map(lambda job: self._read_in_turn(out, *job), jobs):
            bad |= found
        return bad

    def advise(self, rows: NDArray[np.int64]) -> None:
        """Asks the kernel to start reading ``rows``, in file order.

        Does nothing if the process has read nothing from a disk since the last call, by the
        system's count: asking for a row that is in the page cache takes a fifth of the time of
        reading it.

        Raises:
            Failure: the system is out of open files or memory.
        """
        blocks = resource.getrusage(resource.RUSAGE_SELF).ru_inblock
        disk_is_read, self._blocks_read = blocks != self._blocks_read, blocks
        if not disk_is_read:
            return
        rows = np.unique(rows)
        files, offsets, sizes = self._locate(rows)
        self._open(files)  # a file that cannot be opened is reported when its rows are read
        ends = np.flatnonzero((np.diff(rows) != 1) | (np.diff(files) != 0))
        starts = np.concatenate([[0], ends + 1])[: len(rows)]
        lasts = np.append(ends, len(rows) - 1)[: len(rows)]
        lengths = offsets[lasts] + sizes[lasts] - offsets[starts]
        runs = zip(
            self._fds[files[starts]].tolist(),
            offsets[starts].tolist(),
            lengths.tolist(),
            strict=True,
        )
        for fd, offset, length in runs:
            if fd >= 0:
                os.posix_fadvise(fd, offset, length, os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        """Closes the files; reading again opens them again. No thread may be reading."""
        with self._lock:
            if self._threads is not None:
                self._threads.shutdown()
                self._threads = None
            for fd in self._fds[self._fds >= 0].tolist():
                os.close(fd)
            self._fds[:] = -1

    def _locate(
        self, rows: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64] | NDArray[np.int32]]:
        """The index of each row's file, where the row starts in it, and its bytes."""
        files = np.searchsorted(self._first_rows, rows, side="right") - 1
        if self.spans is not None:
            return files, self.spans.offset[rows], self.spans.size[rows]
        offsets = self._offsets[files] + (rows - self._first_rows[files]) * self.row_bytes
        return files, offsets, np.full(len(rows), self.row_bytes)

    def _read_in_turn(
        self,
        out: memoryview,
        places: NDArray[np.int64],
        starts: NDArray[np.int64],
        sizes: NDArray[np.int64] | NDArray[np.int32],
        fds: NDArray[np.int64],
        offsets: NDArray[np.int64],
        crcs: NDArray[np.uint32],
    ) -> dict[int, str]:
        """Reads one row after the other; returns the reasons for bad ones, by place."""
        bad: dict[int, str] = {}
        columns = (column.tolist() for column in (places, starts, sizes, fds, offsets, crcs))
        for place, start, size, fd, offset, crc in zip(*columns, strict=True):
            row = out[start : start + size]
            try:
                count = os.preadv(fd, (row,), offset)
                # A network file system may return less than was asked for before the file's end.
                while 0 < count < size and (more := os.preadv(fd, (row[count:],), offset + count)):
                    count += more
            except OSError as error:
                bad[place] = f"cannot read it: {_reason(error)}"
                continue
            if count != size:
                bad[place] = f"the file has {count:,} of its {size:,} bytes"
            elif zlib_ng.crc32(row) != crc:
                bad[place] = "its checksum differs"
        return bad

    def _open(self, files: NDArray[np.int64]) -> dict[int, str]:
        """Opens files that are not open yet; returns why some cannot be opened, by index."""
        if (self._fds[files] >= 0).all():
            return {}
        failed: dict[int, str] = {}
        with self._lock:
            for index in np.unique(files[self._fds[files] < 0]).tolist():
                try:
                    self._fds[index] = os.open(self.paths[index], os.O_RDONLY | os.O_CLOEXEC)
                except OSError as error:
                    failed[index] = f"cannot open its file: {_reason(error)}"
        return failed

    def _pool(self) -> ThreadPoolExecutor:
        with self._lock:
            if self._threads is None:
                self._threads = ThreadPoolExecutor(READ_THREADS, "fastat-read")
            return self._threads


def _reason(error: OSError) -> str:
    """The system's reason why a row cannot be read. Raises Failure if it is not about the row."""
    reason = error.strerror or str(error)
    if error.errno in OUT_OF_RESOURCES:
        raise Failure(f"cannot read the set: {reason}") from error
    return reason


def _allow_open_files(count: int) -> None:
    """Raises the soft limit on open files (often 1024) if ``count`` comes near it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and count > soft // 4:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
