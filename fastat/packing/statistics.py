"""Sums over the features of sampled clips, for a set's mean and standard deviation."""

import numpy as np
import torch
from numpy.typing import NDArray

from fastat.audio.features import FEATURES
from fastat.audio.frontend import Frontend
from fastat.packing.block import Sums

CLIPS_AT_ONCE = 8


class Meter:
    """Adds up every feature of clips, as a model sees it but for the normalisation.

    Args:
        clip_samples: length S of a clip, padding included.
    """

    def __init__(self, clip_samples: int) -> None:
        self.sums = {name: Sums() for name in FEATURES}
        self._frontends = [
            Frontend(name, clip_samples=clip_samples, normalize=False) for name in FEATURES
        ]
        self._rows: list[NDArray[np.int16]] = []
        self._num_samples: list[int] = []

    def add(self, row: NDArray[np.int16], num_samples: int) -> None:
        """Takes a clip [S] of which ``num_samples`` are real."""
        self._rows.append(row)
        self._num_samples.append(num_samples)
        if len(self._rows) == CLIPS_AT_ONCE:
            self.finish()

    @torch.inference_mode()
    def finish(self) -> dict[str, Sums]:
        """The sums over all clips taken."""
        if self._rows:
            waveform = torch.from_numpy(np.stack(self._rows))
            counts = torch.tensor(self._num_samples)
            for frontend in self._frontends:
                features, name = frontend(waveform, counts).double(), frontend.feature.name
                for clip, count in zip(features, self._num_samples, strict=True):
                    real = clip[: frontend.feature.real_frames(count, frontend.clip_samples)]
                    sums = Sums(1, real.numel(), float(real.sum()), float(real.square().sum()))
                    self.sums[name] = Sums.over((self.sums[name], sums))
            self._rows, self._num_samples = [], []
        return self.sums
