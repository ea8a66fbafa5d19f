"""One training step of each model, features in memory, at the paper's batch for one device.

On a GPU: compiled with our Triton kernels ("kernels"), compiled without any ("library"), and eager
without any ("eager"), all in the precision that suits it and captured in a CUDA graph, as the
trainer does; A4 and A2. On a CPU: "ours", what the trainer runs there, beside the same model as a
first script would train it: float32, contiguous, eager, Adam as it comes. ``bench_targets.py``
times whole steps, from packed rows on.
"""

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench.results import DEVICE, ON_GPU, sized
from bench.steps import (
    check_loss,
    created,
    gflop_of,
    plain_step,
    size_of,
    trainer_step,
)
from bench.timing import DEVICE_CLOCK, timed
from fastat.config.paper import NUM_CLASSES
from fastat.config.procedures import A2, A4, Procedure
from fastat.models import list_models
from fastat.models.costs import PASSES
from fastat_kernels.backend import kernels
from fastat_kernels.choice import OPERATORS

pytestmark = DEVICE_CLOCK

IMPLS = ("kernels", "library", "eager") if ON_GPU else ("ours", "float32")
# The paper's global batch over its number of GPUs: 448 on two, 400 on four.
STEPS = [(A4, 224), (A2, 100)] if ON_GPU else [(A4, sized(4, 2))]
WARM_UP = 6 if ON_GPU else 1
"""Until the step is captured, and after."""
MODELS = [name for name in list_models() if name != "resnet34"]
"""The paper's six."""


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("proc, batch", STEPS, ids=[proc.name for proc, _ in STEPS])
def test_model_step(
    benchmark: BenchmarkFixture, proc: Procedure, batch: int, name: str, impl: str
) -> None:
    torch.manual_seed(0)
    model = created(name, proc).to(DEVICE).train()
    features = torch.randn(batch, *size_of(proc), device=DEVICE)
    target = (torch.rand(batch, NUM_CLASSES, device=DEVICE) < 0.01).float()
    step = plain_step(model, "fp32") if impl == "float32" else trainer_step(model)
    gflop = gflop_of(lambda: created(name, proc), proc)
    with kernels(OPERATORS if impl == "kernels" else ()):
        if impl != "float32":
            check_loss(model, features[:16], target[:16])
        if impl in ("kernels", "library"):
            model.compile()
        for _ in range(WARM_UP):
            assert torch.isfinite(step(features, target))
        timed(
            benchmark,
            lambda: step(features, target),
            area="models",
            op=f"{name} step",
            impl=impl,
            passes="train",
            shape=f"{proc.name} batch {batch}",
            flop=PASSES * batch * gflop * 1e9,
            clips=batch,
            graph=False,
            cpu_rounds=sized(3, 2),
        )
