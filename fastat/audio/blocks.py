"""Mono blocks of samples, each with its sample rate, which the readers of audio files give."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Block(NamedTuple):
    """Consecutive samples of a file."""

    rate: int
    """Hz; it may change where files were joined."""
    samples: NDArray[np.float32]  # [n]
    """Full scale is 1."""


def mono(block: NDArray[np.float32]) -> NDArray[np.float32]:
    """[n, C] -> [n], the mean of the channels."""
    if block.shape[1] == 1:
        return block[:, 0]
    # numpy's mean over a short last axis is ten times slower.
    total = block[:, 0].copy()
    for channel in range(1, block.shape[1]):
        total += block[:, channel]
    total /= block.shape[1]
    return total
