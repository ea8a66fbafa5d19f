"""Measures what a training step costs on a device: time, also by part, memory and power.

The step is the trainer's: rows of a packed set, read a step ahead; front end; model, loss, backward
pass and Adam. On a GPU two series of steps are timed. In the first, kernels are launched one by
one, and CUDA events time the parts. In the second, the step is a CUDA graph and overlaps with the
same work as in training; its duration is from one step's end to the next. On a CPU nothing
overlaps, and one series gives both.
"""

import time
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import pairwise
from statistics import quantiles
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from fastat.data.loader import Batch, PackedSource, with_features
from fastat.data.sampler import Sampler, StepPlan
from fastat.data.shards import PackedSet
from fastat.distributed import ALONE
from fastat.features import FEATURES
from fastat.finetune import parameter_groups, train_mode
from fastat.frontend import Frontend
from fastat.memory import Workload
from fastat.models.base import TaggingModel
from fastat.nonfinite import BufferGuard
from fastat.optim import create_adam
from fastat.procedures import PROCEDURES, Procedure, model_options
from fastat.profile.device import gpu_watts, out_of_memory, peak_bytes, restart_peak
from fastat.readback import BEHIND
from fastat.step import TrainingStep, why_not_captured

SECONDS = {"cuda": 3.0, "cpu": 8.0}
"""Seconds for which steps are timed, by default."""

ROUNDS = (2, 200)
"""Least and largest number of steps that are timed."""

WARM_UP = {"cuda": 5, "cpu": 1}
"""Steps before the timed ones. They compile, choose algorithms, allocate and capture a graph."""

DATA_ROUNDS = 10
PARTS = ("frontend", "forward", "backward", "optimizer")


@dataclass(frozen=True, kw_only=True)
class Case:
    """A step to measure."""

    model: str
    proc: str
    options: dict[str, Any] = field(default_factory=dict)
    """Keyword options of create_model, on top of what the procedure asks for."""
    batch: int
    """Clips in a step, on one device."""
    precision: str = "fp32"
    compile: bool = False

    @property
    def procedure(self) -> Procedure:
        """The procedure of Table 1."""
        return PROCEDURES[self.proc]

    @property
    def model_options(self) -> dict[str, Any]:
        """All keyword options of create_model."""
        return model_options(self.model, self.procedure) | self.options

    @property
    def checkpointing(self) -> bool:
        """Whether activations are computed again in the backward pass."""
        return bool(self.options.get("activation_checkpointing"))

    @property
    def strides(self) -> tuple[int, int] | tuple[None, None]:
        """Distance of the AST's patches along the mel and the time axis."""
        if self.model != "ast":
            return None, None
        options = self.model_options
        return options["fstride"], options["tstride"]

    @property
    def step(self) -> tuple[Any, ...]:
        """Equal for cases whose steps do the same work; procedures may differ in learning rate
        alone."""
        options = tuple(sorted(self.model_options.items()))
        feature = self.procedure.feature
        return self.model, feature, options, self.batch, self.precision, self.compile

    def workload(self, clip_samples: int, num_classes: int) -> Workload:
        """What the step's memory depends on."""
        feature = FEATURES[self.procedure.feature]
        return Workload(
            model=self.model,
            num_mels=feature.num_mels,
            num_frames=feature.num_frames(clip_samples),
            num_classes=num_classes,
            options=self.model_options,
            precision=self.precision,
            compile=self.compile,
            clip_samples=clip_samples,
        )

    def create(self, clip_samples: int, num_classes: int) -> TaggingModel:
        """The model, with fresh weights. Raises UserError where its options are impossible."""
        return self.workload(clip_samples, num_classes).create()


