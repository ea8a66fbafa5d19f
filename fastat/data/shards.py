"""A packed set on disk, opened for reading.

A set is a folder with ``dataset.json`` (classes, counts, statistics and, for every shard, its rows,
bytes and checksum) and ``shard-00000.h5``, ``shard-00001.h5``, ... of
as much as 256 MiB of audio (``shard_file`` says what is in one).

Opening a set checks the size and layout of each shard and the CRC-32 of everything but the waveform
(``row_crc`` included), without reading the waveform. Reading checks every row against ``row_crc``.
Rows are read with preadv: if a shard is cut short while it is memory-mapped, the process is killed;
under preadv that is an error.

Labels, lengths, CRCs and names stay in memory: about a hundred bytes a clip with 527 classes, and
twelve more if there are FLAC shards. ``audio_path`` and ``start_seconds`` are only read when
``sources`` is called. The names stay in memory so that damaged clips can still be named after a
shard was cut short, which loses everything behind its waveform.
"""

import hashlib
import json
import os
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from fastat.config.fields import check_keys
from fastat.data.flac import FlacReader
from fastat.data.row_reader import RowFile, RowReader, RowSpans
from fastat.data.shard_file import Damaged, ShardInfo, read_shard
from fastat.system.errors import Failure, UserError
from fastat.system.files import atomic_write_text

SAMPLE_RATE = 16_000
FORMAT = "fastat packed set"
VERSION = 3
INDEX_FILE = "dataset.json"


class ClassInfo(NamedTuple):
    """A class. Labels and checkpoints are matched by ``id``."""

    id: str
    name: str


class Stats(NamedTuple):
    """Mean and standard deviation of a feature, in its own units, over ``num_clips`` sampled
    clips."""

    mean: float
    std: float
    num_clips: int


def codec_of(shards: Iterable[ShardInfo]) -> str:
    """The codec of a set of these shards: theirs, or ``mixed``."""
    codecs = {info.codec for info in shards}
    return codecs.pop() if len(codecs) == 1 else "mixed"


