"""Times every launch of the kernels, and every other configuration, on real tensors on the GPU.

    python -m bench.tune [OPERATOR...]

The launches are those that tests/kernels lists for ahead-of-time compilation; their labels say
"problem @ configuration", and the first configuration of a problem is the one that launchers take.
Problems in float32 and float16 are left out: GPUs that Triton supports train in bfloat16. Every
time is appended to tune.jsonl in the folder of the results as it is taken; an operator's problems
are printed last, the quickest configuration marked.
"""

import importlib
import json
import math
import re
import sys
from collections.abc import Callable
from typing import Any

import triton
from torch.overrides import TorchFunctionMode
from triton.runtime.errors import OutOfResources

from bench.results import ON_GPU, commit, folder
from fastat_kernels.choice import OPERATORS

OTHER_DTYPE = re.compile(r"\bfloat(32|16)\b")
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
    """problem -> configuration -> milliseconds, the configuration that launchers take first.

    NaN where a configuration does not run on this GPU.
    """
    tests = importlib.import_module(f"tests.kernels.test_{op}")
    found: dict[str, dict[str, float]] = {}
    with OnGpu():
        for listed in (tests.launches, tests.candidates):
            for label, launch in listed():
                if OTHER_DTYPE.search(label):
                    continue
                problem, _, config = label.partition(" @ ")
                try:
                    ms = triton.testing.do_bench(
                        launch, warmup=TIMED_MS // 3, rep=TIMED_MS, return_mode="median"
                    )
                except OutOfResources as error:
                    print(f"{op} {label}: {error}")
                    ms = math.nan
                found.setdefault(problem, {})[config or "chosen"] = ms
                write({"op": op, "problem": problem, "config": config or "chosen", "ms": ms})
    return found


def write(row: dict[str, Any]) -> None:
    folder().mkdir(parents=True, exist_ok=True)
    with (folder() / "tune.jsonl").open("a") as file:
        file.write(json.dumps(row | {"commit": commit()}) + "\n")


def main(operators: list[str]) -> None:
    if not ON_GPU:
        raise SystemExit("bench.tune: needs a CUDA device")
    for op in operators:
        for problem, configs in times(op).items():
            best = min(configs, key=lambda config: (math.isnan(configs[config]), configs[config]))
            print(f"{op} {problem}")
            for config, ms in configs.items():
                print(f"    {ms:9.4f} ms  {config}{'  <- quickest' if config == best else ''}")


if __name__ == "__main__":
    main(sys.argv[1:] or list(OPERATORS))
