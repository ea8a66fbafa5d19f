"""Average precision, AUC and the precision-recall curve of every class, by scikit-learn."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import precision_recall_curve

from fastat.evaluation.metrics import tagging_metrics
from fastat.evaluation.predictions import Predictions

MAX_POINTS = 200
"""Points of one curve on the page at most, spread evenly over the recall."""


@dataclass(frozen=True)
class Curve:
    """The precision-recall curve of one class: the thresholds at which recall rises.

    Precision is ``hits / selected``; recall is ``hits`` divided by the positives of the class. All
    three arrays are empty for a class without a positive.
    """

    hits: NDArray[np.int64]  # [P] positives among the selected clips, rising
    selected: NDArray[np.int64]  # [P] clips that score at least the threshold
    thresholds: NDArray[np.float32]  # [P] logits, falling


@dataclass(frozen=True)
class Curves:
    """Scores and curves of the K classes of ``predictions.h5``."""

    ids: list[str]
    names: list[str]
    clips: list[str]
    """Names of the clips."""
    positives: NDArray[np.int64]  # [K]
    average_precision: NDArray[np.float64]  # [K], NaN for a class without a positive
    auc: NDArray[np.float64]  # [K], NaN also for a class without a negative
    curves: list[Curve]


def class_curves(predictions: Predictions) -> Curves:
    """The scores and curves of every class. Raises ValueError when no class has a positive."""
    p = predictions
    metrics = tagging_metrics(p.logit, p.target)
    curves = [
        precision_recall(np.ascontiguousarray(logit), target)
        for logit, target in zip(p.logit.T, p.target.T, strict=True)
    ]
    return Curves(
        ids=p.ids,
        names=p.class_names,
        clips=p.names,
        positives=p.target.sum(0),
        average_precision=metrics.average_precision,
        auc=metrics.auc,
        curves=curves,
    )


def precision_recall(
    score: NDArray[np.float32],  # [N]
    target: NDArray[np.bool_],  # [N]
    max_points: int = MAX_POINTS,
) -> Curve:
    """The curve of one class. Clips with equal scores are selected together."""
    positives = int(target.sum())
    if not positives:
        none = np.empty(0, np.int64)
        return Curve(none, none, np.empty(0, np.float32))
    precision, recall, thresholds = precision_recall_curve(target, score)
    kept = np.flatnonzero(np.diff(recall))[::-1]  # scikit-learn's thresholds rise
    if len(kept) > max_points:
        kept = kept[np.linspace(0, len(kept) - 1, max_points).round().astype(np.int64)]
    hits = np.rint(recall[kept] * positives)
    selected = np.rint(hits / precision[kept])
    return Curve(hits.astype(np.int64), selected.astype(np.int64), thresholds[kept])
