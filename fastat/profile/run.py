"""Measures every case that ``fastat profile`` was asked for."""

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fastat.compiling import keep_compiled
from fastat.data.shards import PackedSet
from fastat.environment import environment
from fastat.errors import UserError
from fastat.features import FEATURES
from fastat.launch import cache_folder
from fastat.memory import largest_batch, memory_limit
from fastat.profile.cases import CPU_BATCH, Choice, trained_batch
from fastat.profile.device import OutOfMemory, matmul_flop_per_s
from fastat.profile.kept import KeptSteps
from fastat.profile.measure import Case, Measured, measure
from fastat.profile.noise import noise_set
from fastat.profile.rows import Document, count, document, make_row
from fastat.profile.trace import trace
from fastat.progress import progress
from fastat.system.device import supports_triton


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How steps are taken."""

    batch: int | str | None = None
    """Clips in a step; "auto": as many as fit a GPU; None: ``default_batch``."""
    precision: str = "fp32"
    compile: bool | None = None
    """None: as ``fastat train``, which compiles on a GPU."""
    seconds: float | None = None
    """Time for which each case is measured; None: ``measure.SECONDS``."""
    data: Path | None = None
    """A packed set; None: noise."""
    clips: int
    """Clips of an epoch, to compute hours."""
    use_kept: bool = False
    """Steps that were measured earlier, with the same settings and versions, are not measured
    again."""
    trace: Path | None = None
    """A file to write a trace of the only case to."""


def opened(data: Path | None, stack: ExitStack) -> PackedSet:
    """The set that steps are taken from; noise is removed with ``stack``.

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


def default_batch(choice: Choice, device: torch.device, clips: int) -> int:
    """Clips in a step: the batch of ``fastat train``, on a CPU at most CPU_BATCH."""
    trained = trained_batch(choice.procedure, clips)
    if device.type == "cuda":
        return trained
    return min(trained, CPU_BATCH[choice.procedure.feature])


def make_case(choice: Choice, device: torch.device, settings: Settings) -> Case:
    """The step of a choice; with a single clip where the batch is "auto", which is found later."""
    batch = settings.batch or default_batch(choice, device, settings.clips)
    return Case(
        model=choice.model,
        proc=choice.proc,
        options=choice.options,
        batch=batch if isinstance(batch, int) else 1,
        precision=settings.precision,
        compile=supports_triton(device) if settings.compile is None else settings.compile,
    )


def with_largest_batches(
    cases: Sequence[Case], size: tuple[int, int], device: torch.device
) -> list[Case]:
    """Each case at the largest batch that fits the GPU, at one clip where none does.

    Args:
        size: samples of a clip, and classes.
    """
    found: dict[tuple[Any, ...], int] = {}
    same = [replace(case, batch=1).step for case in cases]  # the same memory at any batch
    with progress("looking for the largest batch", len(set(same)), "models") as advance:
        for key, case in zip(same, cases, strict=True):
            if key not in found:
                work = case.workload(*size)
                found[key] = largest_batch(work, device, memory_limit(device)) or 1
                advance()
    return [replace(case, batch=found[key]) for key, case in zip(same, cases, strict=True)]


def measure_case(
    case: Case, device: torch.device, packed: PackedSet, settings: Settings
) -> tuple[Case, Measured | None]:
    """Measures a step; a default batch that does not fit becomes what one of the paper's GPUs had
    of it.

    Returns:
        the case that was measured, and None where it does not fit.
    """
    share = case.procedure.batch // case.procedure.paper_gpus
    try:
        return case, measure(case, device, packed, seconds=settings.seconds)
    except OutOfMemory:
        if settings.batch is not None or share >= case.batch:
            return case, None
    smaller = replace(case, batch=share)
    try:
        return smaller, measure(smaller, device, packed, seconds=settings.seconds)
    except OutOfMemory:
        return smaller, None


def profile(choices: Sequence[Choice], device: torch.device, settings: Settings) -> Document:
    """Measures ``choices``; a step that several procedures share is measured once.

    Raises:
        UserError: a model's options are impossible, or the batch is "auto" on a CPU.
        OutOfMemory: there is no trace, as the step does not fit.
        Failure: a kept step is damaged, or a file cannot be written.
    """
    if settings.batch == "auto" and device.type != "cuda":
        raise UserError("--batch auto needs a GPU: on a CPU give a number of clips, as --batch 4")
    with ExitStack() as stack:
        packed = opened(settings.data, stack)
        size = packed.clip_samples, len(packed.classes)
        cases = [make_case(choice, device, settings) for choice in choices]
        counted = [count(case, *size) for case in cases]  # finds options that are impossible
        if cases[0].compile:
            keep_compiled(cache_folder() / "compiled")
        if settings.batch == "auto":
            cases = with_largest_batches(cases, size, device)
        ceiling = matmul_flop_per_s(device, settings.precision)
        data = settings.data and str(settings.data.resolve())
        setup = {"environment": environment(device), "size": size, "data": data}
        kept = KeptSteps(cache_folder() / "profile", setup)
        measured: dict[tuple[Any, ...], tuple[Case, Measured | None]] = {}
        if settings.use_kept:
            measured = {c.step: (c, found) for c in cases if (found := kept.read(c)) is not None}
        missing: dict[tuple[Any, ...], Case] = {}
        for case in cases:
            if case.step not in measured:
                missing.setdefault(case.step, case)
        if missing:
            with progress("measuring", len(missing), "steps") as advance:
                for step, case in missing.items():
                    taken, found = measured[step] = measure_case(case, device, packed, settings)
                    if found is not None:
                        kept.write(taken, found)
                    advance()
        # Again: other work on the machine may have come between, and a ceiling is the most.
        ceiling = max(ceiling, matmul_flop_per_s(device, settings.precision))
        rows = []
        for case, of_model in zip(cases, counted, strict=True):
            taken, found = measured[case.step]
            row = make_row(
                replace(case, batch=taken.batch),
                of_model,
                found,
                num_frames=FEATURES[case.procedure.feature].num_frames(packed.clip_samples),
                clips=settings.clips,
                ceiling=ceiling,
            )
            rows.append(row)
        result = document(rows, device, clips=settings.clips, ceiling=ceiling)
        if settings.trace is not None:
            taken, _ = measured[cases[0].step]
            table = trace(taken, device, packed, settings.trace)
            result["trace"] = {"file": str(settings.trace), "table": table}
        return result
