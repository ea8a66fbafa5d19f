"""attention: ours, eager, compiled, every backend of torch's SDPA, FlexAttention and flash-attn.

TFLOP/s count 4 B H N^2 Dh forward and 3.5 times that with the backward, whoever computes more.
FASTAT_BENCH_FULL=1 adds the shapes and the peers that take long on a GPU.
"""

import importlib
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.results import DEVICE, DTYPE, FULL, ON_GPU
from bench.timing import DEVICE_CLOCK, timed
from fastat_kernels.attention import (
    Config,
    Split,
    _bwd_configs,
    _bwd_triton,
    _fwd_triton,
    attention,
    attention_ref,
)
from fastat_kernels.backend import kernels, target

pytestmark = DEVICE_CLOCK

Impl = Callable[[Tensor, float], Tensor]

# (B, N, H, Dh), dropout
DEFAULT_SHAPES = {
    "AST A3": ((80, 345, 12, 64), 0.0),
    "AST A1": ((20, 1214, 12, 64), 0.0),
    "CNN+Trans A4": ((448, 100, 8, 128), 0.75),
    "CNN+Trans A4 eval": ((448, 100, 8, 128), 0.0),
    "Transformer A4": ((112, 400, 8, 96), 0.1),
    "Conformer A4": ((448, 100, 12, 64), 0.1),
}
FULL_SHAPES = {
    "CNN+Trans A2 2048": ((100, 256, 8, 256), 0.25),
    "CNN+Trans A2": ((400, 256, 8, 128), 0.25),
    "CNN+Trans A4 12 heads": ((448, 100, 12, 85), 0.75),
    "Transformer A2": ((100, 1024, 8, 96), 0.1),
    "Conformer A2": ((400, 256, 12, 64), 0.1),
}
CPU_SHAPES = {
    "CNN+Trans": ((2, 100, 8, 128), 0.75),
    "AST": ((1, 345, 12, 64), 0.0),
}
SHAPES = CPU_SHAPES if not ON_GPU else DEFAULT_SHAPES | (FULL_SHAPES if FULL else {})

SLOW = {"math", "flex"}
"""Peers that take long to compile or to run: with dropout or in short runs they are left out."""


def ours(qkv: Tensor, p: float) -> Tensor:
    with kernels(["attention"]):
        return attention(qkv, p)


