"""``--batch auto``: the largest batch that fits in a GPU's memory, section 4.3 of the paper.

It is measured by taking steps in a process of its own (``memory_trial``), so that the one that
trains later starts with an allocator that nothing has fragmented.
"""

import json
import logging
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from fastat.audio.features import FEATURES
from fastat.config.procedures import procedure_of, small_set_sizes
from fastat.config.run import TrainConfig
from fastat.data.shards import sizes_of
from fastat.system.device import default_device, device_name
from fastat.system.display import release_messages
from fastat.system.distributed import ALONE, Ranks
from fastat.system.errors import Failure, UserError

log = logging.getLogger(__name__)

EVEN = 8
"""A rank's clips are a multiple of this, which matrix units like, where there are that many."""

MARGIN = 0.06
"""Share of the free memory that is left alone, for checkpoints and other programs."""

TRIAL_SECONDS = 1800
"""A trial that compiles takes minutes; longer than this it has hung."""


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
    limit = memory_limit(device)
    if config.cache == "device":
        limit -= _cached_bytes(config, num_clips, clip_samples, ranks.size)
    where = f"{limit / 2**30:.1f} GiB on {device_name(device)}"
    release_messages()  # the options fit together
    log.info(f"batch auto: trying training steps in {where}, which takes minutes")
    batch = _largest(config, device, limit, at_most=most // ranks.size)
    batch = min(ranks.gather(batch, patient=True)) * ranks.size
    if not batch:
        clips = "1 clip fits" if parts == 1 else f"{parts} clips fit"
        raise Failure(f"batch auto: not even {clips} in {where}: a smaller model needs less")
    stays = f"; a small set ({num_clips:,} clips) gets no more" if batch == most else ""
    log.info(f"batch auto: {batch:,} clips fit in {where}{stays if small else ''}")
    return batch


def _largest(config: TrainConfig, device: torch.device, limit: int, *, at_most: int) -> int:
    """The largest batch of this rank, a multiple of EVEN per part if possible; 0: none fits."""
    even = EVEN * config.accumulate
    found = None
    if at_most >= even:
        found = largest_batch(config, device, limit, multiple=even, at_most=at_most)
        at_most = even - 1
    if found is None:
        found = largest_batch(config, device, limit, multiple=config.accumulate, at_most=at_most)
    return found or 0


def memory_limit(device: torch.device) -> int:
    """Bytes that a training on a GPU may take, of what is free there now."""
    return int(torch.cuda.mem_get_info(device)[0] * (1 - MARGIN))


def largest_batch(
    config: TrainConfig,
    device: torch.device,
    limit_bytes: int,
    *,
    multiple: int = 1,
    at_most: int | None = None,
) -> int | None:
    """The largest batch, a multiple of ``multiple``, whose step takes at most ``limit_bytes``.

    Args:
        config: of the steps to take, whatever its batch; its training set is there.

    Returns:
        clips, to within 2 %; None where not even ``multiple`` clips fit.

    Raises:
        Failure: the trial failed in another way.
    """
    index = torch.cuda.current_device() if device.index is None else device.index
    asked = {
        "config": asdict(config),
        "device": f"cuda:{index}",
        "limit": limit_bytes,
        "multiple": multiple,
        "at_most": at_most,
    }
    try:
        done = subprocess.run(
            [sys.executable, "-m", "fastat.training.memory_trial"],
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


def _cached_bytes(config: TrainConfig, num_clips: int, clip_samples: int, num_ranks: int) -> int:
    """What a rank's part of ``--cache device`` takes of its GPU's memory."""
    feature = FEATURES[config.feature]
    size = 1 if config.cache_dtype == "uint8" else 2
    return num_clips * feature.num_frames(clip_samples) * feature.num_mels * size // num_ranks
