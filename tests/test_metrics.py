"""mAP, AUC and d': against scikit-learn, and against what a person gets by counting."""

import math

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import norm
from sklearn.metrics import average_precision_score, roc_auc_score

from fastat.evaluation.metrics import tagging_metrics


def random_case(
    seed: int, clips: int, classes: int
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Many tied scores; class 0 has no positives, class 1 no negatives."""
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 12, (clips, classes)).astype(np.float32) / np.float32(11)
    targets = rng.random((clips, classes)) < rng.random(classes) * 0.5 + 0.05
    targets[0] = True
    targets[:, 0] = False
    targets[:, 1] = True
    return scores, targets


@pytest.mark.parametrize("seed", range(5))
def test_equal_to_scikit_learn(seed: int) -> None:
    scores, targets = random_case(seed, clips=97, classes=23)
    got = tagging_metrics(scores, targets)
    # Its macro averages need every class to have positives (and, for AUC, negatives).
    some = targets.any(0)
    both = some & ~targets.all(0)
    mean_ap = average_precision_score(targets[:, some], scores[:, some], average="macro")
    auc = roc_auc_score(targets[:, both], scores[:, both], average="macro")
    assert got.mAP == pytest.approx(mean_ap, abs=1e-6)
    assert got.AUC == pytest.approx(auc, abs=1e-6)
    assert got.d_prime == pytest.approx(math.sqrt(2) * norm.ppf(auc), abs=1e-6)
    assert got.classes_scored == some.sum() == 22
    np.testing.assert_array_equal(np.isnan(got.average_precision), ~some)
    np.testing.assert_array_equal(np.isnan(got.auc), ~both)


def counted_ap(scores: NDArray[np.float32], targets: NDArray[np.bool_]) -> float:
    """Sum over thresholds, from the highest, of precision times the recall gained."""
    total, recall_before = 0.0, 0.0
    for threshold in sorted(set(scores.tolist()), reverse=True):
        chosen = scores >= threshold
        hits = int((chosen & targets).sum())
        recall = hits / targets.sum()
        total += hits / chosen.sum() * (recall - recall_before)
        recall_before = recall
    return total


def counted_auc(scores: NDArray[np.float32], targets: NDArray[np.bool_]) -> float:
    """Share of (positive, negative) pairs in the right order; a tie is half right."""
    pairs = scores[targets][:, None] - scores[~targets][None, :]
    return float(((pairs > 0) + 0.5 * (pairs == 0)).mean())


def test_equal_to_counting() -> None:
    scores, targets = random_case(99, clips=60, classes=9)
    got = tagging_metrics(scores, targets)
    for k in range(1, 9):
        assert got.average_precision[k] == pytest.approx(counted_ap(scores[:, k], targets[:, k]))
        if k > 1:
            assert got.auc[k] == pytest.approx(counted_auc(scores[:, k], targets[:, k]))


def test_a_case_worked_by_hand() -> None:
    """Class 0: positives ranked 1 and 3 of 4, AP = (1/1 + 2/3) / 2. Class 1: ranked last of 4."""
    scores = np.array([[0.9, 0.1], [0.7, 0.5], [0.5, 0.7], [0.3, 0.9]], np.float32)
    targets = np.array([[1, 1], [0, 0], [1, 0], [0, 0]], bool)
    got = tagging_metrics(scores, targets)
    assert got.average_precision.tolist() == pytest.approx([5 / 6, 1 / 4])
    assert got.auc.tolist() == pytest.approx([3 / 4, 0.0])
    assert got.mAP == pytest.approx(13 / 24)
    assert got.AUC == pytest.approx(3 / 8)
    assert got.d_prime == pytest.approx(math.sqrt(2) * norm.ppf(3 / 8))


@pytest.mark.parametrize(("auc_of", "d_prime"), [("perfect", math.inf), ("inverted", -math.inf)])
def test_d_prime_at_the_ends(auc_of: str, d_prime: float) -> None:
    targets = np.array([[True], [False]])
    scores = np.array([[1.0], [0.0]], np.float32)
    got = tagging_metrics(scores if auc_of == "perfect" else -scores, targets)
    assert got.d_prime == d_prime


def test_any_monotone_score_serves() -> None:
    scores, targets = random_case(3, clips=40, classes=6)
    logits = (7 * scores - 3).astype(np.float32)
    assert tagging_metrics(logits, targets).mAP == tagging_metrics(scores, targets).mAP


def test_without_negatives_there_is_no_auc() -> None:
    got = tagging_metrics(np.array([[0.3], [0.4]], np.float32), np.ones((2, 1), bool))
    assert (got.mAP, got.classes_scored) == (1.0, 1)
    assert math.isnan(got.AUC) and math.isnan(got.d_prime)


def test_bad_input() -> None:
    scores, targets = random_case(0, clips=10, classes=4)
    with pytest.raises(ValueError, match=r"\[N, K\]"):
        tagging_metrics(scores, targets[:5])
    with pytest.raises(ValueError, match=r"\[N, K\]"):
        tagging_metrics(scores[:, 2], targets[:, 2])
    with pytest.raises(ValueError, match="no class has a positive"):
        tagging_metrics(scores, np.zeros_like(targets))
    scores[3, 2] = np.nan
    with pytest.raises(ValueError, match="finite"):
        tagging_metrics(scores, targets)
