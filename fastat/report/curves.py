"""Average precision, AUC and the precision-recall curve of every class, from a sort each."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fastat.predictions import Predictions

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
    thresholds: NDArray[np.float32]  # [P] falling, logits


@dataclass(frozen=True)
class Curves:
    """What ``predictions.h5`` says of K classes."""

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


def class_curves(predictions: Predictions) -> Curves:
    """The curves of every class that ``predictions.h5`` has."""
    p = predictions
    curves = [
        class_curve(np.ascontiguousarray(logit), target)
        for logit, target in zip(p.logit.T, p.target.T, strict=True)
    ]
    return Curves(p.ids, p.class_names, p.names, curves)
