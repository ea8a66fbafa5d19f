"""Attention pooling: a clip's logits from the logits of its frames and of their weights.

out = logit(clamp(sum_t w_t p_t)), p = clamp(sigmoid(prob)), w = softmax over time of att; in the
sigmoid form w = v / sum_t v with v = clamp(sigmoid(att)). Clamps keep [PROB_EPS, 1 - PROB_EPS].

Source: Wang et al. (2019), https://arxiv.org/abs/1810.09050, "attention"; the sigmoid form is Gong
et al., PSLA (2021), https://arxiv.org/abs/2102.01243, section III-D.
Shapes: B clips, T frames, K classes. prob, att [B, T, K], any strides; out [B, K] float32.
Precision: float32 inside; gradients in the dtype of the inputs.
Traffic: forward reads 2 B T K elements once and writes B K; backward reads them again, with two
numbers a clip and class, and writes 2 B T K. 1.2 GFLOP at A4's 448 x 100 x 527: bound by memory.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastat_kernels.backend import LAUNCH, operator, target, use_kernel

PROB_EPS = 1e-7
"""Probabilities are kept in [PROB_EPS, 1 - PROB_EPS] before their logit is taken."""

EPS = tl.constexpr(PROB_EPS)


class Config(NamedTuple):
    block_t: int
    block_k: int
    num_warps: int


# ------------------------------------------------------------------ reference
def attention_pool_ref(prob: Tensor, att: Tensor, sigmoid: bool = False) -> Tensor:
    """prob, att [B, T, K] -> [B, K] float32. The specification; float32 inside."""
    p = _clamped_sigmoid(prob)
    if sigmoid:
        weights = _clamped_sigmoid(att)
        clip = (p * weights).sum(1) / weights.sum(1)
    else:
        clip = (p * att.float().softmax(1)).sum(1)
    return _logit(clip)


def _clamped_sigmoid(x: Tensor) -> Tensor:
    return x.float().sigmoid().clamp(PROB_EPS, 1 - PROB_EPS)


def _logit(clip: Tensor) -> Tensor:
    # float32 weights can sum to 1.0000007
    return clip.clamp(PROB_EPS, 1 - PROB_EPS).logit()


# --------------------------------------------------------------- triton kernels
# fmt: off
@triton.jit
def _clamp(p):
    p = tl.maximum(p, EPS, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(p, 1 - EPS, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _inside(p):
    return (p >= EPS) & (p <= 1 - EPS)


@triton.jit
def _attention_pool_fwd_kernel(
    prob_ptr, att_ptr,            # [B, T, K]
    out_ptr,                      # [B, K] fp32
    clip_ptr, norm_ptr,           # [B, K] fp32: sum_t w p, and log sum exp att or sum_t v
    T, K,
    prob_sb, prob_st, prob_sk,
    att_sb, att_st, att_sk,
    SIGMOID: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    mk = k < K
    # Every element of the tile keeps sums of its own: nothing is exchanged before the last frame.
    top = tl.full([BLOCK_T, BLOCK_K], float("-inf"), tl.float32)
    num = tl.zeros([BLOCK_T, BLOCK_K], tl.float32)
    den = tl.zeros([BLOCK_T, BLOCK_K], tl.float32)
    for t0 in range(0, T, BLOCK_T):
        t = t0 + tl.arange(0, BLOCK_T)
        m = (t < T)[:, None] & mk[None, :]
        x = tl.load(prob_ptr + b * prob_sb + t[:, None] * prob_st + k[None, :] * prob_sk, m, 0.0)
        a = tl.load(att_ptr + b * att_sb + t[:, None] * att_st + k[None, :] * att_sk, m, 0.0)
        p = _clamp(tl.sigmoid(x.to(tl.float32)))                  # [BLOCK_T, BLOCK_K]
        a = a.to(tl.float32)
        if SIGMOID:
            w = tl.where(m, _clamp(tl.sigmoid(a)), 0.0)
            num += w * p
            den += w
        else:
            higher = tl.maximum(top, tl.where(m, a, float("-inf")))
            shift = tl.where(higher == float("-inf"), 0.0, higher)
            old, new = tl.exp(top - shift), tl.where(m, tl.exp(a - shift), 0.0)
            num = num * old + new * p
            den = den * old + new
            top = higher
    if SIGMOID:
        norm = tl.sum(den, 0)                                     # [BLOCK_K]
        clip = tl.sum(num, 0) / tl.where(mk, norm, 1.0)
    else:
        highest = tl.where(mk, tl.max(top, 0), 0.0)
        scale = tl.exp(top - highest[None, :])
        total = tl.where(mk, tl.sum(den * scale, 0), 1.0)
        clip = tl.sum(num * scale, 0) / total
        norm = highest + tl.log(total)
    kept = _clamp(clip)
    tl.store(out_ptr + b * K + k, tl.log(kept / (1 - kept)), mk)
    tl.store(clip_ptr + b * K + k, clip, mk)
    tl.store(norm_ptr + b * K + k, norm, mk)


@triton.jit
def _attention_pool_bwd_kernel(
    dout_ptr, clip_ptr, norm_ptr,  # [B, K] fp32
    prob_ptr, att_ptr,             # [B, T, K]
    dprob_ptr, datt_ptr,           # [B, T, K] contiguous
    T, K,
    prob_sb, prob_st, prob_sk,
    att_sb, att_st, att_sk,
    SIGMOID: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    t = tl.program_id(2) * BLOCK_T + tl.arange(0, BLOCK_T)
    mk = k < K
    m = (t < T)[:, None] & mk[None, :]
    clip = tl.load(clip_ptr + b * K + k, mk, 0.5)
    norm = tl.load(norm_ptr + b * K + k, mk, 1.0)[None, :]
    g = tl.load(dout_ptr + b * K + k, mk, 0.0)
    kept = _clamp(clip)
    g = tl.where(_inside(clip), g / (kept * (1 - kept)), 0.0)[None, :]
    x = tl.load(prob_ptr + b * prob_sb + t[:, None] * prob_st + k[None, :] * prob_sk, m, 0.0)
    a = tl.load(att_ptr + b * att_sb + t[:, None] * att_st + k[None, :] * att_sk, m, 0.0)
    s = tl.sigmoid(x.to(tl.float32))                              # [BLOCK_T, BLOCK_K]
    deviation = _clamp(s) - clip[None, :]
    if SIGMOID:
        v = tl.sigmoid(a.to(tl.float32))
        g = g / norm
        w = _clamp(v)
        datt = tl.where(_inside(v), g * deviation * v * (1 - v), 0.0)
    else:
        w = tl.exp(a.to(tl.float32) - norm)
        datt = g * deviation * w
    dprob = tl.where(_inside(s), g * w * s * (1 - s), 0.0)
    place = b * T * K + t[:, None] * K + k[None, :]
    tl.store(dprob_ptr + place, dprob.to(dprob_ptr.dtype.element_ty), m)
    tl.store(datt_ptr + place, datt.to(datt_ptr.dtype.element_ty), m)
# fmt: on


# --------------------------------------------------------------------- launchers
def _configs(arch: int) -> list[Config]:
    """The configuration that launches take, then others worth timing; the same on every chip."""
    return [Config(16, 64, 4), Config(32, 64, 4), Config(16, 128, 4), Config(32, 32, 4)]


def _fwd_triton(
    prob: Tensor, att: Tensor, sigmoid: bool, *, config: Config | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    B, T, K = prob.shape
    out, clip, norm = (
        torch.empty((B, K), dtype=torch.float32, device=prob.device) for _ in range(3)
    )
    block_t, block_k, num_warps = config or _configs(target(prob))[0]
    _attention_pool_fwd_kernel[(B, triton.cdiv(K, block_k))](
        prob, att, out, clip, norm, T, K, *prob.stride(), *att.stride(),
        sigmoid, block_t, block_k, num_warps=num_warps, **LAUNCH,
    )  # fmt: skip
    return out, clip, norm


def _bwd_triton(
    dout: Tensor,
    prob: Tensor,
    att: Tensor,
    clip: Tensor,
    norm: Tensor,
    sigmoid: bool,
    *,
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:
    B, T, K = prob.shape
    dprob = torch.empty((B, T, K), dtype=prob.dtype, device=prob.device)
    datt = torch.empty((B, T, K), dtype=att.dtype, device=att.device)
    block_t, block_k, num_warps = config or _configs(target(prob))[0]
    grid = (B, triton.cdiv(K, block_k), triton.cdiv(T, block_t))
    _attention_pool_bwd_kernel[grid](
        dout.contiguous(), clip, norm, prob, att, dprob, datt, T, K,
        *prob.stride(), *att.stride(), sigmoid, block_t, block_k, num_warps=num_warps, **LAUNCH,
    )  # fmt: skip
    return dprob, datt


# ---------------------------------------------------- op: one name, two backends
def _fwd_plain(prob: Tensor, att: Tensor, sigmoid: bool) -> tuple[Tensor, Tensor, Tensor]:
    p = _clamped_sigmoid(prob)
    if sigmoid:
        weights = _clamped_sigmoid(att)
        norm = weights.sum(1)
        clip = (p * weights).sum(1) / norm
    else:
        norm = att.float().logsumexp(1)
        clip = (p * att.float().softmax(1)).sum(1)
    return _logit(clip), clip, norm


def _fwd_fake(prob: Tensor, att: Tensor, sigmoid: bool) -> tuple[Tensor, Tensor, Tensor]:
    B, _, K = prob.shape
    out, clip, norm = (prob.new_empty((B, K), dtype=torch.float32) for _ in range(3))
    return out, clip, norm


def _bwd_plain(
    dout: Tensor, prob: Tensor, att: Tensor, clip: Tensor, norm: Tensor, sigmoid: bool
) -> tuple[Tensor, Tensor]:
    kept = clip.clamp(PROB_EPS, 1 - PROB_EPS)
    g = torch.where(clip == kept, dout / (kept * (1 - kept)), 0.0).unsqueeze(1)
    s, p = prob.float().sigmoid(), _clamped_sigmoid(prob)
    deviation = p - clip.unsqueeze(1)
    if sigmoid:
        g = g / norm.unsqueeze(1)
        v, w = att.float().sigmoid(), _clamped_sigmoid(att)
        datt = torch.where(v == w, g * deviation * v * (1 - v), 0.0)
    else:
        w = (att.float() - norm.unsqueeze(1)).exp()
        datt = g * deviation * w
    dprob = torch.where(s == p, g * w * s * (1 - s), 0.0)
    return dprob.to(prob.dtype), datt.to(att.dtype)


def _bwd_fake(
    dout: Tensor, prob: Tensor, att: Tensor, clip: Tensor, norm: Tensor, sigmoid: bool
) -> tuple[Tensor, Tensor]:
    return prob.new_empty(prob.shape), att.new_empty(att.shape)


_fwd = operator("attention_pool_fwd", plain=_fwd_plain, kernel=_fwd_triton, fake=_fwd_fake)
_bwd = operator("attention_pool_bwd", plain=_bwd_plain, kernel=_bwd_triton, fake=_bwd_fake)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    prob, att, ctx.sigmoid = inputs
    _, clip, norm = output
    ctx.mark_non_differentiable(clip, norm)
    ctx.save_for_backward(prob, att, clip, norm)


def _autograd(
    ctx: Any, dout: Tensor, _dclip: Tensor, _dnorm: Tensor
) -> tuple[Tensor, Tensor, None]:
    dprob, datt = _bwd(dout, *ctx.saved_tensors, ctx.sigmoid)
    return dprob, datt, None


_fwd.register_autograd(_autograd, setup_context=_setup)


# ------------------------------------------------------------------- public API
def attention_pool(prob: Tensor, att: Tensor, *, sigmoid: bool = False) -> Tensor:
    """Clip logits from frame logits, weighted by attention over time.

    Args:
        prob: [B, T, K], logits of the frames' probabilities.
        att: [B, T, K], logits of the frames' weights; dtype and device of ``prob``.
        sigmoid: weights are the sigmoid of ``att`` over its sum, not the softmax over time.

    Returns:
        [B, K] float32 logits, finite where the inputs are; NaN where a probability or weight is.

    Raises:
        ValueError: shapes, dtypes or devices differ, or there is no frame.
    """
    if prob.ndim != 3 or prob.shape != att.shape or not prob.shape[1]:
        shapes = f"{tuple(prob.shape)} and {tuple(att.shape)}"
        raise ValueError(f"prob and att must both be [B, T, K] with T >= 1, got {shapes}")
    if prob.dtype != att.dtype or prob.device != att.device:
        raise ValueError(
            f"prob is {prob.dtype} on {prob.device}, att is {att.dtype} on {att.device}"
        )
    if use_kernel("attention_pool", prob):
        out: Tensor = _fwd(prob, att, sigmoid)[0]
        return out
    return attention_pool_ref(prob, att, sigmoid)
