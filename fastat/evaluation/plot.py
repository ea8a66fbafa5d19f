"""The picture of a prediction: the log-mel of the file above a timeline of its strongest tags.

matplotlib's Agg canvas, without pyplot: no display, no global state.
"""

import math
import warnings
from pathlib import Path
from typing import Literal

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from fastat.audio.features import FEATURES, Feature, hz_to_mel
from fastat.evaluation.extract import log_mel_blocks
from fastat.evaluation.predict import Prediction, clock
from fastat.system.errors import one_line
from fastat.system.outputs import written
from fastat.weights.checkpoint import ModelMeta

COLUMNS = 1600
"""Largest number of columns of the log-mel. In a longer file, each shows the mean of its frames."""

MAX_TAGS = 30
"""Largest number of rows of the timeline."""

DYNAMIC_RANGE_DB = 80.0
TICKS_HZ = (125, 250, 500, 1000, 2000, 4000, 8000)
NAME_LENGTH = 40


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
    names = [_short(meta.classes[k].name) for k in tags]
    mel_height, tag_height = 3.0, 0.6 + 0.3 * len(tags)  # inches
    figure = Figure(figsize=(11.0, 1.0 + mel_height + tag_height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    mel_axes, tag_axes = figure.subplots(2, 1, sharex=True, height_ratios=(mel_height, tag_height))

    spectrogram, duration = mel_image(waveform, feature)
    image = mel_axes.imshow(
        spectrogram.T,
        origin="lower",
        aspect="auto",
        cmap="magma",
        vmin=-DYNAMIC_RANGE_DB,
        vmax=0.0,
        extent=(0.0, duration, -0.5, feature.num_mels - 0.5),
        interpolation="nearest",
    )
    mel_axes.set_yticks([_bin_of(hz, feature) for hz in TICKS_HZ], [_hz(hz) for hz in TICKS_HZ])
    mel_axes.set_ylabel("frequency (Hz)")
    figure.colorbar(image, ax=mel_axes, label="dB re peak", pad=0.01)

    values, edges = timeline(found, tags)
    cells = tag_axes.pcolormesh(
        edges, np.arange(len(tags) + 1), values, cmap="YlGnBu", vmin=0.0, vmax=1.0, rasterized=True
    )
    tag_axes.set_ylim(len(tags), 0)
    labels = [f"{name}  {found.overall[k]:.2f}" for name, k in zip(names, tags, strict=True)]
    tag_axes.set_yticks(np.arange(len(tags)) + 0.5, labels)
    figure.colorbar(
        cells,
        ax=tag_axes,
        label="probability",
        ticks=(0.0, 1.0),
        pad=0.01,
        aspect=20 * tag_height / mel_height,  # as wide as the bar above
    )

    tag_axes.set_xlim(0.0, found.seconds)
    if found.seconds < 60:
        tag_axes.set_xlabel("time (s)")
    else:
        tag_axes.set_xlabel("time (min:s)")
        tag_axes.xaxis.set_major_locator(MaxNLocator(10, steps=(1, 1.5, 3, 6, 10)))
        tag_axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: clock(x)))
    count = len(found.starts)
    windows = f"{count} window{'s' if count > 1 else ''}"
    title = f"{_short(found.path.name)}, {clock(found.seconds)}, {windows}, {meta.model}"
    for text in (mel_axes.set_title(title), *tag_axes.get_yticklabels()):
        text.set_parse_math(False)  # names may contain dollar signs
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
    """
    values = found.probabilities[:, tags].astype(np.float64).T
    starts, ends = found.starts, found.ends
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


def _bin_of(hz: float, feature: Feature) -> float:
    """The position of a frequency on the axis of mel bins, clipped to the end of the axis."""
    scale: Literal["htk", "slaney"] = "htk" if feature.kaldi else "slaney"
    low, at, high = hz_to_mel(np.array([feature.min_hz, hz, feature.max_hz]), scale)
    place = (at - low) / (high - low) * (feature.num_mels + 1) - 1
    return min(float(place), feature.num_mels - 0.5)


def _hz(hz: int) -> str:
    return f"{hz // 1000}k" if hz >= 1000 else str(hz)


def _short(name: str) -> str:
    name = printable_name(name)
    return name if len(name) <= NAME_LENGTH else f"{name[: NAME_LENGTH - 1]}…"


def printable_name(name: str) -> str:
    """The name of a file or class in a form that a picture can show."""
    return one_line(name).encode(errors="replace").decode()
