"""Patch embedding: a log-mel map straight to a Transformer's tokens.

out[b, 0] = cls + pos[0], out[b, 1] = dist + pos[1], and for n = f * gt + t, a patch of gf x gt,
out[b, 2 + n] = pos[2 + n] + bias
                + sum_{m, i} weight[:, 0, m, i] * x[b, t * tstride + i, f * fstride + m].

Source: Gong et al., "AST: Audio Spectrogram Transformer" (2021), section 2.1.
Shapes: B clips, T frames, F mel bins, N = gf gt patches of 16 mel bins x 16 frames, R = 2 + N
tokens, D width. x [B, T, F], weight [D, 1, 16, 16], pos [1, R, D], out [B, R, D].
Precision: x and weight are rounded to the compute dtype; float32 accumulation and epilogue (float32
products are three tf32 ones); the parameters' gradients are float32. Runs on one chip agree in
every bit; the order of sums depends on its number of SMs.

Implicit GEMM. x is first rewritten as columns [B, gf, T, 16] in the compute dtype: the 16 mel bins
of every row of patches side by side. A patch is then 256 neighbours in memory that start at a
multiple of 16, whatever the stride, so 16-byte loads fetch it, and patches that overlap in time
share them. In bfloat16, columns are tstride / 96 of a float32 output of width 768.

Traffic: forward writes 4 B R D bytes (float32 tokens) and backward reads them. Beside that, x,
columns and, in backward, partial gradients: 1 KiB for each column of a program's tile of the width,
17 MB on 132 SMs at width 768. Through L2 also go the columns, 512 bytes a patch for each tile of
the width, against 1 KiB of tokens in a tile of 256. Operations: 512 B N D in each direction.
A1 (20 clips of 128 x 1024): 75 MB and 9.5 GFLOP each way at stride 10, 451 MB and 57.7 GFLOP at 4.
A3 (80 of 64 x 400): 85 MB and 10.8 GFLOP at 8. 128 FLOP a byte: bound by memory.
"""

import functools
import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from fastat_kernels.backend import LAUNCH, NUM_SMS, operator, target, use_kernel

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""What the kernels compute patches in."""

PATCH = 16
"""Mel bins and frames of a patch."""

NUM_SPECIAL = 2
"""The class and the distillation token, first in a sequence."""

SIDE = tl.constexpr(PATCH)
AREA = tl.constexpr(PATCH * PATCH)
SPECIAL = tl.constexpr(NUM_SPECIAL)


class FwdConfig(NamedTuple):
    rows: int
    """Tokens of a tile."""
    width: int
    """Columns of the width of a tile."""
    slice: int
    """Elements of a patch in one product; 256: the weight's tile is loaded once and stays."""
    halves: int
    """Products that ``width`` is cut in, 1 or 2; 2 only with slices of 256."""
    per_sm: int
    """Programs on one SM."""
    num_warps: int
    num_stages: int
    """Of asynchronous copies; 1 with slices of 256: the next patches are loaded to registers, which
    needs one tile of patches in shared memory instead of three."""


class BwdConfig(NamedTuple):
    rows: int
    width: int
    slice: int
    """Elements of a patch whose weights one program has; dout is read 256 / slice times."""
    per_sm: int
    num_warps: int
    num_stages: int


class Work(NamedTuple):
    """How programs share tiles of tokens x clips."""

    tiles: int
    """Tiles of tokens that one program goes through."""
    clips: int
    """Clips that it goes through in each."""
    tile_groups: int
    clip_groups: int


# ------------------------------------------------------------------ reference
def patch_embed_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    pos: Tensor,
    cls_token: Tensor,
    dist_token: Tensor,
    stride: tuple[int, int],
) -> Tensor:
    """-> [B, R, D] float32. The specification; float32 inside, patches cut one by one."""
    gf, gt = _grid(x, stride)
    patches = [
        x[:, t * stride[1] :, f * stride[0] :][:, :PATCH, :PATCH].mT.flatten(1)
        for f in range(gf)
        for t in range(gt)
    ]
    tokens = F.linear(torch.stack(patches, 1).float(), weight.float().flatten(1), bias.float())
    special = torch.cat([cls_token, dist_token], 1).float().expand(len(x), -1, -1)
    return torch.cat([special, tokens], 1) + pos.float()


