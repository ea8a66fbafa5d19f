"""bn_relu_pool: ours, eager and compiled torch, in training and evaluation, at TALNet's layers."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor, nn

from bench.results import DEVICE, DTYPE, ON_GPU
from bench.timing import DEVICE_CLOCK, timed
from fastat_kernels.backend import kernels
from fastat_kernels.bn_relu_pool import Pool, bn_relu_pool

pytestmark = DEVICE_CLOCK


def eager(x: Tensor, bn: nn.BatchNorm2d, pool: Pool | None) -> Tensor:
    """On CUDA cuDNN's batch norm in training where torch chooses it, torch's own otherwise."""
    x = bn(x)
    return F.relu_(x if pool is None else F.max_pool2d(x, pool))


def native(x: Tensor, bn: nn.BatchNorm2d, pool: Pool | None) -> Tensor:
    with torch.backends.cudnn.flags(enabled=False):
        return eager(x, bn, pool)


IMPLS: dict[str, Callable[..., Tensor]] = {
    "ours": bn_relu_pool,
    "eager": eager,
    "eager without cuDNN": native,
    "compiled": torch.compile(eager, dynamic=False),
}
LAYERS = [
    (32, 400, 64, None),
    (32, 400, 64, (2, 2)),
    (64, 200, 32, None),
    (64, 200, 32, (2, 2)),
    (128, 100, 16, None),
    (128, 100, 16, (1, 2)),
    (256, 100, 8, None),
    (256, 100, 8, (1, 2)),
    (512, 100, 4, None),
    (512, 100, 4, (1, 2)),
]
"""Channels, height, width and window of the ten layers at 64 x 400."""
CASES = (
    [(448, *layer) for layer in LAYERS[:2]] + [(64, *layer) for layer in LAYERS[2:]]
    if ON_GPU
    else [(2, *LAYERS[1]), (2, *LAYERS[9])]
)
PASSES = ("fwd", "fwd+bwd", "eval")


def label(case: tuple[int, int, int, int, Pool | None]) -> str:
    *shape, pool = case
    return "x".join(map(str, shape)) + (f" pool {pool[0]}x{pool[1]}" if pool else "")


@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", CASES, ids=label)
def test_bn_relu_pool(
    benchmark: BenchmarkFixture,
    impl: str,
    case: tuple[int, int, int, int, Pool | None],
    passes: str,
) -> None:
    B, C, H, W, pool = case
    backward = passes == "fwd+bwd"
    if impl == "eager without cuDNN" and (not ON_GPU or case not in CASES[:2]):
        pytest.skip("timed on the first two layers, on a GPU")
    x = torch.randn(B, H, W, C, device=DEVICE).to(DTYPE).permute(0, 3, 1, 2)
    x.requires_grad_(backward)
    bn = nn.BatchNorm2d(C, device=DEVICE).train(passes != "eval").requires_grad_(backward)
    leaves = x, bn.weight, bn.bias
    nn.init.uniform_(bn.weight, 0.5, 1.5)
    h, w = pool or (1, 1)
    dout = torch.randn(B, H // h, W // w, C, device=DEVICE).to(DTYPE).permute(0, 3, 1, 2)

    def step() -> tuple[Tensor, ...]:
        with kernels(["bn_relu_pool"]):
            out = IMPLS[impl](x, bn, pool)
        return (out, *torch.autograd.grad(out, leaves, dout)) if backward else (out,)

    got, want = step(), reference(x, bn, pool, dout)
    for name, a, b in zip(("out", "x", "weight", "bias"), got, want, strict=False):
        # As a whole: in half precision two pixels of a window can be one, and swap their gradients.
        assert (a.float() - b).norm() < 0.05 * b.norm(), name

    moved = [2 + 1 / (h * w), 2 + 1 / (h * w) + 3 + 2 / (h * w), 1 + 1 / (h * w)]
    timed(
        benchmark,
        step,
        op="bn_relu_pool",
        impl=impl,
        passes=passes,
        shape=label(case),
        bytes_moved=x.nbytes * moved[PASSES.index(passes)],
        clips=B,
    )


def reference(x: Tensor, bn: nn.BatchNorm2d, pool: Pool | None, dout: Tensor) -> list[Tensor]:
    """The output in float32, and the gradients of x, weight and bias."""
    leaves = [v.detach().float().requires_grad_() for v in (x, bn.weight, bn.bias)]
    mean, var = (None, None) if bn.training else (bn.running_mean, bn.running_var)
    y = F.batch_norm(leaves[0], mean, var, leaves[1], leaves[2], bn.training, 0.0, bn.eps)
    out = F.relu(y if pool is None else F.max_pool2d(y, pool))
    return [out.detach(), *torch.autograd.grad(out, leaves, dout.float())]
