"""attention: against the float64 definition, with and without dropout."""

import pytest
import torch
from torch import Tensor

from fastat_kernels.attention import attention, attention_ref
from tests.kernels.check import assert_as_good_as_eager

# (B, N, H, Dh): ours at A4, one token, a prime, a head width of floor(1024 / 12)
SHAPES = [(2, 100, 8, 128), (3, 1, 2, 8), (1, 67, 4, 32), (2, 33, 12, 85)]


def eager(qkv: Tensor) -> Tensor:
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    weights = (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(-1)
    out: Tensor = (weights @ v).transpose(1, 2).flatten(2)
    return out


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
