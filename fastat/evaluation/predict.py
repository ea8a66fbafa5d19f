"""Tags and embeddings of audio files of any length, rate and format: ``fastat predict`` and
``fastat extract --embedding``.

A file is rounded to int16, as in packing, and cut into windows of the length that the model was
trained on. A window is scored like a clip of an evaluation set. A class's score in the file is the
largest one of the windows, because AudioSet tags a clip with what is heard anywhere in it. The mean
over the windows is given too: it says how much of the file has the tag.
"""

import json
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.special import expit
from torch import Tensor

from fastat.audio.bad_audio import BadAudio
from fastat.audio.features import FEATURES
from fastat.evaluation.extract import BadFiles, output_names, read_waveform, write_arrays
from fastat.system import display
from fastat.system.device import autocast, choose_precision, default_device, set_products
from fastat.system.errors import UserError, one_line
from fastat.system.outputs import check_output
from fastat.system.progress import progress
from fastat.weights.checkpoint import ModelMeta, build_frontend, load_model

BATCH = 16
"""Number of windows scored at a time."""

LONG_FILE = 4 * BATCH
"""Number of windows from which a file gets a progress display of its own."""


def window_starts(num_samples: int, window: int, hop: int) -> NDArray[np.int64]:
    """First samples of the windows over ``num_samples``, [W], at least one.

    Windows start every ``hop`` samples as long as they end before the file; the last one ends with
    the file, so that it is full too. A file of up to a window's length has one window.
    """
    last = num_samples - window
    if last <= 0:
        return np.zeros(1, np.int64)
    return np.append(np.arange(0, last, hop, dtype=np.int64), last)


@dataclass(frozen=True)
class Prediction:
    """Scores of a file: W windows, K classes."""

    path: Path
    seconds: float
    starts: NDArray[np.float64]  # [W] seconds
    ends: NDArray[np.float64]  # [W] seconds
    logits: NDArray[np.float32]  # [W, K]
    """Classes are ranked by logits: float32 probabilities of logits above 17 are all 1."""

    @property
    def probabilities(self) -> NDArray[np.float32]:
        """[W, K]."""
        return _probabilities(self.logits)

    @property
    def overall(self) -> NDArray[np.float32]:
        """[K] probability that the class is anywhere in the file."""
        return _probabilities(self.logits.max(0))

    def strongest(self, top: int) -> list[int]:
        """The ``top`` classes of the file, the most probable first."""
        return _strongest(self.logits.max(0), top)


