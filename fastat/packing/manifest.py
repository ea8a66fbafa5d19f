"""Reads tables of labelled audio into one list of files and class numbers for ``fastat pack``.

Nothing is decoded here: only which files exist and which classes they have is found out. Rows of
one file are one clip, with the labels of all these rows.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from sys import intern
from typing import NamedTuple

from fastat.audio.bad_audio import Reason
from fastat.audio.hdf5_source import SUFFIXES, read_rows
from fastat.packing.classes import ClassList
from fastat.packing.split import Holdout
from fastat.packing.table_forms import Grouping, Row, Table, read_table, require_no_columns
from fastat.packing.table_layout import ColumnNames
from fastat.system.errors import UserError

MAX_VALUES = 10
"""Limit of a column's values that a message lists."""


class BadFile(NamedTuple):
    """A line of bad.csv."""

    path: str
    reason: Reason
    detail: str
    labels: str
    line: int
    size: int = 0
    mtime_ns: int = 0
    """Size and time of change when the file was tried; zeros if it was missing or not tried."""


class Entry(NamedTuple):
    """A file of a table."""

    name: str
    """Its path inside the audio folder."""
    path: str
    """Absolute; a row of an HDF5 file is ``/path/file.h5#row``."""
    labels: tuple[int, ...]
    """Numbers of its classes in the class list; none if one of them is unknown."""
    line: int
    """Line of the table; 0 for a folder."""
    group: str
    """What ``--group-by`` keeps together, or the value that ``--holdout COLUMN=VALUE`` looks at;
    otherwise the file itself."""
    bad: BadFile | None = None
    """Why it cannot be packed, if that is known already: it is missing or has an unknown label."""


class Manifest(NamedTuple):
    """Content of a table, in its order."""

    classes: ClassList
    entries: list[Entry]
    """All files of the table."""
    held: "Manifest | None" = None
    """With ``--holdout COLUMN=VALUE`` the rows with that value; the fields above are the others."""

    @property
    def good(self) -> list[Entry]:
        """The files that exist and whose labels are known."""
        return [entry for entry in self.entries if entry.bad is None]

    @property
    def bad(self) -> list[BadFile]:
        """The others."""
        return [entry.bad for entry in self.entries if entry.bad is not None]


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
    ``holdout`` the group of an entry is its value in that column.

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
    rows = _one_a_clip(source, table, holdout)
    classes = None
    if labels is not None:
        classes = ClassList.from_csv(labels)
    elif classes_from is not None:
        classes = ClassList.from_packed(classes_from)
    cells = table.cells.for_column(
        part.labels
        for row in rows
        for part in (row, *row.more)
        if classes is None or part.labels not in classes
    )
    table = Table(rows, cells, table.unit)
    if classes is None:
        every = (name for row in rows for name in _names(source, row, table, None))
        classes = ClassList.from_labels(every)
    if holdout is None:
        return _labelled(source, table, classes)
    train, held = (
        [row for row in rows if (row.group == holdout.value) == is_held]
        for is_held in (False, True)
    )
    manifest = _labelled(source, table._replace(rows=train), classes)
    return manifest._replace(held=_labelled(source, table._replace(rows=held), classes))


def _labelled(source: Path, table: Table, classes: ClassList) -> Manifest:
    """Looks up the classes of the rows of ``table``; rows that cannot be packed are bad."""
    lines: list[Entry] = []
    for row in table.rows:
        names = _names(source, row, table, classes)
        unknown = list(dict.fromkeys(name for name in names if name not in classes))
        listed = ";".join(part.labels for part in (row, *row.more))
        numbers: tuple[int, ...] = ()
        bad = None
        if not names or unknown:
            detail = ", ".join(unknown) if names else "no label"
            bad = BadFile(row.path, "label unknown", detail, listed, row.line)
        else:
            numbers = tuple(sorted({classes.number(name) for name in names}))
            if not row.exists:
                detail = "not a file" if os.path.exists(row.path) else ""
                bad = BadFile(row.path, "missing", detail, listed, row.line)
        lines.append(Entry(row.name, row.path, numbers, row.line, row.group, bad))
    return Manifest(classes, lines)


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


def _one_a_clip(source: Path, table: Table, holdout: Holdout | None) -> list[Row]:
    """Merges rows of one clip, in the order of their first rows.

    Raises:
        UserError: the rows of a clip are to be on different sides of --holdout.
    """
    places: dict[str, int] = {}
    merged: list[Row] = []
    for row in table.rows:
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
                f"{source}: {row.name} belongs to {first.group!r} in {table.unit} {first.line} and "
                f"to {row.group!r} in {table.unit} {row.line}; a file cannot be on both "
                "sides of --holdout"
            )
        if all(row.labels != part.labels for part in (first, *first.more)):
            merged[place] = first._replace(more=(*first.more, row))
    return merged


def _names(source: Path, row: Row, table: Table, classes: ClassList | None) -> list[str]:
    """Labels of a clip. A cell that as a whole is a class of the list is one label."""
    names: list[str] = []
    for part in (row, *row.more):
        if classes is not None and part.labels in classes and not table.cells.verbatim:
            names.append(part.labels)
            continue
        try:
            names.extend(intern(name) for name in table.cells.split(part.labels))
        except ValueError as error:
            raise UserError(f"{source}, {table.unit} {part.line}: {error}") from None
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
    lines: list[Entry] = []
    for row, (name, numbers) in enumerate(read_rows(source, len(classes))):
        place = f"{path}#{row}"
        bad = None
        if not numbers:
            bad = BadFile(place, "label unknown", "no label", "", row + 1)
        lines.append(Entry(name, place, numbers, row + 1, place, bad))
    if not lines:
        raise UserError(f"{source}: no clips in it")
    return Manifest(classes, lines)
