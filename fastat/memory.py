"""How much memory a training step takes, and the largest batch that fits.

On the CPU it is estimated: the step runs on fake tensors, which have shapes and no contents, while
the storages that are alive are added up. On CUDA it is measured, by taking steps in a process of
its own (``fastat.memory_trial``), so that the one that trains later starts with an allocator that
nothing has fragmented.

torch's own MemTracker would do for the CPU but for one thing: it refuses a module that a step calls
twice, as shared Transformer layers are.
"""

import json
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastat.errors import Failure
from fastat.host import free_memory, ranks_here
from fastat.models import create_model
from fastat.models.base import TaggingModel
from fastat.optim import create_adam, train_step
from fastat.system.device import autocast

MARGIN = {"cpu": 0.2, "cuda": 0.06}
"""Share of the free memory that is left alone: for evaluation, checkpoints, and other programs. On
a CPU also for what an estimate does not see, the libraries' work space and torn heap."""

WAVEFORM_BYTES = 3 * 2
"""Of a sample: int16 batches that are read, ready and in use at the same time."""
FRONTEND_BYTES = 3 * 4
"""Of a sample while its log-mel is computed: float32, padded, masked, and what is mixed in."""
ROWS_A_CLIP = 1.5
"""Rows of a batch for each of its clips: the clip, and mixup partners of some."""

LIBRARIES_BYTES = 128 << 20
"""What oneDNN and the allocator take beside tensors, and what of torch a first step pages in:
measured, 118 to 172 MiB in steps of cnn_trans, crnn and resnet50."""

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
    activation_checkpointing: bool = False
    """Also on where ``options`` say so."""
    compile: bool = False
    """Counts on CUDA; on the CPU the estimate is that of the step that is not compiled."""
    cuda_graphs: bool = True
    kernels: str = "auto"
    clip_samples: int = 0
    """Samples of the waveforms that the front end reads; 0: the step has features to start from."""
    accumulate: int = 1
    """Parts that a batch is computed in; waveforms and features are those of all of them."""
    eval_batch: int = 0
    """Clips that are scored at a time between steps; on CUDA, where the memory of a captured step
    is not given back in between."""

    def create(self) -> TaggingModel:
        """The model, on the current default device."""
        asked = self.options.get("activation_checkpointing", False)
        checkpointing = {"activation_checkpointing": asked or self.activation_checkpointing}
        model = create_model(
            self.model,
            num_mels=self.num_mels,
            num_frames=self.num_frames,
            num_classes=self.num_classes,
            **(self.options | checkpointing),
        )
        return model.to(memory_format=torch.channels_last)


def memory_limit(device: torch.device) -> int:
    """Bytes that a training on ``device`` may take, of what is free there now."""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        free = free_memory() // ranks_here()
    return int(free * (1 - MARGIN[device.type]))


def step_bytes(work: Workload, batch: int, device: torch.device) -> int:
    """Peak bytes of training at ``batch``: weights, gradients, Adam, activations, the input.

    Args:
        batch: clips of a step, a multiple of ``work.accumulate``.

    Raises:
        UserError: an impossible model.
        torch.OutOfMemoryError: on CUDA, more than there is.
        Failure: the trial on CUDA failed in another way.
    """
    if device.type == "cuda":
        found = _trial(work, device, batch=batch)
        if found is None:
            raise torch.OutOfMemoryError(f"a step of {batch} clips does not fit on {device}")
        return found
    return estimated_bytes(work, batch)


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
        UserError, Failure: as ``step_bytes``.
    """
    if device.type == "cuda":
        return _trial(work, device, limit=limit_bytes, multiple=multiple, at_most=at_most)

    def measure(batch: int) -> int | None:
        taken = estimated_bytes(work, batch)
        return taken if taken <= limit_bytes else None

    return search(measure, limit_bytes, multiple=multiple, at_most=at_most)


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


# ------------------------------------------------------------------------------ the CPU
def estimated_bytes(work: Workload, batch: int) -> int:
    """Peak bytes of training at ``batch`` on the CPU, from a step that is not computed."""
    with fake_step(work, batch) as step:
        live = step.live
        fixed = live.peak = live.bytes
        step.take()
    samples = round(batch * ROWS_A_CLIP) * work.clip_samples
    fullest: int = max(live.peak, fixed + samples * FRONTEND_BYTES)
    return fullest + samples * WAVEFORM_BYTES + LIBRARIES_BYTES


@dataclass(frozen=True)
class FakeStep:
    """A training step on fake tensors, which have shapes and no contents."""

    model: TaggingModel
    optimizer: torch.optim.Optimizer
    live: "LiveStorages"
    take: Callable[[], object]


@contextmanager
def fake_step(work: Workload, batch: int) -> Iterator[FakeStep]:
    """A step of ``batch`` clips as a CPU takes it; what runs inside is on fake tensors.

    It is not a run's first: Adam's moments are there, and the gradients of the step before.
    """
    cpu = torch.device("cpu")
    with torch.device("meta"):
        model = work.create()
    with FakeTensorMode(), LiveStorages() as live:
        make_fake(model, cpu)
        params = list(model.parameters())
        adam, _ = create_adam(params, lr=1e-3, betas=(0.9, 0.999), weight_decay=0.0, device=cpu)
        for p in params:
            p.grad = torch.empty_like(p)
        adam.step()

        def take() -> None:
            features = torch.empty(batch, work.num_frames, work.num_mels)
            target = torch.empty(batch, work.num_classes)
            precision = autocast(cpu, work.precision)
            train_step(model, params, adam, features, target, precision, work.accumulate)

        yield FakeStep(model, adam, live, take)


def make_fake(model: nn.Module, device: torch.device) -> None:
    """Gives ``model`` parameters and buffers of the current fake mode, as if on ``device``."""

    def faked(x: Tensor) -> Tensor:
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)

    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(faked(p), requires_grad=p.requires_grad))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, faked(buffer))


class LiveStorages(TorchDispatchMode):
    """Adds up the bytes of the storages that operators made and that are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: int = 0
        self.peak: int = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self._count(x.untyped_storage())
        return out

    def _count(self, storage: Any) -> None:
        if storage in self._known:
            return
        self._known.add(storage)
        size: int = storage.nbytes()
        self.bytes += size
        self.peak = max(self.peak, self.bytes)
        weakref.finalize(storage, self._gone, size)

    def _gone(self, size: int) -> None:
        self.bytes -= size


# ------------------------------------------------------------------------------ CUDA
def _trial(work: Workload, device: torch.device, **question: int | None) -> int | None:
    """Asks a process of its own; ``fastat.memory_trial`` says what."""
    if device.index is None:  # "the current one" may be another there, and limits take no such name
        device = torch.device("cuda", torch.cuda.current_device())
    asked = {"work": asdict(work), "device": str(device), **question}
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
