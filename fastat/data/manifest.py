"""Tables of labelled audio, in the forms the field uses, as one list of files and class numbers.

An AudioSet segments CSV, an AST data file, a CSV with columns path and labels, a folder with one
sub-folder per class, or an HDF5 file (``hdf5_source``). Nothing is decoded here; what is decided is
which files exist and which classes they carry.
"""

import csv
import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from sys import intern
from typing import Any, NamedTuple

from fastat.data.audio_folder import AudioFolder, is_audio_name, walk
from fastat.data.classes import ClassList
from fastat.data.decode import Reason
from fastat.data.hdf5_source import SUFFIXES, read_rows
from fastat.errors import UserError

PATH_COLUMNS = ("path", "filename")
LABEL_COLUMNS = ("labels", "label", "category")


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
    """What ``--group-by`` keeps together; without it the file itself."""


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


class Row(NamedTuple):
    """A line of a table before its labels are looked up."""

    name: str
    path: str
    exists: bool
    labels: str
    line: int
    group: str


class Table(NamedTuple):
    """The lines of a table and how its label cells are to be read."""

    rows: list[Row]
    one_label: bool
    """A cell is one label whatever characters it holds (the names of folders)."""


def read_manifest(
    source: Path,
    *,
    audio: Path | None = None,
    labels: Path | None = None,
    classes_from: Path | None = None,
    group_by: str | None = None,
) -> Manifest:
    """Reads SOURCE as ``fastat pack`` takes it.

    The class list is ``labels`` (a CSV in AudioSet's format), that of the packed set
    ``classes_from``, or the sorted distinct labels of the table, id and name alike.

    Raises:
        UserError: no such source, a table that is none of the forms, or a wrong line in it.
    """
    if labels is not None and classes_from is not None:
        raise UserError("expected --labels or --classes-from, got both")
    if audio is not None and not audio.is_dir():
        raise UserError(f"--audio {audio}: no such folder")
    if source.suffix.lower() in SUFFIXES and source.is_file():
        return _read_hdf5(source, audio, labels, classes_from, group_by)
    table = _read_table(source, audio, group_by)
    if not table.rows:
        raise UserError(f"{source}: no clips in it")
    if labels is not None:
        classes = ClassList.from_csv(labels)
    elif classes_from is not None:
        classes = ClassList.from_packed(classes_from)
    else:
        classes = ClassList.from_labels(
            label for row in table.rows for label in _split(row.labels, table.one_label, None)
        )
    entries: list[Entry] = []
    bad: list[BadFile] = []
    for row in table.rows:
        names = _split(row.labels, table.one_label, classes)
        unknown = [name for name in names if name not in classes]
        if not names or unknown:
            detail = ", ".join(unknown) if names else "no label"
            bad.append(BadFile(row.path, "label unknown", detail, row.labels, row.line))
        elif not row.exists:
            bad.append(BadFile(row.path, "missing", "", row.labels, row.line))
        else:
            numbers = tuple(sorted({classes.number(name) for name in names}))
            entries.append(Entry(row.name, row.path, numbers, row.line, row.group))
    return Manifest(classes, entries, bad)


def _read_table(source: Path, audio: Path | None, group_by: str | None) -> Table:
    if source.is_dir():
        return _read_folder(source, audio, group_by)
    if not source.is_file():
        raise UserError(f"{source}: no such file or folder")
    if source.stat().st_size == 0:
        raise UserError(f"{source}: expected a table of clips, got an empty file")
    try:
        text = source.read_text("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(
            f"{source}: expected a segments CSV, a CSV with columns path and labels, an AST data "
            "file or a folder, got a file that is not text"
        ) from None
    if source.suffix.lower() == ".json":
        return _read_ast(source, text, audio, group_by)
    lines = text.splitlines()
    if _is_audioset(lines):
        return _read_audioset(source, lines, audio, group_by)
    return _read_csv(source, lines, audio, group_by)


def _read_hdf5(
    source: Path,
    audio: Path | None,
    labels: Path | None,
    classes_from: Path | None,
    group_by: str | None,
) -> Manifest:
    if audio is not None:
        raise UserError(f"--audio: {source} holds its audio and needs none")
    if group_by is not None:
        raise UserError(f"--group-by {group_by}: {source} is an HDF5 file, without columns")
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


def _split(cell: str, one_label: bool, classes: ClassList | None) -> list[str]:
    """The labels of a cell: separated by ; or, without one, by commas unless the whole is a
    class."""
    if one_label or (classes is not None and cell.strip() in classes):
        parts = [cell]
    else:
        parts = cell.split(";" if ";" in cell else ",")
    return [intern(part.strip()) for part in parts if part.strip()]


def _csv_rows(source: Path, lines: Sequence[str], delimiter: str = ",") -> Iterator[list[str]]:
    """Cells of each line, one list a line, blank lines empty; a quoted cell stays on its line."""
    for number, line in enumerate(lines, 1):
        try:
            yield next(
                csv.reader([line], delimiter=delimiter, skipinitialspace=True, strict=True), []
            )
        except csv.Error as error:
            raise UserError(f"{source}, line {number}: not CSV: {error}") from None


def _column(source: Path, header: Sequence[str], group_by: str) -> int:
    if group_by not in header:
        raise UserError(
            f"--group-by {group_by}: no such column in {source}, which has {', '.join(header)}"
        )
    return list(header).index(group_by)


