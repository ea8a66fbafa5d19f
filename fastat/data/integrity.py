"""Checksums of FLAC and Ogg files that libsndfile leaves unchecked.

libsndfile compares the CRC of a FLAC frame, but a frame that is missing becomes silence, and it
looks at neither the MD5 of the samples nor whether frames and header mean the same rate. Of an Ogg
file it leaves out the pages that are damaged or gone, and takes any last page for the end.
"""

import io
import struct
import zlib
from pathlib import Path
from typing import BinaryIO, NamedTuple

from fastat.data.bad_audio import BadAudio

NO_MD5 = bytes(16)
"""What an encoder writes that could not go back to the header."""
OGG_FIRST, OGG_LAST = 2, 4
OPUS_RATE = 48_000
"""Hz; Opus counts time in it whatever it was made from."""
_FLAC_RATES = {
    1: 88_200, 2: 176_400, 3: 192_000, 4: 8_000, 5: 16_000, 6: 22_050, 7: 24_000, 8: 32_000,
    9: 44_100, 10: 48_000, 11: 96_000,
}  # fmt: skip
_REVERSED_BITS = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


class FlacHeader(NamedTuple):
    """What a FLAC file says of itself that libsndfile does not pass on."""

    md5: bytes
    frame_rate: int | None
    """Hz, by the first frame; None where the frame leaves it to the header."""


def read_flac_header(source: Path | bytes) -> FlacHeader | None:
    """Of a native FLAC file; None when it does not begin as one."""
    with _opened(source) as file:
        start = file.read(10)
        if start[:3] == b"ID3":
            size = sum((byte & 0x7F) << 7 * place for place, byte in enumerate(start[:5:-1]))
            file.seek(10 + size)
        else:
            file.seek(0)
        if file.read(4) != b"fLaC":
            return None
        md5, last = NO_MD5, False
        while not last:
            head = file.read(4)
            if len(head) < 4:
                return None
            last, kind, size = bool(head[0] & 0x80), head[0] & 0x7F, int.from_bytes(head[1:], "big")
            if kind == 0:
                md5 = file.read(size)[18:34]
            else:
                file.seek(size, 1)
        frame = file.read(3)
    code = frame[2] & 0xF if len(frame) == 3 and frame[0] == 0xFF else 0
    return FlacHeader(md5, _FLAC_RATES.get(code))


def check_ogg(source: Path | bytes, rate: int, seconds: float | None) -> None:
    """Follows the pages of an Ogg file over its first ``seconds`` (None: all).

    Args:
        rate: of the positions that pages carry, Hz.

    Raises:
        BadAudio: a page is damaged or missing, or the file stops before its last page.
    """
    with _opened(source) as file:
        expected: dict[int, int] = {}  # the number of each open stream's next page
        origin = None
        ended = False
        while page := _read_page(file, ended):
            if page.flags & OGG_FIRST:
                expected[page.serial] = page.number
            if expected.get(page.serial) != page.number:
                raise BadAudio("unreadable", f"an Ogg page before byte {file.tell():,} is missing")
            expected[page.serial] = page.number + 1 & 0xFFFFFFFF
            if page.flags & OGG_LAST:
                del expected[page.serial]
            ended = not expected
            if 0 < page.position:
                origin = page.position if origin is None else origin
                if seconds is not None and page.position - origin >= seconds * rate:
                    return
        if not ended:
            raise BadAudio("truncated", "the last Ogg page is missing")


def _opened(source: Path | bytes) -> BinaryIO:
    return io.BytesIO(source) if isinstance(source, bytes) else source.open("rb")


class _Page(NamedTuple):
    flags: int
    position: int
    serial: int
    number: int


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
    return _Page(flags, position, serial, number)


def _ogg_crc(data: bytes) -> int:
    """CRC-32 as Ogg computes it: zlib's polynomial, bits in the other order, nothing inverted."""
    mirrored = zlib.crc32(data.translate(_REVERSED_BITS), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int(f"{mirrored:032b}"[::-1], 2)
