"""One audio file, or the bytes of one -> float32 mono at 16 kHz, or the reason why not.

libsndfile reads what it can (WAV, FLAC, OGG, MP3, AIFF, AU, ...); the rest goes to FFmpeg when the
extra ``av`` is installed. Channels are averaged and soxr HQ resamples, in blocks: a long file
costs the memory of its 16 kHz samples, and the result is bit-identical to resampling it in one
piece.
"""

import hashlib
import io
import itertools
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile as sf
import soxr
from numpy.typing import NDArray

from fastat.data.bad_audio import BadAudio as BadAudio
from fastat.data.bad_audio import Reason as Reason
from fastat.data.integrity import NO_MD5, OPUS_RATE, check_ogg, read_flac_header

BLOCK_SECONDS = 30
"""soundfile seeks after every read, which costs FLAC dearly: few, long blocks."""
BLOCK_VALUES = 16 << 20
"""Most values of a block, over all channels: a damaged header promises any number of them."""
MARGIN_SECONDS, MARGIN_FRAMES = 1, 4096
"""Read beyond a cut: the resampler's filter (a few hundred taps) sees what the whole file has."""
SAMPLE_RATES = range(1_000, 1_000_001)
"""Hz; a header that says something else is damaged."""
UNKNOWN_FRAMES = 1 << 48
"""libsndfile reports a huge number when a stream's header promises none."""
_HEADER_SIZES = re.compile(r"(?:data|SSND|Data Size) *: (\d+) \(should be (\d+)\)")
_FLAC_WIDTHS = {"PCM_S8": 1, "PCM_16": 2, "PCM_24": 3}
"""Bytes of a sample as FLAC's MD5 takes it."""
_TRY_FFMPEG = (1, 4)
"""libsndfile's errors: format not recognised, encoding not supported. Any other is damage, which
FFmpeg would pass over in silence."""
_STREAMED_SIZES = (0, 0xFFFFFFFF, 0x7FFFFFFF, 0x7FFFF000)
"""Sizes in the header of a WAV file that was written to a pipe: no promise."""


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
        if not source.is_file():  # reading a pipe or a device may never end
            raise BadAudio("unreadable", "not a file")
        empty = source.stat().st_size == 0
    else:
        empty = not source
    if empty:
        raise BadAudio("empty", "0 bytes")
    try:
        sound = sf.SoundFile(_readable(source))
    except sf.LibsndfileError as error:
        if error.code not in _TRY_FFMPEG:
            raise BadAudio("unreadable", error.error_string) from error
        return _decode_av(source, error.error_string, sample_rate, start_seconds, seconds)
    with sound:
        rate = _checked_rate(sound.samplerate)
        span = _span(rate, start_seconds, seconds, seek=True)
        if sound.format == "OGG":
            upto = None if seconds is None else start_seconds + seconds
            check_ogg(source, OPUS_RATE if sound.subtype == "OPUS" else rate, upto)
        blocks = _soundfile_blocks(sound, span, source)
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
    scaled = np.clip(x, -1.0, 1.0)  # first: a float file may hold 1e38
    np.multiply(scaled, np.float32(32768.0), out=scaled)
    np.rint(scaled, out=scaled)
    np.clip(scaled, -32768.0, 32767.0, out=scaled)
    return scaled.astype(np.int16)


def _readable(source: Path | bytes) -> bytes | io.BytesIO:
    """What libsndfile opens: a path, or a stream over a file's bytes."""
    return io.BytesIO(source) if isinstance(source, bytes) else os.fsencode(source)


def _checked_rate(rate: int) -> int:
    if rate not in SAMPLE_RATES:
        raise BadAudio("unreadable", f"a sample rate of {rate} Hz")
    return rate


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


