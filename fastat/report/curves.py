"""Average precision, AUC and the precision-recall curve of every class, from a sort each."""

from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
from numpy.typing import NDArray

from fastat.data.shards import H5PY_ERRORS
from fastat.errors import Failure, first_line

MAX_POINTS = 200
"""Of a class's curve on the page; they are spread evenly over its recall."""


@dataclass(frozen=True)
class ClassCurve:
    """A class's scores against its labels; NaN and no points for a class without a positive.

    A point is a threshold at which recall rises. Precision is ``hits / chosen`` and recall
    ``hits / positives``, so that the curve is exact in whole numbers.
    """

    positives: int
    average_precision: float
    """By scikit-learn's definition."""
    auc: float
    """NaN, too, for a class without a negative."""
    hits: NDArray[np.int64]  # [P] positives among the clips chosen
    chosen: NDArray[np.int64]  # [P] clips that score at least the threshold
    thresholds: NDArray[np.float32]  # [P] falling


@dataclass(frozen=True)
class Predictions:
    """What ``predictions.h5`` says. N clips, K classes."""

    ids: list[str]
    names: list[str]
    clips: list[str]
    """Their names."""
    curves: list[ClassCurve]

    @property
    def average_precision(self) -> NDArray[np.float64]:
        """[K], NaN for a class without a positive."""
        return np.array([c.average_precision for c in self.curves])


def class_curve(
    score: NDArray[np.float32], target: NDArray[np.bool_], max_points: int = MAX_POINTS
) -> ClassCurve:
    """The curve of one class. [N] both; clips of equal score are chosen together."""
    order = np.argsort(-score, kind="stable")
    score, target = score[order], target[order]
    ends = np.append(np.flatnonzero(np.diff(score)), len(score) - 1)
    hits, chosen = np.cumsum(target)[ends], ends + 1
    positives = int(hits[-1])
    if not positives:
        none = np.empty(0, np.int64)
        return ClassCurve(0, np.nan, np.nan, none, none, np.empty(0, np.float32))
    rises = np.diff(hits, prepend=0)
    ap = float((rises * (hits / chosen)).sum() / positives)
    negatives = len(target) - positives
    auc = np.nan
    if negatives:
        area = np.trapezoid(np.append(0, hits), np.append(0, chosen - hits))
        auc = float(area / (positives * negatives))
    kept = np.flatnonzero(rises)
    if len(kept) > max_points:
        kept = kept[np.linspace(0, len(kept) - 1, max_points).round().astype(np.int64)]
    return ClassCurve(positives, ap, auc, hits[kept], chosen[kept], score[ends][kept])


def read_predictions(path: Path) -> Predictions:
    """The curves of ``predictions.h5``, as training and ``fastat eval --predictions`` write it.

    Raises:
        Failure: it cannot be read, or does not hold together.
    """
    try:
        with h5py.File(path) as file:
            shapes = {name: file[name].shape for name in ("probability", "target")}
            counts = (len(file["audio_name"]), len(file["class_id"]))
            if set(shapes.values()) != {counts} or len(file["class_name"]) != counts[1]:
                raise ValueError(f"its parts are of different sizes: {shapes}, {counts} names")
            if not all(counts):
                raise ValueError("it holds no clip or no class")
            probability = np.ascontiguousarray(file["probability"][:].T.astype(np.float32))
            target = np.ascontiguousarray(file["target"][:].T > 0)
            clips, ids, names = (
                file[name].asstr(errors="replace")[:].tolist()
                for name in ("audio_name", "class_id", "class_name")
            )
    except H5PY_ERRORS as error:
        raise Failure(f"{path} is damaged: {first_line(error)}") from error
    if not np.isfinite(probability).all():
        raise Failure(f"{path} is damaged: a score is not finite")
    curves = [class_curve(p, t) for p, t in zip(probability, target, strict=True)]
    return Predictions(ids, names, clips, curves)
