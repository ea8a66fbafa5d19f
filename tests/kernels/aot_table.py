"""The table of kernels/README.md: what every kernel takes of each chip, at most.

    python -m tests.kernels.aot_table ROWS.json...

ROWS.json are written by ``tests.kernels.aot --json``, one for each architecture.
"""

import json
import sys
from pathlib import Path

from tests.kernels.aot import Compiled


def table(rows: list[Compiled]) -> str:
    """Markdown: kernel, launches compiled, and registers / KiB of shared memory by architecture."""
    archs = sorted({row.arch for row in rows})
    lines = [
        "| operator | kernel | compiled | " + " | ".join(f"sm_{arch}" for arch in archs) + " |",
        "|" + "---|" * (3 + len(archs)),
    ]
    for op, kernel in sorted({(row.operator, row.kernel) for row in rows}):
        mine = [row for row in rows if row.kernel == kernel]
        cells = []
        for arch in archs:
            here = [row for row in mine if row.arch == arch]
            if not here:
                cells.append("-")
                continue
            registers = max(row.registers for row in here)
            shared = max(row.shared for row in here)
            spilled = sum(row.stack + row.local for row in here)
            cells.append(f"{registers} / {shared / 1024:.1f}" + (" spills" if spilled else ""))
        lines.append(f"| `{op}` | `{kernel}` | {len(mine)} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    files = [Path(name) for name in sys.argv[1:]]
    print(table([Compiled(**row) for file in files for row in json.loads(file.read_text())]))
