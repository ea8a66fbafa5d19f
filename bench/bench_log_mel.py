"""log_mel: waveforms to normalised features, ours beside the libraries' ways, clips of ten seconds.

"features" is what evaluation asks for: int16 rows, mean removal, features, normalisation. "step" is
what training asks for: mixup partners, lengths, masks too; only the front end's own two ways do it.
DALI's pipeline is fed waveforms that are on the device; ``bench_dali.py`` times it from files.
"""

import importlib
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from bench.results import DEVICE, ON_GPU
from bench.timing import DEVICE_CLOCK, timed
from fastat.audio.features import FEATURES
from fastat.audio.frontend import Augment, Frontend
from fastat_kernels.backend import kernels
from tests import reference_features as reference

pytestmark = DEVICE_CLOCK

SAMPLES = 160_000
# The batches of A4, A3, A2, A1
SHAPES = (
    [("logmel64", 448), ("logmel64", 80), ("fbank128", 400), ("fbank128", 20)]
    if ON_GPU
    else [("logmel64", 4), ("fbank128", 4)]
)
MIXED = 0.3
FLOP_A_FRAME = {"logmel64": 78e3, "fbank128": 11e3}

Run = Callable[[Tensor], Tensor]


def ours(name: str) -> Run:
    return Frontend(name).to(DEVICE)


def library(name: str) -> Run:
    """The front end's way where the operator is not chosen."""
    return Frontend(name).to(DEVICE)


def library_compiled(name: str) -> Run:
    return torch.compile(Frontend(name).to(DEVICE), dynamic=False)


def normalised(name: str, mel: Tensor) -> Tensor:
    feature = FEATURES[name]
    return (mel - feature.mean) / (2 * feature.std)


def centred(wave: Tensor) -> Tensor:
    x = wave.float() / 32768
    return x - x.mean(1, keepdim=True)


def torch_eager(name: str) -> Run:
    """torch.stft and a matrix product; Kaldi's sequence on all frames at once."""
    if name == "logmel64":
        slaney = torch.from_numpy(reference.slaney_bank()).float().to(DEVICE)
        return lambda wave: normalised(name, reference.torch_logmel64(centred(wave), slaney))
    kaldi = torch.from_numpy(reference.kaldi_bank()).float().to(DEVICE)
    window = torch.hann_window(400, periodic=False, device=DEVICE)

    def run(wave: Tensor) -> Tensor:
        frames = centred(wave).unfold(1, 400, 160)
        frames = frames - frames.mean(2, keepdim=True)
        before = torch.cat((frames[..., :1], frames[..., :-1]), 2)
        power = torch.fft.rfft((frames - 0.97 * before) * window, 512).abs().square()
        mel = torch.matmul(power, kaldi).clamp(min=torch.finfo(torch.float32).eps).log()
        return normalised(name, torch.nn.functional.pad(mel, (0, 0, 0, 1024 - mel.shape[1])))

    return run


def torch_compiled(name: str) -> Run:
    return torch.compile(torch_eager(name), dynamic=False)


def torchaudio(name: str) -> Run:
    try:
        transforms = importlib.import_module("torchaudio.transforms")
    except (ImportError, OSError) as error:  # its binaries lag behind torch
        pytest.skip(f"torchaudio does not import: {error}")
    if name == "fbank128":
        pytest.skip("torchaudio.compliance.kaldi.fbank takes one clip at a time")
    mel = transforms.MelSpectrogram(
        16_000, 4096, 1024, 400, 0.0, 8000.0, n_mels=64, pad_mode="constant", norm="slaney",
        mel_scale="slaney",
    ).to(DEVICE)  # fmt: skip
    decibels = transforms.AmplitudeToDB("power")
    return lambda wave: normalised(name, decibels(mel(centred(wave)))[..., :400].transpose(1, 2))


