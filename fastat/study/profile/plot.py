"""The chart of ``fastat profile``: cost against stride, and the paper's mAP against cost.

matplotlib's Agg canvas, without pyplot: no display, no global state.
"""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from fastat.config.paper import TABLE_3
from fastat.config.procedures import PROCEDURES
from fastat.study.profile.rows import Document, Row, best_value
from fastat.system.outputs import written

INK, PALE = "#333333", "#777777"
COLOURS = {"A1": "#0b5394", "A2": "#6fa8dc", "A3": "#b45309", "A4": "#e69f00"}
"""By procedure: blue for 128 x 1024, orange for 64 x 400; dark for ImageNet weights."""


def plot_profile(path: Path, document: Document) -> None:
    """Writes the chart as PNG. Raises Failure where it cannot be written."""
    figure = draw(document)
    with written(path) as temporary:
        figure.savefig(temporary, format="png")


def draw(document: Document) -> Figure:
    """Draws mAP against cost; with several strides of the AST also cost against stride."""
    rows = [row for row in document["rows"] if row["hours_per_epoch"] is not None]
    squares = [
        row for row in rows if row["fstride"] is not None and row["fstride"] == row["tstride"]
    ]
    strides = squares if _several_strides(squares) else []
    figure = Figure(figsize=(11.0 if strides else 7.0, 5.2), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2 if strides else 1, squeeze=False)[0]
    if strides:
        _cost_against_stride(panels[0], strides)
    _map_against_cost(panels[-1], rows)
    for axes in panels:
        axes.tick_params(colors=INK, labelsize=9)
        axes.grid(color="#e5e5e5", linewidth=0.8)
        axes.set_axisbelow(True)
        for side, spine in axes.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color("#bbbbbb")
    how = "compiled" if document["rows"][0]["compiled"] else "eager"
    figure.suptitle(
        f"{document['device']}, {document['rows'][0]['precision']}, {how}",
        x=0.01, ha="left", fontsize=12, fontweight="bold", color=INK,
    )  # fmt: skip
    figure.text(
        0.01, 0.905, f"hours of an epoch of {document['clips']:,} clips; filled: measured here; "
        "hollow: the paper's V100s", fontsize=9, color=PALE,
    )  # fmt: skip
    figure.subplots_adjust(
        left=0.07 if strides else 0.1, right=0.98, top=0.86, bottom=0.11, wspace=0.2
    )
    return figure


def _several_strides(rows: Sequence[Row]) -> bool:
    """Whether the AST is there at more than one stride under a procedure."""
    found = {(row["proc"], row["fstride"], row["tstride"]) for row in rows if row["fstride"]}
    return len(found) > len({proc for proc, *_ in found})


def _cost_against_stride(axes: Axes, rows: Sequence[Row]) -> None:
    strides = {row["fstride"] for row in rows}
    for proc in sorted({row["proc"] for row in rows}):
        own = sorted((row for row in rows if row["proc"] == proc), key=lambda row: row["fstride"])
        x, y = [row["fstride"] for row in own], [row["hours_per_epoch"] for row in own]
        axes.plot(x, y, "o-", color=COLOURS[proc], label=f"{proc}, measured")
        printed = [(s, p.hours_per_epoch) for s, p in TABLE_3.get(proc, {}).items()]
        known = [(s, hours) for s, hours in printed if hours is not None]
        strides |= {stride for stride, _ in known}
        if known:
            axes.plot(
                *zip(*known, strict=True), "o--", color=COLOURS[proc], markerfacecolor="white",
                label=f"{proc}, the paper on {PROCEDURES[proc].paper_gpus} V100s",
            )  # fmt: skip
    axes.set_yscale("log")
    axes.set_xticks(sorted(strides))
    _hours(axes, "y")
    axes.set_xlabel("distance of the AST's patches, both axes", color=INK)
    axes.set_ylabel("hours an epoch", color=INK)
    axes.legend(frameon=False, fontsize=9, labelcolor=INK)


def _map_against_cost(axes: Axes, rows: Sequence[Row]) -> None:
    known = [row for row in rows if row["paper_map"] is not None]
    best = best_value(list(rows))
    for proc in sorted({row["proc"] for row in known}):
        own = [row for row in known if row["proc"] == proc]
        x, y = [row["hours_per_epoch"] for row in own], [row["paper_map"] for row in own]
        axes.plot(x, y, "o", color=COLOURS[proc], label=proc)
        theirs = [row for row in own if row["paper_hours_per_epoch"] is not None]
        axes.plot(
            [row["paper_hours_per_epoch"] for row in theirs],
            [row["paper_map"] for row in theirs],
            "o", color=COLOURS[proc], markerfacecolor="white",
        )  # fmt: skip
    several = _several_strides(known)
    for row in known:
        name = row["model"]
        if row["fstride"] is not None and several:
            name = f"{row['fstride']}x{row['tstride']}"
        axes.annotate(
            name, (row["hours_per_epoch"], row["paper_map"]),
            xytext=(-6, 3) if row in best else (6, -3), textcoords="offset points",
            ha="right" if row in best else "left", fontsize=8, color=INK,
            fontweight="bold" if row in best else "normal",
        )  # fmt: skip
    front = [(row["hours_per_epoch"], row["paper_map"]) for row in best]
    if len(front) > 1:
        axes.plot(*zip(*front, strict=True), "-", color="#bbbbbb", linewidth=1.2, zorder=1)
    axes.set_xscale("log")
    axes.margins(x=0.15)
    _hours(axes, "x")
    axes.set_xlabel("hours an epoch", color=INK)
    axes.set_ylabel("mAP on AudioSet, the paper's", color=INK)
    if known:
        # in a frame, or its dots look like the rows'
        axes.legend(edgecolor="#bbbbbb", fontsize=9, labelcolor=INK)


def _hours(axes: Axes, which: str) -> None:
    """Labels a logarithmic axis with plain numbers, also between the powers of ten."""
    axis = axes.yaxis if which == "y" else axes.xaxis
    low, high = axis.get_view_interval()
    crowded = high > 300 * low
    axis.set_major_locator(LogLocator(subs=(1.0, 3.0) if crowded else (1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}" if x < 1000 else f"{x:,.0f}"))
    axis.set_minor_formatter(NullFormatter())