def eager(qkv: Tensor, p: float) -> Tensor:
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    weights = (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(-1)
    out: Tensor = (F.dropout(weights, p) @ v).transpose(1, 2).flatten(2)
    return out


def sdpa(backend: SDPBackend, qkv: Tensor, p: float) -> Tensor:
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    with sdpa_kernel(backend):
        out: Tensor = F.scaled_dot_product_attention(q, k, v, dropout_p=p)
    return out.transpose(1, 2).flatten(2)


def flex(compiled: Callable[..., Tensor], qkv: Tensor, p: float) -> Tensor:
    if p:
        pytest.skip("FlexAttention has no dropout")
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    return compiled(q, k, v).transpose(1, 2).flatten(2)


def flash_attn(qkv: Tensor, p: float) -> Tensor:
    if not find_spec("flash_attn"):
        pytest.skip("flash-attn is not installed")
    flash = importlib.import_module("flash_attn")
    out: Tensor = flash.flash_attn_qkvpacked_func(qkv, dropout_p=p)
    return out.flatten(2)


def peers() -> dict[str, Impl]:
    from torch.nn.attention.flex_attention import flex_attention

    found: dict[str, Impl] = {
        "ours": ours,
        "eager": eager,
        "compiled": torch.compile(eager, dynamic=False),
    }
    if ON_GPU:  # elsewhere ours is the library's
        found |= {
            "library": attention,
            "cudnn": partial(sdpa, SDPBackend.CUDNN_ATTENTION),
            "flash": partial(sdpa, SDPBackend.FLASH_ATTENTION),
            "efficient": partial(sdpa, SDPBackend.EFFICIENT_ATTENTION),
            "math": partial(sdpa, SDPBackend.MATH),
            "flex": partial(flex, torch.compile(flex_attention, dynamic=False)),
            "flash-attn": flash_attn,
        }
    return found


IMPLS = peers()


def inputs(shape: tuple[int, ...], backward: bool) -> tuple[Tensor, Tensor]:
    B, N, H, D = shape
    torch.manual_seed(0)
    qkv = torch.randn(B, N, 3, H, D, device=DEVICE).to(DTYPE).requires_grad_(backward)
    return qkv, torch.randn(B, N, H * D, device=DEVICE).to(DTYPE)


def measured(
    benchmark: BenchmarkFixture, step: Callable[[], object], impl: str, passes: str, label: str
) -> None:
    (B, N, H, D), p = SHAPES[label]
    backward = passes == "fwd+bwd"
    element = torch.finfo(DTYPE).bits // 8
    timed(
        benchmark,
        step,
        op="attention",
        impl=impl,
        passes=passes,
        shape=f"{label} {B}x{N}x{H}x{D} dropout {p}",
        bytes_moved=(4 + 8 * backward) * B * N * H * D * element,
        flop=(3.5 if backward else 1) * 4 * B * H * N * N * D,
        clips=B,
    )


@pytest.mark.parametrize("passes", ["fwd", "fwd+bwd"])
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("label", SHAPES)
def test_attention(benchmark: BenchmarkFixture, label: str, impl: str, passes: str) -> None:
    shape, p = SHAPES[label]
    if impl in SLOW and not FULL and (p or "AST" not in label):
        pytest.skip(f"{impl} is timed on AST; FASTAT_BENCH_FULL=1 adds the rest")
    qkv, dout = inputs(shape, passes == "fwd+bwd")
    run = IMPLS[impl]

    def step(p: float = p) -> Tensor:
        out = run(qkv, p)
        if qkv.requires_grad:
            torch.autograd.grad(out, qkv, dout)
        return out.detach()

    # Dropout's masks differ; without it every implementation computes the same.
    try:
        got = step(0.0) if impl != "compiled" else step()
    except RuntimeError as error:
        if impl not in ("cudnn", "flash", "efficient", "flash-attn"):
            raise
        pytest.skip(f"{impl}: {str(error).splitlines()[0]}")
    if not p or impl != "compiled":
        torch.testing.assert_close(got, attention_ref(qkv.detach()), rtol=2e-2, atol=2e-2)
    else:
        assert torch.isfinite(got).all()
    del got
    try:
        step()
    except RuntimeError as error:
        if impl not in ("cudnn", "flash", "efficient", "flash-attn"):
            raise
        pytest.skip(f"{impl} with dropout: {str(error).splitlines()[0]}")
    measured(benchmark, step, impl, passes, label)


@pytest.mark.skipif(not ON_GPU, reason="times the kernels")
@pytest.mark.parametrize("kind", ["fused", "split"])
@pytest.mark.parametrize("label", SHAPES)
def test_backwards(benchmark: BenchmarkFixture, label: str, kind: str) -> None:
    """The first configuration of each kind of backward, beside the forward that it needs."""
    (B, N, H, D), p = SHAPES[label]
    qkv, dout = inputs((B, N, H, D), False)
    seed = torch.randint(0, 2**63 - 1, (1,), device=DEVICE) if p else None
    wanted = Config if kind == "fused" else Split
    configs = _bwd_configs(target(qkv), DTYPE, N, D, B * H)
    config: Any = next((c for c in configs if isinstance(c, wanted)), None)
    if config is None:
        pytest.skip(f"no {kind} backward for heads of {D}")

    def step() -> Tensor:
        out, lse = _fwd_triton(qkv, seed, p)
        return _bwd_triton(dout, qkv, out, lse, seed, p, config=config)

    leaf = qkv.clone().requires_grad_()
    if not p:
        (want,) = torch.autograd.grad(attention_ref(leaf), leaf, dout)
        torch.testing.assert_close(step(), want, rtol=5e-2, atol=5e-2)
    assert torch.isfinite(step()).all()
    measured(benchmark, step, f"ours {kind}", "fwd+bwd", label)
