"""Which files of a packed set DALI can take, found before its pipeline starts.

DALI ends the pipeline at the first file it cannot decode, so every file is decoded whole here once,
with libsndfile, which is also what DALI decodes with. What was found good is kept in the set's
folder (``dali_checked.npz``) with each file's size and time of change, so that the next run only
looks at files that changed since; the bad ones are listed in ``dali_bad.csv``, as packing does in
``bad.csv``.
"""

import csv
import os
import sys
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile as sf
from numpy.typing import NDArray

from fastat.atomic import atomic_path
from fastat.data.decode import BadAudio, decode
from fastat.data.hdf5_source import is_row
from fastat.data.reader import UNKNOWN_FRAMES
from fastat.data.shards import SAMPLE_RATE, PackedSet
from fastat.progress import progress

CHECKED_FILE = "dali_checked.npz"
BAD_FILE = "dali_bad.csv"
FORMATS = ("WAV", "WAVEX", "RF64", "W64", "FLAC", "OGG", "AIFF", "AU", "CAF")
"""libsndfile's names. DALI documents WAV, FLAC and OGG (Vorbis, Opus); the others are containers of
the same samples and were tried with DALI 2.4. Its libsndfile has no MP3 decoder."""
NO_SUBTYPES = ("DWVW", "MPEG")
"""Codings inside those that DALI does not decode."""
MAX_VALUES = 2**31 - 1
"""Samples times channels of a file, which DALI holds decoded as a whole."""
MARGIN_SECONDS = 1
"""Read beyond a cut at other rates than 16 kHz, for the resampler, as ``decode`` does."""
CHUNK_ROWS = 2048


class Header(NamedTuple):
    """A file that DALI can take, as it was when it was checked."""

    size: int
    mtime_ns: int
    rate: int
    channels: int
    frames: int


class BadClip(NamedTuple):
    """A row that DALI cannot deliver."""

    row: int
    path: str
    reason: str


@dataclass(frozen=True)
class Clips:
    """Where each of N rows lies in its file; zeros for bad rows."""

    first: NDArray[np.int32]
    """Samples at the file's rate before what has to be resampled: whole seconds."""
    length: NDArray[np.int32]
    """Samples of it."""
    skip: NDArray[np.int32]
    """Samples at 16 kHz between there and the start of the clip."""
    rate: NDArray[np.int32]
    """Hz."""
    channels: NDArray[np.int32]
    bad: list[BadClip]

    @property
    def usable(self) -> NDArray[np.bool_]:
        return self.rate > 0


def check(packed: PackedSet, threads: int) -> Clips:
    """Looks at the original file of every row of ``packed``, ``threads`` files at a time."""
    N = packed.num_clips
    known = _load(packed)
    kept = np.zeros((N, len(Header._fields)), np.int64)
    first, length, skip, rate, channels = np.zeros((5, N), np.int32)
    clips = Clips(first, length, skip, rate, channels, bad=[])
    with (
        ThreadPoolExecutor(threads, "fastat-check") as pool,
        progress("checking files for DALI", N) as advance,
    ):
        for start in range(0, N, CHUNK_ROWS):
            rows = np.arange(start, min(start + CHUNK_ROWS, N))
            files = list(_by_file(packed, rows))
            headers = pool.map(lambda file: look(file[0], Header(*known[file[1][0][0]])), files)
            for (path, places), header in zip(files, headers, strict=True):
                for row, start_seconds in places:
                    reason = header if isinstance(header, str) else ""
                    if isinstance(header, Header):
                        kept[row] = header
                        reason = _place(clips, packed, row, start_seconds, header)
                    if reason:
                        clips.bad.append(BadClip(row, path, reason))
            advance(len(rows))
    try:
        if not np.array_equal(known, kept):
            _save(packed, kept)
        _list_bad(packed, clips.bad)
    except OSError as error:
        _note(f"cannot write to {packed.directory} ({error.strerror}): the check is not kept")
    return clips


