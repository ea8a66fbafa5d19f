"""Frames of FLAC files and pages of Ogg files, found by another hand than fastat's."""

import hashlib
import struct
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


# ------------------------------------------------------------------------------------------ FLAC
def flac_frames(data: bytes) -> list[int]:
    """Where frames start: a sync code, and a header whose CRC-8 is right."""
    starts = []
    place = data.find(b"\xff\xf8")
    while 0 <= place < len(data) - 16:
        length = header_length(data, place)
        if length and crc8(data[place : place + length - 1]) == data[place + length - 1]:
            starts.append(place)
        place = data.find(b"\xff\xf8", place + 2)
    return starts


def header_length(data: bytes, place: int) -> int:
    """Of a FLAC frame's header with its CRC; 0 for none."""
    number = data[place + 4]
    lead = next((i for i in range(8) if not number & 0x80 >> i), 8)
    if lead in (1, 8):
        return 0
    size, rate = data[place + 2] >> 4, data[place + 2] & 15
    return 4 + max(lead, 1) + {6: 1, 7: 2}.get(size, 0) + {12: 1, 13: 2, 14: 2}.get(rate, 0) + 1


# ------------------------------------------------------------------------------------------- Ogg
OGG_LAST = 4


class Page(NamedTuple):
    """Of an Ogg file."""

    start: int
    end: int
    flags: int
    serial: int
    number: int


def ogg_pages(data: bytes) -> list[Page] | None:
    """The pages; None unless the file is nothing but whole pages with the right CRC."""
    pages, place = [], 0
    while place < len(data):
        head = data[place : place + 27]
        if len(head) < 27 or head[:4] != b"OggS":
            return None
        table = data[place + 27 : place + 27 + head[26]]
        end = place + 27 + len(table) + sum(table)
        page = data[place:end]
        if end > len(data) or len(table) < head[26]:
            return None
        if crc_ogg(page[:22] + bytes(4) + page[26:]) != int.from_bytes(page[22:26], "little"):
            return None
        serial, number = struct.unpack("<II", head[14:22])
        pages.append(Page(place, end, head[5], serial, number))
        place = end
    return pages


# ------------------------------------------------------------------------------------- checksums
def crc8(data: bytes) -> int:
    """Of FLAC's frame header: polynomial 0x07."""
    return _crc(data, 0x07, 8)


def crc16(data: bytes) -> int:
    """Of a FLAC frame: polynomial 0x8005."""
    return _crc(data, 0x8005, 16)


def crc_ogg(data: bytes) -> int:
    """Of an Ogg page with its CRC field zero: polynomial 0x04c11db7, not reflected."""
    return _crc(data, 0x04C11DB7, 32)


def _crc(data: bytes, polynomial: int, bits: int) -> int:
    table = _TABLES.setdefault(polynomial, _crc_table(polynomial, bits))
    crc, mask = 0, (1 << bits) - 1
    for byte in data:
        crc = (crc << 8 & mask) ^ table[crc >> bits - 8 ^ byte]
    return crc


_TABLES: dict[int, list[int]] = {}


def _crc_table(polynomial: int, bits: int) -> list[int]:
    table = []
    for byte in range(256):
        crc = byte << bits - 8
        for _ in range(8):
            crc = crc << 1 ^ (polynomial if crc >> bits - 1 else 0)
            crc &= (1 << bits) - 1
        table.append(crc)
    return table


def flac_file(x: NDArray[np.int64], bits: int, rate: int, block: int = 4000) -> bytes:
    """A native FLAC file of [n] samples of any width, stored as they are (verbatim subframes)."""
    width = -(-bits // 8)
    raw = b"".join(int(v).to_bytes(width, "little", signed=True) for v in x)
    number = rate << 44 | (bits - 1) << 36 | len(x)
    info = struct.pack(">HH", block, block) + bytes(6) + number.to_bytes(8, "big")
    out = b"fLaC\x80\0\0\x22" + info + hashlib.md5(raw).digest()
    for index, start in enumerate(range(0, len(x), block)):
        part = x[start : start + block]
        # Sync; block size in 16 bits behind the header, rate and width by STREAMINFO; mono.
        head = b"\xff\xf8\x70\x00" + bytes([index]) + struct.pack(">H", len(part) - 1)
        head += bytes([crc8(head)])
        mask = (1 << bits) - 1
        content = "00000010" + "".join(f"{int(v) & mask:0{bits}b}" for v in part)
        content += "0" * (-len(content) % 8)
        frame = head + int(content, 2).to_bytes(len(content) // 8, "big")
        out += frame + crc16(frame).to_bytes(2, "big")
    return out


# ------------------------------------------------------------------------------------------- MPEG
def mp3_frames(data: bytes) -> list[int]:
    """Where the frames of an MP3 file at 44.1 kHz (MPEG-1, layer 3) start, tags in front left out;
    the last entry is its end."""
    kbit = (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)
    place = data.find(b"\xff\xfb")
    starts = [place]
    while data[place : place + 2] == b"\xff\xfb":
        rate, padding = kbit[(data[place + 2] >> 4) - 1], data[place + 2] >> 1 & 1
        place += 144_000 * rate // 44_100 + padding
        starts.append(place)
    return starts
