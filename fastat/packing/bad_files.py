"""bad.csv: the files of a set's table that it could not hold, and why; notes.csv: what is worth
knowing of files that it holds.

A bad file is listed with its size and time of change when it was tried: one that is repaired is
seen to have changed, and ``fastat pack --append`` tries it again.
"""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from fastat.audio.bad_audio import Remark
from fastat.audio.hdf5_source import file_of
from fastat.packing.manifest import BadFile
from fastat.system.files import write_csv

BAD_FILE = "bad.csv"
NOTES_FILE = "notes.csv"


class NotedFile(NamedTuple):
    """A line of notes.csv."""

    path: str
    note: Remark
    detail: str
    line: int


def write_bad(path: Path, bad: Iterable[BadFile]) -> None:
    """Writes the list, in the order of the table."""
    in_order: list[BadFile] = sorted(bad, key=lambda b: (b.line, b.path))
    write_csv(path, BadFile._fields, in_order)


def write_notes(path: Path, noted: Iterable[NotedFile]) -> None:
    """Writes the list, each file once; without files there is none."""
    files = list(dict.fromkeys(noted))
    if files:
        write_csv(path, NotedFile._fields, files)
    else:
        path.unlink(missing_ok=True)


def stamp(path: str) -> tuple[int, int]:
    """Size and time of change of an entry's file; zeros when there is none."""
    path = file_of(path)
    if not os.path.isfile(path):
        return 0, 0
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns


def has_changed(bad: BadFile) -> bool:
    """True if the file was changed, added or removed since it was tried."""
    return bad.reason != "label unknown" and stamp(bad.path) != (bad.size, bad.mtime_ns)
