"""Moments of the features of a clip, for a set's statistics: numpy alone, one thread.

``fastat.frontend`` computes the same features with torch, no faster for a clip at a time; but
importing torch costs a worker 250 MB and three seconds, in which it decodes 400 clips. What the
features are (frames, window, mel bank) is ``features.py``'s; a test holds the two together.
"""

from typing import NamedTuple

import numpy as np
import scipy.fft
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from fastat.data.pack_messages import Moments
from fastat.features import FEATURES, Feature

BANDS_PER_PRODUCT = 8
BLOCK_FRAMES = 100
"""Spectra of so many frames stay in the cache until they are mel bands."""


class _Bands(NamedTuple):
    """Neighbouring mel bands and the bins that they take; a band is zero elsewhere."""

    bins: slice
    bands: slice
    weights: NDArray[np.float32]  # [bins, bands]


class Meter:
    """Moments of every feature of a clip, as the model will see it but for the normalisation."""

    def __init__(self) -> None:
        self._features = [_LogMel(feature) for feature in FEATURES.values()]

    def __call__(self, row: NDArray[np.int16], num_samples: int) -> dict[str, Moments]:
        """row [S] of which ``num_samples`` are real -> moments over its real frames."""
        x = row[:num_samples] * np.float32(1 / 32768)
        x -= x.mean(dtype=np.float64).astype(np.float32)
        moments = {}
        for log_mel in self._features:
            values = log_mel(x, log_mel.feature.real_frames(num_samples, len(row)))
            wide = values.astype(np.float64)
            total, squares = float(wide.sum()), float(np.square(wide, out=wide).sum())
            moments[log_mel.feature.name] = Moments(values.size, total, squares)
        return moments


class _LogMel:
    def __init__(self, feature: Feature) -> None:
        self.feature = feature
        self._window = feature.window().astype(np.float32)
        bank = feature.mel_bank()
        self._products = []
        for first in range(0, feature.num_mels, BANDS_PER_PRODUCT):
            bands = slice(first, min(first + BANDS_PER_PRODUCT, feature.num_mels))
            used = np.flatnonzero(bank[:, bands].any(axis=1))
            bins = slice(int(used[0]), int(used[-1]) + 1)
            weights = np.ascontiguousarray(bank[bins, bands], np.float32)
            self._products.append(_Bands(bins, bands, weights))

    def __call__(self, x: NDArray[np.float32], num_frames: int) -> NDArray[np.float32]:
        """x [S], its mean removed -> the first ``num_frames`` frames, [num_frames, F]."""
        feature = self.feature
        if num_frames == 0:
            return np.empty((0, feature.num_mels), np.float32)
        frames = self._emphasised(x) if feature.kaldi else self._centred(x, num_frames)
        mel = np.empty((num_frames, feature.num_mels), np.float32)
        for start in range(0, num_frames, BLOCK_FRAMES):
            block = slice(start, min(start + BLOCK_FRAMES, num_frames))
            spectrum = scipy.fft.rfft(frames[block], feature.n_fft)
            power = np.square(spectrum.real)
            power += np.square(spectrum.imag)
            for bins, bands, weights in self._products:
                mel[block, bands] = power[:, bins] @ weights
        np.maximum(mel, np.float32(feature.floor), out=mel)
        return np.log(mel, out=mel) if feature.kaldi else 10 * np.log10(mel, out=mel)

    def _centred(self, x: NDArray[np.float32], num_frames: int) -> NDArray[np.float32]:
        """Windowed frames around multiples of the hop, silence around the clip, [T, W]."""
        feature = self.feature
        half = feature.window_samples // 2
        end = (num_frames - 1) * feature.hop_samples + half - len(x)
        padded = np.pad(x, (half, max(end, 0)))
        every = sliding_window_view(padded, feature.window_samples)
        frames: NDArray[np.float32] = every[:: feature.hop_samples] * self._window
        return frames

    def _emphasised(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """Windowed frames, each without its mean and then pre-emphasised, [T, W].

        Both steps are linear, so the emphasised signal's frames minus the emphasised means are the
        same; but for a frame's first sample, its own predecessor, and there the window is zero.
        """
        feature = self.feature
        means = sliding_window_view(x, feature.window_samples)[:: feature.hop_samples].mean(axis=1)
        emphasised = x.copy()
        emphasised[1:] -= np.float32(feature.preemphasis) * x[:-1]
        every = sliding_window_view(emphasised, feature.window_samples)[:: feature.hop_samples]
        frames: NDArray[np.float32] = every - np.float32(1 - feature.preemphasis) * means[:, None]
        frames *= self._window
        return frames
