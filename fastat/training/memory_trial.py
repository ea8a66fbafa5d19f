"""Takes training steps on a GPU to find the largest batch: ``python -m`` runs this module.

Reads a request of ``fit_batch`` as JSON from standard input. The last line of standard
output is the number of clips, or null where not even the smallest batch fits. The allocator is
limited to the memory that training may take, so that a batch that fits does so with the
fragmentation that it causes.
"""

import gc
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastat.audio.frontend import Augment, Frontend
from fastat.config.run import TrainConfig
from fastat.data.loader import Batch, with_features
from fastat.data.shards import PackedSet
from fastat.system.device import autocast, choose_kernels
from fastat.system.distributed import ALONE
from fastat.training.data import model_meta
from fastat.training.finetune import train_mode
from fastat.training.network import build_network, training_step
from fastat.training.step import WARM_UP
from fastat.weights.checkpoint import ModelMeta, build_frontend
from fastat_kernels.backend import set_kernels

ROWS_A_CLIP = 1.5
"""Rows of a batch for each of its clips: the clip, and mixup partners of some."""

STEPS = WARM_UP + 2
"""Those before the capture, the one that is captured, and a replay."""


def measure(config: TrainConfig, meta: ModelMeta, batch: int, device: torch.device) -> int | None:
    """Peak bytes that the allocator holds over some steps at ``batch``; None: it does not fit."""
    torch._dynamo.reset()  # or a second batch would be compiled for any size
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    try:
        take_steps(config, meta, batch, device)
        torch.cuda.synchronize(device)
    except torch.OutOfMemoryError:
        return None
    return torch.cuda.max_memory_reserved(device)


def take_steps(config: TrainConfig, meta: ModelMeta, batch: int, device: torch.device) -> None:
    """Takes STEPS training steps of silent clips, and scores a batch if the run does."""
    network = build_network(config, meta, device, ALONE, start=False)
    train_mode(network.model)
    step = training_step(config, network, device, ALONE)
    # A cache on the device holds features, so that the front end never sees a waveform.
    frontend = None if config.cache == "device" else build_frontend(meta).to(device)
    for features, target in _inputs(meta, frontend, batch, device):
        step(features, target, 0.0)
    if config.eval is not None:
        # A captured step keeps its memory meanwhile.
        _score(config, meta, network.raw_model, frontend, device)


def _inputs(
    meta: ModelMeta, frontend: Frontend | None, batch: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Features and targets of STEPS steps: as in training the next ones are computed beside each,
    which may take gigabytes."""
    if frontend is None:
        features = torch.randn(batch, meta.num_frames, meta.num_mels, device=device)
        target = torch.zeros(batch, len(meta.classes), device=device)
        yield from [(features, target)] * STEPS
        return
    batches = (_batch(meta, batch, device) for _ in range(STEPS))
    for given, features, _ in with_features(batches, frontend, device):
        yield features, given.target


def _batch(meta: ModelMeta, batch: int, device: torch.device) -> Batch:
    rows = round(batch * ROWS_A_CLIP)
    with device:
        return Batch(
            rows=np.arange(batch),
            target=torch.zeros(batch, len(meta.classes)),
            num_samples=torch.full((rows,), meta.clip_samples),
            augment=Augment(
                torch.arange(rows - batch),
                torch.full((rows - batch,), 0.5),
                torch.zeros(batch, 2, dtype=torch.int64),
                torch.zeros(batch, 2, dtype=torch.int64),
            ),
            waveform=torch.zeros(rows, meta.clip_samples, dtype=torch.int16),
        )


@torch.inference_mode()
def _score(
    config: TrainConfig,
    meta: ModelMeta,
    model: nn.Module,
    frontend: Frontend | None,
    device: torch.device,
) -> None:
    """A batch of the evaluation, not compiled, which takes no less."""
    model.eval()
    if frontend is None:
        features = torch.zeros(config.eval_batch, meta.num_frames, meta.num_mels, device=device)
    else:
        shape = (config.eval_batch, meta.clip_samples)
        features = frontend(torch.zeros(shape, dtype=torch.int16, device=device))
    with autocast(device, config.precision):
        model(features)


def answer(asked: dict[str, Any]) -> int | None:
    """The largest batch under the limit."""
    config, device = TrainConfig(**asked["config"]), torch.device(asked["device"])
    with closing(PackedSet.open(config.data)) as packed:
        meta = model_meta(config, packed)
    torch.cuda.set_device(device)
    set_kernels(choose_kernels(config.kernels, device))
    limit = asked["limit"]
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total), device)
    return search(
        lambda batch: measure(config, meta, batch, device),
        limit,
        multiple=asked["multiple"],
        at_most=asked["at_most"],
    )


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


if __name__ == "__main__":
    print(json.dumps(answer(json.load(sys.stdin))))
