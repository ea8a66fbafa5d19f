"""Finds which files of a packed set DALI can decode, before its pipeline starts.

DALI ends the pipeline at the first file that it cannot decode, so here DALI decodes every file
once. It has a libsndfile of its own and reads some files differently from packing: a file that it
makes shorter than the packed row is bad too. The result is kept in the set's folder
(``dali_checked.npz``) with each file's size and time of change, so that the next run only looks at
files that changed since. Bad files are listed in ``dali_bad.csv``, in the form of ``bad.csv``.
"""

import logging
import os
import stat
import zipfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby, islice
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import soundfile as sf
from numpy.typing import NDArray

from fastat.audio.hdf5_source import is_row
from fastat.data.shards import SAMPLE_RATE, PackedSet
from fastat.system.files import atomic_path, write_csv
from fastat.system.progress import progress

log = logging.getLogger(__name__)

CHECKED_FILE = "dali_checked.npz"
BAD_FILE = "dali_bad.csv"
MAX_VALUES = 2**31 - 1
"""Limit of samples times channels of a file, which DALI decodes as a whole."""
BATCH, BATCH_VALUES = 64, 2**26
"""Limits of a batch: number of files, and their samples times channels (256 MB in float32)."""
CHUNK_ROWS = 2048
MARGIN_SECONDS = 1
"""Audio beyond a cut that the resampler reads at other rates than 16 kHz, as in ``decode``."""


class Header(NamedTuple):
    """A file that DALI can decode, as it was when it was checked."""

    size: int
    mtime_ns: int
    rate: int
    channels: int
    frames: int


class Refusal(NamedTuple):
    """A file that DALI cannot decode, or that the set cannot use."""

    reason: str
    size: int = 0
    mtime_ns: int = 0
    """Size and time of change when DALI refused the file; zeros if DALI did not see it."""


class BadClip(NamedTuple):
    """A row that DALI cannot deliver."""

    row: int
    path: str
    reason: str


@dataclass(frozen=True)
class Clips:
    """Where each of N rows lies in its file. Bad rows have zeros."""

    first: NDArray[np.int32]
    """Samples at the file's rate, a whole number of seconds, before the part to resample."""
    length: NDArray[np.int32]
    """Samples of the part to resample, at the file's rate."""
    skip: NDArray[np.int32]
    """Samples at 16 kHz between the start of that part and the start of the clip."""
    rate: NDArray[np.int32]
    """Hz."""
    channels: NDArray[np.int32]
    headers: NDArray[np.int64]
    """[N, 5] the files' headers, in the order of ``Header``."""
    bad: list[BadClip]

    @property
    def usable(self) -> NDArray[np.bool_]:
        return self.rate > 0


def check(packed: PackedSet, graph: ModuleType, threads: int) -> Clips:
    """Lets DALI decode the original file of every row of ``packed``, on ``threads`` threads.

    Args:
        graph: the module ``dali_graph``, which can only be imported if DALI is installed.
    """
    N = packed.num_clips
    fingerprint = f"{packed.fingerprint} DALI {graph.DALI_VERSION}"
    known = _load(packed, fingerprint)
    kept = Checked(np.zeros_like(known.headers), {})
    first, length, skip, rate, channels = np.zeros((5, N), np.int32)
    clips = Clips(first, length, skip, rate, channels, headers=kept.headers, bad=[])
    files = _by_file(packed)
    with (
        ThreadPoolExecutor(threads, "fastat-check") as readers,
        progress("checking files for DALI", N) as advance,
    ):
        decoder = Decoder(graph, readers, threads)
        while part := list(islice(files, BATCH)):
            results = decoder.look(
                [path for path, _ in part], [known.of(places[0][0]) for _, places in part]
            )
            for (path, places), found in zip(part, results, strict=True):
                if isinstance(found, Refusal) and found.mtime_ns:
                    kept.refusals[places[0][0]] = found
                for row, start_seconds in places:
                    if isinstance(found, Refusal):
                        reason = found.reason
                    else:
                        kept.headers[row] = found
                        reason = _place(clips, packed, row, start_seconds, found)
                    if reason:
                        clips.bad.append(BadClip(row, path, reason))
                advance(len(places))
    try:
        if known.refusals != kept.refusals or not np.array_equal(known.headers, kept.headers):
            _save(packed, fingerprint, kept)
        _list_bad(packed, clips.bad)
    except OSError as error:
        log.info(f"cannot write to {packed.directory} ({error.strerror}): the check is not kept")
    return clips


