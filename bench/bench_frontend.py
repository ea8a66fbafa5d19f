"""The front end against the libraries' ways to the same features, clips of ten seconds.

torchaudio's way is its own sequence of torch calls (``tests/reference_features.py``), because its
binaries lag behind torch; transformers' is ASTFeatureExtractor in numpy. Every implementation is
held to the criterion on the clips it is timed on. ``test_against_the_best_peer`` runs all of them
in turns, each at every batch and thread count, and compares the best of each.
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

from fastat.features import FEATURES
from fastat.frontend import Augment, Frontend
from tests import reference_features as reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
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


CASES = [
    (name, impl, batch, threads)
    for name in FEATURES
    for impl in implementations(name)
    for batch, threads in configurations(impl)
]


@pytest.mark.parametrize(("name", "impl", "batch", "threads"), CASES)
def test_log_mel(
    benchmark: BenchmarkFixture, name: str, impl: str, batch: int, threads: int
) -> None:
    benchmark.group = f"frontend: {name}"
    run, wave = implementations(name)[impl], noise(batch)
    with torch_threads(threads):
        check(name, run, wave)
        benchmark.pedantic(synchronised(run), (wave,), rounds=max(3, 32 // batch), warmup_rounds=1)
    benchmark.extra_info.update(
        device=device_name(), threads=threads, batch=batch,
        clips_per_s=batch / benchmark.stats.stats.median,
    )  # fmt: skip


@pytest.mark.parametrize("name", FEATURES)
def test_against_the_best_peer(benchmark: BenchmarkFixture, name: str) -> None:
    """Every implementation in turns, so that what else the machine does hits all alike."""
    benchmark.group = "frontend: against the best peer"
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
    benchmark.pedantic(turn, rounds=3)
    median = {case: statistics.median(times) for case, times in seconds.items()}
    ours = min((case for case in median if case[0] == "ours"), key=median.__getitem__)
    peer = min((case for case in median if case[0] != "ours"), key=median.__getitem__)
    ratio = median[peer] / median[ours]
    benchmark.extra_info.update(
        device=device_name(), ratio=ratio,
        ours=label(ours), ours_clips_per_s=1 / median[ours],
        best_peer=label(peer), best_peer_clips_per_s=1 / median[peer],
        all_clips_per_s={label(case): 1 / t for case, t in median.items()},
    )  # fmt: skip
    if DEVICE.type == "cpu":
        assert ratio >= BAR[name], f"{name}: {ratio:.2f} x {label(peer)}, bar {BAR[name]}"


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("name", FEATURES)
def test_whole_step(benchmark: BenchmarkFixture, name: str, threads: int) -> None:
    """What a training step asks for: int16 rows, mixup partners, lengths, masks, normalisation."""
    benchmark.group = f"frontend: whole step, {name}"
    clips = BATCHES[-1] if DEVICE.type == "cuda" else 16
    partners = round(0.3 * clips)
    wave = (noise(clips + partners) * 32768).to(torch.int16)
    counts = torch.full((clips + partners,), wave.shape[1], device=DEVICE)
    mask = torch.tensor([[10, 12]] * clips, device=DEVICE)
    augment = Augment(
        mix_into=torch.arange(partners, device=DEVICE),
        lam=torch.full((partners,), 0.4, device=DEVICE),
        time_mask=mask,
        freq_mask=mask,
    )
    model = Frontend(name).to(DEVICE)
    plain = model(wave[:clips])
    got = model(wave, counts, augment)
    torch.testing.assert_close(got[-1, 30:, 30:], plain[-1, 30:, 30:], rtol=0, atol=1e-3)
    with torch_threads(threads):
        benchmark.pedantic(
            synchronised(lambda x: model(x, counts, augment)), (wave,), rounds=10, warmup_rounds=2
        )
    benchmark.extra_info.update(
        device=device_name(), threads=threads, batch=clips, partners=partners,
        clips_per_s=clips / benchmark.stats.stats.median,
    )  # fmt: skip


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


def device_name() -> str:
    return torch.cuda.get_device_name() if DEVICE.type == "cuda" else f"cpu x {os.cpu_count()}"
