"""Tagging metrics: mAP, AUC and d', by scikit-learn's definitions."""

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score, roc_auc_score


@dataclass(frozen=True)
class TaggingMetrics:
    """Scores over the classes that the evaluation set has a positive for."""

    mAP: float
    """Unweighted mean of the classes' average precision."""
    AUC: float
    """Unweighted mean of the areas under the ROC curve; NaN when no class has a negative."""
    d_prime: float
    """sqrt(2) times the normal quantile of AUC."""
    classes_scored: int
    average_precision: NDArray[np.float64]  # [K], NaN for a class left out
    auc: NDArray[np.float64]  # [K], NaN for a class left out


def tagging_metrics(scores: NDArray[np.float32], targets: NDArray[np.bool_]) -> TaggingMetrics:
    """Metrics of clip scores against labels. [N, K] both; any monotone score serves.

    Classes without a positive are left out. Raises ValueError when shapes differ, a score is not
    finite, or no class has a positive.
    """
    if scores.shape != targets.shape or scores.ndim != 2:
        raise ValueError(f"scores {scores.shape} and targets {targets.shape} must both be [N, K]")
    if not np.isfinite(scores).all():
        raise ValueError("scores must be finite")
    K = scores.shape[1]
    ap, auc = np.full(K, np.nan), np.full(K, np.nan)
    for k in range(K):
        positives = int(targets[:, k].sum())
        if positives:
            ap[k] = average_precision_score(targets[:, k], scores[:, k])
            if positives < len(targets):
                auc[k] = roc_auc_score(targets[:, k], scores[:, k])
    scored = np.isfinite(ap)
    if not scored.any():
        raise ValueError("no class has a positive clip: nothing to score")
    mean_auc = float(np.nanmean(auc)) if np.isfinite(auc).any() else math.nan
    return TaggingMetrics(
        mAP=float(ap[scored].mean()),
        AUC=mean_auc,
        d_prime=_d_prime(mean_auc),
        classes_scored=int(scored.sum()),
        average_precision=ap,
        auc=auc,
    )


def _d_prime(auc: float) -> float:
    if not 0 < auc < 1:
        return math.nan if math.isnan(auc) else math.copysign(math.inf, auc - 0.5)
    return math.sqrt(2) * NormalDist().inv_cdf(auc)