@dataclass(frozen=True)
class Spread:
    """A duration, in ms: the median, and the quartiles around it."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, ms: list[float]) -> "Spread":
        """The spread of at least one measured duration."""
        if len(ms) == 1:
            return cls(ms[0], ms[0], ms[0])
        low, median, high = quantiles(ms, n=4, method="inclusive")
        return cls(median, low, high)


@dataclass(frozen=True)
class Measured:
    """What one step of a case takes."""

    ms: dict[str, Spread]
    """Durations for one batch: data (reading it, while the step before runs), frontend, forward,
    backward (with the check for non-finite values), optimizer, and step, from end to end."""
    rounds: int
    """Number of steps that were timed."""
    peak_bytes: int
    """Peak memory: of the allocator on a GPU, of the process on a CPU."""
    watts: float | None
    """Power of the GPU while steps ran; None on a CPU, and where the driver has no reading."""


def measure(
    case: Case, device: torch.device, packed: PackedSet, *, seconds: float | None = None
) -> Measured:
    """Takes training steps of ``case`` from ``packed``, and times them for about ``seconds``.

    Raises:
        OutOfMemory: the step does not fit.
        UserError: the model's options are impossible.
    """
    with out_of_memory(device):
        return _measure(case, device, packed, seconds or SECONDS[device.type])


def _measure(case: Case, device: torch.device, packed: PackedSet, seconds: float) -> Measured:
    if case.compile:
        torch._dynamo.reset()  # or a shape after another would be compiled for any shape
    torch.manual_seed(0)
    restart_peak(device)
    training = Training(case, device, packed)
    ms = {"data": _data_ms(training)}
    if device.type == "cuda":
        parts = _timed_steps(training, seconds / 3, marked=True).parts
        restart_peak(device)
        timed = _timed_steps(training, seconds, marked=False)
    else:
        timed = _timed_steps(training, seconds, marked=True)
        parts = timed.parts
    ms |= {name: Spread.of(parts[name]) for name in PARTS} | {"step": Spread.of(timed.steps)}
    return Measured(ms, len(timed.steps), peak_bytes(device), timed.watts)


class Clock:
    """Timestamps in the order of the device's work; taking one does not wait for the device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def now(self) -> Any:
        """A timestamp: an event on a GPU's current stream, seconds on a CPU."""
        if self.device.type == "cpu":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def ms(self, start: Any, end: Any) -> float:
        """Milliseconds between two timestamps that the device has reached."""
        if self.device.type == "cpu":
            return float(end - start) * 1e3
        return float(start.elapsed_time(end))

    def wait_for(self, moment: Any) -> None:
        """Waits until the device has reached a timestamp."""
        if self.device.type == "cuda":
            moment.synchronize()

    def wait(self) -> None:
        """Waits until the device has done all its work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class Training:
    """Model, front end, optimizer and data of a training, without a run folder."""

    def __init__(self, case: Case, device: torch.device, packed: PackedSet) -> None:
        self.case, self.device, self.packed = case, device, packed
        feature = FEATURES[case.procedure.feature]
        stats = packed.stats[feature.name]
        self.frontend = Frontend(
            feature.name, clip_samples=packed.clip_samples, mean=stats.mean, std=stats.std
        ).to(device)
        self.raw_model = case.create(packed.clip_samples, len(packed.classes)).to(device)
        model: nn.Module = self.raw_model
        if case.compile:
            model = cast(nn.Module, torch.compile(model))
        self.model = Marked(model)
        train_mode(self.model)
        self.params = list(self.raw_model.parameters())
        p = case.procedure
        self.optimizer, _ = create_adam(
            parameter_groups(self.raw_model, 1.0),
            lr=p.lr,
            betas=(p.beta1, p.beta2),
            weight_decay=p.weight_decay,
            device=device,
        )
        self.guard = BufferGuard(self.raw_model)
        self.why_not_captured = why_not_captured(device, ALONE, checkpointing=case.checkpointing)
        self.marks: list[Any] | None = None
        self.optimizer.register_step_pre_hook(lambda *_: self.mark())
        self.model.mark = self.mark
        self.clock = Clock(device)
        self.one_by_one = self.taker(graph=False)
        self.sampler = Sampler(
            max(packed.num_clips, 4 * case.batch),
            case.batch,
            seed=0,
            num_frames=self.frontend.num_frames,
            num_mels=feature.num_mels,
            mixup=p.mixup,
            mixup_alpha=p.mixup_alpha,
            time_mask=p.time_mask,
            freq_mask=p.freq_mask,
        )

    def mark(self) -> None:
        """Records that a part of the step ends here, where parts are timed."""
        if self.marks is not None:
            self.marks.append(self.clock.now())

    def batches(self) -> Generator[Batch]:
        """Batches without end."""
        source = PackedSource(self.packed, self.device, sampler=self.sampler)
        return source.batches(self._plans())

    def _plans(self) -> Iterator[StepPlan]:
        steps, clips = self.sampler.steps_per_epoch, self.packed.num_clips
        i = 0
        while True:
            plan = self.sampler.plan(*divmod(i, steps))
            yield replace(plan, rows=plan.rows % clips, partners=plan.partners % clips)
            i += 1

    def taker(self, *, graph: bool) -> TrainingStep:
        """A function that takes steps; ``graph``: as a CUDA graph, where that is possible."""
        return TrainingStep(
            self.model,
            self.params,
            self.optimizer,
            precision=self.case.precision,
            device=self.device,
            guard=self.guard,
            graph=graph and self.why_not_captured is None,
        )

    def step(self, batch: Batch) -> Tensor:
        """Takes one step, part after part and not as a CUDA graph; returns the loss."""
        features = batch.features(self.frontend)
        self.mark()
        taken = self.one_by_one(features, batch.target, self.case.procedure.lr)
        self.mark()
        return taken.loss

    def steps(self, *, overlapped: bool) -> Generator[None]:
        """Takes a step each time; ``overlapped``: as the trainer does on a GPU."""
        with closing(self.batches()) as batches:
            if overlapped:
                take = self.taker(graph=True)
                for batch, features, _ in with_features(batches, self.frontend, self.device):
                    take(features, batch.target, self.case.procedure.lr)
                    yield
            while True:
                batch = next(batches)
                self.mark()
                self.step(batch)
                yield


class Marked(nn.Module):
    """A model that calls ``mark`` at the end of the forward pass."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.mark = lambda: None

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(x)
        self.mark()
        return logits


