"""Small audio files of each format, and damage that only their formats know.

Fields are set to extremes where the format has checksums over them with the checksum made to
match, so that a decoder believes what it reads.
"""

import io
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile as sf

from tests.data.audio import noise
from tests.data.audio_bytes import crc8, crc16, crc_ogg, flac_frames, header_length, ogg_pages
from tests.data.test_decode import write_with_ffmpeg
from tests.fuzz.mutations import Mutant, Mutation, mutate, rng_of


class Base(NamedTuple):
    """An undamaged file."""

    name: str
    suffix: str
    data: bytes


def base_files() -> list[Base]:
    """Half a second to a second of noise in each format, mono and stereo, at several rates."""
    made: list[Base] = []
    for number, (form, subtype, rate, channels) in enumerate(
        [
            ("WAV", "PCM_16", 16_000, 1),
            ("WAV", "PCM_24", 44_100, 2),
            ("WAV", "FLOAT", 16_000, 1),
            ("FLAC", "PCM_16", 16_000, 1),
            ("FLAC", "PCM_24", 32_000, 2),
            ("FLAC", "PCM_16", 44_100, 2),
            ("OGG", "VORBIS", 16_000, 1),
            ("OGG", "VORBIS", 44_100, 2),
            ("OGG", "OPUS", 48_000, 1),
            ("MP3", "MPEG_LAYER_III", 16_000, 1),
        ]
    ):
        file = io.BytesIO()
        x = noise(0.6 + 0.04 * number, rate, number, channels)
        sf.write(file, x, rate, format=form, subtype=subtype)
        made.append(
            Base(f"{form} {subtype} {rate} {channels}", f".{form.lower()}", file.getvalue())
        )
    with tempfile.TemporaryDirectory() as folder:
        for suffix, codec in ((".m4a", "aac"), (".webm", "libopus")):
            path = Path(folder) / f"x{suffix}"
            write_with_ffmpeg(path, noise(0.9, 48_000, 99, 2), 48_000, codec)
            made.append(Base(f"FFmpeg {codec}", suffix, path.read_bytes()))
    return made


class Case(NamedTuple):
    """A mutated file."""

    number: int
    base: Base
    mutant: Mutant

    @property
    def name(self) -> str:
        """Of the file."""
        return f"{self.number:05d}{self.base.suffix}"


FAMILY = "audio"


def cases(bases: list[Base], numbers: range) -> Iterator[Case]:
    """The cases of these numbers; each a function of its number alone."""
    for number in numbers:
        rng = rng_of(FAMILY, number)
        base = bases[number % len(bases)]
        other = bases[rng.integers(len(bases))]
        own = (*OWN.get(base.suffix, ()), _joined_with(other), no_audio)
        yield Case(number, base, mutate(base.data, rng, own))


def _joined_with(other: Base) -> Mutation:
    def joined(data: bytes, rng: np.random.Generator) -> Mutant:
        return Mutant(data + other.data, f"{other.name} behind it")

    return joined


def no_audio(data: bytes, rng: np.random.Generator) -> Mutant:
    """No audio at all."""
    kinds = {
        "nothing": b"",
        "text": b"no audio in here, only words\n" * 50,
        "a page": b"<!DOCTYPE html><html><body>404 Not Found</body></html>\n",
        "noise": rng.bytes(5000),
        "zeros": bytes(5000),
    }
    what = list(kinds)[rng.integers(len(kinds))]
    return Mutant(kinds[what], what)


# ------------------------------------------------------------------------------------------- WAV
EXTREMES = (0, 1, 2, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF)
WAV_FIELDS = {
    "RIFF size": (4, 4), "fmt size": (16, 4), "format": (20, 2), "channels": (22, 2),
    "rate": (24, 4), "bytes a second": (28, 4), "block align": (32, 2), "bits": (34, 2),
}  # fmt: skip


def wav_field(data: bytes, rng: np.random.Generator) -> Mutant:
    """A field of the header, or the size of a chunk, at an extreme."""
    fields = WAV_FIELDS | {
        f"{chunk!r} size": (place + 4, 4)
        for chunk in (b"data", b"fact", b"PEAK")
        if (place := data.find(chunk)) >= 0
    }
    name = list(fields)[rng.integers(len(fields))]
    start, size = fields[name]
    value = EXTREMES[rng.integers(len(EXTREMES))] & (1 << 8 * size) - 1
    out = data[:start] + value.to_bytes(size, "little") + data[start + size :]
    return Mutant(out, f"{name} set to {value}")


