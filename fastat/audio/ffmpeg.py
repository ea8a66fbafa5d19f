"""Audio that FFmpeg reads: MP4, Matroska and WebM, ADTS, and whatever else libsndfile refuses."""

import hashlib
from collections.abc import Iterator
from typing import Any, Self

import av
import numpy as np

from fastat.audio.bad_audio import BadAudio, Note
from fastat.audio.blocks import Block, mono
from fastat.audio.integrity import NO_MD5, StreamInfo
from fastat.audio.window import Window

STRICT = {"err_detect": "crccheck+explode"}
"""Damaged packets are errors: FFmpeg would otherwise conceal them."""
NO_PROTOCOLS = {"protocol_whitelist": "none"}
"""Formats such as playlists name other files and addresses, which are not opened."""
TOLERANCE_SECONDS = 0.5
"""By how much the audio of an MP4 file may be shorter than stated."""


class FFmpegFile:
    """A file opened by FFmpeg; its first audio stream is read.

    Raises:
        av.FFmpegError: FFmpeg does not know the format.
    """

    def __init__(self, file: Window) -> None:
        # Names of tags may be in any encoding.
        self.container = av.open(file, metadata_errors="ignore", options=STRICT | NO_PROTOCOLS)
        self.notes: list[Note] = []
        self.format: str = self.container.format.name

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.container.close()

    @property
    def stores_floats(self) -> bool:
        """Whether the samples are stored as floats, which may be of any size."""
        streams = self.container.streams.audio
        codec = streams[0].codec_context if streams else None
        return codec is not None and codec.name.startswith(("pcm_f", "wavpack"))

    def blocks(self) -> Iterator[Block]:
        """All samples, in blocks.

        Raises:
            BadAudio: FFmpeg finds no audio or has no decoder for it, the container states more, or
                FLAC's checksum differs.
            av.FFmpegError: damage.
        """
        if not self.container.streams.audio:
            raise BadAudio("unreadable", "FFmpeg finds no audio stream")
        stream = self.container.streams.audio[0]
        codec = stream.codec_context
        if codec is None:
            raise BadAudio("unreadable", "FFmpeg has no decoder for it")
        if codec.sample_rate == 0:
            raise BadAudio("unreadable", "FFmpeg finds no sample rate")
        codec.options = STRICT
        flac = _FlacCheck(codec) if codec.name == "flac" else None
        form: tuple[str, str, int] | None = None
        to_float: Any = None
        seconds, uncertain = 0.0, False
        for frame in self.container.decode(stream):
            if flac is not None:
                flac.update(frame)
                # FFmpeg drops a damaged frame and gives its neighbours no timestamp; some last
                # frames have none either.
                if uncertain:
                    raise BadAudio("unreadable", f"a FLAC frame near {seconds:.1f} s is damaged")
                uncertain = frame.pts is None and self.format == "flac"
            if form != (frame.format.name, frame.layout.name, frame.sample_rate):
                form = (frame.format.name, frame.layout.name, frame.sample_rate)
                # Packed: PyAV crashes on planar frames of eight channels or more.
                to_float = av.AudioResampler("flt", frame.layout, frame.sample_rate)
            for packed in to_float.resample(frame):
                seconds += packed.samples / packed.sample_rate
                samples = packed.to_ndarray().reshape(packed.samples, -1)
                yield Block(packed.sample_rate, mono(samples))
        stated = _stated_seconds(self.format, stream)
        if stated is not None and seconds < stated - TOLERANCE_SECONDS:
            raise BadAudio("truncated", f"{seconds:.1f} of {stated:.1f} s")
        if flac is not None:
            self.notes.extend(flac.finish())


def _stated_seconds(container_format: str, stream: Any) -> float | None:
    """The length by MP4's index; None for other containers, which only estimate it."""
    if "mp4" not in container_format or stream.duration is None:
        return None
    return float((stream.duration - max(stream.start_time or 0, 0)) * stream.time_base)


class _FlacCheck:
    """Compares the samples of a FLAC stream, in any container, with length and MD5 in its header.

    Files that FFmpeg has joined have the header of the first one, whose MD5 covers only as many
    samples as it states.
    """

    def __init__(self, codec: Any) -> None:
        self.info = StreamInfo.parse(codec.extradata or b"")
        self.num_samples = 0
        self.digest = hashlib.md5(usedforsecurity=False)
        self.md5_at_stated = b""

    def update(self, frame: Any) -> None:
        """Adds a decoded frame, whose samples are the upper bits of 16 or 32."""
        x = frame.to_ndarray()
        x = x.reshape(-1) >> (8 * x.itemsize - self.info.bits)
        lowest = x.view(np.uint8).reshape(len(x), -1)[:, : -(-self.info.bits // 8)]
        self.digest.update(np.ascontiguousarray(lowest).data)
        self.num_samples += frame.samples
        if self.num_samples == self.info.num_samples:
            self.md5_at_stated = self.digest.digest()

    def finish(self) -> Iterator[Note]:
        """Yields a remark if there are more samples than stated.

        Raises:
            BadAudio: samples are missing, or differ.
        """
        stated = self.info.num_samples
        if self.num_samples < stated:
            raise BadAudio("truncated", f"{self.num_samples} of {stated} samples")
        if self.info.md5 not in (NO_MD5, self.md5_at_stated, self.digest.digest()):
            raise BadAudio("unreadable", "the samples differ from their checksum (MD5)")
        if self.num_samples > stated > 0:
            detail = f"the header states {stated:,} samples, the file holds {self.num_samples:,}"
            yield Note("wrong length", detail)
