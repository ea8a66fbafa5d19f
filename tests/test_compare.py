"""fastat compare: weighted AP against scikit-learn, the bootstrap against doing it by hand."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.special import expit
from sklearn.metrics import average_precision_score

from fastat.evaluation.predictions import Predictions, read_predictions
from fastat.study.compare import (
    compare,
    pair,
    passes,
    weighted_average_precision,
)
from fastat.system.errors import Failure, UserError
from tests.conftest import fastat, one_line


def predictions(seed: int, *, clips: int = 40, classes: int = 5, skill: float = 1.0) -> Predictions:
    """Scores with ties, the same labels for every seed; the last class has no positive."""
    target = np.random.default_rng(99).random((clips, classes)) < 0.3
    target[:, -1] = False
    noise = np.random.default_rng(seed).standard_normal(target.shape)
    scores = np.round(noise + skill * target).astype(np.float32)
    names = [f"clip-{i}" for i in range(clips)]
    ids = [f"/m/{k}" for k in range(classes)]
    return Predictions(Path(f"run-{seed}"), scores, target, names, ids, [f"Class {i}" for i in ids])


def write(path: Path, p: Predictions) -> Path:
    """As ``save_predictions`` does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file["logit"], file["target"] = p.logit, p.target
        file["probability"] = expit(p.logit)
        for key, values in (
            ("audio_name", p.names),
            ("class_id", p.ids),
            ("class_name", p.class_names),
        ):
            file.create_dataset(key, data=values, dtype=h5py.string_dtype())
    return path


@pytest.mark.parametrize("levels", [3, 12, 10_000])
@pytest.mark.parametrize("num_positives", [1, 7, 60])
def test_weighted_ap_is_scikit_learn_s(levels: int, num_positives: int) -> None:
    rng = np.random.default_rng(levels + num_positives)
    scores = (rng.integers(0, levels, 60) / levels).astype(np.float32)
    positive = np.zeros(60, np.bool_)
    positive[rng.permutation(60)[:num_positives]] = True
    weights = rng.multinomial(60, np.full(60, 1 / 60), 20).T.astype(np.float32)
    weights[:, 0] = 1
    weights[positive, 1] = 0
    got = weighted_average_precision(scores, positive, weights)
    assert np.isnan(got[1])
    for r in range(20):
        if weights[positive, r].any():
            want = average_precision_score(positive, scores, sample_weight=weights[:, r])
            assert got[r] == pytest.approx(want, abs=1e-12)
        else:
            assert np.isnan(got[r])


def test_weighted_ap_of_no_positive_and_of_all() -> None:
    scores = np.array([0.1, 0.5, 0.5], np.float32)
    ones = np.ones((3, 2), np.float32)
    assert np.isnan(weighted_average_precision(scores, np.zeros(3, np.bool_), ones)).all()
    assert weighted_average_precision(scores, np.ones(3, np.bool_), ones).tolist() == [1, 1]


def test_a_weight_is_a_clip_there_so_often() -> None:
    rng = np.random.default_rng(5)
    scores, positive = rng.integers(0, 9, 50).astype(np.float32), rng.random(50) < 0.2
    draw = rng.integers(0, 50, 50)
    weights = np.bincount(draw, minlength=50).astype(np.float32)[:, None]
    want = average_precision_score(positive[draw], scores[draw])
    assert weighted_average_precision(scores, positive, weights)[0] == pytest.approx(want)


def by_hand(a: Predictions, b: Predictions, resamples: int, seed: int) -> NDArray[np.float64]:
    """mAP of both on each resample, scikit-learn's on the clips as they were drawn: [R, 2]."""
    rng = np.random.default_rng(seed)
    out = []
    for _ in range(resamples):
        draw = rng.integers(0, len(a.names), len(a.names))
        target = a.target[draw]
        there = target.any(0)
        out.append(
            [average_precision_score(target[:, there], p.logit[draw][:, there]) for p in (a, b)]
        )
    return np.array(out)


