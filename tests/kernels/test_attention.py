"""attention: the library path and the Triton kernels against the definition, and the mask."""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from fastat_kernels import attention as module
from fastat_kernels.attention import (
    Config,
    Split,
    _bwd,
    _bwd_configs,
    _bwd_plain,
    _bwd_triton,
    _fwd,
    _fwd_configs,
    _fwd_plain,
    _fwd_triton,
    _keep_ref,
    _supported,
    _threshold,
    _undrop,
    attention,
    attention_ref,
)
from fastat_kernels.backend import target
from tests.kernels.check import assert_as_good_as_eager
from tests.kernels.mutant import Mutant

DTYPES = [torch.float32, torch.bfloat16, torch.float16]

# (B, N, H, Dh): ours at A4, one token, a prime, a head width of floor(1024 / 12)
SHAPES = [(2, 100, 8, 128), (3, 1, 2, 8), (1, 67, 4, 32), (2, 33, 12, 85)]

# (B, N, H, Dh, dropout): AST at A3 and A1, CNN+Transformer at A4 (8 and 12 heads) and A2 (both
# embeddings), Transformer at A4 (8 and 4 heads) and A2, Conformer at A4 and A2
MODEL_SHAPES = [
    (80, 345, 12, 64, 0.0),
    (20, 1214, 12, 64, 0.0),
    (448, 100, 8, 128, 0.75),
    (448, 100, 12, 85, 0.75),
    (400, 256, 8, 128, 0.25),
    (400, 256, 8, 256, 0.25),
    (448, 400, 8, 96, 0.1),
    (448, 400, 4, 192, 0.1),
    (400, 1024, 8, 96, 0.1),
    (448, 100, 12, 64, 0.1),
    (400, 256, 12, 64, 0.1),
]

SMALL = Config(32, 32, 4, 1)
WIDE = Config(16, 64, 4, 1)
TALL = Config(64, 16, 4, 1)

# (B, N, H, Dh, dropout, forward, backward); None: the launcher's choice
CASES = [
    (1, 33, 2, 64, 0.0, None, None),  # one tile of keys
    (3, 1, 2, 8, 0.0, None, None),
    (1, 70, 1, 40, 0.0, SMALL, SMALL),  # several tiles, a ragged last one, 40 = 32 + 16
    (2, 40, 1, 40, 0.3, SMALL, Split(SMALL, SMALL)),
    (1, 67, 1, 85, 0.5, TALL, WIDE),
    (1, 67, 1, 85, 0.0, TALL, Split(WIDE, TALL)),
    (1, 64, 1, 96, 0.1, SMALL, SMALL),  # whole tiles
    (1, 64, 1, 96, 0.75, WIDE, Split(TALL, WIDE)),
    (1, 129, 1, 16, 0.25, None, None),  # one past a block's edge
    (1, 20, 1, 192, 0.0, None, None),
    (1, 20, 1, 256, 0.2, None, None),
]


def case_id(value: object) -> str | None:
    return "x".join(map(str, value)) if isinstance(value, tuple) else None


