"""The tables of ``fastat profile`` on a terminal: costs, where a step's time goes, a budget."""

from itertools import groupby
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fastat.procedures import PROCEDURES, Procedure
from fastat.profile.rows import MS, Document, Row, best_value, stride_of

WIDTH = 120
UNSTEADY_PERCENT = 20
Column = tuple[str, int]

COST: tuple[Column, ...] = (
    ("mAP\npaper", 8), ("h an\nepoch", 8), ("hours", 8), ("kWh", 7), ("clips/s", 8),
    ("TFLOP/s", 8), ("% of\nceiling", 8), ("batch", 6), ("GiB", 6), ("M para-\nmeters", 8),
    ("GFLOP\na clip", 7),
)  # fmt: skip
STRIDE: tuple[Column, ...] = (
    ("grid", 8), ("patches", 8), ("paper's\ncount", 8), ("GFLOP\na clip", 7), ("batch", 6),
    ("GiB", 6), ("clips/s", 8), ("% of\nceiling", 8), ("h an\nepoch", 8), ("paper's\nh", 8),
    ("mAP\npaper", 8),
)  # fmt: skip
TIMES: tuple[Column, ...] = (
    ("tokens", 6), ("batch", 5), ("data", 6), ("front\nend", 6), ("for-\nward", 6),
    ("back-\nward", 6), ("Adam", 6), ("step", 6), ("spread\n%", 6),
)  # fmt: skip
BUDGET: tuple[Column, ...] = (
    ("mAP\npaper", 8), ("batch", 6), ("clips/s", 8), ("h an\nepoch", 8), ("hours", 8), ("GiB", 6),
)  # fmt: skip
SMALL_SHARE = 0.01
"""Modules with at most this share of a model's operations are not listed."""


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


def print_costs(console: Console, rows: list[Row], *, strides: bool) -> None:
    """What each row costs, beside the paper's hours and mAP: a table for each procedure."""
    best = best_value(rows)
    for proc, group in groupby(rows, key=lambda row: str(row["proc"])):
        listed = list(group)
        console.print()
        console.print(Text(about(PROCEDURES[proc]), style="bold"))
        table = _table("stride" if strides else "model", STRIDE if strides else COST)
        if not strides:
            listed.sort(key=lambda row: -(row["paper_map"] or 0.0))
        for row in listed:
            cells = stride_cells(row, best) if strides else cost_cells(row, best)
            name = stride_of(row) if strides else row["model"]
            table.add_row(name, *cells, style="bold" if row in best else "")
        console.print(table)
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
            steps.setdefault(step_key(row), []).append(row)
    if not steps:
        return
    console.print()
    console.print(
        Text("Where a step's time goes, in ms, and the operations of its model, in %", style="bold")
    )
    table = _table("stride" if strides else "model", TIMES)
    table.add_column("  % of the operations", min_width=34, overflow="fold")
    for same in steps.values():
        procs = " ".join(row["proc"] for row in same)
        name = stride_of(same[0]) if strides else same[0]["model"]
        table.add_row(f"{name} {procs}", *time_cells(same[0]))
    console.print(table)


def print_budget(console: Console, document: Document) -> None:
    """The rows that fit the budget, what is left out, and the command of the best."""
    rows, budget = document["rows"], document["budget"]
    ranking, unranked = budget["ranking"], budget["unranked"]
    if ranking or unranked:
        table = _table("", BUDGET)
        places = {i: f"{place}. " for place, i in enumerate(ranking, 1)}
        for i in ranking + unranked:
            row = rows[i]
            table.add_row(
                places.get(i, "") + title(row), map_cell(row, []), str(row["batch"]),
                number(row["clips_per_s"]), number(row["hours_per_epoch"]), number(row["hours"]),
                number(row["peak_memory_gib"]), style="bold" if ranking[:1] == [i] else "",
            )  # fmt: skip
        console.print()
        console.print(table)
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
    bound = "" if ceiling is None else f"; a matrix product reaches {ceiling:.3g} TFLOP/s"
    memory = "; GiB: the process's peak" if document["device_type"] == "cpu" else ""
    if any(row["out_of_memory"] for row in document["rows"]):
        memory += "; full: the step did not fit"
    return [
        f"{document['device']}, torch {document['torch']}, {row['precision']}, {how}{bound}",
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


def _table(name: str, columns: tuple[Column, ...]) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=0)
    table.add_column(name, no_wrap=True, min_width=14)
    for head, width in columns:
        table.add_column(head, justify="right", no_wrap=True, min_width=width)
    return table


def title(row: Row) -> str:
    """Model, procedure and stride of a row."""
    return " ".join(x for x in (row["model"], row["proc"], stride_of(row)) if x)


def cost_cells(row: Row, best: list[Row]) -> list[str]:
    """Cells of a row in the table of models."""
    memory = "full" if row["out_of_memory"] else number(row["peak_memory_gib"])
    return [
        map_cell(row, best), number(row["hours_per_epoch"]), number(row["hours"]),
        number(row["kwh"]), number(row["clips_per_s"]), number(row["tflops"]),
        number(row["percent_of_ceiling"], 0), str(row["batch"]), memory,
        number(row["params"] / 1e6), number(row["gflop"]),
    ]  # fmt: skip


def stride_cells(row: Row, best: list[Row]) -> list[str]:
    """Cells of a row in Table 3."""
    memory = "full" if row["out_of_memory"] else number(row["peak_memory_gib"])
    return [
        "x".join(map(str, row["grid"])), number(row["patches"]), number(row["paper_patches"]),
        number(row["gflop"]), str(row["batch"]), memory, number(row["clips_per_s"]),
        number(row["percent_of_ceiling"], 0), number(row["hours_per_epoch"]),
        number(row["paper_hours_per_epoch"]), map_cell(row, best),
    ]  # fmt: skip


def time_cells(row: Row) -> list[str]:
    """Cells of a row in the table of durations."""
    ms = row["ms"]
    shares = {name: gflop / row["gflop"] for name, gflop in row["gflop_by_module"].items()}
    return [
        number(row["tokens"]),
        str(row["batch"]),
        *(number(ms[name]["median"]) for name in MS),
        number(spread(row), 0),
        "  "
        + ", ".join(f"{n} {100 * share:.0f}" for n, share in shares.items() if share > SMALL_SHARE),
    ]


def spread(row: Row) -> float:
    """Distance between the quartiles of a step's duration, in % of the median."""
    step = row["ms"]["step"]
    return float(100 * (step["high"] - step["low"]) / step["median"])


def map_cell(row: Row, best: list[Row]) -> str:
    """The paper's mAP, with a star for the rows in ``best``."""
    if row["paper_map"] is None:
        return "-  "
    return f"{row['paper_map']:.3f} {'*' if row in best else ' '}"


def number(x: Any, decimals: int | None = None) -> str:
    """A number with three digits, a whole number with all; a dash for None."""
    if x is None:
        return "-"
    if isinstance(x, int) or abs(x) >= 100:
        return f"{x:,.0f}"
    if decimals is None:
        decimals = 1 if abs(x) >= 10 else 2
    return f"{x:,.{decimals}f}"


def step_key(row: Row) -> tuple[Any, ...]:
    """Equal for rows whose durations come from the same steps."""
    step = row["ms"] and row["ms"]["step"]["median"]
    return row["model"], row["fstride"], row["tstride"], row["feature"], step
