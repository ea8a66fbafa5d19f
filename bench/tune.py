"""Times every launch of the kernels, and every other configuration, on real tensors on the GPU.

    python -m bench.tune [OPERATOR...]

The launches are those that tests/kernels lists for ahead-of-time compilation; their labels say
"problem @ configuration", and the first configuration of a problem is the one that launchers take.
Prints each problem's times, the quickest marked; with FASTAT_BENCH_OUT set, appends them to
tune.jsonl in that folder.
"""

import importlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import triton
from torch.overrides import TorchFunctionMode

from bench.timing import ON_GPU, commit
from fastat_kernels.choice import OPERATORS

TIMED_MS = 60
"""For each launch, after a third of it to warm up."""


class OnGpu(TorchFunctionMode):
    """Tensors that would be made on "meta" are made on the GPU, of normal numbers."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device")) != "meta":
            return func(*args, **kwargs)
        out = func(*args, **(kwargs | {"device": "cuda"}))
        return out.normal_() if out.is_floating_point() else out.zero_()


def times(op: str) -> dict[str, dict[str, float]]:
    """problem -> configuration -> milliseconds, the configuration that launchers take first."""
    tests = importlib.import_module(f"tests.kernels.test_{op}")
    found: dict[str, dict[str, float]] = {}
    with OnGpu():
        for listed in (tests.launches, tests.candidates):
            for label, launch in listed():
                problem, _, config = label.partition(" @ ")
                ms = triton.testing.do_bench(
                    launch, warmup=TIMED_MS // 3, rep=TIMED_MS, return_mode="median"
                )
                found.setdefault(problem, {})[config or "chosen"] = ms
    return found


def main(operators: list[str]) -> None:
    if not ON_GPU:
        raise SystemExit("bench.tune: needs a CUDA device")
    for op in operators:
        for problem, configs in times(op).items():
            best = min(configs, key=configs.__getitem__)
            print(f"{op} {problem}")
            for config, ms in configs.items():
                print(f"    {ms:9.4f} ms  {config}{'  <- quickest' if config == best else ''}")
            if folder := os.environ.get("FASTAT_BENCH_OUT"):
                row = {"op": op, "problem": problem, "ms": configs, "commit": commit()}
                with (Path(folder) / "tune.jsonl").open("a") as file:
                    file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:] or list(OPERATORS))
