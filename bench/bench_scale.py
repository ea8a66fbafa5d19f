"""A large set with AudioSet's label frequencies: opening it, and drawing from it.

Two million clips; 200,000 on a CPU, unless FASTAT_BENCH_FULL=1.

The clips' labels are rows of AudioSet's balanced table, drawn with replacement, from the folder
that FASTAT_TEST_AUDIO names. The shards' waveforms are holes: those of two million clips are 600
GiB that take 0.3 on the disk.
"""

import csv
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from pytest_benchmark.fixture import BenchmarkFixture

from bench.packed_sets import write_set
from bench.results import sized, write_row
from fastat.data.sampler import Sampler, balanced_weights
from fastat.data.shards import PackedSet

NUM_CLIPS, SMALL = sized(2_000_000, 200_000), 20_000
BATCH = 448
SIZES = {"large": NUM_CLIPS, "small": SMALL}

OPEN = """
import re, sys, time
from fastat.data.sampler import Sampler, balanced_weights
from fastat.data.shards import PackedSet
started = time.perf_counter()
packed = PackedSet.open(sys.argv[1])
opened = time.perf_counter()
weights = balanced_weights(packed.target_bits, packed.label_counts)
sampler = Sampler(packed.num_clips, 448, seed=0, num_frames=400, num_mels=64, weights=weights)
ready = time.perf_counter()
status = open("/proc/self/status").read()
kib = [re.search(name + r":\\s+(\\d+)", status).group(1) for name in ("VmRSS", "VmHWM")]
print(opened - started, ready - opened, *kib)
"""
"""In a process of its own, for the memory: seconds to open, to make the sampler; KiB resident now,
and at most."""


@pytest.fixture(scope="module")
def labels() -> NDArray[np.bool_]:
    """[22,160, 527] of the balanced table."""
    folder = Path(os.environ.get("FASTAT_TEST_AUDIO", "nowhere")) / "audioset"
    if not folder.is_dir():
        pytest.skip("FASTAT_TEST_AUDIO names no folder with AudioSet's tables")
    with (folder / "class_labels_indices.csv").open(newline="") as file:
        column = {line["mid"]: int(line["index"]) for line in csv.DictReader(file)}
    with (folder / "balanced_train_segments.csv").open(newline="") as file:
        lines = [line for line in csv.reader(file, skipinitialspace=True) if line[0][0] != "#"]
    found = np.zeros((len(lines), len(column)), bool)
    for row, line in enumerate(lines):
        found[row, [column[mid] for mid in line[3].split(",")]] = True
    return found


@pytest.fixture(scope="module")
def folders(
    labels: NDArray[np.bool_], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Path]]:
    bits = np.packbits(labels, axis=1)
    rng = np.random.default_rng(0)
    made = {}
    for name, num_clips in SIZES.items():
        made[name] = tmp_path_factory.mktemp(name)
        drawn = bits[rng.integers(len(bits), size=num_clips)]
        write_set(made[name], drawn, [f"/m/{k}" for k in range(labels.shape[1])])
    yield made
    for folder in made.values():
        shutil.rmtree(folder)


def sampler(folder: Path) -> Sampler:
    packed = PackedSet.open(folder)
    return Sampler(
        packed.num_clips, BATCH, seed=0, num_frames=400, num_mels=64, mixup=0.3, time_mask=75,
        freq_mask=12, weights=balanced_weights(packed.target_bits, packed.label_counts),
    )  # fmt: skip


def test_open(benchmark: BenchmarkFixture, folders: dict[str, Path]) -> None:
    """Time and memory from nothing to a sampler, the shards' small datasets in the page cache."""
    benchmark.group = "data: opening a large set"
    found: list[list[float]] = []

    def opened() -> None:
        command = [sys.executable, "-c", OPEN, str(folders["large"])]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found.append([float(x) for x in done.stdout.split()])

    benchmark.pedantic(opened, rounds=3, warmup_rounds=1)
    if benchmark.disabled:
        return
    open_s, sampler_s, resident, peak = np.median(found[1:], axis=0).tolist()
    row = write_row(
        area="data", op="open a set", impl="ours", shape=f"{NUM_CLIPS:,} clips", passes="set",
        ms=1e3 * (open_s + sampler_s), ms_open=1e3 * open_s, ms_sampler=1e3 * sampler_s,
        resident_gib=resident / 2**20, peak_gib=peak / 2**20,
    )  # fmt: skip
    benchmark.extra_info.update(row)


def test_weights_follow_the_formula(folders: dict[str, Path]) -> None:
    packed = PackedSet.open(folders["small"])
    found = packed.targets(np.arange(SMALL)).astype(np.float64)
    by_hand = found @ (1000.0 / (packed.label_counts + 0.01))
    weights = balanced_weights(packed.target_bits, packed.label_counts)
    np.testing.assert_allclose(weights, by_hand, rtol=1e-12)


def test_order_of_an_epoch(benchmark: BenchmarkFixture, folders: dict[str, Path]) -> None:
    benchmark.group = "data: order of an epoch"
    s = sampler(folders["large"])
    epochs = iter(range(100))
    order = benchmark.pedantic(lambda: s.order(next(epochs)), rounds=3)
    assert len(order) == NUM_CLIPS // BATCH * BATCH
    # With replacement, by the weights: the rarest clips come up as often as they should.
    assert s.cumulative is not None
    weights = np.diff(s.cumulative, prepend=0.0)
    rare = weights > np.quantile(weights, 0.99)
    expected = weights[rare].sum() / weights.sum() * len(order)
    assert abs(rare[order].sum() - expected) < 5 * expected**0.5
    kept(benchmark, "order of an epoch", f"{NUM_CLIPS:,} clips", "epoch")


@pytest.mark.benchmark(group="data: plan of a step")
@pytest.mark.parametrize("where", ["first", "last"])
@pytest.mark.parametrize("size", SIZES)
def test_plan(benchmark: BenchmarkFixture, folders: dict[str, Path], size: str, where: str) -> None:
    s = sampler(folders[size])
    s.order(0)
    step = {"first": 0, "last": s.steps_per_epoch - 1}[where]
    benchmark.pedantic(s.plan, args=(0, step), rounds=200, warmup_rounds=10)
    kept(benchmark, "plan of a step", f"{SIZES[size]:,} clips, {where}", "step")


def kept(benchmark: BenchmarkFixture, op: str, shape: str, passes: str) -> None:
    """Writes what was timed."""
    if not benchmark.disabled:
        stats = benchmark.stats.stats
        row = write_row(
            area="data", op=op, impl="ours", shape=shape, passes=passes, ms=1e3 * stats.median,
            ms_min=1e3 * stats.min,
        )  # fmt: skip
        benchmark.extra_info.update(row)
