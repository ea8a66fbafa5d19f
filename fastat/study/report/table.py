"""Tables of the page as the template draws them, and the format of their numbers."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Column:
    """A column. Neighbouring columns of the same group share a heading above them."""

    title: str
    group: str = ""
    numeric: bool = True


@dataclass(frozen=True)
class Cell:
    """A cell of a table."""

    text: str
    sort: float | None = None
    """The number that the column is sorted by; None sorts by the text."""
    mark: str = ""
    """A class of the style sheet: "ours", "paper" or "differs"."""
    series: int | None = None
    """Index of the run whose colour is shown before the text."""


@dataclass(frozen=True)
class Table:
    """A table; the first cell of a row is its heading."""

    id: str
    caption: str
    columns: list[Column]
    rows: list[list[Cell]]
    notes: list[str] = field(default_factory=list)
    sortable: bool = False

    @property
    def groups(self) -> list[tuple[str, int]]:
        """Headings above the columns with their numbers of columns; empty without any heading."""
        found: list[tuple[str, int]] = []
        for column in self.columns:
            if found and column.group and found[-1][0] == column.group:
                found[-1] = (column.group, found[-1][1] + 1)
            else:
                found.append((column.group, 1))
        return found if any(name for name, _ in found) else []


NONE = Cell("–")


def number(value: float | None, digits: int, mark: str = "") -> Cell:
    """A number with ``digits`` decimals; a dash for None and NaN."""
    if value is None or value != value:
        return NONE
    return Cell(f"{value:,.{digits}f}", float(value), mark)


def significant(value: float | None, mark: str = "") -> Cell:
    """A number of any size with three significant digits; a dash for None and NaN."""
    if value is None or value != value:
        return NONE
    if value == 0 or 1e-3 <= abs(value) < 1000:
        return Cell(f"{value:#.3g}".rstrip("."), float(value), mark)
    text = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.2e}"
    return Cell(text, float(value), mark)


def printed(value: float | None) -> Cell:
    """A number as the paper prints it; a dash for None."""
    return NONE if value is None else Cell(f"{value:g}", float(value), "paper")


def mAP(value: float | None, mark: str = "") -> Cell:
    """An average precision: mAP, or the AP of one class."""
    return number(value, 3, mark)
