"""BatchNorm, ReLU and max-pool of a channels_last map: a pass for the statistics, one for the rest.

out = max over the window of relu((x - mean) * weight / sqrt(var + eps) + bias)

Source: Ioffe, Szegedy, "Batch Normalization" (2015), https://arxiv.org/abs/1502.03167, algorithm 1.
Shapes: x [B, C, H, W] in channels_last, which is rows [B * H * W, C]; windows of (h, w) pixels side
by side from the corner, (1, 1) for no pool; what is left over at the far edges counts in the
statistics only. out [B, C, H // h, W // w].
Precision: loads and stores in x's dtype, float32 between. Statistics are of deviations from a pivot
near the mean, combined by Chan's rule. Deterministic: no atomics, and sums in an order that the
shape and the launch configuration fix.

Traffic, with S the bytes of x and k = h * w pixels a window; nothing else is of that size:

    forward, training     2 S read, S / k written
    forward, evaluation   S read, S / k written
    backward              2 (S + S / k) read, S written

torch moves 4 S + 3 S / k forward with a pool, and 8 bytes an output for indices; 5 S without. The
FLOP are too few to count: time is bytes over bandwidth. One step of TALNet on 448 clips of
64 x 400 in bfloat16 moves 8.8 GB forward and 14.3 GB backward. The second pass of a direction runs
from the end of x to its start, and finds in L2 what the first pass has read last.

Backward keeps x and vectors of length C. It computes the normalised values again and reduces
sum(g) and sum(g * xhat) over the output, g being the gradient that the ReLU let pass; then, with n
pixels in a channel,

    dx = weight / sqrt(var + eps) * (g at first maxima - sum(g) / n - xhat * sum(g * xhat) / n)

Synchronising over ranks is a reduction between the operators: of (mean, var, count) between
``bn_stats`` and ``bn_relu_pool_fwd``, of the two sums between ``bn_relu_pool_bwd_sums`` and
``bn_relu_pool_bwd_dx``.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor, nn

from fastat_kernels.backend import LAUNCH, NUM_SMS, operator, target, use_kernel

MAX_ROWS = 2**31 - 2**16
"""Pixels of a map that the kernels can count in 32 bits; addresses have 64."""

Pool = tuple[int, int]


# ------------------------------------------------------------------------------------ reference
def bn_relu_pool_ref(x: Tensor, weight: Tensor, bias: Tensor, eps: float, pool: Pool) -> Tensor:
    """x [B, C, H, W] -> [B, C, H // h, W // w], in training. The specification; float32 inside."""
    var, mean = torch.var_mean(x.float(), (0, 2, 3), correction=0, keepdim=True)
    xhat = (x.float() - mean) * (var + eps).rsqrt()
    y = xhat * weight.float().view(-1, 1, 1) + bias.float().view(-1, 1, 1)
    return F.max_pool2d(y.relu(), pool).to(x.dtype)


# --------------------------------------------------------------------------------- triton kernels
# fmt: off
@triton.jit
def _rows_of_program(g, G, N, STEP: tl.constexpr):
    """How many of N rows program g of G reads, going round by STEP rows."""
    steps = tl.cdiv(N, STEP)
    missing = tl.where((steps - 1) % G == g, steps * STEP - N, 0)
    return (steps - g + G - 1) // G * STEP - missing


@triton.jit(do_not_specialize=["N"])
def _bn_stats_kernel(
    x_ptr,                    # [N, C]
    part_mean_ptr,            # [G, C] float32: the mean of a program's rows, less x's first row
    part_m2_ptr,              # [G, C] float32: the sum of their squared deviations from their mean
    N,
    C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    UNROLL: tl.constexpr,
):
    STEP: tl.constexpr = BLOCK_N * UNROLL
    g, G = tl.program_id(0), tl.num_programs(0)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    r = tl.arange(0, BLOCK_N)
    mc = (c < C)[None, :]
    at = r[:, None] * C + c[None, :]

    # Rounded to x's dtype, the pivot can stand for rows beyond the end: they deviate by 0.
    mask = (g * STEP + r < N)[:, None] & mc
    start = tl.load(x_ptr + g.to(tl.int64) * (STEP * C) + at, mask, 0.0)
    pivot = tl.sum(start.to(tl.float32), 0) / tl.minimum(N - g * STEP, BLOCK_N).to(tl.float32)
    pivot = pivot.to(x_ptr.dtype.element_ty)
    beyond = tl.broadcast_to(pivot[None, :], (BLOCK_N, BLOCK_C))
    pivot = pivot.to(tl.float32)
    total = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    square = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    for turn in range(tl.cdiv(tl.cdiv(N, STEP) - g, G)):
        step = g + turn * G
        rows = x_ptr + step.to(tl.int64) * (STEP * C)
        for u in tl.static_range(UNROLL):
            mask = (u * BLOCK_N + r < N - step * STEP)[:, None] & mc
            d = tl.load(rows + (u * BLOCK_N * C + at), mask, beyond).to(tl.float32) - pivot[None, :]
            total += d
            square += d * d

    n = _rows_of_program(g, G, N, STEP).to(tl.float32)
    shift = tl.sum(total, 0) / n
    m2 = tl.maximum(tl.sum(square, 0) - n * shift * shift, 0.0, propagate_nan=tl.PropagateNan.ALL)
    mean = pivot - tl.load(x_ptr + c, c < C, 0.0).to(tl.float32) + shift
    tl.store(part_mean_ptr + g * C + c, mean, c < C)
    tl.store(part_m2_ptr + g * C + c, m2, c < C)


@triton.jit(do_not_specialize=["N", "G"])
def _combine_stats_kernel(
    x_ptr,                                  # [N, C]
    part_mean_ptr, part_m2_ptr,             # [G, C]
    mean_ptr, var_ptr, count_ptr,           # [C], [C], []
    N, G,
    C: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    g = tl.arange(0, BLOCK_G)
    mask = (g < G)[:, None] & (c < C)[None, :]
    at = g[:, None] * C + c[None, :]
    part = tl.load(part_mean_ptr + at, mask, 0.0)
    m2 = tl.load(part_m2_ptr + at, mask, 0.0)
    n = tl.where(g < G, _rows_of_program(g, G, N, STEP), 0).to(tl.float32)[:, None]
    count = N.to(tl.float32)
    mean = tl.sum(n * part, 0) / count
    d = part - mean[None, :]
    var = tl.sum(m2 + n * d * d, 0) / count
    first_row = tl.load(x_ptr + c, c < C, 0.0).to(tl.float32)
    tl.store(mean_ptr + c, first_row + mean, c < C)
    tl.store(var_ptr + c, var, c < C)
    tl.store(count_ptr, count, tl.program_id(0) == 0)


@triton.jit
def _channel(mean_ptr, var_ptr, weight_ptr, bias_ptr, c, C: tl.constexpr, EPS: tl.constexpr):
    """mean, 1 / sqrt(var + eps), weight times that, bias: [1, BLOCK_C] float32 each."""
    mean = tl.load(mean_ptr + c, c < C, 0.0).to(tl.float32)
    invstd = tl.rsqrt(tl.load(var_ptr + c, c < C, 1.0).to(tl.float32) + EPS)
    scale = tl.load(weight_ptr + c, c < C, 0.0).to(tl.float32) * invstd
    bias = tl.load(bias_ptr + c, c < C, 0.0).to(tl.float32)
    return mean[None, :], invstd[None, :], scale[None, :], bias[None, :]


@triton.jit
def _cells(first, HC, WC: tl.constexpr, EXTRA: tl.constexpr, BLOCK_P: tl.constexpr):
    """The cells from ``first`` on, of HC x WC to a clip.

    Returns the row (of all clips) and the clip of the first cell, and for each cell how many rows
    and clips further down it is, and its column.
    """
    row = first // WC
    column = first - row * WC + tl.arange(0, BLOCK_P)
    down = column // WC
    column -= down * WC
    clip = row * 0
    clips_down = down * 0
    if EXTRA != 0:
        clip = row // HC
        clips_down = (row - clip * HC + down) // HC
    return row, clip, down, clips_down, column


@triton.jit(do_not_specialize=["N", "HC"])
def _bn_relu_pool_fwd_kernel(
    x_ptr,                                        # [B, H, W, C]
    mean_ptr, var_ptr, weight_ptr, bias_ptr,      # [C]
    out_ptr,                                      # [N, C], N = B * HC * WC windows
    N, HC,
    C: tl.constexpr,
    W: tl.constexpr,
    WC: tl.constexpr,
    EXTRA: tl.constexpr,                          # H - HC * PH, rows of a clip in no window
    PH: tl.constexpr,
    PW: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_P
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    p = tl.arange(0, BLOCK_P)
    mask = (first + p < N)[:, None] & (c < C)[None, :]
    row, clip, down, clips_down, column = _cells(first, HC, WC, EXTRA, BLOCK_P)
    x_ptr += (row * PH + clip * EXTRA).to(tl.int64) * (W * C)
    at = (((down * PH + clips_down * EXTRA) * W + column * PW) * C)[:, None] + c[None, :]

    mean, _, scale, bias = _channel(mean_ptr, var_ptr, weight_ptr, bias_ptr, c, C, EPS)
    best = tl.load(x_ptr + at, mask, 0.0).to(tl.float32)
    if PH * PW > 1:
        # The largest y is that of the largest x, of the smallest where the scale is negative.
        sign = tl.where(scale < 0, -1.0, 1.0)
        best *= sign
        for k in tl.static_range(1, PH * PW):
            x = tl.load(x_ptr + (k // PW * W + k % PW) * C + at, mask, 0.0).to(tl.float32)
            best = tl.maximum(best, x * sign, propagate_nan=tl.PropagateNan.ALL)
        best *= sign
    y = tl.fma(best - mean, scale, bias)
    y = tl.maximum(y, 0.0, propagate_nan=tl.PropagateNan.ALL)
    out_ptr += first.to(tl.int64) * C
    tl.store(out_ptr + (p[:, None] * C + c[None, :]), y.to(out_ptr.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["N", "HC"])
def _bn_relu_pool_sums_kernel(
    dout_ptr,                                     # [N, C]
    x_ptr,                                        # [B, H, W, C]
    mean_ptr, var_ptr, weight_ptr, bias_ptr,      # [C]
    part_g_ptr, part_gx_ptr,                      # [G, C] float32
    N, HC,
    C: tl.constexpr,
    W: tl.constexpr,
    WC: tl.constexpr,
    EXTRA: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    UNROLL: tl.constexpr,
):
    program, G = tl.program_id(0), tl.num_programs(0)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    p = tl.arange(0, BLOCK_P)
    mean, invstd, scale, bias = _channel(mean_ptr, var_ptr, weight_ptr, bias_ptr, c, C, EPS)
    sign = tl.where(scale < 0, -1.0, 1.0)
    sum_g = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    sum_gx = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for turn in range(tl.cdiv(tl.cdiv(N, BLOCK_P * UNROLL) - program, G)):
        step = program + turn * G
        for u in tl.static_range(UNROLL):
            first = (step * UNROLL + u) * BLOCK_P
            mask = (first + p < N)[:, None] & (c < C)[None, :]
            row, clip, down, clips_down, column = _cells(first, HC, WC, EXTRA, BLOCK_P)
            base = x_ptr + (row * PH + clip * EXTRA).to(tl.int64) * (W * C)
            at = (((down * PH + clips_down * EXTRA) * W + column * PW) * C)[:, None] + c[None, :]
            g_at = dout_ptr + first.to(tl.int64) * C + (p[:, None] * C + c[None, :])
            g = tl.load(g_at, mask, 0.0).to(tl.float32)
            x = tl.load(base + at, mask, 0.0).to(tl.float32)
            best = x
            if PH * PW > 1:
                best *= sign
                for k in tl.static_range(1, PH * PW):
                    next_ptr = base + (k // PW * W + k % PW) * C + at
                    other = tl.load(next_ptr, mask, 0.0).to(tl.float32)
                    best = tl.maximum(best, other * sign, propagate_nan=tl.PropagateNan.ALL)
                # A scale of 0 makes all pixels of a window equal: the first is the maximum.
                best = tl.where(scale == 0, x, best * sign)
            d = best - mean
            g = tl.where(tl.fma(d, scale, bias) <= 0, 0.0, g)
            sum_g += g
            sum_gx += g * d
    tl.store(part_g_ptr + program * C + c, tl.sum(sum_g, 0), c < C)
    tl.store(part_gx_ptr + program * C + c, tl.sum(sum_gx, 0) * tl.sum(invstd, 0), c < C)


@triton.jit(do_not_specialize=["G"])
def _combine_sums_kernel(
    part_g_ptr, part_gx_ptr,                # [G, C]
    sum_g_ptr, sum_gx_ptr,                  # [C]
    G,
    C: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    g = tl.arange(0, BLOCK_G)
    mask = (g < G)[:, None] & (c < C)[None, :]
    at = g[:, None] * C + c[None, :]
    tl.store(sum_g_ptr + c, tl.sum(tl.load(part_g_ptr + at, mask, 0.0), 0), c < C)
    tl.store(sum_gx_ptr + c, tl.sum(tl.load(part_gx_ptr + at, mask, 0.0), 0), c < C)


@triton.jit(do_not_specialize=["N", "H", "HC", "HO"])
def _bn_relu_pool_dx_kernel(
    dout_ptr,                                     # [B, HO, WO, C]
    x_ptr,                                        # [B, H, W, C]
    mean_ptr, var_ptr, weight_ptr, bias_ptr,      # [C]
    sum_g_ptr, sum_gx_ptr, count_ptr,             # [C], [C], []; read if BATCH
    dx_ptr,                                       # [B, H, W, C]
    N, H, HC, HO,                                 # N = B * HC * WC cells, incomplete ones too
    C: tl.constexpr,
    W: tl.constexpr,
    WC: tl.constexpr,
    WO: tl.constexpr,
    EXTRA: tl.constexpr,                          # H - HC * PH <= 0
    PH: tl.constexpr,
    PW: tl.constexpr,
    EPS: tl.constexpr,
    BATCH: tl.constexpr,                          # mean and var are x's own
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_P
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    p = tl.arange(0, BLOCK_P)
    mask = (first + p < N)[:, None] & (c < C)[None, :]
    row, clip, down, clips_down, column = _cells(first, HC, WC, EXTRA, BLOCK_P)
    base = (row * PH + clip * EXTRA).to(tl.int64) * (W * C)
    at = (((down * PH + clips_down * EXTRA) * W + column * PW) * C)[:, None] + c[None, :]

    # Incomplete cells have no output.
    out_row = row
    out_down = down
    has_out = mask
    if EXTRA != 0:
        out_row -= clip
        out_down -= clips_down
        has_out &= (row - clip * HC + down - clips_down * HC < HO)[:, None]
    if WC != WO:
        has_out &= (column < WO)[:, None]
    dout_ptr += out_row.to(tl.int64) * (WO * C)
    g_at = ((out_down * WO + column) * C)[:, None] + c[None, :]
    g = tl.load(dout_ptr + g_at, has_out, 0.0).to(tl.float32)

    mean, invstd, scale, bias = _channel(mean_ptr, var_ptr, weight_ptr, bias_ptr, c, C, EPS)
    sign = tl.where(scale < 0, -1.0, 1.0)
    xs = ()
    best = tl.full((BLOCK_P, BLOCK_C), float("-inf"), tl.float32)
    for k in tl.static_range(PH * PW):
        inside = mask
        if EXTRA != 0:
            y = (row - clip * HC + down - clips_down * HC) * PH + k // PW
            inside &= (y < H)[:, None]
        if WC != WO:
            inside &= (column * PW + k % PW < W)[:, None]
        at_k = base + (k // PW * W + k % PW) * C
        x = tl.load(x_ptr + at_k + at, inside, 0.0).to(tl.float32)
        xs = xs + (x,)  # type: ignore[assignment]
        if PH * PW > 1:
            best = tl.maximum(best, x * sign, propagate_nan=tl.PropagateNan.ALL)
    top = best * sign if PH * PW > 1 else xs[0]  # type: ignore[misc]
    g = tl.where(tl.fma(top - mean, scale, bias) <= 0, 0.0, g) * scale

    if BATCH:
        n = tl.load(count_ptr)
        sum_g = tl.load(sum_g_ptr + c, c < C, 0.0)[None, :]
        sum_gx = tl.load(sum_gx_ptr + c, c < C, 0.0)[None, :]
        everyone = -scale * (sum_g / n)
        slope = -scale * invstd * (sum_gx / n)
    for k in tl.static_range(PH * PW):
        inside = mask
        if EXTRA != 0:
            y = (row - clip * HC + down - clips_down * HC) * PH + k // PW
            inside &= (y < H)[:, None]
        if WC != WO:
            inside &= (column * PW + k % PW < W)[:, None]
        at_k = base + (k // PW * W + k % PW) * C
        dx = g
        if PH * PW > 1:
            wins = xs[k] * sign == best
            dx = tl.where(wins, g, 0.0)
            g = tl.where(wins, 0.0, g)  # to the first maximum alone
        if BATCH:
            dx += tl.fma(xs[k] - mean, slope, everyone)
        tl.store(dx_ptr + at_k + at, dx.to(dx_ptr.dtype.element_ty), inside)
# fmt: on


# -------------------------------------------------------------------------------------- launchers
class Config(NamedTuple):
    """A program takes blocks of ``elements`` windows x channels.

    Those of a reduction go round by ``unroll`` blocks each, and there are ``programs`` of them.
    """

    elements: int
    num_warps: int
    unroll: int = 1
    programs: int = 0


MAX_BLOCK_C = 512


def _configs(target: int, kernel: str, window: int) -> list[Config]:
    """Launches of "stats", "fwd", "sums" or "dx" with ``window`` pixels to an output.

    16 bytes a thread and load take 8 bfloat16: what matters is how many loads are on their way. The
    programs of a reduction must all be resident, or the last ones run on an empty chip.
    """
    sms = NUM_SMS[target]
    choices: list[tuple[int, ...]]
    match kernel:
        case "stats":
            choices = [(1024, 4, 4, 6 * sms), (1024, 4, 8, 4 * sms), (2048, 8, 4, 3 * sms)]
        case "sums" if window == 1 and target == 80:  # where two blocks at a time spill
            choices = [(1024, 4, 4, 4 * sms), (1024, 4, 1, 5 * sms)]
        case "sums" if window == 1:
            choices = [(1024, 4, 2, 5 * sms), (1024, 4, 4, 4 * sms), (2048, 8, 2, 2 * sms)]
        case "sums":
            choices = [(1024, 4, 2, 4 * sms), (1024, 4, 1, 5 * sms), (2048, 8, 1, 2 * sms)]
        case "fwd" if window == 1:
            choices = [(4096, 4), (2048, 4), (8192, 8), (4096, 8)]
        case "fwd" if target == 100:  # (2048, 4) spills with Triton 3.6
            choices = [(4096, 8), (1024, 4), (2048, 8)]
        case "fwd":
            choices = [(2048, 4), (1024, 4), (4096, 8), (2048, 8)]
        case "dx" if window == 1:
            choices = [(4096, 4), (2048, 4), (4096, 8)]
        case "dx":
            choices = [(1024, 4), (2048, 4), (2048, 8)]
        case _:
            raise AssertionError(kernel)
    return [Config(*choice) for choice in choices]


class Block(NamedTuple):
    """Windows and channels of a block, and how many blocks of channels there are."""

    windows: int
    channels: int
    across: int


def _block(config: Config, C: int) -> Block:
    channels = min(triton.next_power_of_2(C), MAX_BLOCK_C)
    return Block(max(1, config.elements // channels), channels, triton.cdiv(C, channels))


def _rows(x: Tensor) -> Tensor:
    """[B, C, H, W] in channels_last, so that its memory is [B * H * W, C]."""
    x = x.contiguous(memory_format=torch.channels_last)
    assert 0 < x.numel() // x.shape[1] <= MAX_ROWS, f"{tuple(x.shape)}"
    return x


def _map(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _vectors(x: Tensor, num: int, *shape: int) -> list[Tensor]:
    return [torch.empty(shape, dtype=torch.float32, device=x.device) for _ in range(num)]


def _lines(x: Tensor, pool_h: int, pool_w: int) -> tuple[int, int, int]:
    """B, H, W of x as the kernels take it: windows that follow one another get a line each."""
    B, _, H, W = x.shape
    if pool_h == 1 and W % pool_w == 0:
        return 1, B * H * W // pool_w, pool_w
    return B, H, W


def _pooled(x: Tensor, pool_h: int, pool_w: int) -> tuple[int, int, int, int]:
    B, C, H, W = x.shape
    return B, C, H // pool_h, W // pool_w


COMBINE_C = 8
COMBINE_WARPS = 8


def _stats_triton(x: Tensor, *, config: Config | None = None) -> tuple[Tensor, Tensor, Tensor]:
    x = _rows(x)
    C = x.shape[1]
    N = x.numel() // C
    config = config or _configs(target(x), "stats", 1)[0]
    block = _block(config, C)
    step = block.windows * config.unroll
    G = min(triton.cdiv(N, step), max(1, config.programs // block.across))
    part_mean, part_m2 = _vectors(x, 2, G, C)
    mean, var = _vectors(x, 2, C)
    (count,) = _vectors(x, 1)
    _bn_stats_kernel[(G, block.across)](
        x, part_mean, part_m2, N, C, block.windows, block.channels, config.unroll,
        num_warps=config.num_warps, **LAUNCH,
    )  # fmt: skip
    _combine_stats_kernel[(triton.cdiv(C, COMBINE_C),)](
        x, part_mean, part_m2, mean, var, count, N, G,
        C, step, triton.next_power_of_2(G), COMBINE_C,
        num_warps=COMBINE_WARPS, **LAUNCH,
    )  # fmt: skip
    return mean, var, count


def _fwd_triton(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    count: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    pool_h: int,
    pool_w: int,
    *,
    config: Config | None = None,
) -> Tensor:
    x = _rows(x)
    C = x.shape[1]
    B, H, W = _lines(x, pool_h, pool_w)
    HC, WC = H // pool_h, W // pool_w
    config = config or _configs(target(x), "fwd", pool_h * pool_w)[0]
    block = _block(config, C)
    out = _map(x, _pooled(x, pool_h, pool_w))
    N = B * HC * WC
    _bn_relu_pool_fwd_kernel[(triton.cdiv(N, block.windows), block.across)](
        x, mean, var, weight, bias, out, N, HC,
        C, W, WC, H - HC * pool_h, pool_h, pool_w, eps, block.windows, block.channels,
        num_warps=config.num_warps, **LAUNCH,
    )  # fmt: skip
    return out


def _sums_triton(
    dout: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    pool_h: int,
    pool_w: int,
    *,
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:
    dout, x = _rows(dout), _rows(x)
    C = x.shape[1]
    B, H, W = _lines(x, pool_h, pool_w)
    HC, WC = H // pool_h, W // pool_w
    config = config or _configs(target(x), "sums", pool_h * pool_w)[0]
    block = _block(config, C)
    N = B * HC * WC
    step = block.windows * config.unroll
    G = min(triton.cdiv(N, step), max(1, config.programs // block.across))
    part_g, part_gx = _vectors(x, 2, G, C)
    sum_g, sum_gx = _vectors(x, 2, C)
    _bn_relu_pool_sums_kernel[(G, block.across)](
        dout, x, mean, var, weight, bias, part_g, part_gx, N, HC,
        C, W, WC, H - HC * pool_h, pool_h, pool_w, eps,
        block.windows, block.channels, config.unroll,
        num_warps=config.num_warps, **LAUNCH,
    )  # fmt: skip
    _combine_sums_kernel[(triton.cdiv(C, COMBINE_C),)](
        part_g, part_gx, sum_g, sum_gx, G, C, triton.next_power_of_2(G), COMBINE_C,
        num_warps=COMBINE_WARPS, **LAUNCH,
    )  # fmt: skip
    return sum_g, sum_gx


def _dx_triton(
    dout: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    count: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    sum_g: Tensor,
    sum_gx: Tensor,
    eps: float,
    pool_h: int,
    pool_w: int,
    *,
    config: Config | None = None,
) -> Tensor:
    dout, x = _rows(dout), _rows(x)
    C = x.shape[1]
    B, H, W = _lines(x, pool_h, pool_w)
    HC, WC = triton.cdiv(H, pool_h), triton.cdiv(W, pool_w)
    config = config or _configs(target(x), "dx", pool_h * pool_w)[0]
    block = _block(config, C)
    dx = _map(x, tuple(x.shape))
    N = B * HC * WC
    _bn_relu_pool_dx_kernel[(triton.cdiv(N, block.windows), block.across)](
        dout, x, mean, var, weight, bias, sum_g, sum_gx, mean if count is None else count, dx,
        N, H, HC, H // pool_h,
        C, W, WC, W // pool_w, H - HC * pool_h, pool_h, pool_w, eps, count is not None,
        block.windows, block.channels,
        num_warps=config.num_warps, **LAUNCH,
    )  # fmt: skip
    return dx


# -------------------------------------------------------------------------------------- operators
def _stats_plain(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    var, mean = torch.var_mean(x.float(), (0, 2, 3), correction=0)
    return mean, var, mean.new_full((), x.numel() // x.shape[1])


def _stats_fake(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    mean, var = (x.new_empty((x.shape[1],), dtype=torch.float32) for _ in range(2))
    return mean, var, x.new_empty((), dtype=torch.float32)


_stats = operator("bn_stats", plain=_stats_plain, kernel=_stats_triton, fake=_stats_fake)


def _normalised(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """xhat, weight / sqrt(var + eps) as [C, 1, 1], and xhat * weight + bias; float32."""
    mean, var, weight, bias = (v.float().view(-1, 1, 1) for v in (mean, var, weight, bias))
    xhat = (x.float() - mean) * (var + eps).rsqrt()
    return xhat, weight * (var + eps).rsqrt(), xhat * weight + bias


def _fwd_plain(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    count: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    pool_h: int,
    pool_w: int,
) -> Tensor:
    _, _, y = _normalised(x, mean, var, weight, bias, eps)
    return _map(x, _pooled(x, pool_h, pool_w)).copy_(F.max_pool2d(y, (pool_h, pool_w)).relu())


def _fwd_fake(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    count: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    pool_h: int,
    pool_w: int,
) -> Tensor:
    return _map(x, _pooled(x, pool_h, pool_w))


_fwd = operator("bn_relu_pool_fwd", plain=_fwd_plain, kernel=_fwd_triton, fake=_fwd_fake)


def _at_maximum(dout: Tensor, y: Tensor, pool_h: int, pool_w: int) -> Tensor:
    """[B, C, H, W]: the gradient of what is under the ReLU and the pool."""
    pool = (pool_h, pool_w)
    out, where = F.max_pool2d(y, pool, return_indices=True)
    return F.max_unpool2d(dout.float().where(out > 0, 0), where, pool, output_size=y.shape)


def _sums_plain(
    dout: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    pool_h: int,
    pool_w: int,
) -> tuple[Tensor, Tensor]:
    xhat, _, y = _normalised(x, mean, var, weight, bias, eps)
    g = _at_maximum(dout, y, pool_h, pool_w)
    return g.sum((0, 2, 3)), (g * xhat).sum((0, 2, 3))


def _sums_fake(
    dout: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    pool_h: int,
    pool_w: int,
) -> tuple[Tensor, Tensor]:
    sum_g, sum_gx = (x.new_empty((x.shape[1],), dtype=torch.float32) for _ in range(2))
    return sum_g, sum_gx


_sums = operator("bn_relu_pool_bwd_sums", plain=_sums_plain, kernel=_sums_triton, fake=_sums_fake)


def _dx_plain(
    dout: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    count: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    sum_g: Tensor,
    sum_gx: Tensor,
    eps: float,
    pool_h: int,
    pool_w: int,
) -> Tensor:
    xhat, scale, y = _normalised(x, mean, var, weight, bias, eps)
    g = _at_maximum(dout, y, pool_h, pool_w)
    if count is not None:
        g = g - (sum_g / count).view(-1, 1, 1) - xhat * (sum_gx / count).view(-1, 1, 1)
    return _map(x, tuple(x.shape)).copy_(scale * g)


def _dx_fake(
    dout: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    count: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    sum_g: Tensor,
    sum_gx: Tensor,
    eps: float,
    pool_h: int,
    pool_w: int,
) -> Tensor:
    return _map(x, tuple(x.shape))


_dx = operator("bn_relu_pool_bwd_dx", plain=_dx_plain, kernel=_dx_triton, fake=_dx_fake)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.eps, ctx.pool_h, ctx.pool_w = inputs
    ctx.save_for_backward(*tensors)


def _autograd(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    x, mean, var, count, weight, bias = ctx.saved_tensors
    options = ctx.eps, ctx.pool_h, ctx.pool_w
    sum_g, sum_gx = mean, var  # not read where mean and var are constants
    if count is not None or any(ctx.needs_input_grad[4:6]):
        sum_g, sum_gx = _sums(dout, x, mean, var, weight, bias, *options)
    dx = None
    if ctx.needs_input_grad[0]:
        dx = _dx(dout, x, mean, var, count, weight, bias, sum_g, sum_gx, *options)
    vectors = sum_gx.to(weight.dtype), sum_g.to(bias.dtype)
    return dx, None, None, None, *vectors, None, None, None


_fwd.register_autograd(_autograd, setup_context=_setup)


# ------------------------------------------------------------------------------------- public API
def batch_stats(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean [C], biased variance [C] and number of pixels [] of a map, in float32.

    No gradient goes through them: ``normalise_relu_pool`` gives x the whole of it.

    Raises:
        ValueError: ``x`` is not [B, C, H, W], or is empty.
    """
    if x.ndim != 4 or x.numel() == 0:
        raise ValueError(f"x must be [B, C, H, W] and not empty, got {tuple(x.shape)}")
    mean, var, count = _stats(x.detach())
    return mean, var, count


def normalise_relu_pool(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    count: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    pool: Pool | None = None,
) -> Tensor:
    """The window's maximum of relu((x - mean) * weight / sqrt(var + eps) + bias).

    Args:
        x: [B, C, H, W]; a copy is made of what is not in channels_last.
        mean, var: [C].
        count: with ``batch_stats(x)``, its third: the gradient of x includes what goes through
            mean and var. None for constants.
        weight, bias: [C].
        eps: added to ``var``.
        pool: (height, width) of a window; None for no pool.

    Returns:
        [B, C, H // h, W // w] in channels_last, x's dtype.

    Raises:
        ValueError: shapes do not agree, or ``x`` is smaller than a window or empty.
    """
    h, w = _checked(x, weight.numel(), pool)
    shapes = {tuple(v.shape) for v in (mean, var, weight, bias)}
    if shapes != {(x.shape[1],)} or x.numel() == 0:
        raise ValueError(
            f"x [B, C, H, W] takes mean, var, weight, bias [C], got {tuple(x.shape)} and "
            f"{', '.join(map(str, sorted(shapes)))}"
        )
    x = x.contiguous(memory_format=torch.channels_last)
    out: Tensor = _fwd(x, mean, var, count, weight, bias, eps, h, w)
    return out


def bn_relu_pool(x: Tensor, bn: nn.modules.batchnorm._BatchNorm, pool: Pool | None) -> Tensor:
    """``max_pool2d(relu(bn(x)), pool)``; updates the module's running statistics as it would.

    Args:
        x: [B, C, H, W].
        bn: its BatchNorm. Any but a plain ``nn.BatchNorm2d`` with weights is called as it is.
        pool: (height, width) of a window; None for no pool.

    Returns:
        [B, C, H // h, W // w], x's dtype.

    Raises:
        ValueError: shapes do not agree, ``x`` is smaller than a window, or one pixel is to train.
    """
    h, w = _checked(x, bn.num_features, pool)
    if not (use_kernel("bn_relu_pool", x) and _supported(x, bn)):
        x = bn(x)
        if pool is not None:
            # The maximum commutes with ReLU, and the pooled map is the smaller one to rectify.
            x = F.max_pool2d(x, pool)
        return F.relu_(x)
    x = x.contiguous(memory_format=torch.channels_last)
    mean, var, count = bn.running_mean, bn.running_var, None
    if bn.training or mean is None or var is None:
        mean, var, count = batch_stats(x)
        n = x.numel() // x.shape[1]
        if n == 1:
            raise ValueError(f"BatchNorm needs more than 1 pixel to train, got {tuple(x.shape)}")
        if bn.training and bn.track_running_stats:
            _update(bn, mean, var * (n / (n - 1)))
    out: Tensor = _fwd(x, mean, var, count, bn.weight, bn.bias, bn.eps, h, w)
    return out


def _checked(x: Tensor, num_features: int, pool: Pool | None) -> Pool:
    h, w = pool or (1, 1)
    if x.ndim != 4 or x.shape[1] != num_features:
        raise ValueError(f"x must be [B, {num_features}, H, W], got {tuple(x.shape)}")
    if h < 1 or w < 1 or x.shape[2] < h or x.shape[3] < w:
        raise ValueError(f"no window of {pool} pixels fits in {x.shape[2]} x {x.shape[3]}")
    return h, w


def _supported(x: Tensor, bn: nn.modules.batchnorm._BatchNorm) -> bool:
    """SyncBatchNorm and other relatives, float64 and maps of no or too many pixels are torch's."""
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    pixels = x.numel() // x.shape[1]
    return type(bn) is nn.BatchNorm2d and bn.affine and x.dtype in dtypes and 0 < pixels <= MAX_ROWS


def _update(bn: nn.modules.batchnorm._BatchNorm, mean: Tensor, unbiased: Tensor) -> None:
    """torch's running statistics; no factor has to come to the CPU for the cumulative average."""
    factor: float | Tensor = 0.0 if bn.momentum is None else bn.momentum
    if bn.num_batches_tracked is not None:
        bn.num_batches_tracked.add_(1)
        if bn.momentum is None:
            factor = bn.num_batches_tracked.float().reciprocal()
    if not isinstance(factor, Tensor) and factor == 0:  # a checkpointed block, computed again
        return
    assert bn.running_mean is not None and bn.running_var is not None
    for running, new in ((bn.running_mean, mean), (bn.running_var, unbiased)):
        weight = factor.to(running.dtype) if isinstance(factor, Tensor) else factor
        running.lerp_(new.to(running.dtype), weight)
