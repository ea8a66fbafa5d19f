"""MPEG audio (MP3, and layers 1 and 2), frame by frame.

An MPEG audio file has no header that states its length. Some encoders begin with a frame that
holds the number of frames instead of audio (Xing or Info, VBRI); without it, readers estimate the
length and may stop there. Here every frame of the file is decoded: this module finds the frames,
and FFmpeg's decoder decodes them. Between frames only tags and a few zeros are accepted, and the
number of frames is compared with the stated one. The samples that the encoder added are removed, if
LAME's tag states them. Files that were joined are decoded one after the other.
"""

import io
import math
import re
from collections.abc import Iterator
from itertools import groupby
from typing import BinaryIO, NamedTuple

import av
import numpy as np

from fastat.audio.bad_audio import BadAudio, Note
from fastat.audio.blocks import Block, mono
from fastat.audio.ffmpeg import STRICT
from fastat.audio.window import skip_id3

MPEG_1 = 3
"""Version in a header; 2 is MPEG-2, 0 MPEG-2.5."""
_RATES = {3: (44_100, 48_000, 32_000), 2: (22_050, 24_000, 16_000), 0: (11_025, 12_000, 8_000)}
"""Sample rates in Hz, by version."""
_KBIT = {
    (True, 1): (32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (True, 2): (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (True, 3): (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (False, 1): (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (False, 2): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (False, 3): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
"""Bit rates 1 to 14 in kbit/s, by (MPEG-1, layer)."""
_HEADER = re.compile(rb"(?=\xff[\xe2-\xff][\x10-\xef])")
"""Matches a possible header."""
DECODER_DELAY = 529
"""Samples that a decoder of layer 3 adds in front."""
PACKET_FRAMES = 64
"""Frames that FFmpeg decodes in one call; decoding them singly takes half as long again."""
SEARCH_BYTES, SEARCH_FRAMES = 1 << 20, 3
"""Bytes read at a time in search of a frame, and frames that must follow the one found."""
MAX_JUNK_BYTES = 1 << 14
"""Bytes that are neither frame nor tag and may lie behind the last frame of a file that does not
state how many it has: more may be lost audio."""
TOLERANCE_SECONDS = 0.1
"""How much shorter than stated a file may be; some encoders count a frame too many."""


class _Header(NamedTuple):
    """Header of a frame."""

    version: int
    layer: int
    rate: int
    mono: bool
    length: int
    """Bytes of the frame, header included."""
    num_samples: int

    def same_stream(self, other: "_Header") -> bool:
        return self[:3] == other[:3]


class _Frame(NamedTuple):
    header: _Header
    data: bytes
    """Shorter than the header says at the end of a truncated file."""
    begins: bool
    """Whether it begins a stream: it is the first frame, or the first one after a tag."""


class _Info(NamedTuple):
    """What the frame without audio at the start of a stream states."""

    num_frames: int | None
    encoder_delay: int
    """Samples that the encoder added in front."""
    encoder_padding: int
    """Samples that it added at the end."""


def begins_with_frame(file: BinaryIO, start: int) -> bool:
    """Whether frames of MPEG audio begin at byte ``start``."""
    file.seek(start)
    header = _parse(file.read(4))
    return header is not None and _confirmed(file, start, header)


def contains_frames(file: BinaryIO, start: int) -> bool:
    """Whether there are frames after byte ``start``, with something in front of them."""
    return _search(file, start) is not None


class MpegFile:
    """A file of MPEG audio, from the position of ``file`` on."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.notes: list[Note] = []
        self.junk_bytes = 0
        """Bytes after the last frame so far, without tags."""

    def blocks(self) -> Iterator[Block]:
        """All samples, in blocks.

        Raises:
            BadAudio: no frame, something between the frames that is neither frame nor tag, a frame
                that is cut short, or fewer frames than stated.
            av.FFmpegError: a frame that cannot be decoded.
        """
        stream: _Stream | None = None
        for frame in self._frames():
            info = _read_info(frame)
            if stream is None or frame.begins or info is not None:
                if stream is not None:
                    yield from self._end_of(stream)
                stream = _Stream(frame.header, info)
            if info is None:
                yield from stream.add(frame)
        if stream is None:
            raise BadAudio("unreadable", "no frame of MPEG audio in it")
        yield from self._end_of(stream)

    def _end_of(self, stream: "_Stream") -> Iterator[Block]:
        stated = stream.info.num_frames
        if stated is None and self.junk_bytes > MAX_JUNK_BYTES:
            detail = f"{self.junk_bytes:,} bytes behind the last frame are not MPEG audio"
            raise BadAudio("unreadable", detail)
        yield from stream.finish()
        if stated is not None and stream.num_frames > stated + stream.tolerance_frames:
            detail = f"it states {stated:,} frames, there are {stream.num_frames:,}"
            self.notes.append(Note("wrong length", detail))

    def _frames(self) -> Iterator[_Frame]:
        """Yields the frames in order; whatever precedes the first one is skipped."""
        file, last = self.file, None
        behind_tag = False
        while True:
            start = file.tell()
            head = file.read(4)
            header = _parse(head)
            follows = header and last and not behind_tag and header.same_stream(last)
            if header is not None and (follows or _confirmed(file, start, header)):
                file.seek(start + 4)
                self.junk_bytes = 0
                yield _Frame(header, head + file.read(header.length - 4), begins=not follows)
                last, behind_tag = header, False
                continue
            file.seek(start)
            if _skip_tag(file):
                behind_tag = True
                continue
            zeros = _count_zeros(file)
            self.junk_bytes += zeros
            if 0 < zeros <= MAX_JUNK_BYTES:
                file.seek(start + zeros)
                behind_tag = True
                continue
            following = _search(file, start)
            if following is None:
                self.junk_bytes += file.seek(0, io.SEEK_END) - start - zeros
                return
            # A header at the start of the file without a frame after it is a damaged frame.
            if last is not None or header is not None:
                raise BadAudio(
                    "unreadable",
                    f"{following - start:,} bytes at byte {start:,} are not MPEG audio",
                )
            file.seek(following)


class _Stream:
    """Decodes the frames of one file; a joined file has several."""

    def __init__(self, header: _Header, info: _Info | None) -> None:
        self.header, self.info = header, info or _Info(None, 0, 0)
        self.codec = av.CodecContext.create(f"mp{header.layer}float", "r")
        self.codec.options = STRICT
        self.packet: list[bytes] = []
        self.num_frames = 0
        self.cut = False
        delay = DECODER_DELAY if self.info.encoder_delay else 0
        self.skip = self.info.encoder_delay + delay
        self.padding = max(0, self.info.encoder_padding - delay)
        self.held = np.empty(0, np.float32)
        """The last ``padding`` samples so far."""

    def add(self, frame: _Frame) -> Iterator[Block]:
        """Adds the next frame; yields a block when a packet is full."""
        if len(frame.data) < frame.header.length:
            self.cut = True
            return
        self.num_frames += 1
        self.packet.append(frame.data)
        if len(self.packet) == PACKET_FRAMES:
            yield from self._decode()

    @property
    def tolerance_frames(self) -> int:
        """By how many frames their number may differ from the stated one."""
        return math.ceil(TOLERANCE_SECONDS * self.header.rate / self.header.num_samples)

    def finish(self) -> Iterator[Block]:
        """Checks that no frame is missing, and yields the last samples."""
        stated = self.info.num_frames
        if stated is not None:
            if self.num_frames < stated - self.tolerance_frames * (not self.cut):
                raise BadAudio("truncated", f"{self.num_frames} of {stated} MPEG frames")
        elif self.cut:
            raise BadAudio("truncated", "the last MPEG frame is cut short")
        if self.packet:
            yield from self._decode()

    def _decode(self) -> Iterator[Block]:
        frames = self.codec.decode(av.Packet(b"".join(self.packet)))
        self.packet = []
        arrays = [frame.to_ndarray() for frame in frames]
        joined = [
            mono(np.concatenate(list(group), axis=1).T)
            for _, group in groupby(arrays, key=len)  # by the number of channels
        ]
        samples = np.concatenate([self.held, *joined])
        skipped = min(self.skip, len(samples))
        self.skip -= skipped
        end = max(skipped, len(samples) - self.padding)
        self.held = samples[end:]
        yield Block(self.header.rate, samples[skipped:end])


def _parse(head: bytes) -> _Header | None:
    """The header in four bytes, if there is one."""
    word = int.from_bytes(head, "big")
    version, layer = word >> 19 & 3, 4 - (word >> 17 & 3)
    bit_rate, rate, padding = word >> 12 & 15, word >> 10 & 3, word >> 9 & 1
    if len(head) < 4 or word >> 21 != 0x7FF or version not in _RATES or layer == 4:
        return None
    if bit_rate in (0, 15) or rate == 3:
        return None
    hertz = _RATES[version][rate]
    bits = 1000 * _KBIT[version == MPEG_1, layer][bit_rate - 1]
    if layer == 1:
        length, num_samples = 4 * (12 * bits // hertz + padding), 384
    else:
        num_samples = 576 if layer == 3 and version != MPEG_1 else 1152
        length = num_samples // 8 * bits // hertz + padding
    return _Header(version, layer, hertz, word >> 6 & 3 == 3, length, num_samples)


def _confirmed(file: BinaryIO, start: int, header: _Header, num_frames: int = 1) -> bool:
    """Whether ``num_frames`` further frames follow the one at ``start``, or a tag or the end."""
    place = start
    for _ in range(num_frames):
        place += header.length
        file.seek(place)
        end = file.read(8)
        following = _parse(end[:4])
        if following is None:
            return not end or end.startswith((b"TAG", b"ID3", b"APETAGEX"))
        if not header.same_stream(following):
            return False
        header = following
    return True


def _skip_tag(file: BinaryIO) -> bool:
    """Seeks past a tag at the position of ``file``; False if there is none."""
    start = file.tell()
    skip_id3(file)
    place = file.tell()
    head = file.read(32)
    if head.startswith(b"TAG"):
        place += 128
    elif head.startswith(b"APETAGEX") and len(head) == 32:
        has_items_behind = bool(head[23] & 0x20)
        place += 32 + has_items_behind * int.from_bytes(head[12:16], "little")
    file.seek(place)
    return place > start


def _count_zeros(file: BinaryIO) -> int:
    """Number of zeros at the position of ``file``."""
    count = 0
    while data := file.read(SEARCH_BYTES):
        zeros = len(data) - len(data.lstrip(b"\0"))
        count += zeros
        if zeros < len(data):
            break
    return count


def _search(file: BinaryIO, start: int) -> int | None:
    """Byte after ``start`` where a few frames in a row begin, since two may occur by chance."""
    place = start + 1
    while True:
        file.seek(place)
        data = file.read(SEARCH_BYTES)
        for candidate in _HEADER.finditer(data):
            found = place + candidate.start()
            file.seek(found)
            header = _parse(file.read(4))
            if header and _confirmed(file, found, header, SEARCH_FRAMES):
                return found
        if len(data) < SEARCH_BYTES:
            return None
        place += len(data) - 2  # a header may reach into the next piece


def _read_info(frame: _Frame) -> _Info | None:
    """What a frame without audio states; None for other frames."""
    header, data = frame.header, frame.data
    if header.layer != 3:
        return None
    if data[36:40] == b"VBRI":
        return _Info(int.from_bytes(data[50:54], "big"), 0, 0)
    place = (
        4 + (17 if header.mono else 32)
        if header.version == MPEG_1
        else 4 + (9 if header.mono else 17)
    )
    if data[place : place + 4] not in (b"Xing", b"Info"):
        return None
    flags = int.from_bytes(data[place + 4 : place + 8], "big")
    place += 8
    num_frames = int.from_bytes(data[place : place + 4], "big") if flags & 1 else None
    place += sum(size for bit, size in ((1, 4), (2, 4), (4, 100), (8, 4)) if flags & bit)
    if data[place : place + 4] not in (b"LAME", b"Lavf", b"Lavc"):
        return _Info(num_frames, 0, 0)
    trim = int.from_bytes(data[place + 21 : place + 24], "big")
    return _Info(num_frames, trim >> 12, trim & 0xFFF)
