"""Tables of the page, as the template draws them, and how their numbers are written."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Column:
    """A column; neighbours of the same group share a heading above."""

    title: str
    group: str = ""
    numeric: bool = True


@dataclass(frozen=True)
class Cell:
    """A cell of a table."""

    text: str
    sort: float | None = None
    """What the column is sorted by, where that is not the text."""
    mark: str = ""
    """A class of the style sheet: "ours", "paper", "differs", "worse"."""
    series: int | None = None
    """The run whose colour stands before the text."""


@dataclass(frozen=True)
class Table:
    """A table; the first cell of a row is its heading."""

    id: str
    caption: str
    columns: list[Column]
    rows: list[list[Cell]]
    notes: list[str] = field(default_factory=list)
    sortable: bool = False
    searchable: str = ""
    """What its rows are called; empty for a table without a search field."""

    @property
    def groups(self) -> list[tuple[str, int]]:
        """Headings above the columns, and how many columns each has; empty where there is none."""
        found: list[tuple[str, int]] = []
        for column in self.columns:
            if found and column.group and found[-1][0] == column.group:
                found[-1] = (column.group, found[-1][1] + 1)
            else:
                found.append((column.group, 1))
        return found if any(name for name, _ in found) else []


NONE = Cell("–")


def number(value: float | None, digits: int, mark: str = "") -> Cell:
    """A number with so many decimals; a dash where there is none."""
    if value is None or value != value:
        return NONE
    return Cell(f"{value:,.{digits}f}", float(value), mark)


def significant(value: float | None, mark: str = "") -> Cell:
    """A number of any size in three digits; a dash where there is none."""
    if value is None or value != value:
        return NONE
    if value == 0 or 1e-3 <= abs(value) < 1000:
        return Cell(f"{value:#.3g}".rstrip("."), float(value), mark)
    text = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.2e}"
    return Cell(text, float(value), mark)


def printed(value: float | None) -> Cell:
    """A number of the paper's as it is printed there; a dash where there is none."""
    return NONE if value is None else Cell(f"{value:g}", float(value), "paper")


def mAP(value: float | None, mark: str = "") -> Cell:
    """A mean or a class's average precision."""
    return number(value, 3, mark)
