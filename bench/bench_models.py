"""One training step of each model, features in memory, at the paper's batch for one device.

On a GPU: compiled with our Triton kernels ("kernels"), compiled without any ("library"), and eager
without any ("eager"), all in bf16 with fused Adam as the trainer runs them; A4 and A2. On a CPU:
"ours", what the trainer runs there, beside the same model as a first script would train it:
float32, contiguous, eager, Adam in its own loops.
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor, nn

from bench.timing import DEVICE, DEVICE_CLOCK, ON_GPU, timed
from fastat.costs import forward_gflop
from fastat.environment import autocast
from fastat.features import CLIP_SAMPLES, FEATURES
from fastat.models import create_model, list_models
from fastat.optim import create_adam, train_step
from fastat.procedures import A2, A4, Procedure, model_options
from fastat_kernels.backend import kernels
from fastat_kernels.choice import OPERATORS

pytestmark = DEVICE_CLOCK

CLASSES = 527
IMPLS = ("kernels", "library", "eager") if ON_GPU else ("ours", "float32")
# The paper's global batch over its number of GPUs: 448 on two, 400 on four.
STEPS = [(A4, 224), (A2, 100)] if ON_GPU else [(A4, 4)]
MODELS = [name for name in list_models() if name != "resnet34"]
"""The paper's six."""
PASSES = 3
"""Forward, and a backward pass with twice its products."""


def created(name: str, proc: Procedure) -> nn.Module:
    feature = FEATURES[proc.feature]
    return create_model(
        name,
        num_mels=feature.num_mels,
        num_frames=feature.num_frames(CLIP_SAMPLES),
        num_classes=CLASSES,
        **model_options(name, proc),
    )


@torch.no_grad()
def check_loss(model: nn.Module, features: Tensor, target: Tensor) -> None:
    """bf16, with the kernels under test, is to give float32's loss before it is timed."""
    model.eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train()  # fresh running statistics do not normalise
    with kernels([]):
        want = F.binary_cross_entropy_with_logits(model(features), target)
    with autocast(DEVICE, "bf16"):
        logits = model(features)
    got = F.binary_cross_entropy_with_logits(logits, target)
    torch.testing.assert_close(got, want, rtol=0.03, atol=0)
    model.train()


def first_script_step(model: nn.Module, features: Tensor, target: Tensor) -> Callable[[], Tensor]:
    """A step in float32, contiguous, with Adam in its own loops."""
    adam = torch.optim.Adam(model.parameters(), lr=1e-5, foreach=False)

    def step() -> Tensor:
        loss = F.binary_cross_entropy_with_logits(model(features), target)
        adam.zero_grad()
        loss.backward()
        adam.step()
        return loss.detach()

    return step


def trainer_step(model: nn.Module, features: Tensor, target: Tensor) -> Callable[[], Tensor]:
    """A step as the trainer takes it: bf16, channels_last, fused Adam."""
    params = list(model.to(memory_format=torch.channels_last).parameters())
    adam, _ = create_adam(params, lr=1e-5, betas=(0.9, 0.999), weight_decay=0.0, device=DEVICE)
    precision = autocast(DEVICE, "bf16")
    return lambda: train_step(model, params, adam, features, target, precision)[0]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("proc, batch", STEPS, ids=[proc.name for proc, _ in STEPS])
def test_model_step(
    benchmark: BenchmarkFixture, proc: Procedure, batch: int, name: str, impl: str
) -> None:
    torch.manual_seed(0)
    model = created(name, proc).to(DEVICE).train()
    feature = FEATURES[proc.feature]
    num_frames = feature.num_frames(CLIP_SAMPLES)
    features = torch.randn(batch, num_frames, feature.num_mels, device=DEVICE)
    target = (torch.rand(batch, CLASSES, device=DEVICE) < 0.01).float()
    make_step = first_script_step if impl == "float32" else trainer_step
    step = make_step(model, features, target)
    with torch.device("meta"):
        empty = created(name, proc)
    gflop = forward_gflop(empty, num_frames, feature.num_mels)
    with kernels(OPERATORS if impl == "kernels" else ()):
        if impl != "float32":
            check_loss(model, features[:16], target[:16])
        if impl in ("kernels", "library"):
            model.compile()
        assert torch.isfinite(step())
        timed(
            benchmark,
            step,
            op=f"{name} step",
            impl=impl,
            passes="train",
            shape=f"{proc.name} batch {batch}",
            flop=PASSES * batch * gflop * 1e9,
            clips=batch,
            graph=False,
            cpu_rounds=3,
        )
