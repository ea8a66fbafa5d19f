"""Times one step: on a GPU the device's own time with a cold L2, on a CPU the wall clock.

On a GPU the step is captured as a CUDA graph, so that launch gaps are nobody's advantage, the L2 is
flushed before every replay, and events around the replay give its time. A graph is captured on one
stream, never the default one; ``on_one_stream`` makes it the whole benchmark's, or gradients would
go back to the stream where a leaf was first used, outside the capture. ``DEVICE_CLOCK`` feeds the
time to pytest-benchmark: a benchmark file says ``pytestmark = DEVICE_CLOCK``.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from time import perf_counter

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench.results import DEVICE, ON_GPU, ceilings, write_row

L2_FLUSH_BYTES = 256 << 20
GPU_ROUNDS = (20, 100)
"""At least and at most; between them as many as fill GPU_SECONDS."""
GPU_SECONDS = 0.3
CPU_ROUNDS = (5, 50)
CPU_SECONDS = 0.3


class DeviceClock:
    """Moves only by the device times added to it, and by a nanosecond when read.

    The nanosecond is for pytest-benchmark, which waits for a clock to move.
    """

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        self.seconds += 1e-9
        return self.seconds


CLOCK = DeviceClock()
DEVICE_CLOCK = pytest.mark.benchmark(timer=CLOCK) if ON_GPU else pytest.mark.benchmark()


def timed(
    benchmark: BenchmarkFixture,
    step: Callable[[], object],
    *,
    op: str,
    impl: str,
    passes: str,
    shape: str,
    area: str = "kernels",
    bytes_moved: float | None = None,
    flop: float | None = None,
    clips: int | None = None,
    graph: bool = True,
    cpu_rounds: int = CPU_ROUNDS[0],
) -> float:
    """The median seconds of ``step``, which must not wait for the device; NaN where disabled.

    ``bytes_moved`` and ``flop`` are what the operation needs at least, whoever computes it;
    ``clips`` is the batch, ``cpu_rounds`` the fewest on a CPU. ``graph=False`` is for steps that a
    CUDA graph cannot hold, or that are one already.
    """
    benchmark.group = f"{area}: {op} {shape} {passes}"
    if benchmark.disabled:  # by --benchmark-disable
        benchmark.pedantic(step)
        return math.nan
    if ON_GPU:
        seconds, peak_bytes = _timed_on_gpu(benchmark, step, graph)
    else:
        started = perf_counter()
        step()
        rounds = int(CPU_SECONDS / (perf_counter() - started))
        benchmark.pedantic(step, rounds=max(cpu_rounds, min(CPU_ROUNDS[1], rounds)))
        seconds, peak_bytes = benchmark.stats.stats.median, None
    more = {"ms_min": benchmark.stats.stats.min * 1e3}
    if clips is not None:
        more["clips_per_s"] = clips / seconds
    if bytes_moved is not None:
        more["gb_per_s"] = bytes_moved / seconds / 1e9
    if flop is not None:
        more["tflop_per_s"] = flop / seconds / 1e12
    if peak_bytes is not None:
        more["peak_mib"] = peak_bytes / 2**20
    if known := ceilings():
        floor = max((bytes_moved or 0) / known["bytes_per_s"], (flop or 0) / known["flop_per_s"])
        more["percent_of_ceiling"] = 100 * floor / seconds
    row = write_row(
        area=area, op=op, impl=impl, shape=shape, passes=passes, ms=seconds * 1e3, **more
    )
    benchmark.extra_info.update(row)
    return seconds


def on_one_stream() -> AbstractContextManager[object]:
    """Everything inside runs on a stream that a CUDA graph can be captured on."""
    return torch.cuda.stream(_stream()) if ON_GPU else nullcontext()


@cache
def _stream() -> "torch.cuda.Stream":
    return torch.cuda.Stream()


def _timed_on_gpu(
    benchmark: BenchmarkFixture, step: Callable[[], object], graph: bool
) -> tuple[float, int]:
    replay, peak_bytes = _captured(step) if graph else (step, _peak_bytes(step))
    flushed = torch.empty(L2_FLUSH_BYTES, dtype=torch.int8, device=DEVICE)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def one_round() -> float:
        flushed.zero_()  # while it runs, the launches below are queued behind it
        start.record()
        replay()
        end.record()
        end.synchronize()
        seconds: float = start.elapsed_time(end) / 1e3
        CLOCK.seconds += seconds
        return seconds

    one_round()
    low, high = GPU_ROUNDS
    rounds = max(low, min(high, int(GPU_SECONDS / one_round())))
    benchmark.pedantic(one_round, rounds=rounds)
    return benchmark.stats.stats.median, peak_bytes


def _captured(step: Callable[[], object]) -> tuple[Callable[[], None], int]:
    for _ in range(2):
        step()
    peak_bytes = _peak_bytes(step)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured, stream=torch.cuda.current_stream()):
        step()
    return captured.replay, peak_bytes


def _peak_bytes(step: Callable[[], object]) -> int:
    """Memory that ``step`` takes beyond what is held before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
