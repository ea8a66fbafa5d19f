"""What a device can do at most, and what it draws: matrix products, copies, watts."""

import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import Self

import torch

from fastat.system.device import DTYPES

PRODUCT_SIZE = {"cuda": 8192, "cpu": 2048}
"""Rows and columns of the matrices that are multiplied."""

COPY_BYTES = {"cuda": 4 << 30, "cpu": 256 << 20}
"""On a CPU more than the caches hold."""

CPU_SECONDS = 1.0
POWER_CAP = Path("/sys/class/powercap")
SAMPLE_SECONDS = 0.2
SETTLED_SECONDS = 1.0
"""A driver's reading is a mean over the last second, on some GPUs."""


def matmul_flop_per_s(device: torch.device, precision: str) -> float:
    """A product of two large square matrices in ``precision``, the median of many."""
    size = PRODUCT_SIZE[device.type]
    # Random, as zeros would be faster: they draw less power.
    a, b = torch.randn(2, size, size, device=device, dtype=DTYPES[precision])
    return 2 * size**3 / median_seconds(lambda: a @ b, device)


def copy_bytes_per_s(device: torch.device) -> float:
    """Bytes read and written in a second by a copy within the device's memory."""
    source = torch.randint(-128, 127, (COPY_BYTES[device.type],), device=device, dtype=torch.int8)
    copy = torch.empty_like(source)
    return 2 * COPY_BYTES[device.type] / median_seconds(lambda: copy.copy_(source), device)


def median_seconds(run: Callable[[], object], device: torch.device) -> float:
    """Of many runs: the device's own time on a GPU, on a CPU the wall clock."""
    if device.type == "cuda":
        import triton.testing

        return float(triton.testing.do_bench(run, return_mode="median")) / 1e3
    run()
    seconds: list[float] = []
    while len(seconds) < 3 or sum(seconds) < CPU_SECONDS:
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return median(seconds)


class PowerMeter:
    """Mean watts of the device inside a ``with``: ``watts``, None where nothing tells them.

    A GPU's board, as nvidia-smi reads it off the driver, sampled by a thread after the first second
    (all samples where there is none later); a CPU's packages by Intel's RAPL counters, which AMD's
    have too, where they may be read.
    """

    def __init__(self, device: torch.device, power_cap: Path = POWER_CAP) -> None:
        self.device = device
        self.power_cap = power_cap
        self.watts: float | None = None
        self._samples: list[tuple[float, float]] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="fastat-power", daemon=True)

    def __enter__(self) -> Self:
        self._started = time.monotonic()
        if self.device.type == "cuda":
            self._thread.start()
        else:
            self._counters = energy_counters(self.power_cap)
            self._before = [int(c.read_text()) for c in self._counters]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        if self.device.type == "cuda":
            self._over.set()
            self._thread.join()
            late = [w for seconds, w in self._samples if seconds > SETTLED_SECONDS]
            watts = late or [w for _, w in self._samples]
            self.watts = sum(watts) / len(watts) if watts else None
        elif self._counters:
            seconds = time.monotonic() - self._started
            joules = 0.0
            for counter, before in zip(self._counters, self._before, strict=True):
                taken = int(counter.read_text()) - before
                if taken < 0:  # it began anew
                    taken += int((counter.parent / "max_energy_range_uj").read_text())
                joules += taken / 1e6
            self.watts = joules / seconds

    def _sample(self) -> None:
        command = nvidia_smi(self.device)
        while command and not self._over.wait(SAMPLE_SECONDS):
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=10)
            except subprocess.TimeoutExpired:
                return  # a driver that does not answer: no reading, or those so far
            watts = parse_watts(done.stdout) if done.returncode == 0 else None
            if watts is None:
                return
            self._samples.append((time.monotonic() - self._started, watts))


def nvidia_smi(device: torch.device) -> list[str] | None:
    """The command that prints a GPU's watts; None where there is no nvidia-smi."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    # CUDA_VISIBLE_DEVICES numbers GPUs anew; the UUID is the same everywhere.
    uuid = torch.cuda.get_device_properties(device).uuid
    what = ("--query-gpu=power.draw", "--format=csv,noheader,nounits")
    return [program, "-i", f"GPU-{uuid}", *what]


def parse_watts(text: str) -> float | None:
    """What nvidia-smi printed; None where the driver tells none ("[N/A]")."""
    return float(text) if re.fullmatch(r"\s*\d+(\.\d+)?\s*", text) else None


def energy_counters(power_cap: Path) -> list[Path]:
    """RAPL's counters of whole packages, in microjoules, if this process may read all of them."""
    zones = [z for z in power_cap.glob("intel-rapl:*") if z.name.count(":") == 1]
    counters = [zone / "energy_uj" for zone in sorted(zones)]
    return counters if all(readable(c) for c in counters) else []


def readable(path: Path) -> bool:
    """RAPL's counters are root's alone on most machines."""
    try:
        path.read_text()
    except OSError:
        return False
    return True
