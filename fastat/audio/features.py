"""The two features, defined exactly: framing, window, mel bank, statistics.

Source: Li, Qu, Huang, Metze, "AudioTagging Done Right" (2022), Table 1 and the authors' code.
``logmel64`` (64 x 400, procedures A3 and A4) is a centred power spectrum in decibels; ``fbank128``
(128 x 1024, A1 and A2) is Kaldi's filter bank on waveforms in [-1, 1] (not Kaldi's 16-bit scale:
the authors' statistics belong to [-1, 1]). Everything here is numpy in float64, so that any backend
can round it once; ``frontend`` computes the features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, overload

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

CLIP_SAMPLES = 160_000
"""Ten seconds at 16 kHz, the clip of the paper."""

KALDI_FRAME_MULTIPLE = 128
"""fbank128's 998 frames are padded to a multiple of this, 1024 for ten seconds."""


@dataclass(frozen=True, kw_only=True)
class Feature:
    """What one feature is: everything that decides its numbers."""

    name: str
    num_mels: int
    sample_rate: int = 16_000
    """Hz."""
    window_samples: int
    hop_samples: int
    n_fft: int
    """Length of the transform; the window is padded with zeros up to it."""
    min_hz: float
    max_hz: float
    kaldi: bool
    """Kaldi's way: frames inside the clip, per-frame DC removal, pre-emphasis, symmetric window,
    HTK mel scale, natural logarithm. Otherwise: frames centred on multiples of the hop with zeros
    around the clip, periodic window, Slaney mel scale and norm, decibels of power."""
    floor: float
    """Least power before the logarithm."""
    preemphasis: float = 0.0
    mean: float
    std: float
    """The authors' mean and standard deviation of the feature over AudioSet, in our units."""

    def num_frames(self, clip_samples: int) -> int:
        """Frames of a clip of ``clip_samples`` samples, padding frames included."""
        if not self.kaldi:
            return clip_samples // self.hop_samples
        frames = self._whole_frames(clip_samples)
        return -(-frames // KALDI_FRAME_MULTIPLE) * KALDI_FRAME_MULTIPLE

    @overload
    def real_frames(self, num_samples: int, clip_samples: int = CLIP_SAMPLES) -> int: ...
    @overload
    def real_frames(self, num_samples: Tensor, clip_samples: int = CLIP_SAMPLES) -> Tensor: ...
    def real_frames(
        self, num_samples: int | Tensor, clip_samples: int = CLIP_SAMPLES
    ) -> int | Tensor:
        """Frames that hold real audio when the first ``num_samples`` of the clip do; none if none
        do.

        At most ``num_frames(clip_samples)``. A tensor gives a tensor of its shape, dtype and
        device.
        """
        frames = self.num_frames(clip_samples)
        if isinstance(num_samples, int):
            return min(self._whole_frames(num_samples), frames)
        if self.kaldi:
            whole = 1 + (num_samples - self.window_samples) // self.hop_samples
        else:
            # An empty clip has no frame, though the formula's frame 0 is centred on sample 0.
            whole = (1 + num_samples // self.hop_samples) * (num_samples > 0)
        return whole.clamp(0, frames)

    def _whole_frames(self, num_samples: int) -> int:
        if self.kaldi:
            return max(0, 1 + (num_samples - self.window_samples) // self.hop_samples)
        return 1 + num_samples // self.hop_samples if num_samples > 0 else 0

    def window(self) -> NDArray[np.float64]:
        """The Hann window, [window_samples]: symmetric for Kaldi, else periodic."""
        period = self.window_samples - 1 if self.kaldi else self.window_samples
        n = np.arange(self.window_samples)
        return 0.5 - 0.5 * np.cos(2 * np.pi * n / period)

    def mel_bank(self) -> NDArray[np.float64]:
        """Weights from the power spectrum to the mel bands, [n_fft / 2 + 1, num_mels].

        Kaldi's triangles are straight on the mel axis and peak at 1; Slaney's are straight in Hz
        and have unit area. At 512 points some of Kaldi's lowest bands lie between two bins and stay
        empty.
        """
        scale: Literal["htk", "slaney"] = "htk" if self.kaldi else "slaney"
        hz = np.arange(self.n_fft // 2 + 1) * (self.sample_rate / self.n_fft)
        ends = hz_to_mel(np.array([self.min_hz, self.max_hz]), scale)
        edges = np.linspace(ends[0], ends[1], self.num_mels + 2)
        position = hz_to_mel(hz, scale) if self.kaldi else hz
        edges = edges if self.kaldi else mel_to_hz(edges)
        left, centre, right = edges[:-2], edges[1:-1], edges[2:]
        rising = (position[:, None] - left) / (centre - left)
        falling = (right - position[:, None]) / (right - centre)
        bank = np.maximum(0.0, np.minimum(rising, falling))
        if not self.kaldi:
            bank *= 2.0 / (right - left)
        return bank


# Slaney's Auditory Toolbox: linear below 1 kHz, then 27 steps to the factor 6.4.
_SLANEY_HZ_PER_MEL = 200.0 / 3.0
_SLANEY_BREAK_HZ = 1000.0
_SLANEY_BREAK_MEL = _SLANEY_BREAK_HZ / _SLANEY_HZ_PER_MEL
_SLANEY_LOG_STEP = np.log(6.4) / 27.0


def hz_to_mel(hz: NDArray[np.floating], scale: Literal["htk", "slaney"]) -> NDArray[np.float64]:
    """Frequencies in Hz -> mel, any shape."""
    if scale == "htk":
        return np.asarray(1127.0 * np.log1p(hz / 700.0))
    above = np.log(np.maximum(hz, _SLANEY_BREAK_HZ) / _SLANEY_BREAK_HZ) / _SLANEY_LOG_STEP
    return np.where(hz < _SLANEY_BREAK_HZ, hz / _SLANEY_HZ_PER_MEL, _SLANEY_BREAK_MEL + above)


def mel_to_hz(mel: NDArray[np.floating]) -> NDArray[np.float64]:
    """Slaney mel -> Hz, any shape."""
    above = np.exp((np.maximum(mel, _SLANEY_BREAK_MEL) - _SLANEY_BREAK_MEL) * _SLANEY_LOG_STEP)
    return np.where(mel < _SLANEY_BREAK_MEL, mel * _SLANEY_HZ_PER_MEL, _SLANEY_BREAK_HZ * above)


FEATURES: dict[str, Feature] = {
    feature.name: feature
    for feature in (
        Feature(
            name="logmel64",
            num_mels=64,
            window_samples=1024,
            hop_samples=400,
            n_fft=4096,
            min_hz=0.0,
            max_hz=8000.0,
            kaldi=False,
            floor=1e-10,
            # The authors took 20 log10 of the power: half of -29.686901 and 40.898224.
            mean=-14.843451,
            std=20.449112,
        ),
        Feature(
            name="fbank128",
            num_mels=128,
            window_samples=400,
            hop_samples=160,
            n_fft=512,
            min_hz=20.0,
            max_hz=8000.0,
            kaldi=True,
            floor=float(np.finfo(np.float32).eps),
            preemphasis=0.97,
            mean=-3.6788461,
            std=4.3739743,
        ),
    )
}
"""The features by name."""


def get_feature(name: str) -> Feature:
    """The feature of that name; ``ValueError`` for another name."""
    if name not in FEATURES:
        raise ValueError(f"feature: expected one of {', '.join(FEATURES)}, got {name!r}")
    return FEATURES[name]
