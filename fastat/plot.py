"""The picture of a prediction: the log-mel of the file above a timeline of its strongest tags.

matplotlib's Agg canvas, without pyplot: no display, no global state.
"""

import math
import warnings
from pathlib import Path
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from fastat.checkpoint import ModelMeta
from fastat.errors import one_line
from fastat.extract import log_mel_blocks
from fastat.features import FEATURES, Feature, hz_to_mel
from fastat.outputs import written
from fastat.predict import Prediction, clock

COLUMNS = 1600
"""Largest number of columns. A column of a longer file shows the mean power of its frames, or the
largest probability of its windows."""

MAX_TAGS = 30
"""Largest number of rows of the timeline."""

DYNAMIC_RANGE_DB = 80.0
TICKS_HZ = (125, 250, 500, 1000, 2000, 4000, 8000)
INK = "#333333"
NAME_LENGTH = 34


def plot_prediction(
    path: Path, found: Prediction, waveform: NDArray[np.int16], meta: ModelMeta, top: int
) -> None:
    """Writes the picture of a prediction as PNG. Raises Failure where it cannot be written."""
    save_png(draw(found, waveform, meta, top), path)


def save_png(figure: Figure, path: Path) -> None:
    """Writes ``figure`` as PNG. Characters that matplotlib's font lacks are drawn as boxes.

    Raises:
        Failure: it cannot be written.
    """
    with warnings.catch_warnings(), written(path) as temporary:
        warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)
        figure.savefig(temporary, format="png")


def draw(found: Prediction, waveform: NDArray[np.int16], meta: ModelMeta, top: int) -> Figure:
    """The log-mel of ``waveform`` [S] above the ``top`` strongest tags, on the same time axis."""
    feature = FEATURES[meta.feature]
    tags = found.strongest(min(top, MAX_TAGS))
    tag_height = 0.30 * len(tags) + 0.05
    mel_height, gap, head, foot = 2.9, 0.18, 0.62, 0.55  # inches
    height = head + mel_height + gap + tag_height + foot
    names = [_short(meta.classes[k].name) for k in tags]
    left, right = max(1.0, 0.75 + 0.073 * max(map(len, names))), 0.95  # room for the names
    width = 11.0
    figure = Figure(figsize=(width, height), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)

    def axes(bottom: float, tall: float, start: float, wide: float) -> Axes:
        return figure.add_axes((start / width, bottom / height, wide / width, tall / height))

    wide = width - left - right
    top_axes = axes(foot + tag_height + gap, mel_height, left, wide)
    tag_axes = axes(foot, tag_height, left, wide)
    bar_left = left + wide + 0.12

    spectrogram, duration = mel_image(waveform, feature)
    image = top_axes.imshow(
        spectrogram.T,
        origin="lower",
        aspect="auto",
        cmap="magma",
        vmin=-DYNAMIC_RANGE_DB,
        vmax=0.0,
        extent=(0.0, duration, -0.5, feature.num_mels - 0.5),
        interpolation="nearest",
    )
    top_axes.set_yticks([_bin_of(hz, feature) for hz in TICKS_HZ], [_hz(hz) for hz in TICKS_HZ])
    top_axes.set_ylabel("frequency (Hz)", color=INK)
    top_axes.tick_params(labelbottom=False)
    bar = figure.colorbar(
        image,
        cax=axes(foot + tag_height + gap, mel_height, bar_left, 0.13),
        ticks=range(-80, 1, 20),
    )
    bar.set_label("dB re peak", color=INK)

    values, edges = timeline(found, tags)
    cells = tag_axes.pcolormesh(
        edges, np.arange(len(tags) + 1), values, cmap="YlGnBu", vmin=0.0, vmax=1.0, rasterized=True
    )
    tag_axes.set_ylim(len(tags), 0)
    if not _write_values(tag_axes, values, edges, found.seconds):
        names = [f"{name}  {found.overall[k]:.2f}" for name, k in zip(names, tags, strict=True)]
    tag_axes.set_yticks(np.arange(len(tags)) + 0.5, names)
    for label in tag_axes.get_yticklabels():
        label.set_parse_math(False)  # names may contain dollar signs
    for row in range(1, len(tags)):
        tag_axes.axhline(row, color="white", linewidth=2.0)
    bar = figure.colorbar(
        cells,
        cax=axes(foot, tag_height, bar_left, 0.13),
        ticks=[0.0, 1.0] if len(tags) < 4 else None,
    )
    bar.set_label("probability" if len(tags) > 3 else "prob.", color=INK)
    tag_axes.set_xlabel("time (s)" if found.seconds < 60 else "time (min:s)", color=INK)

    for ax in (top_axes, tag_axes, *figure.axes):
        ax.tick_params(colors=INK, length=3, labelsize=9)
        for spine in ax.spines.values():
            spine.set_visible(False)
    for ax in (top_axes, tag_axes):
        ax.set_xlim(0.0, found.seconds)
        _time_ticks(ax, found.seconds)
    tag_axes.tick_params(axis="y", length=0)

    y = 1.0 - 0.36 / height
    title = figure.text(
        left / width, y, _short(found.path.name, 44), fontsize=13, fontweight="bold", color=INK
    )
    title.set_parse_math(False)
    count = len(found.starts)
    note = f"{_length(found.seconds)}, {count} window{'s' if count > 1 else ''}, {meta.model}"
    figure.text(1.0 - right / width, y, note, fontsize=9, color="#777777", ha="right")
    return figure


