"""The front end against the libraries' ways to the same features, clips of ten seconds.

torchaudio's way is its own sequence of torch calls (``tests/reference_features.py``), because its
binaries lag behind torch; transformers' is ASTFeatureExtractor in numpy. Every implementation is
held to the criterion. All of them run in turns, each at every batch and thread count, and the best
of each are compared. ``bench_log_mel.py`` times single shapes, and what a training step asks for.
"""

import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor
from transformers import ASTFeatureExtractor

from bench.results import DEVICE, sized, write_row
from fastat.audio.features import FEATURES
from fastat.audio.frontend import Frontend
from tests import reference_features as reference

BATCHES = (64, 448) if DEVICE.type == "cuda" else (1, 4, 16, 64)
THREADS = (1,) if DEVICE.type == "cuda" else tuple(sorted({1, os.cpu_count() or 1}))
BAR = {"logmel64": 2.0, "fbank128": 1.3}
"""The least ratio to the best peer's clips/s, on a CPU."""

Impl = Callable[[Tensor], Tensor]


def implementations(name: str) -> dict[str, Impl]:
    """What makes the feature: [B, S] float32 -> [B, T, F], by name."""
    ours = Frontend(name).to(DEVICE)
    if name == "logmel64":
        slaney = torch.from_numpy(reference.slaney_bank()).float().to(DEVICE)
        return {"ours": ours.log_mel, "torchaudio": lambda x: reference.torch_logmel64(x, slaney)}
    kaldi = torch.from_numpy(reference.kaldi_bank()).float().to(DEVICE)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="At least one mel filter")
        extract = ASTFeatureExtractor(num_mel_bins=128, do_normalize=False)

    def transformers(x: Tensor) -> Tensor:
        features = extract(list(x.cpu().numpy()), sampling_rate=16000, return_tensors="pt")
        mel: Tensor = features["input_values"]
        return mel.to(DEVICE)

    return {
        "ours": ours.log_mel,
        "torchaudio": lambda x: torch.stack([reference.torch_fbank128(clip, kaldi) for clip in x]),
        "transformers": transformers,
    }


def configurations(impl: str) -> list[tuple[int, int]]:
    """(batch, threads) to try: numpy takes clip after clip and has no threads."""
    if impl == "transformers":
        return [(4, 1)]
    return [(batch, threads) for batch in BATCHES for threads in THREADS]


@pytest.mark.parametrize("name", FEATURES)
def test_against_the_best_peer(benchmark: BenchmarkFixture, name: str) -> None:
    """Every implementation in turns, so that what else the machine does hits all alike."""
    benchmark.group = "data: front end, against the best peer"
    impls = implementations(name)
    for run in impls.values():
        check(name, run, noise(2))
    seconds: dict[tuple[str, int, int], list[float]] = {}

    def turn() -> None:
        for impl, run in impls.items():
            for batch, threads in configurations(impl):
                wave = noise(batch)
                with torch_threads(threads):
                    start = time.perf_counter()
                    synchronised(run)(wave)
                    elapsed = time.perf_counter() - start
                seconds.setdefault((impl, batch, threads), []).append(elapsed / batch)

    turn()
    seconds.clear()  # the first turn warmed up
    benchmark.pedantic(turn, rounds=sized(3, 2))
    if benchmark.disabled:
        return
    median = {case: statistics.median(times) for case, times in seconds.items()}
    best = {
        impl: min((c for c in median if c[0] == impl), key=median.__getitem__) for impl in impls
    }
    for impl, case in best.items():
        row = write_row(
            area="data", op="front end", impl=impl, shape=f"{name}, best batch and threads",
            passes="clip", ms=1e3 * median[case], clips_per_s=1 / median[case], batch=case[1],
            threads=case[2],
        )  # fmt: skip
        benchmark.extra_info[label(case)] = row["clips_per_s"]
    peer_s = min(median[case] for impl, case in best.items() if impl != "ours")
    ratio = peer_s / median[best["ours"]]
    if DEVICE.type == "cpu":
        assert ratio >= BAR[name], f"{name}: {ratio:.2f} x the best peer, bar {BAR[name]}"


def noise(batch: int) -> Tensor:
    generator = torch.Generator().manual_seed(batch)
    return (torch.randn(batch, 160_000, generator=generator) * 0.1).clamp_(-1, 1).to(DEVICE)


def check(name: str, run: Impl, wave: Tensor) -> None:
    real = FEATURES[name].real_frames(wave.shape[1])
    mel = run(wave)
    for row in (0, len(wave) - 1):
        got = np.asarray(mel[row, :real].cpu().numpy())
        want = reference.REFERENCE[name](wave[row].double().cpu().numpy())
        assert reference.near_error(name, got, want) <= reference.TOLERANCE


def synchronised(run: Impl) -> Callable[[Tensor], None]:
    def timed(x: Tensor) -> None:
        run(x)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    return timed


@contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def label(case: tuple[str, int, int]) -> str:
    impl, batch, threads = case
    return f"{impl} B={batch} threads={threads}"
