"""``--batch auto``: the largest batch that fits in a GPU's memory, section 4.3 of the paper."""

import logging
from pathlib import Path

import torch

from fastat.config import TrainConfig
from fastat.data.shards import read_index, sizes_of
from fastat.distributed import ALONE, Ranks
from fastat.errors import Failure, UserError
from fastat.features import FEATURES
from fastat.memory import Workload, largest_batch, memory_limit
from fastat.procedures import procedure_of, small_set_sizes
from fastat.system.device import default_device, device_name

log = logging.getLogger(__name__)

EVEN = 8
"""A rank's clips are a multiple of this, which matrix units like, where there are that many."""


def check_auto_batch() -> None:
    """Raises UserError where there is no GPU whose memory ``--batch auto`` could measure."""
    if default_device().type != "cuda":
        raise UserError(
            "--batch auto measures the memory of a GPU, and there is none: give a number"
        )


def fit_batch(config: TrainConfig, ranks: Ranks = ALONE) -> int:
    """The largest batch that fits, in clips over all ranks; the same on every rank.

    Each rank measures on its own device, and the one with the least room decides. A set gets no
    larger batch than it has clips, and a small set none larger than the rule for small sets says.

    Args:
        config: of ``resolve`` without a batch; on every rank.

    Raises:
        UserError: there is no GPU, or there are more ranks and parts than clips in a batch.
        Failure: not even the smallest batch fits.
    """
    check_auto_batch()
    num_clips, clip_samples = sizes_of(Path(config.data))
    small = small_set_sizes(procedure_of(config.proc, config.model, config.preset), num_clips)
    most = config.batch if small is not None else num_clips
    parts = ranks.size * config.accumulate
    if most < parts:
        raise UserError(
            f"batch auto: {num_clips:,} clips get a batch of at most {most}, expected one clip or "
            f"more for each of {ranks.size} ranks x accumulate {config.accumulate}"
        )
    device = default_device()
    work = workload(config, clip_samples, len(read_index(Path(config.data))["classes"]))
    limit = memory_limit(device)
    if config.cache == "device":
        limit -= _cached_bytes(config, work, num_clips, ranks.size)
    where = f"{limit / 2**30:.1f} GiB on {device_name(device)}"
    log.info(f"batch auto: trying training steps in {where}, which takes minutes")
    batch = _largest(work, device, limit, at_most=most // ranks.size)
    batch = min(ranks.gather(batch, patient=True)) * ranks.size
    if not batch:
        clips = "1 clip fits" if parts == 1 else f"{parts} clips fit"
        raise Failure(f"batch auto: not even {clips} in {where}: a smaller model needs less")
    stays = f"; a small set ({num_clips:,} clips) gets no more" if batch == most else ""
    log.info(f"batch auto: {batch:,} clips fit in {where}{stays if small else ''}")
    return batch


def _largest(work: Workload, device: torch.device, limit: int, *, at_most: int) -> int:
    """The largest batch of this rank, a multiple of EVEN per part if possible; 0: none fits."""
    even = EVEN * work.accumulate
    found = None
    if at_most >= even:
        found = largest_batch(work, device, limit, multiple=even, at_most=at_most)
        at_most = even - 1
    if found is None:
        found = largest_batch(work, device, limit, multiple=work.accumulate, at_most=at_most)
    return found or 0


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


def _cached_bytes(config: TrainConfig, work: Workload, num_clips: int, num_ranks: int) -> int:
    """What a rank's part of ``--cache device`` takes of its GPU's memory."""
    size = 1 if config.cache_dtype == "uint8" else 2
    return num_clips * work.num_frames * work.num_mels * size // num_ranks