def _soundfile_blocks(
    sound: sf.SoundFile, span: _Span, source: Path | bytes
) -> Iterator[NDArray[np.float32]]:
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
    flac = _FlacSamples(sound, source) if sound.format == "FLAC" else None
    longest = max(1, min(BLOCK_SECONDS * rate, BLOCK_VALUES // sound.channels))
    while position < end:
        length = min(end - position, longest)
        try:
            if flac is None:
                block = sound.read(length, dtype="float32", always_2d=True)
            else:
                block = flac.read(length)
        except sf.LibsndfileError as error:
            detail = (
                f"decoding stopped in the block at {position / rate:.1f} s: {error.error_string}"
            )
            reason: Reason = "unreadable" if _has_last_frame(sound) else "truncated"
            raise BadAudio(reason, detail) from error
        position += len(block)
        if len(block):
            yield _mono(block)
        if len(block) < length:  # reading on would find what is behind a gap
            break
    if known and position < end:
        raise BadAudio("truncated", f"{position} of {sound.frames} frames")
    if flac is not None and span.first_second == 0 and position == sound.frames:
        flac.check()


class _FlacSamples:
    """Reads a FLAC file and compares what was read with what its header says."""

    def __init__(self, sound: sf.SoundFile, source: Path | bytes) -> None:
        self.sound = sound
        self.width = _FLAC_WIDTHS[sound.subtype]
        self.header = read_flac_header(source)
        self.digest = hashlib.md5(usedforsecurity=False)
        rate = self.header.frame_rate if self.header else None
        if rate not in (None, sound.samplerate):
            detail = f"the header says {sound.samplerate} Hz, the first frame {rate}"
            raise BadAudio("unreadable", detail)

    def read(self, length: int) -> NDArray[np.float32]:
        """Up to ``length`` frames, [n, C], equal to libsndfile's own float32."""
        dtype = "int16" if self.width == 2 else "int32"
        x = self.sound.read(length, dtype=dtype, always_2d=True)
        size = x.dtype.itemsize  # libsndfile puts the bits of a sample at the upper end
        self.digest.update(
            np.ascontiguousarray(x.view(np.uint8).reshape(-1, size)[:, size - self.width :]).data
        )
        scale = np.float32(2.0 ** (1 - 8 * size))
        samples: NDArray[np.float32] = np.multiply(x, scale, dtype=np.float32)
        return samples

    def check(self) -> None:
        """BadAudio unless the whole file, read from its start, has the MD5 of its header."""
        if self.header and self.header.md5 not in (NO_MD5, self.digest.digest()):
            raise BadAudio("unreadable", "the samples differ from their checksum (MD5)")


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
        # Of a damaged frame FFmpeg would make something up; names of tags may be in any encoding.
        strict = {"err_detect": "crccheck+explode"}
        with av.open(opened, metadata_errors="ignore", options=strict) as container:
            if not container.streams.audio:
                raise BadAudio("unreadable", "no audio stream")
            stream = container.streams.audio[0]
            if stream.codec_context is None:
                raise BadAudio("unreadable", "FFmpeg: no decoder for it")
            rate = _checked_rate(stream.codec_context.sample_rate)
            if container.format.name == "ogg":
                upto = None if seconds is None else start_seconds + seconds
                check_ogg(source, OPUS_RATE if stream.codec_context.name == "opus" else rate, upto)
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
    promised = _promised_seconds(container, stream)
    if promised is not None and position / rate < promised - 0.5:
        raise BadAudio("truncated", f"{position / rate:.1f} of {promised:.1f} s")


def _promised_seconds(
    container: "av.container.InputContainer",  # type: ignore[name-defined]  # noqa: F821
    stream: "av.AudioStream",  # type: ignore[name-defined]  # noqa: F821
) -> float | None:
    """The length by MP4's index or Matroska's header; other containers only estimate it."""
    if "mp4" in container.format.name and stream.duration is not None:
        return float(stream.duration * stream.time_base)
    alone = len(container.streams) == 1  # Matroska's is the length of its longest stream
    if "matroska" in container.format.name and alone and container.duration is not None:
        return float(container.duration) / 1e6  # FFmpeg counts it in microseconds
    return None
