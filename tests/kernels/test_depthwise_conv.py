"""depthwise_conv: Triton against float64, forward and every gradient."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastat_kernels import depthwise_conv as module
from fastat_kernels.backend import NUM_SMS
from fastat_kernels.depthwise_conv import (
    Config,
    _bwd,
    _bwd_plain,
    _bwd_triton,
    _configs,
    _fwd,
    _fwd_plain,
    _fwd_triton,
    depthwise_conv,
    depthwise_conv_ref,
)
from tests.kernels.check import assert_as_good_as_eager
from tests.kernels.mutant import Mutant

EPS = 1e-5
# (B, N, D, k): blocks that divide, one token, one past both blocks with N < k, odd everything,
# the widest kernel
SHAPES = [(2, 8, 64, 1), (1, 1, 5, 15), (2, 9, 65, 15), (2, 19, 33, 31), (1, 13, 7, 63)]
MODEL_SHAPES = (
    [(448, 100, 768, 15), (448, 100, 768, 31), (100, 256, 768, 15)]
    if torch.cuda.is_available()
    else []
)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""x, weight, bias, norm_weight, norm_bias."""
CHUNKED = Config(32, 4, 8, 1, 4, 32, 4)
"""Work items of 8 tokens, and as few programs as there are multiprocessors."""


