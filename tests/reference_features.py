"""Both features in float64 numpy, from the formulas alone: what the tests measure against.

Nothing here comes from ``fastat``. The criterion is the project's: a band within 60 dB of its
frame's peak is within 1e-3 (dB, or natural log); elsewhere it errs at most twice what float32 done
plainly errs. Elsewhere is where a band falls into a null of the spectrum now and then, and the
logarithm of what rounding leaves there is arbitrary: the largest logarithmic errors of two equally
good float32 implementations differ by more than twice either way. So what is compared is the root
mean square of the logarithmic errors, and the largest error of the amplitude against the frame's.
"""

import functools

import numpy as np
import torch
from numpy.typing import NDArray

Array = NDArray[np.float64]

NEAR_PEAK_DB = 60.0
TOLERANCE = 1e-3
PER_DB = {"logmel64": 1.0, "fbank128": np.log(10.0) / 10.0}
"""The unit of each feature, per decibel of power."""


@functools.cache
def slaney_bank() -> Array:
    """64 bands, 0..8 kHz, on 2049 bins of 16 kHz / 4096: [2049, 64], area-normalised."""

    def hz(mel: float) -> float:
        return mel * 200 / 3 if mel < 15 else 1000 * 6.4 ** ((mel - 15) / 27)

    top = 15 + 27 * np.log(8000 / 1000) / np.log(6.4)
    edges = [hz(top * i / 65) for i in range(66)]
    bank = np.zeros((2049, 64))
    for band in range(64):
        low, centre, high = edges[band : band + 3]
        for k in range(2049):
            f = k * 16000 / 4096
            if low < f <= centre:
                bank[k, band] = (f - low) / (centre - low)
            elif centre < f < high:
                bank[k, band] = (high - f) / (high - centre)
        bank[:, band] *= 2 / (high - low)
    return bank


@functools.cache
def kaldi_bank() -> Array:
    """128 bands, 20 Hz..8 kHz, on 257 bins of 16 kHz / 512: [257, 128], straight in mel."""

    def mel(f: float) -> float:
        return float(2595 * np.log10(1 + f / 700))

    step = (mel(8000) - mel(20)) / 129
    bank = np.zeros((257, 128))
    for band in range(128):
        centre = mel(20) + (band + 1) * step
        for k in range(257):
            bank[k, band] = max(0.0, 1 - abs(mel(k * 16000 / 512) - centre) / step)
    return bank


