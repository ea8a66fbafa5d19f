"""FLAC rows, about 58 % of the bytes of PCM: encoded while packing, decoded while training.

A row is one complete FLAC stream of the clip's real samples, 16 bit mono, without the zero padding.
Decoding gives back exactly these samples. soundfile (libFLAC) encodes in the packing workers;
PyAV (FFmpeg) decodes in threads, one for each core of this rank.
"""

import io
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import av
import numpy as np
import soundfile as sf
from numpy.typing import NDArray

from fastat.data.row_reader import RowReader
from fastat.system.host import cores_of_rank

COMPRESSION_LEVEL = 5 / 8
"""libFLAC's level 5, in soundfile's scale from 0 to 1. Share of PCM's bytes and time to encode ten
seconds of ESC-10 at 16 kHz: level 0: 59.8 %, 1.7 ms; 3: 58.1 %, 1.8 ms; 5: 57.9 %, 1.8 ms;
6: 57.8 %, 2.1 ms; 8: 57.6 %, 3.2 ms."""
ROWS_PER_JOB = 8
"""A thread reads so many rows at a time: few, so that all threads end at about the same time."""


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


def decode(stream: memoryview, out: NDArray[np.int16]) -> str | None:
    """Decodes a FLAC stream of 16 bit mono into ``out`` [S].

    Returns:
        The reason why FFmpeg cannot decode it, or why it is not S samples; None if it is.
    """
    # FFmpeg's decoder takes a whole stream, header included, as one packet. Without the demuxer,
    # decoding is twice as fast, and Python runs once for each frame of 4,096 samples.
    codec = av.CodecContext.create("flac", "r")
    try:
        frames = codec.decode(av.Packet(stream))
    except av.FFmpegError as error:
        return f"FFmpeg cannot decode it: {error.strerror}"
    count = sum(frame.samples for frame in frames)
    if count != len(out):
        return f"it decodes to {count} samples, not {len(out)}"
    if (codec.format.name, codec.layout.name) != ("s16", "mono"):
        return f"it is {codec.format.name} {codec.layout.name}, not 16 bit mono"
    start = 0
    for frame in frames:
        end = start + frame.samples
        out[start:end] = np.frombuffer(frame.planes[0], np.int16, frame.samples)
        start = end
    return None


class FlacReader:
    """Reads and decodes FLAC rows. Thread-safe.

    Args:
        reader: the set's reader.
        num_samples: [N] number of real samples of each row of the set.
    """

    def __init__(self, reader: RowReader, num_samples: NDArray[np.int32]) -> None:
        self.reader, self.num_samples = reader, num_samples
        # The threads end when the pool is garbage-collected with this reader.
        self._threads = ThreadPoolExecutor(cores_of_rank(), "fastat-flac")

    def read(
        self, rows: NDArray[np.int64], places: NDArray[np.int64], out: NDArray[np.int16]
    ) -> dict[int, str]:
        """Decodes ``rows[places]`` into ``out[places]``, [S] each, padded with zeros.

        Returns:
            Reasons why rows could not be read or decoded, differ from their CRC or have another
            length, by place; ``out`` is undefined there.

        Raises:
            Failure: the system is out of open files or memory.
        """
        places = places[np.argsort(rows[places], kind="stable")]
        jobs = [places[i : i + ROWS_PER_JOB] for i in range(0, len(places), ROWS_PER_JOB)]
        bad: dict[int, str] = {}
        for found in self._threads.map(partial(self._read_job, rows, out), jobs):
            bad |= found
        return bad

    def _read_job(
        self, rows: NDArray[np.int64], out: NDArray[np.int16], places: NDArray[np.int64]
    ) -> dict[int, str]:
        wanted = rows[places]
        assert self.reader.spans is not None
        ends = np.cumsum(self.reader.spans.size[wanted], dtype=np.int64)
        starts = np.concatenate([[0], ends[:-1]])
        streams = np.empty(ends[-1], np.uint8).data
        bad = self.reader.read(wanted, streams, starts)
        for i, count in enumerate(self.num_samples[wanted].tolist()):
            if i not in bad:
                row = out[places[i]]
                reason = decode(streams[starts[i] : ends[i]], row[:count])
                row[count:] = 0
                if reason is not None:
                    bad[i] = reason
        return {int(places[i]): reason for i, reason in bad.items()}