def wav_non_finite(data: bytes, rng: np.random.Generator) -> Mutant:
    """Of a float file: NaN or infinity among the samples. Others get a sample that is odd."""
    start = data.find(b"data") + 8
    place = start + 4 * int(rng.integers(0, (len(data) - start) // 4))
    value = (np.nan, np.inf, -np.inf, 3e38, -1e20)[rng.integers(5)]
    return Mutant(
        data[:place] + struct.pack("<f", value) + data[place + 4 :], f"{value} at byte {place}"
    )


def wav_chunks_swapped(data: bytes, rng: np.random.Generator) -> Mutant:
    """The chunks behind RIFF in another order."""
    chunks, place = [], 12
    while place + 8 <= len(data):
        size = 8 + int.from_bytes(data[place + 4 : place + 8], "little")
        chunks.append(data[place : place + size])
        place += size
    order = rng.permutation(len(chunks))
    return Mutant(data[:12] + b"".join(chunks[i] for i in order), f"chunks in the order {order}")


# ------------------------------------------------------------------------------------------ FLAC
STREAMINFO_FIELDS = {  # of its 34 bytes: first bit, bits
    "smallest block": (0, 16), "largest block": (16, 16), "smallest frame": (32, 24),
    "largest frame": (56, 24), "rate": (80, 20), "channels": (100, 3), "bits": (103, 5),
    "samples": (108, 36), "MD5": (144, 128),
}  # fmt: skip


def flac_streaminfo(data: bytes, rng: np.random.Generator) -> Mutant:
    """A field of STREAMINFO at an extreme, or a little off."""
    name = list(STREAMINFO_FIELDS)[rng.integers(len(STREAMINFO_FIELDS))]
    first, bits = STREAMINFO_FIELDS[name]
    info = int.from_bytes(data[8:42], "big")
    shift = 34 * 8 - first - bits
    mask = (1 << bits) - 1
    old = info >> shift & mask
    value = (0, 1, mask, mask // 2, old // 2, 2 * old, old + 1, old - 1)[rng.integers(8)] & mask
    info = info & ~(mask << shift) | value << shift
    return Mutant(data[:8] + info.to_bytes(34, "big") + data[42:], f"{name}: {old} -> {value}")


def flac_frame(data: bytes, rng: np.random.Generator) -> Mutant:
    """A frame whose header says another thing, its CRCs made to match; or one taken, or doubled."""
    starts = flac_frames(data)
    ends = [*starts[1:], len(data)]
    i = int(rng.integers(len(starts)))
    start, end = starts[i], ends[i]
    frame = bytearray(data[start:end])
    kind = int(rng.integers(5))
    if kind == 0:
        return Mutant(data[:start] + data[end:], f"frame {i} of {len(starts)} taken")
    if kind == 1:
        return Mutant(data[:end] + data[start:], f"frame {i} of {len(starts)} doubled")
    length = header_length(data, start)
    if kind == 2:
        place = int(rng.integers(length, len(frame) - 2))
        what = "a byte of the residual"
    else:
        place = int(rng.integers(2, length - 1))
        what = "a byte of the header"
    frame[place] ^= 1 << int(rng.integers(8))
    # With kind 4 the CRCs stay wrong.
    if kind != 4:
        frame[length - 1] = crc8(bytes(frame[: length - 1]))
        frame[-2:] = crc16(bytes(frame[:-2])).to_bytes(2, "big")
    made = "CRCs made to match" if kind != 4 else "CRCs as they were"
    return Mutant(
        data[:start] + bytes(frame) + data[end:], f"frame {i} of {len(starts)}: {what}, {made}"
    )


# ------------------------------------------------------------------------------------------- Ogg
OGG_FIELDS = {
    "version": (4, 1), "flags": (5, 1), "granule": (6, 8), "serial": (14, 4), "number": (18, 4),
    "segments": (26, 1),
}  # fmt: skip


def ogg_page(data: bytes, rng: np.random.Generator) -> Mutant:
    """A page whose header or body says another thing, its CRC made to match; or one taken,
    doubled, swapped with the next, or everything from it on."""
    pages = ogg_pages(data)
    assert pages
    i = int(rng.integers(len(pages)))
    p = pages[i]
    head, page, tail = data[: p.start], bytearray(data[p.start : p.end]), data[p.end :]
    where = f"page {i} of {len(pages)}"
    kind = int(rng.integers(7))
    if kind == 0:
        return Mutant(head + tail, f"{where} taken")
    if kind == 1:
        return Mutant(head + bytes(page) + bytes(page) + tail, f"{where} doubled")
    if kind == 2:
        return Mutant(head, f"{where} and all behind it taken")
    if kind == 3:
        place, size = 27, page[26]
        name, value = "a segment's length", int(rng.integers(256))
        page[place + int(rng.integers(size))] = value
    elif kind == 4:
        name, place = "body", int(rng.integers(27 + page[26], len(page)))
        value = int(rng.integers(256))
        page[place] = value
    else:
        name = list(OGG_FIELDS)[rng.integers(len(OGG_FIELDS))]
        place, size = OGG_FIELDS[name]
        old = int.from_bytes(page[place : place + size], "little")
        top = 1 << 8 * size
        value = (0, 1, top - 1, top // 2, old + 1, old - 1, 2 * old)[rng.integers(7)] % top
        page[place : place + size] = value.to_bytes(size, "little")
    page[22:26] = bytes(4)
    page[22:26] = crc_ogg(bytes(page)).to_bytes(4, "little")
    return Mutant(head + bytes(page) + tail, f"{where}: {name} set to {value}, CRC made to match")


OWN: dict[str, tuple[Mutation, ...]] = {
    ".wav": (wav_field, wav_field, wav_non_finite, wav_chunks_swapped),
    ".flac": (flac_streaminfo, flac_frame, flac_frame),
    ".ogg": (ogg_page, ogg_page, ogg_page),
}
