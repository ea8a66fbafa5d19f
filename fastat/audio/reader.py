"""Reads the samples of an audio file, and of files joined to it, with the library that suits it."""

import hashlib
import math
from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import av
import numpy as np
import soundfile as sf
from numpy.typing import NDArray

from fastat.audio.bad_audio import BadAudio, Note
from fastat.audio.blocks import Block, mono
from fastat.audio.containers import Samples, find_samples
from fastat.audio.ffmpeg import FFmpegFile
from fastat.audio.integrity import (
    FlacHeader,
    begins_again,
    check_ogg,
    find_next_flac,
    read_flac_header,
)
from fastat.audio.mpeg import MpegFile, begins_with_frame, contains_frames
from fastat.audio.window import Window, open_source, skip_id3

BLOCK_SECONDS = 30
"""soundfile seeks after every read, which costs FLAC dearly: few, long blocks."""
BLOCK_VALUES = 16 << 20
"""Limit of a block's values, over all channels: a damaged header may state any number."""
MARGIN_SECONDS = 1
"""Audio read beyond a cut, for the resampler's filter of a few hundred taps."""
SAMPLE_RATES = range(1_000, 1_000_001)
"""Hz; a header that says something else is damaged."""
UNKNOWN_FRAMES = 1 << 48
"""libsndfile reports more than this if a stream's header states no number."""
_FLOATS = ("FLOAT", "DOUBLE")
_FLAC_WIDTHS = {"PCM_S8": 1, "PCM_16": 2, "PCM_24": 3}
"""Bytes of a sample in FLAC's MD5."""
_TRY_FFMPEG = (1, 4, 18, 64)
"""libsndfile's errors: format not recognised, encoding not supported, format not implemented, and
what it says of a WAV file with a codec that it does not know. Any other is damage, which FFmpeg
would pass over in silence."""


