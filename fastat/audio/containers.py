"""Finds where the samples of WAV, AIFF, AU, CAF and Wave64 files lie and how many there are, and
where MP4 and Matroska files end.

The headers of PCM files state a number of bytes, which is often wrong: a recorder that lost its
power leaves 0 or an old number, a program that writes to a pipe cannot know it, and a field of 32
bits wraps at 4 GiB. libsndfile trusts most of these numbers. Here they are compared with the size
of the file and with what follows the samples; if one is wrong, libsndfile gets a header with the
right one.
"""

import io
import struct
from typing import BinaryIO, NamedTuple

SLACK_BYTES = 128
"""A number that is wrong by no more than this counts parts of the header, or a byte of padding."""
_UNKNOWN_SIZES = (range(1), range(0x7F000000, 0x80010000), range(0xFFFF0000, 0x100000000))
"""Sizes that programs which write to a pipe state in 32 bits: 0, -1, or close to 2 or 4 GiB."""
MAX_BOXES = 100_000
"""Limit of the chunks or boxes of a file that are read."""
_TRAILERS = (
    b"TAG", b"ID3", b"APETAGEX", b"LIST", b"id3 ", b"_PMX", b"bext", b"iXML", b"axml", b"cue ",
    b"smpl", b"fact", b"PEAK", b"JUNK",
)  # fmt: skip
"""Tags and chunks that follow the samples in many files, and are no audio even if cut short."""
_MAX_32_BITS = 0xFFFFFFFF


class _Form(NamedTuple):
    """How a format consists of chunks."""

    first: int
    """Byte of the first chunk."""
    head: str
    """Name and size of a chunk, for ``struct``."""
    data: bytes
    """Name of the chunk with the samples."""
    data_offset: int = 0
    """Bytes in that chunk before the samples."""
    counts_head: bool = False
    """Whether a chunk's size includes its head."""
    align: int = 2


_FORMS = {
    b"RIFF": _Form(12, "<4sI", b"data"),
    b"RIFX": _Form(12, ">4sI", b"data"),
    b"RF64": _Form(12, "<4sI", b"data"),
    b"BW64": _Form(12, "<4sI", b"data"),
    b"FORM": _Form(12, ">4sI", b"SSND", data_offset=8),
    b"caff": _Form(8, ">4sq", b"data", data_offset=4, align=1),
    b"riff": _Form(40, "<16sQ", b"data", counts_head=True, align=8),
}
_AU_ORDERS = {b".snd": ">", b"dns.": "<"}
_AU = _Form(0, ">4sI", b"", align=1)
"""AU has no chunks: only another file can follow its samples."""


class Samples(NamedTuple):
    """Where the samples lie."""

    first: int
    """Byte of the first sample; only used if ``head`` is not empty."""
    head: bytes
    """A header with the right number for these samples; empty if the file's own is right."""
    note: str
    """What was wrong; empty if nothing was, or the header states no number."""
    next_file: int | None
    """Byte where another file was joined to this one."""
    missing: str = ""
    """Which of the stated samples are missing; empty if none are."""


UNKNOWN = Samples(0, b"", "", None)


def find_samples(file: BinaryIO, start: int) -> Samples:
    """Reads the header of the file at byte ``start``.

    Returns ``UNKNOWN`` for other formats, and if there is no chunk of samples.
    """
    size = file.seek(0, io.SEEK_END)
    file.seek(start)
    head = file.read(8)
    magic = head[:4]
    if head[4:] == b"ftyp":
        return UNKNOWN._replace(next_file=_next_mp4(file, start))
    if magic == b"\x1aE\xdf\xa3":
        return UNKNOWN._replace(missing=_missing_of_matroska(file, start, size))
    if magic in _AU_ORDERS:
        order = _AU_ORDERS[magic]
        file.seek(start + 4)
        offset, stated = struct.unpack(f"{order}II", file.read(8).ljust(8, b"\0"))
        size_field = _SizeField(start, start + offset, start + 8, f"{order}I", stated, _AU)
        return size_field.check(file, size)
    form = _FORMS.get(magic)
    if form is None:
        return UNKNOWN
    head_size = struct.calcsize(form.head)
    place, sizes_64 = start + form.first, None
    for _ in range(MAX_BOXES):
        file.seek(place)
        head = file.read(head_size)
        if len(head) < head_size or not head[:4].isascii() or head[:4] == bytes(4):
            return UNKNOWN
        name, stated = struct.unpack(form.head, head)
        if name.startswith(form.data):
            break
        if name == b"ds64":
            sizes_64 = place + head_size + 8  # behind the size of the file
        length = stated if form.counts_head else head_size + stated
        place += max(head_size, length + -length % form.align)
    else:
        return UNKNOWN
    first, field = place + head_size + form.data_offset, place + len(name)
    code = form.head[0] + form.head[-1]
    if sizes_64 is not None and stated == _MAX_32_BITS:
        file.seek(sizes_64)
        field, code = sizes_64, "<Q"
        (stated,) = struct.unpack(code, file.read(8).ljust(8, b"\0"))
    return _SizeField(start, first, field, code, stated, form).check(file, size)