def _data_ms(training: Training) -> Spread:
    """Duration of reading a batch to the device while nothing else runs."""
    with closing(training.batches()) as batches:
        next(batches)
        moments = [time.perf_counter()]
        for _ in range(DATA_ROUNDS):
            next(batches)
            training.clock.wait()
            moments.append(time.perf_counter())
    return Spread.of([(b - a) * 1e3 for a, b in pairwise(moments)])


class Timed(NamedTuple):
    """Steps that were timed."""

    steps: list[float]
    """Durations from end to end, in ms."""
    parts: dict[str, list[float]]
    """Durations of each part, in ms; empty lists where parts were not marked."""
    watts: float | None
    """Power of the GPU during the last of them."""


def _timed_steps(training: Training, seconds: float, *, marked: bool) -> Timed:
    """Takes steps for about ``seconds``, after a warm-up; ``marked``: one part after another."""
    clock = training.clock
    marks: list[list[Any]] = []
    watts = None
    with closing(training.steps(overlapped=not marked)) as steps:
        for _ in range(WARM_UP[training.device.type]):
            next(steps)
        clock.wait()
        low, high = ROUNDS
        start = time.perf_counter()
        ends = [clock.now()]
        while len(ends) <= low or (len(ends) <= high and time.perf_counter() - start < seconds):
            if marked:
                training.marks = []
                marks.append(training.marks)
            next(steps)
            ends.append(clock.now())
            if len(ends) > BEHIND:  # as the trainer: batches the host has ready take memory
                clock.wait_for(ends[-1 - BEHIND])
        if training.device.type == "cuda":
            watts = gpu_watts(training.device)  # while steps still run
        clock.wait()
        training.marks = None
    parts: dict[str, list[float]] = {name: [] for name in PARTS}
    for moments in marks:
        for name, (a, b) in zip(PARTS, pairwise(moments), strict=True):
            parts[name].append(clock.ms(a, b))
    return Timed([clock.ms(a, b) for a, b in pairwise(ends)], parts, watts)
