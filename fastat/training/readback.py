"""Reads the results of steps a little later than they are computed, so that no step waits."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fastat.training.step import StepResult

BEHIND = 2
"""Steps queued on a GPU while the host waits for an older one: enough to keep the GPU busy, and a
bound on the batches that the host has ready. All ranks read the same step."""


@dataclass(frozen=True)
class Reading:
    """The numbers of one step, which is counted from 0."""

    step: int
    lr: float
    loss: float
    norm: float
    found_inf: bool
    """Whether the loss or a gradient is not finite: a fault, unless it is an overflow."""
    overflow: bool
    """Whether fp16's loss scale was too large; the step was not taken."""
    loss_sum: float
    """Sum of the losses of the epoch up to this step."""


class DelayedReadback:
    """On CUDA the numbers of a step are copied into pinned memory once it is computed, and read
    when an event reports the copy; on the CPU they are available at once."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._behind = BEHIND if device.type == "cuda" else 0
        self._waiting: deque[tuple[int, float, Tensor, torch.cuda.Event | None]] = deque()

    def put(self, step: int, lr: float, result: StepResult, loss_sum: Tensor) -> None:
        """Queues the numbers of a step. loss_sum: scalar float64 on the device; it is copied."""
        values = torch.stack([x.detach().double() for x in (*result, loss_sum)])  # [5]
        event = None
        if self.device.type == "cuda":
            host = torch.empty(5, dtype=torch.float64, pin_memory=True)
            values = host.copy_(values, non_blocking=True)
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(self.device))
        self._waiting.append((step, lr, values, event))

    def due(self, *, wait: bool = False) -> Iterator[Reading]:
        """Yields the steps that may be read now, the oldest first.

        Args:
            wait: wait for all steps queued so far.
        """
        while len(self._waiting) > (0 if wait else self._behind):
            step, lr, values, event = self._waiting.popleft()
            if event is not None:
                event.synchronize()
            loss, norm, found_inf, overflow, loss_sum = values.tolist()
            yield Reading(step, lr, loss, norm, bool(found_inf), bool(overflow), loss_sum)
