"""``fastat pack SET --verify``: reads a packed set again and checks every checksum in it."""

import os
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastat.data.row_reader import RowFile, RowReader, RowSpans
from fastat.data.shard_file import Damaged, ShardInfo, read_shard
from fastat.data.shards import (
    INDEX_FILE,
    fingerprint,
    read_index,
)
from fastat.system.errors import Failure, UserError
from fastat.system.progress import progress

BLOCK_BYTES = 32 << 20
"""Size of the blocks of neighbouring rows that are read together."""


class Damage(NamedTuple):
    """Something in a set that is not as it was packed."""

    file: str
    row: int | None
    """The row in its shard; None for the index, or a whole shard."""
    clip: str | None
    reason: str


@dataclass(frozen=True, kw_only=True)
class VerifySummary:
    """What ``verify`` found."""

    directory: Path
    clips: int
    """Number of clips whose labels and names, and audio if the set has any, were checked."""
    bytes: int
    """Size of their audio."""
    damaged: tuple[Damage, ...]
    """In the order of the set."""


def verify(directory: Path) -> VerifySummary:
    """Checks the index, and of every shard its size, layout, labels and names and all rows.

    Raises:
        UserError: ``directory`` is no finished packed set.
        Failure: another version of fastat packed the set.
    """
    try:
        index = read_index(directory)
        damaged = _check_index(index)
    except (UserError, Damaged) as error:
        if not (directory / INDEX_FILE).is_file():
            raise
        damaged = [_index_damage(str(error).removeprefix(f"{directory / INDEX_FILE}: "))]
    if damaged:  # whatever else it says may be wrong
        return VerifySummary(directory=directory, clips=0, bytes=0, damaged=tuple(damaged))
    infos = [ShardInfo(**entry) for entry in index["shards"]]
    counts = np.zeros(len(index["classes"]), np.int64)
    clips = num_bytes = lost_shards = 0
    with progress(f"verify {directory.name}", index["clips"]) as advance:
        for info in infos:
            path = directory / info.file
            try:
                offset, rows = read_shard(directory, info, index["clip_samples"], len(counts))
            except Failure as failure:
                reason = str(failure).removeprefix(f"{path}: ")
                damaged.append(Damage(info.file, None, None, reason))
                lost_shards += 1
                advance(info.rows)
                continue
            bits = np.unpackbits(rows.target, axis=1, count=len(counts))
            counts += bits.sum(axis=0, dtype=np.int64)
            clips += info.rows
            if info.codec == "none" or not info.rows:
                advance(info.rows)
                continue
            starts = offset + rows.offsets(index["clip_samples"])
            for num_checked, bad in _check_rows(path, starts, rows.row_crc):
                for row, reason in bad.items():
                    clip = os.fsdecode(rows.audio_name[row])
                    damaged.append(Damage(info.file, row, clip, reason))
                advance(num_checked)
            num_bytes += int(starts[-1] - starts[0])
    if not lost_shards and counts.tolist() != index["label_counts"]:
        damaged.insert(0, _index_damage("its label counts are not those of the rows"))
    return VerifySummary(directory=directory, clips=clips, bytes=num_bytes, damaged=tuple(damaged))


def _check_index(index: dict[str, Any]) -> list[Damage]:
    """What of dataset.json contradicts the rest of it."""
    if index["fingerprint"] != fingerprint(index):
        return [_index_damage("its fingerprint differs from that of its classes and shards")]
    rows = sum(entry["rows"] for entry in index["shards"])
    if index["clips"] != rows:
        return [_index_damage(f"it counts {index['clips']} clips, its shards {rows}")]
    return []


def _index_damage(reason: str) -> Damage:
    return Damage(INDEX_FILE, None, None, reason)


def _check_rows(
    path: Path,
    starts: NDArray[np.int64],  # [N + 1] where each row starts in the file, and the last one ends
    row_crc: NDArray[np.uint32],  # [N]
) -> Iterator[tuple[int, dict[int, str]]]:
    """Reads a shard's rows; yields for each block its number of rows and what is wrong with some,
    by row."""
    _drop_from_page_cache(path)
    sizes = np.diff(starts).astype(np.int32)
    reader = RowReader([RowFile(path, 0, 0)], row_crc, 0, RowSpans(starts[:-1], sizes))
    blocks = list(_blocks(starts))
    memory = np.empty(max(int(starts[b[-1] + 1] - starts[b[0]]) for b in blocks), np.uint8)
    with closing(reader):
        for block in blocks:
            bad = reader.read(block, memory.data, starts[block] - starts[block[0]])
            yield len(block), {int(block[place]): reason for place, reason in sorted(bad.items())}


def _drop_from_page_cache(path: Path) -> None:
    """Has the rows read from the disk: what the system holds in memory says nothing about it."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _blocks(starts: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    """The rows that ``starts`` [N + 1] delimits, in blocks of about BLOCK_BYTES."""
    first, num_rows = 0, len(starts) - 1
    while first < num_rows:
        fitting = int(np.searchsorted(starts, starts[first] + BLOCK_BYTES, side="right")) - 1
        last = max(fitting, first + 1)
        yield np.arange(first, last)
        first = last
