"""bn_relu_pool: statistics, forward and every gradient against float64; the module around them."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastat_kernels.backend import target
from fastat_kernels.bn_relu_pool import (
    Config,
    Pool,
    _configs,
    _dx,
    _dx_triton,
    _fwd,
    _fwd_triton,
    _stats,
    _stats_triton,
    _sums,
    _sums_triton,
    batch_stats,
    bn_relu_pool,
    bn_relu_pool_ref,
    normalise_relu_pool,
)
from tests.kernels.check import assert_as_good_as_eager
from tests.kernels.mutant import Mutant

if TYPE_CHECKING:
    from fastat.models.layers import ConvBlock

EPS = 1e-5
# [B, C, H, W] and window: blocks that divide; odd everything; odd height, odd width; each window;
# one channel; one pixel a clip; one past a block of channels; more channels than a block has
SHAPES = [
    ((2, 32, 8, 8), (2, 2)),
    ((3, 33, 7, 9), (2, 2)),
    ((3, 8, 5, 4), (2, 2)),
    ((2, 8, 4, 5), (2, 2)),
    ((2, 16, 6, 8), (1, 2)),
    ((3, 7, 5, 5), (1, 2)),
    ((2, 64, 5, 3), (1, 1)),
    ((2, 3, 7, 8), (3, 2)),
    ((1, 1, 6, 4), (2, 2)),
    ((1, 1, 3, 1), (1, 1)),
    ((5, 8, 1, 1), (1, 1)),
    ((1, 16, 9, 2), (2, 2)),
    ((2, 527, 2, 3), (1, 2)),
    ((2, 1030, 2, 2), (2, 2)),
]
A4 = [
    ((64, 32, 400, 64), (1, 1)),
    ((64, 32, 400, 64), (2, 2)),
    ((64, 64, 200, 32), (1, 1)),
    ((64, 64, 200, 32), (2, 2)),
    ((64, 128, 100, 16), (1, 1)),
    ((64, 128, 100, 16), (1, 2)),
    ((64, 256, 100, 8), (1, 1)),
    ((64, 256, 100, 8), (1, 2)),
    ((64, 512, 100, 4), (1, 1)),
    ((64, 512, 100, 4), (1, 2)),
]
"""TALNet's ten layers at 64 x 400."""
MODEL_SHAPES = A4 if torch.cuda.is_available() else []
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def label(value: object) -> str:
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value).split(".")[-1]


def eager(pool: Pool) -> Callable[..., Tensor]:
    def run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y = F.batch_norm(x, None, None, weight, bias, True, 0.0, EPS)
        return F.relu(F.max_pool2d(y, pool))

    return run


