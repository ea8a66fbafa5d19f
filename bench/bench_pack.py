"""fastat pack: two workers on 44.1 kHz mono FLAC, statistics included; what a clip costs."""

import itertools
import os
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import soxr
from numpy.typing import NDArray
from pytest_benchmark.fixture import BenchmarkFixture

from bench.results import sized, write_row
from fastat.audio.decode import decode, to_int16
from fastat.data.shards import PackedSet
from fastat.packing.pack import pack
from fastat.packing.statistics import Meter
from fastat.packing.summary import PackSummary

SECONDS, RATE = 10, 44_100
NUM_FILES = 50
NUM_CLIPS = sized(4_000, 800)
TARGET_CLIPS_PER_S = 200


def scene(rng: np.random.Generator) -> NDArray[np.float32]:
    """Ten seconds: coloured noise that comes and goes, decaying harmonic tones, a noise floor."""
    t = np.arange(SECONDS * RATE) / RATE
    spectrum = np.fft.rfft(rng.standard_normal(len(t)))
    spectrum[1:] *= np.arange(1, len(spectrum)) ** -rng.uniform(0.3, 0.8)
    noise = np.fft.irfft(spectrum, len(t))
    x = noise / noise.std() * (0.03 + 0.05 * np.sin(2 * np.pi * rng.uniform(0.1, 2.0) * t) ** 2)
    for _ in range(5):
        onset, pitch = rng.uniform(0, SECONDS), rng.uniform(80, 1500)
        decay = np.where(t >= onset, np.exp(-3 * np.maximum(t - onset, 0)), 0.0)
        for harmonic in range(1, 6):
            x += 0.1 / harmonic * decay * np.sin(2 * np.pi * pitch * harmonic * t)
    x += 1e-3 * rng.standard_normal(len(t))
    samples: NDArray[np.float32] = np.clip(x, -1, 1).astype(np.float32)
    return samples


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CSV of many clips, hard links to a few files: making them takes less than packing."""
    folder = tmp_path_factory.mktemp("pack")
    rng = np.random.default_rng(0)
    for i in range(NUM_FILES):
        sf.write(folder / f"{i:05d}.flac", scene(rng), RATE, subtype="PCM_16")
    for i in range(NUM_FILES, NUM_CLIPS):
        os.link(folder / f"{i % NUM_FILES:05d}.flac", folder / f"{i:05d}.flac")
    lines = [f"{i:05d}.flac,class {i % 7}" for i in range(NUM_CLIPS)]
    csv = folder / "clips.csv"
    csv.write_text("\n".join(["path,label", *lines]) + "\n")
    return csv


def test_pack_two_workers(benchmark: BenchmarkFixture, table: Path, tmp_path: Path) -> None:
    benchmark.group = "data: pack"
    out = tmp_path / "set"
    summary: PackSummary = benchmark.pedantic(
        pack, args=(table, out), kwargs={"workers": 2}, rounds=1, warmup_rounds=0
    )
    packed = PackedSet.open(out)
    assert (summary.clips, summary.bad, packed.num_clips) == (NUM_CLIPS, 0, NUM_CLIPS)
    assert all(stats.num_clips > 0 for stats in packed.stats.values())
    rows = np.arange(0, NUM_CLIPS, 97)
    waveform = np.empty((len(rows), SECONDS * 16_000), np.int16)
    packed.read_rows(rows, waveform)
    for row, samples in zip(rows.tolist(), waveform, strict=True):
        audio, _ = sf.read(table.parent / f"{row % NUM_FILES:05d}.flac", dtype="float32")
        expected = np.rint(soxr.resample(audio, RATE, 16_000, quality="HQ") * 32768)
        assert np.array_equal(samples, np.clip(expected, -32768, 32767))
    packed.close()

    if benchmark.disabled:
        return
    seconds = benchmark.stats.stats.median
    result = write_row(
        area="data",
        op="pack",
        impl="ours",
        shape=f"44.1 kHz FLAC, {NUM_CLIPS} clips, 2 workers",
        passes="clip",
        ms=1e3 * seconds / NUM_CLIPS,
        cores=len(os.sched_getaffinity(0)),
        flac_bytes_per_clip=(table.parent / "00000.flac").stat().st_size,
        stats_clips=packed.stats["logmel64"].num_clips,
        clips_per_s=NUM_CLIPS / seconds,
        least_clips_per_s=TARGET_CLIPS_PER_S,
    )
    benchmark.extra_info.update(result)


@pytest.mark.parametrize("part", ["flac", "soxr", "decode", "int16", "crc", "statistics", "write"])
def test_cost_of_a_clip(
    benchmark: BenchmarkFixture, table: Path, tmp_path: Path, part: str
) -> None:
    """One core, one file over and over; ``decode`` is flac and soxr, as a worker does it."""
    benchmark.group = "data: what packing a clip costs"
    path = table.parent / "00000.flac"
    audio, _ = sf.read(path, dtype="float32")
    samples = decode(path, seconds=SECONDS).samples
    row = to_int16(samples)
    assert row.shape == (SECONDS * 16_000,)
    meter = Meter(len(row))

    def measured() -> None:
        meter.add(row, len(row))
        meter.finish()

    target = os.open(tmp_path / "rows", os.O_WRONLY | os.O_CREAT)
    rows = itertools.count()
    parts: dict[str, Callable[[], object]] = {
        "flac": lambda: sf.read(path, dtype="float32"),
        "soxr": lambda: soxr.resample(audio, RATE, 16_000, quality="HQ"),
        "decode": lambda: decode(path, seconds=SECONDS),
        "int16": lambda: to_int16(samples),
        "crc": lambda: zlib.crc32(row.data),
        "statistics": measured,
        "write": lambda: os.pwrite(target, row.data, next(rows) * row.nbytes),
    }
    benchmark.pedantic(parts[part], rounds=30, warmup_rounds=3)
    os.close(target)
    if benchmark.disabled:
        return
    stats = benchmark.stats.stats
    result = write_row(
        area="data", op="packing a clip", impl="ours", shape=f"44.1 kHz FLAC: {part}",
        passes="clip", ms=1e3 * stats.median, ms_min=1e3 * stats.min,
    )  # fmt: skip
    benchmark.extra_info.update(result)
