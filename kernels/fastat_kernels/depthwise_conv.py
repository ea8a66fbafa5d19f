"""The inside of Conformer's convolution module: GLU, depthwise convolution over time, norm, SiLU.

    u = a * sigmoid(g), x = [a, g]             [B, N, 2 D] -> [B, N, D]
    y[n] = bias + sum_j weight[j] * u[n + j - k // 2]
    z = (y - mean) * rstd * norm_weight + norm_bias    mean, rstd over all N * D values of a clip
    out = z * sigmoid(z)

Source: Gulati et al., "Conformer" (2020), section 2.2, with GroupNorm of one group for BatchNorm.
Shapes: x [B, N, 2 D], channels last; weight [D, 1, k], k odd and <= 63; out [B, N, D].
Precision: loads in x's dtype, float32 inside; statistics are those of y before it is rounded to x's
dtype, merged from per-program (count, mean, M2).
Deterministic: sums over programs are taken in a second stage, in a fixed order.

Traffic, in units of B * N * D elements. The norm needs the whole clip before its first output:
    forward   x read (2), y written (1), y read (1), out written (1)         5
    backward  dout and y read (2) for the norm's two sums; then dout, y (2)
              and x (2) read again, dx written (2)                           8
u, dz, dy and du live in registers. Partial gradients of the parameters add 4 (k + 1) bytes a
channel for each of about 120 groups of clips. Clips are swept backwards, then forwards: the second
sweep begins with what the first left in L2, and the first with what its producer left there.
At A4 (B 448, N 100, D 768, bfloat16) a unit is 69 MB: 344 MB forward, 550 MB backward.

Operations an element: 2 k FLOP and two sigmoids forward, 4 k FLOP and three sigmoids backward. In
instructions (sm_90, bfloat16) the kernels that convolve take 37 forward and 73 backward at k = 15,
57 and 117 at k = 31: on an H100 the former issue in less time than their 3 and 6 units take to
move, the latter in about the same.

A warp owns 64 channels (two a lane; one where registers are short) and walks along a clip's tokens
with the last k of them in registers, so a value is loaded and gated once and a shift costs nothing:
the window is a tuple, renamed row by row, and moves in registers once every ROWS tokens. Strides
and D are constants, so that a row's offset is part of its load.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.grad import conv1d_input, conv1d_weight
from triton.language.extra import libdevice

from fastat_kernels.backend import LAUNCH, NUM_SMS, operator, target, use_kernel

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
"""The interpreter knows no libdevice."""

MAX_KERNEL = 63
SPLIT_KERNEL = 31
"""Up to this width one backward kernel gives both dx and dweight."""


# ------------------------------------------------------------------ reference
def depthwise_conv_ref(
    x: Tensor, weight: Tensor, bias: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float
) -> Tensor:
    """x: [B, N, 2 D] -> [B, N, D]. The specification; float32 inside."""
    z = _normalised(_convolved(x, weight, bias).float(), norm_weight, norm_bias, eps)
    return F.silu(z).to(x.dtype)


def _convolved(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """[B, N, 2 D] -> [B, N, D] in x's dtype: GLU and convolution."""
    D, _, k = weight.shape
    u = F.glu(x.float()).transpose(1, 2)
    y = F.conv1d(u, weight.float(), bias.float(), padding=k // 2, groups=D)
    return y.transpose(1, 2).to(x.dtype)


def _normalised(y: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float) -> Tensor:
    var, mean = torch.var_mean(y, dim=(1, 2), correction=0, keepdim=True)
    return (y - mean) * torch.rsqrt(var + eps) * norm_weight.float() + norm_bias.float()


# --------------------------------------------------------------- triton kernels
# fmt: off
@triton.jit
def _sigmoid(x):
    if INTERPRETED:
        return 1 / (1 + tl.exp(-x))
    # Four instructions for the ten of the above, which guards against ranges that do not occur.
    return libdevice.fast_dividef(1.0, 1.0 + libdevice.fast_expf(-x))


@triton.jit
def _channels(d, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Which of d [BLOCK_D] are channels."""
    if D % BLOCK_D == 0:
        return tl.full([BLOCK_D], True, tl.int1)
    return d < D


@triton.jit
def _inside(n, N, md, ALWAYS: tl.constexpr):
    """md [BLOCK_D] where token n >= 0 is in the clip, else False."""
    if ALWAYS:
        return md
    return md & (tl.full(md.shape, n, tl.int32) < N)


@triton.jit
def _inside_or_before(n, N, md):
    """The same for any n."""
    n = tl.full(md.shape, n, tl.int32)
    return md & (n >= 0) & (n < N)


@triton.jit
def _gated(x_n, D: tl.constexpr, mask):
    """u [BLOCK_D] of the token that starts at x_n; 0 where masked."""
    a = tl.load(x_n, mask, 0.0).to(tl.float32)
    g = tl.load(x_n + D, mask, 0.0).to(tl.float32)
    return a * _sigmoid(g)


@triton.jit
def _dz(dout, yhat, norm_weight, norm_bias):
    """Gradient of SiLU's argument."""
    z = yhat * norm_weight + norm_bias
    s = _sigmoid(z)
    return dout * s * (1 + z * (1 - s))


@triton.jit
def _dy(dout_n, y_n, mask, mean, rstd, norm_weight, norm_bias, scale, c1, c2):
    """Gradient [BLOCK_D] of the convolution's output at a token; 0 where masked."""
    dout = tl.load(dout_n, mask).to(tl.float32)
    yhat = (tl.load(y_n, mask).to(tl.float32) - mean) * rstd
    dz = _dz(dout, yhat, norm_weight, norm_bias)
    return tl.where(mask, dz * scale - (yhat * c2 + c1), 0.0)


@triton.jit(do_not_specialize=["items"])  # of the last, smaller batch too
def _depthwise_conv_fwd_conv_kernel(
    x_ptr,                  # [B, N, 2 D], channels contiguous
    weight_ptr, bias_ptr,   # [D, K], [D]
    y_ptr,                  # [B, N, D]
    part_ptr,               # [B * chunks, blocks, 3] float32: count, mean, M2 of a program's y
    N,
    T, chunks, items,       # tokens of a work item; items of a clip; items of all clips
    x_sb,
    X_SN: tl.constexpr,     # constants, so that a row's offset is in the instruction
    D: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,     # divides T
    EVEN: tl.constexpr,     # ROWS divides N
    BLOCK_D: tl.constexpr,
):
    PAD: tl.constexpr = K // 2
    block = tl.program_id(0)
    d = block * BLOCK_D + tl.arange(0, BLOCK_D)
    md = _channels(d, D, BLOCK_D)
    bias = tl.load(bias_ptr + d, md, 0.0).to(tl.float32)
    w = ()  # type: tuple[Any, ...]
    for j in tl.static_range(K):
        w = w + (tl.load(weight_ptr + d * K + j, md, 0.0).to(tl.float32),)
    for i in range(tl.program_id(1), items, tl.num_programs(1)):
        item = tl.cast(items - 1 - i, tl.int64)
        b = item // chunks
        first = (item % chunks).to(tl.int32) * T
        end = tl.minimum(first + T, N)
        x_rows = x_ptr + b * x_sb + d
        y_rows = y_ptr + b * N * D + d
        window = ()  # type: tuple[Any, ...]
        for r in tl.static_range(-PAD, PAD):
            mask = _inside_or_before(first + r, N, md)
            window = window + (_gated(x_rows + first * X_SN + r * X_SN, D, mask),)
        # Deviations from a row of y itself: whatever the mean, M2 errs by at most T roundings.
        pivot = tl.zeros([BLOCK_D], tl.float32)
        dev_sum = tl.zeros([BLOCK_D], tl.float32)
        dev_sq = tl.zeros([BLOCK_D], tl.float32)
        for n in range(first, end, ROWS):
            seen = window
            x_n = x_rows + n * X_SN
            y_n = y_rows + n * D
            for r in tl.static_range(PAD, PAD + ROWS):
                seen = seen + (_gated(x_n + r * X_SN, D, _inside(n + r, N, md, False)),)
            for r in tl.static_range(ROWS):
                acc = bias
                for j in tl.static_range(K):
                    acc += w[j] * seen[r + j]
                mask = _inside(n + r, N, md, EVEN)
                tl.store(y_n + r * D, acc, mask)
                if r == 0:
                    pivot = tl.where(n == first, acc, pivot)
                dev = tl.where(mask, acc - pivot, 0.0)
                dev_sum += dev
                dev_sq += dev * dev
            window = seen[ROWS:]
        tokens = (end - first).to(tl.float32)
        width = tl.minimum(D - block * BLOCK_D, BLOCK_D).to(tl.float32)
        mean_d = tl.where(md, pivot + dev_sum / tokens, 0.0)
        m2_d = tl.where(md, dev_sq - dev_sum * dev_sum / tokens, 0.0)
        mean = tl.sum(mean_d, 0) / width
        between = tl.where(md, mean_d - mean, 0.0)
        m2 = tl.sum(m2_d + tokens * between * between, 0)
        part = part_ptr + (item * tl.num_programs(0) + block) * 3
        tl.store(part, tokens * width)
        tl.store(part + 1, mean)
        tl.store(part + 2, m2)


@triton.jit
def _depthwise_conv_fwd_norm_kernel(
    y_ptr,                              # [B, N, D]
    norm_weight_ptr, norm_bias_ptr,     # [D]
    part_ptr,                           # [B, P, 3] float32
    out_ptr,                            # [B, N, D]
    stats_ptr,                          # [B, 2] float32: mean, rstd
    N, D, P,
    EPS: tl.constexpr,
    BLOCK_P: tl.constexpr,              # at least P
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    b = tl.program_id(2).to(tl.int64)
    md = d < D
    mask = (n < N)[:, None] & md[None, :]
    at = (b * N + n[:, None]) * D + d[None, :]
    y = tl.load(y_ptr + at, mask, 0.0).to(tl.float32)

    p = tl.arange(0, BLOCK_P)
    part = part_ptr + (b * P + p) * 3
    count = tl.load(part, p < P, 0.0)
    means = tl.load(part + 1, p < P, 0.0)
    m2 = tl.load(part + 2, p < P, 0.0)
    total = tl.sum(count, 0)
    mean = tl.sum(count * means, 0) / total
    between = means - mean
    var = tl.sum(m2 + count * between * between, 0) / total
    rstd = 1 / tl.sqrt_rn(var + EPS)
    leads = (tl.program_id(0) == 0) & (tl.program_id(1) == 0)
    tl.store(stats_ptr + 2 * b, mean, leads)
    tl.store(stats_ptr + 2 * b + 1, rstd, leads)

    norm_weight = tl.load(norm_weight_ptr + d, md, 0.0).to(tl.float32)
    norm_bias = tl.load(norm_bias_ptr + d, md, 0.0).to(tl.float32)
    z = (y - mean) * (rstd * norm_weight)[None, :] + norm_bias[None, :]
    tl.store(out_ptr + at, z * _sigmoid(z), mask)


@triton.jit
def _depthwise_conv_bwd_sums_kernel(
    dout_ptr, y_ptr,                    # [B, N, D]
    stats_ptr,                          # [B, 2] float32
    norm_weight_ptr, norm_bias_ptr,     # [D]
    sums_ptr,                           # [B, blocks, 2] float32: sums of dyhat and dyhat * yhat
    part_ptr,                           # [B, 2, D] float32: a clip's dnorm_weight, dnorm_bias
    N, D,
    dout_sb, dout_sn,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    block = tl.program_id(0)
    d = block * BLOCK_D + tl.arange(0, BLOCK_D)
    b = (tl.num_programs(1) - 1 - tl.program_id(1)).to(tl.int64)
    md = d < D
    mean = tl.load(stats_ptr + 2 * b)
    rstd = tl.load(stats_ptr + 2 * b + 1)
    norm_weight = tl.load(norm_weight_ptr + d, md, 0.0).to(tl.float32)
    norm_bias = tl.load(norm_bias_ptr + d, md, 0.0).to(tl.float32)
    dz_sum = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dzy_sum = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for first in range(0, N, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        mask = (n < N)[:, None] & md[None, :]
        dout = tl.load(dout_ptr + b * dout_sb + n[:, None] * dout_sn + d[None, :], mask, 0.0)
        y = tl.load(y_ptr + (b * N + n[:, None]) * D + d[None, :], mask, 0.0)
        yhat = (y.to(tl.float32) - mean) * rstd
        dz = _dz(dout.to(tl.float32), yhat, norm_weight[None, :], norm_bias[None, :])
        dz_sum += dz
        dzy_sum += dz * yhat
    dnorm_bias = tl.sum(dz_sum, 0)
    dnorm_weight = tl.sum(dzy_sum, 0)
    part = part_ptr + b * 2 * D + d
    tl.store(part, dnorm_weight, md)
    tl.store(part + D, dnorm_bias, md)
    sums = sums_ptr + (b * tl.num_programs(0) + block) * 2
    tl.store(sums, tl.sum(dnorm_bias * norm_weight, 0))
    tl.store(sums + 1, tl.sum(dnorm_weight * norm_weight, 0))


@triton.jit(do_not_specialize=["items"])  # of the last, smaller batch too
def _depthwise_conv_bwd_conv_kernel(
    dout_ptr, x_ptr,                    # [B, N, D], [B, N, 2 D], channels contiguous
    weight_ptr,                         # [D, K]
    norm_weight_ptr, norm_bias_ptr,     # [D]
    y_ptr,                              # [B, N, D]
    stats_ptr,                          # [B, 2] float32
    sums_ptr,                           # [B, P, 2] float32
    dx_ptr,                             # [B, N, 2 D]
    part_ptr,                           # [groups, K + 1, D] float32: a program's dweight, dbias
    N, P,
    T, chunks, items,                   # as in the forward kernel
    dout_sb, x_sb,
    DOUT_SN: tl.constexpr,
    X_SN: tl.constexpr,
    D: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,                 # divides T
    EVEN: tl.constexpr,                 # ROWS divides N
    DX: tl.constexpr, DW: tl.constexpr, # which gradients this launch gives
    BLOCK_P: tl.constexpr,              # at least P
    BLOCK_D: tl.constexpr,
):
    PAD: tl.constexpr = K // 2
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    md = _channels(d, D, BLOCK_D)
    gamma = tl.load(norm_weight_ptr + d, md, 0.0).to(tl.float32)
    beta = tl.load(norm_bias_ptr + d, md, 0.0).to(tl.float32)
    w = ()  # type: tuple[Any, ...]
    dw = ()  # type: tuple[Any, ...]
    for j in tl.static_range(K):
        if DX:
            w = w + (tl.load(weight_ptr + d * K + j, md, 0.0).to(tl.float32),)
        if DW:
            dw = dw + (tl.zeros([BLOCK_D], tl.float32),)
    dbias = tl.zeros([BLOCK_D], tl.float32)
    p = tl.arange(0, BLOCK_P)
    for i in range(tl.program_id(1), items, tl.num_programs(1)):
        item = tl.cast(i, tl.int64)
        b = item // chunks
        first = (item % chunks).to(tl.int32) * T
        end = tl.minimum(first + T, N)
        mean = tl.load(stats_ptr + 2 * b)
        rstd = tl.load(stats_ptr + 2 * b + 1)
        sums = sums_ptr + (b * P + p) * 2
        c1 = tl.sum(tl.load(sums, p < P, 0.0), 0) * rstd / (N * D)
        c2 = tl.sum(tl.load(sums + 1, p < P, 0.0), 0) * rstd / (N * D)
        scale = gamma * rstd
        dout_rows = dout_ptr + b * dout_sb + d
        y_rows = y_ptr + b * N * D + d
        x_rows = x_ptr + b * x_sb + d
        dx_rows = dx_ptr + b * N * 2 * D + d
        window = ()  # type: tuple[Any, ...]
        for r in tl.static_range(-PAD, PAD):    # dy of tokens n - PAD ... n + PAD - 1
            dout_n = dout_rows + first * DOUT_SN + r * DOUT_SN
            y_n = y_rows + first * D + r * D
            mask = _inside_or_before(first + r, N, md)
            window = window + (_dy(dout_n, y_n, mask, mean, rstd, gamma, beta, scale, c1, c2),)
        for n in range(first, end, ROWS):
            dout_n = dout_rows + n * DOUT_SN
            y_n = y_rows + n * D
            x_n = x_rows + n * X_SN
            dx_n = dx_rows + n * 2 * D
            seen = window
            for r in tl.static_range(PAD, PAD + ROWS):
                mask = _inside(n + r, N, md, False)
                seen = seen + (_dy(dout_n + r * DOUT_SN, y_n + r * D, mask,
                                   mean, rstd, gamma, beta, scale, c1, c2),)
            # Loaded before the first store: the compiler moves no load across one.
            values = ()  # type: tuple[Any, ...]
            gates = ()  # type: tuple[Any, ...]
            for r in tl.static_range(ROWS):
                mask = _inside(n + r, N, md, EVEN)
                values = values + (tl.load(x_n + r * X_SN, mask, 0.0),)
                gates = gates + (tl.load(x_n + r * X_SN + D, mask, 0.0),)
            for r in tl.static_range(ROWS):
                s = _sigmoid(gates[r].to(tl.float32))
                a = values[r].to(tl.float32)
                if DW:
                    u = a * s
                    grown = ()  # type: tuple[Any, ...]
                    for j in tl.static_range(K):
                        grown = grown + (dw[j] + u * seen[r + K - 1 - j],)
                    dw = grown
                    dbias += seen[r + PAD]  # 0 beyond the clip; an item ends with T or the clip
                if DX:
                    du = w[0] * seen[r + K - 1]
                    for j in tl.static_range(1, K):
                        du += w[j] * seen[r + K - 1 - j]
                    mask = _inside(n + r, N, md, EVEN)
                    da = du * s
                    dg = da * a
                    tl.store(dx_n + r * 2 * D, da, mask)
                    tl.store(dx_n + r * 2 * D + D, dg - dg * s, mask)
            window = seen[ROWS:]
    if DW:
        part = part_ptr + tl.program_id(1).to(tl.int64) * (K + 1) * D + d
        for j in tl.static_range(K):
            tl.store(part + j * D, dw[j], md)
        tl.store(part + K * D, dbias, md)


@triton.jit
def _depthwise_conv_bwd_params_kernel(
    part_ptr,               # [P, J + 1, D] float32
    dweight_ptr,            # [D, J]: sums over P of the first J
    dbias_ptr,              # [D]: and of the last
    P, J, D,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    j = tl.program_id(1)
    md = d < D
    acc = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
    for first in range(0, P, BLOCK_P):
        p = (first + tl.arange(0, BLOCK_P)).to(tl.int64)
        at = (p[:, None] * (J + 1) + j) * D + d[None, :]
        acc += tl.load(part_ptr + at, (p < P)[:, None] & md[None, :], 0.0)
    total = tl.sum(acc, 0)
    if j < J:
        tl.store(dweight_ptr + d * J + j, total, md)
    else:
        tl.store(dbias_ptr + d, total, md)
# fmt: on


# --------------------------------------------------------------------- launchers
class Config(NamedTuple):
    """How one direction is launched: a kernel that convolves, with a warp a program, and another.

    Neither has a loop that Triton pipelines: there is no num_stages to choose.
    """

    block_d: int
    """Channels of a program that convolves."""
    rows: int
    """Tokens between two moves of the window."""
    chunk: int
    """Most tokens of a work item; a multiple of ``rows``."""
    resident: int
    """Programs that a multiprocessor holds, by their registers; work is shared by so many."""
    tile_n: int
    tile_d: int
    num_warps: int
    """Of the elementwise or reducing kernel."""


def _configs(target: int, k: int, backward: bool) -> list[Config]:
    """Candidates, the first choice first. Registers decide: they are much alike on all targets."""
    if backward and k <= 15:
        return [
            Config(64, 4, 256, 12, 16, 128, 4),
            Config(64, 8, 256, 12, 16, 256, 8),
            Config(64, 4, 128, 12, 32, 128, 4),
            Config(32, 8, 256, 18, 16, 64, 4),
        ]
    if backward and k <= 31:
        return [Config(32, 4, 256, 12, 16, 128, 4), Config(32, 4, 128, 12, 32, 128, 8)]
    if backward:
        return [Config(32, 8, 256, 10, 16, 128, 4)]
    if k <= 15:
        return [
            Config(64, 4, 256, 21, 32, 256, 8),
            Config(64, 8, 256, 17, 16, 256, 4),
            Config(64, 4, 128, 21, 16, 128, 4),
            Config(128, 4, 256, 10, 32, 128, 8),
        ]
    if k <= 31:
        choices = [
            Config(64, 4, 256, 12, 32, 256, 8),
            Config(64, 8, 256, 10, 16, 256, 4),
            Config(32, 4, 256, 21, 16, 128, 4),
        ]
        return choices[1:] if target == 100 else choices  # four rows spill in float32 there
    return [Config(32, 4, 256, 10, 32, 256, 8)]


class _Split(NamedTuple):
    """Work items: chunks of T tokens; ``groups`` programs of a channel block share them."""

    T: int
    chunks: int
    items: int
    blocks: int
    groups: int


def _split(x: Tensor, N: int, D: int, config: Config) -> _Split:
    assert N * x.stride(1) < 2**31, "offsets in a clip are 32 bits wide"
    T = min(config.chunk, triton.cdiv(N, config.rows) * config.rows)
    chunks = triton.cdiv(N, T)
    items = x.shape[0] * chunks
    blocks = triton.cdiv(D, config.block_d)
    rounds = triton.cdiv(items * blocks, NUM_SMS[target(x)] * config.resident)
    return _Split(T, chunks, items, blocks, triton.cdiv(items, rounds))


def _channels_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _fwd_triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    *,
    config: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """[B, N, 2 D] -> out [B, N, D], y [B, N, D], stats [B, 2]."""
    D, _, k = weight.shape
    B, N, _ = x.shape
    config = config or _configs(target(x), k, backward=False)[0]
    x = _channels_contiguous(x)
    split = _split(x, N, D, config)
    y = torch.empty((B, N, D), dtype=x.dtype, device=x.device)
    out = torch.empty_like(y)
    P = split.chunks * split.blocks
    part = torch.empty((B, P, 3), dtype=torch.float32, device=x.device)
    stats = torch.empty((B, 2), dtype=torch.float32, device=x.device)
    _depthwise_conv_fwd_conv_kernel[(split.blocks, split.groups)](
        x, weight.contiguous(), bias, y, part,
        N, split.T, split.chunks, split.items, x.stride(0),
        X_SN=x.stride(1), D=D, K=k, ROWS=config.rows, EVEN=N % config.rows == 0,
        BLOCK_D=config.block_d, num_warps=1, **LAUNCH,
    )  # fmt: skip
    grid = (triton.cdiv(D, config.tile_d), triton.cdiv(N, config.tile_n), B)
    _depthwise_conv_fwd_norm_kernel[grid](
        y, norm_weight, norm_bias, part, out, stats, N, D, P,
        EPS=eps, BLOCK_P=triton.next_power_of_2(P), BLOCK_N=config.tile_n, BLOCK_D=config.tile_d,
        num_warps=config.num_warps, **LAUNCH,
    )  # fmt: skip
    return out, y, stats


def _bwd_triton(
    dout: Tensor,
    x: Tensor,
    weight: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    y: Tensor,
    stats: Tensor,
    *,
    config: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dx [B, N, 2 D], dweight [D, 1, k], dbias, dnorm_weight and dnorm_bias [D]."""
    D, _, k = weight.shape
    B, N, _ = x.shape
    config = config or _configs(target(x), k, backward=True)[0]
    dout, x = _channels_contiguous(dout), _channels_contiguous(x)
    split = _split(x, N, D, config)
    dx = torch.empty((B, N, 2 * D), dtype=x.dtype, device=x.device)
    P = triton.cdiv(D, config.tile_d)
    sums = torch.empty((B, P, 2), dtype=torch.float32, device=x.device)
    norm_part = torch.empty((B, 2, D), dtype=torch.float32, device=x.device)
    conv_part = torch.empty((split.groups, k + 1, D), dtype=torch.float32, device=x.device)
    _depthwise_conv_bwd_sums_kernel[(P, B)](
        dout, y, stats, norm_weight, norm_bias, sums, norm_part,
        N, D, dout.stride(0), dout.stride(1),
        BLOCK_N=config.tile_n, BLOCK_D=config.tile_d,
        num_warps=config.num_warps, **LAUNCH,
    )  # fmt: skip
    # 3 k registers a channel: beyond a warp's, dx and the parameters' gradients go separately.
    for dx_too, dw_too in [(True, True)] if k <= SPLIT_KERNEL else [(True, False), (False, True)]:
        _depthwise_conv_bwd_conv_kernel[(split.blocks, split.groups)](
            dout, x, weight.contiguous(), norm_weight, norm_bias, y, stats, sums, dx, conv_part,
            N, P, split.T, split.chunks, split.items, dout.stride(0), x.stride(0),
            DOUT_SN=dout.stride(1), X_SN=x.stride(1), D=D, K=k, ROWS=config.rows,
            EVEN=N % config.rows == 0, DX=dx_too, DW=dw_too,
            BLOCK_P=triton.next_power_of_2(P), BLOCK_D=config.block_d, num_warps=1, **LAUNCH,
        )  # fmt: skip
    dnorm_weight, dnorm_bias = _params_triton(norm_part, norm_weight.dtype)
    dweight, dbias = _params_triton(conv_part, weight.dtype)
    return dx, dweight.view(D, 1, k), dbias, dnorm_weight.view(D), dnorm_bias


def _params_triton(part: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """part [P, J + 1, D], summed over P -> [D, J] and [D]."""
    P, rows, D = part.shape
    dweight = torch.empty((D, rows - 1), dtype=dtype, device=part.device)
    dbias = torch.empty(D, dtype=dtype, device=part.device)
    _depthwise_conv_bwd_params_kernel[(triton.cdiv(D, 32), rows)](
        part, dweight, dbias, P, rows - 1, D, BLOCK_P=128, BLOCK_D=32, num_warps=4, **LAUNCH
    )
    return dweight, dbias


# ---------------------------------------------------- operators: plain and Triton
def _fwd_plain(
    x: Tensor, weight: Tensor, bias: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    y = _convolved(x, weight, bias)
    var, mean = torch.var_mean(y.float(), dim=(1, 2), correction=0)
    out = F.silu(_normalised(y.float(), norm_weight, norm_bias, eps)).to(x.dtype)
    return out.contiguous(), y.contiguous(), torch.stack([mean, torch.rsqrt(var + eps)], 1)


def _fwd_fake(
    x: Tensor, weight: Tensor, bias: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    B, N, _ = x.shape
    y = x.new_empty((B, N, weight.shape[0]))
    return torch.empty_like(y), y, x.new_empty((B, 2), dtype=torch.float32)


def _bwd_plain(
    dout: Tensor,
    x: Tensor,
    weight: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    y: Tensor,
    stats: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    D, _, k = weight.shape
    mean, rstd = stats[:, :1, None], stats[:, 1:, None]
    yhat = (y.float() - mean) * rstd
    z = yhat * norm_weight.float() + norm_bias.float()
    s = torch.sigmoid(z)
    dz = dout.float() * s * (1 + z * (1 - s))
    dyhat = dz * norm_weight.float()
    both = (1, 2)
    dy = rstd * (dyhat - dyhat.mean(both, True) - yhat * (dyhat * yhat).mean(both, True))
    a, g = x.float().chunk(2, -1)
    s = torch.sigmoid(g)
    u, dy = (a * s).transpose(1, 2), dy.transpose(1, 2)
    du = conv1d_input(u.shape, weight.float(), dy, padding=k // 2, groups=D)
    dw = conv1d_weight(u, weight.shape, dy, padding=k // 2, groups=D)
    du = du.transpose(1, 2)
    dx = torch.cat([du * s, du * a * s * (1 - s)], -1)
    return (
        dx.to(x.dtype),
        dw.to(weight.dtype).contiguous(),
        dy.sum((0, 2)).to(weight.dtype),
        (dz * yhat).sum((0, 1)).to(norm_weight.dtype),
        dz.sum((0, 1)).to(norm_weight.dtype),
    )


def _bwd_fake(
    dout: Tensor,
    x: Tensor,
    weight: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    y: Tensor,
    stats: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    D = weight.shape[:1]
    return (
        x.new_empty(x.shape),
        weight.new_empty(weight.shape),
        weight.new_empty(D),
        norm_weight.new_empty(D),
        norm_weight.new_empty(D),
    )


_fwd = operator("depthwise_conv_fwd", plain=_fwd_plain, kernel=_fwd_triton, fake=_fwd_fake)
_bwd = operator("depthwise_conv_bwd", plain=_bwd_plain, kernel=_bwd_triton, fake=_bwd_fake)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, _, norm_weight, norm_bias, _ = inputs
    _, y, stats = output
    ctx.mark_non_differentiable(y, stats)
    ctx.save_for_backward(x, weight, norm_weight, norm_bias, y, stats)
    ctx.set_materialize_grads(False)  # no zeros [B, N, D] for y


def _autograd(
    ctx: Any, dout: Tensor, _dy: None, _dstats: None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, None]:
    dx, dweight, dbias, dnorm_weight, dnorm_bias = _bwd(dout, *ctx.saved_tensors)
    return dx, dweight, dbias, dnorm_weight, dnorm_bias, None


_fwd.register_autograd(_autograd, setup_context=_setup)


# ------------------------------------------------------------------- public API
def depthwise_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float = 1e-5,
) -> Tensor:
    """SiLU(GroupNorm(1 group)(depthwise convolution over time(GLU(x)))).

    Args:
        x: [B, N, 2 D], values then gates.
        weight, bias: [D, 1, k], [D]; the convolution's, k odd and at most 63. Tokens beyond a
            clip's ends count as zeros.
        norm_weight, norm_bias: [D].
        eps: added to the variance.

    Returns:
        [B, N, D]; x's dtype, under autocast autocast's.

    Raises:
        ValueError: shapes that do not fit together, k even or too large.
    """
    if weight.ndim != 3 or weight.shape[1] != 1:
        raise ValueError(f"weight must be [D, 1, k], got {tuple(weight.shape)}")
    D, _, k = weight.shape
    if k % 2 == 0 or k > MAX_KERNEL:
        raise ValueError(f"k must be odd and at most {MAX_KERNEL}, got {k}")
    if x.ndim != 3 or x.shape[2] != 2 * D:
        raise ValueError(f"x must be [B, N, {2 * D}] for {D} channels, got {tuple(x.shape)}")
    vectors = (bias, norm_weight, norm_bias)
    if any(v.shape != (D,) for v in vectors):
        shapes = ", ".join(str(tuple(v.shape)) for v in vectors)
        raise ValueError(f"bias, norm_weight and norm_bias must be [{D}], got {shapes}")
    if use_kernel("depthwise_conv", x):
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        out: Tensor = _fwd(x, weight, bias, norm_weight, norm_bias, eps)[0]
        return out
    y = F.conv1d(F.glu(x).transpose(1, 2), weight, bias, padding=k // 2, groups=D)
    z = F.group_norm(y, 1, norm_weight, norm_bias, eps)  # float32 under autocast
    return F.silu(z).transpose(1, 2).to(y.dtype)