class Reader:
    """Reads a file, or several that were joined, block by block."""

    def __init__(self, source: Path | bytes, seconds: float | None) -> None:
        self.source, self.seconds = source, seconds
        self.seconds_read = 0.0
        self.notes: list[Note] = []
        self.stores_floats = False
        """Whether any samples are stored as floats, which may be of any size."""

    def blocks(self) -> Iterator[Block]:
        """The samples up to a little beyond ``seconds``."""
        start: int | None = 0
        while start is not None and self._seconds_left() > 0:
            start = yield from self._file_at(start)

    def _file_at(self, start: int) -> Generator[Block, None, int | None]:
        """Yields the samples of the file at byte ``start``; returns where a joined file begins."""
        with ExitStack() as stack:
            file = stack.enter_context(open_source(self.source))
            file.seek(start)
            skip_id3(file)  # in front of other formats than MP3, libsndfile loses as many bytes
            start = file.tell()
            if begins_with_frame(file, start):
                yield from self._mpeg_blocks(file, start)
                return None
            samples = find_samples(file, start)
            if samples.note:
                self.notes.append(Note("wrong length", samples.note))
            end = samples.next_file or check_ogg(file, start, self._seconds_left())
            flac = read_flac_header(file, start)
            sound = None
            if flac is None or flac.is_complete and not self._goes_on(file, start, flac):
                sound = self._open_sound(stack, file, start, end, samples)
            if sound is None:
                end = end or (flac and find_next_flac(file, start))
                yield from self._ffmpeg_blocks(file, start, end, samples)
            else:
                yield from self._until_enough(self._sound_blocks(sound, start, samples, flac))
            if self._seconds_left() > 0:
                if samples.missing:
                    raise BadAudio("truncated", samples.missing)
                end = end or (flac and find_next_flac(file, start))
            return end

    def _goes_on(self, file: BinaryIO, start: int, flac: FlacHeader) -> bool:
        """Whether a FLAC file that is read to its end has frames behind the last one stated."""
        if flac.info.num_samples > self._seconds_left() * flac.info.rate:
            return False
        return begins_again(file, flac, find_next_flac(file, start))

    def _open_sound(
        self, stack: ExitStack, file: BinaryIO, start: int, end: int | None, samples: Samples
    ) -> sf.SoundFile | None:
        """The file at byte ``start``, opened by libsndfile; None where FFmpeg is to be tried."""
        try:
            sound = stack.enter_context(self._sound(start, end, samples))
        except sf.LibsndfileError as error:
            file.seek(start)
            # The pages of an Ogg file have been checked; what is wrong is libsndfile.
            if error.code in _TRY_FFMPEG or file.read(4) == b"OggS":
                return None
            raise BadAudio("unreadable", error.error_string) from error
        # Of MPEG audio in a WAV file libsndfile estimates the length.
        return None if sound.subtype.startswith("MPEG") else sound

    def _mpeg_blocks(self, file: BinaryIO, start: int) -> Iterator[Block]:
        file.seek(start)
        mpeg = MpegFile(file)
        yield from self._until_enough(mpeg.blocks())
        self.notes.extend(mpeg.notes)

    def _ffmpeg_blocks(
        self, file: BinaryIO, start: int, end: int | None, samples: Samples
    ) -> Iterator[Block]:
        """The samples of a file that libsndfile does not read."""
        with ExitStack() as stack:
            window = stack.enter_context(self._window(start, end, samples))
            try:
                source = stack.enter_context(FFmpegFile(window))
                is_mpeg = source.format == "mp3"
            except av.InvalidDataError:
                # Much junk in front of MPEG audio hides it from FFmpeg too.
                is_mpeg = contains_frames(file, start)
                if not is_mpeg:
                    raise
            if is_mpeg:
                yield from self._mpeg_blocks(file, start)
                return
            self.stores_floats |= source.stores_floats
            yield from self._until_enough(source.blocks())
            self.notes.extend(source.notes)

    def _window(self, start: int, end: int | None, samples: Samples) -> Window:
        first = samples.first if samples.head else start
        return Window(open_source(self.source), first, end, samples.head)

    @contextmanager
    def _sound(self, start: int, end: int | None, samples: Samples) -> Iterator[sf.SoundFile]:
        """The file at byte ``start``, opened by libsndfile."""
        with ExitStack() as stack:
            file: Any
            if isinstance(self.source, Path) and start == 0 and end is None and not samples.head:
                # By its number: soundfile takes a name that ends in .raw for samples alone.
                file = stack.enter_context(self.source.open("rb", buffering=0)).fileno()
            else:
                file = stack.enter_context(self._window(start, end, samples))
            yield stack.enter_context(sf.SoundFile(file, closefd=False))

    def _seconds_left(self) -> float:
        """Number of seconds still to read."""
        if self.seconds is None:
            return math.inf
        return self.seconds + MARGIN_SECONDS - self.seconds_read

    def _until_enough(self, blocks: Iterator[Block]) -> Iterator[Block]:
        """Yields the blocks, until there are enough."""
        for block in blocks:
            if block.rate not in SAMPLE_RATES:
                raise BadAudio("unreadable", f"a sample rate of {block.rate} Hz")
            self.seconds_read += len(block.samples) / block.rate
            yield block
            if self._seconds_left() <= 0:
                return

    def _sound_blocks(
        self, sound: sf.SoundFile, start: int, samples: Samples, flac: FlacHeader | None
    ) -> Iterator[Block]:
        """Yields what libsndfile reads; BadAudio if frames that the header states are missing."""
        rate: int = sound.samplerate
        if rate not in SAMPLE_RATES:
            raise BadAudio("unreadable", f"a sample rate of {rate} Hz")
        self.stores_floats |= sound.subtype in _FLOATS
        checked = None if flac is None else _FlacSamples(sound, flac)
        left = self._seconds_left()
        end = sound.frames if math.isinf(left) else min(sound.frames, math.ceil(left * rate))
        longest = max(1, min(BLOCK_SECONDS * rate, BLOCK_VALUES // sound.channels))
        position = 0
        while position < end:
            length = min(end - position, longest)
            try:
                if checked is None:
                    block = sound.read(length, dtype="float32", always_2d=True)
                else:
                    block = checked.read(length)
            except sf.LibsndfileError as error:
                detail = (
                    f"decoding stopped in the block at {position / rate:.1f} s: "
                    f"{error.error_string}"
                )
                whole = self._has_last_frame(start, samples)
                raise BadAudio("unreadable" if whole else "truncated", detail) from error
            position += len(block)
            if len(block):
                yield Block(rate, mono(block))
            if len(block) < length:  # reading on would find what is behind a gap
                break
        if position < end and sound.frames < UNKNOWN_FRAMES:
            raise BadAudio("truncated", f"{position} of {sound.frames} frames")
        if checked is not None and position == sound.frames:
            checked.check()

    def _has_last_frame(self, start: int, samples: Samples) -> bool:
        """Whether a file that failed to decode still has its end: it is damaged, not truncated."""
        try:
            with self._sound(start, None, samples) as again:  # the first one's decoder gave up
                again.seek(again.frames - 1)
                return len(again.read(1)) == 1
        except sf.LibsndfileError:
            return False


class _FlacSamples:
    """Reads a FLAC file and compares its rate and its samples' MD5 with the header."""

    def __init__(self, sound: sf.SoundFile, header: FlacHeader) -> None:
        self.sound, self.header = sound, header
        self.width = _FLAC_WIDTHS[sound.subtype]
        self.digest = hashlib.md5(usedforsecurity=False)
        if header.frame_rate not in (None, sound.samplerate):
            detail = f"the header says {sound.samplerate} Hz, the first frame {header.frame_rate}"
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
        """Raises BadAudio unless the samples of the whole file have the header's MD5."""
        if self.header.info.md5 != self.digest.digest():
            raise BadAudio("unreadable", "the samples differ from their checksum (MD5)")
