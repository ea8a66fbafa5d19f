"""Rows as FLAC streams: about 58 % of the bytes, encoded while packing, decoded by DALI while
training.

A row is one complete FLAC stream of the clip's real samples, 16 bit mono; the zero padding is not
in it. Decoding gives back exactly these samples. Encoding is libFLAC's (soundfile) and runs in the
packing workers; decoding is a DALI pipeline on the CPU, with a thread for every core of this rank,
about 900 clips of ten seconds a second and core where soundfile's decoder makes 600.
"""

import io
import os
import threading
import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import soundfile as sf
from numpy.typing import NDArray

from fastat.errors import Failure, UserError

COMPRESSION_LEVEL = 5 / 8
"""libFLAC's 5 in soundfile's scale from 0 to 1. On ESC-10 at 16 kHz: level 0 59.8 % of PCM's bytes
and 1.7 ms a clip of ten seconds, 3 58.1 % and 1.8, 5 57.9 % and 1.8, 8 57.6 % and 3.2; the higher
also take longer to decode."""
PCM_SHARE = 0.6
"""What FLAC rows take of PCM's bytes, for a look at the free disk: recordings 0.3 to 0.8."""
READ_THREADS = 8
"""Reading ahead of DALI waits for the disk, not for a processor."""
READ_ROWS = 8
"""Of a reading thread's job."""
ROWS_PER_THREAD = 16
"""Of a DALI batch: enough that its threads end together."""
BATCHES_AHEAD = 2
"""One is decoded while the one before is copied out."""


class EncodedRow(NamedTuple):
    """A row to decode: where its bytes lie, what they must be, and where its samples go."""

    place: int
    """In the output."""
    fd: int
    offset: int
    num_bytes: int
    crc: int
    num_samples: int


class _Batch(NamedTuple):
    """Rows that DALI decodes together; it reads ``encoded`` where it lies."""

    rows: list[EncodedRow]
    encoded: list[NDArray[np.uint8]]


def encode(samples: NDArray[np.int16], sample_rate: int) -> bytes:
    """int16 [S], S > 0 -> a FLAC stream."""
    stream = io.BytesIO()
    sf.write(
        stream,
        samples,
        sample_rate,
        format="FLAC",
        subtype="PCM_16",
        compression_level=COMPRESSION_LEVEL,
    )
    return stream.getvalue()


def max_encoded_bytes(num_samples: int) -> int:
    """More than a FLAC stream of ``num_samples`` takes.

    What does not compress is stored as it is; frames of thousands of samples have heads of tens of
    bytes, the stream one of some hundred.
    """
    return 2 * num_samples + num_samples // 64 + 4096


def max_row_bytes(codec: str, clip_samples: int) -> int:
    """The most that a row takes in a shard."""
    return max_encoded_bytes(clip_samples) if codec == "flac" else 2 * clip_samples


def num_threads() -> int:
    """Cores of this rank: those of the process, shared with the other ranks that torchrun started
    here."""
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


