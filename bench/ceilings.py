"""Measures what the device can do at most: a bf16 matrix product and a copy of its memory.

    python -m bench.ceilings [DIR]

Writes DIR/ceilings.json (where results go, unless said), which percentages refer to.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
import triton

from bench.results import DEVICE, DEVICE_NAME, ON_GPU, folder

SIZE = 8192 if ON_GPU else 2048
COPY_BYTES = (4 if ON_GPU else 1) << 30
CPU_ROUNDS = 7


def main(out: Path) -> None:
    a, b = torch.randn(2, SIZE, SIZE, device=DEVICE, dtype=torch.bfloat16)  # zeros would be faster
    product_s = seconds(lambda: a @ b)
    source = torch.randint(-128, 127, (COPY_BYTES,), device=DEVICE, dtype=torch.int8)
    copy = torch.empty_like(source)
    copy_s = seconds(lambda: copy.copy_(source))
    flop_per_s = 2 * SIZE**3 / product_s
    bytes_per_s = 2 * COPY_BYTES / copy_s  # read and written
    found = {"device": DEVICE_NAME, "flop_per_s": flop_per_s, "bytes_per_s": bytes_per_s}
    out.mkdir(parents=True, exist_ok=True)
    (out / "ceilings.json").write_text(json.dumps(found))
    print(
        f"{DEVICE_NAME}: {flop_per_s / 1e12:.3g} TFLOP/s in bf16, "
        f"{bytes_per_s / 1e12:.3g} TB/s copied"
    )


def seconds(step: Callable[[], object]) -> float:
    """The median time of ``step``."""
    if ON_GPU:
        return float(triton.testing.do_bench(step, return_mode="median")) / 1e3
    times = []
    for _ in range(CPU_ROUNDS + 1):
        started = perf_counter()
        step()
        times.append(perf_counter() - started)
    return median(times[1:])


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else folder())
