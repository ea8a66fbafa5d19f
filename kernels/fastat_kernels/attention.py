"""Multi-head self-attention from packed projections: softmax(q k^T / sqrt(Dh)) v.

Source: Vaswani et al. (2017), section 3.2; the tiling is FlashAttention's (Dao, 2023).
Non-causal, any length, dropout on the weights.
Shapes: qkv [B, N, 3, H, Dh] -> [B, N, H * Dh]; its gradient comes back packed, as qkv is.
Precision: products of the input's dtype accumulated in float32 (float32 inputs: three tf32
products), softmax statistics in float32 and in the log2 domain, so 1 / sqrt(Dh) and log2(e) are one
factor inside exp2.
Traffic: forward 4 B N H Dh elements and B H N float32 (q, k, v, out; the log-sum); backward reads
those and dout and writes 3 B N H Dh. Operations: 4 B H N^2 Dh forward. The fused backward does 10
(five products), the split one 14 (the scores and dout v^T twice).
At N = 345, Dh = 64 that is 173 FLOP a byte forward and 216 backward, below the 295 at which an H100
leaves its memory's bound (989 TFLOP/s, 3.35 TB/s), so both floors are near: 80 clips of 12 heads
move 170 MB and do 29 GFLOP forward, 340 MB and 73 GFLOP backward. Next to the products come N^2
exponentials a head, 16 a clock of an SM, which is as long as the products take at Dh = 64.

A head width that is no power of two is two tiles, D0 + D1 (85 and 96: 64 + 32; 192: 128 + 64).
Keys run in full tiles without a mask and a last one, as narrow as its rest allows, with one.
The backward adds nothing up across programs: the same inputs give the same bits. Wider heads,
float32 ones above 64 or on sm_100, and odd ones above 96 go to the library (``_supported``).

Dropout: weight (q, k) of a head is dropped if row(q) * column(k) mod 2^32 is below p * 2^32, where
row and column are odd 32-bit hashes of the index and of a key of the head and the seed. The mask
depends on no tile, costs two integer operations a weight (Philox: about 40) and is unbiased: row by
row and column by column it is a threshold on independent hashes, and the product has no linear
relation that ties the corners of a rectangle. p is rounded to a multiple of 2^-31.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from fastat_kernels.backend import LAUNCH, NUM_SMS, operator, target, use_kernel
from fastat_kernels.dropout import dropout

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def attention_ref(qkv: Tensor) -> Tensor:
    """qkv [B, N, 3, H, Dh] -> [B, N, H * Dh]. The specification without dropout; float32 inside."""
    q, k, v = qkv.float().permute(2, 0, 3, 1, 4)
    weights = (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(-1)
    out: Tensor = (weights @ v).transpose(1, 2).flatten(2)
    return out.to(qkv.dtype)


# --------------------------------------------------------------------------- dropout's mask
def _threshold(p: float) -> int:
    """Hashes below it are dropped. They are odd, so an even one makes P(drop) exactly it / 2^32."""
    return min(2 * round(p * 2**31), 2**32 - 2)


def _undrop(p: float) -> float:
    """One over the probability of a weight to be kept."""
    return 1 / (1 - _threshold(p) / 2**32)


def _mix_ref(x: Tensor) -> Tensor:
    """A bijection of 32-bit integers (held in int64) after which every bit depends on all."""
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D & 0xFFFFFFFF
    x = x ^ (x >> 15)
    x = x * 0x846CA68B & 0xFFFFFFFF
    return x ^ (x >> 16)


def _keep_ref(seed: Tensor, B: int, N: int, H: int, p: float) -> Tensor:
    """The mask that the kernels draw from ``seed`` (int64 [1]): bool [B, H, N, N]."""
    word = 0xFFFFFFFF
    head = torch.arange(B * H, device=seed.device)
    rows = _mix_ref((seed & word) ^ _mix_ref(head))
    columns = _mix_ref((seed >> 32 & word) ^ _mix_ref(~head & word))
    n = torch.arange(N, device=seed.device)
    row = _mix_ref(rows[:, None] + n & word) | 1  # [B * H, N]
    column = _mix_ref(columns[:, None] + n & word) | 1
    keep = (row[:, :, None] * column[:, None, :] & word) >= _threshold(p)
    return keep.view(B, H, N, N)


# --------------------------------------------------------------------------- triton kernels
# fmt: off
@triton.jit
def _mix(x):
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _head_keys(seed_ptr, head):
    """What a head's row hashes and its column hashes start from."""
    seed = tl.load(seed_ptr)
    head = head.to(tl.uint32)
    rows = _mix(seed.to(tl.uint32) ^ _mix(head))
    columns = _mix((seed >> 32).to(tl.uint32) ^ _mix(head ^ 0xFFFFFFFF))
    return rows, columns


@triton.jit
def _odd_hash(key, first, COUNT: tl.constexpr):
    n = (first + tl.arange(0, COUNT)).to(tl.uint32)
    return _mix(key + n) | 1


@triton.jit
def _tile(
    ptr, first, N, stride,
    ROWS: tl.constexpr, OFFSET: tl.constexpr, WIDTH: tl.constexpr, DH: tl.constexpr,
    MASKED: tl.constexpr,
):
    """[ROWS, WIDTH] of a [N, DH] matrix from row ``first`` and column OFFSET; 0 outside."""
    n = first + tl.arange(0, ROWS)[:, None]
    d = OFFSET + tl.arange(0, WIDTH)[None, :]
    p = ptr + n.to(tl.int64) * stride + d
    if MASKED and OFFSET + WIDTH > DH:
        x = tl.load(p, (n < N) & (d < DH), 0.0)
    elif OFFSET + WIDTH > DH:
        x = tl.load(p, d < DH, 0.0)
    elif MASKED:
        x = tl.load(p, n < N, 0.0)
    else:
        x = tl.load(p)
    return x