class Checked(NamedTuple):
    """Results that a check keeps for the next one."""

    headers: NDArray[np.int64]
    """[N, 5] the header of each row's file, in the order of ``Header``; zeros for bad files."""
    refusals: dict[int, Refusal]
    """Files that DALI refused, by their first rows."""

    def of(self, row: int) -> Header | Refusal | None:
        """The kept result for the file whose first row is ``row``."""
        header = Header(*self.headers[row].tolist())
        return header if header.rate else self.refusals.get(row)


class FileToCheck(NamedTuple):
    """A file for DALI to decode."""

    path: str
    size: int
    mtime_ns: int
    values: int
    """Samples times channels by its header; 0 if our libsndfile cannot read it."""


class Decoder:
    """Decodes files with DALI to see whether it can. The threads of ``readers`` read them."""

    def __init__(self, graph: ModuleType, readers: ThreadPoolExecutor, threads: int) -> None:
        self._graph, self._readers, self._threads = graph, readers, threads
        self._pipe = self._build()

    def look(
        self, paths: Sequence[str], known: Sequence[Header | Refusal | None]
    ) -> list[Header | Refusal]:
        """Each file's header, or why DALI cannot decode it; up to ``BATCH`` files.

        Args:
            known: earlier results; a file that did not change since is not decoded again.
        """
        found = list(self._readers.map(_examine, paths, known))
        decoded = iter(self._decode([file for file in found if isinstance(file, FileToCheck)]))
        return [next(decoded) if isinstance(file, FileToCheck) else file for file in found]

    def _decode(self, files: list[FileToCheck]) -> list[Header | Refusal]:
        if not files:
            return []
        refusal = Refusal("")
        if len(files) == 1 or sum(file.values for file in files) <= BATCH_VALUES:
            try:
                encoded = list(self._readers.map(_bytes, files))
                self._pipe.feed_input("encoded", encoded)
                samples, rates = self._pipe.run()
            except FileNotFoundError:
                refusal = Refusal("missing")
            except OSError as error:
                refusal = Refusal(f"unreadable: {error.strerror}")
            except RuntimeError as error:
                reason = f"unreadable: DALI: {self._graph.reason_of(error)}"
                refusal = Refusal(reason, files[0].size, files[0].mtime_ns)
                self._pipe = self._build()  # a pipeline ends with its first error
            else:
                return [
                    _header(file, samples.at(i), float(rates.at(i))) for i, file in enumerate(files)
                ]
        if len(files) == 1:
            return [refusal]
        middle = len(files) // 2
        return self._decode(files[:middle]) + self._decode(files[middle:])

    def _build(self) -> Any:
        pipe = self._graph.decode_pipeline(
            "float32",
            batch_size=BATCH,
            num_threads=self._threads,
            device_id=None,
            prefetch_queue_depth=1,
        )
        pipe.build()
        return pipe


def _examine(path: str, known: Header | Refusal | None) -> FileToCheck | Header | Refusal:
    """Looks at a file without decoding it; returns ``known`` if it did not change."""
    if is_row(path):
        return Refusal("unreadable: a row of an HDF5 file, DALI reads audio files")
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return Refusal("missing")
    except OSError as error:
        return Refusal(f"unreadable: {error.strerror}")
    if known is not None and (known.size, known.mtime_ns) == (status.st_size, status.st_mtime_ns):
        return known
    if not stat.S_ISREG(status.st_mode):
        return Refusal("unreadable: not a file")
    if status.st_size == 0:
        return Refusal("empty: 0 bytes")
    try:
        info = sf.info(os.fsencode(path))
        values = info.frames * info.channels
    except (sf.LibsndfileError, TypeError):  # TypeError: soundfile asks for the rate of *.raw
        values = 0
    if values > MAX_VALUES:
        reason = "unreadable: its header promises no number of samples, or more than DALI's 2^31"
        return Refusal(reason)
    return FileToCheck(path, status.st_size, status.st_mtime_ns, values)


def _bytes(file: FileToCheck) -> NDArray[np.uint8]:
    return np.fromfile(file.path, np.uint8)


