"""Rows a second from packed shards to the model's hand, beside what memory and disk give.

Everything of a test runs in one go, ours and its peers in turns, and the figures are medians over
the rounds, so that all of them meet the same weather.

Warm (every row in the page cache): batches of ``PackedSource`` on the CPU, beside a copy of the
same rows from memory by the same number of threads (the ceiling), h5py row by row, and a torch
DataLoader over WAV files with two workers.

Cold (the page cache emptied before every round): the same, every row a new one,
beside threads that preadv ranges of a row's size at random places, their best number (what
the disk gives through the page cache), and beside the same past the page cache.
"""

import mmap
import os
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from statistics import median

import h5py
import numpy as np
import pytest
import soundfile as sf
import torch
from numpy.typing import NDArray
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from bench.packed_sets import write_set
from bench.results import sized, write_row
from fastat.data.loader import PREFETCH, Batch, PackedSource
from fastat.data.row_reader import JOBS_PER_THREAD, READ_THREADS
from fastat.data.sampler import Sampler
from fastat.data.shards import SAMPLE_RATE, PackedSet

CPU = torch.device("cpu")
NUM_CLIPS, NUM_CLASSES, NUM_FILES = 1920, 527, sized(128, 64)
CLIP_SAMPLES = 10 * SAMPLE_RATE
ROW_BYTES = 2 * CLIP_SAMPLES
BATCH, STEPS, ROUNDS = 256, 8, sized(9, 3)
COLD_BATCH, COLD_STEPS, COLD_ROUNDS = 128, 9, sized(5, 2)
AHEAD = PREFETCH + 2
"""Batches taken before the clock starts: the loader is then as far ahead as when it stops."""
DISK_THREADS, DIRECT_THREADS = sized((2, 4, 8, 16, 32), (4, 16)), (4, 16)
PAGE = 4096


@pytest.fixture(scope="module")
def waveform() -> NDArray[np.int16]:
    rng = np.random.default_rng(0)
    return rng.integers(-(2**15), 2**15, (NUM_CLIPS, CLIP_SAMPLES), np.int16)


