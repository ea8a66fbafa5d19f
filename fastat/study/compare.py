"""Is the difference in mAP between two models statistically significant? ``fastat compare``.

A paired bootstrap (Efron and Tibshirani, "An Introduction to the Bootstrap", 1993): the clips of
the evaluation set are resampled with replacement, and both models are scored on each resample. The
spread of the difference over the resamples estimates how much it would vary between evaluation sets
of this kind. It does not include the variation between training seeds.

The mAP of a resample is biased upwards, because a positive that was drawn twice raises the
precision at its own score. With AudioSet's rare classes the bias is as large as the spread.
Therefore the resamples are centred: only their spread about their own mean is used, around the
score of the set.
"""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from fastat.evaluation.predictions import Predictions
from fastat.system.errors import UserError

BLOCK = 500
"""Resamples computed at a time: for the 20,126 evaluation clips of AudioSet, 40 MB of weights."""


@dataclass(frozen=True)
class Pair:
    """The clips and classes that two files of predictions share, in the same order."""

    a: NDArray[np.float32]  # [N, K] logits
    b: NDArray[np.float32]  # [N, K] logits
    target: NDArray[np.bool_]  # [N, K]
    ids: list[str]
    class_names: list[str]
    clips_left_out: tuple[int, int]
    """Number of clips in each file that the other file does not have."""
    classes_left_out: tuple[int, int]
    """Number of classes in each file that the other file does not have."""


def pair(a: Predictions, b: Predictions) -> Pair:
    """Matches clips by name and classes by id.

    Several clips of the same name are matched in order, if both files have equally many of them.

    Raises:
        UserError: they share no clip or class, labels differ, or no shared class has a positive.
    """
    rows = np.array(_shared(_keys(a.names), _keys(b.names)), np.int64)
    columns = np.array(_shared(a.ids, b.ids), np.int64)
    for what, shared, of_a, of_b in (
        ("clip", rows, a.names, b.names),
        ("class", columns, a.ids, b.ids),
    ):
        if not len(shared):
            raise UserError(
                f"{a.path} and {b.path} share no {what}: expected the same evaluation set, got "
                f"{of_a[:1]}, ... ({len(of_a)}) and {of_b[:1]}, ... ({len(of_b)})"
            )
    in_a, in_b = np.ix_(rows[:, 0], columns[:, 0]), np.ix_(rows[:, 1], columns[:, 1])
    target = a.target[in_a]
    different = np.argwhere(target != b.target[in_b])
    if len(different):
        row, column = different[0]
        raise UserError(
            f"{a.path} and {b.path} have different labels in {len(different):,} of "
            f"{target.size:,} places, as clip {a.names[rows[row, 0]]!r}, class "
            f"{a.ids[columns[column, 0]]!r}: score both on one set with fastat eval --predictions"
        )
    if not target.any():
        raise UserError(f"{a.path} and {b.path}: no shared class has a positive clip")
    return Pair(
        a.logit[in_a],
        b.logit[in_b],
        target,
        [a.ids[k] for k in columns[:, 0]],
        [a.class_names[k] for k in columns[:, 0]],
        (len(a.names) - len(rows), len(b.names) - len(rows)),
        (len(a.ids) - len(columns), len(b.ids) - len(columns)),
    )


def _keys(names: list[str]) -> list[tuple[str, int, int]]:
    """For every clip: its name, its index among the clips of that name, and their number."""
    counts, seen = Counter(names), Counter[str]()
    keys = []
    for name in names:
        keys.append((name, seen[name], counts[name]))
        seen[name] += 1
    return keys


def _shared(a: list[Any], b: list[Any]) -> list[tuple[int, int]]:
    where = {key: i for i, key in enumerate(b)}
    return [(i, where[key]) for i, key in enumerate(a) if key in where]


def weighted_average_precision(
    scores: NDArray[np.float32], positive: NDArray[np.bool_], weights: NDArray[np.float32]
) -> NDArray[np.float64]:
    """Average precision [R] of one class under R weightings of its clips.

    Equals scikit-learn's ``average_precision_score(..., sample_weight=weights[:, r])``, also for
    tied scores. Precision is needed only where recall rises, that is at the distinct scores of the
    positives. The clips are counted between those scores by one sparse product for all weightings,
    which is what makes a thousand resamples of 527 classes affordable.

    Args:
        scores, positive: [N].
        weights: [N, R] whole numbers >= 0 whose columns sum to less than 2^24.

    Returns:
        [R], NaN where no positive has weight.
    """
    steps = np.unique(scores[positive])[::-1]  # [G], falling
    if not len(steps):
        return np.full(weights.shape[1], np.nan)
    # The step from which on a clip is counted; len(steps) for a clip that never is.
    step = len(steps) - np.searchsorted(steps[::-1], scores, side="right")
    counted = _sums_by(step, len(steps), weights)
    found = _sums_by(np.where(positive, step, len(steps)), len(steps), weights)
    clips, hits = counted.cumsum(0, np.float64), found.cumsum(0, np.float64)
    # Where no clip has weight yet, ``found`` is 0 too.
    total = (found * (hits / np.maximum(clips, 1.0))).sum(0)
    out = np.full(weights.shape[1], np.nan)
    np.divide(total, hits[-1], out=out, where=hits[-1] > 0)
    return out


