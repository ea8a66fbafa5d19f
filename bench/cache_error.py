"""How far the cached source's log-mels are from those of the packed source.

    python -m bench.cache_error SET [--seed 0]

Takes every clip of the packed set SET, alone and mixed with another of the set, and prints
|difference| in dB over real frames, for the bands within 60 dB of their frame's peak: median, 95 %,
largest. "mixed" is the cross term alone, which adding mel powers leaves out, "alike" only where the
two clips are within 10 dB of each other; "uint8" has the rounding to 8 bits too, as a run with
``cache_dtype=uint8`` has it.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastat.audio.features import FEATURES, Feature
from fastat.audio.frontend import Frontend
from fastat.data.codes import DTYPES, decode, encode, log_floor, mix, units_per_neper
from fastat.data.loader import PackedSource, augment_of
from fastat.data.sampler import StepPlan
from fastat.data.shards import PackedSet

BATCH = 20
NEAR_PEAK_DB = 60.0
LAMS = (0.5, 0.3, 0.1)
ALIKE_DB = 10.0
BETA = 10.0
"""Both parameters of the procedures' mixup."""


def plans(packed: PackedSet, partners: np.ndarray, lam: np.ndarray) -> Iterator[StepPlan]:
    """Every clip of the set, mixed with ``partners`` [N]; none mixed where they are empty."""
    for start in range(0, packed.num_clips, BATCH):
        rows = np.arange(start, min(start + BATCH, packed.num_clips))
        here = slice(start, start + len(rows))
        no_mask = np.zeros((len(rows), 2), np.int64)
        yield StepPlan(
            rows=rows,
            partners=partners[here],
            mix_into=np.arange(len(partners[here])),
            lam=lam[here],
            time_mask=no_mask,
            freq_mask=no_mask,
        )


def log_mels(packed: PackedSet, feature: Feature, steps: Iterator[StepPlan]) -> Tensor:
    """[N, T, F] of the packed source."""
    frontend = Frontend(feature.name, clip_samples=packed.clip_samples, normalize=False)
    batches = PackedSource(packed, torch.device("cpu")).batches(steps)
    return torch.cat([batch.features(frontend) for batch in batches])


def line(
    name: str,
    got: Tensor,
    want: Tensor,
    real: Tensor,
    feature: Feature,
    where: Tensor | None = None,
) -> None:
    """got, want [N, T, F], real [N] frames; of what lies in ``where`` [N, T, F]."""
    decibels = 10.0 / np.log(10.0) / units_per_neper(feature)
    inside = (torch.arange(want.shape[1]) < real[:, None])[:, :, None]
    near = (want >= want.amax(2, keepdim=True) - NEAR_PEAK_DB / decibels) & inside
    near = near if where is None else near & where
    error = ((got - want).abs()[near] * decibels).numpy()
    median, most = np.quantile(error, (0.5, 0.95))
    print(f"{feature.name:8} {name:26} median {median:.4f}  95 % {most:.3f}  max {error.max():.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("set", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    packed = PackedSet.open(arguments.set)
    N, rng = packed.num_clips, np.random.default_rng(arguments.seed)
    partners = rng.permutation(N)
    drawn = rng.beta(BETA, BETA, N).astype(np.float32)
    nobody, no_lam = np.zeros(0, np.int64), np.zeros(0, np.float32)
    for feature in FEATURES.values():
        floor = log_floor(feature)
        real = feature.real_frames(torch.from_numpy(packed.num_samples), packed.clip_samples)
        single = log_mels(packed, feature, plans(packed, nobody, no_lam))
        kept = {}
        for name, dtype in DTYPES.items():
            kept[name] = decode(*encode(single, dtype, floor), floor)
            line(name, kept[name], single, real, feature)
        for lam in LAMS:
            steps = list(plans(packed, partners, np.full(N, lam, np.float32)))
            want = log_mels(packed, feature, iter(steps))
            line(f"mixed, lam {lam:g}", _mixed(single, steps, feature), want, real, feature)
        steps = list(plans(packed, partners, drawn))
        want = log_mels(packed, feature, iter(steps))
        got = _mixed(single, steps, feature)
        name = f"mixed, Beta({BETA:g}, {BETA:g})"
        line(name, got, want, real, feature)
        ratio = units_per_neper(feature) * 2 * torch.from_numpy(np.log(drawn / (1 - drawn)))
        apart = (single - single[torch.from_numpy(partners)] + ratio[:, None, None]).abs()
        alike = apart <= ALIKE_DB * units_per_neper(feature) * np.log(10.0) / 10.0
        line(f"{name}, alike", got, want, real, feature, alike)
        got = _mixed(kept["uint8"], steps, feature)
        line(f"{name}, uint8", got, want, real, feature)


def _mixed(clips: Tensor, steps: list[StepPlan], feature: Feature) -> Tensor:
    """[N, T, F]: ``clips`` mixed as the steps say, by their mel powers."""
    rows = [torch.from_numpy(np.concatenate([step.rows, step.partners])) for step in steps]
    mixed = (mix(clips[r], augment_of(s), feature) for r, s in zip(rows, steps, strict=True))
    return torch.cat(list(mixed))


if __name__ == "__main__":
    main()
