"""Steps whose loss or gradient is not finite.

Such a step is never taken: ``optim.guarded_step`` leaves the weights alone, and ``BufferGuard``
BatchNorm's statistics. ``TrainConfig.on_nan`` decides what follows: "stop" ends the run; "skip"
goes on with the next step, unless more than ``MAX_IN_A_ROW`` in a row were not finite. A skipped
step counts as a step for the schedule and the length of the run, but not in the mean loss.

Under fp16 a gradient that overflows is no such step as long as a smaller loss scale may help
(``fastat.training.loss_scale``).
"""

from collections.abc import Collection

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

MAX_IN_A_ROW = 10


def reason_to_stop(on_nan: str, step: int, skipped: Collection[int]) -> str | None:
    """Why the run ends with ``step``, which is not finite, or None when it goes on.

    Args:
        skipped: the earlier steps that were not finite.
    """
    if on_nan == "stop":
        return "on_nan is stop"
    in_a_row = next(n for n in range(1, step + 2) if step - n not in skipped)
    return f"it was the {in_a_row}th in a row" if in_a_row > MAX_IN_A_ROW else None


class BufferGuard:
    """Undoes what a batch did to BatchNorm's statistics before its loss was known."""

    def __init__(self, model: nn.Module) -> None:
        norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
        self.buffers = [b for norm in norms for b in norm.buffers(recurse=False)]
        self.before = [b.clone() for b in self.buffers]

    def remember(self) -> None:
        """Before a step."""
        if self.buffers:
            torch._foreach_copy_(self.before, self.buffers)

    def undo_if(self, found_inf: Tensor) -> None:
        """After a step, without waiting for the device.

        Args:
            found_inf: scalar, 1 where the step was not taken.
        """
        for buffer, before in zip(self.buffers, self.before, strict=True):
            buffer.copy_(torch.where(found_inf > 0, before, buffer))