def _sums_by(
    group: NDArray[np.int64],
    num_groups: int,
    weights: NDArray[np.float32],
) -> NDArray[np.float32]:
    """Sums of the rows of ``weights`` by group, [num_groups, R], without rows of other groups."""
    order = np.argsort(group, kind="stable")
    starts = np.searchsorted(group[order], np.arange(num_groups + 1))
    order = order[: starts[-1]]
    ones = np.ones(len(order), np.float32)
    matrix = csr_array((ones, order, starts), shape=(num_groups, len(weights)))
    sums: NDArray[np.float32] = matrix @ weights
    return sums


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval: percentiles 2.5 and 97.5 of the centred resamples.

    The interval is NaN if no resample has the number.
    """

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class ClassChange:
    """Average precision of one class under both models."""

    id: str
    name: str
    positives: int
    ap_a: float
    ap_b: float
    difference: Estimate
    """b minus a. The interval is not corrected for the number of classes: of 527 classes without a
    difference, about 26 exclude 0."""


@dataclass(frozen=True)
class Comparison:
    """Model b compared with model a on the clips and classes that both were scored on."""

    map_a: Estimate
    map_b: Estimate
    difference: Estimate
    """mAP of b minus mAP of a."""
    percent: Estimate
    """The difference in percent of a's mAP."""
    p: float
    """Two-sided p-value: twice the share of centred resamples whose difference is across 0."""
    clips: int
    classes: int
    classes_scored: int
    """Classes with a positive clip."""
    clips_left_out: tuple[int, int]
    classes_left_out: tuple[int, int]
    resamples: int
    seed: int
    changes: tuple[ClassChange, ...]
    """Of every scored class, the largest change first."""


def compare(
    a: Predictions,
    b: Predictions,
    *,
    resamples: int = 1000,
    seed: int = 0,
    advance: Callable[[int], object] = lambda classes: None,
) -> Comparison:
    """The paired bootstrap of b against a.

    A class without a positive in a resample is left out of that resample's mean for both models.

    Args:
        advance: called with 1 for every class and block; each class has ``passes(resamples)``.

    Raises:
        UserError: as ``pair``.
    """
    both = pair(a, b)
    scored = np.flatnonzero(both.target.any(0))
    N = len(both.target)
    point = _average_precision(both, scored, np.ones((N, 1), np.float32))[..., 0]
    rng = np.random.default_rng(seed)
    ap = np.empty((2, len(scored), resamples))  # [2, K, R]
    for first in range(0, resamples, BLOCK):
        block = slice(first, min(first + BLOCK, resamples))
        draws = (rng.integers(0, N, N) for _ in range(block.stop - first))
        counts = [np.bincount(draw, minlength=N).astype(np.float32) for draw in draws]
        weights = np.ascontiguousarray(np.array(counts).T)
        ap[..., block] = _average_precision(both, scored, weights, advance)
    drawn = np.isfinite(ap[0])  # [K, R], the same for both models
    classes_drawn = drawn.sum(0)
    kept = classes_drawn > 0  # with a handful of clips, a resample may have no positive at all
    map_a, map_b = np.where(drawn, ap, 0.0).sum(1)[:, kept] / classes_drawn[kept]
    difference = map_b - map_a
    changes = []
    for i, k in enumerate(scored):
        before, after = point[:, i].tolist()
        change = _estimate(after - before, (ap[1, i] - ap[0, i])[drawn[i]])
        positives = int(both.target[:, k].sum())
        changes.append(
            ClassChange(both.ids[k], both.class_names[k], positives, before, after, change)
        )
    before, after = point.mean(1).tolist()
    centred = _centred(after - before, difference)
    other_side = min(int((centred <= 0).sum()), int((centred >= 0).sum()))
    return Comparison(
        map_a=_estimate(before, map_a),
        map_b=_estimate(after, map_b),
        difference=_estimate(after - before, difference),
        percent=_estimate(100 * (after - before) / before, 100 * difference / map_a),
        p=min(1.0, 2 * (other_side + 1) / (len(difference) + 1)),
        clips=N,
        classes=both.target.shape[1],
        classes_scored=len(scored),
        clips_left_out=both.clips_left_out,
        classes_left_out=both.classes_left_out,
        resamples=resamples,
        seed=seed,
        changes=tuple(sorted(changes, key=lambda c: -abs(c.difference.value))),
    )


def _average_precision(
    both: Pair,
    classes: NDArray[np.int64],
    weights: NDArray[np.float32],  # [N, R]
    advance: Callable[[int], object] = lambda classes: None,
) -> NDArray[np.float64]:
    """Average precision of models a and b, [2, len(classes), R]."""
    ap = np.empty((2, len(classes), weights.shape[1]))
    for i, k in enumerate(classes):
        for model, scores in enumerate((both.a, both.b)):
            ap[model, i] = weighted_average_precision(scores[:, k], both.target[:, k], weights)
        advance(1)
    return ap


def passes(resamples: int) -> int:
    """Number of blocks in which ``compare`` computes the resamples."""
    return -(-resamples // BLOCK)


def _estimate(value: float, resampled: NDArray[np.float64]) -> Estimate:
    if not len(resampled):
        return Estimate(value, math.nan, math.nan)
    low, high = np.percentile(_centred(value, resampled), (2.5, 97.5))
    return Estimate(value, float(low), float(high))


def _centred(value: float, resampled: NDArray[np.float64]) -> NDArray[np.float64]:
    """``resampled`` shifted so that its mean is ``value``."""
    centred: NDArray[np.float64] = resampled - resampled.mean() + value
    return centred