def logmel64(x: Array) -> Array:
    """x [S] -> [S // 400, 64] dB."""
    window = np.zeros(4096)
    window[1536:2560] = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(1024) / 1024)
    padded = np.concatenate((np.zeros(2048), x, np.zeros(2048)))
    frames = np.stack([padded[400 * t : 400 * t + 4096] for t in range(len(x) // 400)])
    power = np.abs(np.fft.rfft(frames * window)) ** 2
    return 10 * np.log10(np.maximum(power @ slaney_bank(), 1e-10))


def fbank128(x: Array) -> Array:
    """x [S] -> [1 + (S - 400) // 160, 128] natural log; no padding frames."""
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 399)
    frames = np.stack([x[160 * t : 160 * t + 400] for t in range(1 + (len(x) - 400) // 160)])
    frames = frames - frames.mean(1, keepdims=True)
    emphasised = frames.copy()
    emphasised[:, 1:] -= 0.97 * frames[:, :-1]
    emphasised[:, 0] -= 0.97 * frames[:, 0]
    power = np.abs(np.fft.rfft(emphasised * window, 512)) ** 2
    return np.log(np.maximum(power @ kaldi_bank(), np.finfo(np.float32).eps))


REFERENCE = {"logmel64": logmel64, "fbank128": fbank128}


def torch_logmel64(x: torch.Tensor, bank: torch.Tensor) -> torch.Tensor:
    """x [B, S] -> [B, S // 400, 64]: torchaudio's MelSpectrogram + AmplitudeToDB, op by op."""
    window = torch.hann_window(1024, device=x.device)
    spectrum = torch.stft(x, 4096, 400, 1024, window, pad_mode="constant", return_complex=True)
    mel = torch.matmul(spectrum.abs().pow(2.0).transpose(-1, -2), bank)
    return (10.0 * torch.log10(torch.clamp(mel, min=1e-10)))[:, : x.shape[1] // 400]


def torch_fbank128(x: torch.Tensor, bank: torch.Tensor) -> torch.Tensor:
    """x [S] -> [1 + (S - 400) // 160, 128]: torchaudio.compliance.kaldi.fbank, op by op."""
    frames = x.as_strided((1 + (len(x) - 400) // 160, 400), (160, 1))
    frames = frames - torch.mean(frames, dim=1).unsqueeze(1)
    offset = torch.nn.functional.pad(frames.unsqueeze(0), (1, 0), mode="replicate").squeeze(0)
    frames = frames - 0.97 * offset[:, :-1]
    frames = frames * torch.hann_window(400, periodic=False, device=x.device).unsqueeze(0)
    frames = torch.nn.functional.pad(frames.unsqueeze(0), (0, 112)).squeeze(0)
    power = torch.fft.rfft(frames).abs().pow(2.0)
    mel = torch.mm(power, bank)
    return torch.max(mel, torch.tensor(torch.finfo(torch.float32).eps, device=x.device)).log()


def near_peak(feature: str, want: Array) -> NDArray[np.bool_]:
    """The bands of want [T, F] that lie within 60 dB of their frame's peak."""
    near: NDArray[np.bool_] = (
        want >= want.max(axis=1, keepdims=True) - NEAR_PEAK_DB * PER_DB[feature]
    )
    return near


def near_error(feature: str, got: NDArray[np.floating], want: Array) -> float:
    """The largest error of ``got`` [T, F] in the bands near their frame's peak."""
    return float(np.abs(got - want)[near_peak(feature, want)].max())


def far_errors(feature: str, got: NDArray[np.floating], want: Array) -> tuple[float, float]:
    """In the other bands: the rms error, and the largest amplitude error over the frame's peak."""
    far = ~near_peak(feature, want)
    if not far.any():
        return 0.0, 0.0
    peak = want.max(axis=1, keepdims=True)
    to_log_amplitude = np.log(10) / 20 / PER_DB[feature]
    amplitude, true = (np.exp((x - peak) * to_log_amplitude) for x in (got, want))
    rms = float(np.sqrt(np.square(got - want)[far].mean()))
    return rms, float(np.abs(amplitude - true)[far].max())


def assert_right(
    feature: str, got: NDArray[np.float32], x: Array, num_frames: int | None = None
) -> None:
    """``got`` [T, F], the first ``num_frames`` (None: all) of the waveform ``x`` [S], is right."""
    want = REFERENCE[feature](x)[:num_frames]
    assert got.shape == want.shape, f"{feature}: shape {got.shape}, want {want.shape}"
    near = near_error(feature, got, want)
    assert near <= TOLERANCE, f"{feature}: {near:.2e} off near the peak, limit {TOLERANCE}"
    plain = far_errors(feature, plain_float32(feature, x.astype(np.float32))[:num_frames], want)
    # What would be right near the peak is right elsewhere, however lucky plain float32 was.
    floors = (TOLERANCE, TOLERANCE / PER_DB[feature] * np.log(10) / 20 * 10 ** (-NEAR_PEAK_DB / 20))
    for kind, err, base, floor in zip(
        ("rms", "amplitude"), far_errors(feature, got, want), plain, floors, strict=True
    ):
        assert err <= max(2 * base, floor), (
            f"{feature}: {kind} {err:.2e} off in quiet bands, float32 alone {base:.2e}"
        )


def plain_float32(feature: str, x: NDArray[np.float32]) -> NDArray[np.float32]:
    """The feature of x [S] as the libraries compute it in float32, [T, F]."""
    wave = torch.from_numpy(x)
    if feature == "logmel64":
        mel = torch_logmel64(wave[None], torch.from_numpy(slaney_bank()).float())[0]
    else:
        mel = torch_fbank128(wave, torch.from_numpy(kaldi_bank()).float())
    return np.asarray(mel.numpy(), dtype=np.float32)


def synthetic(samples: int = 160_000) -> dict[str, NDArray[np.float32]]:
    """Test waveforms by name, [S] each: loud, quiet, tonal, sparse, drifting."""
    t = np.arange(samples) / 16_000
    rng = np.random.default_rng(0)
    impulse = np.zeros(samples)
    impulse[samples // 3] = 1.0
    waves = {
        "noise": rng.normal(0, 0.1, samples),
        "clipped": np.clip(rng.normal(0, 2, samples), -1, 32767 / 32768),
        "quiet": rng.normal(0, 1e-4, samples),
        "tone": 0.9 * np.sin(2 * np.pi * 1000.3 * t),
        "high tone": 0.5 * np.sin(2 * np.pi * 7001 * t),
        "two tones": 0.5 * np.sin(2 * np.pi * 440 * t) + 1e-3 * np.sin(2 * np.pi * 3000 * t),
        "chirp": 0.7 * np.sin(2 * np.pi * (20 * t + 390 * t * t)),
        "infrasound": 0.5 * np.sin(2 * np.pi * 2 * t) + rng.normal(0, 0.01, samples),
        "offset": 0.5 + rng.normal(0, 0.01, samples),
        "impulse": impulse,
        "silence": np.zeros(samples),
    }
    return {name: wave.astype(np.float32) for name, wave in waves.items()}