def a_map(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """[B, C, H, W] in channels_last, of other mean and width in every channel."""
    C = shape[1]
    x = torch.randn(shape, device=device) * torch.linspace(0.5, 2, C, device=device).view(-1, 1, 1)
    x += torch.linspace(-1, 1, C, device=device).view(-1, 1, 1)
    return x.to(dtype, memory_format=torch.channels_last)


def vectors(C: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Weights of both signs, and a zero that the ReLU passes if there are several; biases."""
    weight, bias = torch.randn(2, C, device=device)
    weight[C // 2], bias[C // 2] = float(C == 1), 0.5
    return weight.to(dtype), bias.to(dtype)


def a_gradient(x: Tensor, weight: Tensor, bias: Tensor, pool: Pool) -> Tensor:
    """Random, and 0 where rounding alone decides whether the ReLU lets it pass."""
    y = F.batch_norm(x.double(), None, None, weight.double(), bias.double(), True, 0.0, EPS)
    y = F.max_pool2d(y, pool)
    return torch.randn_like(y).where(y.abs() > 1e-4, 0).to(x.dtype)


def all_four(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    dout: Tensor,
    pool: Pool,
    config: Config | None = None,
) -> dict[str, Tensor]:
    """Output and gradients in training, by the launchers."""
    mean, var, count = _stats_triton(x, config=config)
    vectors = mean, var, count, weight, bias
    out = _fwd_triton(x, *vectors, EPS, *pool, config=config)
    sums = _sums_triton(dout, x, mean, var, weight, bias, EPS, *pool, config=config)
    dx = _dx_triton(dout, x, *vectors, *sums, EPS, *pool, config=config)
    sum_g, sum_gx = sums
    return {"out": out, "x": dx, "weight": sum_gx.to(x.dtype), "bias": sum_g.to(x.dtype)}


# ----------------------------------------------------------------------------------- the launchers
@pytest.mark.parametrize("dtype", DTYPES, ids=label)
@pytest.mark.parametrize("shape, pool", SHAPES + MODEL_SHAPES, ids=label)
def test_matches_reference(
    shape: tuple[int, ...], pool: Pool, dtype: torch.dtype, device: torch.device
) -> None:
    x = a_map(shape, dtype, device)
    weight, bias = vectors(shape[1], dtype, device)
    dout = a_gradient(x, weight, bias, pool)
    got = all_four(x, weight, bias, dout, pool)
    for name in ("out", "x"):
        assert got[name].is_contiguous(memory_format=torch.channels_last)
    assert_as_good_as_eager(eager(pool), (x, weight, bias), dout, got)


@pytest.mark.parametrize("dtype", DTYPES, ids=label)
@pytest.mark.parametrize("layout", ["channels_first", "sliced", "expanded"])
def test_other_layouts(layout: str, dtype: torch.dtype, device: torch.device) -> None:
    x = torch.randn(4, 6, 5, 8, device=device).to(dtype)
    if layout == "sliced":
        x = x.contiguous(memory_format=torch.channels_last)[:, 1:, :, ::2]
    weight, bias = vectors(x.shape[1], dtype, device)
    dout = a_gradient(x, weight, bias, (2, 2))
    if layout == "expanded":
        dout = dout[:1, :, :1].expand(dout.shape)
    got = all_four(x, weight, bias, dout, (2, 2))
    assert_as_good_as_eager(eager((2, 2)), (x, weight, bias), dout, got)


@pytest.mark.parametrize("pool", [(1, 1), (1, 2), (2, 2)], ids=label)
def test_several_blocks_a_program(pool: Pool, device: torch.device) -> None:
    """Three programs go round by two blocks of 4 rows, twice for the channels; the last are cut."""
    x = a_map((2, 600, 3, 8), torch.float32, device)
    weight, bias = vectors(600, torch.float32, device)
    dout = a_gradient(x, weight, bias, pool)
    got = all_four(x, weight, bias, dout, pool, Config(2048, 4, 2, 6))
    assert_as_good_as_eager(eager(pool), (x, weight, bias), dout, got)


def test_reference_is_the_composite(device: torch.device) -> None:
    x = a_map((2, 8, 5, 6), torch.float32, device)
    weight, bias = vectors(8, torch.float32, device)
    want = eager((2, 2))(x, weight, bias)
    torch.testing.assert_close(bn_relu_pool_ref(x, weight, bias, EPS, (2, 2)), want)


@pytest.mark.parametrize("offset", [0.0, 1e3, -1e4])
@pytest.mark.parametrize("programs", [1, 3, 512])
def test_statistics_far_from_zero(offset: float, programs: int, device: torch.device) -> None:
    """E[x^2] - E[x]^2 has no digits left of the variance here."""
    x = a_map((3, 16, 23, 7), torch.float32, device) + offset
    mean, var, count = _stats_triton(x, config=Config(256, 4, 2, programs))
    exact_var, exact_mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    torch.testing.assert_close(mean.double(), exact_mean, rtol=2e-7, atol=1e-6)
    torch.testing.assert_close(var.double(), exact_var, rtol=1e-5, atol=0)
    assert count.item() == 3 * 23 * 7


def test_statistics_of_an_odd_first_block(device: torch.device) -> None:
    """The pivot is taken from rows that are like no others."""
    x = a_map((4, 16, 30, 8), torch.float32, device)
    x[0, :, :4] = 40.0
    _, var, _ = _stats_triton(x, config=Config(256, 4, 2, 1))
    exact = x.double().var((0, 2, 3), correction=0)
    torch.testing.assert_close(var.double(), exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("pool", [(1, 1), (1, 2), (2, 2)], ids=label)
def test_ties_and_zeros(pool: Pool, sign: float, device: torch.device) -> None:
    """The first of equal maxima has the whole gradient, and a maximum of 0 has none: exactly."""
    x = torch.randint(-1, 2, (3, 8, 5, 7), device=device).float().requires_grad_()
    want = F.relu(F.max_pool2d(sign * x, pool))
    dout = torch.randn_like(want)
    (exact,) = torch.autograd.grad(want, x, dout)
    zero, one = torch.zeros(8, device=device), torch.ones(8, device=device)
    constants = zero, one, None, sign * one, zero
    rows = x.detach().contiguous(memory_format=torch.channels_last)
    assert torch.equal(_fwd_triton(rows, *constants, 0.0, *pool), want)
    assert torch.equal(_dx_triton(dout, rows, *constants, zero, zero, 0.0, *pool), exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=label)
@pytest.mark.parametrize("pool", [(1, 1), (2, 2)], ids=label)
def test_running_statistics_are_constants(
    pool: Pool, dtype: torch.dtype, device: torch.device
) -> None:
    x = a_map((2, 9, 5, 6), dtype, device)
    weight, bias = vectors(9, dtype, device)
    mean, var = (torch.rand(9, device=device).to(dtype) for _ in range(2))

    def evaluated(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y = F.batch_norm(x, mean.to(x.dtype), var.to(x.dtype), weight, bias, False, 0.0, EPS)
        return F.relu(F.max_pool2d(y, pool))

    dout = a_gradient(x, weight, bias, pool)
    out = _fwd_triton(x, mean, var, None, weight, bias, EPS, *pool)
    sum_g, sum_gx = _sums_triton(dout, x, mean, var, weight, bias, EPS, *pool)
    dx = _dx_triton(dout, x, mean, var, None, weight, bias, sum_g, sum_gx, EPS, *pool)
    got = {"out": out, "x": dx, "weight": sum_gx.to(dtype), "bias": sum_g.to(dtype)}
    assert_as_good_as_eager(evaluated, (x, weight, bias), dout, got)


@pytest.mark.parametrize("where", [0, 3])
def test_not_a_number_is_not_rectified_away(where: int, device: torch.device) -> None:
    x = a_map((1, 4, 2, 2), torch.float32, device)
    x[0, 1].view(-1)[where] = float("nan")
    one = torch.ones(4, device=device)
    out = _fwd_triton(x, 0 * one, one, None, one, one, EPS, 2, 2)
    assert out.isnan().flatten().tolist() == [False, True, False, False]
    mean, var, _ = _stats_triton(x)
    assert mean.isnan().tolist() == var.isnan().tolist() == [False, True, False, False]


def test_two_halves_of_a_batch(device: torch.device) -> None:
    """What SyncBatchNorm does: statistics combined before, and sums added between, the passes."""
    pool = (2, 2)
    x = a_map((5, 8, 6, 5), torch.float32, device)
    weight, bias = vectors(8, torch.float32, device)
    dout = a_gradient(x, weight, bias, pool)
    whole = all_four(x, weight, bias, dout, pool)
    halves = list(zip(x.split([2, 3]), dout.split([2, 3]), strict=True))

    stats = [batch_stats(h) for h, _ in halves]
    means, variances, counts = (torch.stack(s) for s in zip(*stats, strict=True))
    counts = counts[:, None]
    count = counts.sum()
    mean = (counts * means).sum(0) / count
    var = (counts * (variances + (means - mean) ** 2)).sum(0) / count
    common = mean, var, count, weight, bias
    out = torch.cat([normalise_relu_pool(h, *common, EPS, pool) for h, _ in halves])
    parts = [_sums_triton(g, h, mean, var, weight, bias, EPS, *pool) for h, g in halves]
    sum_g, sum_gx = (torch.stack(s).sum(0) for s in zip(*parts, strict=True))
    dx = torch.cat([_dx_triton(g, h, *common, sum_g, sum_gx, EPS, *pool) for h, g in halves])
    got = {"out": out, "x": dx, "weight": sum_gx, "bias": sum_g}
    torch.testing.assert_close(got, whole, rtol=1e-5, atol=1e-5)


def test_same_bits_twice(device: torch.device) -> None:
    x = a_map((3, 24, 9, 6), torch.float32, device)
    weight, bias = vectors(24, torch.float32, device)
    dout = a_gradient(x, weight, bias, (2, 2))
    config = Config(128, 4, 2, 7)
    first, again = (all_four(x, weight, bias, dout, (2, 2), config) for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs 20 GB of GPU memory")
def test_more_than_two_to_the_31_elements(device: torch.device) -> None:
    """The last clip of a map whose addresses need 64 bits, beside that clip alone."""
    x = torch.randn(66, 32, 1024, 1024, device=device, dtype=torch.bfloat16)
    x = x.contiguous(memory_format=torch.channels_last)
    assert x.numel() > 2**31
    weight, bias = vectors(32, torch.float32, device)
    mean, var, count = _stats_triton(x)
    torch.testing.assert_close(mean, torch.zeros_like(mean), rtol=0, atol=1e-3)
    torch.testing.assert_close(var, torch.ones_like(var), rtol=1e-3, atol=0)
    common = mean, var, count, weight, bias
    out = _fwd_triton(x, *common, EPS, 2, 2)
    assert torch.equal(out[-1:], _fwd_triton(x[-1:], *common, EPS, 2, 2))
    sums = _sums_triton(out, x, mean, var, weight, bias, EPS, 2, 2)
    dx = _dx_triton(out, x, *common, *sums, EPS, 2, 2)
    assert torch.equal(dx[-1:], _dx_triton(out[-1:], x[-1:], *common, *sums, EPS, 2, 2))


# ----------------------------------------------------------------------------------- the operators
def test_operator_defaults_agree_with_their_kernels(device: torch.device) -> None:
    """The CPU default and the Triton launcher are two implementations of one operator."""
    for shape, pool in (((2, 6, 5, 7), (2, 2)), ((2, 1, 4, 4), (1, 2)), ((3, 4, 1, 1), (1, 1))):
        x = a_map(shape, torch.float32, device)
        weight, bias = vectors(shape[1], torch.float32, device)
        dout = a_gradient(x, weight, bias, pool)
        mean, var, count = _stats_triton(x)
        sums = _sums_triton(dout, x, mean, var, weight, bias, EPS, *pool)
        calls: list[tuple[Any, Callable[..., Any], tuple[Any, ...]]] = [
            (_stats, _stats_triton, (x,)),
            (_fwd, _fwd_triton, (x, mean, var, count, weight, bias, EPS, *pool)),
            (_sums, _sums_triton, (dout, x, mean, var, weight, bias, EPS, *pool)),
            (_dx, _dx_triton, (dout, x, mean, var, count, weight, bias, *sums, EPS, *pool)),
            (_dx, _dx_triton, (dout, x, mean, var, None, weight, bias, *sums, EPS, *pool)),
        ]
        for op, launcher, args in calls:
            got, want = launcher(*args), op._init_fn(*args)
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5, check_stride=True)


@pytest.mark.parametrize("pool", [(1, 1), (2, 2)], ids=label)
def test_opcheck(pool: Pool, device: torch.device) -> None:
    x = a_map((2, 4, 5, 6), torch.float32, device)
    weight, bias = (v.requires_grad_() for v in vectors(4, torch.float32, device))
    dout = a_gradient(x, weight, bias, pool).detach()
    mean, var, count = _stats_triton(x)
    sums = _sums_triton(dout, x, mean, var, weight, bias, EPS, *pool)
    detached = weight.detach(), bias.detach()
    torch.library.opcheck(_stats, (x,))
    torch.library.opcheck(_sums, (dout, x, mean, var, *detached, EPS, *pool))
    torch.library.opcheck(_dx, (dout, x, mean, var, count, *detached, *sums, EPS, *pool))
    x.requires_grad_()
    torch.library.opcheck(_fwd, (x, mean, var, count, weight, bias, EPS, *pool))
    torch.library.opcheck(_fwd, (x, mean, var, None, weight, bias, EPS, *pool))


# -------------------------------------------------------------------------------------- the module
def a_block(device: torch.device, pool: Pool | None = (2, 2)) -> "ConvBlock":
    """A convolution, BatchNorm, ReLU and pool, as the models have them."""
    from fastat.models.layers import ConvBlock

    block = ConvBlock(3, 8, pool)
    with torch.no_grad():
        block.bn.weight.copy_(torch.linspace(-1, 2, 8))
        block.bn.bias.copy_(torch.linspace(-1, 1, 8))
    return block.to(device).to(memory_format=torch.channels_last)


def written_out(block: "ConvBlock", x: Tensor) -> Tensor:
    x = block.bn(block.conv(x))
    return F.relu(x if block.pool is None else F.max_pool2d(x, block.pool))


def batches(num: int, device: torch.device) -> Iterator[Tensor]:
    for i in range(num):
        yield torch.randn(2 + i, 3, 6, 5, device=device) + i


def twin(block: "ConvBlock") -> "ConvBlock":
    other = a_block(next(block.parameters()).device, block.pool)
    other.load_state_dict(block.state_dict())
    other.bn.momentum = block.bn.momentum
    return other


def close(got: object, want: object) -> None:
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5, check_stride=False)


@pytest.mark.parametrize("momentum", [0.1, None, 1.0])
@pytest.mark.parametrize("pool", [None, (1, 2), (2, 2)], ids=label)
def test_module_trains_and_evaluates_as_torch(
    pool: Pool | None, momentum: float | None, triton_everywhere: None, device: torch.device
) -> None:
    ours = a_block(device, pool)
    ours.bn.momentum = momentum
    theirs = twin(ours).double()
    for x in batches(3, device):
        out, want = ours(x), written_out(theirs, x.double())
        close(out, want.float())
        out.square().sum().backward()
        want.square().sum().backward()
        for name, buffer in ours.bn.named_buffers():
            torch.testing.assert_close(buffer, theirs.bn.get_buffer(name).to(buffer.dtype))
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None
        # A convolution's bias goes with the mean: its gradient is 0 but for rounding.
        atol = 1e-5 * q.grad.abs().max().item() + 1e-4
        torch.testing.assert_close(p.grad, q.grad.float(), rtol=1e-4, atol=atol)
    ours.eval(), theirs.eval()
    x = next(batches(1, device)).requires_grad_()
    out, want = ours(x), written_out(theirs, x.double())
    close(out, want.float())
    leaves = [(x, *m.parameters()) for m in (ours, theirs)]
    (got_dx, *got), (dx, *exact) = (
        torch.autograd.grad(y.sum(), leaf) for y, leaf in zip((out, want), leaves, strict=True)
    )
    close([got_dx, *got], [dx, *(g.float() for g in exact)])


@pytest.mark.parametrize("pool", [None, (1, 2), (2, 2)], ids=label)
@pytest.mark.parametrize("training", [True, False])
def test_without_the_kernel_it_is_torchs_bits(training: bool, pool: Pool | None) -> None:
    ours = a_block(torch.device("cpu"), pool).train(training)
    theirs = twin(ours).train(training)
    for x in batches(2, torch.device("cpu")):
        y = theirs.bn(theirs.conv(x))
        want = F.relu_(y if pool is None else F.max_pool2d(y, pool))
        assert torch.equal(ours(x), want)
    for name, value in ours.state_dict().items():
        assert torch.equal(value, theirs.state_dict()[name]), name


@pytest.mark.parametrize("momentum", [0.1, None])
def test_checkpointing_counts_a_batch_once(
    momentum: float | None, triton_everywhere: None, device: torch.device
) -> None:
    from fastat.models.base import _checkpointed

    kept = a_block(device)
    kept.bn.momentum = momentum
    again = twin(kept)
    for x in batches(2, device):
        kept(x).square().sum().backward()
        _checkpointed(again, x).square().sum().backward()
    for name, value in kept.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    for p, q in zip(kept.parameters(), again.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None and torch.equal(p.grad, q.grad)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_compiles_whole(
    momentum: float | None, triton_everywhere: None, device: torch.device
) -> None:
    torch._dynamo.reset()
    ours = a_block(device)
    ours.bn.momentum = momentum
    theirs = twin(ours)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for training in (True, False):
        ours.train(training), theirs.train(training)
        for x in batches(2, device):
            out, want = compiled(x), theirs(x)
            close(out, want)
            out.square().sum().backward()
            want.square().sum().backward()
        close(ours.state_dict(), theirs.state_dict())
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        close(p.grad, q.grad)


def test_autocast(triton_everywhere: None, device: torch.device) -> None:
    """A bfloat16 map, float32 weights and statistics."""
    block = a_block(device)
    exact = twin(block).double()
    (x,) = batches(1, device)
    with torch.autocast(device.type, torch.bfloat16):
        out = block(x)
    assert out.dtype == torch.bfloat16 and out.is_contiguous(memory_format=torch.channels_last)
    want = written_out(exact, x.double())
    assert (out - want).norm() < 0.02 * want.norm()
    out.float().square().sum().backward()
    want.square().sum().backward()
    for p, q in zip(block.bn.parameters(), exact.bn.parameters(), strict=True):
        assert p.grad is not None and p.grad.dtype == torch.float32
        assert q.grad is not None and (p.grad - q.grad).norm() < 0.05 * q.grad.norm()
    for name, buffer in block.bn.named_buffers():
        want = exact.bn.get_buffer(name)
        assert (buffer.double() - want).norm() < 0.01 * want.double().norm(), name


def relatives(device: torch.device) -> dict[str, nn.Module]:
    tracked = {"no weights": {"affine": False}, "no statistics": {"track_running_stats": False}}
    found: dict[str, nn.Module] = {k: nn.BatchNorm2d(8, **v) for k, v in tracked.items()}
    found["synchronised"] = nn.SyncBatchNorm(8)
    return {k: m.to(device) for k, m in found.items()}


@pytest.mark.parametrize("name", ["no weights", "no statistics", "synchronised"])
def test_relatives_of_batch_norm(name: str, triton_everywhere: None, device: torch.device) -> None:
    """The kernel or torch: the result is torch's in training and in evaluation."""
    ours, theirs = relatives(device)[name], relatives(device)[name]
    for training in (True, True, False):
        ours.train(training), theirs.train(training)
        x = a_map((3, 8, 4, 5), torch.float32, device).requires_grad_()
        y = bn_relu_pool(x, ours, (2, 2))  # type: ignore[arg-type]
        want = F.relu(F.max_pool2d(theirs(x), (2, 2)))
        close(y, want)
        close(*(torch.autograd.grad(out.square().sum(), x)[0] for out in (y, want)))
    close(dict(ours.named_buffers()), dict(theirs.named_buffers()))


def test_frozen_norm(triton_everywhere: None, device: torch.device) -> None:
    """In evaluation, weights without gradients: only the map's is computed."""
    bn = nn.BatchNorm2d(8, device=device).eval().requires_grad_(False)
    x = a_map((2, 8, 4, 4), torch.float32, device).requires_grad_()
    dx = [
        torch.autograd.grad(y.square().sum(), x)[0]
        for y in (bn_relu_pool(x, bn, (1, 2)), F.relu(F.max_pool2d(bn(x), (1, 2))))
    ]
    close(*dx)


@pytest.mark.parametrize(
    "shape, pool, message",
    [
        ((2, 8, 4), None, r"x must be \[B, 8, H, W\], got \(2, 8, 4\)"),
        ((2, 7, 4, 4), None, r"x must be \[B, 8, H, W\], got \(2, 7, 4, 4\)"),
        ((2, 8, 1, 4), (2, 2), r"no window of \(2, 2\) pixels fits in 1 x 4"),
        ((2, 8, 4, 1), (1, 2), r"no window of \(1, 2\) pixels fits in 4 x 1"),
        ((2, 8, 4, 4), (0, 1), r"no window of \(0, 1\)"),
        ((1, 8, 1, 1), None, "more than 1 "),
    ],
)
def test_rejects(
    shape: tuple[int, ...],
    pool: Pool | None,
    message: str,
    triton_everywhere: None,
    device: torch.device,
) -> None:
    with pytest.raises(ValueError, match=message):
        bn_relu_pool(torch.randn(shape, device=device), nn.BatchNorm2d(8, device=device), pool)


def test_operators_alone_reject() -> None:
    x, v = torch.randn(2, 8, 4, 4), torch.ones(8)
    with pytest.raises(ValueError, match=r"mean, var, weight, bias \[C\], got .*\(7,\), \(8,\)"):
        normalise_relu_pool(x, v, v[1:], None, v, v)
    with pytest.raises(ValueError, match="not empty"):
        batch_stats(x[:0])


# ------------------------------------------------------------------------------------- compilation
def _launches(
    choose: Callable[[int, str, int], list[Config]],
) -> Iterator[tuple[str, Callable[[], object]]]:
    cases = [
        *(((448, *shape[1:]), pool, torch.bfloat16) for shape, pool in A4),
        ((100, 16, 1024, 128), (2, 2), torch.bfloat16),  # 128 x 1024, embedding 1024
        ((448, 32, 400, 64), (2, 2), torch.float32),
        ((448, 512, 100, 4), (1, 1), torch.float32),
        ((448, 32, 400, 64), (2, 2), torch.float16),
        ((3, 33, 401, 65), (2, 2), torch.bfloat16),
        ((3, 1030, 5, 5), (1, 2), torch.bfloat16),
        ((3, 1, 64, 64), (1, 1), torch.bfloat16),
    ]
    for shape, pool, dtype in cases:
        B, C, H, W = shape
        window = pool[0] * pool[1]
        x = torch.empty(shape, dtype=dtype, device="meta", memory_format=torch.channels_last)
        dout = torch.empty((B, C, H // pool[0], W // pool[1]), dtype=dtype, device="meta")
        v = torch.empty(C, device="meta")
        n = torch.empty((), device="meta")
        name = f"{label(shape)} {label(pool)} {label(dtype)}"

        def run(
            kernel: str,
            config: Config,
            x: Tensor = x,
            dout: Tensor = dout,
            v: Tensor = v,
            n: Tensor = n,
            pool: Pool = pool,
        ) -> None:
            match kernel:
                case "stats":
                    _stats_triton(x, config=config)
                case "fwd":
                    _fwd_triton(x, v, v, n, v, v, EPS, *pool, config=config)
                case "sums":
                    _sums_triton(dout, x, v, v, v, v, EPS, *pool, config=config)
                case "dx":
                    _dx_triton(dout, x, v, v, n, v, v, v, v, EPS, *pool, config=config)
                case "dx, constants":
                    _dx_triton(dout, x, v, v, None, v, v, v, v, EPS, *pool, config=config)

        kernels = ["stats", "fwd", "sums", "dx"]
        if C in (32, 512):
            kernels.append("dx, constants")
        for kernel in kernels:
            for config in choose(target(x), kernel.split(",")[0], window):
                yield f"{kernel} {name} @ {tuple(config)}", partial(run, kernel, config)


def launches() -> Iterator[tuple[str, Callable[[], object]]]:
    """Every launch that the models make, on meta tensors: (label, call)."""
    return _launches(lambda *problem: _configs(*problem)[:1])


def candidates() -> Iterator[tuple[str, Callable[[], object]]]:
    """The configurations that are timed only."""
    return _launches(lambda *problem: _configs(*problem)[1:])


MUTANTS = [
    Mutant(
        "squares are summed about zero: no digits are left of a small variance far from it",
        "    pivot = pivot.to(x_ptr.dtype.element_ty)\n",
        "    pivot = (pivot * 0.0).to(x_ptr.dtype.element_ty)\n",
        "test_statistics_far_from_zero[3--10000.0]",
    ),
    Mutant(
        "a program's mean is not weighted by its rows",
        "    mean = tl.sum(n * part, 0) / count\n",
        "    mean = tl.sum(part, 0) / G\n",
        "test_statistics_far_from_zero[3-0.0]",
    ),
    Mutant(
        "a row that no window covers shifts the clips after it",
        "    x_ptr += (row * PH + clip * EXTRA).to",
        "    x_ptr += (row * PH).to",
        "test_several_blocks_a_program[2x2]",
    ),
    Mutant(
        "a negative weight's window keeps its largest pixel, not its smallest",
        "        sign = tl.where(scale < 0, -1.0, 1.0)\n        best *= sign\n",
        "        sign = tl.where(scale < 0, 1.0, 1.0)\n        best *= sign\n",
        "test_matches_reference[2x32x8x8-2x2-float32]",
    ),
    Mutant(
        "where the weight is 0 its gradient is of the largest pixel, not of the first",
        "best = tl.where(scale == 0, x, best * sign)",
        "best = best * sign",
        "test_matches_reference[2x32x8x8-2x2-float32]",
    ),
    Mutant(
        "every one of equal maxima has the gradient",
        "            g = tl.where(wins, 0.0, g)  # to the first maximum alone\n",
        "",
        "test_ties_and_zeros[2x2-1.0]",
    ),
    Mutant(
        "the gradient passes a maximum of exactly 0",
        "    g = tl.where(tl.fma(top - mean, scale, bias) <= 0, 0.0, g) * scale\n",
        "    g = tl.where(tl.fma(top - mean, scale, bias) < 0, 0.0, g) * scale\n",
        "test_ties_and_zeros[1x1-1.0]",
    ),
    Mutant(
        "pixels outside of every window get no gradient through the statistics",
        "        if WC != WO:\n            inside &= (column * PW + k % PW < W)[:, None]\n"
        "        at_k = base + (k // PW * W + k % PW) * C\n        dx = g\n",
        "        inside &= has_out\n"
        "        at_k = base + (k // PW * W + k % PW) * C\n        dx = g\n",
        "test_matches_reference[2x8x4x5-2x2-float32]",
    ),
    Mutant(
        "the ReLU takes what is not a number for 0",
        "    y = tl.maximum(y, 0.0, propagate_nan=tl.PropagateNan.ALL)\n",
        "    y = tl.where(y > 0, y, 0.0)\n",
        "test_not_a_number_is_not_rectified_away[3]",
    ),
    Mutant(
        "the running variance is the biased one",
        "_update(bn, mean, var * (n / (n - 1)))",
        "_update(bn, mean, var)",
        "test_module_trains_and_evaluates_as_torch[2x2-0.1]",
    ),
]
