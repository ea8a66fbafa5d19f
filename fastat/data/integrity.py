"""Checksums of FLAC and Ogg files that libsndfile leaves unchecked.

libsndfile compares the CRC of a FLAC frame, but a frame that is missing becomes silence, and it
looks at neither the MD5 of the samples nor whether frames and header mean the same rate. Of an Ogg
file it leaves out the pages that are damaged or gone, and takes any last page for the end.
"""

import math
import re
import struct
import zlib
from typing import BinaryIO, NamedTuple

from fastat.data.bad_audio import BadAudio

_FLAC_BEGINNING = re.compile(rb"fLaC[\x00\x80]\x00\x00\x22")
"""Of every native FLAC file: its name and the head of its first block, STREAMINFO."""
_FLAC_BEGINNING_BYTES = 8
_SEARCH_BYTES = 1 << 20
NO_MD5 = bytes(16)
"""What an encoder writes that could not go back to the header."""
OGG_FIRST, OGG_LAST = 2, 4
_FLAC_RATES = {
    1: 88_200, 2: 176_400, 3: 192_000, 4: 8_000, 5: 16_000, 6: 22_050, 7: 24_000, 8: 32_000,
    9: 44_100, 10: 48_000, 11: 96_000,
}  # fmt: skip
_REVERSED_BITS = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


class FlacHeader(NamedTuple):
    """What a FLAC file says of itself that libsndfile does not pass on."""

    md5: bytes
    num_samples: int
    """0 where the encoder did not know it."""
    frame_rate: int | None
    """Hz, by the first frame; None where the frame leaves it to the header."""

    @property
    def is_complete(self) -> bool:
        """Whether length and MD5 are known; a program that writes to a pipe knows neither."""
        return self.num_samples > 0 and self.md5 != NO_MD5


def read_flac_header(file: BinaryIO, start: int) -> FlacHeader | None:
    """Of the native FLAC file that begins at byte ``start``; None when none does."""
    file.seek(start)
    if file.read(4) != b"fLaC":
        return None
    info, last = b"", False
    while not last:
        head = file.read(4)
        if len(head) < 4:
            return None
        last, kind, size = bool(head[0] & 0x80), head[0] & 0x7F, int.from_bytes(head[1:], "big")
        if kind == 0:
            info = file.read(size)
        else:
            file.seek(size, 1)
    frame = file.read(3)
    if len(info) < 34:
        return None
    code = frame[2] & 0xF if len(frame) == 3 and frame[0] == 0xFF else 0
    number = int.from_bytes(info[13:18], "big")  # the last 36 of these 40 bits
    return FlacHeader(info[18:34], number & (1 << 36) - 1, _FLAC_RATES.get(code))


def find_next_flac(file: BinaryIO, start: int) -> int | None:
    """Where another FLAC file was joined to the one that begins at ``start``; None: nowhere."""
    place = start + _FLAC_BEGINNING_BYTES
    while True:
        file.seek(place)
        data = file.read(_SEARCH_BYTES)
        found = _FLAC_BEGINNING.search(data)
        if found is not None:
            return place + found.start()
        if len(data) < _SEARCH_BYTES:
            return None
        place += len(data) - _FLAC_BEGINNING_BYTES


def is_ogg_flac(file: BinaryIO, start: int) -> bool:
    """Whether a file of FLAC in Ogg begins at byte ``start``."""
    file.seek(start)
    head = file.read(64)
    return head.startswith(b"OggS") and b"\x7fFLAC" in head


def check_ogg(file: BinaryIO, start: int, seconds: float) -> int | None:
    """Follows the pages of the Ogg file that begins at byte ``start`` over its first ``seconds``.

    Returns where another file begins that was chained to it; None when there is none, when the
    ``seconds`` end before, and for other formats.

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
    """Hz of the positions that pages carry, by a stream's first packet; None for a codec that is
    not known."""
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
    """The next page; None at the end, and where another thing follows a whole stream."""
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
