"""A part of a file that reads as if it were a file of its own."""

import io
from pathlib import Path
from typing import BinaryIO

ID3_HEAD = 10
"""Bytes of the head of an ID3v2 tag."""


class Window(io.RawIOBase):
    """Reads ``head``, then the bytes from ``start`` to ``end`` of ``file``, which it closes."""

    def __init__(
        self, file: BinaryIO, start: int = 0, end: int | None = None, head: bytes = b""
    ) -> None:
        """With ``end`` None, up to the end of the file."""
        super().__init__()
        self.file, self.start, self.head = file, start, head
        size = file.seek(0, io.SEEK_END)
        self.size = len(head) + (size if end is None else min(end, size)) - start
        self.position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.size}
        if origin[whence] + offset < 0:
            raise ValueError(f"expected a position of 0 or more, got {origin[whence] + offset}")
        self.position = origin[whence] + offset
        return self.position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        data = self.head[self.position : self.position + len(buffer)]
        rest = min(len(buffer), self.size - self.position) - len(data)
        if rest > 0:
            self.file.seek(self.start + self.position + len(data) - len(self.head))
            data += self.file.read(rest)
        buffer[: len(data)] = data
        self.position += len(data)
        return len(data)

    def close(self) -> None:
        self.file.close()
        super().close()


def open_source(source: Path | bytes) -> BinaryIO:
    """Opens a file, or a file's bytes, for reading."""
    return io.BytesIO(source) if isinstance(source, bytes) else source.open("rb")


def skip_id3(file: BinaryIO) -> None:
    """Seeks past the ID3v2 tags at the position of ``file``."""
    while True:
        start = file.tell()
        head = file.read(ID3_HEAD)
        if len(head) < ID3_HEAD or head[:3] != b"ID3":
            file.seek(start)
            return
        footer = ID3_HEAD if head[5] & 0x10 else 0
        size = sum((byte & 0x7F) << 7 * place for place, byte in enumerate(head[:5:-1]))
        file.seek(start + ID3_HEAD + size + footer)
