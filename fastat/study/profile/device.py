"""What a device can do at most, the power it draws, and the memory that a step takes of it."""

import ctypes
import gc
import re
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import torch

from fastat.system.device import DTYPES
from fastat.system.environment import memory_is_full
from fastat.system.errors import Failure
from fastat.system.host import free_memory

PRODUCT_SIZE = {"cuda": 8192, "cpu": 2048}
"""Rows and columns of the matrices that are multiplied."""

CPU_SECONDS = 1.0

STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class OutOfMemory(Failure):
    """The step does not fit the device's memory."""


def matmul_flop_per_s(device: torch.device, precision: str) -> float:
    """Median rate of products of two large square matrices, in operations per second."""
    size = PRODUCT_SIZE[device.type]
    # Random, as zeros would be faster: they draw less power.
    a, b = torch.randn(2, size, size, device=device, dtype=DTYPES[precision])
    return 2 * size**3 / median_seconds(lambda: a @ b, device)


def median_seconds(run: Callable[[], object], device: torch.device) -> float:
    """Median duration of many runs: the device's own time on a GPU, the wall clock on a CPU."""
    if device.type == "cuda":
        import triton.testing

        return float(triton.testing.do_bench(run, return_mode="median")) / 1e3
    # Not torch.utils.benchmark, whose import writes a line about CUDA_HOME to standard error.
    run()
    seconds: list[float] = []
    while len(seconds) < 3 or sum(seconds) < CPU_SECONDS:
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return median(seconds)


def gpu_watts(device: torch.device) -> float | None:
    """Power that a GPU's board draws now, as its driver averages it over up to a second.

    None without the package nvidia-ml-py, and where the driver has no reading, as for a part of a
    GPU (MIG).
    """
    if find_spec("pynvml") is None:
        return None
    from pynvml import NVMLError

    try:
        return torch.cuda.power_draw(device) / 1e3
    except NVMLError:
        return None


@contextmanager
def out_of_memory(device: torch.device) -> Iterator[None]:
    """Raises OutOfMemory where the device's memory is full; unused memory is given back before and
    after.

    On a CPU, allocations of more than the free memory fail inside: without that limit the kernel
    would kill this process, or another.
    """
    _give_back(device)
    limits = resource.getrlimit(resource.RLIMIT_DATA)
    if device.type == "cpu":
        most = _status_bytes("VmData") + free_memory()
        unlimited = limits[0] == resource.RLIM_INFINITY
        soft = most if unlimited else min(most, limits[0])
        resource.setrlimit(resource.RLIMIT_DATA, (soft, limits[1]))
    full = None
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, MemoryError) and not memory_is_full(error):
            raise
        full = str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, limits)
        _give_back(device)
    if full is not None:  # raised here, as the first error refers to all tensors of the step
        raise OutOfMemory(full)


def _give_back(device: torch.device) -> None:
    """Frees unused memory."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    else:
        ctypes.CDLL(None).malloc_trim(0)


def _status_bytes(name: str) -> int:
    """A value of /proc/self/status, in bytes."""
    found = re.search(rf"^{name}:\s+(\d+) kB", STATUS.read_text(), re.MULTILINE)
    if found is None:
        raise Failure(f"{STATUS} has no line {name}, by which a step's memory is measured")
    return int(found[1]) * 1024


def restart_peak(device: torch.device) -> None:
    """Resets the peak that ``peak_bytes`` returns."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        CLEAR_REFS.write_text("5")  # "reset the peak resident set size" (man proc)


def peak_bytes(device: torch.device) -> int:
    """Peak memory since ``restart_peak``: of the allocator on a GPU, of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _status_bytes("VmHWM")
