"""One audio file, or the bytes of one -> float32 mono at 16 kHz, or the reason why not.

libsndfile reads what it can (WAV, FLAC, OGG, MP3, AIFF, AU, ...); the rest goes to FFmpeg when the
extra ``av`` is installed. Channels are averaged and soxr HQ resamples, in blocks: a long file
costs the memory of its 16 kHz samples, and the result is bit-identical to resampling it in one
piece.
"""

import io
import itertools
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import soundfile as sf
import soxr
from numpy.typing import NDArray

Reason = Literal["missing", "unreadable", "empty", "non-finite", "truncated", "label unknown"]
"""Why a file is bad; what bad.csv says."""

BLOCK_SECONDS = 30
"""soundfile seeks after every read, which costs FLAC dearly: few, long blocks."""
MARGIN_SECONDS, MARGIN_FRAMES = 1, 4096
"""Read beyond a cut: the resampler's filter (a few hundred taps) sees what the whole file has."""
SAMPLE_RATES = range(1_000, 1_000_001)
"""Hz; a header that says something else is damaged."""
UNKNOWN_FRAMES = 1 << 48
"""libsndfile reports a huge number when a stream's header promises none."""
_HEADER_SIZES = re.compile(r"(?:data|SSND|Data Size) *: (\d+) \(should be (\d+)\)")
_STREAMED_SIZES = (0, 0xFFFFFFFF, 0x7FFFFFFF, 0x7FFFF000)
"""Sizes in the header of a WAV file that was written to a pipe: no promise."""


