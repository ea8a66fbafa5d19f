"""The forms of tables that the field uses, each read into rows: a file and the cell of its labels.

An AudioSet segments CSV, VGGSound's CSV, a CSV or TSV of files and labels, an AST data file, and a
folder with one sub-folder per class.
"""

import json
import logging
import os
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from sys import intern
from typing import Any, NamedTuple

from fastat.packing.audio_folder import AudioFolder, is_audio_name, walk
from fastat.packing.classes import NO_TEXT
from fastat.packing.label_cells import LabelCells
from fastat.packing.table_layout import (
    AUDIOSET_COLUMNS,
    VGGSOUND_COLUMNS,
    VGGSOUND_SECONDS,
    AudioFiles,
    ColumnNames,
    audio_folders,
    column_of,
    columns_without_header,
    is_audioset,
    is_audioset_header,
    is_vggsound,
    is_vggsound_row,
    path_and_label,
    urbansound_fold,
)
from fastat.packing.text_table import csv_rows, delimiter_of, read_text
from fastat.system.errors import UserError

log = logging.getLogger(__name__)


class Row(NamedTuple):
    """A line of a table before its labels are looked up."""

    clip: str
    """Rows that are equal here are one clip."""
    name: str
    path: str
    exists: bool
    labels: str
    line: int
    group: str
    more: tuple["Row", ...] = ()
    """Further rows of the clip, with other labels."""


class Table(NamedTuple):
    """The lines of a table, and how to read its label cells."""

    rows: list[Row]
    cells: LabelCells
    unit: str = "line"
    """What ``Row.line`` counts, for messages."""


class Grouping(NamedTuple):
    """The column that --group-by or --holdout names."""

    option: str
    column: str


def read_table(
    source: Path, audio: Path | None, columns: ColumnNames, grouping: Grouping | None
) -> Table:
    if source.is_dir():
        require_no_columns(f"{source} is a folder of classes", columns, grouping)
        return _read_folder(source, audio)
    if not source.is_file():
        what = "not a file or folder" if source.exists() else "no such file or folder"
        raise UserError(f"{source}: {what}")
    if source.stat().st_size == 0:
        raise UserError(f"{source}: expected a table of clips, got an empty file")
    text = read_text(source, str(source))
    if source.suffix.lower() == ".json":
        return _read_ast(source, text, audio, columns, grouping)
    first = next((cells for _, cells in csv_rows(text, str(source)) if cells[0][:1] != "#"), [])
    if is_vggsound(first):
        return _read_segments(source, text, VGGSOUND_COLUMNS, audio, columns, grouping)
    if is_audioset(first) or is_audioset_header(first) or _is_audioset_comment(text):
        return _read_segments(source, text, AUDIOSET_COLUMNS, audio, columns, grouping)
    return _read_csv(source, text, audio, columns, grouping)


def require_no_columns(what: str, columns: ColumnNames, grouping: Grouping | None) -> None:
    """Raises UserError if an option names a column of a source without columns."""
    options = [f"--path-column {columns.path}"] if columns.path is not None else []
    options += [f"--label-column {columns.label}"] if columns.label is not None else []
    options += ["--label-separator"] if columns.separator is not None else []
    options += [grouping.option] if grouping is not None else []
    if options:
        raise UserError(f"{options[0]}: {what}, without columns")


def _require_own_columns(source: Path, own: Sequence[str], columns: ColumnNames) -> None:
    """Raises UserError if an option names columns of a form with fixed columns."""
    if columns.path is not None or columns.label is not None:
        option = "--label-column" if columns.path is None else "--path-column"
        raise UserError(f"{option}: {source} needs none, its columns are {', '.join(own)}")


def _is_audioset_comment(text: str) -> bool:
    return text.startswith("#") and "YTID" in "".join(text.split("\n", 3)[:3])


def _read_segments(
    source: Path,
    text: str,
    own_columns: Sequence[str],
    audio: Path | None,
    columns: ColumnNames,
    grouping: Grouping | None,
) -> Table:
    """A table of AudioSet or VGGSound, whose files are found by a video's id and its start."""
    _require_own_columns(source, own_columns, columns)
    if audio is None:
        audio = source.parent / "audio"
        if not audio.is_dir():
            raise UserError(f"{source}: a segments CSV needs --audio DIR, the folder of its clips")
    column = None
    if grouping is not None:
        column = column_of(own_columns, grouping.column, grouping.option, source)
    of_audioset = own_columns is AUDIOSET_COLUMNS
    label_column = "positive_labels" if of_audioset else "label"
    is_row = is_audioset if of_audioset else is_vggsound_row
    folder = AudioFolder(audio)
    rows: list[Row] = []
    for number, cells in csv_rows(text, str(source)):
        if cells[0].startswith("#") or (of_audioset and is_audioset_header(cells)):
            continue
        if not is_row(cells):
            raise UserError(
                f"{source}, line {number}: expected {', '.join(own_columns)}, "
                f"got {', '.join(cells)!r}"
            )
        ytid, start = cells[0], float(cells[1])
        if of_audioset:
            end = float(cells[2])
            cells[3:] = [",".join(cells[3:])]  # unquoted labels spread over cells
        else:
            end = start + VGGSOUND_SECONDS
        label = cells[own_columns.index(label_column)]
        name = folder.clip(ytid, start, end)
        path = os.path.join(folder.root, name or ytid)
        group = path if column is None else cells[column]
        # A name without a start is found for every segment of its video: they are one clip.
        clip = f"{ytid} {start} {end}" if name is None else path
        rows.append(Row(clip, name or ytid, path, name is not None, intern(label), number, group))
    return Table(rows, LabelCells.of_column(label_column, columns.separator))