def dtype_id(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def eager(qkv: Tensor, keep: Tensor | None = None, p: float = 0.0) -> Tensor:
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    weights = (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(-1)
    if keep is not None:
        weights = weights * keep.to(weights.dtype) * _undrop(p)
    out: Tensor = (weights @ v).transpose(1, 2).flatten(2)
    return out


def draw_seed(device: torch.device) -> Tensor:
    return torch.randint(0, 2**63 - 1, (1,), device=device)


# --------------------------------------------------------------------------- the library path
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_matches_eager(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    B, N, H, D = shape
    qkv = torch.randn(B, N, 3, H, D, device=device).to(dtype).requires_grad_()
    dout = torch.randn(B, N, H * D, device=device).to(dtype)
    out = attention(qkv)
    (dqkv,) = torch.autograd.grad(out, qkv, dout)
    got = {"out": out.detach(), "qkv": dqkv}
    assert_as_good_as_eager(eager, (qkv,), dout, got)
    torch.testing.assert_close(out, attention_ref(qkv), rtol=2e-2, atol=2e-2)


def test_dropout_keeps_the_mean_and_zeroes_whole_weights(device: torch.device) -> None:
    """With v = identity the output is the weight matrix itself, so the mask can be read off."""
    N, p = 64, 0.75
    q, k = torch.randn(2, 2, N, 1, N, device=device)
    v = torch.eye(N, device=device).expand(2, N, N).unsqueeze(2)
    qkv = torch.stack([q, k, v], dim=2)  # [B, N, 3, 1, N]
    plain = attention(qkv)
    dropped = torch.stack([attention(qkv, p) for _ in range(50)])
    zero = (dropped == 0).float().mean().item()
    assert zero == pytest.approx(p, abs=0.01)
    kept = dropped[0] != 0
    torch.testing.assert_close(dropped[0][kept], plain[kept] / (1 - p), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("shape", [(2, 5, 3, 4), (2, 5, 2, 4, 8)])
def test_rejects_bad_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"\[B, N, 3, H, Dh\]"):
        attention(torch.rand(shape))


@pytest.mark.parametrize("p", [-0.1, 1.0])
def test_rejects_bad_dropout(p: float) -> None:
    with pytest.raises(ValueError, match="dropout_p"):
        attention(torch.rand(1, 2, 3, 1, 4), p)


# --------------------------------------------------------------------------- the kernels
def check_kernels(
    qkv: Tensor,
    dout: Tensor,
    p: float,
    fwd: Config | None = None,
    bwd: Config | Split | None = None,
    floor: float | None = None,
) -> None:
    B, N, _, H, _ = qkv.shape
    seed = draw_seed(qkv.device) if p else None
    out, lse = _fwd_triton(qkv, seed, p, config=fwd)
    dqkv = _bwd_triton(dout, qkv, out, lse, seed, p, config=bwd)
    keep = None if seed is None else _keep_ref(seed, B, N, H, p)
    got = {"out": out, "qkv": dqkv}
    assert_as_good_as_eager(lambda x: eager(x, keep, p), (qkv,), dout, got, floor=floor)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("case", CASES, ids=lambda c: "x".join(map(str, c[:5])) + "-" + kind(c[6]))
def test_kernels_match_eager(
    case: tuple[Any, ...], dtype: torch.dtype, device: torch.device
) -> None:
    B, N, H, D, p, fwd, bwd = case
    qkv = torch.randn(B, N, 3, H, D, device=device).to(dtype)
    dout = torch.randn(B, N, H * D, device=device).to(dtype)
    check_kernels(qkv, dout, p, fwd, bwd)


def kind(config: Config | Split | None) -> str:
    return "chosen" if config is None else "split" if isinstance(config, Split) else "fused"


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="the interpreter is too slow")
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("shape", MODEL_SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_kernels_match_eager_at_model_shapes(
    shape: tuple[int, int, int, int, float], dtype: torch.dtype, device: torch.device
) -> None:
    """Every candidate, at the model's length and width; the float64 reference bounds the batch."""
    B, N, H, D, p = shape
    B = min(B, 32, max(1, (1 << 26) // (H * N * N)))
    qkv = torch.randn(B, N, 3, H, D, device=device).to(dtype)
    dout = torch.randn(B, N, H * D, device=device).to(dtype)
    arch = target(qkv)
    for fwd in _fwd_configs(arch, dtype, D):
        for bwd in _bwd_configs(arch, dtype, N, D, B * H):
            check_kernels(qkv, dout, p, fwd, bwd)


@pytest.mark.parametrize("layout", ["time first", "width first", "projected apart"])
def test_any_strides(layout: str, device: torch.device) -> None:
    B, N, H, D = 2, 37, 2, 24
    if layout == "time first":
        qkv = torch.randn(N, B, 3, H, D, device=device).transpose(0, 1)
    elif layout == "width first":
        qkv = torch.randn(B, N, D, H, 3, device=device).transpose(2, 4)
    else:
        qkv = torch.randn(3, B, N, H, D, device=device).permute(1, 2, 0, 3, 4)
    dout = torch.randn(H * D, N, B, device=device).permute(2, 1, 0)
    check_kernels(qkv, dout, 0.25)


def test_scores_of_any_size(device: torch.device) -> None:
    """Rows whose largest score is far from 0, where a key beyond the end must not weigh in."""
    B, N, H, D = 1, 37, 1, 16
    qkv = torch.randn(B, N, 3, H, D, device=device)
    qkv[:, :, 0] = 30.0
    qkv[:, :, 1] = qkv[:, :, 1] * 0.1 - 30
    dout = torch.randn(B, N, H * D, device=device)
    q, k = qkv[:, :, 0], qkv[:, :, 1]
    # A score's own rounding is a relative error of its weight. It depends on the order in which a
    # processor sums, and so does whether eager's errors happen to be small.
    largest = (q.abs().amax(-1) * k.abs().sum(-1)).max().item() / D**0.5
    floor = 4 * torch.finfo(torch.float32).eps * largest
    for bwd in (SMALL, Split(SMALL, SMALL)):
        with np.errstate(over="ignore", invalid="ignore"):  # in rows that are not stored
            check_kernels(qkv, dout, 0.0, SMALL, bwd, floor)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_operators_default_agrees_with_their_kernels(
    dtype: torch.dtype, device: torch.device
) -> None:
    """Plain torch and the Triton launchers are two implementations of one operator."""
    qkv = torch.randn(2, 35, 3, 2, 24, device=device).to(dtype)
    dout = torch.randn(2, 35, 48, device=device).to(dtype)
    seed = draw_seed(device)
    rtol, atol = (1e-4, 1e-5) if dtype == torch.float32 else (2e-2, 2e-2)
    for s, p in ((None, 0.0), (seed, 0.4)):
        want, lse = _fwd_plain(qkv, s, p)
        got = _fwd_triton(qkv, s, p)
        torch.testing.assert_close(got[0], want, rtol=rtol, atol=atol)
        torch.testing.assert_close(got[1], lse, rtol=1e-3, atol=1e-3)
        dqkv = _bwd_plain(dout, qkv, want, lse, s, p)
        got_dqkv = _bwd_triton(dout, qkv, want, lse, s, p)
        torch.testing.assert_close(got_dqkv, dqkv, rtol=rtol, atol=atol)


def test_same_seed_same_bits(device: torch.device) -> None:
    qkv = torch.randn(1, 40, 3, 2, 16, device=device).bfloat16()
    dout = torch.randn(1, 40, 32, device=device).bfloat16()
    seed = draw_seed(device)
    for bwd in (SMALL, Split(SMALL, SMALL)):
        runs = []
        for _ in range(2):
            out, lse = _fwd_triton(qkv, seed, 0.3, config=SMALL)
            runs.append((out, lse, _bwd_triton(dout, qkv, out, lse, seed, 0.3, config=bwd)))
        for one, two in zip(*runs, strict=True):
            assert torch.equal(one, two)


@pytest.mark.parametrize("shape", [(0, 5, 3, 2, 8), (2, 0, 3, 2, 8)])
def test_nothing_to_do(shape: tuple[int, ...], device: torch.device) -> None:
    qkv = torch.randn(shape, device=device)
    out, lse = _fwd_triton(qkv, None, 0.0)
    assert out.shape == (shape[0], shape[1], 16) and lse.shape == (shape[0], 2, shape[1])
    assert _bwd_triton(out, qkv, out, lse, None, 0.0).shape == shape


# --------------------------------------------------------------------------- the mask
@pytest.mark.parametrize(
    "config", [SMALL, WIDE, TALL, None], ids=["32x32", "16x64", "64x16", "chosen"]
)
def test_kernels_apply_the_reference_mask(config: Config | None, device: torch.device) -> None:
    """Equal weights and v = dout = identity: out and dv are the mask, whatever the tiles."""
    B, N, H, p = 1, 40, 2, 0.4
    qkv = torch.zeros(B, N, 3, H, N, device=device)
    qkv[:, :, 2] = torch.eye(N, device=device).unsqueeze(1)
    seed = draw_seed(device)
    keep = _keep_ref(seed, B, N, H, p)  # [B, H, query, key]
    out, lse = _fwd_triton(qkv, seed, p, config=config)
    assert torch.equal(out.view(B, N, H, N).transpose(1, 2) != 0, keep)
    dout = torch.eye(N, device=device).repeat(1, H).expand(B, N, H * N)
    for bwd in (config, config and Split(config, config)):
        dv = _bwd_triton(dout, qkv, out, lse, seed, p, config=bwd)[:, :, 2]  # [B, key, H, query]
        assert torch.equal(dv.permute(0, 2, 3, 1) != 0, keep)


def z(values: Tensor, draws: int) -> float:
    """Mean of standardised values, in standard deviations of what ``draws`` of them have."""
    return values.double().mean().item() * math.sqrt(draws)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.75])
def test_mask_is_a_fair_draw(p: float) -> None:
    """Means, rows, columns, neighbours, rectangles, heads and seeds, against independent draws."""
    N, H, seeds = 256, 8, [0, 1, 12345678901234567, 2**63 - 2]
    masks = torch.stack([_keep_ref(torch.tensor([s]), 1, N, H, p)[0] for s in seeds]).double()
    assert masks.mean().item() == pytest.approx(1 - p, abs=4 / math.sqrt(masks.numel()))
    x = (masks - (1 - p)) / math.sqrt(p * (1 - p))  # [seed, head, query, key]
    count = x.numel()
    assert abs(z(x, count)) < 4
    for axis in (2, 3):  # sums over queries and over keys are chi-square
        total = (x.sum(axis) ** 2 / N).sum().item()
        assert 1e-4 < stats.chi2.sf(total, count // N) < 1 - 1e-4
    assert abs(z(x[..., 1:] * x[..., :-1], count)) < 4
    assert abs(z(x[..., 1:, :] * x[..., :-1, :], count)) < 4
    assert abs(z(x[:, 1:] * x[:, :-1], count)) < 4.5  # one head and the next
    assert abs(z(x[1:] * x[:-1], count)) < 4.5  # one seed and the next
    corners = x[..., 0::2, 0::2] * x[..., 1::2, 0::2] * x[..., 0::2, 1::2] * x[..., 1::2, 1::2]
    assert abs(z(corners, corners.numel())) < 4
    for pairs in (x @ x.transpose(-2, -1), x.transpose(-2, -1) @ x):  # of all rows, all columns
        off = pairs[..., *torch.triu_indices(N, N, 1)] / math.sqrt(N)
        assert off.abs().max().item() < 7.5
        # Each pair's square has mean 1: all N^4 / 4 rectangles of a head at once.
        assert off.square().mean().item() == pytest.approx(1, abs=0.01)


def test_mask_of_blocks_is_uniform() -> None:
    """Counts in 8 x 8 blocks follow the binomial distribution."""
    p = 0.5
    keep = _keep_ref(torch.tensor([987654321]), 2, 512, 4, p).double()
    kept = keep.unfold(2, 8, 8).unfold(3, 8, 8).sum((-2, -1)).flatten().long()
    edges = torch.arange(22, 43)
    seen = torch.bincount(kept, minlength=65).double()
    want = torch.tensor(stats.binom.pmf(np.arange(65), 64, 1 - p)) * kept.numel()
    inside = [torch.cat([x[:22].sum()[None], x[edges], x[43:].sum()[None]]) for x in (seen, want)]
    assert 1e-3 < stats.chisquare(*inside).pvalue < 1 - 1e-6


@pytest.mark.parametrize("p", [0.0, 1e-9, 0.1, 0.75, 1 - 2**-24, 1 - 1e-12])
def test_probability_is_exact_to_31_bits(p: float) -> None:
    drop = _threshold(p)
    assert drop % 2 == 0 and 0 <= drop < 2**32
    assert drop / 2**32 == pytest.approx(p, abs=2**-31)
    assert _undrop(p) * (1 - drop / 2**32) == pytest.approx(1)


# --------------------------------------------------------------------------- operator and public
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_opcheck(p: float, device: torch.device) -> None:
    qkv = torch.randn(2, 5, 3, 2, 8, device=device, requires_grad=True)
    seed = draw_seed(device) if p else None
    torch.library.opcheck(_fwd, (qkv, seed, p))
    out, lse = (x.detach() for x in _fwd(qkv, seed, p))
    torch.library.opcheck(_bwd, (torch.randn_like(out), qkv.detach(), out, lse, seed, p))


def grads(qkv: Tensor, dout: Tensor, run: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    out = run(qkv)
    (dqkv,) = torch.autograd.grad(out, qkv, dout)
    return {"out": out.detach(), "qkv": dqkv}


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_public_function(triton_everywhere: None, dtype: torch.dtype, device: torch.device) -> None:
    qkv = torch.randn(2, 33, 3, 2, 20, device=device).to(dtype).requires_grad_()
    dout = torch.randn(2, 33, 40, device=device).to(dtype)
    assert_as_good_as_eager(eager, (qkv,), dout, grads(qkv, dout, attention))


def test_public_function_draws_its_seed(triton_everywhere: None, device: torch.device) -> None:
    """From the device's generator, whose state therefore decides the mask."""
    qkv = torch.randn(2, 33, 3, 2, 16, device=device, requires_grad=True)
    dout = torch.randn(2, 33, 32, device=device)
    torch.manual_seed(7)
    seed = draw_seed(device)
    keep = _keep_ref(seed, 2, 33, 2, 0.5)
    torch.manual_seed(7)
    got = grads(qkv, dout, lambda x: attention(x, 0.5))
    assert_as_good_as_eager(lambda x: eager(x, keep, 0.5), (qkv,), dout, got)
    assert not torch.equal(got["out"], attention(qkv, 0.5).detach())


def test_activation_checkpointing(triton_everywhere: None, device: torch.device) -> None:
    qkv = torch.randn(2, 20, 3, 2, 16, device=device, requires_grad=True)
    dout = torch.randn(2, 20, 32, device=device)
    torch.manual_seed(3)
    want = grads(qkv, dout, lambda x: attention(x.sin(), 0.5))
    torch.manual_seed(3)
    got = grads(
        qkv, dout, lambda x: checkpoint(lambda y: attention(y.sin(), 0.5), x, use_reentrant=False)
    )
    for name in want:
        assert torch.equal(got[name], want[name]), name


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_second_derivatives_raise(triton_everywhere: None, p: float, device: torch.device) -> None:
    qkv = torch.randn(1, 5, 3, 2, 8, device=device, requires_grad=True)
    (dqkv,) = torch.autograd.grad(attention(qkv, p).sum(), qkv, create_graph=True)
    with pytest.raises(RuntimeError, match="attention_bwd"):
        dqkv.sum().backward()


def test_autocast(triton_everywhere: None, device: torch.device) -> None:
    qkv = torch.randn(2, 20, 3, 2, 16, device=device, requires_grad=True)
    dout = torch.randn(2, 20, 32, device=device).bfloat16()
    with torch.autocast(device.type, torch.bfloat16):
        out = attention(qkv)
    assert out.dtype == torch.bfloat16
    (dqkv,) = torch.autograd.grad(out, qkv, dout)
    assert dqkv.dtype == torch.float32
    got = {"out": out.detach(), "qkv": dqkv.bfloat16()}
    assert_as_good_as_eager(eager, (qkv.detach().bfloat16(),), dout, got)


def test_compiles_whole_for_any_length(triton_everywhere: None, device: torch.device) -> None:
    p = 0.5
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    run = torch.compile(lambda x: attention(x, p), fullgraph=True, backend=counter)
    for N in (20, 33, 40):
        qkv = torch.randn(1, N, 3, 2, 16, device=device, requires_grad=True)
        dout = torch.randn(1, N, 32, device=device)
        torch.manual_seed(5)
        want = grads(qkv, dout, lambda x: attention(x, p))
        torch.manual_seed(5)
        got = grads(qkv, dout, run)
        for name in want:
            torch.testing.assert_close(got[name], want[name], rtol=0, atol=0)
    assert counter.frame_count <= 3


@pytest.mark.parametrize(
    "D, dtype",
    [(272, torch.float16), (128, torch.float32), (100, torch.float16), (16, torch.float64)],
    ids=["wide", "wide in float32", "wide and odd", "float64"],
)
def test_leaves_the_rest_to_the_library(
    D: int,
    dtype: torch.dtype,
    triton_everywhere: None,
    monkeypatch: pytest.MonkeyPatch,
    device: torch.device,
) -> None:
    monkeypatch.setattr(module, "_fwd", None)
    qkv = torch.randn(1, 5, 3, 1, D, device=device, dtype=dtype)
    torch.testing.assert_close(attention(qkv), eager(qkv), rtol=1e-2, atol=1e-3)


# --------------------------------------------------------------------------- launches, mutants
def _meta(
    B: int, N: int, H: int, D: int, p: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    qkv = torch.empty(B, N, 3, H, D, dtype=dtype, device="meta")
    out = torch.empty(B, N, H * D, dtype=dtype, device="meta")
    lse = torch.empty(B, H, N, device="meta")
    return qkv, out, lse, torch.empty(1, dtype=torch.int64, device="meta") if p else None


IN_OTHER_DTYPES = [(80, 345, 12, 64, 0.0), (400, 256, 12, 64, 0.1)]


def _problem(B: int, N: int, H: int, D: int, p: float, dtype: torch.dtype) -> str:
    return f"{B}x{N}x{H}x{D} dropout {p} {dtype_id(dtype)}"


def launches() -> Iterator[tuple[str, Callable[[], object]]]:
    """Every launch that the models make, on meta tensors."""
    shapes = [(s, torch.bfloat16) for s in MODEL_SHAPES]
    shapes += [(s, dtype) for s in IN_OTHER_DTYPES for dtype in (torch.float32, torch.float16)]
    for (B, N, H, D, p), dtype in shapes:
        qkv, out, lse, seed = _meta(B, N, H, D, p, dtype)
        if not _supported(target(qkv), dtype, D):
            continue
        label = _problem(B, N, H, D, p, dtype)
        yield f"forward {label}", partial(_fwd_triton, qkv, seed, p)
        yield f"backward {label}", partial(_bwd_triton, out, qkv, out, lse, seed, p)


def candidates() -> Iterator[tuple[str, Callable[[], object]]]:
    """The configurations that are not the launcher's choice."""
    dtype = torch.bfloat16
    for B, N, H, D, p in MODEL_SHAPES:
        qkv, out, lse, seed = _meta(B, N, H, D, p, dtype)
        label = _problem(B, N, H, D, p, dtype)
        arch = target(qkv)
        if not _supported(arch, dtype, D):
            continue
        for f in _fwd_configs(arch, dtype, D)[1:]:
            yield f"forward {label} @ {_written(f)}", partial(_fwd_triton, qkv, seed, p, f)
        for b in _bwd_configs(arch, dtype, N, D, B * H)[1:]:
            run = partial(_bwd_triton, out, qkv, out, lse, seed, p, b)
            yield f"backward {label} @ {_written(b)}", run


def _written(config: Config | Split) -> str:
    if isinstance(config, Split):
        return f"dq {tuple(config.dq)} dkdv {tuple(config.dkdv)}"
    return str(tuple(config))


MUTANTS = [
    Mutant(
        "keys beyond the end take part",
        's = tl.where((first + tl.arange(0, KEYS) < N)[None, :], s, float("-inf"))\n    new_top',
        "s = s\n    new_top",
        "test_kernels_match_eager[1x33x2x64x0.0-chosen-float32]",
    ),
    Mutant(
        "the sum so far keeps its old scale",
        "tl.dot(p, v, acc0 * shrink[:, None]",
        "tl.dot(p, v, acc0",
        "test_kernels_match_eager[1x70x1x40x0.0-fused-float32]",
    ),
    Mutant(
        "a tile of keys overwrites what the one before gave to dq",
        "            dq += tl.load(p)\n",
        "            dq = dq\n",
        "test_kernels_match_eager[1x70x1x40x0.0-fused-float32]",
    ),
    Mutant(
        "the backward's mask starts anew at every tile of queries",
        "row = _odd_hash(rows, start, BLOCK_Q)",
        "row = _odd_hash(rows, 0, BLOCK_Q)",
        "test_kernels_match_eager[2x40x1x40x0.3-split-float32]",
    ),
    Mutant(
        "the mean of the weights' gradients is scaled as without dropout",
        "return delta * (1 / UNDROP)",
        "return delta",
        "test_kernels_match_eager[2x40x1x40x0.3-split-float32]",
    ),
    Mutant(
        "the row's log-sum is natural",
        "top + tl.log2(total)",
        "top + tl.log(total)",
        "test_kernels_match_eager[1x33x2x64x0.0-chosen-float32]",
    ),
    Mutant(
        "a key of zeros has an infinite weight",
        "if FUSED and RAGGED:",
        "if False:",
        "test_scores_of_any_size",
    ),
    Mutant(
        "half of the seed is not used",
        "(seed >> 32).to(tl.uint32)",
        "seed.to(tl.uint32)",
        "test_kernels_apply_the_reference_mask[32x32]",
    ),
]
