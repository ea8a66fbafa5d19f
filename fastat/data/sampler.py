"""Which clips, partners and masks make up a training step: pure functions of (seed, epoch, step).

Nothing here has state, so a prefetching loader, a resumed run and every rank see the same steps.
Planning takes the same time for any step of a set of any size, because an epoch's order is drawn
once. Imports no torch.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Self

import numpy as np
from numpy.typing import NDArray

from fastat.system.errors import UserError

ORDER_STREAM, STEP_STREAM, REPLACEMENT_STREAM = 0, 1, 2
"""Parts of seeds: an epoch's order, its steps and replacements have independent draws."""

WEIGHTS_BLOCK = 8192
"""Number of clips whose weights are summed at a time, so that their labels stay in the cache."""


@dataclass(frozen=True)
class StepPlan:
    """What one step trains on. B clips, M of them mixed with a partner."""

    rows: NDArray[np.int64]  # [B] rows of the training set
    partners: NDArray[np.int64]  # [M] rows of the training set
    mix_into: NDArray[np.int64]  # [M] the clip, 0..B-1, that each partner is mixed into
    lam: NDArray[np.float32]  # [M] weight of the clip itself
    time_mask: NDArray[np.int64]  # [B, 2] start, width in frames
    freq_mask: NDArray[np.int64]  # [B, 2] start, width in mel bins
    epoch: int = 0
    step: int = 0
    """Number of the step in its epoch, from 0."""
    first: int = 0
    """Place of the first clip in the step's batch; not 0 in the plans of later ranks."""

    def part(self, rank: int, num_ranks: int) -> Self:
        """The plan of ``rank``: its clips with their partners. ``num_ranks`` divides B."""
        size = len(self.rows) // num_ranks
        mine = slice(rank * size, (rank + 1) * size)
        mixed = (self.mix_into >= mine.start) & (self.mix_into < mine.stop)
        return replace(
            self,
            rows=self.rows[mine],
            partners=self.partners[mixed],
            mix_into=self.mix_into[mixed] - mine.start,
            lam=self.lam[mixed],
            time_mask=self.time_mask[mine],
            freq_mask=self.freq_mask[mine],
            first=self.first + mine.start,
        )


def balanced_weights(
    target_bits: NDArray[np.uint8],  # [N, ceil(K / 8)]
    label_counts: NDArray[np.int64],  # [K]
) -> NDArray[np.float64]:
    """[N] sampling weights: the sum over a clip's labels of 1000 / (count of the label + 0.01).

    Source: the paper, section 3.1 (balanced sampling), after PSLA.
    """
    num_bytes = target_bits.shape[1]
    per_label = np.zeros(8 * num_bytes)
    per_label[: len(label_counts)] = 1000.0 / (label_counts + 0.01)
    # The weight that each value of each byte adds: one look-up instead of eight labels.
    values = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1)  # [256, 8]
    per_byte = per_label.reshape(num_bytes, 8) @ values.T  # [ceil(K / 8), 256]
    weights = np.zeros(len(target_bits))
    for i in range(0, len(target_bits), WEIGHTS_BLOCK):
        block = target_bits[i : i + WEIGHTS_BLOCK]
        for added, column in zip(per_byte, block.T, strict=True):
            weights[i : i + WEIGHTS_BLOCK] += added[column]
    return weights


