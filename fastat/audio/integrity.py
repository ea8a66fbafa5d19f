"""Checks of FLAC and Ogg files that libsndfile does not make.

libsndfile compares the CRC of a FLAC frame, but a frame that is missing becomes silence, and it
looks at neither the MD5 of the samples nor whether frames and header mean the same rate. Of an Ogg
file it leaves out the pages that are damaged or gone, and takes any last page for the end.
"""

import math
import re
import struct
import zlib
from typing import BinaryIO, NamedTuple, Self

from fastat.audio.bad_audio import BadAudio

STREAMINFO_BYTES = 34
NO_MD5 = bytes(16)
"""The MD5 field if the encoder could not go back to the header to write it."""
OGG_FIRST, OGG_LAST = 2, 4
_FLAC_RATES = {
    1: 88_200, 2: 176_400, 3: 192_000, 4: 8_000, 5: 16_000, 6: 22_050, 7: 24_000, 8: 32_000,
    9: 44_100, 10: 48_000, 11: 96_000,
}  # fmt: skip
_FLAC_BEGINNING = rb"fLaC[\x00\x80]\x00\x00\x22"
"""Matches the first eight bytes of every native FLAC file: its name, the head of STREAMINFO."""
_FRAME_HEAD_BYTES = 5
"""Bytes of the sync code, of how the frame is coded, and of a frame number of one byte."""
_SEARCH_BYTES = 1 << 20
_REVERSED_BITS = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


class StreamInfo(NamedTuple):
    """The block STREAMINFO of a FLAC stream."""

    rate: int
    """Hz."""
    bits: int
    """Bits of a sample."""
    num_samples: int
    """0 if the encoder did not know it."""
    md5: bytes

    @classmethod
    def parse(cls, block: bytes) -> Self:
        """Parses its bytes; a block that is cut short has neither length nor MD5."""
        block = block[:STREAMINFO_BYTES].ljust(STREAMINFO_BYTES, b"\0")
        number = int.from_bytes(block[10:18], "big")
        return cls(number >> 44, (number >> 36 & 31) + 1, number & (1 << 36) - 1, block[18:])


class FlacHeader(NamedTuple):
    """Header fields of a native FLAC file that libsndfile does not give."""

    info: StreamInfo
    frame_rate: int | None
    """Hz, by the first frame; None if the frame refers to the header."""
    first_frame: int
    """Byte where the first frame begins."""
    frame_head: bytes
    """Its first bytes."""

    @property
    def is_complete(self) -> bool:
        """Whether length and MD5 are known; an encoder that writes to a pipe knows neither."""
        return self.info.num_samples > 0 and self.info.md5 != NO_MD5


def read_flac_header(file: BinaryIO, start: int) -> FlacHeader | None:
    """Reads the header of the native FLAC file at byte ``start``; None if there is none."""
    file.seek(start)
    head = file.read(8)
    if not re.match(_FLAC_BEGINNING, head):
        return None
    info, last = StreamInfo.parse(file.read(STREAMINFO_BYTES)), bool(head[4] & 0x80)
    while not last:
        head = file.read(4)
        if len(head) < 4 or head[0] & 0x7F == 0:  # only the first block is STREAMINFO
            return None
        last = bool(head[0] & 0x80)
        file.seek(int.from_bytes(head[1:], "big"), 1)
    first_frame, frame_head = file.tell(), file.read(_FRAME_HEAD_BYTES)
    is_frame = len(frame_head) == _FRAME_HEAD_BYTES and frame_head[0] == 0xFF
    rate = _FLAC_RATES.get(frame_head[2] & 0xF) if is_frame else None
    return FlacHeader(info, rate, first_frame, frame_head if is_frame else b"")


def find_next_flac(file: BinaryIO, start: int) -> int | None:
    """Byte where another FLAC file was joined to the one at ``start``; None if there is none."""
    return _find(file, start + 8, _FLAC_BEGINNING)


