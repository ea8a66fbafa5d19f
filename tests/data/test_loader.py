"""Batches: rows, partners and targets as planned, ahead of the model, errors passed on.

Rows that cannot be read are in test_bad_rows.py.
"""

import os
import threading
import time
from collections.abc import Iterator
from itertools import count
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fastat.data import loader, row_reader
from fastat.data.loader import PREFETCH, Batch, PackedSource, evaluation_plans, prefetch
from fastat.data.sampler import Sampler, StepPlan
from fastat.data.shards import PackedSet
from tests.conftest import TinySets, kept

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
    forward = [kept(b) for b in PackedSource(packed, CPU).batches(plans)]
    backward = [kept(b) for b in PackedSource(packed, CPU).batches(plans[::-1])][::-1]
    for a, b in zip(forward, backward, strict=True):
        assert a.waveform is not None and b.waveform is not None
        assert torch.equal(a.waveform, b.waveform) and torch.equal(a.target, b.target)


def test_a_batch_is_whole_until_the_next_in_memory_used_again(packed: PackedSet) -> None:
    s = sampler(packed)
    plans = [s.plan(e, i) for e in range(3) for i in range(4)]
    pieces: set[int] = set()
    for plan, batch in zip(plans, PackedSource(packed, CPU).batches(plans), strict=True):
        time.sleep(0.01)  # the loader gets as far ahead as it can
        rows = np.concatenate([plan.rows, plan.partners])
        want = np.empty((len(rows), packed.clip_samples), np.int16)
        packed.read_rows(rows, want)
        assert batch.waveform is not None
        assert np.array_equal(batch.waveform.numpy(), want)
        if len(pieces) < PREFETCH + 2:  # later, one may have been too small
            pieces.add(batch.waveform.data_ptr())
    assert len(pieces) == PREFETCH + 2


def test_a_disk_hears_of_every_row_before_it_is_read(
    packed: PackedSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "ADVISED_ROWS", 12)
    calls: list[tuple[str, str, int, int]] = []
    blocks = count()
    usage = SimpleNamespace(getrusage=lambda _: SimpleNamespace(ru_inblock=next(blocks)))
    monkeypatch.setattr(row_reader, "resource", SimpleNamespace(RUSAGE_SELF=0, **vars(usage)))
    advise, read = os.posix_fadvise, os.preadv

    def shard(fd: int) -> str:
        return os.readlink(f"/proc/self/fd/{fd}")

    def noted_advise(fd: int, offset: int, length: int, advice: int) -> None:
        assert advice == os.POSIX_FADV_WILLNEED
        calls.append(("advise", shard(fd), offset, length))
        advise(fd, offset, length, advice)

    def noted_read(fd: int, buffers: tuple[memoryview], offset: int) -> int:
        calls.append(("read", shard(fd), offset, len(buffers[0])))
        return read(fd, buffers, offset)

    monkeypatch.setattr(os, "posix_fadvise", noted_advise)
    monkeypatch.setattr(os, "preadv", noted_read)
    s = Sampler(packed.num_clips, 4, seed=3, num_frames=40, num_mels=64, mixup=1.0)
    plans = [s.plan(0, i) for i in range(s.steps_per_epoch)]
    for _ in PackedSource(packed, CPU, sampler=s).batches(plans):
        pass
    announced: set[tuple[str, int]] = set()
    together: list[list[tuple[str, int]]] = [[]]  # places advised between two batches
    num_reads = 0
    for kind, file, offset, length in calls:
        if kind == "advise":
            rows = range(offset, offset + length, 2 * packed.clip_samples)
            announced.update((file, row) for row in rows)
            together[-1].append((file, offset))
        else:
            num_reads += 1
            assert (file, offset) in announced
            if together[-1]:
                together.append([])
    assert num_reads == sum(len(plan.rows) + len(plan.partners) for plan in plans)
    assert len(together) > 4, "the rows of later steps are announced between the batches"
    # The first step's come at once, before the first part of those behind it.
    assert all(places == sorted(places) for places in together[1:])


def test_a_warm_set_is_not_announced(packed: PackedSet, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = SimpleNamespace(ru_inblock=7)
    quiet = SimpleNamespace(RUSAGE_SELF=0, getrusage=lambda _: usage)
    monkeypatch.setattr(row_reader, "resource", quiet)
    packed.reader.advise(np.array([0, 1]))
    advised: list[int] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda *call: advised.append(call[1]))
    packed.reader.advise(np.array([5, 6]))
    assert not advised
    usage.ru_inblock += 8  # another row came from the disk
    packed.reader.advise(np.array([5, 6, 9]))
    assert len(advised) == 2, "neighbours are one request"


def test_many_shards_raise_the_limit_on_open_files(
    packed: PackedSet,
) -> None:
    import resource

    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = [row_reader.RowFile(packed.reader.paths[0], i, 0) for i in range(100)]
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, limits[1]))
        row_reader.RowReader(files[:10], np.zeros(10, np.uint32), 2)
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == 256
        row_reader.RowReader(files, np.zeros(100, np.uint32), 2)
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == limits[1]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
