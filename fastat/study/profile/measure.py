"""Measures what a training step costs on a device: time, also by part, memory and power.

The step is the trainer's: rows of a packed set, read a step ahead; front end; model, loss, backward
pass and Adam. On a GPU two series of steps are timed. In the first, kernels are launched one by
one, and CUDA events time the parts. In the second, the step is a CUDA graph and overlaps with the
same work as in training; its duration is from one step's end to the next. On a CPU nothing
overlaps, and one series gives both.
"""

import json
import time
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import count, pairwise
from statistics import quantiles
from typing import Any

import torch
from torch import Tensor

from fastat.config.run import TrainConfig
from fastat.data.loader import Batch, PackedSource, with_features
from fastat.data.sampler import Sampler, StepPlan
from fastat.data.shards import PackedSet
from fastat.study.profile.device import gpu_watts, out_of_memory, peak_bytes, restart_peak
from fastat.system.distributed import ALONE
from fastat.training.data import model_meta
from fastat.training.finetune import train_mode
from fastat.training.network import build_network, training_step
from fastat.training.readback import BEHIND
from fastat.weights.checkpoint import build_frontend

SECONDS = {"cuda": 3.0, "cpu": 8.0}
"""Seconds for which steps are timed, by default."""

ROUNDS = (2, 200)
"""Least and largest number of steps that are timed."""

WARM_UP = {"cuda": 5, "cpu": 1}
"""Steps before the timed ones. They compile, choose algorithms, allocate and capture a graph."""

DATA_ROUNDS = 10
PARTS = ("frontend", "forward", "backward", "optimizer")


def step_key(config: TrainConfig) -> str:
    """Equal for configurations whose steps do the same work; procedures may differ in learning rate
    alone."""
    return json.dumps(
        {
            "model": config.model,
            "feature": config.feature,
            "options": config.model_options,
            "batch": config.batch,
            "precision": config.precision,
            "compile": config.compile,
        },
        sort_keys=True,
    )


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
    peak_bytes: int
    """Peak memory: of the allocator on a GPU, of the process on a CPU."""
    watts: float | None
    """Power of the GPU while steps ran; None on a CPU, and where the driver has no reading."""


def measure(
    config: TrainConfig, device: torch.device, packed: PackedSet, *, seconds: float | None = None
) -> Measured:
    """Takes training steps from ``packed``, and times them for about ``seconds``.

    Raises:
        OutOfMemory: the step does not fit.
    """
    with out_of_memory(device):  # which frees the memory of the step once ``_measure`` is left
        return _measure(config, device, packed, seconds or SECONDS[device.type])


def _measure(
    config: TrainConfig, device: torch.device, packed: PackedSet, seconds: float
) -> Measured:
    if config.compile:
        torch._dynamo.reset()  # or a shape after another would be compiled for any shape
    torch.manual_seed(0)
    restart_peak(device)
    training = Training(config, device, packed)
    ms = {"data": _data_ms(training)}
    if device.type == "cuda":
        parts, _ = _timed_steps(training, seconds / 3, marked=True)
        restart_peak(device)
        timed, watts = _timed_steps(training, seconds, marked=False)
        ms |= parts | timed
    else:
        timed, watts = _timed_steps(training, seconds, marked=True)
        ms |= timed
    spreads = {name: Spread.of(ms[name]) for name in ("data", *PARTS, "step")}
    return Measured(spreads, peak_bytes(device), watts)


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

    def __init__(self, config: TrainConfig, device: torch.device, packed: PackedSet) -> None:
        self.config, self.device, self.packed = config, device, packed
        meta = model_meta(config, packed)
        self.frontend = build_frontend(meta).to(device)
        self.network = build_network(config, meta, device, ALONE, start=False)
        train_mode(self.network.model)
        self.clock = Clock(device)
        self.marks: list[Any] | None = None
        self.network.model.register_forward_hook(lambda *_: self.mark())
        self.network.optimizer.register_step_pre_hook(lambda *_: self.mark())
        launched_one_by_one = replace(config, cuda_graphs=False)
        self.training_step = training_step(launched_one_by_one, self.network, device, ALONE)
        self.sampler = Sampler(
            max(packed.num_clips, 4 * config.batch),
            config.batch,
            seed=0,
            num_frames=meta.num_frames,
            num_mels=meta.num_mels,
            mixup=config.mixup,
            mixup_alpha=config.mixup_alpha,
            time_mask=config.time_mask,
            freq_mask=config.freq_mask,
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
        for i in count():
            plan = self.sampler.plan(*divmod(i, steps))
            yield replace(plan, rows=plan.rows % clips, partners=plan.partners % clips)

    def step(self, batch: Batch) -> Tensor:
        """Takes one step, part after part and not as a CUDA graph; returns the loss."""
        features = batch.features(self.frontend)
        self.mark()
        result = self.training_step(features, batch.target, self.config.lr)
        self.mark()
        return result.loss

    def steps(self, *, overlapped: bool) -> Generator[None]:
        """Takes a step each time; ``overlapped``: as the trainer does on a GPU."""
        with closing(self.batches()) as batches:
            if overlapped:
                step = training_step(self.config, self.network, self.device, ALONE)
                for batch, features, _ in with_features(batches, self.frontend, self.device):
                    step(features, batch.target, self.config.lr)
                    yield
            for batch in batches:
                self.mark()
                self.step(batch)
                yield


def _data_ms(training: Training) -> list[float]:
    """Durations of reading a batch to the device while nothing else runs."""
    with closing(training.batches()) as batches:
        next(batches)
        moments = [time.perf_counter()]
        for _ in range(DATA_ROUNDS):
            next(batches)
            training.clock.wait()
            moments.append(time.perf_counter())
    return [(b - a) * 1e3 for a, b in pairwise(moments)]


def _timed_steps(
    training: Training, seconds: float, *, marked: bool
) -> tuple[dict[str, list[float]], float | None]:
    """Takes steps for about ``seconds``, after a warm-up.

    Args:
        marked: take one part after another, and time each.

    Returns:
        durations in ms, by name: "step", from end to end, and PARTS where they are ``marked``;
        and the power of a GPU during the last steps, in watts.
    """
    clock = training.clock
    marks: list[list[Any]] = []
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
        # Read while steps still run.
        watts = gpu_watts(training.device) if training.device.type == "cuda" else None
        clock.wait()
        training.marks = None
    ms = {"step": [clock.ms(a, b) for a, b in pairwise(ends)]}
    for moments in marks:
        for name, (a, b) in zip(PARTS, pairwise(moments), strict=True):
            ms.setdefault(name, []).append(clock.ms(a, b))
    return ms, watts
