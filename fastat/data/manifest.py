"""Tables of labelled audio as one list of files and class numbers: what ``fastat pack`` packs.

Nothing is decoded here; what is decided is which files exist and which classes they carry. Rows of
one file are one clip, with the labels of all of them.
"""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from sys import intern
from typing import NamedTuple

from fastat.data.classes import ClassList
from fastat.data.decode import Reason
from fastat.data.hdf5_source import SUFFIXES, read_rows
from fastat.data.label_cells import LabelCells
from fastat.data.split import Holdout
from fastat.data.table_forms import Grouping, Row, read_table, require_no_columns
from fastat.data.table_layout import ColumnNames
from fastat.errors import UserError

MAX_VALUES = 10
"""Number of a column's values that a message lists."""


class Entry(NamedTuple):
    """A file that exists and whose labels are known."""

    name: str
    """Its path inside the audio folder."""
    path: str
    """Absolute; a row of an HDF5 file is ``/path/file.h5#row``."""
    labels: tuple[int, ...]
    """Classes, by their place in the class list."""
    line: int
    """Where the table names it; 0 for a folder."""
    group: str
    """What ``--group-by`` keeps together, or the value that ``--holdout COLUMN=VALUE`` looks at;
    otherwise the file itself."""


class BadFile(NamedTuple):
    """A line of bad.csv."""

    path: str
    reason: Reason
    detail: str
    labels: str
    line: int
    size: int = 0
    mtime_ns: int = 0
    """Of the file when it was tried; zeros when it was not there, or not looked at."""


class Manifest(NamedTuple):
    """What a table says, in its order."""

    classes: ClassList
    entries: list[Entry]
    bad: list[BadFile]
    """Files that are missing or have an unknown label."""
    bad_groups: Sequence[str] = ()
    """The group of each of them."""

    def split(self, group: str) -> tuple["Manifest", "Manifest"]:
        """What is not of the group ``group``, and what is."""
        parts = []
        for is_held in (False, True):
            entries = [entry for entry in self.entries if (entry.group == group) == is_held]
            bad = [
                file
                for file, of in zip(self.bad, self.bad_groups, strict=True)
                if (of == group) == is_held
            ]
            parts.append(Manifest(self.classes, entries, bad))
        return parts[0], parts[1]


def read_manifest(
    source: Path,
    *,
    audio: Path | None = None,
    labels: Path | None = None,
    classes_from: Path | None = None,
    columns: ColumnNames | None = None,
    group_by: str | None = None,
    holdout: Holdout | None = None,
) -> Manifest:
    """Reads SOURCE as ``fastat pack`` takes it.

    The class list is ``labels`` (a CSV in AudioSet's format), that of the packed set
    ``classes_from``, or the sorted distinct labels of the table, id and name alike. With
    ``holdout`` the group of an entry, and of a bad file, is its value in that column.

    Raises:
        UserError: no such source, a table that is none of the forms, or a wrong line in it.
    """
    if labels is not None and classes_from is not None:
        raise UserError("expected --labels or --classes-from, got both")
    if audio is not None and not audio.is_dir():
        raise UserError(f"--audio {audio}: no such folder")
    columns = columns or ColumnNames()
    grouping = None if group_by is None else Grouping(f"--group-by {group_by}", group_by)
    if holdout is not None:
        grouping = Grouping(f"--holdout {holdout}", holdout.column)
    if source.suffix.lower() in SUFFIXES and source.is_file():
        require_no_columns(f"{source} is an HDF5 file", columns, grouping)
        return _read_hdf5(source, audio, labels, classes_from)
    table = read_table(source, audio, columns, grouping)
    if not table.rows:
        raise UserError(f"{source}: no clips in it")
    if holdout is not None:
        _check_holdout(source, table.rows, holdout)
    rows = _one_a_clip(source, table.rows, holdout)
    classes = None
    if labels is not None:
        classes = ClassList.from_csv(labels)
    elif classes_from is not None:
        classes = ClassList.from_packed(classes_from)
    cells = table.cells.for_column(
        cell
        for row in rows
        for cell in (row.labels, *row.more)
        if classes is None or cell not in classes
    )
    if classes is None:
        every = (name for row in rows for name in _names(source, row, cells, None))
        classes = ClassList.from_labels(every)
    entries: list[Entry] = []
    bad: list[BadFile] = []
    bad_groups: list[str] = []
    for row in rows:
        names = _names(source, row, cells, classes)
        unknown = [name for name in names if name not in classes]
        if names and not unknown and row.exists:
            numbers = tuple(sorted({classes.number(name) for name in names}))
            entries.append(Entry(row.name, row.path, numbers, row.line, row.group))
            continue
        listed = ";".join((row.labels, *row.more))
        if not names or unknown:
            detail = ", ".join(unknown) if names else "no label"
            bad.append(BadFile(row.path, "label unknown", detail, listed, row.line))
        else:
            bad.append(BadFile(row.path, "missing", "", listed, row.line))
        bad_groups.append(row.group)
    return Manifest(classes, entries, bad, bad_groups)


