"""Results of benchmarks: one JSON object a line, appended to results.jsonl as they come.

They go to the folder that FASTAT_BENCH_OUT names, bench/results otherwise, where git ignores them.
``bench.compare`` reads them, and keeps them by device.
"""

import json
import os
import subprocess
from functools import cache
from pathlib import Path
from time import strftime
from typing import Any, TypeVar

import torch

from fastat.system.device import DTYPES, auto_precision, default_device, device_name

DEVICE = default_device()
ON_GPU = DEVICE.type == "cuda"
DEVICE_NAME = device_name(DEVICE)
PRECISION = auto_precision(DEVICE).precision
"""Precision that benchmarks run in, unless one states its own: the one that suits the device."""
DTYPE = DTYPES[PRECISION]

FULL = os.environ.get("FASTAT_BENCH_FULL") == "1"
"""FASTAT_BENCH_FULL=1: the sizes of README's figures on a CPU, and the slow peers on a GPU. Without
it all of bench/ takes less than ten minutes on two cores."""

RUN = os.environ.get("FASTAT_BENCH_RUN") or strftime("%Y-%m-%d %H:%M:%S")
"""What a result belongs to: the session that it was measured in. Several processes are one run when
they are given one name."""

Row = dict[str, Any]
T = TypeVar("T")


def sized(full: T, small: T) -> T:
    """A size: the full one on a GPU, or when it is asked for."""
    return full if FULL or ON_GPU else small


def folder() -> Path:
    """Where results go."""
    return Path(os.environ.get("FASTAT_BENCH_OUT") or Path(__file__).parent / "results")


def write_row(
    *, area: str, op: str, impl: str, shape: str, passes: str, ms: float, **more: object
) -> Row:
    """Appends a result, and returns it.

    Args:
        area: kernels, data, models or steps.
        op, shape, passes: the case. What the milliseconds are of is in ``passes``: forward, a
            training step, a row.
        impl: whose it is: "ours", or a peer's name.
        more: other figures of the same measurement.
    """
    row: Row = {
        "run": RUN, "device": DEVICE_NAME, "precision": PRECISION, "commit": commit(),
        "torch": torch.__version__,
        "area": area, "op": op, "impl": impl, "shape": shape, "passes": passes, "ms": ms,
    } | more  # fmt: skip
    folder().mkdir(parents=True, exist_ok=True)
    with (folder() / "results.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    return row


def ceilings(results: Path | None = None, device: str = DEVICE_NAME) -> dict[str, Any]:
    """What ``bench.ceilings`` measured of a device: bytes_per_s of a copy, flop_per_s of a matrix
    product in PRECISION; empty where it did not run."""
    file = (results or folder()) / "ceilings.json"
    found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    return found if found.get("device") == device else {}


@cache
def commit() -> str:
    """The short name of the checked-out commit; what gpu.sh was told where there is no git."""
    if told := os.environ.get("FASTAT_BENCH_COMMIT"):
        return told
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError:  # no git here
        return "unknown"
    return done.stdout.strip() or "unknown"
