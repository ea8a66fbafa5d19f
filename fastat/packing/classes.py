"""Lists of classes: from AudioSet's CSV, from a packed set, or from the labels themselves."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from fastat.data.shards import ClassInfo, read_index
from fastat.packing.text_table import csv_rows, read_text
from fastat.system.errors import UserError

INDEX_COLUMNS = ("index", "class_index", "idx")
ID_COLUMNS = ("mid", "id", "label", "class")
NAME_COLUMNS = ("display_name", "name", "class_name", "description")
NO_TEXT = re.compile("[\0\ud800-\udc7f\udd00-\udfff]")
"""The surrogates between these stand for bytes of a file name that are not UTF-8."""


class ClassList:
    """Classes in order, looked up by id or, where that is not ambiguous, by name."""

    def __init__(self, classes: Sequence[ClassInfo], source: str) -> None:
        """``source`` says in messages where the list comes from."""
        self.classes = tuple(classes)
        self.source = source
        for c in self.classes:
            check_class_name(c.id, source)
            check_class_name(c.name, source)
        self._numbers: dict[str, int] = {}
        uses = Counter(c.name for c in self.classes)
        for number, c in enumerate(self.classes):
            if uses[c.name] == 1:
                self._numbers[c.name] = number
        for number, c in enumerate(self.classes):  # an id wins over another class's name
            self._numbers[c.id] = number

    def __contains__(self, label: str) -> bool:
        return label in self._numbers

    def __len__(self) -> int:
        return len(self.classes)

    def number(self, label: str) -> int:
        """The class's place in the list; KeyError for an unknown label."""
        return self._numbers[label]

    @classmethod
    def from_labels(cls, labels: Iterable[str]) -> "ClassList":
        """The sorted distinct labels, each its own name."""
        return cls([ClassInfo(label, label) for label in sorted(set(labels))], "the labels")

    @classmethod
    def from_packed(cls, directory: Path) -> "ClassList":
        """The classes of a packed set; UserError when it is none."""
        index = read_index(directory)
        return cls([ClassInfo(c["id"], c["name"]) for c in index["classes"]], str(directory))

    @classmethod
    def from_csv(cls, path: Path) -> "ClassList":
        """AudioSet's class_labels_indices.csv: index, mid, display_name.

        The columns may also be called id or label and name, stand in any order, and index and name
        may be missing; without a header the columns are AudioSet's. Rows may come in any order of
        their index.

        Raises:
            UserError: no such file or not such a table; names the line.
        """
        what = f"--labels {path}"
        rows = list(csv_rows(read_text(path, what), what))
        expected = "expected columns index, mid, display_name"
        if not rows:
            raise UserError(f"--labels {path}: {expected}, got an empty file")
        header = [cell.lower() for cell in rows[0][1]]
        if header[0].isdigit() and len(header) >= 2:
            header = ["index", "mid", "display_name"][: len(header)]
        else:
            rows = rows[1:]
        index, ids, names = (
            next((header.index(c) for c in columns if c in header), None)
            for columns in (INDEX_COLUMNS, ID_COLUMNS, NAME_COLUMNS)
        )
        ids = names if ids is None else ids
        if ids is None:
            raise UserError(f"--labels {path}: {expected}, got {', '.join(header)!r}")
        found: dict[int, ClassInfo] = {}
        seen: set[str] = set()
        for place, (line, cells) in enumerate(rows):
            where = f"--labels {path}, line {line}"
            if len(cells) != len(header):
                raise UserError(f"{where}: expected {len(header)} cells, got {len(cells)}")
            if index is not None and not cells[index].isdigit():
                raise UserError(f"{where}: expected a whole number as index, got {cells[index]!r}")
            number = place if index is None else int(cells[index])
            label = cells[ids]
            if not label or label in seen or number in found:
                raise UserError(
                    f"{where}: class {label!r} with index {number} is there twice or empty"
                )
            seen.add(label)
            found[number] = ClassInfo(label, cells[names] if names is not None else label)
        if sorted(found) != list(range(len(found))) or not found:
            raise UserError(
                f"--labels {path}: expected the indices 0..{len(found) - 1}, each once, "
                f"got {sorted(found)[:3]}..."
            )
        return cls([found[number] for number in range(len(found))], str(path))


def check_class_name(name: str, source: str) -> None:
    """Raises UserError for a name that HDF5 and UTF-8 cannot hold."""
    if NO_TEXT.search(name):
        raise UserError(
            f"{source}: class {name!r} holds a NUL character or half a surrogate pair: correct it"
        )
