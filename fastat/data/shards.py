"""A packed set on disk, opened for reading.

A folder with ``dataset.json`` (classes, counts, statistics and, for every shard, its rows, bytes
and checksum) and ``shard-00000.h5``, ``shard-00001.h5``, ... of at most 1 GiB. A shard is HDF5:

    waveform       int16 [N, S]            16 kHz mono, contiguous: a row is one range of the file
    num_samples    int32 [N]               real samples of the row, the rest is zero padding
    target         uint8 [N, ceil(K / 8)]  labels, np.packbits order
    audio_name     bytes [N]               UTF-8, the file's path inside the audio folder
    audio_path     bytes [N]               UTF-8, absolute path of the file it was packed from
    start_seconds  float64 [N]             where in that file the clip starts
    row_crc        uint32 [N]              CRC-32 of the row's waveform bytes

What detects damage, and when: opening checks each shard's size, layout and the CRC-32 of
everything but the waveform (``row_crc`` included), without reading the waveform; ``read_rows``
checks every row it reads against ``row_crc``. Rows are read with preadv: a shard cut short under a
memory map would kill the process, under preadv it is an error.
"""

import json
import os
import threading
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Self

import h5py
import numpy as np
from numpy.typing import NDArray

from fastat.errors import Failure, UserError

SAMPLE_RATE = 16_000
FORMAT = "fastat packed set"
VERSION = 1
INDEX_FILE = "dataset.json"
STATE_FOLDER = ".pack"
"""What an unfinished ``fastat pack`` keeps inside the set's folder."""

READ_THREADS = min(4, len(os.sched_getaffinity(0)))
"""Reads of a big batch; preadv and crc32 release the GIL, about 0.1 ms a row together."""
ROWS_PER_THREAD = 32
MAX_BUFFERS = 16
"""Rows of one preadv, few enough to be in the cache still when their CRC is computed."""


class ClassInfo(NamedTuple):
    """A class: ``id`` is what labels and checkpoints are matched by."""

    id: str
    name: str


class Stats(NamedTuple):
    """Mean and standard deviation of a feature, in its own units, over ``num_clips`` sampled
    clips."""

    mean: float
    std: float
    num_clips: int


class ShardInfo(NamedTuple):
    """What dataset.json knows of a shard."""

    file: str
    rows: int
    bytes: int
    crc32: int
    """Of everything but the waveform, ``row_crc`` included."""


class ShardRows(NamedTuple):
    """Everything of a shard's rows but the waveform; the datasets' names and dtypes."""

    num_samples: NDArray[np.int32]  # [N]
    target: NDArray[np.uint8]  # [N, ceil(K / 8)]
    audio_name: NDArray[np.bytes_]  # [N]
    audio_path: NDArray[np.bytes_]  # [N]
    start_seconds: NDArray[np.float64]  # [N]
    row_crc: NDArray[np.uint32]  # [N]

    def crc32(self) -> int:
        """One checksum over all of it."""
        crc = 0
        for array in self:
            crc = zlib.crc32(array.tobytes(), crc)
        return crc


SMALL_DTYPES = {
    "num_samples": "<i4", "target": "|u1", "audio_name": "|S", "audio_path": "|S",
    "start_seconds": "<f8", "row_crc": "<u4",
}  # fmt: skip
"""As numpy spells them; the width of a name is the longest one's."""

INDEX_ERRORS = (KeyError, TypeError, AttributeError, ValueError, OverflowError, OSError)
"""What a dataset.json raises that is JSON, but not as pack writes it."""

H5PY_ERRORS = (OSError, KeyError, RuntimeError, ValueError, TypeError, AttributeError)
"""What h5py raises on damage; the last two where a group stands in a dataset's place."""


def shard_file(index: int) -> str:
    """The file name of a shard."""
    return f"shard-{index:05d}.h5"


class _Shard(NamedTuple):
    path: Path
    first_row: int
    offset: int
    """Of the waveform in the file, bytes."""
    rows: ShardRows