def eager(
    x: Tensor, weight: Tensor, bias: Tensor, norm_weight: Tensor, norm_bias: Tensor
) -> Tensor:
    """The library's way: what the model did before."""
    D, _, k = weight.shape
    y = F.conv1d(F.glu(x).transpose(1, 2), weight, bias, padding=k // 2, groups=D)
    return F.silu(F.group_norm(y, 1, norm_weight, norm_bias, EPS)).transpose(1, 2)


def problem(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> tuple[Inputs, Tensor]:
    B, N, D, k = shape
    x = torch.randn(B, N, 2 * D, device=device)
    weight = torch.randn(D, 1, k, device=device) / k**0.5
    bias, norm_bias = torch.randn(2, D, device=device)
    norm_weight = 1 + 0.3 * torch.randn(D, device=device)
    dout = torch.randn(B, N, D, device=device).to(dtype)
    inputs = (x, weight, bias, norm_weight, norm_bias)
    return cast(Inputs, tuple(t.to(dtype) for t in inputs)), dout


def through_kernels(
    inputs: Inputs, dout: Tensor, config: Config | None = None
) -> dict[str, Tensor]:
    x, weight, bias, norm_weight, norm_bias = inputs
    out, y, stats = _fwd_triton(x, weight, bias, norm_weight, norm_bias, EPS, config=config)
    grads = _bwd_triton(dout, x, weight, norm_weight, norm_bias, y, stats, config=config)
    names = ("x", "weight", "bias", "norm_weight", "norm_bias")
    return {"out": out} | dict(zip(names, grads, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("shape", SHAPES + MODEL_SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_matches_eager(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    inputs, dout = problem(shape, dtype, device)
    got = through_kernels(inputs, dout)
    assert_as_good_as_eager(eager, inputs, dout, got)


def test_several_chunks_of_a_clip_and_several_a_program(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """21 tokens in chunks of 8, 12 items for 3 programs of each of two channel blocks."""
    monkeypatch.setattr("fastat_kernels.depthwise_conv.NUM_SMS", dict.fromkeys(NUM_SMS, 6))
    inputs, dout = problem((4, 21, 40, 5), torch.float32, device)
    split = module._split(inputs[0], 21, 40, CHUNKED)
    assert split == (8, 3, 12, 2, 3)
    assert_as_good_as_eager(eager, inputs, dout, through_kernels(inputs, dout, CHUNKED))


def test_strided(device: torch.device) -> None:
    """Rows of a wider tensor, channels that are not contiguous, an expanded dout."""
    (x, *params), _ = problem((2, 6, 10, 3), torch.float32, device)
    wide = torch.randn(2, 12, 25, device=device)[:, ::2, 3:23]
    turned = x.transpose(1, 2).contiguous().transpose(1, 2)
    sliced = torch.randn(2, 6, 15, device=device)[:, :, :10]
    for strided, dout in ((wide, sliced), (turned, torch.ones((), device=device).expand(2, 6, 10))):
        inputs = cast(Inputs, (strided, *params))
        assert_as_good_as_eager(eager, inputs, dout, through_kernels(inputs, dout))


@pytest.mark.parametrize("mean", [1e2, 1e4])
def test_large_mean(mean: float, device: torch.device) -> None:
    """The variance does not drown in the square of the mean."""
    (x, weight, bias, scale, shift), dout = problem((2, 21, 33, 3), torch.float32, device)
    inputs = (x, weight, bias + mean, scale, shift)
    assert_as_good_as_eager(eager, inputs, dout, through_kernels(inputs, dout, CHUNKED))
    _, _, stats = _fwd_triton(*inputs, EPS)
    y = module._convolved(x.double(), weight, bias).double()
    want = y.var((1, 2), correction=0).add(EPS).rsqrt()
    torch.testing.assert_close(stats[:, 1].double(), want, rtol=1e-7 * mean + 1e-5, atol=0)


def test_a_clip_depends_on_itself_alone(device: torch.device) -> None:
    (x, w, b, scale, shift), _ = problem((3, 9, 20, 15), torch.float32, device)
    alone = _fwd_triton(x[1:2], w, b, scale, shift, EPS)[0]
    x[0], x[2] = float("nan"), float("inf")
    assert torch.equal(_fwd_triton(x, w, b, scale, shift, EPS)[0][1:2], alone)


def test_saturated_gates_and_outputs(device: torch.device) -> None:
    """exp overflows in both sigmoids: gradients stay finite."""
    (x, weight, bias, norm_weight, norm_bias), dout = problem((1, 8, 6, 3), torch.float32, device)
    x[..., 6:] = torch.tensor([-200.0, 200.0], device=device).repeat(3)
    inputs = (x, weight, bias, 200 * norm_weight, norm_bias)
    assert_as_good_as_eager(eager, inputs, dout, through_kernels(inputs, dout))


def test_same_bits_twice(device: torch.device) -> None:
    inputs, dout = problem((2, 9, 33, 15), torch.bfloat16, device)
    first, second = (through_kernels(inputs, dout) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_plain_and_kernel_are_one_operator(device: torch.device) -> None:
    inputs, dout = problem((2, 9, 20, 15), torch.float32, device)
    x, weight, _, norm_weight, norm_bias = inputs
    plain, kernel = _fwd_plain(*inputs, EPS), _fwd_triton(*inputs, EPS)
    torch.testing.assert_close(kernel, plain, rtol=1e-5, atol=1e-5)
    _, y, stats = plain
    saved = (dout, x, weight, norm_weight, norm_bias, y, stats)
    torch.testing.assert_close(_bwd_triton(*saved), _bwd_plain(*saved), rtol=1e-4, atol=1e-5)


def test_opcheck(device: torch.device) -> None:
    inputs, dout = problem((2, 5, 4, 3), torch.float32, device)
    x, weight, _, norm_weight, norm_bias = inputs
    _, y, stats = _fwd_plain(*inputs, EPS)
    torch.library.opcheck(_bwd, (dout, x, weight, norm_weight, norm_bias, y, stats))
    torch.library.opcheck(_fwd, (*(t.clone().requires_grad_() for t in inputs), EPS))


def test_public_function_through_the_kernels(triton_everywhere: None, device: torch.device) -> None:
    inputs, dout = problem((2, 9, 20, 15), torch.float32, device)
    for t in inputs:
        t.requires_grad_()
    out = depthwise_conv(*inputs)
    grads = torch.autograd.grad(out, inputs, dout)
    names = ("x", "weight", "bias", "norm_weight", "norm_bias")
    got = {"out": out.detach()} | dict(zip(names, grads, strict=True))
    assert_as_good_as_eager(eager, inputs, dout, got)


def layers(width: int, k: int, device: torch.device) -> tuple[nn.Conv1d, nn.GroupNorm]:
    conv = nn.Conv1d(width, width, k, padding=k // 2, groups=width).to(device)
    norm = nn.GroupNorm(1, width).to(device)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return conv, norm


class Module(nn.Module):
    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 16).to(device)
        self.conv, self.norm = layers(8, 5, device)

    def forward(self, x: Tensor) -> Tensor:
        parameters = (self.conv.weight, self.conv.bias, self.norm.weight, self.norm.bias)
        return depthwise_conv(self.linear(x), *parameters, self.norm.eps)  # type: ignore[arg-type]


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("kernel", [False, True], ids=["plain", "kernel"])
def test_compiles_whole(
    kernel: bool, autocast: bool, request: pytest.FixtureRequest, device: torch.device
) -> None:
    """Full graph, gradients and all; parameters stay float32, the output is autocast's."""
    if kernel:
        request.getfixturevalue("triton_everywhere")
    model = Module(device)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 6, 12, device=device)
    results = []
    for run in (model, compiled):
        model.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            out = run(x)
        assert out.dtype == (torch.bfloat16 if autocast else torch.float32)
        out.square().sum().backward()
        results.append([out.detach(), *(p.grad.clone() for p in model.parameters())])  # type: ignore[union-attr]
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)
    assert all(grad.dtype == torch.float32 for grad in results[0][1:])


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
def test_on_a_cpu_it_is_the_layers(autocast: bool) -> None:
    """The same bits as torch's modules, one after another."""
    conv, norm = layers(24, 15, torch.device("cpu"))
    x = torch.randn(3, 17, 48)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        x = x.bfloat16() if autocast else x
        want = F.silu(norm(conv(F.glu(x).transpose(1, 2)))).transpose(1, 2)
        got = depthwise_conv(x, conv.weight, conv.bias, norm.weight, norm.bias, norm.eps)  # type: ignore[arg-type]
    assert torch.equal(got, want.to(got.dtype))
    assert got.dtype == x.dtype


def test_shapes_alone_suffice() -> None:
    """On the meta device, where costs are counted."""
    inputs, _ = problem((2, 9, 20, 15), torch.float32, torch.device("meta"))
    assert depthwise_conv(*inputs).shape == (2, 9, 20)


def test_reference_is_eager_in_float32() -> None:
    inputs, _ = problem((2, 9, 20, 15), torch.float32, torch.device("cpu"))
    got = depthwise_conv_ref(*inputs, EPS)
    torch.testing.assert_close(got, eager(*inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "change, message",
    [
        ({0: (2, 5, 7)}, r"x must be \[B, N, 8\]"),
        ({0: (5, 8)}, r"x must be \[B, N, 8\]"),
        ({1: (4, 1, 4)}, "odd and at most 63, got 4"),
        ({1: (4, 1, 65)}, "odd and at most 63, got 65"),
        ({1: (4, 2, 3)}, r"weight must be \[D, 1, k\]"),
        ({3: (5,)}, r"must be \[4\], got \(4,\), \(5,\), \(4,\)"),
    ],
)
def test_rejects_bad_shapes(change: dict[int, tuple[int, ...]], message: str) -> None:
    shapes: list[tuple[int, ...]] = [(2, 5, 8), (4, 1, 3), (4,), (4,), (4,)]
    for at, shape in change.items():
        shapes[at] = shape
    with pytest.raises(ValueError, match=message):
        depthwise_conv(*cast(Inputs, tuple(torch.rand(shape) for shape in shapes)))


# ------------------------------------------------ ahead of time: tests/kernels/aot.py
def _launch(
    direction: str, shape: tuple[int, ...], dtype: torch.dtype, config: Config | None
) -> object:
    B, N, D, k = shape
    empty = partial(torch.empty, device="meta")
    x, y = empty(B, N, 2 * D, dtype=dtype), empty(B, N, D, dtype=dtype)
    weight, vector = empty(D, 1, k), empty(D)  # float32: the model's, under autocast
    if direction == "fwd":
        return _fwd_triton(x, weight, vector, vector, vector, EPS, config=config)
    return _bwd_triton(y, x, weight, vector, vector, y, empty(B, 2), config=config)


def launches() -> Iterator[tuple[str, Callable[[], object]]]:
    """Every launch that the models make, on meta tensors: (label, call)."""
    for dtype in DTYPES:
        name = str(dtype).removeprefix("torch.")
        for k in (15, 31):
            for direction in ("fwd", "bwd"):
                shape = (448, 100, 768, k)
                yield f"{direction} k {k} {name}", partial(_launch, direction, shape, dtype, None)
    for direction in ("fwd", "bwd"):
        shape = (8, 101, 768, 15)
        yield f"{direction} odd N", partial(_launch, direction, shape, torch.bfloat16, None)


def candidates() -> Iterator[tuple[str, Callable[[], object]]]:
    """The same for the configurations that are only timed."""
    for k in (15, 31):
        for direction in ("fwd", "bwd"):
            for config in _configs(90, k, backward=direction == "bwd")[1:]:
                call = partial(_launch, direction, (448, 100, 768, k), torch.bfloat16, config)
                yield f"{direction} k {k} bfloat16 @ {'/'.join(map(str, config))}", call


MUTANTS = [
    Mutant(
        "the gate is not applied",
        "    return a * _sigmoid(g)\n",
        "    return a * g\n",
        "test_matches_eager[1x1x5x15-float32]",
    ),
    Mutant(
        "the kernel is mirrored",
        "acc += w[j] * seen[r + j]",
        "acc += w[K - 1 - j] * seen[r + j]",
        "test_matches_eager[2x9x65x15-float32]",
    ),
    Mutant(
        "tokens before the clip are read",
        "return md & (n >= 0) & (n < N)",
        "return md & (n < N)",
        "test_a_clip_depends_on_itself_alone",
    ),
    Mutant(
        "the variance is taken of squares",
        "dev = tl.where(mask, acc - pivot, 0.0)",
        "dev = tl.where(mask, acc, 0.0)",
        "test_large_mean[10000.0]",
    ),
    Mutant(
        "the spread between channels is left out of the variance",
        "m2 = tl.sum(m2_d + tokens * between * between, 0)",
        "m2 = tl.sum(m2_d, 0)",
        "test_matches_eager[2x9x65x15-float32]",
    ),
    Mutant(
        "one of the norm's two sums is left out of dy",
        "dz * scale - (yhat * c2 + c1)",
        "dz * scale - yhat * c2",
        "test_matches_eager[2x9x65x15-float32]",
    ),
    Mutant(
        "dweight is mirrored",
        "grown = grown + (dw[j] + u * seen[r + K - 1 - j],)",
        "grown = grown + (dw[j] + u * seen[r + j],)",
        "test_matches_eager[2x9x65x15-float32]",
    ),
    Mutant(
        "a program takes its first work item only in the backward pass",
        "        item = tl.cast(i, tl.int64)\n",
        "        item = tl.cast(tl.program_id(1), tl.int64)\n",
        "test_several_chunks_of_a_clip_and_several_a_program",
    ),
]
