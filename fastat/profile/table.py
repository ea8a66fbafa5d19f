"""The tables of ``fastat profile`` on a terminal: what to train, and where a step's time goes."""

from itertools import groupby
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fastat.procedures import PROCEDURES, Procedure
from fastat.profile.cases import Choice, default_batch
from fastat.profile.parts import PARTS
from fastat.profile.rows import MS, Document, Row, best_value

WIDTH = 120
TONIGHT_HOURS = 12.0
UNSTEADY_PERCENT = 20
Column = tuple[str, int]

COST: tuple[Column, ...] = (
    ("mAP\npaper", 8), ("h an\nepoch", 8), ("hours", 8), ("kWh", 7), ("clips/s", 8),
    ("TFLOP/s", 8), ("% of\nceiling", 8), ("batch", 6), ("GiB", 6), ("largest\nbatch", 8),
    ("M para-\nmeters", 8), ("GFLOP\na clip", 7),
)  # fmt: skip
STRIDE: tuple[Column, ...] = (
    ("grid", 8), ("patches", 8), ("paper's\ncount", 8), ("GFLOP\na clip", 7), ("batch", 6),
    ("GiB", 6), ("largest\nbatch", 8), ("clips/s", 8), ("% of\nceiling", 8), ("h an\nepoch", 8),
    ("paper's\nh", 8), ("mAP\npaper", 8),
)  # fmt: skip
TIMES: tuple[Column, ...] = (
    ("tokens", 6), ("batch", 5), ("data", 6), ("front\nend", 6), ("for-\nward", 6),
    ("back-\nward", 6), ("Adam", 6), ("step", 6), ("spread\n%", 6),
    ("embed-\nding", 6), ("atten-\ntion", 6), ("MLP", 5), ("convo-\nlution", 6),
    ("recur-\nrent", 6), ("head", 5),
)  # fmt: skip


def print_tables(document: Document, *, strides: bool) -> None:
    """On standard output, at most WIDTH columns wide."""
    console = _console()
    for line in heading(document):
        console.print(Text(line))
    rows = document["rows"]
    best = best_value(rows)
    for proc, group in groupby(rows, key=lambda row: str(row["proc"])):
        listed = list(group)
        p = PROCEDURES[proc]
        console.print()
        console.print(Text(about(p), style="bold"))
        if strides:
            table = _table("stride", STRIDE)
            for row in listed:
                table.add_row(stride_of(row), *stride_cells(row, best), style=emphasis(row, best))
        else:
            table = _table("model", COST)
            for row in sorted(listed, key=lambda row: -(row["paper_map"] or 0.0)):
                table.add_row(row["model"], *cost_cells(row, best), style=emphasis(row, best))
        console.print(table)
    print_times(console, rows, strides=strides)
    console.print()
    unsteady = [row for row in rows if row["ms"] is not None and spread(row) > UNSTEADY_PERCENT]
    if unsteady:
        names = ", ".join(
            f"{stride_of(row) if strides else row['model']} {row['proc']}" for row in unsteady
        )
        console.print(
            Text(f"unsteady (spread over {UNSTEADY_PERCENT} %): {names}: is the machine busy?")
        )
    for line in advice(document, best):
        console.print(Text(line))
    if "memory" in document:
        console.print()
        print_memory(console, document["memory"])
    if "trace" in document:
        console.print()
        print_trace(console, document["trace"])


def print_times(console: Console, rows: list[Row], *, strides: bool) -> None:
    """Where each step's time goes; procedures that share one share a line."""
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
    for same in steps.values():
        procs = " ".join(row["proc"] for row in same)
        name = stride_of(same[0]) if strides else same[0]["model"]
        table.add_row(f"{name} {procs}", *time_cells(same[0]))
    console.print(table)


def _console() -> Console:
    """A narrower terminal wraps the lines, which loses nothing."""
    return Console(highlight=False, width=WIDTH)


