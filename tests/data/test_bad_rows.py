"""Rows that cannot be read while training: replaced, counted, listed; too many stop the run."""

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from fastat.data.loader import Batch, PackedSource
from fastat.data.sampler import Sampler, StepPlan
from fastat.data.shards import PackedSet
from fastat.system.errors import Failure
from tests.conftest import TinySets, kept

CPU = torch.device("cpu")
BATCH = 12


@pytest.fixture
def folder(tiny_sets: TinySets, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_sets.train, tmp_path / "set"))


@pytest.fixture
def packed(folder: Path) -> Iterator[PackedSet]:
    opened = PackedSet.open(folder)
    yield opened
    opened.close()


def sampler(packed: PackedSet, mixup: float = 0.0) -> Sampler:
    weights = np.arange(1.0, packed.num_clips + 1, dtype=np.float64)
    return Sampler(
        packed.num_clips, BATCH, seed=3, num_frames=40, num_mels=64, weights=weights, mixup=mixup
    )


def flip_bits(packed: PackedSet, *rows: int) -> None:
    """One bit of each row."""
    for row in rows:
        path, place = packed.place(row)
        with h5py.File(path) as file:
            offset = file["waveform"].id.get_offset() + 2 * packed.clip_samples * place + 1234
        with path.open("r+b") as raw:
            raw.seek(offset)
            byte = raw.read(1)[0]
            raw.seek(-1, os.SEEK_CUR)
            raw.write(bytes([byte ^ 1]))


def plans(s: Sampler) -> list[StepPlan]:
    return [s.plan(0, i) for i in range(s.steps_per_epoch)]


def batches(source: PackedSource, steps: list[StepPlan]) -> list[Batch]:
    return [kept(batch) for batch in source.batches(steps)]


def assert_holds(packed: PackedSet, batch: Batch, plan: StepPlan) -> None:
    """The batch is what ``plan`` says, all of it."""
    rows = np.concatenate([plan.rows, plan.partners])
    want = np.empty((len(rows), packed.clip_samples), np.int16)
    packed.read_rows(rows, want)
    target = packed.targets(plan.rows)
    for j, i in enumerate(plan.mix_into):
        target[i] = plan.lam[j] * target[i] + (1 - plan.lam[j]) * packed.targets(plan.partners)[j]
    assert batch.waveform is not None and np.array_equal(batch.waveform.numpy(), want)
    assert np.array_equal(batch.rows, plan.rows)
    assert batch.num_samples.tolist() == packed.num_samples[rows].tolist()
    np.testing.assert_allclose(batch.target.numpy(), target, rtol=1e-6)


def expected(s: Sampler, plan: StepPlan, bad: set[int]) -> StepPlan:
    """The plan with every bad row drawn again until it is a good one, written out."""
    rows, partners = plan.rows.copy(), plan.partners.copy()
    for i in range(len(rows)):
        attempt = 0
        while int(rows[i]) in bad:
            attempt += 1
            rows[i] = s.replacement(plan.epoch, plan.step, plan.first + i, attempt, partner=False)
    for j, i in enumerate(plan.mix_into.tolist()):
        attempt = 0
        while int(partners[j]) in bad:
            attempt += 1
            partners[j] = s.replacement(
                plan.epoch, plan.step, plan.first + i, attempt, partner=True
            )
    return replace(plan, rows=rows, partners=partners)


@pytest.mark.parametrize("mixup", [0.0, 1.0], ids=["clips", "clips and partners"])
def test_damaged_rows_are_replaced(packed: PackedSet, mixup: float) -> None:
    """A third of the set, so that replacements are damaged too."""
    s = sampler(packed, mixup)
    damaged = set(range(2, packed.num_clips, 3))
    flip_bits(packed, *damaged)
    source = PackedSource(packed, CPU, sampler=s, max_bad=0.5)
    steps = plans(s)
    drawn = np.concatenate([r for plan in steps for r in (plan.rows, plan.partners)])
    assert len(set(drawn.tolist()) & damaged) > 5
    for plan, batch in zip(steps, batches(source, steps), strict=True):
        assert_holds(packed, batch, expected(s, plan, damaged))
    assert set(source.bad) <= damaged and set(drawn.tolist()) & damaged <= set(source.bad)
    assert set(source.bad.values()) == {"its checksum differs"}