@triton.jit
def _put(
    ptr, x, first, N, stride,
    ROWS: tl.constexpr, OFFSET: tl.constexpr, WIDTH: tl.constexpr, DH: tl.constexpr,
):
    """Stores what ``_tile`` loads."""
    n = first + tl.arange(0, ROWS)[:, None]
    d = OFFSET + tl.arange(0, WIDTH)[None, :]
    p = ptr + n.to(tl.int64) * stride + d
    tl.store(p, x.to(ptr.dtype.element_ty), (n < N) & (d < DH))


@triton.jit
def _locate(qkv_ptr, head, H, sb, sc, sh):
    """Pointers to the first query, key and value of a head."""
    b = (head // H).to(tl.int64)
    h = (head % H).to(tl.int64)
    q_ptr = qkv_ptr + b * sb + h * sh
    part = tl.cast(sc, tl.int64)
    return q_ptr, q_ptr + part, q_ptr + 2 * part


@triton.jit
def _fwd_keys(
    q0, q1, acc0, acc1, top, total, row, columns,
    k_ptr, v_ptr, first, N, sn,
    DH: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, KEYS: tl.constexpr,
    SCALE: tl.constexpr, DROP_BELOW: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):
    """The online softmax over one tile of keys."""
    k = _tile(k_ptr, first, N, sn, KEYS, 0, D0, DH, MASKED)
    s = tl.dot(q0, tl.trans(k), input_precision=PRECISION)              # [Q, KEYS]
    if D1 > 0:
        k = _tile(k_ptr, first, N, sn, KEYS, D0, D1, DH, MASKED)
        s = tl.dot(q1, tl.trans(k), s, input_precision=PRECISION)
    if MASKED:
        s = tl.where((first + tl.arange(0, KEYS) < N)[None, :], s, float("-inf"))
    new_top = tl.maximum(top, tl.max(s, 1) * SCALE)
    p = tl.exp2(s * SCALE - new_top[:, None])
    shrink = tl.exp2(top - new_top)
    total = total * shrink + tl.sum(p, 1)
    if DROP_BELOW > 0:
        column = _odd_hash(columns, first, KEYS)
        p = tl.where(row[:, None] * column[None, :] >= DROP_BELOW, p, 0.0)
    v = _tile(v_ptr, first, N, sn, KEYS, 0, D0, DH, MASKED)
    p = p.to(v.dtype)
    acc0 = tl.dot(p, v, acc0 * shrink[:, None], input_precision=PRECISION)
    if D1 > 0:
        v = _tile(v_ptr, first, N, sn, KEYS, D0, D1, DH, MASKED)
        acc1 = tl.dot(p, v, acc1 * shrink[:, None], input_precision=PRECISION)
    return acc0, acc1, new_top, total


@triton.jit
def _attention_fwd_kernel(
    qkv_ptr, seed_ptr,      # [B, N, 3, H, Dh], int64 [1]
    out_ptr, lse_ptr,       # [B, N, H * Dh], [B, H, N] float32: log2 of the sum of exp(scores)
    N, H, sb, sn, sc, sh,
    DH: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    LAST: tl.constexpr,     # width of the last tile of keys
    RAGGED: tl.constexpr,   # it is not full
    SEVERAL: tl.constexpr,  # there are others
    SCALE: tl.constexpr, DROP_BELOW: tl.constexpr, UNDROP: tl.constexpr, PRECISION: tl.constexpr,
):
    num_tiles = tl.cdiv(N, BLOCK_Q)
    head = tl.program_id(0) // num_tiles
    first = tl.program_id(0) % num_tiles * BLOCK_Q
    q_ptr, k_ptr, v_ptr = _locate(qkv_ptr, head, H, sb, sc, sh)
    q0 = _tile(q_ptr, first, N, sn, BLOCK_Q, 0, D0, DH, True)
    acc0 = tl.zeros([BLOCK_Q, D0], tl.float32)
    if D1 > 0:
        q1 = _tile(q_ptr, first, N, sn, BLOCK_Q, D0, D1, DH, True)
        acc1 = tl.zeros([BLOCK_Q, D1], tl.float32)
    else:
        q1 = q0
        acc1 = tl.zeros([1], tl.float32)
    if DROP_BELOW > 0:
        rows, columns = _head_keys(seed_ptr, head)
        row = _odd_hash(rows, first, BLOCK_Q)
    else:
        row = tl.zeros([1], tl.uint32)
        columns = row
    top = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    full = (N - 1) // BLOCK_K * BLOCK_K
    if SEVERAL:
        for start in tl.range(0, full, BLOCK_K):
            acc0, acc1, top, total = _fwd_keys(
                q0, q1, acc0, acc1, top, total, row, columns, k_ptr, v_ptr, start, N, sn,
                DH, D0, D1, BLOCK_K, SCALE, DROP_BELOW, PRECISION, False,
            )
    acc0, acc1, top, total = _fwd_keys(
        q0, q1, acc0, acc1, top, total, row, columns, k_ptr, v_ptr, full, N, sn,
        DH, D0, D1, LAST, SCALE, DROP_BELOW, PRECISION, RAGGED,
    )
    width = H * DH
    out_ptr += (head // H).to(tl.int64) * N * width + head % H * DH
    norm = (UNDROP / total)[:, None]
    _put(out_ptr, acc0 * norm, first, N, width, BLOCK_Q, 0, D0, DH)
    if D1 > 0:
        _put(out_ptr, acc1 * norm, first, N, width, BLOCK_Q, D0, D1, DH)
    n = first + tl.arange(0, BLOCK_Q)
    tl.store(lse_ptr + head.to(tl.int64) * N + n, top + tl.log2(total), n < N)


@triton.jit
def _row_dots(
    out_ptr, dout0, dout1, first, N, width,
    DH: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, ROWS: tl.constexpr,
    UNDROP: tl.constexpr,
):
    """sum(dout * out) of each row: the mean, under the weights, of the weights' gradients.

    In units of the undropped weights' gradients, which the dropout's factor then scales at once.
    """
    out = _tile(out_ptr, first, N, width, ROWS, 0, D0, DH, True)
    delta = tl.sum(dout0.to(tl.float32) * out.to(tl.float32), 1)
    if D1 > 0:
        out = _tile(out_ptr, first, N, width, ROWS, D0, D1, DH, True)
        delta += tl.sum(dout1.to(tl.float32) * out.to(tl.float32), 1)
    return delta * (1 / UNDROP)


@triton.jit
def _attention_dq_kernel(
    qkv_ptr, out_ptr, lse_ptr, dout_ptr, seed_ptr,
    dqkv_ptr, delta_ptr,    # [B, N, 3, H, Dh], of which dq; [B, H, N] float32
    N, H, sb, sn, sc, sh,
    DH: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    LAST: tl.constexpr, RAGGED: tl.constexpr, SEVERAL: tl.constexpr,
    SCALE: tl.constexpr, GRAD_SCALE: tl.constexpr,
    DROP_BELOW: tl.constexpr, UNDROP: tl.constexpr, PRECISION: tl.constexpr,
):
    num_tiles = tl.cdiv(N, BLOCK_Q)
    head = tl.program_id(0) // num_tiles
    first = tl.program_id(0) % num_tiles * BLOCK_Q
    q_ptr, k_ptr, v_ptr = _locate(qkv_ptr, head, H, sb, sc, sh)
    width = H * DH
    start_of_head = (head // H).to(tl.int64) * N * width + head % H * DH
    q0 = _tile(q_ptr, first, N, sn, BLOCK_Q, 0, D0, DH, True)
    dout0 = _tile(dout_ptr + start_of_head, first, N, width, BLOCK_Q, 0, D0, DH, True)
    dq0 = tl.zeros([BLOCK_Q, D0], tl.float32)
    if D1 > 0:
        q1 = _tile(q_ptr, first, N, sn, BLOCK_Q, D0, D1, DH, True)
        dout1 = _tile(dout_ptr + start_of_head, first, N, width, BLOCK_Q, D0, D1, DH, True)
        dq1 = tl.zeros([BLOCK_Q, D1], tl.float32)
    else:
        q1 = q0
        dout1 = dout0
        dq1 = tl.zeros([1], tl.float32)
    n = first + tl.arange(0, BLOCK_Q)
    stats = head.to(tl.int64) * N + n
    lse = tl.load(lse_ptr + stats, n < N, float("inf"))
    delta = _row_dots(
        out_ptr + start_of_head, dout0, dout1, first, N, width, DH, D0, D1, BLOCK_Q, UNDROP
    )
    tl.store(delta_ptr + stats, delta, n < N)
    if DROP_BELOW > 0:
        rows, columns = _head_keys(seed_ptr, head)
        row = _odd_hash(rows, first, BLOCK_Q)
    else:
        row = tl.zeros([1], tl.uint32)
        columns = row
    full = (N - 1) // BLOCK_K * BLOCK_K
    if SEVERAL:
        for start in tl.range(0, full, BLOCK_K):
            dq0, dq1 = _dq_keys(
                q0, q1, dout0, dout1, dq0, dq1, lse, delta, row, columns,
                k_ptr, v_ptr, start, N, sn,
                DH, D0, D1, BLOCK_K, SCALE, DROP_BELOW, PRECISION, False,
            )
    dq0, dq1 = _dq_keys(
        q0, q1, dout0, dout1, dq0, dq1, lse, delta, row, columns, k_ptr, v_ptr, full, N, sn,
        DH, D0, D1, LAST, SCALE, DROP_BELOW, PRECISION, RAGGED,
    )
    dq_ptr = dqkv_ptr + (head // H).to(tl.int64) * N * 3 * width + head % H * DH
    _put(dq_ptr, dq0 * GRAD_SCALE, first, N, 3 * width, BLOCK_Q, 0, D0, DH)
    if D1 > 0:
        _put(dq_ptr, dq1 * GRAD_SCALE, first, N, 3 * width, BLOCK_Q, D0, D1, DH)


@triton.jit
def _dq_keys(
    q0, q1, dout0, dout1, dq0, dq1, lse, delta, row, columns,
    k_ptr, v_ptr, first, N, sn,
    DH: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, KEYS: tl.constexpr,
    SCALE: tl.constexpr, DROP_BELOW: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):
    """What one tile of keys adds to the gradient of a tile of queries."""
    k0 = _tile(k_ptr, first, N, sn, KEYS, 0, D0, DH, MASKED)
    v = _tile(v_ptr, first, N, sn, KEYS, 0, D0, DH, MASKED)
    s = tl.dot(q0, tl.trans(k0), input_precision=PRECISION)             # [Q, KEYS]
    dp = tl.dot(dout0, tl.trans(v), input_precision=PRECISION)
    if D1 > 0:
        k1 = _tile(k_ptr, first, N, sn, KEYS, D0, D1, DH, MASKED)
        v = _tile(v_ptr, first, N, sn, KEYS, D0, D1, DH, MASKED)
        s = tl.dot(q1, tl.trans(k1), s, input_precision=PRECISION)
        dp = tl.dot(dout1, tl.trans(v), dp, input_precision=PRECISION)
    if MASKED:  # a key of zeros has a weight, which may be infinite
        s = tl.where((first + tl.arange(0, KEYS) < N)[None, :], s, float("-inf"))
    p = tl.exp2(s * SCALE - lse[:, None])
    if DROP_BELOW > 0:
        column = _odd_hash(columns, first, KEYS)
        dp = tl.where(row[:, None] * column[None, :] >= DROP_BELOW, dp, 0.0)
    ds = (p * (dp - delta[:, None])).to(k0.dtype)
    dq0 = tl.dot(ds, k0, dq0, input_precision=PRECISION)
    if D1 > 0:
        dq1 = tl.dot(ds, k1, dq1, input_precision=PRECISION)
    return dq0, dq1


@triton.jit
def _bwd_keys(
    q_ptr, k_ptr, v_ptr, out_ptr, dout_ptr, lse_ptr, delta_ptr,
    dq_ptr, dq_stride,      # float32 [N, D0 + D1], or straight into dqkv where ONLY
    dk_ptr, rows, columns, first, N, sn, width,
    DH: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    KEYS: tl.constexpr, BLOCK_Q: tl.constexpr, RAGGED: tl.constexpr,
    FUSED: tl.constexpr,    # dq is added up too, instead of delta read
    FIRST: tl.constexpr,    # this is the head's first tile: nothing to add to
    ONLY: tl.constexpr,     # and its only one
    SCALE: tl.constexpr, GRAD_SCALE: tl.constexpr,
    DROP_BELOW: tl.constexpr, UNDROP: tl.constexpr, PRECISION: tl.constexpr,
):
    """The gradients of one tile of keys and values, over all queries.

    Scores are transposed, [KEYS, Q], so that the weights and their gradients are operands of dv and
    dk straight from registers.
    """
    k0 = _tile(k_ptr, first, N, sn, KEYS, 0, D0, DH, RAGGED)
    v0 = _tile(v_ptr, first, N, sn, KEYS, 0, D0, DH, RAGGED)
    dk0 = tl.zeros([KEYS, D0], tl.float32)
    dv0 = tl.zeros([KEYS, D0], tl.float32)
    if D1 > 0:
        k1 = _tile(k_ptr, first, N, sn, KEYS, D0, D1, DH, RAGGED)
        v1 = _tile(v_ptr, first, N, sn, KEYS, D0, D1, DH, RAGGED)
        dk1 = tl.zeros([KEYS, D1], tl.float32)
        dv1 = tl.zeros([KEYS, D1], tl.float32)
    if DROP_BELOW > 0:
        column = _odd_hash(columns, first, KEYS)
    for start in tl.range(0, N, BLOCK_Q):
        n = start + tl.arange(0, BLOCK_Q)
        q0 = _tile(q_ptr, start, N, sn, BLOCK_Q, 0, D0, DH, True)
        s = tl.dot(k0, tl.trans(q0), input_precision=PRECISION)         # [KEYS, Q]
        dout0 = _tile(dout_ptr, start, N, width, BLOCK_Q, 0, D0, DH, True)
        dp = tl.dot(v0, tl.trans(dout0), input_precision=PRECISION)
        dout1 = dout0
        if D1 > 0:
            q1 = _tile(q_ptr, start, N, sn, BLOCK_Q, D0, D1, DH, True)
            s = tl.dot(k1, tl.trans(q1), s, input_precision=PRECISION)
            dout1 = _tile(dout_ptr, start, N, width, BLOCK_Q, D0, D1, DH, True)
            dp = tl.dot(v1, tl.trans(dout1), dp, input_precision=PRECISION)
        lse = tl.load(lse_ptr + n, n < N, float("inf"))                 # no weight beyond N
        if FUSED and RAGGED:  # a key of zeros has a weight, which may be infinite
            s = tl.where((first + tl.arange(0, KEYS) < N)[:, None], s, float("-inf"))
        p = tl.exp2(s * SCALE - lse[None, :])
        kept = p
        if DROP_BELOW > 0:
            row = _odd_hash(rows, start, BLOCK_Q)
            keep = column[:, None] * row[None, :] >= DROP_BELOW
            kept = tl.where(keep, p, 0.0)
            dp = tl.where(keep, dp, 0.0)
        kept = kept.to(q0.dtype)
        dv0 = tl.dot(kept, dout0, dv0, input_precision=PRECISION)
        if FUSED and FIRST:
            delta = _row_dots(out_ptr, dout0, dout1, start, N, width, DH, D0, D1, BLOCK_Q, UNDROP)
            if not ONLY:
                tl.store(delta_ptr + n, delta, n < N)
        else:
            delta = tl.load(delta_ptr + n, n < N, 0.0)
        ds = (p * (dp - delta[None, :])).to(q0.dtype)
        dk0 = tl.dot(ds, q0, dk0, input_precision=PRECISION)
        if D1 > 0:
            dv1 = tl.dot(kept, dout1, dv1, input_precision=PRECISION)
            dk1 = tl.dot(ds, q1, dk1, input_precision=PRECISION)
        if FUSED:
            # Transposed too: both operands are tiles in shared memory.
            dq = tl.dot(tl.trans(k0), ds, input_precision=PRECISION)    # [D0, Q]
            _add_dq(dq_ptr, dq, start, N, dq_stride, 0, D0, DH, BLOCK_Q, FIRST, ONLY, GRAD_SCALE)
            if D1 > 0:
                dq = tl.dot(tl.trans(k1), ds, input_precision=PRECISION)
                _add_dq(
                    dq_ptr, dq, start, N, dq_stride, D0, D1, DH, BLOCK_Q, FIRST, ONLY, GRAD_SCALE
                )
    _put(dk_ptr, dk0 * GRAD_SCALE, first, N, 3 * width, KEYS, 0, D0, DH)
    _put(dk_ptr + width, dv0 * UNDROP, first, N, 3 * width, KEYS, 0, D0, DH)
    if D1 > 0:
        _put(dk_ptr, dk1 * GRAD_SCALE, first, N, 3 * width, KEYS, D0, D1, DH)
        _put(dk_ptr + width, dv1 * UNDROP, first, N, 3 * width, KEYS, D0, D1, DH)


@triton.jit
def _add_dq(
    ptr, dq, first, N, stride,
    OFFSET: tl.constexpr, WIDTH: tl.constexpr, DH: tl.constexpr, ROWS: tl.constexpr,
    FIRST: tl.constexpr, ONLY: tl.constexpr, SCALE: tl.constexpr,
):
    """Adds dq [WIDTH, ROWS] to its sum (stores it if FIRST), or stores the gradient (if ONLY)."""
    n = first + tl.arange(0, ROWS)[None, :]
    d = OFFSET + tl.arange(0, WIDTH)[:, None]
    p = ptr + n.to(tl.int64) * stride + d
    if ONLY:
        tl.store(p, (dq * SCALE).to(ptr.dtype.element_ty), (n < N) & (d < DH))
    else:
        if not FIRST:
            dq += tl.load(p)
        tl.store(p, dq)


@triton.jit
def _attention_dkdv_kernel(
    qkv_ptr, lse_ptr, dout_ptr, delta_ptr, seed_ptr,
    dqkv_ptr,               # [B, N, 3, H, Dh], of which dk and dv
    N, H, sb, sn, sc, sh,
    DH: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    SCALE: tl.constexpr, GRAD_SCALE: tl.constexpr,
    DROP_BELOW: tl.constexpr, UNDROP: tl.constexpr, PRECISION: tl.constexpr,
):
    num_tiles = tl.cdiv(N, BLOCK_K)
    head = tl.program_id(0) // num_tiles
    first = tl.program_id(0) % num_tiles * BLOCK_K
    q_ptr, k_ptr, v_ptr = _locate(qkv_ptr, head, H, sb, sc, sh)
    width = H * DH
    b = (head // H).to(tl.int64)
    dout_ptr += b * N * width + head % H * DH
    dqkv_ptr += b * N * 3 * width + head % H * DH
    stats = head.to(tl.int64) * N
    if DROP_BELOW > 0:
        rows, columns = _head_keys(seed_ptr, head)
    else:
        rows = 0
        columns = 0
    _bwd_keys(
        q_ptr, k_ptr, v_ptr, dout_ptr, dout_ptr, lse_ptr + stats, delta_ptr + stats,
        dqkv_ptr, 0, dqkv_ptr + width, rows, columns, first, N, sn, width,
        DH, D0, D1, BLOCK_K, BLOCK_Q, True, False, False, False,
        SCALE, GRAD_SCALE, DROP_BELOW, UNDROP, PRECISION,
    )


@triton.jit
def _attention_bwd_kernel(
    qkv_ptr, out_ptr, lse_ptr, dout_ptr, seed_ptr,
    dqkv_ptr,               # [B, N, 3, H, Dh]
    delta_ptr, sum_ptr,     # [B, H, N], [B, H, whole tiles, D0 + D1] float32: scratch
    N, H, sb, sn, sc, sh,
    DH: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    LAST: tl.constexpr, RAGGED: tl.constexpr, SEVERAL: tl.constexpr,
    SCALE: tl.constexpr, GRAD_SCALE: tl.constexpr,
    DROP_BELOW: tl.constexpr, UNDROP: tl.constexpr, PRECISION: tl.constexpr,
):
    head = tl.program_id(0)
    q_ptr, k_ptr, v_ptr = _locate(qkv_ptr, head, H, sb, sc, sh)
    width = H * DH
    b = (head // H).to(tl.int64)
    out_ptr += b * N * width + head % H * DH
    dout_ptr += b * N * width + head % H * DH
    dqkv_ptr += b * N * 3 * width + head % H * DH
    stats = head.to(tl.int64) * N
    lse_ptr += stats
    delta_ptr += stats
    if DROP_BELOW > 0:
        rows, columns = _head_keys(seed_ptr, head)
    else:
        rows = 0
        columns = 0
    if SEVERAL:
        dq_ptr = sum_ptr + head.to(tl.int64) * tl.cdiv(N, BLOCK_Q) * BLOCK_Q * (D0 + D1)
        dq_stride = D0 + D1
    else:
        dq_ptr = dqkv_ptr
        dq_stride = 3 * width
    full = (N - 1) // BLOCK_K * BLOCK_K
    _bwd_keys(  # the narrower tile first, whose code is another anyway
        q_ptr, k_ptr, v_ptr, out_ptr, dout_ptr, lse_ptr, delta_ptr,
        dq_ptr, dq_stride, dqkv_ptr + width, rows, columns, full, N, sn, width,
        DH, D0, D1, LAST, BLOCK_Q, RAGGED, True, True, not SEVERAL,
        SCALE, GRAD_SCALE, DROP_BELOW, UNDROP, PRECISION,
    )
    if SEVERAL:
        for start in tl.range(0, full, BLOCK_K, num_stages=1):
            tl.debug_barrier()  # delta and dq's sum may have been stored by other threads
            _bwd_keys(
                q_ptr, k_ptr, v_ptr, out_ptr, dout_ptr, lse_ptr, delta_ptr,
                dq_ptr, dq_stride, dqkv_ptr + width, rows, columns, start, N, sn, width,
                DH, D0, D1, BLOCK_K, BLOCK_Q, False, True, False, False,
                SCALE, GRAD_SCALE, DROP_BELOW, UNDROP, PRECISION,
            )
        tl.debug_barrier()
        for start in tl.range(0, N, BLOCK_Q):
            dq = _tile(dq_ptr, start, N, dq_stride, BLOCK_Q, 0, D0, DH, True)
            _put(dqkv_ptr, dq * GRAD_SCALE, start, N, 3 * width, BLOCK_Q, 0, D0, DH)
            if D1 > 0:
                dq = _tile(dq_ptr, start, N, dq_stride, BLOCK_Q, D0, D1, DH, True)
                _put(dqkv_ptr, dq * GRAD_SCALE, start, N, 3 * width, BLOCK_Q, D0, D1, DH)
# fmt: on


# --------------------------------------------------------------------------- configurations
class Config(NamedTuple):
    block_q: int
    block_k: int
    num_warps: int
    num_stages: int


class Split(NamedTuple):
    """A backward in two kernels: a program for every tile of queries, then one of keys."""

    dq: Config
    dkdv: Config


# By target and by the widest head that they are for. In bfloat16 and float16:
FWD = {
    80: {
        64: [Config(64, 32, 4, 2)],
        96: [Config(64, 64, 4, 2)],
        128: [Config(128, 32, 8, 2)],
    },
    90: {
        64: [Config(128, 64, 8, 3), Config(128, 64, 4, 3), Config(128, 128, 8, 2)],
        96: [Config(128, 64, 8, 3), Config(128, 64, 4, 3), Config(128, 128, 8, 2)],
        128: [Config(128, 64, 8, 3), Config(128, 128, 8, 2), Config(64, 64, 4, 2)],
        192: [Config(128, 64, 8, 2), Config(64, 64, 4, 2)],
        256: [Config(128, 64, 8, 2), Config(64, 64, 4, 2)],
    },
    100: {
        64: [Config(128, 64, 8, 3), Config(64, 64, 4, 2)],
        96: [Config(128, 64, 8, 3), Config(64, 64, 4, 2)],
        128: [Config(128, 64, 8, 3), Config(64, 64, 4, 2)],
        192: [Config(128, 64, 8, 2)],
        256: [Config(128, 32, 8, 2)],
    },
}
SPLIT = {
    80: {
        64: [Split(Config(64, 64, 4, 2), Config(32, 128, 8, 1))],
        96: [Split(Config(64, 32, 4, 2), Config(32, 128, 8, 2))],
        128: [Split(Config(32, 32, 4, 2), Config(64, 64, 8, 2))],
    },
    90: {
        64: [
            Split(Config(64, 64, 4, 2), Config(64, 128, 8, 2)),
            Split(Config(128, 64, 8, 2), Config(64, 64, 4, 2)),
        ],
        96: [
            Split(Config(64, 64, 4, 2), Config(64, 128, 8, 2)),
            Split(Config(128, 64, 8, 2), Config(64, 64, 4, 2)),
        ],
        128: [
            Split(Config(64, 64, 4, 2), Config(64, 128, 8, 2)),
            Split(Config(128, 64, 8, 2), Config(64, 64, 4, 2)),
        ],
        192: [Split(Config(64, 64, 4, 2), Config(32, 64, 8, 2))],
        256: [Split(Config(128, 32, 8, 2), Config(16, 64, 8, 2))],
    },
    100: {
        64: [Split(Config(64, 64, 4, 2), Config(64, 128, 8, 2))],
        96: [Split(Config(64, 64, 4, 2), Config(64, 128, 8, 2))],
        128: [Split(Config(64, 64, 4, 2), Config(64, 128, 8, 2))],
        192: [Split(Config(64, 64, 8, 2), Config(32, 64, 8, 2))],
        256: [Split(Config(64, 32, 8, 2), Config(32, 64, 8, 2))],
    },
}
FUSED = {
    80: {},
    90: {
        64: [Config(64, 128, 8, 1), Config(32, 128, 8, 2)],
        96: [Config(32, 128, 8, 2)],
        128: [Config(32, 128, 8, 2)],
    },
    100: {},
}
# Heads whose rows do not start on 32 bytes are loaded element by element, through registers:
FWD_ODD = {
    80: {},
    90: {96: [Config(128, 32, 8, 1), Config(64, 32, 4, 1)]},
    100: {},
}
SPLIT_ODD = {
    80: {},
    90: {96: [Split(Config(64, 32, 8, 1), Config(32, 64, 8, 1))]},
    100: {},
}
# In float32 an operand is three, all in registers; on sm_100 with Triton 3.6 they are too many:
FWD_FLOAT32 = {80: {64: [Config(16, 32, 4, 1)]}, 90: {64: [Config(16, 32, 4, 1)]}, 100: {}}
SPLIT_FLOAT32 = {
    80: {64: [Split(Config(16, 32, 4, 1), Config(32, 32, 8, 1))]},
    90: {64: [Split(Config(16, 32, 4, 1), Config(32, 32, 8, 1))]},
    100: {},
}

ANY = Config(16, 16, 4, 1)
"""Computes what has no entry above, with spills; there ``attention`` calls the library."""


def _for_width(table: dict[int, Any], Dh: int) -> Any:
    """The entry of the narrowest width that is at least ``Dh``; empty where there is none."""
    return next((table[width] for width in sorted(table) if Dh <= width), [])


def _supported(arch: int, dtype: torch.dtype, Dh: int) -> bool:
    """Whether there are configurations that do not spill."""
    return dtype in DTYPES and bool(_for_width(_fwd_table(arch, dtype, Dh), Dh))


def _fwd_table(arch: int, dtype: torch.dtype, Dh: int) -> dict[int, list[Config]]:
    if dtype == torch.float32:
        return FWD_FLOAT32[arch]
    return (FWD_ODD if Dh % 16 else FWD)[arch]


def _fwd_configs(arch: int, dtype: torch.dtype, Dh: int) -> list[Config]:
    return list(_for_width(_fwd_table(arch, dtype, Dh), Dh)) or [ANY]


def _bwd_configs(
    arch: int, dtype: torch.dtype, N: int, Dh: int, heads: int
) -> list[Config | Split]:
    """Of the fused backward (a Config) and of the split one, the better bet first.

    Fused is five products instead of seven but a program a head, so it wants as many heads as fill
    the last wave of multiprocessors well. With a single tile of keys nothing is added up outside
    registers and it comes first. With several, dq goes through memory, and through shared memory to
    get there, once for every pair of tiles: that is a candidate only.
    """
    if dtype == torch.float32 or Dh % 16:
        table = SPLIT_FLOAT32 if dtype == torch.float32 else SPLIT_ODD
        return list(_for_width(table[arch], Dh)) or [Split(ANY, ANY)]
    split, fused = _for_width(SPLIT[arch], Dh), _for_width(FUSED[arch], Dh)
    single = bool(fused) and N <= fused[0].block_k
    if not single and Dh > 64:  # the sum of dq and three more pointers are too many registers
        fused = []
    filled = heads / (triton.cdiv(heads, NUM_SMS[arch]) * NUM_SMS[arch])
    both = [*fused, *split] if single and filled > 5 / 7 else [*split, *fused]
    return both or [Split(ANY, ANY)]


# --------------------------------------------------------------------------- launchers
def _widths(Dh: int) -> tuple[int, int]:
    """D0 + D1 >= Dh, powers of two from 16 (D1 may be 0), with few columns beyond Dh."""
    D0 = max(16, 1 << Dh.bit_length() - 1)
    D1 = triton.next_power_of_2(max(16, Dh - D0)) if Dh > D0 else 0
    return (2 * D0, 0) if D1 == D0 else (D0, D1)


def _tiling(N: int, block: int, least: int) -> dict[str, int | bool]:
    """The last of the tiles of ``block`` that N falls into, as narrow as its rest allows."""
    rest = (N - 1) % block + 1
    last = min(block, max(least, triton.next_power_of_2(rest)))
    return {"LAST": last, "RAGGED": rest < last, "SEVERAL": N > block}


def _constants(qkv: Tensor, dropout_p: float) -> dict[str, Any]:
    D0, D1 = _widths(Dh := qkv.shape[-1])
    return {
        "DH": Dh,
        "D0": D0,
        "D1": D1,
        "SCALE": math.log2(math.e) / math.sqrt(Dh),
        "DROP_BELOW": _threshold(dropout_p),
        "UNDROP": _undrop(dropout_p),
        "PRECISION": "tf32x3" if qkv.dtype == torch.float32 else "tf32",
    }


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _fwd_triton(
    qkv: Tensor, seed: Tensor | None, dropout_p: float, config: Config | None = None
) -> tuple[Tensor, Tensor]:
    """out, and the log-sum of each row that the backward starts from."""
    B, N, _, H, Dh = qkv.shape
    out = torch.empty((B, N, H * Dh), dtype=qkv.dtype, device=qkv.device)
    lse = torch.empty((B, H, N), dtype=torch.float32, device=qkv.device)
    if not out.numel():
        return out, lse
    c = config or _fwd_configs(target(qkv), qkv.dtype, Dh)[0]
    qkv = _unit_stride(qkv)
    _attention_fwd_kernel[(triton.cdiv(N, c.block_q) * B * H,)](
        qkv, seed, out, lse, N, H, *qkv.stride()[:4],
        BLOCK_Q=c.block_q, BLOCK_K=c.block_k, **_tiling(N, c.block_k, 32),
        **_constants(qkv, dropout_p),
        num_warps=c.num_warps, num_stages=c.num_stages, **LAUNCH,
    )  # fmt: skip
    return out, lse


def _bwd_triton(
    dout: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    seed: Tensor | None,
    dropout_p: float,
    config: Config | Split | None = None,
) -> Tensor:
    """dqkv [B, N, 3, H, Dh], contiguous."""
    B, N, _, H, Dh = qkv.shape
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    if not dqkv.numel():
        return dqkv
    c = config or _bwd_configs(target(qkv), qkv.dtype, N, Dh, B * H)[0]
    qkv, dout = _unit_stride(qkv), dout.contiguous()
    constants = _constants(qkv, dropout_p)
    constants["GRAD_SCALE"] = constants["UNDROP"] / math.sqrt(Dh)
    sizes = (N, H, *qkv.stride()[:4])
    delta = torch.empty_like(lse)
    if isinstance(c, Split):
        q, k = c
        _attention_dq_kernel[(triton.cdiv(N, q.block_q) * B * H,)](
            qkv, out, lse, dout, seed, dqkv, delta, *sizes,
            BLOCK_Q=q.block_q, BLOCK_K=q.block_k, **_tiling(N, q.block_k, 32), **constants,
            num_warps=q.num_warps, num_stages=q.num_stages, **LAUNCH,
        )  # fmt: skip
        _attention_dkdv_kernel[(triton.cdiv(N, k.block_k) * B * H,)](
            qkv, lse, dout, delta, seed, dqkv, *sizes,
            BLOCK_Q=k.block_q, BLOCK_K=k.block_k, **constants,
            num_warps=k.num_warps, num_stages=k.num_stages, **LAUNCH,
        )  # fmt: skip
        return dqkv
    tiling = _tiling(N, c.block_k, 64)
    sums = delta
    if tiling["SEVERAL"]:
        width = constants["D0"] + constants["D1"]
        rows = triton.cdiv(N, c.block_q) * c.block_q
        sums = torch.empty((B, H, rows, width), dtype=torch.float32, device=qkv.device)
    _attention_bwd_kernel[(B * H,)](
        qkv, out, lse, dout, seed, dqkv, delta, sums, *sizes,
        BLOCK_Q=c.block_q, BLOCK_K=c.block_k, **tiling, **constants,
        num_warps=c.num_warps, num_stages=c.num_stages, **LAUNCH,
    )  # fmt: skip
    return dqkv


# --------------------------------------------------------------------------- operators
def _fwd_plain(qkv: Tensor, seed: Tensor | None, dropout_p: float) -> tuple[Tensor, Tensor]:
    B, N, _, H, Dh = qkv.shape
    q, k, v = qkv.float().permute(2, 0, 3, 1, 4)
    scores = q @ k.transpose(-2, -1) / math.sqrt(Dh)
    lse = scores.logsumexp(-1)
    weights = (scores - lse.unsqueeze(-1)).exp()
    if seed is not None:
        weights = weights * _keep_ref(seed, B, N, H, dropout_p) * _undrop(dropout_p)
    out = (weights @ v).transpose(1, 2).flatten(2)
    return out.to(qkv.dtype), lse * math.log2(math.e)


def _bwd_plain(
    dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, seed: Tensor | None, dropout_p: float
) -> Tensor:
    B, N, _, H, Dh = qkv.shape
    q, k, v = qkv.float().permute(2, 0, 3, 1, 4)
    g, o = (x.float().view(B, N, H, Dh).transpose(1, 2) for x in (dout.contiguous(), out))
    scale = 1 / math.sqrt(Dh)
    weights = (q @ k.transpose(-2, -1) * scale - lse.unsqueeze(-1) * math.log(2)).exp()
    kept, dweights = weights, g @ v.transpose(-2, -1)
    if seed is not None:
        keep = _keep_ref(seed, B, N, H, dropout_p) * _undrop(dropout_p)
        kept, dweights = weights * keep, dweights * keep
    dscores = weights * (dweights - (g * o).sum(-1, keepdim=True)) * scale
    grads = dscores @ k, dscores.transpose(-2, -1) @ q, kept.transpose(-2, -1) @ g
    return torch.stack(grads).permute(1, 3, 0, 2, 4).to(qkv.dtype).contiguous()


def _fwd_fake(qkv: Tensor, seed: Tensor | None, dropout_p: float) -> tuple[Tensor, Tensor]:
    B, N, _, H, Dh = qkv.shape
    return qkv.new_empty((B, N, H * Dh)), qkv.new_empty((B, H, N), dtype=torch.float32)


def _bwd_fake(
    dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, seed: Tensor | None, dropout_p: float
) -> Tensor:
    return qkv.new_empty(qkv.shape)


_fwd = operator("attention_fwd", plain=_fwd_plain, kernel=_fwd_triton, fake=_fwd_fake)
_bwd = operator("attention_bwd", plain=_bwd_plain, kernel=_bwd_triton, fake=_bwd_fake)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, seed, ctx.dropout_p = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(qkv, out, lse, seed)


def _autograd(ctx: Any, dout: Tensor, _dlse: Tensor) -> tuple[Tensor, None, None]:
    qkv, out, lse, seed = ctx.saved_tensors
    return _bwd(dout, qkv, out, lse, seed, ctx.dropout_p), None, None


_fwd.register_autograd(_autograd, setup_context=_setup)


# --------------------------------------------------------------------------- public function
def _wins(qkv: Tensor, dropout_p: float) -> bool:
    """Whether the kernels are the way for this shape. What loses when measured belongs here."""
    dtype = qkv.dtype
    if torch.is_autocast_enabled(qkv.device.type):
        dtype = torch.get_autocast_dtype(qkv.device.type)
    return _supported(target(qkv), dtype, qkv.shape[-1])


def attention(qkv: Tensor, dropout_p: float = 0.0) -> Tensor:
    """Self-attention of every token with every other.

    On CUDA the mask is a function of one number from the device's generator, so its state says
    which weights drop: under activation checkpointing, CUDA graphs and in resumed runs too. Twice
    the same number gives twice the same bits, forward and backward.

    Args:
        qkv: [B, N, 3, H, Dh], queries, keys and values side by side.
        dropout_p: probability of dropping an attention weight.

    Returns:
        [B, N, H * Dh], dtype of ``qkv``, or autocast's.

    Raises:
        ValueError: ``qkv`` is not of that shape, or ``dropout_p`` is outside [0, 1).
    """
    if qkv.ndim != 5 or qkv.shape[2] != 3:
        raise ValueError(f"qkv must be [B, N, 3, H, Dh], got {tuple(qkv.shape)}")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}")
    if use_kernel("attention", qkv) and _wins(qkv, dropout_p):
        if torch.is_autocast_enabled(qkv.device.type):
            qkv = qkv.to(torch.get_autocast_dtype(qkv.device.type))
        seed = torch.randint(0, 2**63 - 1, (1,), device=qkv.device) if dropout_p else None
        out: Tensor = _fwd(qkv, seed, dropout_p)[0]
        return out
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # [B, H, N, Dh] each
    if dropout_p and qkv.device.type == "cpu":
        # torch's fused CPU kernel takes no dropout, and its fallback draws a Bernoulli a weight.
        # Its softmax computes in float32 whatever the scores' dtype.
        scores = (q * (1 / math.sqrt(q.shape[-1]))) @ k.transpose(-2, -1)
        out = dropout(scores.softmax(-1), dropout_p) @ v
    else:
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p)
    return out.transpose(1, 2).flatten(2)