def _probabilities(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    found: NDArray[np.float32] = expit(logits)
    return found


def _strongest(logits: NDArray[np.float32], top: int) -> list[int]:
    order: list[int] = np.argsort(-logits, kind="stable")[:top].tolist()
    return order


class Tagger:
    """A trained model, ready for waveforms of any length."""

    def __init__(self, run: Path, precision: str = "auto") -> None:
        """Raises UserError if there is no checkpoint, Failure if it is damaged."""
        self.device = default_device()
        self.precision = choose_precision(precision, self.device)
        set_products(self.precision)
        self.model, self.meta = load_model(run, self.device)
        self.frontend = build_frontend(self.meta).to(self.device)
        self.sample_rate = FEATURES[self.meta.feature].sample_rate

    def tag(
        self,
        path: Path,
        waveform: NDArray[np.int16],  # [S]
        *,
        hop_seconds: float | None = None,
        show_progress: bool = False,
    ) -> Prediction:
        """Scores the windows of ``waveform``, ``hop_seconds`` apart, by default end to end."""
        starts = self._starts(waveform, hop_seconds)
        ends = np.minimum(starts + self.meta.clip_samples, len(waveform))
        title = f"tagging {path.name}" if show_progress else None
        return Prediction(
            path=path,
            seconds=len(waveform) / self.sample_rate,
            starts=starts / self.sample_rate,
            ends=ends / self.sample_rate,
            logits=self._over_windows(self.model, waveform, starts, title),
        )

    def embed(
        self,
        path: Path,
        waveform: NDArray[np.int16],  # [S]
        *,
        hop_seconds: float | None = None,
        show_progress: bool = False,
    ) -> NDArray[np.float32]:
        """The model's embedding of each window of ``waveform``, [W, E]."""
        title = f"embedding {path.name}" if show_progress else None
        starts = self._starts(waveform, hop_seconds)
        return self._over_windows(self.model.embed, waveform, starts, title)

    def _starts(self, waveform: NDArray[np.int16], hop_seconds: float | None) -> NDArray[np.int64]:
        window = self.meta.clip_samples
        hop = window if hop_seconds is None else max(1, round(hop_seconds * self.sample_rate))
        return window_starts(len(waveform), window, hop)

    @torch.inference_mode()
    def _over_windows(
        self,
        function: Callable[[Tensor], Tensor],  # [B, T, F] -> [B, ...]
        waveform: NDArray[np.int16],  # [S]
        starts: NDArray[np.int64],  # [W]
        title: str | None,
    ) -> NDArray[np.float32]:
        """[W, ...]: ``function`` of each window's features, with progress over a long file."""
        window = self.meta.clip_samples
        samples = torch.from_numpy(waveform)
        out = []
        show = title is not None and len(starts) >= LONG_FILE
        with progress(title or "", len(starts), "windows") if show else nullcontext() as advance:
            for i in range(0, len(starts), BATCH):
                clips = [samples[start : start + window] for start in starts[i : i + BATCH]]
                num_samples = torch.tensor([len(clip) for clip in clips])
                batch = torch.stack([F.pad(clip, (0, window - len(clip))) for clip in clips])
                features = self.frontend(batch.to(self.device), num_samples.to(self.device))
                with autocast(self.device, self.precision):
                    values = function(features)
                out.append(values.float().cpu())
                if advance is not None:
                    advance(len(batch))
        outputs: NDArray[np.float32] = torch.cat(out).numpy()
        return outputs


def check_hop(hop_seconds: float | None) -> None:
    """Raises UserError for a --hop-seconds that is not positive and finite."""
    if hop_seconds is not None and not 0 < hop_seconds < math.inf:
        raise UserError(f"--hop-seconds must be a positive number, got {hop_seconds}")


def predict_files(
    run: Path,
    files: list[Path],
    *,
    top: int,
    hop_seconds: float | None,
    plot: Path | None,
    precision: str = "auto",
    as_json: bool,
) -> None:
    """``fastat predict``: the tags of each file on standard output, and its picture.

    With several files each has a picture of its own, <plot>-<stem>.png.

    Raises:
        UserError: a value out of range, no checkpoint, or the only file does not exist.
        Failure: some files could not be read (the others are tagged), or a picture not written.
    """
    if top < 1:
        raise UserError(f"--top must be at least 1, got {top}")
    check_hop(hop_seconds)
    pictures = [None] * len(files) if plot is None else _pictures(files, plot)
    bad = BadFiles(files)
    tagger = Tagger(run, precision)
    documents: list[dict[str, Any]] = []
    # Tables appear as files are done, a JSON document only at the end: it needs a progress display.
    over_files = as_json and len(files) > 1
    bar = progress("tagging", len(files), "files")
    with bar if over_files else nullcontext() as advance:
        for path, picture in zip(files, pictures, strict=True):
            try:
                waveform = read_waveform(path)
            except BadAudio as error:
                bad.add(path, error)
                documents.append(
                    {"file": str(path), "error": str(error), "tags": [], "windows": []}
                )
            else:
                found = tagger.tag(
                    path, waveform, hop_seconds=hop_seconds, show_progress=not over_files
                )
                if picture is not None:
                    from fastat.evaluation.plot import (
                        plot_prediction,  # matplotlib takes half a second
                    )

                    plot_prediction(picture, found, waveform, tagger.meta, top)
                if as_json:
                    documents.append(as_document(found, tagger.meta, top))
                else:
                    _show(found, tagger.meta, top)
            if advance is not None:
                advance()
    if as_json:
        print(json.dumps(documents))
    bad.finish()


def embed_files(
    files: list[Path], run: Path, out: Path, hop_seconds: float | None, precision: str = "auto"
) -> None:
    """Writes each file's embeddings to ``out``/<stem>.npy, [W, E] float32, a row for each window.

    A window has the length of the clips the model was trained on; the last one ends with the file.

    Raises:
        UserError: no checkpoint, two files of one stem, or the only file does not exist.
        Failure: some files could not be read (the others are written), or a write failed.
    """
    check_hop(hop_seconds)
    tagger = Tagger(run, precision)
    write_arrays(
        files,
        out,
        lambda path, waveform: tagger.embed(
            path, waveform, hop_seconds=hop_seconds, show_progress=len(files) == 1
        ),
    )


def _pictures(files: list[Path], plot: Path) -> list[Path]:
    """Paths of the files' pictures, checked before any work is done."""
    if plot.suffix.lower() != ".png":
        raise UserError(f"--plot writes PNG: expected a name that ends in .png, got {plot}")
    if len(files) == 1:
        paths = [plot]
    else:
        paths = [plot.with_name(n) for n in output_names(files, f"{plot.stem}-", plot.suffix)]
    for path in paths:
        check_output("--plot", path)
    return paths


# --------------------------------------------------------------------------------------- output
def as_document(found: Prediction, meta: ModelMeta, top: int) -> dict[str, Any]:
    """The entry of a file in ``--json``: its ``top`` tags, and those of every window."""

    def tags(logits: NDArray[np.float32]) -> list[dict[str, Any]]:
        probabilities = _probabilities(logits)
        return [
            meta.classes[k]._asdict() | {"probability": float(probabilities[k])}
            for k in _strongest(logits, top)
        ]

    mean = found.probabilities.mean(0)
    strongest = found.strongest(top)
    windows = zip(found.starts, found.ends, found.logits, strict=True)
    return {
        "file": str(found.path),
        "seconds": found.seconds,
        "tags": [
            tag | {"mean_probability": float(mean[k])}
            for tag, k in zip(tags(found.logits.max(0)), strongest, strict=True)
        ],
        "windows": [
            {"start": float(start), "end": float(end), "tags": tags(x)} for start, end, x in windows
        ],
    }


def clock(seconds: float) -> str:
    """A time in a file: 0:07, 12:30, 1:02:03; below ten seconds with tenths, unless they are 0."""
    if seconds < 9.95 and round(seconds, 1) % 1:
        return f"0:{seconds:04.1f}"
    return display.clock(seconds)


def _show(found: Prediction, meta: ModelMeta, top: int) -> None:
    """Prints a file's tags, one a line: probability, name and time of the strongest window."""
    count = len(found.starts)
    windows = "1 window" if count == 1 else f"{count} windows"
    print(f"{one_line(str(found.path))}  ({clock(found.seconds)}, {windows})")
    tags = found.strongest(top)
    names = [one_line(meta.classes[k].name) for k in tags]
    width = max(map(len, names))
    for name, k in zip(names, tags, strict=True):
        line = f"  {found.overall[k]:.3f}  {name:{width}}"
        if count > 1:
            peak = found.logits[:, k].argmax()
            line += f"  {clock(found.starts[peak])}-{clock(found.ends[peak])}"
        print(line.rstrip())
