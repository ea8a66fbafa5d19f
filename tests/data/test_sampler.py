"""The sampler: a pure function of (seed, epoch, step), with the distributions it promises."""

from dataclasses import fields
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import beta, chisquare, kstest

from fastat.data.sampler import Sampler, StepPlan, balanced_weights
from fastat.system.errors import UserError

SETTINGS: dict[str, Any] = {
    "seed": 5,
    "num_frames": 400,
    "num_mels": 64,
    "mixup": 0.3,
    "time_mask": 75,
    "freq_mask": 12,
}


def sampler(num_clips: int = 1000, batch: int = 32, **settings: Any) -> Sampler:
    return Sampler(num_clips, batch, **(SETTINGS | settings))


def assert_equal(a: StepPlan, b: StepPlan, *, but: frozenset[str] = frozenset()) -> None:
    """The same plan, field by field; a field in ``but`` must differ."""
    for field in fields(StepPlan):
        same = np.array_equal(getattr(a, field.name), getattr(b, field.name))
        assert same == (field.name not in but), field.name


def plans(s: Sampler, epochs: int) -> list[StepPlan]:
    return [s.plan(e, i) for e in range(epochs) for i in range(s.steps_per_epoch)]


# -------------------------------------------------------------------------------- pure function
@pytest.mark.parametrize("balance", [False, True])
def test_a_plan_depends_on_nothing_but_seed_epoch_and_step(balance: bool) -> None:
    weights = np.random.default_rng(0).random(1000) if balance else None
    steps = [(e, i) for e in range(4) for i in range(31)]
    in_order = sampler(weights=weights)
    expected = {step: in_order.plan(*step) for step in steps}
    jumping = sampler(weights=weights)
    np.random.seed(1)  # the global generator is no part of it
    for step in np.random.default_rng(3).permutation(steps).tolist():
        np.random.rand()
        assert_equal(jumping.plan(*step), expected[tuple(step)])
    alone = sampler(weights=weights).plan(3, 17)
    assert_equal(alone, expected[3, 17])


def test_every_seed_epoch_and_step_differs() -> None:
    first = sampler().plan(0, 0)
    places = {"epoch", "step", "first"}
    drawn = frozenset(field.name for field in fields(StepPlan)) - places
    assert_equal(first, sampler(seed=6).plan(0, 0), but=drawn)
    assert_equal(first, sampler().plan(1, 0), but=drawn | {"epoch"})
    assert_equal(first, sampler().plan(0, 1), but=drawn | {"step"})


