"""Measures what the device can do at most: a matrix product in the precision that suits it, and a
copy of its memory.

    python -m bench.ceilings [DIR]

Writes DIR/ceilings.json (where results go, unless said), which percentages refer to.
"""

import json
import sys
from pathlib import Path

import torch

from bench.results import DEVICE, DEVICE_NAME, PRECISION, folder
from fastat.study.profile.device import matmul_flop_per_s, median_seconds

COPY_BYTES = {"cuda": 4 << 30, "cpu": 256 << 20}
"""Size of the copied tensor; on a CPU it exceeds the caches."""


def copy_bytes_per_s(device: torch.device) -> float:
    """Bytes read and written per second by a copy within the device's memory."""
    source = torch.randint(-128, 127, (COPY_BYTES[device.type],), device=device, dtype=torch.int8)
    copy = torch.empty_like(source)
    return 2 * COPY_BYTES[device.type] / median_seconds(lambda: copy.copy_(source), device)


def main(out: Path) -> None:
    flop_per_s, bytes_per_s = matmul_flop_per_s(DEVICE, PRECISION), copy_bytes_per_s(DEVICE)
    found = {
        "device": DEVICE_NAME,
        "precision": PRECISION,
        "flop_per_s": flop_per_s,
        "bytes_per_s": bytes_per_s,
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "ceilings.json").write_text(json.dumps(found))
    print(
        f"{DEVICE_NAME}: {flop_per_s / 1e12:.3g} TFLOP/s in {PRECISION}, "
        f"{bytes_per_s / 1e12:.3g} TB/s copied"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else folder())
