"""What a training step takes, estimated on the CPU, and the search for the largest batch."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastat import memory, memory_trial
from fastat.errors import Failure
from fastat.memory import (
    LIBRARIES_BYTES,
    Workload,
    estimated_bytes,
    largest_batch,
    search,
    step_bytes,
)
from fastat.models.cnn_trans import CnnTransformer

CPU = torch.device("cpu")
MIB = 1 << 20


def work(model: str = "cnn_trans", **more: object) -> Workload:
    given = {"model": model, "num_mels": 64, "num_frames": 400, "num_classes": 527}
    given |= {"precision": "bf16"} | more
    return Workload(**given)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------ the search
@pytest.mark.parametrize("limit", [100, 101, 999, 5_000, 123_456])
@pytest.mark.parametrize("multiple", [1, 3, 8])
def test_the_search_finds_the_largest_within_two_percent(limit: int, multiple: int) -> None:
    """Of peaks that are the fuller of two moments, as a step's are."""

    def peak(batch: int) -> int:
        return max(90 + batch, 20 + 3 * batch)

    def measure(batch: int) -> int | None:
        return peak(batch) if peak(batch) <= limit else None

    found = search(measure, limit, multiple=multiple)
    best = max((b for b in range(multiple, 50_000, multiple) if peak(b) <= limit), default=None)
    if best is None:
        assert found is None
    else:
        assert found is not None and peak(found) <= limit and found % multiple == 0
        assert best - found <= max(multiple, 0.02 * best)


def test_the_search_takes_few_trials_and_never_more_than_it_may() -> None:
    tried: list[int] = []

    def measure(batch: int) -> int | None:
        tried.append(batch)
        return 1000 + 10 * batch if 1000 + 10 * batch <= 100_000 else None

    assert search(measure, 100_000, at_most=500, multiple=8) == 496
    assert max(tried) <= 500
    tried.clear()
    found = search(measure, 100_000)
    assert found is not None and 9700 < found <= 9900
    assert len(tried) <= 8
    assert search(measure, 100_000, multiple=16_384) is None
    assert search(measure, 100_000, at_most=3, multiple=8) is None


def test_out_of_memory_below_the_line_is_stepped_down_from() -> None:
    """Torn memory: what the line promises does not fit."""

    def measure(batch: int) -> int | None:
        return 10 * batch if batch <= 700 else None

    found = search(measure, 10_000)
    assert found is not None and 686 <= found <= 700


# ------------------------------------------------------------------------------ the estimate
def test_the_estimate_is_what_a_step_must_keep() -> None:
    """Weights, gradients and moments of float32; twice the clips, twice the activations."""
    small = work("transformer", options={"num_layers": 1, "width": 64, "num_heads": 4})
    one, two, four = (estimated_bytes(small, 64 * b) for b in (1, 2, 4))
    assert (four - two) == pytest.approx(2 * (two - one), rel=0.05)
    wide = work("transformer", options={"num_layers": 2})
    with torch.device("meta"):
        params = sum(p.numel() for p in wide.create().parameters())
    assert estimated_bytes(wide, 1) - LIBRARIES_BYTES > 16 * params
    # What does not grow with the batch, where activations are the most: weights, in float32 and in
    # bf16, moments, and the gradients of the step before.
    two, four = (estimated_bytes(wide, b) - LIBRARIES_BYTES for b in (32, 64))
    assert 17 * params < 2 * two - four < 20 * params


def test_checkpointing_precision_and_waveforms_count() -> None:
    plain = estimated_bytes(work(), 16)
    kept_less = estimated_bytes(work(activation_checkpointing=True), 16)
    assert kept_less == estimated_bytes(work(options={"activation_checkpointing": True}), 16)
    assert kept_less < 0.8 * plain
    assert estimated_bytes(work(precision="fp32"), 16) > 1.2 * plain
    assert estimated_bytes(work(clip_samples=160_000), 16) > plain + 16 * 160_000 * 6
    assert estimated_bytes(work(accumulate=4), 16) < estimated_bytes(work(), 8)


def test_modules_that_are_called_twice_are_counted() -> None:
    shared = estimated_bytes(work(options={"shared": True, "num_layers": 3}), 16)
    assert shared > estimated_bytes(work(options={"shared": True, "num_layers": 1}), 16)


