"""Measures what the GPU can do at most: a bf16 matrix product and a copy of device memory.

    python -m bench.ceilings DIR

Writes DIR/ceilings.json, which ``timed`` divides by.
"""

import json
import sys
from pathlib import Path

import torch
import triton

from bench.timing import ON_GPU

SIZE = 8192
COPY_BYTES = 4 << 30


def main(folder: Path) -> None:
    if not ON_GPU:
        raise SystemExit("bench.ceilings: needs a CUDA device")
    a, b = torch.randn(2, SIZE, SIZE, device="cuda", dtype=torch.bfloat16)  # zeros would be faster
    product_ms = triton.testing.do_bench(lambda: a @ b, return_mode="median")
    source = torch.randint(-128, 127, (COPY_BYTES,), device="cuda", dtype=torch.int8)
    copy = torch.empty_like(source)
    copy_ms = triton.testing.do_bench(lambda: copy.copy_(source), return_mode="median")
    found = {
        "flop_per_s": 2 * SIZE**3 / product_ms * 1e3,
        "bytes_per_s": 2 * COPY_BYTES / copy_ms * 1e3,  # read and written
    }
    (folder / "ceilings.json").write_text(json.dumps(found))
    print(
        f"{torch.cuda.get_device_name()}: {found['flop_per_s'] / 1e12:.0f} TFLOP/s in bf16, "
        f"{found['bytes_per_s'] / 1e12:.2f} TB/s copied"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