class PackedSet:
    """A packed set, opened for reading; rows are numbered 0..num_clips-1 over all shards.

    ``read_rows`` may be called from several threads.
    """

    directory: Path
    classes: tuple[ClassInfo, ...]
    num_clips: int
    clip_samples: int
    codec: str
    label_counts: NDArray[np.int64]  # [K]
    stats: dict[str, Stats]
    fingerprint: str
    """Of the content: classes and every row. Equal for equal sets, wherever they lie."""
    num_samples: NDArray[np.int32]  # [N]
    target_bits: NDArray[np.uint8]  # [N, ceil(K / 8)], np.packbits order

    def __init__(self, directory: Path, index: dict[str, Any]) -> None:
        """Use ``open``."""
        self.directory = directory
        self.classes = tuple(ClassInfo(c["id"], c["name"]) for c in index["classes"])
        self.num_clips = index["clips"]
        self.clip_samples = index["clip_samples"]
        self.codec = index["codec"]
        self.label_counts = np.array(index["label_counts"], np.int64)
        self.stats = {
            name: Stats(s["mean"], s["std"], s["clips"]) for name, s in index["stats"].items()
        }
        self.fingerprint = index["fingerprint"]
        self._shards: list[_Shard] = []
        self._fds: dict[int, int] = {}
        self._lock = threading.Lock()
        self._threads: ThreadPoolExecutor | None = None
        first_row = 0
        for entry in index["shards"]:
            info = ShardInfo(**entry)
            offset, rows = read_shard(directory, info, self.clip_samples, len(self.classes))
            self._shards.append(_Shard(directory / info.file, first_row, offset, rows))
            first_row += info.rows
        if first_row != self.num_clips or not self._shards:
            raise Failure(
                f"{directory / INDEX_FILE}: {self.num_clips} clips, but its shards hold {first_row}"
            )
        self._first_rows = np.array([s.first_row for s in self._shards])
        self.num_samples = np.concatenate([s.rows.num_samples for s in self._shards])
        self.target_bits = np.concatenate([s.rows.target for s in self._shards])

    @classmethod
    def open(cls, directory: Path | str) -> Self:
        """Opens the set and checks every shard but for its waveform.

        Raises:
            UserError: ``directory`` is not a finished packed set.
            Failure: a shard is missing, of another size or layout, or damaged.
        """
        directory = Path(directory)
        index = read_index(directory)
        path = directory / INDEX_FILE
        try:
            packed = cls(directory, index)
        except INDEX_ERRORS as error:
            raise Failure(f"{path}: damaged: {error!r}") from error
        # Sets packed before there was this checksum have none.
        if "crc32" in index and index["crc32"] != index_crc32(index):
            raise Failure(f"{path}: damaged: its checksum differs; pack the set again")
        return packed

    def targets(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Labels of ``rows`` [R] as zeros and ones, [R, K]."""
        bits = np.unpackbits(self.target_bits[rows], axis=1, count=len(self.classes))
        return bits.astype(np.float32)

    def names(self, rows: NDArray[np.int64]) -> list[str]:
        """Each row's file, as a path inside the audio folder; clips of one file share it."""
        found = (self._find(row) for row in np.asarray(rows).tolist())
        return [os.fsdecode(shard.audio_name[place]) for shard, place in found]

    def sources(self, rows: NDArray[np.int64]) -> list[tuple[str, float]]:
        """Each row's original file (absolute path) and where in it the clip starts, in seconds."""
        found = (self._find(row) for row in np.asarray(rows).tolist())
        return [
            (os.fsdecode(shard.audio_path[place]), float(shard.start_seconds[place]))
            for shard, place in found
        ]

    def read_rows(self, rows: NDArray[np.int64], out: NDArray[np.int16]) -> None:
        """Reads ``rows`` [R], in any order and with repeats, into ``out`` [R, S], in file order.

        Raises:
            Failure: a row could not be read or differs from its CRC; names shard, row and clip.
        """
        rows = np.asarray(rows)
        if out.shape != (len(rows), self.clip_samples) or out.dtype != np.int16:
            raise ValueError(
                f"out: expected int16 [{len(rows)}, {self.clip_samples}], "
                f"got {out.dtype} {list(out.shape)}"
            )
        if not out.flags.c_contiguous:
            raise ValueError("out: expected a C-contiguous array")
        if len(rows) and not (rows.min() >= 0 and rows.max() < self.num_clips):
            raise ValueError(f"rows: expected 0..{self.num_clips - 1}, got {rows.tolist()}")
        order = np.argsort(rows, kind="stable")
        parts = min(READ_THREADS, len(rows) // ROWS_PER_THREAD)
        if parts < 2:
            self._read_sorted(rows, order, out)
            return
        with self._lock:
            if self._threads is None:
                self._threads = ThreadPoolExecutor(READ_THREADS, "fastat-read")
        jobs = [
            self._threads.submit(self._read_sorted, rows, part, out)
            for part in np.array_split(order, parts)
        ]
        for job in jobs:
            job.result()

    def close(self) -> None:
        """Closes the files; reading again opens them again."""
        with self._lock:
            if self._threads is not None:
                self._threads.shutdown()
                self._threads = None
            for fd in self._fds.values():
                os.close(fd)
            self._fds.clear()

    def _read_sorted(
        self, rows: NDArray[np.int64], order: NDArray[np.int64], out: NDArray[np.int16]
    ) -> None:
        """Reads rows[order] into out[order]; neighbours in the file with one system call."""
        wanted = rows[order]
        which = np.searchsorted(self._first_rows, wanted, side="right") - 1
        breaks = np.flatnonzero((np.diff(wanted) != 1) | (np.diff(which) != 0)) + 1
        row_bytes = 2 * self.clip_samples
        for run in np.split(np.arange(len(wanted)), breaks):
            for start in range(0, len(run), MAX_BUFFERS):
                part = run[start : start + MAX_BUFFERS]
                shard_index = int(which[part[0]])
                shard = self._shards[shard_index]
                first = int(wanted[part[0]]) - shard.first_row
                buffers = [memoryview(out[place]).cast("B") for place in order[part]]
                try:
                    offset = shard.offset + first * row_bytes
                    got = _preadv_all(self._fd(shard_index), buffers, offset)
                except OSError as error:
                    raise Failure(f"{shard.path}: cannot read: {error.strerror}") from error
                for j, buffer in enumerate(buffers):
                    row = first + j
                    if (j + 1) * row_bytes > got or zlib.crc32(buffer) != shard.rows.row_crc[row]:
                        clip = os.fsdecode(shard.rows.audio_name[row])
                        raise Failure(
                            f"{shard.path}: row {row} (clip {clip}) is damaged: its checksum "
                            "differs; pack the set again"
                        )

    def _fd(self, shard_index: int) -> int:
        with self._lock:
            if shard_index not in self._fds:
                path = self._shards[shard_index].path
                try:
                    self._fds[shard_index] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                except OSError as error:
                    raise Failure(f"cannot open {path}: {error.strerror}") from error
            return self._fds[shard_index]

    def _find(self, row: int) -> tuple[ShardRows, int]:
        """What is known of a row's shard, and its place there."""
        index = int(np.searchsorted(self._first_rows, row, side="right")) - 1
        shard = self._shards[index]
        return shard.rows, row - shard.first_row


def read_index(directory: Path) -> dict[str, Any]:
    """dataset.json of a finished set.

    Raises:
        UserError: there is none, or it is not of this format and version.
    """
    path = directory / INDEX_FILE
    if not directory.is_dir():
        raise UserError(f"{directory}: expected the folder of a packed set, found none")
    if not path.is_file():
        if (directory / STATE_FOLDER).is_dir():
            raise UserError(
                f"{directory}: packing did not finish; run the same fastat pack command again"
            )
        raise UserError(f"{directory}: expected a packed set (fastat pack), found no {INDEX_FILE}")
    try:
        index = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path}: expected the index of a packed set, got no JSON ({error})"
        ) from None
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise UserError(f"{path}: expected the index of a packed set")
    if index.get("version") != VERSION:
        raise UserError(f"{path}: expected format version {VERSION}, got {index.get('version')}")
    return index