def _header(file: FileToCheck, samples: NDArray[np.float32], rate: float) -> Header | Refusal:
    """The header of a file that DALI decoded to ``samples`` [n, C], or why they are no use."""
    frames, channels = samples.shape
    if frames == 0:
        return Refusal("empty: no samples", file.size, file.mtime_ns)
    if not np.isfinite(samples).all():
        return Refusal("non-finite: NaN or infinite samples", file.size, file.mtime_ns)
    return Header(file.size, file.mtime_ns, int(rate), channels, frames)


def _by_file(packed: PackedSet) -> Iterator[tuple[str, list[tuple[int, float]]]]:
    """Yields each file with its rows, which are neighbours, and their starts in seconds."""
    for start in range(0, packed.num_clips, CHUNK_ROWS):
        rows = np.arange(start, min(start + CHUNK_ROWS, packed.num_clips))
        sources = zip(rows.tolist(), packed.sources(rows), strict=True)
        for path, group in groupby(sources, key=lambda item: item[1][0]):
            yield path, [(row, start_seconds) for row, (_, start_seconds) in group]


def _place(clips: Clips, packed: PackedSet, row: int, start_seconds: float, header: Header) -> str:
    """Records in ``clips`` where the row lies in its file; returns why DALI cannot deliver it.

    That is so if the file changed since packing, or packing read it with another decoder.
    """
    rate = header.rate
    start = round(start_seconds * SAMPLE_RATE)
    there = min(round(header.frames * SAMPLE_RATE / rate) - start, packed.clip_samples)
    packed_samples = int(packed.num_samples[row])
    # Resamplers differ by a sample about where a file ends.
    if abs(there - packed_samples) > (0 if rate == SAMPLE_RATE else 2):
        return (
            f"length differs: DALI decodes {max(there, 0) / SAMPLE_RATE:.4f} s from "
            f"{start_seconds:g} s on, packed were {packed_samples / SAMPLE_RATE:.4f} s"
        )
    # From a whole second on, where a sample falls on the 16 kHz grid at any rate.
    first_second = max(0, int(start_seconds) - MARGIN_SECONDS)
    seconds = start_seconds - first_second + packed.clip_samples / SAMPLE_RATE + MARGIN_SECONDS
    clips.first[row] = first_second * rate
    clips.length[row] = min(header.frames - first_second * rate, int(np.ceil(seconds * rate)))
    clips.skip[row] = start - first_second * SAMPLE_RATE
    clips.rate[row] = rate
    clips.channels[row] = header.channels
    return ""


def _load(packed: PackedSet, fingerprint: str) -> Checked:
    """The results of an earlier check."""
    path = packed.directory / CHECKED_FILE
    nothing = Checked(np.zeros((packed.num_clips, len(Header._fields)), np.int64), {})
    if not path.exists():
        return nothing
    try:
        with np.load(path, allow_pickle=False) as file:
            checked, headers = str(file["fingerprint"]), file["headers"]
            stamps = zip(file["refused"].tolist(), file["reasons"].tolist(), strict=True)
            refusals = {row: Refusal(why, size, time) for (row, size, time), why in stamps}
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        log.info(f"{path} is not readable ({error}): checking every file again")
        return nothing
    if checked != fingerprint or headers.shape != nothing.headers.shape:
        return nothing
    return Checked(np.asarray(headers, np.int64), refusals)


def _save(packed: PackedSet, fingerprint: str, checked: Checked) -> None:
    refused = [(row, file.size, file.mtime_ns) for row, file in checked.refusals.items()]
    with atomic_path(packed.directory / CHECKED_FILE) as path, path.open("wb") as file:
        np.savez_compressed(
            file,
            fingerprint=fingerprint,
            headers=checked.headers,
            refused=np.array(refused, np.int64).reshape(-1, 3),
            reasons=np.array([file.reason for file in checked.refusals.values()], np.str_),
        )


def _list_bad(packed: PackedSet, bad: list[BadClip]) -> None:
    """Writes dali_bad.csv, or removes an earlier one if there are no bad clips."""
    path = packed.directory / BAD_FILE
    if not bad:
        path.unlink(missing_ok=True)
        return
    rows = []
    for clip in bad:
        reason, _, detail = clip.reason.partition(": ")
        rows.append((clip.path, reason, detail, clip.row))
    write_csv(path, ("path", "reason", "detail", "row"), rows)
