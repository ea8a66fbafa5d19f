"""``--batch auto``: the largest batch that fits in the memory, section 4.3 of the paper."""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fastat.config import TrainConfig
from fastat.data.shards import PackedSet, read_index, sizes_of
from fastat.distributed import ALONE, Ranks
from fastat.errors import Failure, UserError
from fastat.features import FEATURES
from fastat.host import free_memory, ranks_here
from fastat.memory import Workload, estimated_bytes, largest_batch, memory_limit
from fastat.procedures import procedure_of, small_set_sizes
from fastat.system.device import default_device, device_name

EVEN = 8
"""A rank's clips are a multiple of this, which matrix units like, where there are that many."""

MOST_BYTES = 64 << 10
"""Upper bound of a step's bytes for each value of its features (batch x frames x mel bins): by
``estimated_bytes`` they are 2 to 34 kB, the most for the AST at stride 4."""
WEIGHTS_BYTES = 2 << 30
"""Upper bound of the bytes of weights, gradients and Adam's moments of any model."""


@dataclass(frozen=True)
class Fitted:
    """What was found."""

    overrides: dict[str, Any]
    """Of the configuration: the batch, and activation checkpointing where it is needed."""
    note: str


def fit_batch(config: TrainConfig, ranks: Ranks = ALONE) -> Fitted:
    """The largest batch for a run that is configured with the procedure's, on every rank alike.

    Each rank looks at its own device, and the one with the least room decides. A small set gets no
    larger batch than the rule for small sets gives it, and no set a larger one than it has clips.
    Where the procedure's batch does not fit, activation checkpointing makes room for it, or for
    what is possible.

    Args:
        config: of ``resolve`` without a batch; on every rank.

    Raises:
        UserError: more ranks and parts than clips in a batch.
        Failure: not even the smallest batch fits.
    """
    num_clips, clip_samples = sizes_of(Path(config.data))
    small = small_set_sizes(procedure_of(config.proc, config.model, config.preset), num_clips)
    most = config.batch if small is not None else num_clips
    device = default_device()
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    work = workload(config, clip_samples, len(read_index(Path(config.data))["classes"]))
    limit = memory_limit(device) - _cached_bytes(config, work, num_clips, device)
    parts = ranks.size * config.accumulate
    if most < parts:
        raise UserError(
            f"batch auto: {num_clips:,} clips get a batch of at most {most}, expected one clip or "
            f"more for each of {ranks.size} ranks x accumulate {config.accumulate}"
        )

    def fitting(work: Workload, at_most: int) -> int:
        """The largest global batch on any rank; 0: none."""
        own, accumulate = at_most // ranks.size, config.accumulate
        even = EVEN * accumulate
        found = None
        if own >= even:
            found = largest_batch(work, device, limit, multiple=even, at_most=own)
            own = even - 1
        if found is None:
            found = largest_batch(work, device, limit, multiple=accumulate, at_most=own)
        return min(ranks.gather(found or 0)) * ranks.size

    if device.type == "cuda" and ranks.first:
        print("fastat: batch auto: trying steps, which takes minutes", file=sys.stderr, flush=True)
    wanted = config.batch
    batch = fitting(work, most)
    overrides: dict[str, Any] = {"batch": batch}
    note = f"batch auto: {batch:,} clips fit in {limit / 2**30:.1f} GiB on {device_name(device)}"
    if batch < min(wanted, most) // parts * parts and not config.model_options.get(
        "activation_checkpointing"
    ):
        less = fitting(replace(work, activation_checkpointing=True), min(wanted, most))
        if less > batch:
            overrides = {"batch": less, "model_options": {"activation_checkpointing": True}}
            note = (
                f"batch auto: {batch:,} clips fit in {limit / 2**30:.1f} GiB on "
                f"{device_name(device)}, {less:,} with activation checkpointing, which is on "
                "(model.activation_checkpointing): a third more operations"
            )
    if not overrides["batch"]:
        raise Failure(
            f"batch auto: not even {parts} clip{'s fit' if parts > 1 else ' fits'} in "
            f"{limit / 2**30:.1f} GiB on "
            f"{device_name(device)}: a smaller model needs less"
        )
    if small is not None and overrides["batch"] == wanted:
        note += f"; no more are taken for a small set ({num_clips:,} clips)"
    return Fitted(overrides, note)


def memory_warning(config: TrainConfig, packed: PackedSet, num_ranks: int) -> str | None:
    """One line where a training on the CPU takes more memory than is free; None where it fits.

    Called once the data are open, when the log-mels that --cache keeps are in memory. A system
    without swap would kill the process without a word.
    """
    work = workload(config, packed.clip_samples, len(packed.classes))
    batch = config.batch // num_ranks
    free = free_memory() // ranks_here()
    if batch * work.num_frames * work.num_mels * MOST_BYTES + WEIGHTS_BYTES <= free:
        return None  # without the seconds that an estimate takes
    needed = estimated_bytes(work, batch)
    if needed <= free:
        return None
    return (
        f"a step of {batch:,} clips needs about {needed / 2**30:.1f} GiB, and only "
        f"{free / 2**30:.1f} GiB are free: the system may kill this training; "
        "a smaller --batch needs less, and --batch auto takes what fits"
    )


def workload(config: TrainConfig, clip_samples: int, num_classes: int) -> Workload:
    """What the memory of a run's step depends on."""
    feature = FEATURES[config.feature]
    return Workload(
        model=config.model,
        num_mels=feature.num_mels,
        num_frames=feature.num_frames(clip_samples),
        num_classes=num_classes,
        options=config.model_options,
        precision=config.precision,
        compile=config.compile,
        cuda_graphs=config.cuda_graphs,
        kernels=config.kernels,
        clip_samples=0 if config.cache == "device" else clip_samples,
        accumulate=config.accumulate,
        eval_batch=0 if config.eval is None else config.eval_batch,
    )


def _cached_bytes(config: TrainConfig, work: Workload, num_clips: int, device: torch.device) -> int:
    """What this rank's part of --cache takes of the memory that a step is to fit in."""
    on_this = config.cache == "device" or (config.cache == "host" and device.type == "cpu")
    if not on_this:
        return 0
    ranks = ranks_here() if config.cache == "host" else 1
    size = 1 if config.cache_dtype == "uint8" else 2
    return num_clips * work.num_frames * work.num_mels * size // ranks