@pytest.mark.parametrize("num_ranks", [1, 2, 4, 8])
def test_ranks_take_parts_of_the_same_step(num_ranks: int) -> None:
    whole = sampler().plan(2, 3)
    parts = [whole.part(rank, num_ranks) for rank in range(num_ranks)]
    for name in ("rows", "partners", "lam", "time_mask", "freq_mask"):
        together = np.concatenate([getattr(part, name) for part in parts])
        assert np.array_equal(together, getattr(whole, name)), name
    mixed = np.concatenate([part.mix_into + part.first for part in parts])
    assert np.array_equal(mixed, whole.mix_into)
    assert [part.first for part in parts] == list(range(0, 32, 32 // num_ranks))


def test_shapes_and_types() -> None:
    plan = sampler().plan(2, 3)
    M = len(plan.mix_into)
    assert 0 < M < 32
    assert plan.rows.shape == (32,) and plan.partners.shape == plan.lam.shape == (M,)
    assert plan.time_mask.shape == plan.freq_mask.shape == (32, 2)
    assert plan.lam.dtype == np.float32
    for name in ("rows", "partners", "mix_into", "time_mask", "freq_mask"):
        assert getattr(plan, name).dtype == np.int64


# ----------------------------------------------------------------------------------- which clips
def test_without_balance_a_pass_is_a_permutation() -> None:
    s = sampler(num_clips=320)
    assert s.steps_per_epoch == 10
    passes = [np.concatenate([s.plan(e, i).rows for i in range(10)]) for e in range(3)]
    for rows in passes:
        assert sorted(rows.tolist()) == list(range(320))
    assert not np.array_equal(passes[0], passes[1])


def test_an_incomplete_last_batch_is_dropped() -> None:
    s = sampler(num_clips=103)
    assert s.steps_per_epoch == 3
    rows = np.concatenate([s.plan(0, i).rows for i in range(3)])
    assert len(set(rows.tolist())) == 96
    # What is dropped changes from pass to pass.
    seen = set(np.concatenate([p.rows for p in plans(s, 8)]).tolist())
    assert seen == set(range(103))


def labels(num_clips: int, num_classes: int) -> NDArray[np.bool_]:
    """Classes from common to rare, some clips with several labels, the last without any."""
    rng = np.random.default_rng(7)
    found = rng.random((num_clips, num_classes)) < 0.5 ** np.arange(1, num_classes + 1)
    found[np.arange(num_clips), rng.integers(num_classes, size=num_clips)] = True
    found[-1] = False
    return found


def test_balanced_weights_follow_the_formula() -> None:
    targets = labels(200, 11)
    counts = targets.sum(0)
    weights = balanced_weights(np.packbits(targets, axis=1), counts)
    for n in range(200):
        by_hand = sum(1000 / (counts[k] + 0.01) for k in range(11) if targets[n, k])
        assert weights[n] == pytest.approx(by_hand, rel=1e-12)
    assert weights[-1] == 0


def test_balanced_weights_of_many_clips_are_those_of_few() -> None:
    """More than one block of the implementation."""
    targets = labels(70_000, 9)
    bits, counts = np.packbits(targets, axis=1), targets.sum(0)
    weights = balanced_weights(bits, counts)
    np.testing.assert_allclose(weights, targets @ (1000 / (counts + 0.01)))


def test_balanced_draws_have_the_frequencies_of_the_weights() -> None:
    targets = labels(300, 6)
    weights = balanced_weights(np.packbits(targets, axis=1), targets.sum(0))
    s = sampler(num_clips=300, weights=weights)
    rows = np.concatenate([s._order(epoch) for epoch in range(400)])
    drawn = np.bincount(rows, minlength=300)
    assert drawn[-1] == 0, "a clip of weight 0 is never drawn"
    expected = weights[:-1] / weights.sum() * len(rows)
    assert expected.min() > 20
    assert chisquare(drawn[:-1], expected).pvalue > 0.01
    # Uniform draws would not pass: the test tells them apart.
    uniform = np.random.default_rng(0).multinomial(len(rows), np.full(299, 1 / 299))
    assert chisquare(uniform, expected).pvalue < 1e-6


def test_balanced_draws_are_with_replacement() -> None:
    s = sampler(num_clips=320, weights=np.ones(320))
    rows = np.concatenate([s.plan(0, i).rows for i in range(10)])
    assert len(rows) == 320 and len(set(rows.tolist())) < 260


@pytest.mark.parametrize("balance", [False, True])
def test_only_usable_clips_are_drawn_and_mixed_in(balance: bool) -> None:
    usable = np.zeros(500, bool)
    usable[np.random.default_rng(0).permutation(500)[:200]] = True
    weights = np.random.default_rng(1).random(500) if balance else None
    s = sampler(num_clips=500, usable=usable, weights=weights)
    assert s.steps_per_epoch == 200 // 32
    for plan in plans(s, 20):
        assert usable[plan.rows].all() and usable[plan.partners].all()
    if balance:
        drawn = np.bincount(np.concatenate([s._order(e) for e in range(500)]), minlength=500)
        assert weights is not None
        expected = weights[usable] / weights[usable].sum() * drawn.sum()
        assert chisquare(drawn[usable], expected).pvalue > 0.01


@pytest.mark.parametrize("batch", [0, -1, 11])
def test_a_batch_must_fit(batch: int) -> None:
    with pytest.raises(UserError, match=f"got {batch}"):
        sampler(num_clips=10, batch=batch)
    with pytest.raises(UserError, match="1 to 3 clips"):
        sampler(num_clips=10, batch=4, usable=np.arange(10) < 3)


# --------------------------------------------------------------------------------------- bad rows
def test_replacements_follow_the_weights_and_partners_do_not() -> None:
    usable = np.arange(20) != 4
    weights = np.arange(20.0)
    s = sampler(20, 10, usable=usable, weights=weights)
    calls = [(e, i, p, a) for e in range(2) for i in range(20) for p in range(10) for a in (1, 2)]
    clips = np.bincount([s.replacement(*c, partner=False) for c in calls], minlength=20)
    partners = np.bincount([s.replacement(*c, partner=True) for c in calls], minlength=20)
    assert clips[0] == clips[4] == partners[4] == 0
    expected = (weights * usable / (weights * usable).sum() * len(calls))[1:]
    kept = usable[1:]
    assert chisquare(clips[1:][kept], expected[kept]).pvalue > 0.01
    assert chisquare(partners[usable]).pvalue > 0.01


# -------------------------------------------------------------------------------- any size of set
class Whole(np.ndarray[Any, Any]):
    """An array that may be looked up in for a batch, and not gone through."""

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **options: Any) -> Any:
        raise AssertionError(f"{ufunc.__name__} of every clip")

    def __array_function__(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        if func is not np.searchsorted or np.size(args[1]) > 2 * 32:
            raise AssertionError(f"{func.__name__} of every clip")
        return func(args[0].view(np.ndarray), *args[1:], **kwargs)

    def __getitem__(self, key: Any) -> Any:
        found = self.view(np.ndarray)[key]
        if np.size(found) > 32:
            raise AssertionError("a look-up of every clip")
        return found

    def __iter__(self) -> Any:
        raise AssertionError("going through every clip")


def test_a_plan_costs_the_same_for_any_step_of_any_set() -> None:
    """Drawing an epoch's order goes through the set, once an epoch; planning a step never does."""
    s = sampler(weights=np.ones(1000))
    drawn: list[int] = []
    draw = s._order

    def order(epoch: int) -> NDArray[np.int64]:
        drawn.append(epoch)
        return draw(epoch)

    s.order = lru_cache(maxsize=2)(order)
    expected = {(e, i): s.plan(e, i) for e in range(2) for i in range(s.steps_per_epoch)}
    assert drawn == [0, 1]
    orders = {epoch: s.order(epoch).view(Whole) for epoch in range(2)}
    s.order = orders.__getitem__  # type: ignore[assignment]
    assert s.cumulative is not None
    s.candidates, s.cumulative = s.candidates.view(Whole), s.cumulative.view(Whole)
    for (epoch, step), plan in expected.items():
        assert_equal(s.plan(epoch, step), plan)
        s.replacement(epoch, step, 0, 1, partner=False)
    with pytest.raises(AssertionError, match="of every clip"):
        draw(0)


# ----------------------------------------------------------------------------------------- mixup
def test_mixup_rate_weights_and_partners() -> None:
    many = plans(sampler(num_clips=1000, batch=100), 60)  # 600 steps, 60,000 clips
    rate = np.mean([len(p.mix_into) / 100 for p in many])
    assert rate == pytest.approx(0.3, abs=5 * np.sqrt(0.3 * 0.7 / 60_000))
    for plan in many:
        assert (np.diff(plan.mix_into) > 0).all(), "each clip at most once, in order"
        assert plan.mix_into.min() >= 0 and plan.mix_into.max() < 100

    lam = np.concatenate([p.lam for p in many]).astype(np.float64)
    assert lam.mean() == pytest.approx(0.5, abs=0.005)
    assert lam.var() == pytest.approx(1 / 84, rel=0.05)  # ab / ((a + b)^2 (a + b + 1))
    assert kstest(lam, beta(10, 10).cdf).pvalue > 0.01

    partners = np.concatenate([p.partners for p in many])
    assert chisquare(np.bincount(partners, minlength=1000)).pvalue > 0.01
    into = np.concatenate([p.mix_into for p in many])
    assert chisquare(np.bincount(into, minlength=100)).pvalue > 0.01


def test_partners_are_uniform_also_with_balance() -> None:
    weights = np.where(np.arange(1000) < 10, 1000.0, 1.0)
    partners = np.concatenate([p.partners for p in plans(sampler(weights=weights), 60)])
    assert chisquare(np.bincount(partners, minlength=1000)).pvalue > 0.01


def test_mixup_always_and_never() -> None:
    assert all(len(p.mix_into) == 32 for p in plans(sampler(mixup=1.0), 2))
    assert all(len(p.mix_into) == 0 for p in plans(sampler(mixup=0.0), 2))


# ----------------------------------------------------------------------------------------- masks
@pytest.mark.parametrize(("name", "size", "most"), [("time_mask", 400, 75), ("freq_mask", 64, 12)])
def test_masks_lie_inside_and_have_uniform_widths(name: str, size: int, most: int) -> None:
    masks = np.concatenate([getattr(p, name) for p in plans(sampler(batch=100), 100)])
    start, width = masks.T
    assert width.min() == 0 and width.max() == most - 1
    assert start.min() == 0 and (start + width).max() in (size - 1, size)
    assert chisquare(np.bincount(width, minlength=most)).pvalue > 0.01
    # Starts are uniform over what the width leaves: those of one width, in ten equal shares.
    starts, free = start[width == most // 2], (size - most // 2 - 1) // 10 * 10
    assert chisquare(np.bincount(starts[starts < free] * 10 // free)).pvalue > 0.01


def test_masks_wider_than_the_feature_map_stay_inside() -> None:
    for plan in plans(sampler(num_frames=20, num_mels=8), 3):
        assert (plan.time_mask.sum(1) <= 20).all() and (plan.freq_mask.sum(1) <= 8).all()


def test_no_masks() -> None:
    for plan in plans(sampler(time_mask=0, freq_mask=0), 2):
        assert not plan.time_mask[:, 1].any() and not plan.freq_mask[:, 1].any()


# -------------------------------------------------------------------------------------- switches
@pytest.mark.parametrize(
    ("switch", "changes"),
    [
        ({"mixup": 0.0}, {"mix_into", "partners", "lam"}),
        ({"time_mask": 0}, {"time_mask"}),
        ({"freq_mask": 0}, {"freq_mask"}),
        ({"weights": np.ones(1000)}, {"rows"}),
    ],
    ids=["mixup", "time mask", "frequency mask", "balance"],
)
def test_a_switch_changes_only_its_own_draw(switch: dict[str, Any], changes: set[str]) -> None:
    on, off = sampler(), sampler(**switch)
    for step in range(5):
        assert_equal(on.plan(1, step), off.plan(1, step), but=frozenset(changes))
