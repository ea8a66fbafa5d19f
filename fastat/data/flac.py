"""FLAC rows, about 58 % of the bytes of PCM: encoded while packing, decoded by DALI while training.

A row is one complete FLAC stream of the clip's real samples, 16 bit mono, without the zero padding.
Decoding gives back exactly these samples. soundfile (libFLAC) encodes in the packing workers; a
DALI pipeline on the CPU decodes, with one thread for each core of this rank.
"""

import io
import threading
from collections import deque
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import soundfile as sf
from numpy.typing import NDArray

from fastat.data.row_reader import RowReader
from fastat.errors import Failure, UserError
from fastat.host import cores_of_rank

COMPRESSION_LEVEL = 5 / 8
"""libFLAC's 5, in soundfile's scale from 0 to 1. On ESC-10 at 16 kHz: level 0 59.8 % of PCM's bytes
and 1.7 ms for ten seconds, 3 58.1 % and 1.8, 5 57.9 % and 1.8, 6 57.8 % and 2.1, 8 57.6 % and
3.2."""
ROWS_PER_THREAD = 16
"""Rows of a DALI batch for each thread: enough that the threads end at about the same time."""
BATCHES_AHEAD = 2
"""Batches that DALI holds: one is decoded while the next is read and the last is copied out."""


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


def max_row_bytes(codec: str, clip_samples: int) -> int:
    """Upper bound of the bytes that a row takes in a shard.

    FLAC stores what it cannot compress as it is. The header of a frame of thousands of samples
    takes tens of bytes, that of the stream some hundred.
    """
    return 2 * clip_samples + (clip_samples // 64 + 4096 if codec == "flac" else 0)


class _Batch(NamedTuple):
    """Rows that DALI decodes together; it reads ``encoded`` in place."""

    places: list[int]
    num_samples: list[int]
    encoded: list[NDArray[np.uint8]]


class FlacReader:
    """Reads and decodes FLAC rows with one DALI pipeline for all batches and threads.

    Args:
        reader: the set's reader.
        num_samples: [N] number of real samples of each row of the set.

    Raises:
        UserError: DALI is not installed.
    """

    def __init__(self, reader: RowReader, num_samples: NDArray[np.int32]) -> None:
        try:
            from fastat.data.dali_graph import decode_pipeline
        except ImportError as error:
            raise UserError(
                "FLAC shards need NVIDIA DALI (pip install nvidia-dali-cuda130), or a set packed "
                f"with --codec pcm16: {error}"
            ) from None
        self.reader, self.num_samples = reader, num_samples
        self._batch = ROWS_PER_THREAD * cores_of_rank()
        self._build = partial(
            decode_pipeline,
            "int16",
            batch_size=self._batch,
            num_threads=cores_of_rank(),
            device_id=None,  # no context on a GPU
            prefetch_queue_depth=BATCHES_AHEAD,
        )
        self._idle: Any = None
        self._lock = threading.Lock()

    def read(
        self,
        rows: NDArray[np.int64],
        places: NDArray[np.int64],
        out: NDArray[np.int16],
    ) -> dict[int, str]:
        """Decodes ``rows[places]`` into ``out[places]``, [S] each, padded with zeros.

        Returns:
            Reasons why rows could not be read, differ from their CRC or have another length, by
            place; ``out`` is undefined there.

        Raises:
            Failure: DALI cannot decode a row whose CRC is right.
        """
        places = places[np.argsort(rows[places], kind="stable")]
        with self._lock:
            return self._read_in_order(rows, places, out)

    def _read_in_order(
        self, rows: NDArray[np.int64], places: NDArray[np.int64], out: NDArray[np.int16]
    ) -> dict[int, str]:
        bad: dict[int, str] = {}
        under_way: deque[_Batch] = deque()
        pipe, self._idle = self._idle or self._start(), None
        for start in range(0, len(places), self._batch):
            batch = self._load(rows, places[start : start + self._batch], bad)
            if len(under_way) == BATCHES_AHEAD:
                bad |= _take(pipe, under_way.popleft(), out)
            if batch.places:
                pipe.feed_input("encoded", batch.encoded)
                pipe.schedule_run()
                under_way.append(batch)
        while under_way:
            bad |= _take(pipe, under_way.popleft(), out)
        # After an exception the pipeline still holds batches, and a new one is made.
        self._idle = pipe
        return bad

    def _start(self) -> Any:
        pipe = self._build()
        # The first run takes as many inputs as the pipeline holds; each later one takes one.
        silence = np.frombuffer(encode(np.zeros(1, np.int16), 16_000), np.uint8)
        for _ in range(BATCHES_AHEAD):
            pipe.feed_input("encoded", [silence])
        pipe.schedule_run()
        for _ in range(BATCHES_AHEAD):
            pipe.share_outputs()
            pipe.release_outputs()
        return pipe

    def _load(
        self, rows: NDArray[np.int64], places: NDArray[np.int64], bad: dict[int, str]
    ) -> _Batch:
        """Reads the streams of rows[places]; reasons for damaged ones go to ``bad`` instead."""
        wanted = rows[places]
        assert self.reader.spans is not None
        ends = np.cumsum(self.reader.spans.size[wanted], dtype=np.int64)
        starts = np.concatenate([[0], ends[:-1]])
        memory = np.empty(ends[-1], np.uint8)
        found = self.reader.read(wanted, memory.data, starts)
        bad |= {int(places[i]): reason for i, reason in found.items()}
        whole = [i for i in range(len(wanted)) if i not in found]
        return _Batch(
            places[whole].tolist(),
            self.num_samples[wanted[whole]].tolist(),
            [memory[starts[i] : ends[i]] for i in whole],
        )


def _take(pipe: Any, batch: _Batch, out: NDArray[np.int16]) -> dict[int, str]:
    """Copies DALI's next batch to its places; returns the reasons for rows of a wrong length, by
    place."""
    try:
        decoded, _ = pipe.share_outputs()
    except RuntimeError as error:
        from fastat.data.dali_graph import reason_of

        raise Failure(f"DALI cannot decode FLAC rows: {reason_of(error)}") from error
    bad: dict[int, str] = {}
    for i, (place, count) in enumerate(zip(batch.places, batch.num_samples, strict=True)):
        samples = decoded.at(i)
        if samples.shape != (count, 1):
            found = " x ".join(map(str, samples.shape))
            bad[place] = f"it decodes to {found} samples, not {count} x 1"
            continue
        out[place, :count] = samples[:, 0]
        out[place, count:] = 0
    pipe.release_outputs()
    return bad
