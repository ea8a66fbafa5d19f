"""The largest batch whose training step fits in a GPU's memory.

It is measured by taking steps in a process of its own (``fastat.memory_trial``), so that the one
that trains later starts with an allocator that nothing has fragmented.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from fastat.errors import Failure
from fastat.models import create_model
from fastat.models.base import TaggingModel

MARGIN = 0.06
"""Share of the free memory that is left alone, for checkpoints and other programs."""

TRIAL_SECONDS = 1800
"""A trial that compiles takes minutes; longer than this it has hung."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What a step's memory depends on, beside the batch and the device."""

    model: str
    num_mels: int
    num_frames: int
    num_classes: int
    options: dict[str, Any] = field(default_factory=dict)
    """Keyword options of create_model."""
    precision: str = "fp32"
    compile: bool = False
    cuda_graphs: bool = True
    kernels: str = "auto"
    clip_samples: int = 0
    """Samples of the waveforms that the front end reads; 0: the step starts from features."""
    accumulate: int = 1
    """Parts that a batch is computed in; waveforms and features are those of all of them."""
    eval_batch: int = 0
    """Clips that are scored at a time between steps: a captured step keeps its memory meanwhile."""

    def create(self) -> TaggingModel:
        """The model, on the current default device."""
        model = create_model(
            self.model,
            num_mels=self.num_mels,
            num_frames=self.num_frames,
            num_classes=self.num_classes,
            **self.options,
        )
        return model.to(memory_format=torch.channels_last)


def memory_limit(device: torch.device) -> int:
    """Bytes that a training on a GPU may take, of what is free there now."""
    return int(torch.cuda.mem_get_info(device)[0] * (1 - MARGIN))


def largest_batch(
    work: Workload,
    device: torch.device,
    limit_bytes: int,
    *,
    multiple: int = 1,
    at_most: int | None = None,
) -> int | None:
    """The largest batch, a multiple of ``multiple``, whose step takes at most ``limit_bytes``.

    Returns:
        clips, to within 2 %; None where not even ``multiple`` clips fit.

    Raises:
        Failure: the trial failed in another way.
    """
    index = torch.cuda.current_device() if device.index is None else device.index
    asked = {
        "work": asdict(work),
        "device": f"cuda:{index}",
        "limit": limit_bytes,
        "multiple": multiple,
        "at_most": at_most,
    }
    try:
        done = subprocess.run(
            [sys.executable, "-m", "fastat.memory_trial"],
            input=json.dumps(asked),
            capture_output=True,
            text=True,
            timeout=TRIAL_SECONDS,
        )
    except subprocess.TimeoutExpired as error:
        raise Failure(
            f"the trial of the memory that a step takes was not over after {TRIAL_SECONDS} s"
        ) from error
    if done.returncode != 0:
        why = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise Failure(f"the trial of the memory that a step takes failed: {why}")
    answer: int | None = json.loads(done.stdout.strip().splitlines()[-1])
    return answer


# ------------------------------------------------------------------------------ the search
MOST_TRIALS = 12
FASTEST_GROWTH = 16
CLOSE_ENOUGH = 0.02


def search(
    measure: Callable[[int], int | None],
    limit_bytes: int,
    *,
    multiple: int = 1,
    at_most: int | None = None,
) -> int | None:
    """The largest batch that ``measure`` takes, by the line through the two largest that it took.

    The peak is a straight line where the same moment of the step is the fullest, and bends upwards
    where another takes over: a line leads too far, never too short, and the batch is stepped down
    until it fits.

    Args:
        measure: batch -> peak bytes, or None where it does not fit.
        limit_bytes: what fits.
        multiple: of which the batch is one.
        at_most: no larger batch is tried.

    Returns:
        a batch that ``measure`` took, or None where ``multiple`` clips are too many.
    """
    most = (1 << 20 if at_most is None else at_most) // multiple * multiple
    if most < multiple:
        return None
    first = measure(multiple)
    if first is None:
        return None
    points = [(multiple, first)]  # those that fit, in ascending order
    too_many = most + multiple
    guess = min(4 * multiple, most)
    for _ in range(MOST_TRIALS):
        largest = points[-1][0]
        if too_many - largest <= max(multiple, CLOSE_ENOUGH * largest) or guess <= largest:
            break
        taken = measure(guess)
        if taken is None:
            too_many = guess
        else:
            points.append((guess, taken))
        guess = _next_guess(points, limit_bytes, too_many, multiple)
    return points[-1][0]


def _next_guess(
    points: list[tuple[int, int]], limit_bytes: int, too_many: int, multiple: int
) -> int:
    """Where the line through the last two points meets the limit, or halfway to what was too many.

    No more than FASTEST_GROWTH times what fits: where weights and moments are the fullest moment,
    the first points lie level.
    """
    (b1, y1), (b2, y2) = points[-2:] if len(points) > 1 else (points[0], points[0])
    guess = FASTEST_GROWTH * b2
    if y2 > y1:
        guess = min(guess, b2 + (limit_bytes - y2) * (b2 - b1) // (y2 - y1))
    if guess >= too_many:  # the line had promised that it fits
        guess = (b2 + too_many) // 2
    return guess // multiple * multiple
