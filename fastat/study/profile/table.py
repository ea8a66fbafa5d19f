"""The tables of ``fastat profile`` on a terminal: costs, where a step's time goes, a budget."""

from collections.abc import Callable, Iterable
from itertools import groupby
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fastat.config.procedures import PROCEDURES, Procedure
from fastat.study.profile.rows import MS, Document, Row, best_value, stride_of

WIDTH = 120
UNSTEADY_PERCENT = 20
SMALL_SHARE = 0.01
"""Modules with at most this share of a model's operations are not listed."""


# ---------------------------------------------------------------------------- cells and columns
def number(x: Any, decimals: int | None = None) -> str:
    """A number with three digits, a whole number with all; a dash for None."""
    if x is None:
        return "-"
    if isinstance(x, int) or abs(x) >= 100:
        return f"{x:,.0f}"
    if decimals is None:
        decimals = 1 if abs(x) >= 10 else 2
    return f"{x:,.{decimals}f}"


def value(name: str, decimals: int | None = None) -> Callable[[Row], str]:
    """A function from a row to its value ``name`` as text."""
    return lambda row: number(row[name], decimals)


def median(name: str) -> Callable[[Row], str]:
    """A function from a row to a part's median duration as text."""
    return lambda row: number(row["ms"][name]["median"])


def spread(row: Row) -> float:
    """Distance between the quartiles of a step's duration, in % of the median."""
    step = row["ms"]["step"]
    return float(100 * (step["high"] - step["low"]) / step["median"])


def operations(row: Row) -> str:
    """The modules with the most operations, in % of the model's."""
    shares = {name: gflop / row["gflop"] for name, gflop in row["gflop_by_module"].items()}
    return ", ".join(f"{n} {100 * share:.0f}" for n, share in shares.items() if share > SMALL_SHARE)


def title(row: Row) -> str:
    """Model, procedure and stride of a row."""
    return " ".join(x for x in (row["model"], row["proc"], stride_of(row)) if x)


Column = tuple[str, Callable[[Row], str]]
"""A heading, and a function from a row to its cell."""

PAPER_MAP: Column = (
    "mAP\npaper",
    lambda row: "-" if row["paper_map"] is None else f"{row['paper_map']:.3f}",
)
HOURS_PER_EPOCH: Column = ("h an\nepoch", value("hours_per_epoch"))
HOURS: Column = ("hours", value("hours"))
CEILING: Column = ("% of\nceiling", value("percent_of_ceiling", 0))
GFLOP: Column = ("GFLOP\na clip", value("gflop"))
CLIPS_PER_S: Column = ("clips/s", value("clips_per_s"))
BATCH: Column = ("batch", value("batch"))
GIB: Column = (
    "GiB",
    lambda row: "full" if row["out_of_memory"] else number(row["peak_memory_gib"]),
)

COST: tuple[Column, ...] = (
    PAPER_MAP,
    HOURS_PER_EPOCH,
    HOURS,
    ("kWh", value("kwh")),
    CLIPS_PER_S,
    ("TFLOP/s", value("tflops")),
    CEILING,
    BATCH,
    GIB,
    ("M para-\nmeters", lambda row: number(row["params"] / 1e6)),
    GFLOP,
)
STRIDE: tuple[Column, ...] = (
    ("grid", lambda row: "x".join(map(str, row["grid"]))),
    ("patches", value("patches")),
    ("paper's\ncount", value("paper_patches")),
    GFLOP,
    BATCH,
    GIB,
    CLIPS_PER_S,
    CEILING,
    HOURS_PER_EPOCH,
    ("paper's\nh", value("paper_hours_per_epoch")),
    PAPER_MAP,
)
TIMES: tuple[Column, ...] = (
    ("tokens", value("tokens")),
    *((name, median(name)) for name in MS),
    ("spread\n%", lambda row: number(spread(row), 0)),
    ("% of the operations", operations),
)
BUDGET: tuple[Column, ...] = (PAPER_MAP, BATCH, CLIPS_PER_S, HOURS_PER_EPOCH, HOURS, GIB)


# ---------------------------------------------------------------------------- tables
def print_tables(document: Document, *, strides: bool) -> None:
    """Prints tables to standard output; ``strides``: in the form of Table 3."""
    console = Console(highlight=False, width=WIDTH)  # a narrower terminal wraps the lines
    for line in heading(document):
        console.print(Text(line))
    rows = document["rows"]
    if "budget" not in document:
        print_costs(console, rows, strides=strides)
        print_times(console, rows, strides=strides)
    unsteady = [row for row in rows if row["ms"] is not None and spread(row) > UNSTEADY_PERCENT]
    if unsteady:
        names = ", ".join(title(row) for row in unsteady)
        console.print(
            Text(f"unsteady (spread over {UNSTEADY_PERCENT} %): {names}: is the machine busy?")
        )
    if "budget" in document:
        print_budget(console, document)
    if "trace" in document:
        console.print(Text(f"\n{document['trace']['table']}"), soft_wrap=True)
        console.print(Text(f"trace: {document['trace']['file']}, for ui.perfetto.dev"))