def dali(name: str) -> Run:
    if name == "fbank128":
        pytest.skip("DALI has no Kaldi filter banks")
    try:
        from nvidia.dali import fn, pipeline_def, types
    except ImportError as error:
        pytest.skip(f"DALI does not import: {error}")
    feature = FEATURES[name]

    @pipeline_def(num_threads=torch.get_num_threads(), prefetch_queue_depth=1)  # type: ignore
    def graph() -> Any:
        x = fn.external_source(name="wave", dtype=types.INT16, ndim=1, device=DEVICE.type)
        x = fn.cast(x, dtype=types.FLOAT) / 32768.0
        power = fn.spectrogram(
            x - fn.reductions.mean(x), nfft=feature.n_fft, window_length=feature.window_samples,
            window_step=feature.hop_samples, window_fn=feature.window().tolist(),
            center_windows=True, reflect_padding=False, power=2, layout="tf",
        )  # fmt: skip
        mel = fn.mel_filter_bank(
            power, nfilter=64, sample_rate=16_000.0, freq_high=8000.0, mel_formula="slaney",
            normalize=True,
        )  # fmt: skip
        decibels = fn.to_decibels(mel, multiplier=10.0, reference=1.0, cutoff_db=-100.0)
        return (decibels[:400] - feature.mean) / (2 * feature.std)

    pipes: dict[int, Any] = {}

    def run(wave: Tensor) -> Tensor:
        pipe = pipes.get(len(wave))
        if pipe is None:
            pipe = graph(batch_size=len(wave), device_id=0 if ON_GPU else None)
            pipe.build()
            pipes[len(wave)] = pipe
        pipe.feed_input("wave", wave if ON_GPU else wave.numpy())
        (out,) = pipe.run()
        return torch.from_dlpack(out.as_tensor()).clone()  # type: ignore[attr-defined]

    return run


IMPLS: dict[str, Callable[[str], Run]] = {
    "ours": ours,
    **({"library": library} if ON_GPU else {}),  # elsewhere that is ours
    "library compiled": library_compiled,
    "torch": torch_eager,
    "torch compiled": torch_compiled,
    "torchaudio": torchaudio,
    "DALI": dali,
}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name, batch", SHAPES)
def test_features(benchmark: BenchmarkFixture, impl: str, name: str, batch: int) -> None:
    wave = noise(batch)
    run = IMPLS[impl](name)

    def step() -> Tensor:
        with torch.no_grad(), kernels(["log_mel"]) if impl == "ours" else nullcontext():
            return run(wave)

    check(name, step(), wave)
    time_it(benchmark, step, name, impl, "features", wave, batch)


@pytest.mark.parametrize("impl", [name for name in IMPLS if name.split()[0] in ("ours", "library")])
@pytest.mark.parametrize("name, batch", SHAPES)
def test_step(benchmark: BenchmarkFixture, impl: str, name: str, batch: int) -> None:
    partners = round(MIXED * batch)
    wave = noise(batch + partners)
    counts = torch.full((batch + partners,), SAMPLES, device=DEVICE)
    mask = torch.tensor([[10, 12]] * batch, device=DEVICE)
    augment = Augment(
        mix_into=torch.arange(partners, device=DEVICE),
        lam=torch.full((partners,), 0.4, device=DEVICE),
        time_mask=mask,
        freq_mask=mask,
    )
    run: Callable[..., Tensor] = IMPLS[impl](name)

    def step() -> Tensor:
        with kernels(["log_mel"]) if impl == "ours" else nullcontext():
            return run(wave, counts, augment)

    alone = Frontend(name).to(DEVICE)(wave[batch - 1 : batch])  # the last clip has no partner
    torch.testing.assert_close(step()[-1, 30:, 30:], alone[0, 30:, 30:], rtol=0, atol=1e-3)
    time_it(benchmark, step, name, impl, "step", wave, batch)


def time_it(
    benchmark: BenchmarkFixture,
    step: Callable[[], Tensor],
    name: str,
    impl: str,
    passes: str,
    wave: Tensor,
    batch: int,
) -> None:
    feature = FEATURES[name]
    frames = feature.num_frames(SAMPLES)
    timed(
        benchmark,
        step,
        op="log_mel",
        impl=impl,
        passes=passes,
        shape=f"{name} x {batch}",
        bytes_moved=wave.nbytes + 4 * batch * frames * feature.num_mels,
        flop=FLOP_A_FRAME[name] * batch * frames,
        clips=batch,
        graph=impl != "DALI",  # which launches on a stream of its own
    )


def noise(rows: int) -> Tensor:
    generator = torch.Generator().manual_seed(rows)
    wave = torch.randn(rows, SAMPLES, generator=generator) * 3277
    return wave.clamp_(-32768, 32767).to(torch.int16).to(DEVICE)


def check(name: str, got: Tensor, wave: Tensor) -> None:
    feature = FEATURES[name]
    real = feature.real_frames(SAMPLES)
    for row in (0, len(wave) - 1):
        x = wave[row].double().cpu().numpy() / 32768
        want = reference.REFERENCE[name](x - x.mean())
        mel = got[row, :real].double().cpu().numpy() * 2 * feature.std + feature.mean
        assert reference.near_error(name, mel.astype(np.float64), want) <= reference.TOLERANCE