def look(path: str, known: Header | None = None) -> Header | str:
    """The file's header, or why DALI cannot take it; decodes the file unless it is as ``known``."""
    if is_row(path):
        return "unreadable: a row of an HDF5 file, DALI reads audio files"
    try:
        status = os.stat(path)
        unchanged = (status.st_size, status.st_mtime_ns)
        if known is not None and known.rate and (known.size, known.mtime_ns) == unchanged:
            return known
        if status.st_size == 0:
            return "empty: 0 bytes"
        info = sf.info(path)
    except FileNotFoundError:
        return "missing"
    except OSError as error:
        return f"unreadable: {error.strerror}"
    except sf.LibsndfileError as error:
        return f"unreadable: DALI decodes {', '.join(FORMATS)}; {error.error_string}"
    except TypeError:  # soundfile asks for rate and coding of headerless files, *.raw
        return "unreadable: a file without a header"
    if info.format not in FORMATS or info.subtype.startswith(NO_SUBTYPES):
        return f"unreadable: DALI does not decode {info.format} ({info.subtype})"
    if info.frames >= UNKNOWN_FRAMES:
        return "unreadable: its header does not say how long it is"
    if info.frames * info.channels > MAX_VALUES:
        return f"unreadable: {info.frames} samples x {info.channels} channels, DALI takes 2^31"
    if info.frames == 0:
        return "empty: no samples"
    try:
        decode(Path(path))
    except BadAudio as error:
        return str(error)
    return Header(status.st_size, status.st_mtime_ns, info.samplerate, info.channels, info.frames)


def _by_file(
    packed: PackedSet, rows: NDArray[np.int64]
) -> Iterator[tuple[str, list[tuple[int, float]]]]:
    """Each file with its ``rows``, which are neighbours, and their start in seconds."""
    sources = zip(rows.tolist(), packed.sources(rows), strict=True)
    for path, group in groupby(sources, key=lambda item: item[1][0]):
        yield path, [(row, start_seconds) for row, (_, start_seconds) in group]


def _place(clips: Clips, packed: PackedSet, row: int, start_seconds: float, header: Header) -> str:
    """Notes where the row lies in its file; why it cannot, if the file is not the one packed."""
    rate = header.rate
    start = round(start_seconds * SAMPLE_RATE)
    there = min(round(header.frames * SAMPLE_RATE / rate) - start, packed.clip_samples)
    packed_samples = int(packed.num_samples[row])
    # Resamplers differ by a sample about where a file ends.
    if abs(there - packed_samples) > (0 if rate == SAMPLE_RATE else 2):
        return (
            f"changed since packing: {max(there, 0) / SAMPLE_RATE:.4f} s from "
            f"{start_seconds:g} s on, packed were {packed_samples / SAMPLE_RATE:.4f} s"
        )
    # From a whole second: there the resampled grid has a sample at any rate.
    first_second = max(0, int(start_seconds) - MARGIN_SECONDS)
    seconds = start_seconds - first_second + packed.clip_samples / SAMPLE_RATE + MARGIN_SECONDS
    clips.first[row] = first_second * rate
    clips.length[row] = min(header.frames - first_second * rate, int(np.ceil(seconds * rate)))
    clips.skip[row] = start - first_second * SAMPLE_RATE
    clips.rate[row] = rate
    clips.channels[row] = header.channels
    return ""


def _load(packed: PackedSet) -> NDArray[np.int64]:
    """What an earlier check of this set kept, [N, 5] headers; zeros where nothing is known."""
    path = packed.directory / CHECKED_FILE
    nothing = np.zeros((packed.num_clips, len(Header._fields)), np.int64)
    if not path.exists():
        return nothing
    try:
        with np.load(path, allow_pickle=False) as file:
            fingerprint, headers = str(file["fingerprint"]), file["headers"]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        _note(f"{path} is not readable ({error}): checking every file again")
        return nothing
    if fingerprint != packed.fingerprint or headers.shape != nothing.shape:
        return nothing
    return np.asarray(headers, np.int64)


def _save(packed: PackedSet, headers: NDArray[np.int64]) -> None:
    with atomic_path(packed.directory / CHECKED_FILE) as path, path.open("wb") as file:
        np.savez_compressed(file, fingerprint=packed.fingerprint, headers=headers)


def _list_bad(packed: PackedSet, bad: list[BadClip]) -> None:
    """Writes the list, or removes an earlier one."""
    path = packed.directory / BAD_FILE
    if not bad:
        path.unlink(missing_ok=True)
        return
    with (
        atomic_path(path) as temporary,
        temporary.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(("path", "reason", "detail", "row"))
        for clip in bad:
            reason, _, detail = clip.reason.partition(": ")
            writer.writerow((clip.path, reason, detail, clip.row))


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
