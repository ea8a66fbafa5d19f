"""The labels in a cell of a table."""

import ast
import re
from collections.abc import Iterable
from typing import NamedTuple

QUOTED = r"""(?:'(?:[^'\\\n]|\\.)*'|"(?:[^"\\\n]|\\.)*")"""
NUMBER = r"[+-]?\d+"
COMMA = r"(?:\s*,\s*|\s+)"
ITEM = re.compile(rf"{QUOTED}|{NUMBER}")
LIST = re.compile(
    rf"\[\s*(?:{QUOTED}|{NUMBER})(?:{COMMA}(?:{QUOTED}|{NUMBER}))*\s*(?:,\s*)?\]"
    rf"|\(\s*{QUOTED}(?:{COMMA}{QUOTED})*\s*(?:,\s*)?\)"
    rf"|\{{\s*{QUOTED}(?:{COMMA}{QUOTED})*\s*\}}"
)
"""A list, tuple or set as Python, pandas, numpy (without commas) and JSON write it."""
EMPTY_LIST = re.compile(r"\[\s*\]|\(\s*\)|\{\s*\}|set\(\s*\)")
OTHER = r"(?:None|null|nan|NaN|<NA>|NaT|True|False|[+-]?\d+\.\d*(?:e[+-]?\d+)?)"
NOT_LABELS = re.compile(
    r"""array\(|(?:set\()?[\[({]\s*['"]"""  # an array; a list of which only a part is quoted
    r"|\[\s*[\[({]"  # lists in a list
    r"|\{[^}]*:"  # a dict
    rf"|[\[({{]\s*{OTHER}(?:{COMMA}{OTHER})*\s*(?:,\s*)?[\])}}]\Z"
)
"""Matches values that Python wrote and that are no list of labels."""
SEVERAL = (";", ",")


class LabelCells(NamedTuple):
    """How the label cells of a table are read."""

    separators: tuple[str, ...] = ()
    """The first of these that a cell holds separates its labels; empty: one label a cell."""
    verbatim: bool = False
    """Only ``separators`` separate labels: a cell that is written as a list is not read as one."""

    @classmethod
    def of_column(cls, name: str, separator: str | None) -> "LabelCells":
        """Those of the column ``name``: a plural (labels, tags) holds several labels a cell, any
        other name one. A ``separator`` (--label-separator) decides alone."""
        if separator is not None:
            return cls((separator,), verbatim=True)
        name = name.lower()
        is_plural = name.endswith("s") and not name.endswith(("ss", "us", "species"))
        return cls(SEVERAL if is_plural else ())

    def for_column(self, cells: Iterable[str]) -> "LabelCells":
        """Those for a column with these ``cells``: where one holds ``;``, ``,`` separates nothing
        in any of them."""
        if self.verbatim or not self.separators:
            return self
        if any(";" in cell and not LIST.fullmatch(cell) for cell in cells):
            return self._replace(separators=(";",))
        return self

    def split(self, cell: str) -> list[str]:
        """The labels of a cell, without spaces around them.

        Raises:
            ValueError: the cell is written as a list, dict or array, and is no list of labels.
        """
        items = None if self.verbatim else _items(cell)
        if items is None:
            separator = next((s for s in self.separators if s in cell), None)
            items = [cell] if separator is None else cell.split(separator)
        return [item.strip() for item in items if item.strip()]


def _items(cell: str) -> list[str] | None:
    """The items of a cell that is written as a list; None for any other cell."""
    if not cell.startswith(("[", "(", "{", "set(", "array(")):
        return None
    if EMPTY_LIST.fullmatch(cell):
        return []
    if LIST.fullmatch(cell):
        try:
            return [str(ast.literal_eval(item)) for item in ITEM.findall(cell)]
        except (SyntaxError, ValueError):
            raise ValueError(f"expected a list of labels, got {cell!r}") from None
    # [noise] is a label, and so are [noise], [music] in a cell of several.
    inside = cell[1:-1]
    is_one_list = cell[0] + cell[-1] == "[]" and "[" not in inside
    if is_one_list and re.search(r"[,;'\"]", inside) or NOT_LABELS.match(cell):
        raise ValueError(f"expected labels or a list of quoted labels, got {cell!r}")
    return None
