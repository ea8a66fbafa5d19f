"""Training steps taken to see what they take: ``python -m fastat.memory_trial``, on CUDA.

Reads what ``fastat.memory`` asks as JSON from standard input; the last line of standard output is
the answer: bytes or clips, or null where it does not fit. The allocator is told to give no more
than the limit, so that a batch that fits does so with what lies torn between its tensors.
"""

import gc
import json
import sys
from typing import Any, cast

import torch
from torch import nn

from fastat.distributed import ALONE
from fastat.memory import ROWS_A_CLIP, Workload, search
from fastat.nonfinite import BufferGuard
from fastat.optim import create_adam
from fastat.step import WARM_UP, TrainingStep, why_not_captured
from fastat_kernels.backend import set_kernels
from fastat_kernels.choice import parse_kernels

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
        features = torch.randn(batch, work.num_frames, work.num_mels)
        target = torch.zeros(batch, work.num_classes)
        # What the loader and the front end keep beside the step: the next batch.
        rows = round(batch * ROWS_A_CLIP)
        beside = (
            torch.zeros((2, rows, work.clip_samples), dtype=torch.int16),
            torch.zeros_like(features),
        )
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
        graph=work.cuda_graphs and why is None,
    )
    for _ in range(STEPS):
        step(features, target, 0.0)
    del beside


def answer(asked: dict[str, Any]) -> int | None:
    """Bytes of one batch, or the largest batch under a limit."""
    work, device = Workload(**asked["work"]), torch.device(asked["device"])
    torch.cuda.set_device(device)
    set_kernels(parse_kernels(work.kernels))
    if "batch" in asked:
        return measure(work, asked["batch"], device)
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