def test_the_bootstrap_is_that_of_drawing_clips(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastat.study.compare.BLOCK", 64)
    a, b = predictions(1), predictions(2, skill=2.0)
    done: list[int] = []
    got = compare(a, b, resamples=150, seed=3, advance=done.append)
    assert sum(done) == 4 * passes(150)
    want = by_hand(a, b, 150, 3)
    point = [average_precision_score(p.target[:, :4], p.logit[:, :4]) for p in (a, b)]
    gained = point[1] - point[0]
    difference = want[:, 1] - want[:, 0]
    for estimate, value, resampled in (
        (got.map_a, point[0], want[:, 0]),
        (got.map_b, point[1], want[:, 1]),
        (got.difference, gained, difference),
        (got.percent, 100 * gained / point[0], 100 * difference / want[:, 0]),
    ):
        low, high = np.percentile(resampled, (2.5, 97.5)) - resampled.mean() + value
        assert [estimate.value, estimate.low, estimate.high] == pytest.approx([value, low, high])
    assert got.p == pytest.approx(
        2 * ((difference - difference.mean() + gained <= 0).sum() + 1) / 151
    )
    assert (got.clips, got.classes, got.classes_scored) == (40, 5, 4)
    largest = [abs(c.difference.value) for c in got.changes]
    assert largest == sorted(largest, reverse=True) and len(largest) == 4
    for c in got.changes:
        k = a.ids.index(c.id)
        assert c.ap_b == pytest.approx(average_precision_score(b.target[:, k], b.logit[:, k]))
        assert c.positives == a.target[:, k].sum()
        assert c.difference.low <= c.difference.value <= c.difference.high


def test_a_model_does_not_differ_from_itself() -> None:
    got = compare(predictions(1), predictions(1), resamples=100)
    assert (got.difference.low, got.difference.high, got.p) == (0, 0, 1)


def test_the_interval_of_an_mAP_is_about_it() -> None:
    """Rare classes: nearly every resample scores higher than the set itself."""
    rng = np.random.default_rng(0)
    target = rng.permuted(np.arange(2000) < np.full((100, 1), 6), axis=1).T
    scores = (rng.standard_normal(target.shape) + 2 * target).astype(np.float32)
    names, ids = [str(i) for i in range(2000)], [str(k) for k in range(100)]
    a = Predictions(Path("a"), scores, target, names, ids, ids)
    got = compare(a, a, resamples=200).map_a
    below, above = got.value - got.low, got.high - got.value
    assert 0.01 < below < 1.5 * above and above < 1.5 * below


def test_a_resample_without_a_positive_counts_nowhere() -> None:
    a = predictions(1, clips=3, classes=2)
    a.target[:] = [[True, False], [False, False], [False, False]]
    got = compare(a, replace(a, logit=a.logit[::-1].copy()), resamples=200)
    assert np.isfinite([got.difference.low, got.difference.high, got.map_a.low]).all()


def test_clips_and_classes_are_matched() -> None:
    """Another order, clips and classes of its own, two clips of one file."""
    a = predictions(1)
    a.names[3] = a.names[2]
    order, columns = np.arange(40)[::-1], [3, 0, 1]
    b = Predictions(
        Path("b"),
        a.logit[order][:38][:, columns],
        a.target[order][:38][:, columns],
        [a.names[i] for i in order][:38],
        [a.ids[k] for k in columns],
        [a.class_names[k] for k in columns],
    )
    # Two clips of one file are told apart by their order, which is b's own here.
    b.logit[[36, 37]], b.target[[36, 37]] = b.logit[[37, 36]], b.target[[37, 36]]
    both = pair(a, b)
    assert (both.clips_left_out, both.classes_left_out) == ((2, 0), (2, 0))
    assert both.ids == ["/m/0", "/m/1", "/m/3"]
    np.testing.assert_array_equal(both.a, both.b)
    assert both.a.shape == (38, 3)


def test_a_file_with_more_clips_in_one_set_is_left_out() -> None:
    a, b = predictions(1), predictions(2)
    a.names[3] = a.names[2]
    assert pair(a, b).clips_left_out == (2, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"names": [f"other-{i}" for i in range(40)]}, "share no clip"),
        ({"ids": list("vwxyz")}, "share no class"),
        ({"target": np.ones((40, 5), np.bool_)}, "have different labels in "),
    ],
)
def test_what_cannot_be_compared(tmp_path: Path, change: dict[str, object], message: str) -> None:
    a = write(tmp_path / "a.h5", predictions(1))
    b = write(tmp_path / "b.h5", replace(predictions(2), **change))  # type: ignore[arg-type]
    with pytest.raises(UserError, match=message):
        pair(read_predictions(a), read_predictions(b))


def test_no_positive_to_share() -> None:
    empty = replace(predictions(1), target=np.zeros((40, 5), np.bool_))
    with pytest.raises(UserError, match="no shared class has a positive"):
        pair(empty, empty)


def test_the_command(tmp_path: Path) -> None:
    """A run folder beside a file; an unscored run, a damaged file and mistakes in one line."""
    write(tmp_path / "run" / "predictions.h5", predictions(1))
    b = write(tmp_path / "b.h5", predictions(2, skill=3.0))
    args = ("compare", tmp_path / "run", b, "--resamples", 200, "--seed", 4)
    document = json.loads(fastat(*args, "--top", 2, "--json").stdout)
    want = compare(predictions(1), predictions(2, skill=3.0), resamples=200, seed=4)
    assert document["difference"]["low"] == want.difference.low
    assert [c["id"] for c in document["changes"]] == [c.id for c in want.changes[:2]]
    text = fastat(*args).stdout
    assert f"{want.difference.value:+.4f}" in text and want.changes[0].name in text

    (tmp_path / "unscored").mkdir()
    done = fastat("compare", tmp_path / "run", tmp_path / "unscored", code=2)
    assert "predictions.h5 does not exist: expected a run that was scored" in one_line(done)
    shutil.copy(b, tmp_path / "cut.h5")
    with (tmp_path / "cut.h5").open("r+b") as file:
        file.truncate(900)
    done = fastat("compare", tmp_path / "run", tmp_path / "cut.h5", code=1)
    assert "cut.h5 is damaged, or no predictions" in one_line(done)
    assert "--resamples" in one_line(fastat("compare", b, b, "--resamples", 1, code=2))


def test_logits_that_one_probability_stands_for_are_told_apart(tmp_path: Path) -> None:
    """Logits 40 higher rank the clips as before, though every probability is 1."""
    a, b = predictions(1), predictions(2, skill=2.0)
    high = read_predictions(write(tmp_path / "high.h5", replace(b, logit=b.logit + 40)))
    got, want = compare(a, high, resamples=50), compare(a, b, resamples=50)
    assert (got.map_b, got.difference) == (want.map_b, want.difference)


def test_damaged_layouts(tmp_path: Path) -> None:
    good = predictions(1)
    for change in (
        {"logit": good.logit[:, :3]},
        {"logit": np.full_like(good.logit, np.nan)},
        {"ids": ["/m/0"] * 5},
        {"names": good.names[:7]},
        {"names": [good.names]},
    ):
        path = write(tmp_path / "x.h5", replace(good, **change))
        with pytest.raises(Failure, match=r"x\.h5 is damaged"):
            read_predictions(path)
