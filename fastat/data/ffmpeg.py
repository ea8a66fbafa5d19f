"""Audio that FFmpeg reads: MP4, Matroska and WebM, ADTS, and whatever else libsndfile refuses."""

import hashlib
from collections.abc import Iterator
from typing import Any, Self

import av
import numpy as np

from fastat.data.bad_audio import BadAudio, Note
from fastat.data.blocks import Block, mono
from fastat.data.integrity import NO_MD5
from fastat.data.window import Window

TOLERANCE_SECONDS = 0.5
"""How much shorter than its container says a stream may be."""
STREAMINFO_MD5 = slice(18, 34)


class FFmpegFile:
    """A file opened by FFmpeg; its first audio stream is read.

    Raises:
        BadAudio: FFmpeg does not know the format, finds no audio or has no decoder for it.
    """

    def __init__(self, file: Window) -> None:
        # FFmpeg would make up a damaged frame. Names of tags may be in any encoding.
        strict = {"err_detect": "crccheck+explode"}
        self.container = av.open(file, metadata_errors="ignore", options=strict)
        if not self.container.streams.audio:
            raise BadAudio("unreadable", "FFmpeg finds no audio stream")
        self.stream = self.container.streams.audio[0]
        if self.stream.codec_context is None:
            raise BadAudio("unreadable", "FFmpeg has no decoder for it")
        self.notes: list[Note] = []
        self.format: str = self.container.format.name
        self.codec: str = self.stream.codec_context.name
        self.rate: int = self.stream.codec_context.sample_rate
        if self.rate == 0:
            raise BadAudio("unreadable", "FFmpeg finds no sample rate")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.container.close()

    def blocks(self) -> Iterator[Block]:
        """All samples, in blocks.

        Raises:
            BadAudio: the container promises more, or FLAC's checksum differs.
            av.FFmpegError: damage.
        """
        to_float = None
        seconds = 0.0
        checksum = _FlacChecksum(self.stream.codec_context) if self.codec == "flac" else None
        for frame in self.container.decode(self.stream):
            if checksum is not None:
                checksum.update(frame)
            form = (frame.format.name, frame.layout.name, frame.sample_rate)
            if to_float is None or to_float[0] != form:
                resampler = av.AudioResampler(format="fltp", layout=frame.layout, rate=form[2])
                to_float = (form, resampler)
            for planar in to_float[1].resample(frame):
                seconds += planar.samples / planar.sample_rate
                yield Block(planar.sample_rate, mono(planar.to_ndarray().T))
        promised = self._promised_seconds()
        if promised is not None and seconds < promised - TOLERANCE_SECONDS:
            raise BadAudio("truncated", f"{seconds:.1f} of {promised:.1f} s")
        if checksum is not None:
            self.notes.extend(checksum.check())

    def _promised_seconds(self) -> float | None:
        """The length by MP4's index or Matroska's header; other containers only estimate it."""
        if "mp4" in self.format and self.stream.duration is not None:
            return float(self.stream.duration * self.stream.time_base)
        alone = len(self.container.streams) == 1  # Matroska's is the length of its longest stream
        if "matroska" in self.format and alone and self.container.duration is not None:
            return float(self.container.duration) / 1e6  # FFmpeg counts it in microseconds
        return None


class _FlacChecksum:
    """MD5 and number of the samples of a FLAC stream, against those in its header."""

    def __init__(self, codec: Any) -> None:
        header: bytes = codec.extradata or b""
        self.expected = header[STREAMINFO_MD5] if len(header) >= 34 else NO_MD5
        number = int.from_bytes(header[10:18].ljust(8, b"\0"), "big")
        self.bits = (number >> 36 & 31) + 1
        self.promised = number & (1 << 36) - 1
        self.num_samples = 0
        self.digest = hashlib.md5(usedforsecurity=False)

    def update(self, frame: Any) -> None:
        """Takes a decoded frame, whose samples stand at the upper end of 16 or 32 bits."""
        x = frame.to_ndarray()
        if frame.format.is_planar:
            x = np.ascontiguousarray(x.T)
        x = x.reshape(-1) >> (8 * x.itemsize - self.bits)
        width = -(-self.bits // 8)
        lowest = x.view(np.uint8).reshape(len(x), -1)[:, :width]
        self.digest.update(np.ascontiguousarray(lowest).data)
        self.num_samples += frame.samples

    def check(self) -> Iterator[Note]:
        """Notes a length that is more than stated; raises BadAudio where samples are missing or
        differ."""
        if self.num_samples < self.promised:
            raise BadAudio("truncated", f"{self.num_samples} of {self.promised} samples")
        if self.expected not in (NO_MD5, self.digest.digest()):
            raise BadAudio("unreadable", "the samples differ from their checksum (MD5)")
        if self.num_samples > self.promised > 0:
            detail = f"its header states {self.promised:,} samples, there are {self.num_samples:,}"
            yield Note("wrong length", detail)
