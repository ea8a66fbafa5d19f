"""Takes training steps on a GPU to find the largest batch: ``python -m fastat.memory_trial``.

Reads a request of ``fastat.memory`` as JSON from standard input; the last line of standard output
is the number of clips, or null where not even the smallest batch fits. The allocator is limited to
the memory that training may take, so that a batch that fits does so with the fragmentation that it
causes.
"""

import gc
import json
import sys
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from fastat.data.loader import Batch, with_features
from fastat.distributed import ALONE
from fastat.features import FEATURES
from fastat.frontend import Augment, Frontend
from fastat.memory import Workload, search
from fastat.nonfinite import BufferGuard
from fastat.optim import create_adam
from fastat.step import WARM_UP, TrainingStep, why_not_captured
from fastat.system.device import autocast, choose_kernels
from fastat_kernels.backend import set_kernels

ROWS_A_CLIP = 1.5
"""Rows of a batch for each of its clips: the clip, and mixup partners of some."""

STEPS = WARM_UP + 2
"""Those before the capture, the one that is captured, and a replay."""


def measure(work: Workload, batch: int, device: torch.device) -> int | None:
    """Peak bytes that the allocator holds over some steps at ``batch``; None: it does not fit."""
    torch._dynamo.reset()  # or a second batch would be compiled for any size
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    try:
        _steps(work, batch, device)
        torch.cuda.synchronize(device)
    except torch.OutOfMemoryError:
        return None
    return torch.cuda.max_memory_reserved(device)


def _steps(work: Workload, batch: int, device: torch.device) -> None:
    with device:
        model = work.create()
    params = list(model.parameters())
    optimizer, _ = create_adam(
        [{"params": params, "lr_scale": 1.0}],
        lr=0.0,
        betas=(0.9, 0.999),
        weight_decay=0.0,
        device=device,
    )
    stepped = cast(nn.Module, torch.compile(model)) if work.compile else model
    why = why_not_captured(device, ALONE, checkpointing=model.checkpointing)
    step = TrainingStep(
        stepped,
        params,
        optimizer,
        precision=work.precision,
        device=device,
        guard=BufferGuard(model),
        accumulate=work.accumulate,
        graph=work.cuda_graphs and why is None,
    )
    frontend = _frontend(work, device)
    for features, target in _inputs(work, frontend, batch, device):
        step(features, target, 0.0)
    if work.eval_batch:
        _score(work, model, frontend, device)


def _frontend(work: Workload, device: torch.device) -> Frontend | None:
    """Of the feature that has these mel bins; None: the step has features to start from."""
    if not work.clip_samples:
        return None
    feature = next(name for name, f in FEATURES.items() if f.num_mels == work.num_mels)
    return Frontend(feature, clip_samples=work.clip_samples).to(device)


def _inputs(
    work: Workload, frontend: Frontend | None, batch: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Features and targets of STEPS steps: as in training the next ones are computed beside each,
    which may take gigabytes."""
    if frontend is None:
        features = torch.randn(batch, work.num_frames, work.num_mels, device=device)
        target = torch.zeros(batch, work.num_classes, device=device)
        yield from [(features, target)] * STEPS
        return
    batches = (_batch(work, batch, device) for _ in range(STEPS))
    for given, features, _ in with_features(batches, frontend, device):
        yield features, given.target


def _batch(work: Workload, batch: int, device: torch.device) -> Batch:
    rows = round(batch * ROWS_A_CLIP)
    with device:
        return Batch(
            rows=np.arange(batch),
            target=torch.zeros(batch, work.num_classes),
            num_samples=torch.full((rows,), work.clip_samples),
            augment=Augment(
                torch.arange(rows - batch),
                torch.full((rows - batch,), 0.5),
                torch.zeros(batch, 2, dtype=torch.int64),
                torch.zeros(batch, 2, dtype=torch.int64),
            ),
            waveform=torch.zeros(rows, work.clip_samples, dtype=torch.int16),
        )


@torch.inference_mode()
def _score(
    work: Workload, model: nn.Module, frontend: Frontend | None, device: torch.device
) -> None:
    """A batch of the evaluation, not compiled, which takes no less."""
    model.eval()
    if frontend is None:
        features = torch.zeros(work.eval_batch, work.num_frames, work.num_mels, device=device)
    else:
        shape = (work.eval_batch, work.clip_samples)
        features = frontend(torch.zeros(shape, dtype=torch.int16, device=device))
    with autocast(device, work.precision):
        model(features)


def answer(asked: dict[str, Any]) -> int | None:
    """The largest batch under the limit."""
    work, device = Workload(**asked["work"]), torch.device(asked["device"])
    torch.cuda.set_device(device)
    set_kernels(choose_kernels(work.kernels, device))
    limit = asked["limit"]
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total), device)
    return search(
        lambda batch: measure(work, batch, device),
        limit,
        multiple=asked["multiple"],
        at_most=asked["at_most"],
    )


if __name__ == "__main__":
    print(json.dumps(answer(json.load(sys.stdin))))
