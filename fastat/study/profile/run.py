"""Measures every case that ``fastat profile`` was asked for."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from fastat.config.procedures import PROCEDURES
from fastat.config.run import TrainConfig, resolve
from fastat.data.shards import SAMPLE_RATE, PackedSet
from fastat.study.profile.cases import Choice
from fastat.study.profile.device import OutOfMemory, matmul_flop_per_s
from fastat.study.profile.kept import kept_file, read_kept, write_kept
from fastat.study.profile.measure import Measured, measure, step_key
from fastat.study.profile.noise import noise_set
from fastat.study.profile.rows import Document, add_measured, describe, document
from fastat.study.profile.trace import trace
from fastat.system.compiling import keep_compiled
from fastat.system.device import supports_triton
from fastat.system.environment import environment
from fastat.system.errors import UserError
from fastat.system.progress import progress
from fastat.training.data import model_meta
from fastat.training.fit_batch import largest_batch, memory_limit
from fastat.training.launch import cache_folder

CPU_BATCH = {"logmel64": 4, "fbank128": 1}
"""Default number of clips in a step on a CPU, by feature: both are about 100,000 numbers."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How steps are taken."""

    batch: int | Literal["auto"] | None = None
    """Clips in a step; "auto": as many as fit a GPU; None: the batch of ``fastat train``, on a CPU
    at most CPU_BATCH."""
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


@contextmanager
def open_set(data: Path | None) -> Iterator[PackedSet]:
    """The set that steps are taken from; noise is removed at the end.

    Raises:
        UserError: ``data`` is no packed set, or one without audio.
        Failure: it is damaged.
    """
    if data is not None:
        with closing(PackedSet.open(data)) as packed:
            packed.require_audio()
            yield packed
        return
    with (
        tempfile.TemporaryDirectory(prefix="fastat-profile-") as folder,
        closing(noise_set(Path(folder))) as packed,
    ):
        yield packed


def make_config(
    choice: Choice, device: torch.device, packed: PackedSet, settings: Settings
) -> TrainConfig:
    """What ``fastat train`` would make of a choice; with a single clip where the batch is "auto",
    which is found later."""
    config = resolve(
        choice.proc,
        choice.model,
        {
            "data": str(packed.directory),
            "model_options": choice.options,
            "precision": settings.precision,
            "compile": supports_triton(device) if settings.compile is None else settings.compile,
        },
        num_clips=settings.clips,
        clip_seconds=packed.clip_samples / SAMPLE_RATE,
        report=False,
    )
    batch = 1 if settings.batch == "auto" else settings.batch
    if batch is None:
        on_cpu = min(config.batch, CPU_BATCH[config.feature])
        batch = on_cpu if device.type == "cpu" else config.batch
    return replace(config, batch=batch)


def with_largest_batches(configs: Sequence[TrainConfig], device: torch.device) -> list[TrainConfig]:
    """Each step at the largest batch that fits the GPU, at one clip where none does."""
    steps = {step_key(config): config for config in configs}
    batches: dict[str, int] = {}
    with progress("looking for the largest batch", len(steps), "models") as advance:
        for key, config in steps.items():
            batches[key] = largest_batch(config, device, memory_limit(device)) or 1
            advance()
    return [replace(config, batch=batches[step_key(config)]) for config in configs]


def measure_step(
    config: TrainConfig, device: torch.device, packed: PackedSet, settings: Settings
) -> tuple[TrainConfig, Measured | None]:
    """Measures a step; a default batch that does not fit becomes what one of the paper's GPUs had
    of it.

    Returns:
        the step that was measured, and None where it does not fit.
    """
    batches = [config.batch]
    procedure = PROCEDURES[config.proc]
    share = procedure.batch // procedure.paper_gpus
    if settings.batch is None and share < config.batch:
        batches.append(share)
    for batch in batches:
        config = replace(config, batch=batch)
        try:
            return config, measure(config, device, packed, seconds=settings.seconds)
        except OutOfMemory:
            continue
    return config, None


def profile(choices: Sequence[Choice], device: torch.device, settings: Settings) -> Document:
    """Measures ``choices``; a step that several procedures share is measured once.

    Raises:
        UserError: a model's options are impossible, or the batch is "auto" on a CPU.
        OutOfMemory: there is no trace, as the step does not fit.
        Failure: a kept step is damaged, or a file cannot be written.
    """
    if settings.batch == "auto" and device.type != "cuda":
        raise UserError("--batch auto needs a GPU: on a CPU give a number of clips, as --batch 4")
    with open_set(settings.data) as packed:
        configs = [make_config(choice, device, packed, settings) for choice in choices]
        # Before anything is measured, as this finds options that are impossible.
        rows = [describe(config, model_meta(config, packed)) for config in configs]
        if configs[0].compile:
            keep_compiled(cache_folder() / "compiled")
        if settings.batch == "auto":
            configs = with_largest_batches(configs, device)
        ceiling = matmul_flop_per_s(device, settings.precision)
        setup = {
            "environment": environment(device),
            "size": (packed.clip_samples, len(packed.classes)),
            "data": settings.data and str(settings.data.resolve()),
        }
        measured: dict[str, tuple[TrainConfig, Measured | None]] = {}
        missing: dict[str, TrainConfig] = {}
        for config in configs:
            key = step_key(config)
            found = read_kept(kept_file(key, setup)) if settings.use_kept else None
            if found is not None:
                measured[key] = config, found
            else:
                missing.setdefault(key, config)
        if missing:
            with progress("measuring", len(missing), "steps") as advance:
                for key, config in missing.items():
                    taken, found = measured[key] = measure_step(config, device, packed, settings)
                    if found is not None:
                        write_kept(step_key(taken), setup, found)
                    advance()
        # Again: other work on the machine may have come between, and a ceiling is the most.
        ceiling = max(ceiling, matmul_flop_per_s(device, settings.precision))
        for row, config in zip(rows, configs, strict=True):
            taken, found = measured[step_key(config)]
            add_measured(
                row,
                found,
                batch=taken.batch,
                clips=settings.clips,
                epochs=config.epochs,
                ceiling=ceiling,
            )
        result = document(rows, device, clips=settings.clips, ceiling=ceiling)
        if settings.trace is not None:
            taken, _ = measured[step_key(configs[0])]
            table = trace(taken, device, packed, settings.trace)
            result["trace"] = {"file": str(settings.trace), "table": table}
        return result
