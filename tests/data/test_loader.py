"""Batches: rows, partners and targets as planned, ahead of the model, errors passed on."""

import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from fastat.data.loader import Batch, PackedSource, evaluation_plans, prefetch
from fastat.data.sampler import Sampler, StepPlan
from fastat.data.shards import PackedSet
from tests.conftest import TinySets

CPU = torch.device("cpu")


@pytest.fixture
def packed(tiny_sets: TinySets) -> Iterator[PackedSet]:
    opened = PackedSet.open(tiny_sets.train)
    yield opened
    opened.close()


def sampler(packed: PackedSet) -> Sampler:
    return Sampler(
        packed.num_clips, 8, seed=3, num_frames=40, num_mels=64, mixup=0.5, time_mask=8, freq_mask=4
    )


def test_a_batch_holds_what_its_plan_says(packed: PackedSet) -> None:
    plan = sampler(packed).plan(0, 1)
    M = len(plan.partners)
    assert M > 0
    (batch,) = PackedSource(packed, CPU).batches([plan])
    rows = np.concatenate([plan.rows, plan.partners])
    want = np.empty((len(rows), packed.clip_samples), np.int16)
    for i, row in enumerate(rows):
        packed.read_rows(np.array([row]), want[i : i + 1])
    assert batch.waveform is not None and batch.augment is not None
    assert torch.equal(batch.waveform, torch.from_numpy(want))
    assert batch.num_samples.tolist() == packed.num_samples[rows].tolist()
    labels = packed.targets(np.arange(packed.num_clips))
    target = labels[plan.rows].copy()
    for j, i in enumerate(plan.mix_into):
        lam = plan.lam[j]
        target[i] = lam * labels[plan.rows[i]] + (1 - lam) * labels[plan.partners[j]]
    np.testing.assert_allclose(batch.target.numpy(), target, rtol=1e-6)
    assert np.array_equal(batch.augment.mix_into.numpy(), plan.mix_into)
    assert np.array_equal(batch.augment.lam.numpy(), plan.lam)
    assert np.array_equal(batch.augment.time_mask.numpy(), plan.time_mask)
    assert np.array_equal(batch.augment.freq_mask.numpy(), plan.freq_mask)


def test_evaluation_sees_every_clip_once() -> None:
    rows = np.array([5, 3, 9, 1, 7])
    plans = list(evaluation_plans(rows, 2))
    assert [p.rows.tolist() for p in plans] == [[5, 3], [9, 1], [7]]
    assert all(len(p.partners) == 0 and p.time_mask.sum() == 0 for p in plans)


def fake(i: int) -> Batch:
    return Batch(np.array([i]), torch.zeros(1, 1), torch.zeros(1), None)


def test_prefetch_keeps_the_order_and_stays_within_its_depth() -> None:
    made: list[int] = []

    def produce() -> Iterator[Batch]:
        for i in range(20):
            made.append(i)
            yield fake(i)

    for expected, batch in enumerate(prefetch(produce(), depth=2)):
        assert batch.rows[0] == expected
        assert len(made) <= expected + 1 + 2 + 1  # taken, waiting, and one in the maker's hand
    assert len(made) == 20


def test_prefetch_is_ahead_of_a_slow_consumer() -> None:
    made = threading.Event()

    def produce() -> Iterator[Batch]:
        yield fake(0)
        yield fake(1)
        made.set()

    batches = prefetch(produce(), depth=2)
    next(batches)
    assert made.wait(5), "the second batch was not made while the first was in use"
    batches.close()  # type: ignore[attr-defined]


def test_prefetch_raises_where_the_batch_would_have_come() -> None:
    def produce() -> Iterator[Batch]:
        yield fake(0)
        raise OSError("the disk is gone")

    batches = prefetch(produce(), depth=2)
    assert next(batches).rows[0] == 0
    with pytest.raises(OSError, match="the disk is gone"):
        next(batches)


def test_prefetch_ends_with_its_consumer() -> None:
    def produce() -> Iterator[Batch]:
        while True:
            yield fake(0)

    before = threading.active_count()
    batches = prefetch(produce(), depth=2)
    next(batches)
    batches.close()  # type: ignore[attr-defined]
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == before


def test_order_of_reading_changes_nothing(packed: PackedSet) -> None:
    s = sampler(packed)
    plans: list[StepPlan] = [s.plan(0, i) for i in range(4)]
    forward = list(PackedSource(packed, CPU).batches(plans))
    backward = list(PackedSource(packed, CPU).batches(plans[::-1]))[::-1]
    for a, b in zip(forward, backward, strict=True):
        assert a.waveform is not None and b.waveform is not None
        assert torch.equal(a.waveform, b.waveform) and torch.equal(a.target, b.target)