class FlacReader:
    """Reads and decodes FLAC rows; its DALI pipeline and its threads serve all batches.

    Raises:
        UserError: DALI is not installed.
    """

    def __init__(self, threads: int) -> None:
        try:
            from fastat.data.dali_graph import flac_pipeline
        except ImportError as error:
            raise UserError(
                "FLAC shards need NVIDIA DALI (pip install nvidia-dali-cuda130), or a set packed "
                f"with --codec pcm16: {error}"
            ) from None
        self._batch = ROWS_PER_THREAD * threads
        self._build = partial(
            flac_pipeline,
            batch_size=self._batch,
            num_threads=threads,
            device_id=None,  # no context on a GPU
            prefetch_queue_depth=BATCHES_AHEAD,
        )
        self._idle: Any = None
        self._lock = threading.Lock()
        self._readers = ThreadPoolExecutor(READ_THREADS, "fastat-flac-read")

    def read(self, rows: Sequence[EncodedRow], out: NDArray[np.int16]) -> dict[int, str]:
        """Decodes ``rows`` into ``out`` [R, S], each to its place, padded with zeros.

        Returns what is wrong with the rows that are damaged, by their places, in the order of
        ``rows``; the others are whole. May be called from several threads.

        Raises:
            Failure: DALI cannot decode what the checksum says is as it was written.
        """
        wrong: dict[int, str] = {}
        under_way: deque[_Batch] = deque()
        with self._lock:
            pipe, self._idle = self._idle or self._start(), None
            for batch in self._loaded(rows, wrong):
                if len(under_way) == BATCHES_AHEAD:
                    wrong |= _take(pipe, under_way.popleft().rows, out)
                pipe.feed_input("encoded", batch.encoded)
                pipe.schedule_run()
                under_way.append(batch)
            while under_way:
                wrong |= _take(pipe, under_way.popleft().rows, out)
            # Only a pipeline that came to this end has nothing under way; the others are dropped.
            self._idle = pipe
        return {row.place: wrong[row.place] for row in rows if row.place in wrong}

    def close(self) -> None:
        """Frees the pipeline and ends the threads."""
        with self._lock:
            self._idle = None
            self._readers.shutdown()

    def _start(self) -> Any:
        pipe = self._build()
        # The first run takes as many inputs as the pipeline works ahead; every later one takes one.
        silence = np.frombuffer(encode(np.zeros(1, np.int16), 16_000), np.uint8)
        for _ in range(BATCHES_AHEAD):
            pipe.feed_input("encoded", [silence])
        pipe.schedule_run()
        for _ in range(BATCHES_AHEAD):
            pipe.share_outputs()
            pipe.release_outputs()
        return pipe

    def _loaded(self, rows: Sequence[EncodedRow], wrong: dict[int, str]) -> Iterator[_Batch]:
        """Batches of whole rows; what is not whole goes to ``wrong``."""
        parts = [rows[start : start + READ_ROWS] for start in range(0, len(rows), READ_ROWS)]
        batch = _Batch([], [])
        for part, loaded in zip(parts, self._readers.map(_load, parts), strict=True):
            for row, found in zip(part, loaded, strict=True):
                if isinstance(found, str):
                    wrong[row.place] = found
                    continue
                batch.rows.append(row)
                batch.encoded.append(found)
                if len(batch.rows) == self._batch:
                    yield batch
                    batch = _Batch([], [])
        if batch.rows:
            yield batch


def _take(pipe: Any, rows: list[EncodedRow], out: NDArray[np.int16]) -> dict[int, str]:
    """Copies DALI's next batch to its places; says which rows are not as long as they should be."""
    try:
        (decoded,) = pipe.share_outputs()
    except RuntimeError as error:
        lines = str(error).partition("encountered:")[2].split("\n")
        reason = next((line for line in lines if line), str(error))
        raise Failure(f"DALI cannot decode FLAC rows: {reason}") from error
    wrong: dict[int, str] = {}
    for i, row in enumerate(rows):
        samples = decoded.at(i)
        if samples.shape != (row.num_samples, 1):
            found = " x ".join(map(str, samples.shape))
            wrong[row.place] = f"is damaged: {found} samples, not {row.num_samples} x 1"
            continue
        out[row.place, : row.num_samples] = samples[:, 0]
        out[row.place, row.num_samples :] = 0
    pipe.release_outputs()
    return wrong


def _load(rows: Sequence[EncodedRow]) -> list[NDArray[np.uint8] | str]:
    """Each row's bytes, or what is wrong with them."""
    loaded: list[NDArray[np.uint8] | str] = []
    for row in rows:
        encoded = np.empty(row.num_bytes, np.uint8)
        data = encoded.data
        got = 0
        try:
            while got < row.num_bytes and (
                count := os.preadv(row.fd, [data[got:]], row.offset + got)
            ):
                got += count
        except OSError as error:
            loaded.append(f"cannot be read: {error.strerror}")
            continue
        whole = got == row.num_bytes and zlib.crc32(data) == row.crc
        loaded.append(encoded if whole else "is damaged: its checksum differs")
    return loaded
