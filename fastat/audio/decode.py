"""Decodes an audio file, or a file's bytes, to float32 mono at 16 kHz, or says why it cannot.

The libraries:

- MPEG audio (MP3): FFmpeg's decoder, frame by frame (``mpeg``).
- WAV, FLAC, Ogg, AIFF, AU, CAF and other formats that libsndfile knows: libsndfile. A file's length
  is not taken from its header alone (``containers``, ``integrity``).
- Formats that libsndfile refuses, such as MP4, WebM, ADTS, 20-bit FLAC and FLAC in Ogg: FFmpeg
  (``ffmpeg``).

A file is read to its end, also if several files were joined. Channels are averaged and
soxr HQ resamples, in blocks: a long file costs the memory of its 16 kHz samples, and the result is
bit-identical to resampling it in one piece.
"""

import itertools
import math
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import soxr
from numpy.typing import NDArray

from fastat.audio.bad_audio import BadAudio, Note
from fastat.audio.blocks import Block
from fastat.audio.reader import MARGIN_SECONDS, Reader

MAX_CLIPPED = 0.01
"""Share of samples beyond full scale above which a file that stores floats is bad, because it was
written with another scale. Lossy codecs overshoot wherever the recording was clipped (in most
samples of a clipped sine), so their files are never bad, and get a remark above this share."""


class Audio(NamedTuple):
    """Samples of a file, with remarks."""

    samples: NDArray[np.float32]  # [S]
    """Mono, full scale 1."""
    notes: tuple[Note, ...]
    """Remarks on the file."""


def decode(source: Path | bytes, sample_rate: int = 16_000, seconds: float | None = None) -> Audio:
    """All samples of a file, or of a file's bytes; at most the first ``seconds``.

    Raises:
        BadAudio: missing, unreadable, empty, non-finite, clipped, or truncated (its header promises
            samples, among those asked for, that are not there).
        MemoryError: too large for the memory.
    """
    try:
        if isinstance(source, Path):
            _check_file(source)
        elif not source:
            raise BadAudio("empty", "0 bytes")
        reader = Reader(source, seconds)
        return _resampled(reader, sample_rate, seconds)
    except BadAudio:
        raise
    except av.FFmpegError as error:  # one of them is a MemoryError too: damage made it ask for much
        raise BadAudio("unreadable", f"FFmpeg: {error.strerror}") from error
    except MemoryError:
        raise
    except OSError as error:
        raise BadAudio("unreadable", error.strerror or str(error)) from error
    # Four libraries parse files that anybody may have made. Any exception of theirs means that this
    # file is bad, and must not end the command, which goes on with the other files.
    except Exception as error:
        raise BadAudio("unreadable", f"{type(error).__name__}: {error}") from error


def _check_file(path: Path) -> None:
    try:
        status = path.stat()
    except FileNotFoundError:
        raise BadAudio("missing") from None
    if not stat.S_ISREG(status.st_mode):  # reading a pipe or a device may never end
        raise BadAudio("unreadable", "not a file")
    if status.st_size == 0:
        raise BadAudio("empty", "0 bytes")


def resample_clip(
    x: NDArray[np.int16], rate: int, sample_rate: int = 16_000, seconds: float | None = None
) -> NDArray[np.float32]:
    """Resamples samples that need no decoding, [n] at ``rate``, to at most ``seconds``, like
    ``decode``; raises BadAudio as it does."""
    end = None if seconds is None else math.ceil((seconds + MARGIN_SECONDS) * rate)
    blocks = iter([Block(rate, x[:end] * np.float32(1 / 32768))])
    return _cut(blocks, sample_rate, seconds)


def to_int16(x: NDArray[np.float32]) -> NDArray[np.int16]:
    """Full scale 1 -> 32768, rounded to the nearest (ties to even), clipped to int16's range."""
    scaled = np.clip(x, -1.0, 1.0)  # first: a float file may hold 1e38
    np.multiply(scaled, np.float32(32768.0), out=scaled)
    np.rint(scaled, out=scaled)
    np.clip(scaled, -32768.0, 32767.0, out=scaled)
    return scaled.astype(np.int16)


# -------------------------------------------------------------------------------------- resampling
def _resampled(reader: Reader, sample_rate: int, seconds: float | None) -> Audio:
    level = _Level(seconds)
    samples = _cut(level.measured(reader.blocks()), sample_rate, seconds)
    share = level.clipped / level.num_samples
    detail = f"{share:.2%} of its samples are beyond full scale, the peak is {level.peak:.4g}"
    if reader.stores_floats and share > MAX_CLIPPED:
        raise BadAudio("clipped", detail)
    if share > (0.0 if reader.stores_floats else MAX_CLIPPED):
        reader.notes.append(Note("clipped", detail))
    return Audio(samples, tuple(reader.notes))


class _Level:
    """Measures how far the samples of the first ``seconds`` go beyond full scale."""

    def __init__(self, seconds: float | None) -> None:
        self.seconds_left = math.inf if seconds is None else seconds
        self.num_samples = self.clipped = 0
        self.peak = 0.0

    def measured(self, blocks: Iterator[Block]) -> Iterator[Block]:
        """Yields the blocks unchanged."""
        for block in blocks:
            x = block.samples
            if self.seconds_left * block.rate < len(x):
                x = x[: round(self.seconds_left * block.rate)]
            self.seconds_left = max(0.0, self.seconds_left - len(block.samples) / block.rate)
            if len(x):
                self.num_samples += len(x)
                peak = float(max(x.max(), -x.min()))
                self.peak = max(self.peak, peak)
                if peak > 1.0:
                    self.clipped += int(np.count_nonzero(np.abs(x) > 1.0))
            yield block


def _cut(blocks: Iterator[Block], sample_rate: int, seconds: float | None) -> NDArray[np.float32]:
    """Resamples blocks of any rate to ``sample_rate`` -> [S], at most ``seconds``."""
    resampled = (
        part
        for rate, group in itertools.groupby(blocks, key=lambda block: block.rate)
        for part in _at_rate((block.samples for block in group), rate, sample_rate)
    )
    parts = list(resampled)
    samples = parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, np.float32), *parts])
    if seconds is not None:
        samples = samples[: round(seconds * sample_rate)]
    if len(samples) == 0:
        raise BadAudio("empty", "no samples")
    if not np.isfinite(samples).all():
        raise BadAudio("non-finite", "NaN or infinite samples")
    return samples


def _at_rate(
    blocks: Iterator[NDArray[np.float32]], rate: int, sample_rate: int
) -> Iterator[NDArray[np.float32]]:
    """Resamples blocks; bit-identical to resampling them in one piece."""
    if rate == sample_rate:
        yield from blocks
        return
    stream = soxr.ResampleStream(rate, sample_rate, 1, dtype="float32", quality="HQ")
    for block in blocks:
        yield stream.resample_chunk(block)
    yield stream.resample_chunk(np.empty(0, np.float32), last=True)