def test_two_ranks_replace_as_one_does(packed: PackedSet) -> None:
    s = sampler(packed, 0.5)
    flip_bits(packed, *range(0, packed.num_clips, 4))
    one = batches(PackedSource(packed, CPU, sampler=s, max_bad=1.0), plans(s))
    two = [
        batches(
            PackedSource(packed, CPU, sampler=s, max_bad=1.0),
            [plan.part(rank, 2) for plan in plans(s)],
        )
        for rank in range(2)
    ]
    for whole, parts in zip(one, zip(*two, strict=True), strict=True):
        assert np.array_equal(whole.rows, np.concatenate([part.rows for part in parts]))
        assert torch.equal(whole.target, torch.cat([part.target for part in parts]))
        clips, partners = [], []
        for part in parts:
            assert part.waveform is not None
            clips.append(part.waveform[: BATCH // 2])
            partners.append(part.waveform[BATCH // 2 :])
        assert whole.waveform is not None
        assert torch.equal(whole.waveform, torch.cat(clips + partners))


def test_a_step_is_the_same_whatever_came_before(packed: PackedSet) -> None:
    s = sampler(packed, 0.5)
    flip_bits(packed, *range(0, packed.num_clips, 4))
    steps = plans(s)
    in_order = batches(PackedSource(packed, CPU, sampler=s, max_bad=1.0), steps)
    (alone,) = batches(PackedSource(packed, CPU, sampler=s, max_bad=1.0), steps[-1:])
    assert np.array_equal(alone.rows, in_order[-1].rows)
    assert alone.waveform is not None and in_order[-1].waveform is not None
    assert torch.equal(alone.waveform, in_order[-1].waveform)


def cut_short(packed: PackedSet, monkeypatch: pytest.MonkeyPatch) -> set[int]:
    packed.read_rows(np.array([0]), np.empty((1, packed.clip_samples), np.int16))  # it is open
    path, _ = packed.place(0)
    with h5py.File(path) as file:
        end = file["waveform"].id.get_offset() + 2 * packed.clip_samples + 100
    os.truncate(path, end)
    return {row for row in range(1, packed.num_clips) if packed.place(row)[0] == path}


def unreadable(packed: PackedSet, monkeypatch: pytest.MonkeyPatch) -> set[int]:
    path, _ = packed.place(0)
    with h5py.File(path) as file:
        first = file["waveform"].id.get_offset()
    preadv = os.preadv

    def failing(fd: int, buffers: tuple[memoryview], offset: int) -> int:
        if offset < first + 2 * packed.clip_samples:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return preadv(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", failing)
    return {row for row in range(packed.num_clips) if packed.place(row)[1] == 0}


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (cut_short, "the file has (100|0) of its 32,000 bytes"),
        (unreadable, "cannot read it: Input/output error"),
    ],
)
def test_other_damage_is_told_apart(
    packed: PackedSet,
    monkeypatch: pytest.MonkeyPatch,
    damage: Callable[[PackedSet, pytest.MonkeyPatch], set[int]],
    reason: str,
) -> None:
    bad = damage(packed, monkeypatch)
    s = sampler(packed, 1.0)
    source = PackedSource(packed, CPU, sampler=s, max_bad=0.5)
    steps = plans(s)
    for plan, batch in zip(steps, batches(source, steps), strict=True):
        assert_holds(packed, batch, expected(s, plan, bad))
    assert source.bad and set(source.bad) <= bad
    # Evaluation needs every row.
    with pytest.raises(Failure, match=rf"shard-\d+\.h5: row \d+ \(clip .*\) is damaged: {reason}"):
        batches(PackedSource(packed, CPU), steps)


def test_a_shard_that_is_gone_is_bad_rows(packed: PackedSet) -> None:
    path, _ = packed.place(0)
    path.unlink()
    out = np.empty((2, packed.clip_samples), np.int16)
    found = packed.read(np.array([3, 1]), out)
    assert found == dict.fromkeys((0, 1), "cannot open its file: No such file or directory")


def test_a_read_that_gives_less_goes_on(packed: PackedSet, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on network file systems; a file's end is still one."""
    rows = np.array([4, 0, 2])
    want, got = np.empty((2, 3, packed.clip_samples), np.int16)
    packed.read_rows(rows, want)
    preadv = os.preadv
    monkeypatch.setattr(
        os, "preadv", lambda fd, buffers, offset: preadv(fd, (buffers[0][:1001],), offset)
    )
    assert packed.read(rows, got) == {} and np.array_equal(got, want)
    path, place = packed.place(4)
    os.truncate(path, packed.reader._offsets[0] + 2 * packed.clip_samples * place + 2500)
    size = 2 * packed.clip_samples
    assert packed.read(rows, got) == {0: f"the file has 2,500 of its {size:,} bytes"}


@pytest.mark.parametrize("call", ["open", "preadv"])
def test_running_out_of_files_or_memory_says_nothing_of_the_row(
    packed: PackedSet, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    number = {"open": errno.EMFILE, "preadv": errno.ENOMEM}[call]

    def failing(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, call, failing)
    source = PackedSource(packed, CPU, sampler=sampler(packed), max_bad=1.0)
    with pytest.raises(Failure, match=f"cannot read the set: {os.strerror(number)}"):
        batches(source, plans(sampler(packed)))
    assert not source.bad


def test_more_than_max_bad_stops(packed: PackedSet) -> None:
    s = sampler(packed)
    rows = list(dict.fromkeys(np.concatenate([plan.rows for plan in plans(s)]).tolist()))
    first, second = rows[0], rows[-1]
    flip_bits(packed, first, second)
    assert len(batches(PackedSource(packed, CPU, sampler=s, max_bad=2 / 36), plans(s))) == 3
    with pytest.raises(Failure) as failure:
        batches(PackedSource(packed, CPU, sampler=s, max_bad=1 / 36), plans(s))
    path, place = packed.place(second)
    (clip,) = packed.names(np.array([second]))
    assert str(failure.value).startswith("2 of 36 clips are damaged, more than --max-bad 0.0277778")
    assert f"{path}: row {place} (clip {clip}) is damaged: its checksum" in str(failure.value)
    with pytest.raises(Failure, match="1 of 36 clips are damaged, more than --max-bad 0;"):
        batches(PackedSource(packed, CPU, sampler=s), plans(s))


def test_a_set_without_a_good_row_stops(packed: PackedSet) -> None:
    flip_bits(packed, *range(packed.num_clips))
    s = sampler(packed)
    with pytest.raises(Failure, match="100 draws, and none could be read; the last: .*shard-"):
        batches(PackedSource(packed, CPU, sampler=s, max_bad=1.0), plans(s))
