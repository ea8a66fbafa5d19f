"""Clips a second up to the features: from the cache, and from packed rows through the front end.

Both deliver the same plans (batches of 16 clips of ten seconds, five of them mixed) as normalised
features, the packed rows from the page cache. The cache lies in the memory of the host or of the
device, in 16 or 8 bits.
"""

from statistics import median
from time import perf_counter

import numpy as np
import pytest
import soundfile as sf
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench.results import DEVICE, sized, write_row
from fastat.audio.features import FEATURES
from fastat.audio.frontend import Frontend
from fastat.data.cache import CachedSource
from fastat.data.loader import PackedSource, Source
from fastat.data.sampler import Sampler
from fastat.data.shards import PackedSet
from fastat.packing.pack import pack

NUM_CLIPS, BATCH, NUM_STEPS, ROUNDS = 64, 16, 4, sized(5, 3)
CACHES = [("host", "float16"), ("host", "uint8"), ("device", "float16"), ("device", "uint8")]


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> PackedSet:
    folder = tmp_path_factory.mktemp("audio")
    rng = np.random.default_rng(0)
    (folder / "files" / "noise").mkdir(parents=True)
    for i in range(NUM_CLIPS):
        x = 0.1 * rng.standard_normal(160_000)
        sf.write(folder / "files" / "noise" / f"{i}.wav", x, 16_000)
    pack(folder / "files", folder / "set", workers=1)
    return PackedSet.open(folder / "set")


@pytest.mark.parametrize(("place", "dtype"), CACHES, ids=lambda value: str(value))
@pytest.mark.parametrize("feature", FEATURES)
def test_features_of_batches(
    benchmark: BenchmarkFixture, packed: PackedSet, feature: str, place: str, dtype: str
) -> None:
    benchmark.group = f"data: features from a cache, {feature}"
    spec = FEATURES[feature]
    sampler = Sampler(
        NUM_CLIPS,
        BATCH,
        seed=0,
        num_frames=spec.num_frames(packed.clip_samples),
        num_mels=spec.num_mels,
        mixup=0.3,
        time_mask=75,
        freq_mask=12,
    )
    plans = [sampler.plan(0, step) for step in range(NUM_STEPS)]
    frontend = Frontend(feature).to(DEVICE)

    def epoch(source: Source) -> list[torch.Tensor]:
        features = [batch.features(frontend) for batch in source.batches(plans)]
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        return features

    def seconds(source: Source) -> float:
        started = perf_counter()
        epoch(source)
        return perf_counter() - started

    cached = CachedSource(packed, feature, DEVICE, place=place, dtype=dtype)
    rows = PackedSource(packed, DEVICE)
    for got, want in zip(epoch(cached), epoch(rows), strict=True):
        assert (got - want).abs().median() < 0.05
    peer: list[float] = []

    def in_turns() -> None:
        peer.append(seconds(rows))

    benchmark.pedantic(epoch, (cached,), setup=in_turns, rounds=ROUNDS)
    if benchmark.disabled:
        return
    clips = NUM_STEPS * BATCH
    ours = benchmark.stats.stats.median
    for impl, epoch_s in (("ours", ours), ("packed rows", median(peer))):
        row = write_row(
            area="data", op="features from a cache", impl=impl, passes="clip",
            shape=f"{feature} {place} {dtype}, batch {BATCH}", ms=1e3 * epoch_s / clips,
            clips_per_s=clips / epoch_s,
        )  # fmt: skip
        benchmark.extra_info[impl] = row["clips_per_s"]