def _grid(x: Tensor, stride: tuple[int, int]) -> tuple[int, int]:
    """Patches along the mel and the time axis of x [B, T, F]."""
    return (x.shape[2] - PATCH) // stride[0] + 1, (x.shape[1] - PATCH) // stride[1] + 1


# --------------------------------------------------------------- triton kernels
# fmt: off
@triton.jit
def _columns_kernel(
    x_ptr,                        # [B, T, F]
    columns_ptr,                  # [B, gf, T, 16]
    T, gf,
    x_sb, x_st, x_sf,
    FSTRIDE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    tiles = tl.cdiv(T, BLOCK_T)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    t = tl.program_id(0) % tiles * BLOCK_T + tl.arange(0, BLOCK_T)
    m = tl.arange(0, SIDE)
    for i in tl.static_range(BLOCK_F):
        f = tl.program_id(1) * BLOCK_F + i
        mask = (t < tl.where(f < gf, T, 0))[:, None]
        place = t.to(tl.int64)[:, None] * x_st + (f * FSTRIDE + m)[None, :] * x_sf
        x = tl.load(x_ptr + b * x_sb + place, mask, 0.0)          # [BLOCK_T, 16]
        columns = columns_ptr + (b * gf + f) * T * SIDE + (t[:, None] * SIDE + m[None, :])
        tl.store(columns, x.to(columns_ptr.dtype.element_ty), mask)


@triton.jit
def _addend(bias_ptr, pos_ptr, cls_ptr, dist_ptr, r, d, R, D):
    """[rows, width]: positions, and the bias or, in the first two rows, the special tokens."""
    md = (d < D)[None, :]
    bias = tl.load(bias_ptr + d, d < D, 0.0).to(tl.float32)[None, :]
    cls = tl.load(cls_ptr + d, d < D, 0.0).to(tl.float32)[None, :]
    dist = tl.load(dist_ptr + d, d < D, 0.0).to(tl.float32)[None, :]
    pos = tl.load(pos_ptr + r[:, None] * D + d[None, :], (r < R)[:, None] & md, 0.0)
    other = tl.where((r == 1)[:, None], dist, bias)
    return pos.to(tl.float32) + tl.where((r == 0)[:, None], cls, other)


@triton.jit
def _store_tokens(out_ptr, r, d, R, D, tokens):
    mask = (r < R)[:, None] & (d < D)[None, :]
    out = out_ptr + (r[:, None] * D + d[None, :])
    tl.store(out, tokens.to(out_ptr.dtype.element_ty), mask)


@triton.jit
def _patch_embed_fwd_kernel(
    columns_ptr,                  # [B, gf, T, 16]
    weight_ptr,                   # [D, 256], frames before mel bins as in columns
    bias_ptr, pos_ptr,            # [D], [R, D]
    cls_ptr, dist_ptr,            # [D]
    out_ptr,                      # [B, R, D]
    B, T, R, D, gt, tstride, clip_size,   # clip_size: elements of a clip's columns
    tiles, clips, tile_groups,    # see Work
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    SLICE: tl.constexpr,
    HALVES: tl.constexpr,         # products that WIDTH is cut in: a smaller epilogue at a time
    STAGES: tl.constexpr,
):
    pid = tl.program_id(0)
    width_tiles = tl.cdiv(D, WIDTH)
    d = pid % width_tiles * WIDTH + tl.arange(0, WIDTH // HALVES)
    e = d + WIDTH // HALVES       # the second half
    group = pid // width_tiles
    first_tile = group % tile_groups * tiles
    first_clip = group // tile_groups * clips
    last_clip = tl.minimum(first_clip + clips, B)
    columns_step, clip_step = clip_size.to(tl.int64), R.to(tl.int64) * D
    k = tl.arange(0, SLICE)
    weight_tile = weight_ptr + d[None, :] * AREA + k[:, None]
    if SLICE == AREA:             # [256, WIDTH / HALVES]
        weight = tl.load(weight_tile, (d < D)[None, :], 0.0)
        if HALVES == 2:
            second = weight_ptr + e[None, :] * AREA + k[:, None]
            weight2 = tl.load(second, (e < D)[None, :], 0.0)
    for tile in range(first_tile, tl.minimum(first_tile + tiles, tl.cdiv(R, ROWS))):
        r = tile * ROWS + tl.arange(0, ROWS)
        n = r - SPECIAL
        mr = ((r < R) & (n >= 0))[:, None]                        # the special tokens have no patch
        patch = ((n // gt) * T + (n % gt) * tstride) * SIDE       # [ROWS]
        patch_tile = columns_ptr + (patch[:, None] + k[None, :])
        addend = _addend(bias_ptr, pos_ptr, cls_ptr, dist_ptr, r, d, R, D)
        if HALVES == 2:
            addend2 = _addend(bias_ptr, pos_ptr, cls_ptr, dist_ptr, r, e, R, D)
        if SLICE == AREA:
            if STAGES == 1:       # the next clip's patches wait in registers
                a = tl.load(patch_tile + first_clip * columns_step, mr, 0.0)
            for b in tl.range(first_clip, last_clip, num_stages=STAGES):
                if STAGES == 1:
                    after = tl.minimum(b + 1, last_clip - 1)
                    ahead = tl.load(patch_tile + after * columns_step, mr, 0.0)
                else:
                    a = tl.load(patch_tile + b * columns_step, mr, 0.0)  # [ROWS, 256]
                out = out_ptr + b * clip_step
                acc = tl.dot(a, weight, input_precision=PRECISION)
                _store_tokens(out, r, d, R, D, acc + addend)
                if HALVES == 2:
                    acc2 = tl.dot(a, weight2, input_precision=PRECISION)
                    _store_tokens(out, r, e, R, D, acc2 + addend2)
                if STAGES == 1:
                    a = ahead
        else:
            for b in range(first_clip, last_clip):
                acc = tl.zeros([ROWS, WIDTH], tl.float32)
                for k0 in tl.range(0, AREA, SLICE, num_stages=STAGES):
                    a = tl.load(patch_tile + b * columns_step + k0, mr, 0.0)
                    w = tl.load(weight_tile + k0, (d < D)[None, :], 0.0)
                    acc = tl.dot(a, w, acc, input_precision=PRECISION)
                _store_tokens(out_ptr + b * clip_step, r, d, R, D, acc + addend)


@triton.jit
def _patch_embed_bwd_kernel(
    dout_ptr,                     # [B, R, D]
    columns_ptr,                  # [B, gf, T, 16]
    dweight_ptr,                  # [groups, 256, D] fp32
    dbias_ptr,                    # [groups, D] fp32
    dpos_ptr,                     # [clip groups, R, D] fp32
    dcls_ptr, ddist_ptr,          # [D] fp32, written where there is one clip group
    B, T, R, D, gt, tstride, clip_size,
    tiles, clips, tile_groups,
    ONE_CLIP_GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    SLICE: tl.constexpr,
    STAGES: tl.constexpr,
):
    slices: tl.constexpr = AREA // SLICE
    first_k = tl.program_id(0) % slices * SLICE
    pid = tl.program_id(0) // slices
    width_tiles = tl.cdiv(D, WIDTH)
    d = pid % width_tiles * WIDTH + tl.arange(0, WIDTH)
    group = pid // width_tiles
    first_tile = group % tile_groups * tiles
    clip_group = group // tile_groups
    first_clip = clip_group * clips
    last_clip = tl.minimum(first_clip + clips, B)
    columns_step, clip_step = clip_size.to(tl.int64), R.to(tl.int64) * D
    dpos_tile = dpos_ptr + clip_group * clip_step
    md = (d < D)[None, :]
    k = first_k + tl.arange(0, SLICE)
    dweight = tl.zeros([SLICE, WIDTH], tl.float32)
    dbias = tl.zeros([WIDTH], tl.float32)
    for tile in range(first_tile, tl.minimum(first_tile + tiles, tl.cdiv(R, ROWS))):
        r = tile * ROWS + tl.arange(0, ROWS)
        n = r - SPECIAL
        mo = (r < R)[:, None] & md
        mr = ((r < R) & (n >= 0))[:, None]
        place = r[:, None] * D + d[None, :]
        patch = ((n // gt) * T + (n % gt) * tstride) * SIDE
        patch_tile = columns_ptr + (patch[:, None] + k[None, :])
        dpos = tl.zeros([ROWS, WIDTH], tl.float32)
        for b in tl.range(first_clip, last_clip, num_stages=STAGES):
            g = tl.load(dout_ptr + b * clip_step + place, mo, 0.0)
            a = tl.load(patch_tile + b * columns_step, mr, 0.0)   # [ROWS, SLICE]
            dpos += g.to(tl.float32)
            dweight = tl.dot(tl.trans(a), g.to(a.dtype), dweight, input_precision=PRECISION)
        dbias += tl.sum(tl.where((n >= 0)[:, None], dpos, 0.0), 0)
        if first_k == 0:
            tl.store(dpos_tile + place, dpos, mo)
            if ONE_CLIP_GROUP:
                tl.store(dcls_ptr + place, dpos, mo & (r == 0)[:, None])
                tl.store(ddist_ptr + (place - D), dpos, mo & (r == 1)[:, None])
    group_row = group.to(tl.int64) * AREA
    tl.store(dweight_ptr + group_row * D + (k[:, None] * D + d[None, :]), dweight, md)
    if first_k == 0:
        tl.store(dbias_ptr + group * D + d, dbias, d < D)


@triton.jit
def _patch_embed_sum_kernel(
    dweights_ptr, dbiases_ptr,    # [groups, 256, D], [groups, D] fp32
    dposes_ptr,                   # [clip_groups, R, D] fp32
    dweight_ptr, dbias_ptr,       # [D, 16 mel bins, 16 frames], [D] fp32
    dpos_ptr,                     # [R, D] fp32
    dcls_ptr, ddist_ptr,          # [D] fp32
    R, D, groups, clip_groups, weight_programs,
    WIDTH: tl.constexpr,
    SLICE: tl.constexpr,          # a multiple of 16
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0)
    if pid < weight_programs:
        slices: tl.constexpr = AREA // SLICE
        d = pid // slices * WIDTH + tl.arange(0, WIDTH)
        md = d < D
        k = pid % slices * SLICE + tl.arange(0, SLICE)            # mel bins before frames
        row = k % SIDE * SIDE + k // SIDE                         # frames before mel bins
        place = row[None, :] * D + d[:, None]
        step = tl.full([], AREA, tl.int64) * D
        dweight = tl.zeros([WIDTH, SLICE], tl.float32)
        for group in range(groups):
            part = dweights_ptr + group * step
            dweight += tl.load(part + place, md[:, None], 0.0)
        tl.store(dweight_ptr + d[:, None] * AREA + k[None, :], dweight, md[:, None])
        if pid % slices == 0:
            dbias = tl.zeros([WIDTH], tl.float32)
            for group in range(groups):
                dbias += tl.load(dbiases_ptr + group * D + d, md, 0.0)
            tl.store(dbias_ptr + d, dbias, md)
    else:
        size = R.to(tl.int64) * D
        i = (pid - weight_programs).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        mask = i < size
        dpos = tl.zeros([BLOCK], tl.float32)
        for group in range(clip_groups):
            dpos += tl.load(dposes_ptr + group * size + i, mask, 0.0)
        tl.store(dpos_ptr + i, dpos, mask)
        tl.store(dcls_ptr + i, dpos, i < D)
        tl.store(ddist_ptr + (i - D), dpos, (i >= D) & (i < 2 * D))
# fmt: on


# --------------------------------------------------------------------- launchers
COLUMNS_T, COLUMNS_F, COLUMNS_WARPS = 64, 4, 16  # two elements a thread and row of patches
SUM_WIDTH, SUM_SLICE, SUM_BLOCK = 32, 64, 1024


def _fwd_configs(arch: int, dtype: torch.dtype, width: int) -> list[FwdConfig]:
    """The configuration that forward launches take, then others worth timing."""
    if dtype == torch.float32:
        return [FwdConfig(64, 64, 16 if arch == 80 else 32, 1, 2, 8, 3)]
    if arch == 80:
        return [FwdConfig(64, 64, 64, 1, 2, 4, 3), FwdConfig(64, 128, 64, 1, 1, 8, 2)]
    small = FwdConfig(64, 64, 256, 1, 2, 4, 1)  # two programs on an SM
    narrow = [FwdConfig(64, 128, 256, 1, 1, 8, 1), FwdConfig(64, 128, 256, 1, 1, 8, 3)]
    if width % 128:
        return [small, *narrow]
    if width % 256:
        return [*narrow, small]
    wide = [FwdConfig(64, 256, 256, 2, 1, 8, 1)]
    if arch == 90:
        wide += [FwdConfig(64, 256, 256, 2, 1, 16, 1), FwdConfig(64, 256, 256, 2, 1, 8, 2)]
    return [*wide, *narrow, small, FwdConfig(128, 128, 64, 1, 2, 8, 3)]


def _bwd_configs(arch: int, dtype: torch.dtype, width: int) -> list[BwdConfig]:
    """The configuration that backward launches take, then others worth timing."""
    if dtype == torch.float32:
        return [BwdConfig(32, 32, 128, 2, 8, 2) if arch == 80 else BwdConfig(32, 64, 64, 2, 8, 2)]
    if arch == 80:
        return [BwdConfig(32, 64, 256, 1, 8, 2), BwdConfig(32, 64, 128, 2, 8, 2)]
    return [
        BwdConfig(32, 128, 256, 1, 8, 4),
        BwdConfig(32, 128, 256, 1, 8, 6),
        BwdConfig(64, 64, 256, 1, 8, 3),
        BwdConfig(32, 64, 256, 2, 4, 3),
        BwdConfig(64, 128, 128, 1, 8, 3),
    ]


def _num_sms(x: Tensor) -> int:
    if x.is_cuda:
        return torch.cuda.get_device_properties(x.device).multi_processor_count
    return NUM_SMS[target(x)]


@functools.cache
def _share(tiles: int, clips: int, programs: int) -> Work:
    """The division of ``tiles`` x ``clips`` among at most ``programs`` that is done soonest."""

    def cost(work: Work) -> int:
        # A tile's positions are read, or their gradient is written and added, once for each group.
        return work.tiles * (work.clips + 2)

    shares = []
    for clip_groups in range(1, min(clips, programs) + 1):
        per_clips = math.ceil(clips / clip_groups)
        per_tiles = math.ceil(tiles / min(tiles, programs // clip_groups))
        groups = math.ceil(tiles / per_tiles), math.ceil(clips / per_clips)
        shares.append(Work(per_tiles, per_clips, *groups))
    return min(shares, key=cost)  # of equals, the one with the fewest clip groups


def _precision(dtype: torch.dtype) -> str:
    return "tf32x3" if dtype == torch.float32 else "tf32"  # only float32 products look at it


def _columns_triton(x: Tensor, stride: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """[B, T, F] -> [B, gf, T', 16], of the T' frames that are in some patch."""
    gf, gt = _grid(x, stride)
    frames = (gt - 1) * stride[1] + PATCH
    columns = torch.empty((x.shape[0], gf, frames, PATCH), dtype=dtype, device=x.device)
    grid = (x.shape[0] * triton.cdiv(frames, COLUMNS_T), triton.cdiv(gf, COLUMNS_F))
    _columns_kernel[grid](
        x, columns, frames, gf, *x.stride(), stride[0], COLUMNS_T, COLUMNS_F,
        num_warps=COLUMNS_WARPS, **LAUNCH,
    )  # fmt: skip
    return columns


def _fwd_triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    pos: Tensor,
    cls_token: Tensor,
    dist_token: Tensor,
    fstride: int,
    tstride: int,
    dtype: torch.dtype,
    *,
    config: FwdConfig | None = None,
) -> tuple[Tensor, Tensor]:
    columns = _columns_triton(x, (fstride, tstride), dtype)
    B, gf, frames, _ = columns.shape
    D, R = len(weight), pos.shape[1]
    kernels = torch.empty((D, PATCH, PATCH), dtype=dtype, device=x.device)
    kernels.copy_(weight.view(D, PATCH, PATCH).mT)
    out = torch.empty((B, R, D), dtype=_token_dtype(dtype, pos, cls_token), device=x.device)
    cfg = config or _fwd_configs(target(x), dtype, D)[0]
    width_tiles = triton.cdiv(D, cfg.width)
    programs = max(1, cfg.per_sm * _num_sms(x) // width_tiles)
    work = _share(triton.cdiv(R, cfg.rows), B, programs)
    _patch_embed_fwd_kernel[(width_tiles * work.tile_groups * work.clip_groups,)](
        columns, kernels, bias.contiguous(), pos.contiguous(), cls_token.contiguous(),
        dist_token.contiguous(), out, B, frames, R, D, (R - NUM_SPECIAL) // gf, tstride,
        columns[0].numel(), *work[:3], _precision(dtype), cfg.rows, cfg.width, cfg.slice,
        cfg.halves, cfg.num_stages, num_warps=cfg.num_warps, **LAUNCH,
    )  # fmt: skip
    return out, columns


def _bwd_triton(
    dout: Tensor, columns: Tensor, tstride: int, *, config: BwdConfig | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    B, R, D = dout.shape
    _, gf, frames, _ = columns.shape

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=dout.device)

    cfg = config or _bwd_configs(target(dout), columns.dtype, D)[0]
    width_tiles = triton.cdiv(D, cfg.width) * (PATCH * PATCH // cfg.slice)
    programs = max(1, cfg.per_sm * _num_sms(dout) // width_tiles)
    work = _share(triton.cdiv(R, cfg.rows), B, programs)
    groups = work.tile_groups * work.clip_groups
    dweights, dbiases = empty(groups, PATCH * PATCH, D), empty(groups, D)
    dweight, dbias, dpos = empty(D, 1, PATCH, PATCH), empty(D), empty(1, R, D)
    dcls, ddist = empty(1, 1, D), empty(1, 1, D)
    one = work.clip_groups == 1
    dposes = dpos if one else empty(work.clip_groups, R, D)
    _patch_embed_bwd_kernel[(width_tiles * groups,)](
        dout.contiguous(), columns, dweights, dbiases, dposes, dcls, ddist, B, frames, R, D,
        (R - NUM_SPECIAL) // gf, tstride, columns[0].numel(), *work[:3], one,
        _precision(columns.dtype), cfg.rows, cfg.width, cfg.slice, cfg.num_stages,
        num_warps=cfg.num_warps, **LAUNCH,
    )  # fmt: skip
    weight_programs = triton.cdiv(D, SUM_WIDTH) * (PATCH * PATCH // SUM_SLICE)
    pos_programs = 0 if one else triton.cdiv(R * D, SUM_BLOCK)
    _patch_embed_sum_kernel[(weight_programs + pos_programs,)](
        dweights, dbiases, dposes, dweight, dbias, dpos, dcls, ddist, R, D, groups,
        work.clip_groups, weight_programs, SUM_WIDTH, SUM_SLICE, SUM_BLOCK,
        num_warps=4, **LAUNCH,
    )  # fmt: skip
    return dweight, dbias, dpos, dcls, ddist


# ---------------------------------------------------- op: one name, two backends
def _token_dtype(dtype: torch.dtype, pos: Tensor, cls_token: Tensor) -> torch.dtype:
    """Of the tokens: what ``cat`` and ``+`` promote patches in the compute dtype to."""
    return torch.promote_types(torch.promote_types(dtype, cls_token.dtype), pos.dtype)


def _composite(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    pos: Tensor,
    cls_token: Tensor,
    dist_token: Tensor,
    stride: tuple[int, int],
) -> Tensor:
    """What a library does in four passes: convolution, transpose, cat, add."""
    B, T, M = x.shape
    image = x.transpose(1, 2).contiguous()
    # contiguous(channels_last) is a no-op with one channel: its strides have to be spelled out.
    image = torch.as_strided(image, (B, 1, M, T), (M * T, 1, T, 1))
    patches = F.conv2d(image, weight, bias, stride)  # [B, D, f, t]
    special = torch.cat([cls_token, dist_token], 1).expand(B, -1, -1)
    return torch.cat([special, patches.flatten(2).transpose(1, 2)], 1) + pos


def _fwd_plain(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    pos: Tensor,
    cls_token: Tensor,
    dist_token: Tensor,
    fstride: int,
    tstride: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    parameters = weight.to(dtype), bias.to(dtype), pos, cls_token, dist_token
    out = _composite(x.to(dtype), *parameters, (fstride, tstride))
    gt = _grid(x, (fstride, tstride))[1]
    columns = x[:, : (gt - 1) * tstride + PATCH].to(dtype).unfold(2, PATCH, fstride)
    return out, columns.transpose(1, 2).contiguous()


def _fwd_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    pos: Tensor,
    cls_token: Tensor,
    dist_token: Tensor,
    fstride: int,
    tstride: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    gf, gt = _grid(x, (fstride, tstride))
    out = x.new_empty(
        (x.shape[0], pos.shape[1], weight.shape[0]), dtype=_token_dtype(dtype, pos, cls_token)
    )
    frames = (gt - 1) * tstride + PATCH
    return out, x.new_empty((x.shape[0], gf, frames, PATCH), dtype=dtype)


def _bwd_plain(
    dout: Tensor, columns: Tensor, tstride: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dpos = dout.sum(0, keepdim=True, dtype=torch.float32)
    patches = columns.unfold(2, PATCH, tstride).flatten(1, 2)  # [B, N, 16 mel bins, 16 frames]
    g = dout[:, NUM_SPECIAL:].to(columns.dtype).float()
    dweight = torch.einsum("bnd,bnmi->dmi", g, patches.float()).unsqueeze(1)
    dbias = dpos[0, NUM_SPECIAL:].sum(0)
    return dweight.contiguous(), dbias, dpos, dpos[:, :1].clone(), dpos[:, 1:2].clone()


def _bwd_fake(
    dout: Tensor, columns: Tensor, tstride: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    _, R, D = dout.shape
    shapes = [(D, 1, PATCH, PATCH), (D,), (1, R, D), (1, 1, D), (1, 1, D)]
    dweight, dbias, dpos, dcls, ddist = (
        dout.new_empty(shape, dtype=torch.float32) for shape in shapes
    )
    return dweight, dbias, dpos, dcls, ddist


_fwd = operator("patch_embed_fwd", plain=_fwd_plain, kernel=_fwd_triton, fake=_fwd_fake)
_bwd = operator("patch_embed_bwd", plain=_bwd_plain, kernel=_bwd_triton, fake=_bwd_fake)


def _input_gradient(
    dout: Tensor, weight: Tensor, shape: torch.Size, stride: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """dx [B, T, F] float32: a GEMM, then the sum of overlapping patches.

    Only saliency asks for it. A transposed convolution to one channel would leave most of a matrix
    unit idle; fold gathers for each pixel, so the result is the same in every run.
    """
    _, T, M = shape
    with torch.autocast(dout.device.type, enabled=False):
        patches = dout[:, NUM_SPECIAL:].to(dtype) @ weight.to(dtype).flatten(1)  # [B, N, 256]
        image = F.fold(patches.float().mT, (M, T), PATCH, stride=stride)  # [B, 1, F, T]
    return image.squeeze(1).mT


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, *parameters, fstride, tstride, dtype = inputs
    columns = output[1]
    ctx.mark_non_differentiable(columns)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(columns, weight)
    ctx.stride, ctx.dtype = (fstride, tstride), dtype
    ctx.x_shape, ctx.x_dtype = x.shape, x.dtype
    ctx.dtypes = [p.dtype for p in (weight, *parameters)]


def _autograd(ctx: Any, dout: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if dout is None:
        return (None,) * 9
    columns, weight = ctx.saved_tensors
    dx = None
    if ctx.needs_input_grad[0]:
        dx = _input_gradient(dout, weight, ctx.x_shape, ctx.stride, ctx.dtype).to(ctx.x_dtype)
    gradients: list[Tensor | None] = [None] * 5
    if any(ctx.needs_input_grad[1:6]):
        parts = _bwd(dout, columns, ctx.stride[1])
        gradients = [g.to(dtype) for g, dtype in zip(parts, ctx.dtypes, strict=True)]
    return dx, *gradients, None, None, None


_fwd.register_autograd(_autograd, setup_context=_setup)


# ------------------------------------------------------------------- public API
def patch_embed(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    pos: Tensor,
    cls_token: Tensor,
    dist_token: Tensor,
    stride: tuple[int, int],
) -> Tensor:
    """Tokens of overlapping 16 x 16 patches, with their positions, after two special ones.

    Args:
        x: [B, T, F], any strides.
        weight, bias: [D, 1, 16, 16], [D], of a Conv2d over an image of mel bins x frames.
        pos: [1, 2 + N, D].
        cls_token, dist_token: [1, 1, D].
        stride: distance of patches along the mel and the time axis, 1 to 16.

    Returns:
        [B, 2 + N, D], patches in the order of mel bins, then frames. Patches are computed in the
        autocast dtype or that of ``x``, tokens are in what it and ``pos`` promote to.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, a stride outside 1..16.
    """
    dtype = _checked_dtype(x, weight, bias, pos, cls_token, dist_token, stride)
    if use_kernel("patch_embed", x) and dtype in DTYPES and x.shape[0]:
        out: Tensor = _fwd(x, weight, bias, pos, cls_token, dist_token, *stride, dtype)[0]
        return out
    return _composite(x, weight, bias, pos, cls_token, dist_token, stride)


def _checked_dtype(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    pos: Tensor,
    cls_token: Tensor,
    dist_token: Tensor,
    stride: tuple[int, int],
) -> torch.dtype:
    """The dtype that patches are computed in."""
    if x.ndim != 3 or min(x.shape[1:]) < PATCH:
        raise ValueError(
            f"x must be [B, T, F] with T and F >= {PATCH}, the side of a patch, "
            f"got {tuple(x.shape)}"
        )
    if not all(1 <= s <= PATCH for s in stride):
        raise ValueError(f"stride must be two numbers in 1..{PATCH}, got {stride}")
    gf, gt = _grid(x, stride)
    D = weight.shape[0]
    parameters = {
        "weight": (weight, (D, 1, PATCH, PATCH)),
        "bias": (bias, (D,)),
        "pos": (pos, (1, NUM_SPECIAL + gf * gt, D)),
        "cls_token": (cls_token, (1, 1, D)),
        "dist_token": (dist_token, (1, 1, D)),
    }
    for name, (p, shape) in parameters.items():
        if p.shape != shape:
            raise ValueError(f"{name} must be {shape}, got {tuple(p.shape)}")
        if p.device != x.device:
            raise ValueError(f"x is on {x.device}, {name} on {p.device}")
    device = x.device.type
    if device != "meta" and torch.is_autocast_enabled(device):  # which knows no meta device
        return torch.get_autocast_dtype(device)
    if not x.dtype == weight.dtype == bias.dtype:
        raise ValueError(
            "x, weight and bias must have one dtype outside autocast, "
            f"got {x.dtype}, {weight.dtype} and {bias.dtype}"
        )
    return x.dtype