@pytest.fixture(scope="module")
def packed(
    waveform: NDArray[np.int16], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[PackedSet]:
    folder = tmp_path_factory.mktemp("set")
    rng = np.random.default_rng(1)
    bits = np.packbits(rng.random((NUM_CLIPS, NUM_CLASSES)) < 0.01, axis=1)
    write_set(folder, bits, [f"c{k}" for k in range(NUM_CLASSES)], waveform=waveform)
    opened = PackedSet.open(folder)
    yield opened
    opened.close()
    shutil.rmtree(folder)


def sampler(batch: int, *, mixup: float) -> Sampler:
    return Sampler(
        NUM_CLIPS, batch, seed=0, num_frames=400, num_mels=64, mixup=mixup, time_mask=75,
        freq_mask=12,
    )  # fmt: skip


def batches(packed: PackedSet, s: Sampler, epoch: int) -> Iterator[Batch]:
    steps = range(10**9)
    plans = (s.plan(epoch + i // s.steps_per_epoch, i % s.steps_per_epoch) for i in steps)
    return PackedSource(packed, CPU, sampler=s).batches(plans)


def seconds_of(step: Callable[[], object]) -> float:
    started = time.perf_counter()
    step()
    return time.perf_counter() - started


# ------------------------------------------------------------------------------------------- warm
class WavFiles(Dataset[Tensor]):
    """Clips in files of their own, as most training code reads them."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> Tensor:
        samples, _ = sf.read(self.paths[i], dtype="int16")
        return torch.from_numpy(samples)


def copied(waveform: NDArray[np.int16], out: NDArray[np.int16], pool: ThreadPoolExecutor) -> None:
    """The memory's own speed: a batch of rows at random places, by the loader's jobs."""
    rows = np.sort(np.random.default_rng(2).integers(0, NUM_CLIPS, len(out)))

    def copy(places: NDArray[np.int64]) -> None:
        for place in places.tolist():
            out[place] = waveform[rows[place]]

    list(pool.map(copy, np.array_split(np.arange(len(out)), JOBS_PER_THREAD * READ_THREADS)))


@pytest.mark.benchmark(group="data: loader, warm, rows of 320 kB")
def test_warm(
    benchmark: BenchmarkFixture, packed: PackedSet, waveform: NDArray[np.int16], tmp_path: Path
) -> None:
    paths = [tmp_path / f"{i}.wav" for i in range(NUM_FILES)]
    for path, samples in zip(paths, waveform, strict=False):
        sf.write(path, samples, SAMPLE_RATE, subtype="PCM_16")
    files = DataLoader(WavFiles(paths), 64, shuffle=True, num_workers=2, persistent_workers=True)
    every = np.empty_like(waveform)
    packed.read_rows(np.arange(NUM_CLIPS), every)  # into the page cache
    assert np.array_equal(every, waveform)
    stream = batches(packed, sampler(BATCH, mixup=0.3), 0)
    rows_of: list[int] = []
    cpu: list[float] = []  # seconds a row, all threads

    def ours() -> None:
        started = time.process_time()
        rows_of.append(sum(len(batch.num_samples) for batch in islice(stream, STEPS)))
        cpu.append((time.process_time() - started) / rows_of[-1])

    num_rows = round(1.3 * BATCH)
    outs = [np.zeros((num_rows, CLIP_SAMPLES), np.int16) for _ in range(3)]
    shard = packed.reader.paths[0]
    random = np.random.default_rng(3)
    seconds: dict[str, list[float]] = {"memcpy": [], "memcpy_cpu": [], "h5py": [], "wav": []}

    with ThreadPoolExecutor(READ_THREADS) as pool, h5py.File(shard, locking=False) as file:

        def by_h5py() -> None:
            for row in random.integers(0, NUM_CLIPS, 200).tolist():
                file["waveform"][row]

        def peers() -> None:
            started, cpu_started = time.perf_counter(), time.process_time()
            for i in range(STEPS):
                copied(waveform, outs[i % 3], pool)
            seconds["memcpy"].append((time.perf_counter() - started) / (STEPS * num_rows))
            seconds["memcpy_cpu"].append((time.process_time() - cpu_started) / (STEPS * num_rows))
            seconds["h5py"].append(seconds_of(by_h5py) / 200)
            seconds["wav"].append(seconds_of(lambda: list(files)) / NUM_FILES)
            for _ in range(AHEAD):  # what was read while the peers ran is not ours to count
                next(stream)

        peers()
        ours()
        rows_of.clear()
        for times in (cpu, *seconds.values()):
            times.clear()
        benchmark.pedantic(ours, setup=peers, rounds=ROUNDS)
    stream.close()  # type: ignore[attr-defined]
    if benchmark.disabled:
        return
    per_row = [t / n for t, n in zip(benchmark.stats.stats.data, rows_of, strict=True)]
    ours_s = median(per_row)
    percent_of_memcpy = 100 * median(m / o for m, o in zip(seconds["memcpy"], per_row, strict=True))
    shape = "warm, 320 kB"
    for peer, name in (("h5py", "h5py"), ("wav", "DataLoader, WAV files")):
        write_row(
            area="data", op="loader", impl=name, shape=shape, passes="row",
            ms=1e3 * median(seconds[peer]),
        )  # fmt: skip
    row = write_row(
        area="data",
        op="loader",
        impl="ours",
        shape=shape,
        passes="row",
        ms=1e3 * ours_s,
        ms_min=1e3 * min(per_row),
        percent_of_ceiling=percent_of_memcpy,  # a copy in memory by as many threads
        threads=READ_THREADS,
        rows_per_s=1 / ours_s,
        gb_per_s=ROW_BYTES / ours_s / 1e9,
        memcpy_gb_per_s=ROW_BYTES / median(seconds["memcpy"]) / 1e9,
        cpu_us_per_row=1e6 * median(cpu),  # tells more than the clock on a busy machine
        memcpy_cpu_us_per_row=1e6 * median(seconds["memcpy_cpu"]),
        h5py_rows_per_s=1 / median(seconds["h5py"]),
        dataloader_wav_rows_per_s=1 / median(seconds["wav"]),
    )
    benchmark.extra_info.update(row)


# ------------------------------------------------------------------------------------------- cold
def empty_page_cache(packed: PackedSet) -> None:
    """Of the set's shards."""
    for path in packed.reader.paths:
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def read_ranges(path: Path, num_threads: int, *, direct: bool) -> None:
    """The disk's own speed: as many ranges as the loader reads rows, each read once."""
    size = ROW_BYTES // PAGE * PAGE if direct else ROW_BYTES
    ranges = np.random.default_rng(4).permutation(path.stat().st_size // size - 1)
    fd = os.open(path, os.O_RDONLY | (os.O_DIRECT if direct else 0))

    def read(numbers: NDArray[np.int64]) -> None:
        with mmap.mmap(-1, size) as buffer:
            for number in numbers.tolist():
                os.preadv(fd, [buffer], number * size)

    with ThreadPoolExecutor(num_threads) as pool:
        list(pool.map(read, np.array_split(ranges[: COLD_BATCH * COLD_STEPS], num_threads)))
    os.close(fd)


@pytest.mark.benchmark(group="data: loader, cold, rows of 320 kB")
def test_cold(benchmark: BenchmarkFixture, packed: PackedSet) -> None:
    s = sampler(COLD_BATCH, mixup=0.0)  # without partners every row is a new one
    shard = packed.reader.paths[0]
    disk: dict[int, list[float]] = {n: [] for n in DISK_THREADS}
    direct: dict[int, list[float]] = {n: [] for n in DIRECT_THREADS}

    def peers() -> tuple[tuple[Iterator[Batch]], dict[str, object]]:
        for times, past_the_cache in ((disk, False), (direct, True)):
            for num_threads in times:
                empty_page_cache(packed)
                started = time.perf_counter()
                read_ranges(shard, num_threads, direct=past_the_cache)
                times[num_threads].append(time.perf_counter() - started)
        empty_page_cache(packed)
        stream = batches(packed, s, 0)
        for _ in islice(stream, AHEAD):
            pass
        return (stream,), {}

    def ours(stream: Iterator[Batch]) -> None:
        for _ in islice(stream, COLD_STEPS):
            pass

    benchmark.pedantic(ours, setup=peers, rounds=COLD_ROUNDS)
    if benchmark.disabled:
        return
    ours_s = benchmark.stats.stats.median
    disk_s, disk_threads = min((median(times), n) for n, times in disk.items())
    direct_s = min(map(median, direct.values()))
    num_rows = COLD_BATCH * COLD_STEPS
    for impl, times_s in (("ours", ours_s), ("preadv", disk_s), ("preadv, O_DIRECT", direct_s)):
        row = write_row(
            area="data", op="loader", impl=impl, passes="row", ms=1e3 * times_s / num_rows,
            shape="cold, 320 kB", rows_per_s=num_rows / times_s,
            gb_per_s=num_rows * ROW_BYTES / times_s / 1e9,
        )  # fmt: skip
        benchmark.extra_info[impl] = row["gb_per_s"]
    benchmark.extra_info["disk_threads"] = disk_threads