class Sampler:
    """Plans the steps of a training run.

    Args:
        num_clips: clips in the training set.
        batch: number of clips in a step, over all ranks.
        seed: all draws are functions of it, the epoch and the step.
        weights: [N] sampling weights, drawn with replacement; None: each clip once, shuffled.
        usable: [N] clips that may be drawn; None: all.
        mixup, mixup_alpha: probability of mixing, and both parameters of Beta.
        time_mask, freq_mask: largest widths of the masks; 0 for no mask.
        num_frames, num_mels: size of the feature map that is masked.

    Raises:
        UserError: there are fewer clips than one batch, or all weights are zero.
    """

    def __init__(
        self,
        num_clips: int,
        batch: int,
        *,
        seed: int,
        num_frames: int,
        num_mels: int,
        weights: NDArray[np.float64] | None = None,
        usable: NDArray[np.bool_] | None = None,
        mixup: float = 0.0,
        mixup_alpha: float = 10.0,
        time_mask: int = 0,
        freq_mask: int = 0,
    ) -> None:
        self.candidates = np.arange(num_clips) if usable is None else np.flatnonzero(usable)
        if batch < 1 or len(self.candidates) < batch:
            raise UserError(
                f"a batch needs 1 to {len(self.candidates)} clips (the training set's), got {batch}"
            )
        self.batch = batch
        self.seed = seed
        self.steps_per_epoch = len(self.candidates) // batch
        self.cumulative = None if weights is None else np.cumsum(weights[self.candidates])
        if self.cumulative is not None and not self.cumulative[-1] > 0:
            raise UserError("no clip of the training set has a label: nothing to balance by")
        self.mixup, self.mixup_alpha = mixup, mixup_alpha
        self.time_mask, self.num_frames = min(time_mask, num_frames), num_frames
        self.freq_mask, self.num_mels = min(freq_mask, num_mels), num_mels
        # Drawing an epoch's order takes a draw per clip; consecutive steps share it.
        self.order = lru_cache(maxsize=2)(self._order)

    def _order(self, epoch: int) -> NDArray[np.int64]:
        """The rows of an epoch in the order in which they are trained on, [steps_per_epoch * B]."""
        rng = np.random.default_rng((self.seed, epoch, ORDER_STREAM))
        size, num = self.steps_per_epoch * self.batch, len(self.candidates)
        rows: NDArray[np.int64]
        if self.cumulative is None:
            rows = np.delete(self.candidates, rng.choice(num, num - size, replace=False))
        else:
            # Sorted first: looking up neighbours takes a tenth of the time of random look-ups.
            drawn = np.sort(rng.random(size)) * self.cumulative[-1]
            rows = self.candidates[np.searchsorted(self.cumulative, drawn, side="right")]
        rng.shuffle(rows)
        return rows

    def plan(self, epoch: int, step: int) -> StepPlan:
        """The plan of step ``step`` (from 0) of epoch ``epoch``."""
        B = self.batch
        rows = self.order(epoch)[step * B : (step + 1) * B]
        rng = np.random.default_rng((self.seed, epoch, STEP_STREAM, step))
        # All draws are made whatever is switched off, so that a switch changes nothing else.
        mixed = rng.random(B)
        partners = self.candidates[(rng.random(B) * len(self.candidates)).astype(int)]
        lam = rng.beta(self.mixup_alpha, self.mixup_alpha, size=B).astype(np.float32)
        mix_into = np.flatnonzero(mixed < self.mixup)
        return StepPlan(
            rows=rows,
            partners=partners[mix_into],
            mix_into=mix_into,
            lam=lam[mix_into],
            time_mask=_masks(rng, B, self.time_mask, self.num_frames),
            freq_mask=_masks(rng, B, self.freq_mask, self.num_mels),
            epoch=epoch,
            step=step,
        )

    def replacement(self, epoch: int, step: int, place: int, attempt: int, *, partner: bool) -> int:
        """Draws the row that replaces one that cannot be read, from the whole set.

        Args:
            place: place of the clip in the step's batch, over all ranks.
            attempt: 1 for the first draw, 2 when that row cannot be read either, and so on.
            partner: replace the clip's mixup partner instead of the clip.
        """
        key = (self.seed, epoch, REPLACEMENT_STREAM, step, place, attempt, int(partner))
        rng = np.random.default_rng(key)
        if partner or self.cumulative is None:
            return int(self.candidates[rng.integers(len(self.candidates))])
        drawn = rng.random() * self.cumulative[-1]
        return int(self.candidates[np.searchsorted(self.cumulative, drawn, side="right")])


def _masks(rng: np.random.Generator, batch: int, max_width: int, size: int) -> NDArray[np.int64]:
    """[B, 2] start and width: both uniform, as torchaudio draws them (width below max_width)."""
    width = rng.random(batch) * max_width
    start = rng.random(batch) * (size - width)
    return np.stack([start, width], axis=1).astype(np.int64)