class PackedSet:
    """A packed set, opened for reading; rows are numbered 0..num_clips-1 over all shards.

    ``read`` and ``read_rows`` may be called from several threads; ``close`` after they are done.
    """

    directory: Path
    classes: tuple[ClassInfo, ...]
    num_clips: int
    clip_samples: int
    codec: str
    """``pcm16``, ``flac``, ``none`` or ``mixed``."""
    label_counts: NDArray[np.int64]  # [K]
    stats: dict[str, Stats]
    fingerprint: str
    """Checksum of the content: classes and every row. Equal for equal sets in any folder."""
    num_samples: NDArray[np.int32]  # [N]
    target_bits: NDArray[np.uint8]  # [N, ceil(K / 8)], np.packbits order
    reader: RowReader

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
        self._shards = [ShardInfo(**entry) for entry in index["shards"]]
        num_rows = self.num_clips
        self._first_rows = np.cumsum([0] + [info.rows for info in self._shards[:-1]])
        self._names: list[NDArray[np.bytes_]] = []
        self._sources: dict[int, tuple[NDArray[np.bytes_], NDArray[np.float64]]] = {}
        self.num_samples = np.empty(num_rows, np.int32)
        self.target_bits = np.empty((num_rows, -(-len(self.classes) // 8)), np.uint8)
        row_crc = np.empty(num_rows, np.uint32)
        self._is_flac = np.array([info.codec == "flac" for info in self._shards])
        spans = None
        if self._is_flac.any():
            spans = RowSpans(np.empty(num_rows, np.int64), np.empty(num_rows, np.int32))
        files: list[RowFile] = []
        for info, first_row in zip(self._shards, self._first_rows.tolist(), strict=True):
            offset, rows = read_shard(directory, info, self.clip_samples, len(self.classes))
            files.append(RowFile(directory / info.file, first_row, offset))
            place = slice(first_row, first_row + info.rows)
            self.num_samples[place] = rows.num_samples
            self.target_bits[place] = rows.target
            row_crc[place] = rows.row_crc
            self._names.append(rows.audio_name)
            if spans is not None:
                starts = rows.offsets(self.clip_samples)
                spans.offset[place] = offset + starts[:-1]
                spans.size[place] = np.diff(starts)
        self.reader = RowReader(files, row_crc, 2 * self.clip_samples, spans)
        self._flac: FlacReader | None = None
        self._lock = threading.Lock()

    @classmethod
    def open(cls, directory: Path | str) -> Self:
        """Opens the set and checks everything in its shards but the waveforms.

        Raises:
            UserError: ``directory`` is not a finished packed set.
            Damaged: dataset.json is damaged, or a shard is missing, of another size or layout, or
                damaged.
            Failure: another version of fastat packed the set, or a shard cannot be read.
        """
        directory = Path(directory)
        return cls(directory, read_index(directory))

    def targets(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Labels of ``rows`` [R] as zeros and ones, [R, K]."""
        bits = np.unpackbits(self.target_bits[rows], axis=1, count=len(self.classes))
        return bits.astype(np.float32)

    def place(self, row: int) -> tuple[Path, int]:
        """The shard that holds ``row``, and the number of the row in it."""
        index = self._shard_of(row)
        return self.reader.paths[index], row - int(self._first_rows[index])

    def names(self, rows: NDArray[np.int64]) -> list[str]:
        """Path of each row's file inside the audio folder; clips of one file share it."""
        names = []
        for row in np.asarray(rows).tolist():
            index = self._shard_of(row)
            names.append(os.fsdecode(self._names[index][row - self._first_rows[index]]))
        return names

    def sources(self, rows: NDArray[np.int64]) -> list[tuple[str, float]]:
        """Absolute path of each row's original file, and the clip's start in it in seconds.

        Raises:
            Failure: its shard was damaged since the set was opened.
        """
        sources = []
        for row in np.asarray(rows).tolist():
            index = self._shard_of(row)
            if index not in self._sources:
                self._sources[index] = self._read_sources(self._shards[index])
            paths, starts = self._sources[index]
            place = row - self._first_rows[index]
            sources.append((os.fsdecode(paths[place]), float(starts[place])))
        return sources

    def read(self, rows: NDArray[np.int64], out: NDArray[np.int16]) -> dict[int, str]:
        """Reads ``rows`` [R], in any order and with repeats, into ``out`` [R, S], in file order.

        Returns:
            Reasons why rows could not be read or differ from their CRC, by their place in ``rows``;
            ``out`` is undefined there.
        """
        rows = np.asarray(rows)
        if out.shape != (len(rows), self.clip_samples) or out.dtype != np.int16:
            raise ValueError(
                f"out: expected int16 [{len(rows)}, {self.clip_samples}], "
                f"got {out.dtype} {list(out.shape)}"
            )
        if not out.flags.c_contiguous:
            raise ValueError("out: expected a C-contiguous array")
        if not len(rows):
            return {}
        self.require_audio()
        if not (rows.min() >= 0 and rows.max() < self.num_clips):
            raise ValueError(f"rows: expected 0..{self.num_clips - 1}, got {rows.tolist()}")
        memory = out.data.cast("B")
        flac = self._is_flac[np.searchsorted(self._first_rows, rows, side="right") - 1]
        if not flac.any():
            return self.reader.read(rows, memory)
        with self._lock:
            if self._flac is None:
                self._flac = FlacReader(self.reader, self.num_samples)
            reader = self._flac
        bad = reader.read(rows, np.flatnonzero(flac), out)
        pcm = np.flatnonzero(~flac)
        found = self.reader.read(rows[pcm], memory, pcm * self.reader.row_bytes)
        return bad | {int(pcm[place]): reason for place, reason in found.items()}

    def read_rows(self, rows: NDArray[np.int64], out: NDArray[np.int16]) -> None:
        """Reads ``rows`` like ``read``, but raises if one is damaged.

        Raises:
            Failure: a row could not be read or differs from its CRC; names shard, row and clip.
        """
        bad = self.read(rows, out)
        if bad:
            place = min(bad)
            raise Failure(f"{self.describe(int(rows[place]), bad[place])}; pack the set again")

    def require_audio(self) -> None:
        """Raises UserError when the set was packed without its audio."""
        _check_codec(self.directory, self.codec)

    def describe(self, row: int, reason: str) -> str:
        """A message that names a damaged row, its shard and its clip."""
        path, place = self.place(row)
        (clip,) = self.names(np.array([row]))
        return f"{path}: row {place} (clip {clip}) is damaged: {reason}"

    def close(self) -> None:
        """Closes the files; reading again opens them again. No thread may be reading."""
        with self._lock:
            self._flac = None
        self.reader.close()

    def _shard_of(self, row: int) -> int:
        return int(np.searchsorted(self._first_rows, row, side="right")) - 1

    def _read_sources(self, info: ShardInfo) -> tuple[NDArray[np.bytes_], NDArray[np.float64]]:
        _, rows = read_shard(self.directory, info, self.clip_samples, len(self.classes))
        return rows.audio_path, rows.start_seconds


def read_index(directory: Path) -> dict[str, Any]:
    """Reads dataset.json of a finished set.

    Raises:
        UserError: there is none, or it is not of this format and version.
        Damaged: its checksum differs.
        Failure: another version of fastat wrote it.
    """
    path = directory / INDEX_FILE
    if not directory.is_dir():
        raise UserError(f"{directory}: expected the folder of a packed set, found none")
    if not path.is_file():
        if any(directory.glob("shard-*.h5")):
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
    if index.get("checksum") != checksum(index):
        raise Damaged(f"{path}: damaged: its checksum differs; pack the set again")
    for entry in index["shards"]:
        check_keys(path, entry, ShardInfo)
    return index


def write_index(directory: Path, index: dict[str, Any]) -> None:
    """Writes dataset.json, with the fingerprint and the checksum of ``index``: the set is whole."""
    index = index | {"fingerprint": fingerprint(index)}
    index = index | {"checksum": checksum(index)}
    atomic_write_text(directory / INDEX_FILE, json.dumps(index, indent=1) + "\n")


def sizes_of(directory: Path) -> tuple[int, int]:
    """Clips of a finished set and samples of a clip, without opening its shards.

    Raises as ``read_index``.
    """
    index = read_index(directory)
    return index["clips"], index["clip_samples"]


def require_audio(directory: Path) -> None:
    """Checks that a finished set was packed with its audio, without opening its shards.

    Raises:
        UserError: it was packed without.
        UserError, Damaged: as ``read_index``.
    """
    _check_codec(directory, read_index(directory)["codec"])


def _check_codec(directory: Path, codec: str) -> None:
    if codec == "none":
        raise UserError(
            f"{directory}: packed with --codec none, it holds no audio; fastat train --source dali "
            "trains from the original files; for anything else pack it with another codec"
        )


def fingerprint(index: dict[str, Any]) -> str:
    """A checksum of the content: the classes and, through the shards' checksums, every row."""
    content = {name: index[name] for name in ("classes", "clip_samples", "shards")}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def checksum(index: dict[str, Any]) -> str:
    """A checksum of everything in the index but the checksum itself."""
    rest = {name: value for name, value in index.items() if name != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
