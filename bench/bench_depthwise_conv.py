"""depthwise_conv: ours, eager and compiled, forward and forward + backward, as under autocast."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from bench.results import DEVICE, DTYPE, ON_GPU, PRECISION
from bench.timing import DEVICE_CLOCK, timed
from fastat.system.device import autocast
from fastat_kernels.backend import kernels
from fastat_kernels.depthwise_conv import depthwise_conv, depthwise_conv_ref

pytestmark = DEVICE_CLOCK


def layers(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """torch's GLU, convolution, norm and SiLU; GroupNorm is float32 under autocast."""
    D, _, k = weight.shape
    y = F.conv1d(F.glu(x).transpose(1, 2), weight, bias, padding=k // 2, groups=D)
    return F.silu(F.group_norm(y, 1, scale, shift, 1e-5)).transpose(1, 2).to(x.dtype)


IMPLS: dict[str, Callable[..., Tensor]] = {
    "ours": depthwise_conv,
    "eager": layers,
    "compiled": torch.compile(layers, dynamic=False),
}
# (B, N, D, k): Conformer at A4 (eleven blocks, the first block) and at A2
SHAPES = (
    [(448, 100, 768, 15), (448, 100, 768, 31), (100, 256, 768, 15), (400, 256, 768, 15)]
    if ON_GPU
    else [(4, 100, 768, 15), (4, 100, 768, 31)]
)


@pytest.mark.parametrize("passes", ["fwd", "fwd+bwd"])
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_depthwise_conv(
    benchmark: BenchmarkFixture, impl: str, shape: tuple[int, ...], passes: str
) -> None:
    B, N, D, k = shape
    backward = passes == "fwd+bwd"
    x = torch.randn(B, N, 2 * D, device=DEVICE, dtype=DTYPE)
    weight = torch.randn(D, 1, k, device=DEVICE) / k**0.5
    bias, scale, shift = torch.randn(3, D, device=DEVICE)
    inputs = [t.requires_grad_(backward) for t in (x, weight, bias, scale, shift)]
    dout = torch.randn(B, N, D, device=DEVICE, dtype=DTYPE)

    def step() -> Tensor:
        with kernels(["depthwise_conv"]), autocast(DEVICE, PRECISION):
            out = IMPLS[impl](*inputs)
        if backward:
            torch.autograd.grad(out, inputs, dout)
        return out

    with torch.no_grad():
        want = depthwise_conv_ref(x, weight, bias, scale, shift, 1e-5)
    torch.testing.assert_close(step(), want, rtol=3e-2, atol=3e-2)
    unit = dout.nbytes
    timed(
        benchmark,
        step,
        op="depthwise_conv",
        impl=impl,
        passes=passes,
        shape="x".join(map(str, shape)),
        # x read, y written and read, out written; dout, y twice, x read, dx written
        bytes_moved=(13 if backward else 5) * unit,
        clips=B,
    )
