"""The six models give through the Triton kernels what they give without."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastat.models import create_model
from tests.conftest import SMALL_MODELS

NUM_MELS, NUM_FRAMES, NUM_CLASSES = 64, 36, 5

USES = {
    "ast": ("attention", "patch_embed"),
    "transformer": ("attention",),
    "cnn_trans": ("attention", "bn_relu_pool"),
    "conformer": ("attention", "depthwise_conv"),
    "crnn": ("bn_relu_pool",),
}
"""The operators of each model that have a kernel."""


@pytest.fixture
def small(request: pytest.FixtureRequest, device: torch.device) -> tuple[nn.Module, Tensor]:
    """A model, and features of three clips."""
    model = create_model(
        request.param,
        num_mels=NUM_MELS,
        num_frames=NUM_FRAMES,
        num_classes=NUM_CLASSES,
        **SMALL_MODELS[request.param],
    )
    x = torch.randn(3, NUM_FRAMES, NUM_MELS, device=device)
    return model.to(device).to(memory_format=torch.channels_last).train(), x


def results(model: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
    """Logits and every parameter's gradient."""
    logits = run(x)
    params = list(model.parameters())
    target = torch.linspace(-1, 1, logits.numel(), device=x.device).view_as(logits)
    return [logits.detach(), *torch.autograd.grad((logits * target).sum(), params)]


class Operators(TorchDispatchMode):
    """Collects the names of this project's operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "fastat":
            self.seen.add(func._schema.name.removeprefix("fastat::"))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("small", USES, indirect=True)
def test_same_results_through_the_kernels(
    small: tuple[nn.Module, Tensor], request: pytest.FixtureRequest
) -> None:
    model, x = small
    want = results(model, model, x)
    request.getfixturevalue("triton_everywhere")
    with Operators() as operators:
        got = results(model, model, x)
    names = ["logits", *(name for name, _ in model.named_parameters())]
    largest = max(grad.abs().max().item() for grad in want[1:])
    for name, g, w in zip(names, got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-3, atol=1e-4 * largest, msg=name)
    used = USES[request.node.callspec.params["small"]]
    assert {f"{op}_fwd" for op in used} <= operators.seen
    assert all(any(s.startswith(f"{op}_bwd") for s in operators.seen) for op in used)


FULL = pytest.mark.full


@pytest.mark.parametrize(
    "small",
    ["ast", "cnn_trans", *(pytest.param(m, marks=FULL) for m in ("transformer", "conformer"))],
    indirect=True,
)
def test_compiles_whole_with_the_kernels(
    small: tuple[nn.Module, Tensor], triton_everywhere: None
) -> None:
    model, x = small
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for got, want in zip(results(model, compiled, x), results(model, model, x), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
