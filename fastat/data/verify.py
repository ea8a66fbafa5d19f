"""``fastat pack SET --verify``: reads a packed set again and checks every checksum in it."""

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from zlib_ng import zlib_ng

from fastat.data.shards import (
    INDEX_FILE,
    Damaged,
    ShardInfo,
    ShardRows,
    fingerprint,
    read_index,
    read_shard,
)
from fastat.errors import Failure, UserError
from fastat.host import cores_of_rank
from fastat.progress import progress

THREADS = min(4, cores_of_rank())
"""Reading waits for the disk, and CRC-32 takes tens of GB/s a thread, without the GIL."""
READ_BYTES = 8 << 20
"""Of one read: long enough for a disk, short enough that a few are in the cache."""


BAD_ROW = "its checksum differs, or the disk does not give it back"


class Damage(NamedTuple):
    """Something of a set that is not as it was packed."""

    file: str
    row: int | None
    """In its shard; None for the index, or a whole shard."""
    clip: str | None
    reason: str


@dataclass(frozen=True, kw_only=True)
class VerifySummary:
    """What ``verify`` found."""

    directory: Path
    clips: int
    """Whose checksum was computed."""
    bytes: int
    """Of their audio."""
    damaged: tuple[Damage, ...]
    """In the order of the set."""


class _Piece(NamedTuple):
    """Neighbouring rows of a shard, read at once."""

    shard: int
    first: int
    last: int
    """Behind the last."""


def verify(directory: Path) -> VerifySummary:
    """Checks the index, and of every shard its size, layout, labels and names and all rows.

    Raises:
        UserError: ``directory`` is no finished packed set.
        Failure: a shard that cannot be opened.
    """
    try:
        index = read_index(directory)
        damaged = _check_index(index)
    except (UserError, Damaged) as error:
        if not (directory / INDEX_FILE).is_file():
            raise
        damaged = [_damage(str(error).removeprefix(f"{directory / INDEX_FILE}: "))]
    if damaged:  # whatever else it says may be wrong
        return VerifySummary(directory=directory, clips=0, bytes=0, damaged=tuple(damaged))
    infos = [ShardInfo(**entry) for entry in index["shards"]]
    shards: dict[int, tuple[NDArray[np.int64], ShardRows]] = {}
    counts = np.zeros(len(index["classes"]), np.int64)
    for number, info in enumerate(infos):
        try:
            offset, rows = read_shard(directory, info, index["clip_samples"], len(counts))
        except Failure as failure:
            reason = str(failure).removeprefix(f"{directory / info.file}: ")
            damaged.append(Damage(info.file, None, None, reason))
            continue
        shards[number] = offset + rows.offsets(index["clip_samples"]), rows
        counts += np.unpackbits(rows.target, axis=1, count=len(counts)).sum(axis=0, dtype=np.int64)
    if len(shards) == len(infos) and counts.tolist() != index.get("label_counts"):
        damaged.append(_damage("its label counts are not those of the rows"))
    clips = num_bytes = 0
    with progress(f"verify {directory.name}", sum(info.rows for info in infos)) as advance:
        for piece, bad in _checked(directory, infos, shards):
            ends, rows = shards[piece.shard]
            clips += piece.last - piece.first
            num_bytes += int(ends[piece.last] - ends[piece.first])
            for row in bad:
                clip = os.fsdecode(rows.audio_name[row])
                damaged.append(Damage(infos[piece.shard].file, row, clip, BAD_ROW))
            advance(piece.last - piece.first)
    order = {info.file: number for number, info in enumerate(infos)}
    damaged.sort(key=lambda d: (order.get(d.file, -1), -1 if d.row is None else d.row))
    return VerifySummary(directory=directory, clips=clips, bytes=num_bytes, damaged=tuple(damaged))


def _check_index(index: dict[str, Any]) -> list[Damage]:
    """What of dataset.json contradicts the rest of it."""
    if index["fingerprint"] != fingerprint(index):
        return [_damage("its fingerprint differs from that of its classes and shards")]
    rows = sum(entry["rows"] for entry in index["shards"])
    if index["clips"] != rows:
        return [_damage(f"it counts {index['clips']} clips, its shards {rows}")]
    return []


def _damage(reason: str) -> Damage:
    """Of the index."""
    return Damage(INDEX_FILE, None, None, reason)


def _checked(
    directory: Path,
    infos: list[ShardInfo],
    shards: dict[int, tuple[NDArray[np.int64], ShardRows]],
) -> Iterator[tuple[_Piece, list[int]]]:
    """Every piece of the set with its damaged rows, read by several threads, in order."""
    waiting: deque[tuple[_Piece, Future[list[int]]]] = deque()
    with ThreadPoolExecutor(THREADS, "fastat-verify") as pool:
        for number, (ends, rows) in shards.items():
            fd = _open(directory / infos[number].file)
            try:
                for piece in _pieces(number, ends):
                    job = pool.submit(_check_rows, fd, ends, rows.row_crc, piece)
                    waiting.append((piece, job))
                    while len(waiting) > 2 * THREADS:
                        done, job = waiting.popleft()
                        yield done, job.result()
                while waiting:
                    done, job = waiting.popleft()
                    yield done, job.result()
            finally:
                os.close(fd)


def _open(path: Path) -> int:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise Failure(f"cannot open {path}: {error.strerror}") from error
    # What the system has in memory says nothing of the disk.
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
    return fd


def _pieces(shard: int, ends: NDArray[np.int64]) -> Iterator[_Piece]:
    """Rows of a shard whose bytes are ends[row]..ends[row + 1], about READ_BYTES at a time."""
    first, num_rows = 0, len(ends) - 1
    while first < num_rows:
        fitting = int(np.searchsorted(ends, ends[first] + READ_BYTES, side="right")) - 1
        last = max(fitting, first + 1)
        yield _Piece(shard, first, last)
        first = last


def _check_rows(
    fd: int, ends: NDArray[np.int64], row_crc: NDArray[np.uint32], piece: _Piece
) -> list[int]:
    """The rows of ``piece`` whose bytes differ from their CRC-32, or cannot be read."""
    start, end = int(ends[piece.first]), int(ends[piece.last])
    buffer = memoryview(bytearray(end - start))
    got = 0
    try:
        while got < len(buffer):
            count = os.preadv(fd, [buffer[got:]], start + got)
            if count == 0:
                break
            got += count
    except OSError:  # a bad sector: one of the rows
        if piece.last - piece.first == 1:
            return [piece.first]
        alone = [piece._replace(first=r, last=r + 1) for r in range(piece.first, piece.last)]
        return [row for one in alone for row in _check_rows(fd, ends, row_crc, one)]
    return [
        row
        for row in range(piece.first, piece.last)
        if ends[row + 1] - start > got
        or zlib_ng.crc32(buffer[ends[row] - start : ends[row + 1] - start]) != row_crc[row]
    ]