def _table(first: str, columns: Iterable[Column], lines: Iterable[tuple[str, Row, bool]]) -> Table:
    """A table of rows.

    Args:
        first: heading of the rows' names.
        lines: name, row, and whether it is bold.
    """
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False, collapse_padding=True)
    table.add_column(first, no_wrap=True)
    for head, cell in columns:
        if cell is operations:
            table.add_column(head, overflow="fold")
        else:
            table.add_column(head, justify="right", no_wrap=True)
    for name, row, bold in lines:
        table.add_row(name, *(cell(row) for _, cell in columns), style="bold" if bold else "")
    return table


def print_costs(console: Console, rows: list[Row], *, strides: bool) -> None:
    """What each row costs, beside the paper's hours and mAP: a table for each procedure."""
    best = best_value(rows)
    for proc, group in groupby(rows, key=lambda row: str(row["proc"])):
        listed = list(group)
        if not strides:
            listed.sort(key=lambda row: -(row["paper_map"] or 0.0))
        lines = []
        for row in listed:
            name = stride_of(row) if strides else row["model"]
            lines.append((f"{name} *" if row in best else name, row, row in best))
        console.print()
        console.print(Text(about(PROCEDURES[proc]), style="bold"))
        first = "stride" if strides else "model"
        console.print(_table(first, STRIDE if strides else COST, lines))
    if best:
        console.print(
            Text(
                "* no other row reaches as high an mAP (in the paper, on AudioSet) in as few hours"
                "\n--budget-hours 12 ranks what trains in 12 hours, with a command for the best"
            )
        )


def print_times(console: Console, rows: list[Row], *, strides: bool) -> None:
    """Where each step's time goes; procedures with the same step share a line."""
    steps: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if row["ms"] is not None:
            median = row["ms"]["step"]["median"]  # equal where it is the same measurement
            steps.setdefault((row["model"], stride_of(row), median), []).append(row)
    if not steps:
        return
    lines = []
    for same in steps.values():
        name = stride_of(same[0]) if strides else same[0]["model"]
        lines.append((" ".join([name, *(row["proc"] for row in same)]), same[0], False))
    console.print()
    console.print(
        Text("Where a step's time goes, in ms, and the operations of its model, in %", style="bold")
    )
    console.print(_table("stride" if strides else "model", TIMES, lines))


def print_budget(console: Console, document: Document) -> None:
    """The rows that fit the budget, what is left out, and the command of the best."""
    rows, budget = document["rows"], document["budget"]
    ranking, unranked = budget["ranking"], budget["unranked"]
    if ranking or unranked:
        places = {i: f"{place}. " for place, i in enumerate(ranking, 1)}
        lines = [
            (places.get(i, "") + title(rows[i]), rows[i], ranking[:1] == [i])
            for i in ranking + unranked
        ]
        console.print()
        console.print(_table("", BUDGET, lines))
    for line in left_out(rows, budget):
        console.print(Text(line))
    if unranked:
        console.print(Text("rows without a number are not ranked: the paper has no mAP of them"))
    if ranking:
        best = rows[ranking[0]]
        usual = PROCEDURES[best["proc"]].batch
        if best["batch"] != usual:
            console.print(
                Text(f"measured at batch {best['batch']}; the paper's mAP is of batch {usual}")
            )
        console.print(Text(f"\n{budget['command']}", style="bold"), soft_wrap=True)


def left_out(rows: list[Row], budget: dict[str, Any]) -> list[str]:
    """Lines that say how many rows exceed each limit, and which exceeds it by the least."""
    measured = [row for row in rows if not row["out_of_memory"]]
    limits = (("hours", budget["hours"], "h"), ("peak_memory_gib", budget["memory_gib"], "GiB"))
    lines = []
    for name, limit, unit in limits:
        over = [row for row in measured if limit is not None and row[name] > limit]
        if over:
            least = min(over, key=lambda row: float(row[name]))
            lines.append(
                f"more than {limit:g} {unit}: {len(over)} of {len(rows)}, of which the least is "
                f"{number(least[name])} {unit}, {title(least)}"
            )
    if len(measured) < len(rows):
        lines.append(f"more than this device's memory: {len(rows) - len(measured)}")
    if not budget["ranking"] and not budget["unranked"]:
        lines.append("Nothing fits the budget.")
    return lines


def heading(document: Document) -> list[str]:
    """Lines that say what was measured, and how."""
    row = document["rows"][0]
    how = "compiled" if row["compiled"] else "eager"
    ceiling = document["ceiling_tflops"]
    memory = "; GiB: the process's peak" if document["device_type"] == "cpu" else ""
    if any(row["out_of_memory"] for row in document["rows"]):
        memory += "; full: the step did not fit"
    return [
        f"{document['device']}, torch {document['torch']}, {row['precision']}, {how}; a matrix "
        f"product reaches {ceiling:.3g} TFLOP/s",
        f"hours: of {document['clips']:,} clips an epoch, without evaluation; mAP: the paper's"
        f"{memory}",
    ]


def about(p: Procedure) -> str:
    """One line that describes a procedure."""
    feature = "128 x 1024" if p.feature == "fbank128" else "64 x 400"
    start = "from ImageNet weights" if p.pretrained else "from scratch"
    return (
        f"{p.name}  {feature}, {start}, {p.epochs} epochs, batch {p.batch} in all; the paper's "
        f"best: mAP {p.paper_map:.3f} in {p.paper_hours:g} h on {p.paper_gpus} V100s"
    )