def _is_audioset(lines: Sequence[str]) -> bool:
    """Whether the first line of data reads: id, number, number, labels."""
    data = next((line for line in lines if line.strip() and not line.startswith("#")), "")
    try:
        cells = next(csv.reader([data], skipinitialspace=True), [])
    except csv.Error:  # a cell of 128 KiB
        return False
    if len(cells) < 4:
        return bool(lines) and lines[0].startswith("#") and "YTID" in "".join(lines[:3])
    return _is_number(cells[1]) and _is_number(cells[2])


def _is_number(cell: str) -> bool:
    try:
        return math.isfinite(float(cell))
    except ValueError:
        return False


AUDIOSET_COLUMNS = ("YTID", "start_seconds", "end_seconds", "positive_labels")


def _read_audioset(
    source: Path, lines: Sequence[str], audio: Path | None, group_by: str | None
) -> Table:
    if audio is None:
        audio = source.parent / "audio"
        if not audio.is_dir():
            raise UserError(f"{source}: a segments CSV needs --audio DIR, the folder of its clips")
    column = None if group_by is None else _column(source, AUDIOSET_COLUMNS, group_by)
    folder = AudioFolder(audio)
    rows: list[Row] = []
    for number, cells in enumerate(_csv_rows(source, lines), 1):
        if not cells or lines[number - 1].startswith("#"):
            continue
        if len(cells) < 4 or not (_is_number(cells[1]) and _is_number(cells[2])):
            raise UserError(
                f"{source}, line {number}: expected {', '.join(AUDIOSET_COLUMNS)}, "
                f"got {lines[number - 1]!r}"
            )
        ytid, start, end = cells[0], float(cells[1]), float(cells[2])
        # Unquoted labels spread over cells.
        cells[3:] = [",".join(cells[3:])]
        name = folder.clip(ytid, start, end)
        path = os.path.join(folder.root, name or ytid)
        group = path if column is None else cells[column]
        rows.append(Row(name or ytid, path, name is not None, intern(cells[3]), number, group))
    return Table(rows, one_label=False)


def _read_csv(
    source: Path, lines: Sequence[str], audio: Path | None, group_by: str | None
) -> Table:
    delimiter = "\t" if lines and "\t" in lines[0] else ","
    table = _csv_rows(source, lines, delimiter)
    header = [cell.strip() for cell in next(table, [])]
    path_column = next((header.index(c) for c in PATH_COLUMNS if c in header), None)
    label_column = next((header.index(c) for c in LABEL_COLUMNS if c in header), None)
    if path_column is None or label_column is None:
        raise UserError(
            f"{source}: expected AudioSet's segments or a header with path (or filename) and "
            f"labels (or label, category), got {', '.join(header)!r}"
        )
    column = None if group_by is None else _column(source, header, group_by)
    roots = [audio] if audio is not None else [source.parent, source.parent / "audio"]
    rows: list[Row] = []
    for number, cells in enumerate(table, 2):
        if not any(cell.strip() for cell in cells):
            continue
        if len(cells) != len(header):
            raise UserError(
                f"{source}, line {number}: expected {len(header)} cells, got {len(cells)} "
                "(quote several labels, or separate them by ;)"
            )
        rows.append(
            _located(
                cells[path_column],
                roots,
                cells[label_column],
                number,
                None if column is None else cells[column],
            )
        )
    return Table(rows, one_label=False)


def _read_ast(source: Path, text: str, audio: Path | None, group_by: str | None) -> Table:
    expected = 'expected {"data": [{"wav": ..., "labels": "/m/..,/m/.."}]}'
    try:
        document: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{source}: not JSON: {error}") from None
    data = document.get("data") if isinstance(document, dict) else None
    if not isinstance(data, list):
        raise UserError(f'{source}: {expected}, got no list "data"')
    roots = [audio] if audio is not None else [source.parent, source.parent / "audio"]
    rows: list[Row] = []
    for number, item in enumerate(data, 1):
        fields = item if isinstance(item, dict) else {}
        wav, labels = fields.get("wav"), fields.get("labels")
        if not isinstance(wav, str) or not isinstance(labels, str):
            raise UserError(f"{source}, clip {number}: {expected}, got {json.dumps(item)[:80]}")
        group = None
        if group_by is not None:
            _column(source, list(fields), group_by)
            group = str(fields[group_by])
        rows.append(_located(wav, roots, labels, number, group))
    return Table(rows, one_label=False)


def _read_folder(source: Path, audio: Path | None, group_by: str | None) -> Table:
    if audio is not None:
        raise UserError(f"--audio: {source} is a folder of classes and needs none")
    if group_by is not None:
        raise UserError(f"--group-by {group_by}: {source} is a folder of classes, without columns")
    root = os.path.abspath(source)
    rows: list[Row] = []
    for name in sorted(_walk(root)):
        label, _, inside = name.partition(os.sep)
        if inside:
            path = os.path.join(root, name)
            rows.append(Row(name, path, os.path.isfile(path), intern(label), 0, path))
    if not rows:
        raise UserError(f"{source}: expected one sub-folder of audio files per class, found none")
    return Table(rows, one_label=True)


def _walk(root: str) -> Iterable[str]:
    """Audio files under ``root``, by their path inside it, links to folders followed."""
    for folder, folders, files in walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if is_audio_name(name):
                yield os.path.relpath(os.path.join(folder, name), root)


def _located(name: str, roots: Sequence[Path], labels: str, line: int, group: str | None) -> Row:
    """A row whose file is looked for under ``roots`` in turn."""
    name = name.strip()
    paths = [os.path.abspath(os.path.join(root, name)) for root in roots]
    path = next((path for path in paths if os.path.isfile(path)), None)
    found = path or paths[0]
    return Row(name, found, path is not None, intern(labels), line, group or found)
