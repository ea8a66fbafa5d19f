"""Where the time of a step goes, by operator: torch's profiler, its trace, and the dearest ten."""

import json
import math
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity

from fastat.data.shards import PackedSet
from fastat.outputs import written
from fastat.profile.measure import WARM_UP, Case, Training, out_of_memory

STEPS = 3
SHOWN = 10

ITEM_BYTES = {
    "float": 4, "c10::BFloat16": 2, "c10::Half": 2, "double": 8, "long": 8, "long int": 8, "int": 4,
    "short": 2, "short int": 2, "signed char": 1, "unsigned char": 1, "bool": 1,
}  # fmt: skip
"""By the trace's name of a dtype."""

BYTES_A_PARAMETER = {"aten::_fused_adam_": 28, "aten::_foreach_norm": 4}
"""Of operators on lists of all parameters, which the trace leaves out where they are long. Adam
reads weights, gradients and both moments, and writes all but the gradients."""


@dataclass(frozen=True)
class Operator:
    """All calls of one operator."""

    name: str
    calls: float
    """A step."""
    ms: float
    """A step: the device's time in its own kernels, or on a CPU its own time, without what it
    calls."""
    share: float
    """Of all operators' time, 0..1."""
    bytes: float
    """A step, estimated: those of its inputs by their shapes, and what it allocates, which is as a
    rule its output. What an operator writes in place is not counted, nor what it finds in a
    cache."""


def trace(case: Case, device: torch.device, packed: PackedSet, out: Path) -> list[Operator]:
    """Writes a trace (Chrome's JSON) of STEPS steps to ``out``; the operators, dearest first.

    The steps are those of ``measure``, one part after the other and not captured in a CUDA graph,
    whose kernels belong to no operator.

    Raises:
        measure.OutOfMemory: the step does not fit.
        Failure: ``out`` cannot be written.
    """
    torch.manual_seed(0)
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with out_of_memory(device):
        training = Training(case, device, packed)
        with closing(training.batches()) as batches:
            for _ in range(WARM_UP[device.type]):
                training.step(next(batches))
            training.clock.wait()
            with torch.profiler.profile(
                activities=activities, record_shapes=True, profile_memory=True
            ) as profiler:
                for _ in range(STEPS):
                    training.step(next(batches))
                training.clock.wait()
    with written(out) as temporary:
        profiler.export_chrome_trace(str(temporary))
        read = input_bytes(json.loads(temporary.read_text())["traceEvents"])
    params = STEPS * sum(p.numel() for p in training.params)
    read |= {name: params * size for name, size in BYTES_A_PARAMETER.items()}
    return operators(profiler.key_averages(), read, on_cpu=device.type == "cpu")


def operators(averages: Any, read: dict[str, float], *, on_cpu: bool) -> list[Operator]:
    """The profiler's rows of operators, dearest first.

    Args:
        averages: of the profiler; its rows of kernels are left out, whose time is also that of the
            operators that launched them.
        read: ``input_bytes``.
    """
    rows = [row for row in averages if row.device_type.name == "CPU"]
    ms = {
        row.key: (row.self_cpu_time_total if on_cpu else row.self_device_time_total) / 1e3
        for row in rows
    }
    total = sum(ms.values())
    found = []
    for row in rows:
        allocated = row.cpu_memory_usage if on_cpu else row.device_memory_usage
        moved = read.get(row.key, 0.0) + max(0, allocated)
        share = ms[row.key] / total if total else 0.0
        found.append(
            Operator(row.key, row.count / STEPS, ms[row.key] / STEPS, share, moved / STEPS)
        )
    return sorted(found, key=lambda operator: -operator.ms)


def input_bytes(events: list[dict[str, Any]]) -> dict[str, float]:
    """Bytes of the tensors that operators were called with, summed by the operator's name.

    Args:
        events: of a trace with shapes.
    """
    found: dict[str, float] = {}
    for event in events:
        args = event.get("args", {})
        if event.get("cat") != "cpu_op" or "Input Dims" not in args:
            continue
        size = sum(
            ITEM_BYTES[kind] * math.prod(dims)
            for dims, kind in zip(args["Input Dims"], args["Input type"], strict=True)
            if kind in ITEM_BYTES
        )
        found[event["name"]] = found.get(event["name"], 0.0) + size
    return found
