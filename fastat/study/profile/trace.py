"""Where the time of a step goes, by operator: torch's profiler, its trace and its table."""

from contextlib import closing
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity

from fastat.config.run import TrainConfig
from fastat.data.shards import PackedSet
from fastat.study.profile.device import out_of_memory
from fastat.study.profile.measure import WARM_UP, Training
from fastat.system.outputs import written

STEPS = 3
SHOWN = 10


def trace(config: TrainConfig, device: torch.device, packed: PackedSet, out: Path) -> str:
    """Writes a trace (Chrome's JSON) of STEPS steps to ``out``.

    The parts of a step run one after the other, and not as a CUDA graph, whose kernels belong to no
    operator.

    Returns:
        torch's table of the SHOWN operators that take longest by themselves.

    Raises:
        OutOfMemory: the step does not fit.
        Failure: ``out`` cannot be written.
    """
    torch.manual_seed(0)
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with out_of_memory(device):
        training = Training(config, device, packed)
        with closing(training.batches()) as batches:
            for _ in range(WARM_UP[device.type]):
                training.step(next(batches))
            training.clock.wait()
            with torch.profiler.profile(activities=activities) as profiler:
                for _ in range(STEPS):
                    training.step(next(batches))
                training.clock.wait()
    with written(out) as temporary:
        profiler.export_chrome_trace(str(temporary))
    order = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    return str(profiler.key_averages().table(sort_by=order, row_limit=SHOWN))