def index_crc32(index: dict[str, Any]) -> int:
    """Of the content of dataset.json, its own ``crc32`` apart."""
    content = {key: value for key, value in index.items() if key != "crc32"}
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def read_shard(
    directory: Path, info: ShardInfo, clip_samples: int, num_classes: int
) -> tuple[int, ShardRows]:
    """The waveform's offset in the file and everything else of a shard, checked against ``info``.

    Raises:
        Failure: missing, of another size or layout, or damaged outside the waveform.
    """
    path = directory / info.file
    if not path.is_file():
        raise Failure(f"{path}: this shard of the set is missing")
    size = path.stat().st_size
    if size != info.bytes:
        raise Failure(f"{path}: damaged: expected {info.bytes:,} bytes, found {size:,}")
    try:
        with h5py.File(path) as file:
            waveform = file["waveform"]
            layout = (waveform.shape, waveform.dtype, waveform.chunks)
            offset = waveform.id.get_offset()
            rows = ShardRows(*(_read_small(file[name], info) for name in ShardRows._fields))
    except H5PY_ERRORS as error:
        raise Failure(f"{path}: damaged: {_first_line(error)}") from error
    expected = ((info.rows, clip_samples), np.dtype(np.int16), None)
    if layout != expected or offset is None:
        raise Failure(f"{path}: damaged: expected waveform {expected}, found {layout}")
    if rows.target.shape != (info.rows, -(-num_classes // 8)) or rows.crc32() != info.crc32:
        raise Failure(f"{path}: damaged: the checksum of its labels and names differs")
    return offset, rows


def _read_small(dataset: Any, info: ShardInfo) -> NDArray[Any]:
    """A dataset beside the waveform.

    Its header is checked first: the checksum is of bytes, to which another dtype would give another
    meaning, and no array is larger than its file, whatever the header says.
    """
    kind = SMALL_DTYPES[dataset.name.removeprefix("/")]
    if not dataset.dtype.str.startswith(kind) or dataset.shape[:1] != (info.rows,):
        raise ValueError(f"{dataset.name}: {dataset.dtype} {dataset.shape}")
    if dataset.nbytes > info.bytes:
        raise ValueError(f"{dataset.name}: {dataset.nbytes:,} bytes")
    array: NDArray[Any] = dataset[()]
    return array


def _preadv_all(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
    """preadv until the buffers are full or the file ends; bytes read."""
    total, left = 0, list(buffers)
    while left:
        count = os.preadv(fd, left, offset + total)
        if count == 0:
            break
        total += count
        while left and count >= len(left[0]):
            count -= len(left.pop(0))
        if left:
            left[0] = left[0][count:]
    return total


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