class BadAudio(ValueError):
    """A file that cannot be used."""

    def __init__(self, reason: Reason, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[type["BadAudio"], tuple[Reason, str]]:
        return BadAudio, (self.reason, self.detail)


class _Span(NamedTuple):
    """What to read: from a whole second on, at most ``seconds`` (None: to the end)."""

    first_second: int
    seconds: float | None


def decode(
    source: Path | bytes,
    sample_rate: int = 16_000,
    start_seconds: float = 0.0,
    seconds: float | None = None,
) -> NDArray[np.float32]:
    """Samples of a file, or of a file's bytes, [S] float32, mono, full scale 1; at most ``seconds``
    from ``start_seconds`` on.

    Raises:
        BadAudio: missing, unreadable, empty (no sample from ``start_seconds`` on), non-finite, or
            truncated: its header promises frames, among those asked for, that are not there.
    """
    if isinstance(source, Path):
        if not source.exists():
            raise BadAudio("missing")
        empty = source.is_file() and source.stat().st_size == 0
    else:
        empty = not source
    if empty:
        raise BadAudio("empty", "0 bytes")
    try:
        sound = sf.SoundFile(_readable(source))
    except sf.LibsndfileError as error:
        return _decode_av(source, error.error_string, sample_rate, start_seconds, seconds)
    with sound:
        rate = sound.samplerate
        if rate not in SAMPLE_RATES:
            raise BadAudio("unreadable", f"a sample rate of {rate} Hz")
        span = _span(rate, start_seconds, seconds, seek=True)
        blocks = _soundfile_blocks(sound, span)
        return _resample(blocks, rate, sample_rate, span, start_seconds, seconds)


def resample_clip(
    x: NDArray[np.int16], rate: int, sample_rate: int = 16_000, seconds: float | None = None
) -> NDArray[np.float32]:
    """Samples that need no decoding, [n] at ``rate`` -> as ``decode`` gives them, at most
    ``seconds``; raises BadAudio as it does."""
    span = _span(rate, 0.0, seconds, seek=False)
    end = None if span.seconds is None else int(np.ceil(span.seconds * rate))
    blocks = iter([x[:end] * np.float32(1 / 32768)])
    return _resample(blocks, rate, sample_rate, span, 0.0, seconds)


def to_int16(x: NDArray[np.float32]) -> NDArray[np.int16]:
    """Full scale 1 -> 32768, rounded to the nearest (ties to even), clipped to int16's range."""
    scaled = np.multiply(x, np.float32(32768.0), dtype=np.float32)
    np.rint(scaled, out=scaled)
    np.clip(scaled, -32768.0, 32767.0, out=scaled)
    return scaled.astype(np.int16)


def _readable(source: Path | bytes) -> bytes | io.BytesIO:
    """What libsndfile opens: a path, or a stream over a file's bytes."""
    return io.BytesIO(source) if isinstance(source, bytes) else os.fsencode(source)


def _span(rate: int, start_seconds: float, seconds: float | None, *, seek: bool) -> _Span:
    margin = MARGIN_SECONDS + MARGIN_FRAMES / rate
    # From a whole second: there the resampled grid has a sample at any rate.
    first = max(0, int(start_seconds - margin)) if seek else 0
    return _Span(first, None if seconds is None else start_seconds - first + seconds + margin)


def _resample(
    blocks: Iterator[NDArray[np.float32]],
    rate: int,
    sample_rate: int,
    span: _Span,
    start_seconds: float,
    seconds: float | None,
) -> NDArray[np.float32]:
    """Mono blocks from ``span`` -> the samples asked for, [S]."""
    first = next(blocks, np.empty(0, np.float32))
    second = next(blocks, None)
    if second is None:
        samples = first if rate == sample_rate else _soxr(first, rate, sample_rate)
    else:
        following: Iterable[NDArray[np.float32]] = itertools.chain((first, second), blocks)
        if rate != sample_rate:
            following = _soxr_stream(following, rate, sample_rate)
        samples = np.concatenate(list(following))
    start = round(start_seconds * sample_rate) - span.first_second * sample_rate
    end = None if seconds is None else start + round(seconds * sample_rate)
    samples = samples[start:end]
    if len(samples) == 0:
        raise BadAudio("empty", "no samples")
    if not np.isfinite(samples).all():
        raise BadAudio("non-finite", "NaN or infinite samples")
    return samples


def _soxr(x: NDArray[np.float32], rate: int, sample_rate: int) -> NDArray[np.float32]:
    resampled: NDArray[np.float32] = soxr.resample(x, rate, sample_rate, quality="HQ")
    return resampled


def _soxr_stream(
    blocks: Iterable[NDArray[np.float32]], rate: int, sample_rate: int
) -> Iterator[NDArray[np.float32]]:
    """Bit for bit what ``_soxr`` makes of the blocks in one piece."""
    stream = soxr.ResampleStream(rate, sample_rate, 1, dtype="float32", quality="HQ")
    for block in blocks:
        yield stream.resample_chunk(block)
    yield stream.resample_chunk(np.empty(0, np.float32), last=True)


def _mono(block: NDArray[np.float32]) -> NDArray[np.float32]:
    """[n, C] -> [n], the mean of the channels."""
    if block.shape[1] == 1:
        return block[:, 0]
    # numpy's mean over a short last axis is ten times slower.
    total = block[:, 0].copy()
    for channel in range(1, block.shape[1]):
        total += block[:, channel]
    total /= block.shape[1]
    return total


def _soundfile_blocks(sound: sf.SoundFile, span: _Span) -> Iterator[NDArray[np.float32]]:
    """Mono blocks of ``span``; BadAudio at a frame that the header promises and the file lacks."""
    rate: int = sound.samplerate
    for promised, actual in _HEADER_SIZES.findall(sound.extra_info):
        if int(promised) not in _STREAMED_SIZES and int(promised) > int(actual):
            raise BadAudio("truncated", f"{actual} of {promised} bytes of audio")
    known = sound.frames < UNKNOWN_FRAMES
    position = span.first_second * rate
    if position:
        if known and position >= sound.frames:
            return
        sound.seek(position)
    end = sound.frames
    if span.seconds is not None:
        end = min(end, position + int(np.ceil(span.seconds * rate)))
    while position < end:
        try:
            block = sound.read(
                min(end - position, BLOCK_SECONDS * rate), dtype="float32", always_2d=True
            )
        except sf.LibsndfileError as error:
            detail = (
                f"decoding stopped in the block at {position / rate:.1f} s: {error.error_string}"
            )
            reason: Reason = "unreadable" if _has_last_frame(sound) else "truncated"
            raise BadAudio(reason, detail) from error
        position += len(block)
        if len(block) == 0:
            break
        yield _mono(block)
    if known and position < end:
        raise BadAudio("truncated", f"{position} of {sound.frames} frames")


def _has_last_frame(sound: sf.SoundFile) -> bool:
    """Whether a file that failed to decode has its end: then it is damaged, not cut short."""
    name = sound.name
    source = io.BytesIO(name.getvalue()) if isinstance(name, io.BytesIO) else name
    try:
        with sf.SoundFile(source) as again:  # the first one's decoder gave up
            again.seek(again.frames - 1)
            return len(again.read(1)) == 1
    except sf.LibsndfileError:
        return False


def _decode_av(
    source: Path | bytes, why: str, sample_rate: int, start_seconds: float, seconds: float | None
) -> NDArray[np.float32]:
    """As ``decode``, with FFmpeg; ``why`` is what libsndfile said."""
    try:
        import av
    except ImportError:
        hint = "not readable by libsndfile; with fastat[av] installed FFmpeg would be tried"
        raise BadAudio("unreadable", f"{why.rstrip('.')} ({hint})") from None
    try:
        opened = os.fspath(source) if isinstance(source, Path) else io.BytesIO(source)
        with av.open(opened) as container:
            if not container.streams.audio:
                raise BadAudio("unreadable", "no audio stream")
            stream = container.streams.audio[0]
            rate = int(stream.codec_context.sample_rate)
            span = _span(rate, start_seconds, seconds, seek=False)
            blocks = _av_blocks(container, stream, rate, span)
            return _resample(blocks, rate, sample_rate, span, start_seconds, seconds)
    except av.FFmpegError as error:
        raise BadAudio("unreadable", f"FFmpeg: {error.strerror}") from error


def _av_blocks(
    container: "av.container.InputContainer",  # type: ignore[name-defined]  # noqa: F821
    stream: "av.AudioStream",  # type: ignore[name-defined]  # noqa: F821
    rate: int,
    span: _Span,
) -> Iterator[NDArray[np.float32]]:
    import av

    to_float = av.AudioResampler(format="fltp", layout=stream.layout, rate=rate)
    position = 0
    end = None if span.seconds is None else int(np.ceil(span.seconds * rate))
    for decoded in container.decode(stream):
        for frame in to_float.resample(decoded):
            block = frame.to_ndarray().T  # [n, C]
            position += len(block)
            yield _mono(block)
        if end is not None and position >= end:
            return
    # Only MP4's index knows the length; other containers estimate it.
    if "mp4" in container.format.name and stream.duration is not None:
        promised = float(stream.duration * stream.time_base)
        if position / rate < promised - 0.5:
            raise BadAudio("truncated", f"{position / rate:.1f} of {promised:.1f} s")