def _next_mp4(file: BinaryIO, start: int) -> int | None:
    """Byte where a second file begins among the boxes of an MP4 file; None if there is none."""
    place = start
    for _ in range(MAX_BOXES):
        file.seek(place)
        head = file.read(16)
        size, name = int.from_bytes(head[:4], "big"), head[4:8]
        if size == 1:
            size = int.from_bytes(head[8:], "big")
        if name == b"ftyp" and place > start:
            return place
        if size < 8:  # the last box, or no box
            return None
        place += size
    return None


def _missing_of_matroska(file: BinaryIO, start: int, size: int) -> str:
    """What is missing at the end of the Matroska or WebM file at ``start``; empty if nothing is."""
    place = start
    for element in (b"\x1aE\xdf\xa3", b"\x18S\x80g"):  # its header, and the segment
        file.seek(place)
        head = file.read(12)
        if not head.startswith(element) or len(head) < 12 or not head[4]:
            return ""
        width = 9 - head[4].bit_length()  # the first bit set says how many bytes the size has
        stated = int.from_bytes(head[4 : 4 + width], "big") & (1 << 7 * width) - 1
        place += 4 + width + stated
        if stated == (1 << 7 * width) - 1:  # unknown, as in a live stream
            return ""
    return f"{size - start:,} of {place - start:,} bytes of the file" if place > size else ""


class _SizeField(NamedTuple):
    """The field of a header that states the number of bytes."""

    start: int
    """Byte where the file begins."""
    first: int
    """Byte where the samples begin."""
    place: int
    code: str
    """For ``struct``."""
    stated: int
    form: _Form

    @property
    def overhead(self) -> int:
        """Bytes that the number counts beside the samples."""
        head = struct.calcsize(self.form.head) if self.form.counts_head else 0
        return self.form.data_offset + head

    @property
    def is_unknown(self) -> bool:
        """Whether the program that wrote it did not know the number."""
        if self.code[-1] != "I":
            return self.stated <= 0 or self.stated >= 1 << 62
        return any(self.stated in sizes for sizes in _UNKNOWN_SIZES)

    def check(self, file: BinaryIO, size: int) -> Samples:
        """Compares the number with what follows the first sample."""
        available = max(0, size - self.first)
        if self.is_unknown:
            if self.stated == 0 and (
                available == 0 or _is_chunk(file, self.first, size, self.form)
            ):
                return UNKNOWN
            return self._with_size(file, available, "")
        stated = self.stated - self.overhead
        missing = stated - available
        if missing > SLACK_BYTES:
            detail = f"{available:,} of {stated:,} bytes of audio"
            return self._with_size(file, available, "")._replace(missing=detail)
        if missing > 0:
            note = f"the header states {missing:,} bytes of audio more than there are"
            return self._with_size(file, available, note)
        end = self.first + stated
        padded = end + (self.start - end) % self.form.align
        for place in (padded, end):  # some programs leave the padding out
            if _is_file(file, place):
                return UNKNOWN._replace(next_file=place)
            if _is_chunk(file, place, size, self.form):
                return UNKNOWN
        if size - padded <= SLACK_BYTES:
            return UNKNOWN
        note = f"the header states {stated:,} bytes of audio, the file holds {available:,}"
        return self._with_size(file, available, note)

    def _with_size(self, file: BinaryIO, available: int, note: str) -> Samples:
        """The header with the number of bytes that are ``available``."""
        file.seek(self.start)
        head = bytearray(file.read(self.first - self.start))
        right, place = available + self.overhead, self.place - self.start
        if head[:4] == b"RIFF" and right > _MAX_32_BITS:
            struct.pack_into(self.code, head, place, _MAX_32_BITS)
            sizes_64 = struct.pack("<4sIQQQI", b"ds64", 28, len(head) + available, available, 0, 0)
            head[:12] = b"RF64\xff\xff\xff\xffWAVE" + sizes_64
        else:
            most = _MAX_32_BITS if self.code[-1] == "I" else right
            struct.pack_into(self.code, head, place, min(right, most))
        return Samples(self.first, bytes(head), note, None)


def _is_file(file: BinaryIO, place: int) -> bool:
    """Whether another file begins there."""
    file.seek(place)
    head = file.read(12)
    if head[:4] in (*_AU_ORDERS, b"caff"):
        return True
    return head[:4] in _FORMS and head[8:] in (b"WAVE", b"AIFF", b"AIFC")


def _is_chunk(file: BinaryIO, place: int, size: int, form: _Form) -> bool:
    """Whether a chunk or a tag begins there, rather than further samples."""
    file.seek(place)
    head = file.read(struct.calcsize(form.head))
    if head.startswith(_TRAILERS):
        return True
    if form is _AU or len(head) < struct.calcsize(form.head):
        return False
    name, stated = struct.unpack(form.head, head)
    return all(0x20 <= byte < 0x7F for byte in name[:4]) and 0 <= stated <= size - place
