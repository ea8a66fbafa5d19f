"""Measures every case that ``fastat profile`` was asked for, and writes what came out."""

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastat.data.shards import PackedSet
from fastat.features import FEATURES
from fastat.profile.cases import Choice, default_batch
from fastat.profile.device import matmul_flop_per_s
from fastat.profile.measure import Case, Measured, OutOfMemory, measure
from fastat.profile.noise import noise_set
from fastat.profile.rows import Document, count, document, make_row
from fastat.progress import progress


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How steps are taken."""

    batch: int | str | None = None
    """Clips a step; "auto": as many as fit; None: ``default_batch``."""
    precision: str = "bf16"
    compile: bool | None = None
    """None: as the trainer, on a GPU."""
    activation_checkpointing: bool = False
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


def make_case(choice: Choice, device: torch.device, settings: Settings, batch: int) -> Case:
    """A choice as a step of ``batch`` clips."""
    compiled = settings.compile
    return Case(
        model=choice.model,
        proc=choice.proc,
        options=choice.options,
        batch=batch,
        precision=settings.precision,
        compile=device.type == "cuda" if compiled is None else compiled,
        activation_checkpointing=settings.activation_checkpointing,
    )


def profile(
    choices: Sequence[Choice], device: torch.device, settings: Settings, *, strides: bool
) -> Document:
    """Measures ``choices``; a step that several procedures share is measured once.

    Raises:
        UserError: a model's options are impossible.
    """
    with ExitStack() as stack:
        packed = opened(settings.data, stack)
        size = packed.clip_samples, len(packed.classes)
        cases = []
        for choice in choices:
            batch = settings.batch
            if not isinstance(batch, int):
                batch = default_batch(choice, device.type)
            cases.append(make_case(choice, device, settings, batch))
        counted = [count(case, *size) for case in cases]
        ceiling = matmul_flop_per_s(device, settings.precision)
        measured: dict[tuple[Any, ...], Measured | None] = {}
        steps = {case.step: case for case in cases}
        with progress("measuring", len(steps), "steps") as advance:
            for key, case in steps.items():
                try:
                    measured[key] = measure(case, device, packed)
                except OutOfMemory:
                    measured[key] = None
                advance()
        rows = [
            make_row(
                case,
                found,
                measured[case.step],
                num_frames=FEATURES[case.procedure.feature].num_frames(packed.clip_samples),
                stride_row=strides,
                clips=settings.clips,
                ceiling=ceiling,
            )
            for case, found in zip(cases, counted, strict=True)
        ]
        return document(rows, device, clips=settings.clips, ceiling=ceiling)