def mel_image(waveform: NDArray[np.int16], feature: Feature) -> tuple[NDArray[np.float32], float]:
    """The log-mel [C, F] of a waveform [S] in dB relative to its peak, and its seconds.

    There are at most COLUMNS columns; each is the mean power of its frames. The peak is at least
    DYNAMIC_RANGE_DB above the floor of the feature, so that silence is at the bottom of the
    scale.
    """
    num_frames = max(1, feature.real_frames(len(waveform), len(waveform)))
    columns = min(num_frames, COLUMNS)
    first = np.arange(columns) * num_frames // columns  # each column's first frame
    power = np.zeros((columns, feature.num_mels))
    decibels = 10.0 / math.log(10.0) if feature.kaldi else 1.0
    at = 0
    for block in log_mel_blocks(waveform, feature, num_frames):
        column = np.searchsorted(first, np.arange(at, at + len(block)), side="right") - 1
        np.add.at(power, column, 10.0 ** (block.astype(np.float64) * (decibels / 10.0)))
        at += len(block)
    power /= np.diff(np.append(first, num_frames))[:, None]
    level = 10.0 * np.log10(power)
    peak = max(float(level.max()), 10.0 * math.log10(feature.floor) + DYNAMIC_RANGE_DB)
    seconds = num_frames * feature.hop_samples / feature.sample_rate
    return (level - peak).astype(np.float32), seconds


def timeline(found: Prediction, tags: list[int]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Probabilities of ``tags`` over time, [len(tags), cells], and the cells' edges in seconds.

    Where windows overlap, the one with the nearest middle is shown; a gap between windows is NaN.
    If there are more than COLUMNS windows, a cell is the maximum over several of them.
    """
    values = found.probabilities[:, tags].astype(np.float64).T
    starts, ends = found.starts, found.ends
    share = -(-len(starts) // COLUMNS)
    if share > 1:
        firsts = np.arange(0, len(starts), share)
        values = np.maximum.reduceat(values, firsts, axis=1)
        lasts = np.append(firsts[1:], len(starts)) - 1
        starts, ends = starts[firsts], ends[lasts]
    middles = (starts + ends) / 2
    between = (middles[1:] + middles[:-1]) / 2
    left = np.maximum(np.append(starts[0], between), starts)
    right = np.minimum(np.append(between, ends[-1]), ends)
    edges, out = [left[0]], []
    for i in range(len(left)):
        if left[i] > edges[-1] + 1e-9:
            edges.append(left[i])
            out.append(np.full(len(tags), np.nan))
        edges.append(right[i])
        out.append(values[:, i])
    return np.stack(out, axis=1), np.array(edges)


def _write_values(
    axes: Axes, values: NDArray[np.float64], edges: NDArray[np.float64], seconds: float
) -> bool:
    """Writes the numbers into the cells if all are wide enough. Returns whether they are."""
    if (np.diff(edges) < seconds / 24).any():
        return False
    axes.vlines(edges[1:-1], 0, len(values), color="white", linewidth=1.0)
    for column, middle in enumerate((edges[1:] + edges[:-1]) / 2):
        for row, p in enumerate(values[:, column]):
            if not math.isnan(p):
                color = "white" if p > 0.55 else INK
                axes.text(
                    middle, row + 0.5, f"{p:.2f}", ha="center", va="center", fontsize=8, color=color
                )
    return True


def _bin_of(hz: float, feature: Feature) -> float:
    """The position of a frequency on the axis of mel bins, clipped to the end of the axis."""
    scale: Literal["htk", "slaney"] = "htk" if feature.kaldi else "slaney"
    low, at, high = hz_to_mel(np.array([feature.min_hz, hz, feature.max_hz]), scale)
    place = (at - low) / (high - low) * (feature.num_mels + 1) - 1
    return min(float(place), feature.num_mels - 0.5)


def _hz(hz: int) -> str:
    return f"{hz // 1000}k" if hz >= 1000 else str(hz)


def _short(name: str, length: int = NAME_LENGTH) -> str:
    name = printable_name(name)
    return name if len(name) <= length else name[: length - 1].rstrip() + "…"


def printable_name(name: str) -> str:
    """The name of a file or class in a form that a picture can show."""
    return one_line(name).encode(errors="replace").decode()


def _length(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds < 60 else f"{clock(seconds)} min"


def _time_ticks(axes: Axes, seconds: float) -> None:
    """Ticks in seconds; from a minute on as min:s at round steps."""
    if seconds < 60:
        axes.xaxis.set_major_locator(MaxNLocator(10))
        return
    steps = (5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400)
    step = next((s for s in steps if seconds / s <= 12), 28800)
    axes.set_xticks(np.arange(0.0, seconds + 1e-9, step))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: clock(x)))
