"""The picture of ``fastat landscape``: slices through the loss beside the sharpness."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fastat.evaluation.plot import printable_name, save_png
from fastat.study.landscape import Landscape

LOG_FROM = 20.0
"""Ratio of the largest to the smallest loss above which the axis of the loss is logarithmic."""


def plot_landscapes(path: Path, found: Sequence[Landscape]) -> None:
    """Writes the picture as PNG. Raises Failure where it cannot be written."""
    save_png(draw(found), path)


def draw(found: Sequence[Landscape]) -> Figure:
    """Slices on the left, one curve per run; sharpness on the right, in the same colours."""
    figure = Figure(figsize=(11.0, 4.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    slices, bars = figure.subplots(1, 2, width_ratios=(3, 2))
    names = [f"{printable_name(Path(result.run).name)} ({result.model})" for result in found]
    for i, result in enumerate(found):
        slices.plot(result.slice.alphas, result.slice.losses, color=f"C{i}", label=names[i])
        bar = bars.barh(i, result.sharpness.eigenvalue, color=f"C{i}")
        bars.bar_label(bar, [f"{result.sharpness.eigenvalue:.3g}"], padding=4)
        if not result.sharpness.converged:
            names[i] += "\nnot converged"
    losses = [loss for result in found for loss in result.slice.losses]
    if max(losses) > LOG_FROM * min(losses):
        slices.set_yscale("log")
    slices.set_xlabel("step along a filter-normalised random direction")
    slices.set_ylabel("loss (binary cross-entropy)")
    slices.grid(alpha=0.4, which="both")
    bars.set_yticks(range(len(found)), names)
    bars.set_xlabel("sharpness: largest eigenvalue of the Hessian")
    bars.invert_yaxis()
    bars.margins(x=0.2)  # room for the labels
    for text in [*slices.legend().get_texts(), *bars.get_yticklabels()]:
        text.set_parse_math(False)  # names may contain dollar signs
    return figure
