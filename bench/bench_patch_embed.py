"""patch_embed: ours, conv2d eager and compiled, unfold + GEMM; under autocast."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from bench.results import DEVICE, DTYPE, ON_GPU
from bench.timing import DEVICE_CLOCK, timed
from fastat_kernels.backend import kernels
from fastat_kernels.patch_embed import patch_embed

pytestmark = DEVICE_CLOCK


def unfold(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    pos: Tensor,
    cls_token: Tensor,
    dist_token: Tensor,
    stride: tuple[int, int],
) -> Tensor:
    """Patches in memory, rounded before they are copied, and one matrix product."""
    device = x.device.type
    image = x.mT.unsqueeze(1)
    if torch.is_autocast_enabled(device):
        image = image.to(torch.get_autocast_dtype(device))
    patches = F.linear(F.unfold(image, 16, stride=stride).mT, weight.flatten(1), bias)
    special = torch.cat([cls_token, dist_token], 1).expand(len(x), -1, -1)
    return torch.cat([special, patches], 1) + pos


IMPLS: dict[str, Callable[..., Tensor]] = {
    "ours": patch_embed,
    # With its kernel off, which a CPU has not: conv2d in channels_last, flatten, cat, add.
    **({"eager": patch_embed} if ON_GPU else {}),
    "compiled": torch.compile(patch_embed, dynamic=False),
    "unfold": unfold,
}
STRIDES = (4, 6, 8, 10, 12, 16)
# (clips, frames, mels, width, stride): A3 and A1, then the tiny trunk
SHAPES = (
    [
        *((80, 400, 64, 768, s) for s in STRIDES),
        *((20, 1024, 128, 768, s) for s in (4, 10, 16)),
        (80, 400, 64, 192, 8),
    ]
    if ON_GPU
    else [(4, 400, 64, 192, 8), (4, 400, 64, 192, 16)]
)


@pytest.mark.parametrize("passes", ["fwd", "fwd+bwd"])
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_patch_embed(
    benchmark: BenchmarkFixture, impl: str, shape: tuple[int, int, int, int, int], passes: str
) -> None:
    B, T, M, D, stride = shape
    backward = passes == "fwd+bwd"
    patches = ((M - 16) // stride + 1) * ((T - 16) // stride + 1)
    sizes = [(D, 1, 16, 16), (D,), (1, 2 + patches, D), (1, 1, D), (1, 1, D)]
    x = torch.randn(B, T, M, device=DEVICE)
    parameters = [
        (0.1 * torch.randn(size, device=DEVICE)).requires_grad_(backward) for size in sizes
    ]
    dout = torch.randn(B, 2 + patches, D, device=DEVICE)

    if impl == "compiled":
        torch.compiler.reset()  # more shapes than dynamo keeps versions of a function

    in_half = DTYPE != torch.float32

    def step(run: Callable[..., Tensor] = IMPLS[impl], autocast: bool = True) -> list[Tensor]:
        # No cache: a captured step has to cast the weights itself, as a training step does.
        with (
            kernels(["patch_embed"] if impl == "ours" and autocast else []),
            torch.autocast(DEVICE.type, DTYPE, enabled=autocast and in_half, cache_enabled=False),
        ):
            out = run(x, *parameters, (stride, stride))
        return [out, *(torch.autograd.grad(out, parameters, dout) if backward else ())]

    for got, want in zip(step(), step(unfold, autocast=False), strict=True):
        assert got.dtype == want.dtype == torch.float32
        assert (got - want).norm() <= 0.02 * want.norm()
    timed(
        benchmark,
        step,
        op="patch_embed",
        impl=impl,
        passes=passes,
        shape="x".join(map(str, shape)),
        bytes_moved=(dout.nbytes + x.nbytes) * (2 if backward else 1),
        flop=512 * B * patches * D * (2 if backward else 1),
        clips=B,
    )
