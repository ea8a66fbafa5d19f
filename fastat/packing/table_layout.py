"""What the common sets call the columns of their tables, and where they keep the audio.

ESC-50, UrbanSound8K, FSD50K, VGGSound, and DCASE's acoustic scenes and weak labels.
"""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from fastat.packing.audio_folder import is_audio_name, list_folder
from fastat.system.errors import UserError

URBANSOUND_PATH = "slice_file_name"
PATH_COLUMNS = ("path", "filename", "file_name", "fname", URBANSOUND_PATH)
LABEL_COLUMNS = (
    "labels", "label", "category", "categories", "class", "classes", "tags", "tag",
    "positive_labels", "event_labels", "event_label", "scene_label",
)  # fmt: skip
"""The first one that a table has is read."""

AUDIOSET_COLUMNS = ("YTID", "start_seconds", "end_seconds", "positive_labels")
VGGSOUND_COLUMNS = ("youtube_id", "start_seconds", "label", "split")
VGGSOUND_SPLITS = ("train", "test")
VGGSOUND_SECONDS = 10.0
SCENE_COLUMNS = ("filename", "scene_label", "identifier", "source_label")
"""Of DCASE's tables without a header, which have the first two or more of them."""
SCENE_EXTENSIONS = (".wav", ".flac")


class ColumnNames(NamedTuple):
    """How the user names and reads the columns of a table; None: as the common sets do."""

    path: str | None = None
    label: str | None = None
    separator: str | None = None
    """What separates the labels of a cell."""


def column_of(header: Sequence[str], name: str, option: str, source: Path) -> int:
    """The place of the column ``name`` that ``option`` asks for; capitals do not matter.

    Raises:
        UserError: the table has no such column; lists those it has.
    """
    found = _find(header, (name,))
    if found is None:
        listed = ", ".join(filter(None, header))
        raise UserError(f"{option}: no such column in {source}, which has {listed}")
    return found


def path_and_label(header: Sequence[str], names: ColumnNames, source: Path) -> tuple[int, int]:
    """The places of the columns that hold files and labels.

    Raises:
        UserError: there is none of that name or of a common set's, or several.
    """
    if names.path is not None:
        path = column_of(header, names.path, f"--path-column {names.path}", source)
    else:
        path = _common(header, PATH_COLUMNS, "--path-column", source)
    if names.label is not None:
        label = column_of(header, names.label, f"--label-column {names.label}", source)
    else:
        label = _common(header, LABEL_COLUMNS, "--label-column", source)
    for column in (header[path], header[label]):
        if header.count(column) > 1:
            raise UserError(f"{source}: expected one column {column}, got {header.count(column)}")
    return path, label


def _common(header: Sequence[str], names: Sequence[str], option: str, source: Path) -> int:
    found = _find(header, names)
    if found is None:
        raise UserError(
            f"{source}: expected AudioSet's segments or a header with path (or filename) and "
            f"labels (or label, category), got {', '.join(header)!r}; {option} NAME names another "
            "column"
        )
    return found


def _find(header: Sequence[str], names: Sequence[str]) -> int | None:
    lower = [cell.lower() for cell in header]
    for name in names:
        if name in header:
            return header.index(name)
        if name.lower() in lower:
            return lower.index(name.lower())
    return None


def columns_without_header(first_row: Sequence[str]) -> list[str] | None:
    """DCASE's column names when the first row of a TSV is a clip; None when it is a header."""
    num_columns = len(first_row)
    if not (2 <= num_columns <= len(SCENE_COLUMNS) and _is_file(first_row[0])):
        return None
    return None if is_number(first_row[1]) else list(SCENE_COLUMNS[:num_columns])


def _is_file(cell: str) -> bool:
    return cell.lower().endswith(SCENE_EXTENSIONS)


def is_audioset(row: Sequence[str]) -> bool:
    """Whether a row reads: id (not a file, as in DCASE's lists of events), start and end in
    seconds, labels."""
    return len(row) >= 4 and is_number(row[1]) and is_number(row[2]) and not _is_file(row[0])


def is_audioset_header(row: Sequence[str]) -> bool:
    """Whether a row is the header of AudioSet's table, as pandas writes it."""
    return [cell.lower() for cell in row] == [name.lower() for name in AUDIOSET_COLUMNS]


def is_vggsound_row(row: Sequence[str]) -> bool:
    """Whether a row reads: id, start in seconds, label, split."""
    return len(row) == 4 and is_number(row[1])


def is_vggsound(first_row: Sequence[str]) -> bool:
    """Whether a table that begins with this row is VGGSound's."""
    return (
        is_vggsound_row(first_row)
        and not is_number(first_row[2])
        and first_row[3] in VGGSOUND_SPLITS
    )


def urbansound_fold(header: Sequence[str], path_column: int) -> int | None:
    """The place of UrbanSound8K's column fold, whose files are in folders fold1, fold2, ...; None
    for other tables."""
    if header[path_column].lower() != URBANSOUND_PATH:
        return None
    return _find(header, ("fold",))


def is_number(cell: str) -> bool:
    """Whether a cell holds a finite number."""
    try:
        return math.isfinite(float(cell))
    except ValueError:
        return False


def audio_folders(source: Path) -> list[Path]:
    """Where the files of a table may be that names them: its folder, the one above it, ``audio`` in
    either, FSD50K's ``FSD50K.dev_audio`` for ``dev.csv``, and ``audio/train/weak`` for DCASE's
    ``metadata/train/weak.tsv``."""
    folder = Path(os.path.abspath(source)).parent
    above = folder.parent
    folders = [
        folder,
        folder / "audio",
        above,
        above / "audio",
        above / f"FSD50K.{source.stem}_audio",
    ]
    parts = folder.parts
    if "metadata" in parts:
        place = len(parts) - 1 - parts[::-1].index("metadata")
        folders.append(Path(*parts[:place], "audio", *parts[place + 1 :], source.stem))
    return [folder, *(path for path in folders[1:] if path.is_dir())]


class AudioFiles:
    """Finds the files that a table names, in the first of several folders that has them."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self._folders = [os.path.abspath(folder) for folder in folders]
        self._listed: dict[str, dict[str, str]] = {}

    def find(self, *names: str) -> tuple[str, str, bool]:
        """Name, absolute path, and whether it is there, of the file with the first of ``names``
        that is found. A name may lack the file's extension."""
        for name in names:
            for folder in self._folders:
                path = os.path.abspath(os.path.join(folder, name))
                if os.path.isfile(path):
                    return name, path, True
        for name in filter(None, names):
            for folder in self._folders:
                inside, stem = os.path.split(os.path.abspath(os.path.join(folder, name)))
                file = self._files(inside).get(stem)
                if file is not None and os.path.isfile(os.path.join(inside, file)):
                    return os.path.join(os.path.dirname(name), file), f"{inside}/{file}", True
        return names[0], os.path.abspath(os.path.join(self._folders[0], names[0])), False

    def _files(self, folder: str) -> dict[str, str]:
        """The audio files of a folder by their names without extension."""
        if folder not in self._listed:
            files = self._listed[folder] = {}
            for name in sorted(list_folder(folder)) if os.path.isdir(folder) else ():
                stem, extension = os.path.splitext(name)
                if extension and is_audio_name(name):
                    files.setdefault(stem, name)
        return self._listed[folder]
