"""Tables in text files: UTF-8, cells between commas, semicolons or tabs."""

import csv
import io
import re
from collections.abc import Iterator
from pathlib import Path

from fastat.system.errors import UserError

LINE_END = re.compile(rb"\r\n|\r|\n")
CELL_LINE_END = re.compile(r"\r\n|\r|\n")
CONTROL = re.compile(rb"[\0-\x08\x0e-\x1a\x1c-\x1f]")
"""Bytes that do not occur in text with one byte a character."""
HEAD_BYTES = 4096
"""Number of bytes by which the kind of a file is recognised."""


def read_text(path: Path, what: str) -> str:
    """The text of a UTF-8 file, with or without a byte order mark.

    Args:
        what: the file's name in error messages.

    Raises:
        UserError: no such file, or not UTF-8; names the encoding it seems to have.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{what}: {error.strerror}") from None
    not_text = UserError(f"{what}: expected a table in UTF-8, got a file that is not text")
    if _is_utf16(data[:HEAD_BYTES]):
        raise UserError(
            f"{what}: expected UTF-8, got UTF-16: save it as UTF-8, or run iconv -f UTF-16 -t UTF-8"
        )
    data = data.removeprefix(b"\xef\xbb\xbf")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        if CONTROL.search(data[:HEAD_BYTES]):
            raise not_text from None
        line = len(LINE_END.findall(data[: error.start])) + 1
        raise UserError(
            f"{what}: expected UTF-8; looks like Latin-1 (byte 0x{data[error.start]:02X} at line "
            f"{line}): save it as UTF-8, or run iconv -f LATIN1 -t UTF-8"
        ) from None
    if "\0" in text:
        raise not_text
    return text


def _is_utf16(head: bytes) -> bool:
    """Whether the file begins with UTF-16's byte order mark, or has a zero in most characters."""
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return True
    return any(2 * half.count(0) > len(half) > 1 for half in (head[::2], head[1::2]))


def delimiter_of(text: str) -> str:
    """The delimiter of cells, by the first line that is not a comment."""
    lines = io.StringIO(text, newline="")
    line = next((line for line in lines if line.strip() and not line.startswith("#")), "")
    if "\t" in line:
        return "\t"
    return ";" if ";" in line and "," not in line else ","


def csv_rows(text: str, what: str) -> Iterator[tuple[int, list[str]]]:
    """The rows that are not empty, each with the number of its first line; cells stripped.

    A quoted cell may hold line ends, but in a TSV not tabs as well: there a quotation mark that
    belongs to a text would take the rows up to the next one into its cell.

    Args:
        what: the table's name in error messages.

    Raises:
        UserError: not CSV; names the line.
    """
    delimiter = delimiter_of(text)
    reader = csv.reader(
        io.StringIO(text, newline=""),
        delimiter=delimiter,
        skipinitialspace=True,
        strict=True,
    )
    line = 1
    while True:
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise UserError(
                f"{what}, line {line}: not CSV: {error} (is a quoted cell left open?)"
            ) from None
        if row is None:
            return
        if delimiter == "\t" and reader.line_num > line:
            _check_lines(row, what, line)
        cells = [cell.strip() for cell in row]
        if any(cells):
            yield line, cells
        line = reader.line_num + 1


def _check_lines(row: list[str], what: str, line: int) -> None:
    """Raises UserError for a cell of a TSV that holds several rows."""
    for cell in row:
        num_ends = len(CELL_LINE_END.findall(cell))
        if num_ends and "\t" in cell:
            raise UserError(
                f"{what}, line {line}: a quoted cell begins here that holds tabs and {num_ends} "
                "line ends: remove the quotation mark if it belongs to the text"
            )
        line += num_ends
