"""Learning-rate schedules: pure functions of the step that give a factor on the maximum rate."""

from typing import Literal

Schedule = Literal["step", "step2", "constant", "cyclic"]

CYCLE_EPOCHS = 2
CYCLE_FLOOR = 0.1
"""The lowest rate of a cycle, as a share of the maximum."""

WARMUP_SHARE = 0.1
"""Warm-up never takes more than this share of a run."""


def warmup_length(warmup_steps: int, total_steps: int) -> int:
    """Steps of warm-up: the procedure's, or a tenth of a run that they would fill further."""
    return min(warmup_steps, int(total_steps * WARMUP_SHARE))


def lr_factor(
    step: int, *, schedule: str, warmup_steps: int, steps_per_epoch: int, epochs: int
) -> float:
    """The factor for optimizer step ``step``, counted from 0.

    "step" halves the rate after every epoch from the second on (the authors' code: milestones 2, 3,
    ..., 10 of ten epochs); "step2" after every second epoch; "constant" never. A run of more than
    ten epochs stretches the halvings over its length. "cyclic" is triangular (Smith, 2017): up from
    a tenth of the maximum for an epoch and down again for the next; the paper found it worse than
    "step". Warm-up is linear per step and multiplies.
    """
    warmup = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
    epoch = step / steps_per_epoch  # epochs done, with the fraction
    tenths = int(epoch * 10 / max(epochs, 10) + 1e-9)
    match schedule:
        case "step":
            factor = 0.5 ** max(0, tenths - 1)
        case "step2":
            factor = 0.5 ** (tenths // 2)
        case "constant":
            factor = 1.0
        case "cyclic":
            height = 1 - abs(epoch % CYCLE_EPOCHS / (CYCLE_EPOCHS / 2) - 1)
            factor = CYCLE_FLOOR + (1 - CYCLE_FLOOR) * height
        case _:
            raise ValueError(f"unknown schedule {schedule!r}")
    return float(warmup * factor)
