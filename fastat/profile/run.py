"""Measures every case that ``fastat profile`` was asked for, and writes what came out."""

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fastat.compiling import keep_compiled
from fastat.data.shards import PackedSet
from fastat.features import FEATURES
from fastat.launch import cache_folder
from fastat.memory import largest_batch, memory_limit
from fastat.profile.cases import Choice, default_batch
from fastat.profile.device import matmul_flop_per_s
from fastat.profile.measure import Case, Measured, OutOfMemory, measure
from fastat.profile.modules import memory_by_module
from fastat.profile.noise import noise_set
from fastat.profile.rows import Document, count, document, make_row
from fastat.profile.trace import SHOWN, trace
from fastat.progress import progress
from fastat.system.device import supports_triton


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How steps are taken."""

    batch: int | str | None = None
    """Clips a step; "auto": as many as fit; None: ``default_batch``."""
    precision: str = "fp32"
    compile: bool | None = None
    """None: as the trainer, on a GPU."""
    activation_checkpointing: bool = False
    seconds: float | None = None
    """That each case is timed; None: ``measure.SECONDS``."""
    largest: bool = True
    """Also looks for the largest batch that fits."""
    data: Path | None = None
    """A packed set; None: noise."""
    clips: int
    """Of the epoch that hours are of."""


def opened(data: Path | None, stack: ExitStack) -> PackedSet:
    """The set that steps are taken from; noise goes with ``stack``.

    Raises:
        UserError, Failure: ``data`` is no packed set, or is damaged.
    """
    if data is not None:
        packed = PackedSet.open(data)
    else:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="fastat-profile-"))
        packed = noise_set(Path(folder))
    stack.callback(packed.close)
    return packed


def make_case(choice: Choice, device: torch.device, settings: Settings) -> Case:
    """A choice as a step; where the batch is "auto", of one clip for now."""
    compiled = settings.compile
    batch = settings.batch or default_batch(choice, device.type)
    options = dict(choice.options)
    less_memory = options.pop("activation_checkpointing", False)  # by --set, as for fastat train
    return Case(
        model=choice.model,
        proc=choice.proc,
        options=options,
        batch=batch if isinstance(batch, int) else 1,
        precision=settings.precision,
        compile=supports_triton(device) if compiled is None else compiled,
        activation_checkpointing=settings.activation_checkpointing or less_memory,
    )


def of_memory(case: Case) -> tuple[Any, ...]:
    """Equal for cases that take the same memory at the same batch."""
    return replace(case, batch=1).step


def largest_batches(
    cases: Sequence[Case], size: tuple[int, int], device: torch.device, settings: Settings
) -> dict[tuple[Any, ...], int | None]:
    """The largest batch that fits, by ``of_memory``; None where not one clip does.

    Without ``--batch auto`` it is only shown: then no step is compiled for it, which would take
    minutes and saves some memory.

    Args:
        size: samples of a clip, and classes.
    """
    auto = settings.batch == "auto"
    different = {of_memory(case): case for case in cases}
    found: dict[tuple[Any, ...], int | None] = {}
    with progress("looking for the largest batch", len(different), "models") as advance:
        for key, case in different.items():
            work = replace(case.workload(*size), compile=case.compile and auto)
            found[key] = largest_batch(work, device, memory_limit(device))
            advance()
    return found


def fitting(case: Case, most: int) -> Case:
    """A step at a default batch: of more clips than fit, what each of the paper's GPUs had."""
    if case.batch <= most:
        return case
    share = case.procedure.batch // case.procedure.paper_gpus
    return replace(case, batch=min(case.batch, share))


def profile(choices: Sequence[Choice], device: torch.device, settings: Settings) -> Document:
    """Measures ``choices``; a step that several procedures share is measured once.

    Raises:
        UserError: a model's options are impossible.
    """
    with ExitStack() as stack:
        packed = opened(settings.data, stack)
        size = packed.clip_samples, len(packed.classes)
        cases = [make_case(choice, device, settings) for choice in choices]
        counted = [count(case, *size) for case in cases]  # finds options that are impossible
        if cases[0].compile:
            keep_compiled(cache_folder() / "compiled")
        fits = {}
        if settings.batch == "auto" or settings.largest:
            fits = largest_batches(cases, size, device, settings)
        if settings.batch == "auto":
            cases = [replace(case, batch=fits[of_memory(case)] or 1) for case in cases]
        elif settings.batch is None and fits:
            cases = [fitting(case, fits[of_memory(case)] or 0) for case in cases]
        ceiling = matmul_flop_per_s(device, settings.precision)
        measured: dict[tuple[Any, ...], Measured | None] = {}
        steps = {case.step: case for case in reversed(cases)}  # the first of equal ones
        with progress("measuring", len(steps), "steps") as advance:
            for key, case in reversed(steps.items()):
                try:
                    measured[key] = measure(case, device, packed, seconds=settings.seconds)
                except OutOfMemory:
                    measured[key] = None
                advance()
        # Again: other work on the machine may have come between, and a ceiling is the most.
        ceiling = max(ceiling, matmul_flop_per_s(device, settings.precision))
        rows = [
            make_row(
                case,
                found,
                measured[case.step],
                num_frames=FEATURES[case.procedure.feature].num_frames(packed.clip_samples),
                clips=settings.clips,
                ceiling=ceiling,
                largest_batch=fits.get(of_memory(case)),
            )
            for case, found in zip(cases, counted, strict=True)
        ]
        return document(rows, device, clips=settings.clips, ceiling=ceiling)


def look_inside(
    choice: Choice, device: torch.device, settings: Settings, trace_file: Path | None, memory: bool
) -> dict[str, Any]:
    """What ``--trace`` and ``--memory`` add to the document; ``settings.batch``: a number.

    Raises:
        UserError: the model's options are impossible.
        OutOfMemory: the step does not fit.
        Failure: the trace cannot be written.
    """
    found: dict[str, Any] = {}
    with ExitStack() as stack:
        packed = opened(settings.data, stack)
        size = packed.clip_samples, len(packed.classes)
        case = make_case(choice, device, settings)
        count(case, *size)
        if case.compile:
            keep_compiled(cache_folder() / "compiled")
        if memory:
            modules = memory_by_module(case, device, packed)
            found["memory"] = {
                "estimated": device.type == "cpu",
                "modules": [asdict(m) | {"peak": m.peak} for m in modules],
            }
        if trace_file is not None:
            operators = trace(case, device, packed, trace_file)[:SHOWN]
            found["trace"] = {"file": str(trace_file), "operators": [asdict(o) for o in operators]}
    return found