def heading(document: Document) -> list[str]:
    """What the figures are of."""
    row = document["rows"][0]
    how = "compiled" if row["compiled"] else "eager"
    ceiling = document["ceiling_tflops"]
    bound = "" if ceiling is None else f"; a matrix product reaches {ceiling:.3g} TFLOP/s"
    memory = "; memory: estimated" if document["device_type"] == "cpu" else ""
    if any(row["out_of_memory"] for row in document["rows"]):
        memory += "; full: the step did not fit"
    return [
        f"{document['device']}, torch {document['torch']}, {row['precision']}, {how}{bound}",
        f"hours: of {document['clips']:,} clips an epoch, without evaluation; mAP: the paper's"
        f"{memory}",
    ]


def about(p: Procedure) -> str:
    """A procedure in a line."""
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


def stride_of(row: Row) -> str:
    """As ``--stride`` takes it; nothing for models without."""
    return "" if row["fstride"] is None else f"{row['fstride']}x{row['tstride']}"


def cost_cells(row: Row, best: list[Row]) -> list[str]:
    """A line of the table of models."""
    memory = "full" if row["out_of_memory"] else number(row["peak_memory_gib"])
    return [
        map_cell(row, best), number(row["hours_per_epoch"]), number(row["hours"]),
        number(row["kwh"]), number(row["clips_per_s"]), number(row["tflops"]),
        number(row["percent_of_ceiling"], 0), str(row["batch"]), memory,
        number(row["largest_batch"]), number(row["params"] / 1e6), number(row["gflop"]),
    ]  # fmt: skip


def stride_cells(row: Row, best: list[Row]) -> list[str]:
    """A line of Table 3."""
    memory = "full" if row["out_of_memory"] else number(row["peak_memory_gib"])
    return [
        "x".join(map(str, row["grid"])), number(row["patches"]), number(row["paper_patches"]),
        number(row["gflop"]), str(row["batch"]), memory, number(row["largest_batch"]),
        number(row["clips_per_s"]), number(row["percent_of_ceiling"], 0),
        number(row["hours_per_epoch"]), number(row["paper_hours_per_epoch"]), map_cell(row, best),
    ]  # fmt: skip


def time_cells(row: Row) -> list[str]:
    """A line of the table of durations."""
    ms = row["ms"]
    shares = (100 * row["gflop_parts"][part] / row["gflop"] for part in PARTS)
    return [
        number(row["tokens"]),
        str(row["batch"]),
        *(number(ms[name]["median"]) for name in MS),
        number(spread(row), 0),
        *(f"{share:.0f}" if share else "" for share in shares),
    ]


def emphasis(row: Row, best: list[Row]) -> str:
    """The style of a line."""
    return "bold" if row in best else ""


def spread(row: Row) -> float:
    """From the lower to the upper quartile of a step's time, in % of the median."""
    step = row["ms"]["step"]
    return float(100 * (step["high"] - step["low"]) / step["median"])


def map_cell(row: Row, best: list[Row]) -> str:
    """The paper's mAP, with a star where nothing is better value."""
    if row["paper_map"] is None:
        return "-  "
    return f"{row['paper_map']:.3f} {'*' if row in best else ' '}"


def print_trace(console: Console, found: dict[str, Any]) -> None:
    """The dearest operators of a trace; ``found``: as in the document."""
    operators = found["operators"]
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0))
    table.add_column("operator", no_wrap=True, min_width=40, max_width=64)
    for head in ("calls\na step", "ms\na step", "% of\nall", "MB\na step", "GB/s"):
        table.add_column(head, justify="right", no_wrap=True)
    for o in operators:
        table.add_row(
            o["name"], number(o["calls"], 0), number(o["ms"]), number(100 * o["share"], 1),
            number(o["bytes"] / 1e6), number(o["bytes"] / o["ms"] / 1e6 if o["ms"] else None),
        )  # fmt: skip
    console.print(Text(f"The {len(operators)} most expensive operators of a step", style="bold"))
    console.print(table)
    console.print(
        Text(
            "bytes: estimated from the shapes of its inputs and from what it allocates\n"
            f"trace: {found['file']}, for chrome://tracing or ui.perfetto.dev"
        )
    )


