"""Log-mels in 8 or 16 bits, and mixup of them, for ``fastat.data.cache``.

``float16`` stores the values themselves. ``uint8`` quantises each clip evenly between its own
extremes: even steps of a logarithm are even ratios of power, so a quiet band is as exact as a loud
one. Code 0 is the feature's floor and takes no part in the scale, which silence, padding included,
would stretch. Measured on ESC-10 (64 x 400, clips padded to ten seconds), the median
error in bands within 60 dB of their frame's peak is 0.06 dB; with the floor in the scale it was
0.11, with one scale for the set 0.12. ``bench/cache_error.py`` measures what is kept here.

Axis letters: R rows, B clips, M mixup partners, T frames, F mel bins.
"""

import math

import torch
from torch import Tensor

from fastat.audio.features import Feature
from fastat.audio.frontend import Augment

DTYPES = {"float16": torch.float16, "uint8": torch.uint8}
STEPS = 254
"""Number of steps between the codes 1 and 255."""
FLOOR_TOLERANCE = 1e-3
"""In the feature's units: values that are this close to the floor are silence."""


def units_per_neper(feature: Feature) -> float:
    """Units of the feature (decibels, or natural logarithm of power) for a factor e of power."""
    return 1.0 if feature.kaldi else 10.0 / math.log(10.0)


def log_floor(feature: Feature) -> float:
    """The least value of the feature, in its own units."""
    return units_per_neper(feature) * math.log(feature.floor)


def row_bytes(feature: Feature, clip_samples: int, dtype: str) -> int:
    """Bytes of a clip, its scale included."""
    values = feature.num_frames(clip_samples) * feature.num_mels
    return values * DTYPES[dtype].itemsize + 2 * torch.float32.itemsize


def encode(log_mel: Tensor, dtype: torch.dtype, floor: float) -> tuple[Tensor, Tensor]:
    """log_mel [R, T, F] float32 -> codes [R, T, F] of ``dtype``, scales [R, 2] float32.

    A scale holds the value that code 0 would have if it were not the floor, and the distance of
    neighbouring codes. float16 does not use it.
    """
    if dtype == torch.float16:
        return log_mel.to(dtype), log_mel.new_zeros(len(log_mel), 2)
    silent = log_mel <= floor + FLOOR_TOLERANCE
    high = log_mel.amax((1, 2))
    low = torch.minimum(log_mel.masked_fill(silent, math.inf).amin((1, 2)), high)
    step = ((high - low) / STEPS).clamp_(min=torch.finfo(torch.float32).tiny)
    codes = ((log_mel - low[:, None, None]) / step[:, None, None]).round_().add_(1)
    return codes.masked_fill_(silent, 0).to(dtype), torch.stack([low - step, step], 1)


def decode(codes: Tensor, scales: Tensor, floor: float) -> Tensor:
    """The inverse of ``encode``: [R, T, F] float32."""
    values = codes.float()
    if codes.dtype == torch.float16:
        return values
    zero, step = scales[:, 0, None, None], scales[:, 1, None, None]
    return torch.addcmul(zero, values, step, out=values).masked_fill_(codes == 0, floor)


def mix(log_mel: Tensor, augment: Augment, feature: Feature) -> Tensor:
    """Mixes log_mel [B + M, T, F], of which the last M are mixup partners -> [B, T, F].

    Mel powers add up with the squares of the amplitudes' weights, lam^2 P + (1 - lam)^2 Q, in
    float32. Mixed waveforms also have a cross term, 2 lam (1 - lam) |X| |Y| cos(phase): zero in
    the mean, but not for a given frame and band.
    """
    unit, own = units_per_neper(feature), augment.mix_into
    clips, partners = log_mel.tensor_split([len(log_mel) - len(own)])
    lam = augment.lam[:, None, None]
    mixed = torch.logaddexp(
        clips[own] / unit + 2 * lam.log(), partners / unit + 2 * (1 - lam).log()
    )
    return clips.index_copy(0, own, mixed.mul_(unit).clamp_(min=log_floor(feature)))