def _read_csv(
    source: Path,
    text: str,
    audio: Path | None,
    columns: ColumnNames,
    grouping: Grouping | None,
) -> Table:
    table = csv_rows(text, str(source))
    line, header = next(table, (1, []))
    own = columns_without_header(header) if delimiter_of(text) == "\t" else None
    if own is not None:
        table, header = chain([(line, header)], table), own
    while header and not header[-1]:  # every line ends in a delimiter
        header.pop()
    path_column, label_column = path_and_label(header, columns, source)
    fold_column = urbansound_fold(header, path_column)
    group_column = None
    if grouping is not None:
        group_column = column_of(header, grouping.column, grouping.option, source)
    files = AudioFiles([audio] if audio is not None else audio_folders(source))
    rows: list[Row] = []
    for line, cells in table:
        while len(cells) > len(header) and not cells[-1]:
            cells.pop()
        if len(cells) != len(header):
            raise UserError(
                f"{source}, line {line}: expected {len(header)} cells, got {len(cells)} "
                "(a cell that holds the separator needs quotes)"
            )
        names = [cells[path_column]]
        if fold_column is not None:
            names.insert(0, f"fold{cells[fold_column]}/{names[0]}")
        group = None if group_column is None else cells[group_column]
        rows.append(_located(files, names, cells[label_column], line, group))
    return Table(rows, LabelCells.of_column(header[label_column], columns.separator))


def _read_ast(
    source: Path,
    text: str,
    audio: Path | None,
    columns: ColumnNames,
    grouping: Grouping | None,
) -> Table:
    expected = 'expected {"data": [{"wav": ..., "labels": "/m/..,/m/.."}]}'
    _require_own_columns(source, ("wav", "labels"), columns)
    try:
        document: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{source}: not JSON: {error}") from None
    data = document.get("data") if isinstance(document, dict) else None
    if not isinstance(data, list):
        raise UserError(f'{source}: {expected}, got no list "data"')
    files = AudioFiles([audio] if audio is not None else audio_folders(source))
    rows: list[Row] = []
    for number, item in enumerate(data, 1):
        fields = item if isinstance(item, dict) else {}
        wav, labels = fields.get("wav"), fields.get("labels")
        if not isinstance(wav, str) or not isinstance(labels, str):
            raise UserError(f"{source}, clip {number}: {expected}, got {json.dumps(item)[:80]}")
        if NO_TEXT.search(wav + labels):
            raise UserError(
                f"{source}, clip {number}: a NUL character or half a surrogate pair: correct "
                f"{json.dumps(item)[:80]}"
            )
        group = None
        if grouping is not None:
            column = column_of(list(fields), grouping.column, grouping.option, source)
            group = str(list(fields.values())[column]).strip()
        rows.append(_located(files, [wav.strip()], labels.strip(), number, group))
    return Table(rows, LabelCells.of_column("labels", columns.separator), "clip")


def _read_folder(source: Path, audio: Path | None) -> Table:
    if audio is not None:
        raise UserError(f"--audio: {source} is a folder of classes and needs none")
    root = os.path.abspath(source)
    rows: list[Row] = []
    left_out = 0
    for name in sorted(_walk(root)):
        label, _, inside = name.partition(os.sep)
        path = os.path.join(root, name)
        if inside:
            rows.append(Row(path, name, path, os.path.isfile(path), intern(label), 0, path))
        elif os.path.islink(path) and not os.path.exists(path):
            raise UserError(f"{path}: expected a folder of a class, got a link that leads nowhere")
        else:
            left_out += 1
    if left_out and rows:
        log.warning(f"{source}: audio files in no folder of a class are left out: {left_out}")
    if not rows:
        raise UserError(f"{source}: expected one sub-folder of audio files per class, found none")
    return Table(rows, LabelCells(verbatim=True))


def _walk(root: str) -> Iterable[str]:
    """Audio files under ``root``, by their path inside it, links to folders followed."""
    for folder, folders, files in walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if is_audio_name(name):
                yield os.path.relpath(os.path.join(folder, name), root)


def _located(
    files: AudioFiles, names: Sequence[str], labels: str, line: int, group: str | None
) -> Row:
    """The row of a file that has the first of ``names`` that is found."""
    name, path, exists = files.find(*names)
    return Row(path, name, path, exists, intern(labels), line, path if group is None else group)