def begins_again(file: BinaryIO, flac: FlacHeader, end: int | None) -> bool:
    """Whether frame numbers start again before byte ``end``, as in files that FFmpeg joined."""
    head = flac.frame_head
    if not head or head[4] != 0:
        return False
    # Byte 3 says how the channels are coded, which may differ from frame to frame.
    pattern = re.escape(head[:3]) + rb"[\x00-\xff]\x00"
    place = _find(file, flac.first_frame + len(head), pattern)
    return place is not None and (end is None or place < end)


def _find(file: BinaryIO, start: int, pattern: bytes) -> int | None:
    """First byte from ``start`` on where ``pattern``, of up to eight bytes, matches."""
    place, tail = start, b""
    file.seek(start)
    while data := file.read(_SEARCH_BYTES):
        found = re.search(pattern, tail + data)
        if found is not None:
            return place - len(tail) + found.start()
        place += len(data)
        tail = (tail + data)[-7:]
    return None


def check_ogg(file: BinaryIO, start: int, seconds: float) -> int | None:
    """Checks the pages of the Ogg file at byte ``start``, as far as its first ``seconds``.

    Returns the byte where a file that was chained to it begins; None if there is none in the first
    ``seconds``, and for other formats.

    Raises:
        BadAudio: a page is damaged or missing, or the file stops before its last page.
    """
    file.seek(start)
    if file.read(4) != b"OggS":
        return None
    file.seek(start)
    expected: dict[int, int] = {}  # the number of each open stream's next page
    origin = None
    ended = False
    rate = math.inf
    while page := _read_page(file, ended):
        if page.flags & OGG_FIRST:
            if ended:
                return page.start
            expected[page.serial] = page.number
            rate = _position_rate(page.body) or rate
        if expected.get(page.serial) != page.number:
            raise BadAudio("unreadable", f"an Ogg page before byte {file.tell():,} is missing")
        expected[page.serial] = page.number + 1 & 0xFFFFFFFF
        if page.flags & OGG_LAST:
            del expected[page.serial]
        ended = not expected
        if 0 < page.position:
            origin = page.position if origin is None else origin
            if page.position - origin >= seconds * rate:
                return None
    if not ended:
        raise BadAudio("truncated", "the last Ogg page is missing")
    return None


def _position_rate(packet: bytes) -> int | None:
    """Rate in Hz of the positions in page headers, by a stream's first packet; None for an unknown
    codec."""
    if packet.startswith(b"\x01vorbis"):
        return int.from_bytes(packet[12:16], "little")
    if packet.startswith(b"OpusHead"):
        return 48_000
    if packet.startswith(b"\x7fFLAC"):
        return int.from_bytes(packet[27:30], "big") >> 4
    return None


class _Page(NamedTuple):
    start: int
    flags: int
    position: int
    serial: int
    number: int
    body: bytes


def _read_page(file: BinaryIO, ended: bool) -> _Page | None:
    """Reads the next page; None at the file's end, or if something else follows a whole stream."""
    start = file.tell()
    head = file.read(27)
    if not head or (ended and head[:4] != b"OggS"):
        return None
    if not b"OggS".startswith(head[:4]):
        raise BadAudio("unreadable", f"expected an Ogg page at byte {start:,}")
    table = file.read(head[26]) if len(head) == 27 else b""
    body = file.read(sum(table))
    if len(head) < 27 or len(table) < head[26] or len(body) < sum(table):
        raise BadAudio("truncated", f"the Ogg page at byte {start:,} is cut short")
    flags, position, serial, number, crc = struct.unpack("<BqIII", head[5:26])
    if _ogg_crc(head[:22] + bytes(4) + head[26:] + table + body) != crc:
        raise BadAudio("unreadable", f"the Ogg page at byte {start:,} differs from its checksum")
    return _Page(start, flags, position, serial, number, body)


def _ogg_crc(data: bytes) -> int:
    """CRC-32 as Ogg computes it: zlib's polynomial, bits in the other order, nothing inverted."""
    mirrored = zlib.crc32(data.translate(_REVERSED_BITS), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int(f"{mirrored:032b}"[::-1], 2)
