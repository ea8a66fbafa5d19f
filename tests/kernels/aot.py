"""Compiles every launch of every kernel for a chip that need not be there.

    python -m tests.kernels.aot [--candidates] [--json OUT] ARCH OPERATOR...

The launchers themselves run, on meta tensors and with a driver that only names a target, so what is
compiled is what a GPU would be asked to run. Prints registers, stack, local and shared memory of
each. Needs a process of its own: TRITON_INTERPRET must not have been set when Triton was imported.
"""

import argparse
import importlib
import json
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from fastat_kernels import backend
from fastat_kernels.choice import OPERATORS

SHARED_LIMIT = {80: 99 << 10, 90: 227 << 10, 100: 227 << 10}
"""Bytes of shared memory a block may take. For sm_80 it is the limit of sm_86 and sm_89, which run
its code; an A100 has 163 KiB."""


class Compiled(NamedTuple):
    operator: str
    launch: str
    kernel: str
    arch: int
    num_warps: int
    registers: int
    stack: int
    local: int
    shared: int
    seconds: float


class NamedDriver:
    """A driver that knows its target and has no device."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # kernels are cached by device

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_launches(op: str, arch: int, candidates: bool) -> Iterator[Compiled]:
    """Runs the launches that the operator's test file lists; one row for each kernel compiled.

    Takes Triton over for the rest of the process.
    """
    tests = importlib.import_module(f"tests.kernels.test_{op}")
    compiled: list[tuple[Any, float]] = []

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        start = time.perf_counter()
        kernel = launch_kernel(self, *args, grid=grid, warmup=True, **options)
        compiled.append((kernel, time.perf_counter() - start))
        return kernel

    driver.set_active(NamedDriver(arch))
    JITFunction.run = compile_only
    seen = set()
    with backend.assume_target(arch):
        for label, launch in (tests.candidates if candidates else tests.launches)():
            compiled.clear()
            launch()
            assert compiled, f"{op}: {label} launches nothing"
            for kernel, seconds in compiled:
                if kernel.hash in seen:
                    continue
                seen.add(kernel.hash)
                usage = resource_usage(kernel.asm["cubin"])
                yield Compiled(
                    operator=op,
                    launch=label,
                    kernel=kernel.name,
                    arch=arch,
                    num_warps=kernel.metadata.num_warps,
                    registers=usage["REG"],
                    stack=usage["STACK"],
                    local=usage["LOCAL"],
                    shared=kernel.metadata.shared,
                    seconds=round(seconds, 2),
                )


launch_kernel = JITFunction.run


def resource_usage(cubin: bytes) -> dict[str, int]:
    """REG, STACK and LOCAL of the one kernel in ``cubin``."""
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(cuobjdump), "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    (line,) = (line for line in text.splitlines() if "REG:" in line)
    fields = (field.split(":") for field in line.split())
    return {name: int(value) for name, value in fields if name in ("REG", "STACK", "LOCAL")}


def complaint(row: Compiled) -> str:
    """What is wrong with a compiled kernel, or nothing."""
    limit = SHARED_LIMIT[row.arch]
    if row.stack or row.local:
        return f"spills: {row.stack} bytes of stack, {row.local} of local memory"
    return f"shared memory {row.shared}, limit {limit}" if row.shared > limit else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("arch", type=int, choices=sorted(SHARED_LIMIT))
    parser.add_argument("operators", nargs="*", default=OPERATORS)
    parser.add_argument("--candidates", action="store_true", help="those that are only timed")
    parser.add_argument("--json", type=Path, help="write the rows here too")
    args = parser.parse_args()
    rows = []
    print("kernel                                launch                warps  regs  stack  shared")
    for op in args.operators:
        for row in compile_launches(op, args.arch, args.candidates):
            rows.append(row)
            print(
                f"{row.kernel:37} {row.launch:22} {row.num_warps:4} {row.registers:5} "
                f"{row.stack:6} {row.shared:7}  {complaint(row)}",
                flush=True,
            )
    if args.json:
        args.json.write_text(json.dumps([row._asdict() for row in rows]))


if __name__ == "__main__":
    main()
