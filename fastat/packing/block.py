"""One task of ``fastat pack``: a block of a table's lines -> one shard.

A task depends on nothing but its block, and leaves nothing but its shard, so any process on any
host may run it. What the set must know of the shard besides its rows is inside it: the dataset
``block`` holds a ``Report``.
"""

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import h5py
import numpy as np
from numpy.typing import NDArray
from zlib_ng import zlib_ng

from fastat.audio.bad_audio import BadAudio
from fastat.audio.decode import decode, to_int16
from fastat.audio.features import FEATURES
from fastat.audio.hdf5_source import Hdf5Rows, is_row
from fastat.data.flac import encode
from fastat.data.shard_file import Damaged, ShardRows, write_shard
from fastat.data.shards import INDEX_FILE, SAMPLE_RATE, VERSION
from fastat.packing.bad_files import NotedFile, has_changed, stamp
from fastat.packing.manifest import BadFile, Entry
from fastat.system.errors import H5PY_ERRORS, Failure, UserError, first_line

APPEND = "append"
"""The command of blocks that are appended: their shards are named by what is in them."""
BLOCK_BYTES = 256 << 20
"""The most that the rows of a block take as int16, each file being one clip."""


class Layout(NamedTuple):
    """What decides the rows of a set besides its table."""

    clip_samples: int
    segments: bool
    codec: str
    class_ids: tuple[str, ...]

    @property
    def min_segment_samples(self) -> int:
        """A shorter remainder of a file is dropped, unless it is all there is."""
        return min(SAMPLE_RATE, self.clip_samples)


class Block(NamedTuple):
    """Neighbouring lines of a table, which become one shard."""

    path: Path
    """Of the shard."""
    layout: Layout
    entries: tuple[Entry, ...]
    stats_clips: tuple[int, ...]
    """How many clips of each entry the statistics are taken from."""
    command: str
    fingerprint: str


class Sums(NamedTuple):
    """Over the bins of real frames of sampled clips, in the feature's units."""

    clips: int = 0
    bins: int = 0
    total: float = 0.0
    squares: float = 0.0

    @classmethod
    def over(cls, parts: Iterable["Sums"]) -> "Sums":
        """Added up in the order given."""
        return cls(*(sum(column) for column in zip(cls(), *parts, strict=True)))

    def mean_and_std(self) -> tuple[float, float]:
        """NaN where there is no bin."""
        if not self.bins:
            return math.nan, math.nan
        mean = self.total / self.bins
        return mean, math.sqrt(max(self.squares / self.bins - mean**2, 0.0))


class Report(NamedTuple):
    """What a shard adds to its set."""

    command: str
    """Fingerprint of the command without the content of its table: only the same one replaces a
    shard."""
    fingerprint: str
    """Of the block."""
    clips: int
    num_samples: int
    """Without padding."""
    bad: list[BadFile]
    noted: list[NotedFile]
    sums: dict[str, Sums]
    """Of each feature."""

    @classmethod
    def parse(cls, text: bytes, path: Path | str) -> "Report":
        """From the dataset ``block`` of the shard at ``path``; Damaged if it is none."""
        try:
            fields = json.loads(text)
            bad = [BadFile(*file) for file in fields["bad"]]
            noted = [NotedFile(*file) for file in fields["noted"]]
            sums = {name: Sums(*values) for name, values in fields["sums"].items()}
            return cls(**fields | {"bad": bad, "noted": noted, "sums": sums})
        except (ValueError, KeyError, TypeError) as error:
            raise Damaged(f"{path}: damaged: {error!r} in its dataset block") from error

    @property
    def is_up_to_date(self) -> bool:
        """Whether its bad files still are as they were when they were tried."""
        return not any(has_changed(file) for file in self.bad)


