"""The picture of ``fastat landscape``: slices through the loss beside the sharpness."""

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from fastat.landscape import Landscape
from fastat.plot import INK, printable_name, save_png

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""The palette of Okabe and Ito, which colour-blind readers can tell apart."""

LOG_FROM = 20.0
"""Ratio of the largest to the smallest loss above which the axis of the loss is logarithmic."""


def plot_landscapes(path: Path, found: Sequence[Landscape]) -> None:
    """Writes the picture as PNG. Raises Failure where it cannot be written."""
    save_png(draw(found), path)


def draw(found: Sequence[Landscape]) -> Figure:
    """Slices on the left, one curve per run; sharpness on the right, in the same colours."""
    names = _names(found)
    figure = Figure(figsize=(11.0, 4.6), dpi=150, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    slices, bars = figure.subplots(1, 2, width_ratios=(3, 2))
    for i, result in enumerate(found):
        slices.plot(
            result.slice.alphas,
            result.slice.losses,
            color=COLORS[i % len(COLORS)],
            linestyle=("-", "--", ":")[i // len(COLORS) % 3],
            linewidth=2.0,
            label=names[i],
        )
    losses = [x for result in found for x in result.slice.losses if math.isfinite(x)]
    if max(losses) > LOG_FROM * min(losses):
        slices.set_yscale("log")
    slices.yaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    slices.yaxis.set_minor_formatter(NullFormatter())
    slices.set_xlim(-1.0, 1.0)
    slices.set_xlabel("step along a filter-normalised random direction", color=INK)
    slices.set_ylabel("loss (binary cross-entropy)", color=INK)
    slices.grid(color="#dddddd", linewidth=0.6, which="both")
    _without_mathtext(slices.legend(frameon=False, fontsize=9).get_texts())

    values = [result.sharpness.eigenvalue for result in found]
    places = range(len(found))
    drawn = bars.barh(places, values, height=0.6, color=[COLORS[i % len(COLORS)] for i in places])
    marks = [f"{r.sharpness.eigenvalue:.3g}{'' if r.sharpness.converged else ' *'}" for r in found]
    bars.bar_label(drawn, marks, padding=4, color=INK, fontsize=9)
    bars.set_yticks(places, names)
    _without_mathtext(bars.get_yticklabels())
    bars.invert_yaxis()
    bars.margins(x=0.18)
    bars.set_xlabel("sharpness: largest eigenvalue of the Hessian", color=INK)
    if not all(result.sharpness.converged for result in found):
        bars.set_title("* not converged", fontsize=9, color=INK, loc="right")
    for axes in (slices, bars):
        _tidy(axes)
    return figure


def _names(found: Sequence[Landscape]) -> list[str]:
    """The names of the run folders, with the model where the name does not contain it."""
    names = []
    for result in found:
        name = printable_name(Path(result.run).name)
        names.append(name if result.model in name else f"{name} ({result.model})")
    return names


def _without_mathtext(texts: Sequence[object]) -> None:
    for text in texts:
        text.set_parse_math(False)  # type: ignore[attr-defined]  # names may contain dollar signs


def _tidy(axes: Axes) -> None:
    axes.tick_params(colors=INK, length=3, labelsize=9, which="both")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