def test_the_largest_batch_fits_and_one_more_percent_does_not() -> None:
    limit = 4 << 30
    batch = largest_batch(work(), CPU, limit)
    assert batch is not None
    assert step_bytes(work(), batch, CPU) <= limit < step_bytes(work(), batch * 103 // 100, CPU)
    assert largest_batch(work(), CPU, 64 * MIB) is None


MEASURE = """
import re, sys, torch
from pathlib import Path
from fastat.system.device import autocast
from fastat.errors import Failure
from fastat.memory import Workload
from fastat.optim import create_adam, train_step
work, batch, cpu = Workload(**eval(sys.argv[1])), int(sys.argv[2]), torch.device("cpu")
# ru_maxrss would begin with what the process that started this one had at most.
status = Path("/proc/self/status")
peak = lambda: 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", status.read_text())[1])
with torch.device("meta"):
    work.create()  # imports what it needs
before = peak()
model = work.create()
params = list(model.parameters())
optimizer, _ = create_adam(params, lr=1e-3, betas=(0.9, 0.999), weight_decay=0.0, device=cpu)
features = torch.randn(batch, work.num_frames, work.num_mels)
for _ in range(2):
    target = torch.zeros(batch, work.num_classes)
    train_step(model, params, optimizer, features, target, autocast(cpu, work.precision))
print(peak() - before)
"""


@pytest.mark.parametrize(
    ("model", "batch"),
    [
        ("cnn_trans", 16),
        *(
            pytest.param(model, batch, marks=pytest.mark.full)
            # Of fewer clips these have activations below 32 MiB, which tear the heap.
            for model, batch in (
                ("crnn", 16),
                ("resnet50", 16),
                ("conformer", 32),
                ("transformer", 32),
            )
        ),
    ],
)
def test_the_estimate_is_near_a_real_peak(model: str, batch: int) -> None:
    """What the process's resident set grows by in real steps."""
    given: dict[str, Any] = {"model": model, "num_mels": 64, "num_frames": 400, "num_classes": 527}
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, repr(given), str(batch)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    assert done.returncode == 0, done.stderr
    real = int(done.stdout)
    assert 0.75 * real < estimated_bytes(Workload(**given), batch) < 1.35 * real


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: the trial works")
def test_a_trial_that_fails_is_one_line() -> None:
    """The process of its own has no GPU either: what it says last."""
    with pytest.raises(
        Failure, match="^the trial of the memory that a step takes failed: .*NVIDIA"
    ):
        step_bytes(work(), 4, torch.device("cuda:0"))


def test_a_trial_is_told_which_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the caller means the current one: a limit of memory needs its number."""
    asked: list[str] = []

    def answered(*args: Any, input: str, **more: Any) -> SimpleNamespace:
        asked.append(json.loads(input)["device"])
        return SimpleNamespace(returncode=0, stdout="7\n", stderr="")

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(memory, "subprocess", SimpleNamespace(run=answered))
    for name in ("cuda", "cuda:1"):
        assert largest_batch(work(), torch.device(name), 1 << 30) == 7
    assert asked == ["cuda:3", "cuda:1"]


@pytest.mark.parametrize("clip_samples", [0, 16_000])
def test_a_trial_trains_and_scores(clip_samples: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, what it does on CUDA: the front end, steps in parts, a batch to score."""
    seen: list[tuple[bool, int]] = []
    forward = CnnTransformer.forward

    def look(self: CnnTransformer, x: torch.Tensor) -> torch.Tensor:
        seen.append((self.training, len(x)))
        return forward(self, x)

    monkeypatch.setattr(CnnTransformer, "forward", look)
    options = {"embedding": 32, "num_heads": 2}
    asked = work(
        num_frames=40, options=options, clip_samples=clip_samples, accumulate=2, eval_batch=3
    )
    memory_trial._steps(asked, 6, CPU)
    assert seen == [(True, 3)] * 2 * memory_trial.STEPS + [(False, 3)]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compiled", [False, True])
def test_the_largest_batch_on_a_gpu_fits(compiled: bool) -> None:
    """Found under a small limit; four times as many clips take more than it. Without the limit the
    allocator keeps some memory that it gave back under it."""
    device, limit = torch.device("cuda"), 4 << 30
    small = work(compile=compiled)
    batch = largest_batch(small, device, limit, multiple=8)
    assert batch is not None and batch >= 8
    assert step_bytes(small, batch, device) <= 1.1 * limit < step_bytes(small, 4 * batch, device)
