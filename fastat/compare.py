"""Two models on the same clips: is one better, or were the clips kind to it? ``fastat compare``.

A paired bootstrap (Efron and Tibshirani, "An Introduction to the Bootstrap", 1993): the clips of
the evaluation set are drawn anew with replacement, as many as there are, and both models are scored
on each draw. The spread of the difference over the draws is what another evaluation set of the same
kind would change about it. What another training seed would change is not in it.

Resamples score higher than sets of their size do: a positive that is drawn twice ranks above
itself. With AudioSet's rare classes that is as much as the spread, so that only the spread about
the resamples' mean is taken of them, and laid about the score of the set itself.
"""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from fastat.errors import UserError
from fastat.predictions import Predictions

BLOCK = 500
"""Resamples computed at a time: their weights of AudioSet's evaluation clips are 40 MB."""


@dataclass(frozen=True)
class Pair:
    """What two files of predictions share, in one order."""

    a: NDArray[np.float32]  # [N, K] logits
    b: NDArray[np.float32]  # [N, K] logits
    target: NDArray[np.bool_]  # [N, K]
    ids: list[str]
    class_names: list[str]
    clips_left_out: tuple[int, int]
    """Of each file, the clips that the other does not have."""
    classes_left_out: tuple[int, int]


def pair(a: Predictions, b: Predictions) -> Pair:
    """Clips matched by name, classes by id.

    Clips of one name are matched in their order, where both have as many of them.

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
    """Every clip as name, which of that name, and how many there are."""
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
    """Average precision of one class under many weightings of its clips, [R].

    Equal to scikit-learn's ``average_precision_score(..., sample_weight=weights[:, r])``, ties
    included. Precision is needed only where recall rises, at the distinct scores of positives: the
    clips are counted into the gaps between those, which is one sparse product for all weightings.

    Args:
        scores, positive: [N].
        weights: [N, R], whole numbers >= 0, of sums below 2^24.

    Returns:
        NaN where no positive has weight.
    """
    steps = np.unique(scores[positive])[::-1]  # [G], from the highest
    if not len(steps):
        return np.full(weights.shape[1], np.nan)
    # The step at which a clip is first counted; beyond the last one it never is.
    step = len(steps) - np.searchsorted(steps[::-1], scores, side="right")
    counted = _sums_by(step, len(steps), weights)
    found = _sums_by(np.where(positive, step, len(steps)), len(steps), weights)
    clips, hits = counted.cumsum(0, np.float64), found.cumsum(0, np.float64)
    # Where no clip has weight yet, none is found either.
    total = (found * (hits / np.maximum(clips, 1.0))).sum(0)
    out = np.full(weights.shape[1], np.nan)
    np.divide(total, hits[-1], out=out, where=hits[-1] > 0)
    return out


def _sums_by(
    group: NDArray[np.int64],
    num_groups: int,
    weights: NDArray[np.float32],
) -> NDArray[np.float32]:
    """[num_groups, R]: the sums of the rows of ``weights`` in each group; others are left out."""
    order = np.argsort(group, kind="stable")
    starts = np.searchsorted(group[order], np.arange(num_groups + 1))
    order = order[: starts[-1]]
    ones = np.ones(len(order), np.float32)
    matrix = csr_array((ones, order, starts), shape=(num_groups, len(weights)))
    sums: NDArray[np.float32] = matrix @ weights
    return sums


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval: the percentiles 2.5 and 97.5 over the centred resamples.

    NaN where there is nothing to take them of.
    """

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class ClassChange:
    """How a class fares under both models."""

    id: str
    name: str
    positives: int
    ap_a: float
    ap_b: float
    difference: Estimate
    """b minus a. The interval is the class's own: of 527 classes, 26 exclude 0 by chance."""


@dataclass(frozen=True)
class Comparison:
    """Model b against model a on the clips and classes that both scored."""

    map_a: Estimate
    map_b: Estimate
    difference: Estimate
    """mAP of b minus that of a."""
    percent: Estimate
    """The same in percent of a's mAP."""
    p: float
    """Two-sided: twice the share of centred resamples with the difference across 0."""
    clips: int
    classes: int
    classes_scored: int
    """Those that have a positive clip."""
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

    A class without a positive in a resample is left out of that resample's mean for both.

    Args:
        advance: hears of classes done, ``passes(resamples)`` times each.

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
    kept = classes_drawn > 0  # of a handful of clips, a resample may have no positive at all
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
    """[2, len(classes), R]: of model a and of model b."""
    ap = np.empty((2, len(classes), weights.shape[1]))
    for i, k in enumerate(classes):
        for model, scores in enumerate((both.a, both.b)):
            ap[model, i] = weighted_average_precision(scores[:, k], both.target[:, k], weights)
        advance(1)
    return ap


def passes(resamples: int) -> int:
    """How often ``compare`` comes by each class."""
    return -(-resamples // BLOCK)


def _estimate(value: float, resampled: NDArray[np.float64]) -> Estimate:
    if not len(resampled):
        return Estimate(value, math.nan, math.nan)
    low, high = np.percentile(_centred(value, resampled), (2.5, 97.5))
    return Estimate(value, float(low), float(high))


def _centred(value: float, resampled: NDArray[np.float64]) -> NDArray[np.float64]:
    """``resampled`` without its bias: about ``value``."""
    centred: NDArray[np.float64] = resampled - resampled.mean() + value
    return centred