def print_memory(console: Console, found: dict[str, Any]) -> None:
    """Peaks by module; ``found``: as in the document, in bytes."""
    modules = found["modules"]
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0))
    table.add_column("module", no_wrap=True, min_width=24)
    for head in ("peak GiB\nforward", "peak GiB\nbackward", "MiB kept\nfor backward"):
        table.add_column(head, justify="right", no_wrap=True)
    highest = max(m["peak"] for m in modules)
    for m in modules:
        style = "bold" if m["peak"] == highest else ""
        forward, backward = m["peak_forward"] / 2**30, m["peak_backward"] / 2**30
        cells = (number(forward), number(backward or None), number(m["kept"] / 2**20))
        table.add_row(m["name"], *cells, style=style)
    how = "estimated from a step on fake tensors" if found["estimated"] else "by the allocator"
    console.print(Text(f"What is taken in all while a module works, {how}", style="bold"))
    console.print(table)
    alone = ", of the step's tensors alone: waveforms and libraries come on top"
    more = alone if found["estimated"] else ""
    console.print(Text(f"peak: {highest / 2**30:.2f} GiB, in bold{more}"))


def number(x: Any, decimals: int | None = None) -> str:
    """Three digits, or all of a whole number; a dash where there is none."""
    if x is None:
        return "-"
    if isinstance(x, int) or abs(x) >= 100:
        return f"{x:,.0f}"
    if decimals is None:
        decimals = 1 if abs(x) >= 10 else 2
    return f"{x:,.{decimals}f}"


def step_key(row: Row) -> tuple[Any, ...]:
    """Equal where the durations are of the same steps."""
    step = row["ms"] and row["ms"]["step"]["median"]
    return row["model"], row["fstride"], row["tstride"], row["feature"], step


def advice(document: Document, best: list[Row]) -> list[str]:
    """The choice in words: which rows are best value, and the best that a night has room for."""
    if not best:
        return []
    lines = ["* no other row reaches as high an mAP (in the paper, on AudioSet) in as few hours"]
    device = document["device_type"]
    tonight = [row for row in best if row["hours"] <= TONIGHT_HOURS]
    if tonight:
        lines.append(f"{f'in {TONIGHT_HOURS:g} h':12} {in_words(tonight[-1], device)}")
    else:
        clips = document["clips"] * TONIGHT_HOURS / best[0]["hours"]
        lines.append(
            f"None trains on {document['clips']:,} clips in {TONIGHT_HOURS:g} h: the quickest has "
            f"time for its {PROCEDURES[best[0]['proc']].epochs} epochs of {clips:,.0f} clips."
        )
        lines.append(f"{'quickest':12} {in_words(best[0], device)}")
    if best[-1] not in [*tonight[-1:], best[0]]:
        lines.append(f"{'highest mAP':12} {in_words(best[-1], device)}")
    return [*lines, "with --data SET --eval SET: without them train takes the practice set"]


def in_words(row: Row, device: str) -> str:
    """A row as the command that trains it; ``device``: cpu or cuda."""
    words = ["fastat train --proc", row["proc"], "--model", row["model"]]
    if row["model"] == "ast":
        words += ["--stride", stride_of(row)]
    if row["batch"] != default_batch(Choice(row["model"], row["proc"]), device):
        words += ["--batch", str(row["batch"])]
    words += ["--precision", row["precision"]]
    if row["compiled"] != (device == "cuda"):
        words.append("--compile" if row["compiled"] else "--no-compile")
    if row["activation_checkpointing"]:
        words.append("--set model.activation_checkpointing=true")
    return f"mAP {row['paper_map']:.3f} in {number(row['hours']):>6} h   {' '.join(words)}"
