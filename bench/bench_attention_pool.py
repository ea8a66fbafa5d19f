"""attention_pool: ours, eager and compiled, forward and forward + backward."""

from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from bench.results import DEVICE, DTYPE, ON_GPU
from bench.timing import DEVICE_CLOCK, timed
from fastat_kernels.attention_pool import attention_pool, attention_pool_ref
from fastat_kernels.backend import kernels

pytestmark = DEVICE_CLOCK

IMPLS: dict[str, Callable[..., Tensor]] = {
    "ours": attention_pool,
    "eager": attention_pool_ref,
    "compiled": torch.compile(attention_pool_ref, dynamic=False),
}
# [B, T, K]: CNN+Transformer and CRNN at A4 and A2; ResNet50 at A4, which takes the sigmoid form
SHAPES = (
    [((448, 100, 527), False), ((100, 256, 527), False), ((448, 13, 527), True)]
    if ON_GPU
    else [((8, 100, 527), False), ((8, 13, 527), True)]
)


@pytest.mark.parametrize("passes", ["fwd", "fwd+bwd"])
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape, sigmoid", SHAPES, ids=lambda s: str(s).replace(", ", "x"))
def test_attention_pool(
    benchmark: BenchmarkFixture, impl: str, shape: tuple[int, ...], sigmoid: bool, passes: str
) -> None:
    backward = passes == "fwd+bwd"
    prob, att = (
        torch.randn(shape, device=DEVICE, dtype=DTYPE).requires_grad_(backward) for _ in range(2)
    )
    dout = torch.randn(shape[0], shape[2], device=DEVICE)

    def step() -> Tensor:
        with kernels(["attention_pool"]):
            out = IMPLS[impl](prob, att, sigmoid=sigmoid)
        if backward:
            torch.autograd.grad(out, (prob, att), dout)
        return out

    with torch.no_grad():
        want = attention_pool_ref(prob, att, sigmoid)
    torch.testing.assert_close(step(), want, rtol=1e-3, atol=1e-4)
    timed(
        benchmark,
        step,
        op="attention_pool",
        impl=impl,
        passes=passes,
        shape="x".join(map(str, shape)) + (" sigmoid" if sigmoid else ""),
        bytes_moved=2 * prob.nbytes * (3 if backward else 1),
        clips=shape[0],
    )