def fingerprint(layout: Layout, entries: Sequence[Entry], stats_clips: Sequence[int]) -> str:
    """Of everything that decides the shard of a block, but for the content of its files."""
    digest = hashlib.sha256(json.dumps([VERSION, layout, stats_clips]).encode())
    for entry in entries:
        digest.update(repr(tuple(entry)).encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def read_report(path: Path) -> Report:
    """The report in the shard at ``path``; raises Damaged if it holds none."""
    try:
        with h5py.File(path, locking=False) as file:
            text = file["block"][()].tobytes()
    except H5PY_ERRORS as error:
        raise Damaged(f"{path}: damaged: {first_line(error)}") from error
    return Report.parse(text, path)


def pack_block(block: Block, crashing: Mapping[str, str] | None = None) -> Report:
    """Decodes the files of ``block`` and writes its shard; the report that is in it.

    ``crashing`` are files that must not be decoded here, because that ends the process, with what
    happens. If another process of the same command has written the shard, that one stays.

    The rows wait until their number is known: in memory as far as a block is meant to go, beyond
    that in a temporary file.

    Raises:
        UserError: another command has written this shard, or finished the set.
        Failure: the disk refuses, or there is no memory for a file.
    """
    if report := _existing(block):
        return report
    try:
        folder = str(block.path.parent)
        with tempfile.SpooledTemporaryFile(BLOCK_BYTES, dir=folder, prefix=".shard-") as spill:
            rows = _Rows(block.layout, spill)
            for entry, stats_clips in zip(block.entries, block.stats_clips, strict=True):
                rows.add_file(entry, stats_clips, (crashing or {}).get(entry.path))
            report = rows.report(block)
            spill.seek(0)
            arrays, layout = rows.arrays(report), block.layout
            if another := _existing(block):
                return another
            write_shard(block.path, arrays, layout.codec, layout.clip_samples, spill)
    except OSError as error:
        # Another process of the same command may have finished the set and tidied up.
        if isinstance(error, FileNotFoundError) and (another := _existing(block)):
            return another
        reason = error.strerror or str(error)
        raise Failure(f"{block.path.parent}: cannot write: {reason}") from error
    return report


def try_file(entry: Entry, layout: Layout) -> None:
    """Does with a file what ``pack_block`` does, to see whether the process survives it."""
    with open(os.devnull, "wb") as nowhere:
        _Rows(layout, nowhere).add_file(entry, 0, None)


def _existing(block: Block) -> Report | None:
    """The report of the block's shard, if that is there and up to date."""
    if not block.path.exists():
        return None
    report = read_report(block.path)
    is_ours = report.command == block.command
    finished = block.command != APPEND and (block.path.parent / INDEX_FILE).exists()
    if is_ours and report.fingerprint == block.fingerprint and (finished or report.is_up_to_date):
        return report
    if finished or not is_ours:
        raise UserError(f"--out {block.path.parent}: another fastat pack is writing to it")
    return None


class _Rows:
    """The rows of a shard so far; their audio goes to ``spill``."""

    def __init__(self, layout: Layout, spill: IO[bytes]) -> None:
        self.layout, self.spill = layout, spill
        self.entries: list[Entry] = []
        self.start_seconds: list[float] = []
        self.num_samples: list[int] = []
        self.crcs: list[int] = []
        self.ends = [0]
        self.bad: list[BadFile] = []
        self.noted: list[NotedFile] = []
        self._hdf5 = Hdf5Rows()
        self._meter: Any = None

    def add_file(self, entry: Entry, stats_clips: int, crash: str | None) -> None:
        """Appends the clips of a file, ``stats_clips`` of them measured, or lists it as bad."""
        seconds = None
        if not self.layout.segments:
            seconds = self.layout.clip_samples / SAMPLE_RATE
        tried = stamp(entry.path)  # before decoding: the file may be being written
        try:
            if entry.bad is not None:
                raise BadAudio(entry.bad.reason, entry.bad.detail)
            if crash is not None:
                raise BadAudio("unreadable", crash)
            if is_row(entry.path):
                audio = self._hdf5.decode(entry.path, SAMPLE_RATE, seconds)
            else:
                audio = decode(Path(entry.path), SAMPLE_RATE, seconds)
        except BadAudio as bad:
            labels = ";".join(self.layout.class_ids[k] for k in entry.labels)
            found = BadFile(entry.path, bad.reason, bad.detail, labels, entry.line, *tried)
            self.bad.append(entry.bad or found)
            return
        except MemoryError as error:
            raise Failure(
                f"not enough memory for {entry.path}; the same command goes on, perhaps with "
                "fewer --workers"
            ) from error
        self.noted.extend(NotedFile(entry.path, *note, entry.line) for note in audio.notes)
        clips = cut(audio.samples, self.layout)
        # Evenly spread over the file.
        step = max(1.0, len(clips) / stats_clips) if stats_clips else 0.0
        measured = {int(i * step) for i in range(stats_clips)}
        for number, clip in enumerate(clips):
            self._add_clip(entry, number, to_int16(clip), number in measured)

    def _add_clip(self, entry: Entry, number: int, clip: NDArray[np.int16], measured: bool) -> None:
        row = np.zeros(self.layout.clip_samples, np.int16)
        row[: len(clip)] = clip
        stored = encode(clip, SAMPLE_RATE) if self.layout.codec == "flac" else row.tobytes()
        if self.layout.codec != "none":
            self.spill.write(stored)
        self.entries.append(entry)
        self.start_seconds.append(number * self.layout.clip_samples / SAMPLE_RATE)
        self.num_samples.append(len(clip))
        self.crcs.append(zlib_ng.crc32(stored))
        self.ends.append(self.ends[-1] + len(stored))
        if measured:
            if self._meter is None:
                from fastat.packing.statistics import Meter  # brings torch

                self._meter = Meter(self.layout.clip_samples)
            self._meter.add(row, len(clip))

    def report(self, block: Block) -> Report:
        """What the rows add to the set."""
        sums = {name: Sums() for name in FEATURES}
        if self._meter is not None:
            sums = self._meter.finish()
        clips, total = len(self.entries), sum(self.num_samples)
        return Report(block.command, block.fingerprint, clips, total, self.bad, self.noted, sums)

    def arrays(self, report: Report) -> ShardRows:
        """Everything but the audio, as it goes into the shard."""
        target = np.zeros((len(self.entries), len(self.layout.class_ids)), np.uint8)
        for row, entry in enumerate(self.entries):
            target[row, list(entry.labels)] = 1
        return ShardRows(
            np.array(self.num_samples, np.int32),
            np.packbits(target, axis=1),
            np.array([os.fsencode(entry.name) for entry in self.entries], np.bytes_),
            np.array([os.fsencode(entry.path) for entry in self.entries], np.bytes_),
            np.array(self.start_seconds, np.float64),
            np.array(self.crcs, np.uint32),
            np.frombuffer(json.dumps(report._asdict()).encode(), np.uint8),
            np.array(self.ends, np.int64) if self.layout.codec == "flac" else None,
        )


def cut(samples: NDArray[np.float32], layout: Layout) -> list[NDArray[np.float32]]:
    """A file's samples [S] -> its clips, each at most clip_samples long."""
    size = layout.clip_samples
    if not layout.segments:
        return [samples[:size]]
    clips = [samples[start : start + size] for start in range(0, len(samples), size)]
    return clips[:1] + [clip for clip in clips[1:] if len(clip) >= layout.min_segment_samples]
