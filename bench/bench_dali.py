"""Clips a second up to the features: DALI decoding the original files, and the packed source.

Both deliver the same plans (batches of 16 clips of ten seconds, five of them mixed) as normalised
64 x 400 features; the packed source's come from ``Frontend``. DALI gets the same two threads.
"""

import numpy as np
import pytest
import soundfile as sf
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench.results import DEVICE, write_row
from fastat.audio.frontend import Frontend
from fastat.data.dali import DaliSource
from fastat.data.loader import PackedSource, Source
from fastat.data.sampler import StepPlan
from fastat.data.shards import PackedSet
from fastat.packing.pack import pack

NUM_CLIPS, BATCH, NUM_STEPS, MIXED, THREADS = 32, 16, 4, 5, 2
RATES = [16_000, 44_100]


@pytest.fixture(scope="module", params=RATES, ids=lambda rate: f"{rate / 1000:g}kHz-flac")
def packed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PackedSet:
    rate: int = request.param
    folder = tmp_path_factory.mktemp(f"{rate / 1000:g} kHz FLAC", numbered=False)
    rng = np.random.default_rng(0)
    (folder / "files" / "noise").mkdir(parents=True)
    for i in range(NUM_CLIPS):
        # Brown noise: FLAC finds about as much to predict in it as in recordings.
        x = np.cumsum(rng.standard_normal(10 * rate)) * 0.1
        x -= np.convolve(x, np.ones(200) / 200, "same")
        sf.write(folder / "files" / "noise" / f"{i}.flac", 0.5 * x / np.abs(x).max(), rate)
    pack(folder / "files", folder / "set", workers=1)
    return PackedSet.open(folder / "set")


@pytest.mark.parametrize("name", ["packed", "dali"])
def test_features_of_batches(benchmark: BenchmarkFixture, packed: PackedSet, name: str) -> None:
    shape = f"{packed.directory.parent.name}, batch {BATCH}"
    benchmark.group = f"data: features from files, {shape}"
    rng = np.random.default_rng(0)
    no_mask = np.zeros((BATCH, 2), np.int64)
    plans = [
        StepPlan(
            rows=rng.integers(0, NUM_CLIPS, BATCH),
            partners=rng.integers(0, NUM_CLIPS, MIXED),
            mix_into=np.arange(MIXED),
            lam=rng.beta(10, 10, MIXED).astype(np.float32),
            time_mask=no_mask,
            freq_mask=no_mask,
        )
        for _ in range(NUM_STEPS)
    ]
    frontend = Frontend("logmel64").to(DEVICE)
    source: Source = PackedSource(packed, DEVICE)
    want = [batch.features(frontend) for batch in source.batches(plans[:1])]
    if name == "dali":
        source = DaliSource(packed, "logmel64", batch=BATCH, threads=THREADS, device=DEVICE)

    def epoch() -> list[torch.Tensor]:
        features = [batch.features(frontend) for batch in source.batches(plans)]
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        return features

    error = (epoch()[0] - want[0]).abs()
    torch.testing.assert_close(error.median().item(), 0.0, rtol=0, atol=1e-3)
    benchmark.pedantic(epoch, rounds=3, warmup_rounds=1)
    if benchmark.disabled:
        return
    clips = NUM_STEPS * BATCH
    seconds = benchmark.stats.stats.median
    row = write_row(
        area="data", op="features from files", impl="ours" if name == "dali" else "packed rows",
        shape=shape, passes="clip", ms=1e3 * seconds / clips, clips_per_s=clips / seconds,
        ms_min=1e3 * benchmark.stats.stats.min / clips, threads=THREADS,
    )  # fmt: skip
    benchmark.extra_info.update(row)