def _check_holdout(source: Path, rows: Sequence[Row], holdout: Holdout) -> None:
    values = dict.fromkeys(row.group for row in rows)
    if holdout.value not in values:
        known = ", ".join(list(values)[:MAX_VALUES]) + (", ..." if len(values) > MAX_VALUES else "")
        raise UserError(
            f"--holdout {holdout}: no row of {source} has this value; {holdout.column} has {known}"
        )
    if len(values) == 1:
        raise UserError(
            f"--holdout {holdout}: every row of {source} has this value; none is left to train on"
        )


def _one_a_clip(source: Path, rows: Iterable[Row], holdout: Holdout | None) -> list[Row]:
    """One row for each clip, in the order of their first rows.

    Raises:
        UserError: the rows of a clip are to be on different sides of --holdout.
    """
    places: dict[str, int] = {}
    merged: list[Row] = []
    for row in rows:
        place = places.setdefault(row.clip, len(merged))
        if place == len(merged):
            merged.append(row)
            continue
        first = merged[place]
        if holdout is None:
            is_split = first.group != row.group
        else:
            is_split = (first.group == holdout.value) != (row.group == holdout.value)
        if is_split:
            raise UserError(
                f"{source}: {row.name} belongs to {first.group!r} in line {first.line} and to "
                f"{row.group!r} in line {row.line}; a file cannot be on both sides of --holdout"
            )
        if row.labels not in (first.labels, *first.more):
            merged[place] = first._replace(more=(*first.more, row.labels))
    return merged


def _names(source: Path, row: Row, cells: LabelCells, classes: ClassList | None) -> list[str]:
    """The labels of a clip. A cell that is a class of the list as a whole is one label."""
    names: list[str] = []
    for cell in (row.labels, *row.more):
        if classes is not None and cell in classes and not cells.verbatim:
            names.append(cell)
            continue
        try:
            names.extend(intern(name) for name in cells.split(cell))
        except ValueError as error:
            raise UserError(f"{source}, line {row.line}: {error}") from None
    return names


def _read_hdf5(
    source: Path, audio: Path | None, labels: Path | None, classes_from: Path | None
) -> Manifest:
    if audio is not None:
        raise UserError(f"--audio: {source} holds its audio and needs none")
    if labels is not None:
        classes = ClassList.from_csv(labels)
    elif classes_from is not None:
        classes = ClassList.from_packed(classes_from)
    else:
        raise UserError(
            f"{source}: an HDF5 file numbers its classes; --labels CSV or --classes-from SET names "
            "them"
        )
    path = os.path.abspath(source)
    entries: list[Entry] = []
    bad: list[BadFile] = []
    for row, (name, numbers) in enumerate(read_rows(source, len(classes))):
        place = f"{path}#{row}"
        if numbers:
            entries.append(Entry(name, place, numbers, row + 1, place))
        else:
            bad.append(BadFile(place, "label unknown", "no label", "", row + 1))
    if not entries and not bad:
        raise UserError(f"{source}: no clips in it")
    return Manifest(classes, entries, bad)
