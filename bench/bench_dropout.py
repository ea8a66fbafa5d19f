"""dropout: ours and torch's, forward + backward, at CNN+Transformer's shapes (batch 16)."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from bench.results import DEVICE, DTYPE
from bench.timing import DEVICE_CLOCK, timed
from fastat_kernels.dropout import dropout

pytestmark = DEVICE_CLOCK

IMPLS: dict[str, Callable[[Tensor, float], Tensor]] = {"ours": dropout, "torch": F.dropout}
SHAPES = {"tokens": (16, 100, 1024), "attention weights": (16, 8, 100, 100)}
P = 0.75


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", SHAPES)
def test_dropout(benchmark: BenchmarkFixture, shape: str, impl: str) -> None:
    x = torch.randn(SHAPES[shape], device=DEVICE, dtype=DTYPE, requires_grad=True)
    dout = torch.randn_like(x)

    def step() -> Tensor:
        y = IMPLS[impl](x, P)
        torch.autograd.grad(y, x, dout)
        return y

    share = (step() == 0).float().mean().item()
    assert share == pytest.approx(P, abs=0.01)
    timed(
        benchmark,
        step,
        op="dropout",
        impl=impl,
        passes="fwd+bwd",
        shape=f"{shape} {'x'.join(map(str, SHAPES[shape]))}",
        bytes_moved=4 * x.nbytes,
        cpu_rounds=30,
    )
