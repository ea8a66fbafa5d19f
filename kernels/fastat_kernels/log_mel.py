"""Log-mel features: waveforms to normalised features in three launches, a float32 FFT in registers.

out = (log(max(mel @ |DFT(window * frames(mix(x - mean(x))))|^2, floor)) - mean) * scale, with zeros
for the logarithm in padding frames and under SpecAugment's masks.

Source: Li, Qu, Huang, Metze, "AudioTagging Done Right" (2022), section 3; Kaldi's compute-
fbank-feats for the ``kaldi`` way. The transform is Cooley and Tukey's, n = L a + b, k = k1 + n_fft
/ L k2: a thread first transforms the taps a of its own b in registers, real input, so that only
k1 <= n_fft / 2L is computed; one transposition through shared memory later it transforms the b of
its own k1. The mel bands are sums over a few registers each, as a band covers neighbouring bins.
Shapes: B clips, M mixup partners, S samples, T frames, F mel bins, L lanes that share a frame.
waveform [B + M, S] int16 or float32, out [B, T, F] float32.
Precision: float32 throughout; sums over a row are exact for int16, and float64 across blocks.
Traffic: reads every sample from memory twice (once for the mean) and writes B T F floats: 640 kB +
102 kB a clip for 64 x 400 in int16, 0.33 GB at A4's 448. Overlapping frames come from the caches.
Operations a frame: 64 x 400 takes 78 kFLOP (dense: 4.2 MFLOP), 128 x 1024 11 kFLOP; with mixup
4,300 and 1,600 warp instructions, 600 and 205 of them loads of a line that L1 mostly has. At 4
instructions a cycle an SM needs 1,070 and 410 cycles a frame: that is the floor, not memory.
"""

# The kernels' tuples of registers grow.
# mypy: disable-error-code="assignment"

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from fastat_kernels.backend import LAUNCH, operator, target, use_kernel

INT16_SCALE = 1.0 / 32768.0

SUM_BLOCK = 8192
"""Samples that one program sums: int16 cannot overflow an int32 there."""

TURN = 128
"""The constants below are cos and sin of multiples of 1/TURN of a full turn."""

COS = tl.constexpr(tuple(math.cos(2 * math.pi * i / TURN) for i in range(TURN)))
SIN = tl.constexpr(tuple(math.sin(2 * math.pi * i / TURN) for i in range(TURN)))
TURN_ = tl.constexpr(TURN)
DECIBEL = tl.constexpr(10.0 / math.log(10.0))

OPAQUE = tl.constexpr(
    tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7)
    and not triton.knobs.runtime.interpret
)
"""Hide from Triton 3.6's LLVM that registers are stored side by side: made vectors of, they spill,
and on sm_100 they end in a failed assertion all the same."""


class Config(NamedTuple):
    frames: int
    num_warps: int
    reload: bool
    """Read the frames again for the second pass, instead of keeping them in 32 registers."""


# ------------------------------------------------------------------ what the kernels are given
class Plan(NamedTuple):
    """A feature's constants as the kernels take them."""

    tables: Tensor
    """float32, one after the other: window, twiddles, last bins, weights; of both passes."""
    schedule: tuple[int, ...]
    """Which registers each band sums: for both passes the F + 1 starts, then the registers."""


class Shape(NamedTuple):
    """How a transform is cut."""

    lanes: int
    taps: int
    stretch: int
    """n_fft / (2 lanes^2): 2 where the window fills a quarter of the transform, so that the odd
    k1 make a pass of their own, else 1."""


def transform_shape(n_fft: int, window_samples: int) -> Shape:
    """Raises ValueError for a transform the kernel has no code for."""
    for lanes, stretch in ((32, 2), (16, 1)):
        taps = 2 * lanes // stretch
        if n_fft == 2 * lanes**2 * stretch and window_samples <= taps * lanes:
            return Shape(lanes, taps, stretch)
    raise ValueError(
        f"n_fft and window: expected 4096 and at most 1024, or 512 and at most 512, "
        f"got {n_fft} and {window_samples}"
    )


def make_plan(window: NDArray[np.float64], bank: NDArray[np.float64], n_fft: int) -> Plan:
    """window [samples], bank [n_fft / 2 + 1, F] -> the constants, on the CPU.

    Raises:
        ValueError: a transform that the kernel has no code for, or F no multiple of the lanes.
    """
    lanes, taps, stretch = transform_shape(n_fft, len(window))
    num_mels = bank.shape[1]
    if bank.shape[0] != n_fft // 2 + 1 or num_mels % lanes:
        raise ValueError(
            f"bank: expected [{n_fft // 2 + 1}, a multiple of {lanes}], got {list(bank.shape)}"
        )
    step = n_fft // lanes
    lane, register = np.arange(lanes), np.arange(lanes)[:, None]
    padded = np.zeros(taps * lanes)
    padded[: len(window)] = window
    tables = [padded]
    schedule: list[int] = []

    def add_pass(k1: NDArray[np.int64], rows: list[NDArray[np.float64]], scale: float) -> None:
        """The lanes' k1; what the second transform does not reach: its table, [lanes] each."""
        turn = 2 * np.pi * (k1 * register % n_fft) / n_fft
        tables.extend([np.cos(turn), -np.sin(turn), *rows])
        k = k1 + step * register
        weights = scale * bank[np.minimum(k, n_fft - k)]  # [registers, lanes, F]
        if rows:
            weights[lanes // 2 + 1 :, 0] = 0.0  # lane 0 is real and meets its bins twice
            weights = np.concatenate([weights, bank[None, last]])
        used = [np.flatnonzero(weights[:, :, m].any(axis=1)) for m in range(num_mels)]
        schedule.extend(np.cumsum([0, *map(len, used)]).tolist())
        schedule.extend(np.concatenate(used).tolist())
        tables.extend(weights[r, :, m] for m, r in enumerate(used))

    if stretch == 2:
        add_pass(4 * lane + 1, [], 1.0)
    # k1 = step / 2, whose bins are step apart too, is real and would need a lane more.
    last = step // 2 + step * (lane % (lanes // 2))
    turn = 2 * np.pi * (last[:, None] * lane % n_fft) / n_fft
    rows = np.where(lane[:, None] < lanes // 2, np.cos(turn), np.sin(turn))
    add_pass(stretch * lane, [rows], 0.25)  # the real transform leaves twice the spectrum
    # Weights are read in powers of 2, the last beyond their end.
    tables.append(np.zeros((max(map(len, _passes(tuple(schedule), num_mels)[-1])), lanes)))
    flat = np.concatenate([np.ravel(table) for table in tables]).astype(np.float32)
    return Plan(torch.from_numpy(flat), tuple(schedule))


def _passes(schedule: tuple[int, ...], num_mels: int) -> list[tuple[tuple[int, ...], ...]]:
    """For each pass, which of a band's registers come where, and which registers they are."""
    passes: list[tuple[tuple[int, ...], ...]] = []
    while schedule:
        starts, rest = schedule[: num_mels + 1], schedule[num_mels + 1 :]
        passes.append((starts, rest[: starts[-1]]))
        schedule = rest[starts[-1] :]
    return passes


# ------------------------------------------------------------------ reference
def log_mel_ref(
    waveform: Tensor,
    num_samples: Tensor | None,
    mix_into: Tensor | None,
    lam: Tensor | None,
    time_mask: Tensor | None,
    freq_mask: Tensor | None,
    window: Tensor,
    bank: Tensor,
    tables: Tensor,
    schedule: Sequence[int],
    n_fft: int,
    hop_samples: int,
    kaldi: bool,
    preemphasis: float,
    floor: float,
    num_frames: int,
    remove_mean: bool,
    mean: float,
    scale: float,
) -> Tensor:
    """The arguments of ``log_mel`` -> [B, T, F] float32. The specification; float32 inside.

    ``tables`` and ``schedule``, which say how the kernel computes, change nothing here.
    """
    (rows, samples), (width,), device = waveform.shape, window.shape, waveform.device
    n = torch.full((rows,), samples, device=device)
    if num_samples is not None:
        n = num_samples.clamp(0, samples)
    inside = torch.arange(samples, device=device) < n[:, None]
    x = waveform.float() * (INT16_SCALE if waveform.dtype == torch.int16 else 1.0)
    x = _centred(x, n, inside, remove_mean)
    if mix_into is not None and lam is not None:
        clips = rows - mix_into.shape[0]
        mixed = lam[:, None] * x[mix_into] + (1 - lam[:, None]) * x[clips:]
        mixed = _centred(mixed, n[mix_into], inside[mix_into], remove_mean)
        x, n = x[:clips].index_copy(0, mix_into, mixed), n[:clips]
    if kaldi:
        margin, real = 0, (n >= width) * (1 + (n - width) // hop_samples)
    else:
        margin, real = width // 2, (n > 0) * (1 + n // hop_samples)
    padded = torch.nn.functional.pad(x, (margin, num_frames * hop_samples + width))
    frames = padded.unfold(1, width, hop_samples)[:, :num_frames]
    if kaldi:
        frames = frames - frames.mean(-1, keepdim=True)
        rest = frames[..., 1:] - preemphasis * frames[..., :-1]
        frames = torch.cat(((1 - preemphasis) * frames[..., :1], rest), -1)
    power = torch.fft.rfft(frames * window, n_fft).abs().square()
    # In float64 the product does not depend on what the caller allows float32 products.
    mel = (power.double() @ bank.double()).float().clamp(min=floor)
    out = mel.log() if kaldi else 10.0 * mel.log10()
    frame = torch.arange(num_frames, device=device)
    silent = (frame >= real[:, None])[:, :, None]
    if time_mask is not None and freq_mask is not None:
        band = torch.arange(bank.shape[1], device=device)
        silent = silent | _inside(frame, time_mask)[:, :, None]
        silent = silent | _inside(band, freq_mask)[:, None, :]
    normalised: Tensor = (out.masked_fill(silent, 0.0) - mean) * scale
    return normalised


def _centred(x: Tensor, n: Tensor, inside: Tensor, remove_mean: bool) -> Tensor:
    x = x.where(inside, 0.0)
    if not remove_mean:
        return x
    mean = x.double().sum(1) / n.clamp(min=1)
    return (x - mean.float()[:, None]).where(inside, 0.0)


def _inside(index: Tensor, span: Tensor) -> Tensor:
    return (index >= span[:, :1]) & (index < span[:, :1] + span[:, 1:])


# --------------------------------------------------------------- triton kernels
# fmt: off
@triton.jit
def _num_samples(num_samples_ptr, row, S):
    """Real samples of a row, within the row whatever the caller says."""
    if num_samples_ptr is None:
        return S
    else:
        return tl.minimum(tl.maximum(tl.load(num_samples_ptr + row), 0), S).to(tl.int32)


@triton.jit
def _row_sums_kernel(
    wave_ptr,                   # [B + M, S], rows wave_sr apart
    num_samples_ptr,            # [B + M] or None
    mix_ptr,                    # [M] or None
    sums_ptr,                   # [B + M, CHUNKS] int32 or float32
    cut_ptr,                    # [M, CHUNKS]: of a partner, up to the end of the clip it joins
    S, B, CHUNKS, wave_sr,
    MIXED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    i = chunk * BLOCK + tl.arange(0, BLOCK)
    n = _num_samples(num_samples_ptr, row, S)
    x = tl.load(wave_ptr + row * wave_sr + i, i < n, 0).to(sums_ptr.dtype.element_ty)
    tl.store(sums_ptr + row * CHUNKS + chunk, tl.sum(x, 0))
    if MIXED:
        if row >= B:
            own = tl.minimum(tl.maximum(tl.load(mix_ptr + row - B), 0), B - 1)
            n_own = _num_samples(num_samples_ptr, own, S)
            x = tl.where(i < n_own, x, 0)
            tl.store(cut_ptr + (row - B) * CHUNKS + chunk, tl.sum(x, 0))


@triton.jit
def _total(ptr, CHUNKS, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(0, CHUNKS, BLOCK):
        c = start + tl.arange(0, BLOCK)
        total += tl.load(ptr + c, c < CHUNKS, 0).to(tl.float64)
    return tl.sum(total, 0)


@triton.jit
def _clips_kernel(
    num_samples_ptr, mix_ptr, lam_ptr,
    sums_ptr, cut_ptr,
    counts_ptr,                 # [B, 4] int32: samples, frames, partner's row or -1, its samples
    levels_ptr,                 # [B, 4] float32: mean, mean of the partner, of the mixture; lam
    S, B, M, T, CHUNKS,
    scale,
    WINDOW: tl.constexpr, HOP: tl.constexpr, KALDI: tl.constexpr,
    MIXED: tl.constexpr, REMOVE_MEAN: tl.constexpr, BLOCK: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    n = _num_samples(num_samples_ptr, b, S)
    if KALDI:
        frames = tl.where(n < WINDOW, 0, 1 + (n - WINDOW) // HOP)
    else:
        frames = tl.where(n > 0, 1 + n // HOP, 0)
    partner = tl.full([], -1, tl.int32)
    if MIXED:
        found = tl.full([BLOCK], -1, tl.int32)
        for start in range(0, M, BLOCK):
            j = start + tl.arange(0, BLOCK)
            into = tl.load(mix_ptr + j, j < M, -1)
            found = tl.where(into == b, j, found)
        partner = tl.max(found, 0)
    mean = tl.zeros([], tl.float64)
    other = tl.zeros([], tl.float64)
    mixture = tl.zeros([], tl.float64)
    lam = tl.full([], 1.0, tl.float32)
    n_other = tl.zeros([], tl.int32)
    if REMOVE_MEAN:
        mean += _total(sums_ptr + b * CHUNKS, CHUNKS, BLOCK) / tl.maximum(n, 1)
    if MIXED:
        if partner >= 0:
            row = B + partner.to(tl.int64)
            lam = tl.load(lam_ptr + partner).to(tl.float32)
            n_other = _num_samples(num_samples_ptr, row, S)
            if REMOVE_MEAN:
                other += _total(sums_ptr + row * CHUNKS, CHUNKS, BLOCK) / tl.maximum(n_other, 1)
                both = tl.minimum(n, n_other)
                cut = _total(cut_ptr + partner.to(tl.int64) * CHUNKS, CHUNKS, BLOCK)
                # The clip's own samples sum to 0 by now.
                mixture += (1.0 - lam.to(tl.float64)) * (cut - other * both) / tl.maximum(n, 1)
            partner += B
    tl.store(counts_ptr + 4 * b, n)
    tl.store(counts_ptr + 4 * b + 1, tl.minimum(frames, T))
    tl.store(counts_ptr + 4 * b + 2, partner)
    tl.store(counts_ptr + 4 * b + 3, n_other)
    tl.store(levels_ptr + 4 * b, (mean * scale).to(tl.float32))
    tl.store(levels_ptr + 4 * b + 1, (other * scale).to(tl.float32))
    tl.store(levels_ptr + 4 * b + 2, (mixture * scale).to(tl.float32))
    tl.store(levels_ptr + 4 * b + 3, lam)


@triton.jit
def _fft(re, im, N: tl.constexpr):
    """N tensors -> their N-point transform, elementwise."""
    if N == 1:
        return re, im
    else:
        er, ei = _fft(re[0::2], im[0::2], N // 2)
        dr, di = _fft(re[1::2], im[1::2], N // 2)
        lo_r = ()
        lo_i = ()
        hi_r = ()
        hi_i = ()
        for k in tl.static_range(N // 2):
            # Exact for the quarter turns, and otherwise 6 FMAs: the difference is 2 e - sum.
            if k == 0:
                lo_r += (er[k] + dr[k],)
                lo_i += (ei[k] + di[k],)
                hi_r += (er[k] - dr[k],)
                hi_i += (ei[k] - di[k],)
            elif k * 4 == N:
                lo_r += (er[k] + di[k],)
                lo_i += (ei[k] - dr[k],)
                hi_r += (er[k] - di[k],)
                hi_i += (ei[k] + dr[k],)
            else:
                sum_r = er[k] + dr[k] * COS[k * TURN_ // N] + di[k] * SIN[k * TURN_ // N]
                sum_i = ei[k] + di[k] * COS[k * TURN_ // N] - dr[k] * SIN[k * TURN_ // N]
                lo_r += (sum_r,)
                lo_i += (sum_i,)
                hi_r += (2.0 * er[k] - sum_r,)
                hi_i += (2.0 * ei[k] - sum_i,)
        return lo_r + hi_r, lo_i + hi_i


@triton.jit
def _fft_of_half(re, im, N: tl.constexpr):
    """N / 2 tensors -> the N-point transform of them and as many zeros."""
    turned_r = ()
    turned_i = ()
    for j in tl.static_range(N // 2):
        turned_r += (re[j] * COS[j * TURN_ // N] + im[j] * SIN[j * TURN_ // N],)
        turned_i += (im[j] * COS[j * TURN_ // N] - re[j] * SIN[j * TURN_ // N],)
    er, ei = _fft(re, im, N // 2)
    dr, di = _fft(turned_r, turned_i, N // 2)
    out_r = ()
    out_i = ()
    for k in tl.static_range(N // 2):
        out_r += (er[k], dr[k])
        out_i += (ei[k], di[k])
    return out_r, out_i


@triton.jit
def _join(xs, N: tl.constexpr, M: tl.constexpr, FRAMES: tl.constexpr, L: tl.constexpr):
    """N tensors [M, FRAMES, L] -> [N M, FRAMES, L]."""
    if N == 1:
        return xs[0]
    else:
        ys = ()
        for i in tl.static_range(N // 2):
            pair = tl.permute(tl.join(xs[2 * i], xs[2 * i + 1]), (3, 0, 1, 2))
            ys += (tl.reshape(pair, (2 * M, FRAMES, L)),)
        return _join(ys, N // 2, 2 * M, FRAMES, L)


@triton.jit
def _split(xs, N: tl.constexpr, M: tl.constexpr, FRAMES: tl.constexpr, L: tl.constexpr):
    """N tensors [M, FRAMES, L] -> N M tensors [FRAMES, L]."""
    ys = ()
    if M == 2:
        for i in tl.static_range(N):
            first, second = tl.split(tl.permute(xs[i], (1, 2, 0)))
            ys += (first, second)
        return ys
    else:
        for i in tl.static_range(N):
            halves = tl.permute(tl.reshape(xs[i], (2, M // 2, FRAMES, L)), (1, 2, 3, 0))
            first, second = tl.split(halves)
            ys += (first, second)
        return _split(ys, 2 * N, M // 2, FRAMES, L)


@triton.jit
def _registers(x, N: tl.constexpr, FRAMES: tl.constexpr, L: tl.constexpr):
    """[N, FRAMES, L] -> N tensors [FRAMES, L]."""
    return _split((x,), 1, N, FRAMES, L)


@triton.jit
def _transposed(xs, FRAMES: tl.constexpr, L: tl.constexpr):
    """L tensors [FRAMES, L] -> [L, FRAMES, L], where tensor i's lane j is [j, :, i]."""
    if OPAQUE:
        hidden = ()
        for i in tl.static_range(L):
            hidden += (tl.inline_asm_elementwise("mov.b32 $0, $1;", "=f,f", (xs[i],), tl.float32,
                                                 is_pure=True, pack=1),)
        xs = hidden
    ys = ()
    for i in tl.static_range(L // 2):
        ys += (tl.permute(tl.join(xs[2 * i], xs[2 * i + 1]), (2, 0, 1)),)
    return tl.permute(_join(ys, L // 2, 2, FRAMES, L), (2, 1, 0))


@triton.jit
def _sum_of(xs, N: tl.constexpr):
    if N == 1:
        return xs[0]
    else:
        ys = ()
        for i in tl.static_range(N // 2):
            ys += (xs[i] + xs[i + N // 2],)
        return _sum_of(ys, N // 2)


@triton.jit
def _table(ptr, N: tl.constexpr, L: tl.constexpr):
    """N rows of L at ptr [1, FRAMES, 1] -> [N, FRAMES, L]: every frame's threads load their own.

    What is said of contiguity, here and in ``_samples``, is so that frames rank before registers
    when Triton 3.6 lays such a tensor out. No load gets wider by it: a thread has one lane.
    """
    at = tl.arange(0, N)[:, None, None] * L + tl.arange(0, L)[None, None, :]
    return tl.load(tl.max_contiguous(ptr + at, (1, 2, L)))


@triton.jit
def _samples(i, own_ptr, other_ptr, n, n_other, mean, other_mean, mixture, lam, scale,
             L: tl.constexpr, MIXED: tl.constexpr):
    """The clip's samples i, centred and mixed; 0 outside the real ones."""
    inside = (i >= 0) & (i < n)
    x = tl.load(tl.max_contiguous(own_ptr + i, (1, 2, L)), inside, 0)
    x = x.to(tl.float32) * scale - mean
    if MIXED:
        both = inside & (i < n_other)
        y = tl.load(tl.max_contiguous(other_ptr + i, (1, 2, L)), both, 0)
        y = y.to(tl.float32) * scale - other_mean
        x = x * lam - mixture + tl.where(both, y * (1.0 - lam), 0.0)
    return tl.where(inside, x, 0.0)


@triton.jit
def _frames(first, window_ptr, own_ptr, other_ptr, n, n_other,
            mean, other_mean, mixture, lam, scale,
            FRAMES: tl.constexpr, L: tl.constexpr, TAPS: tl.constexpr, WINDOW: tl.constexpr,
            KALDI: tl.constexpr, PREEMPHASIS: tl.constexpr, MIXED: tl.constexpr):
    """TAPS tensors [FRAMES, L]: the windowed frames that begin at ``first`` [FRAMES]."""
    at = tl.arange(0, TAPS)[:, None, None] * L + tl.arange(0, L)[None, None, :]
    i = first[None, :, None] + at
    x = _samples(i, own_ptr, other_ptr, n, n_other,
                 mean, other_mean, mixture, lam, scale, L, MIXED)
    if KALDI:
        level = (tl.sum(tl.sum(tl.where(at < WINDOW, x, 0.0), 0), 1) / WINDOW)[None, :, None]
        # The window is 0 at a frame's first sample, whatever comes before it.
        before = _samples(i - 1, own_ptr, other_ptr, n, n_other,
                          mean, other_mean, mixture, lam, scale, L, MIXED)
        x = (x - level) - PREEMPHASIS * (before - level)
    return _registers(x * _table(window_ptr, TAPS, L), TAPS, FRAMES, L)


@triton.jit
def _power(re, im, twiddle_ptr, FRAMES: tl.constexpr, L: tl.constexpr):
    """First transform, register k1 of lane b -> power spectrum, register k2 of lane k1."""
    re = _transposed(re, FRAMES, L)
    im = _transposed(im, FRAMES, L)
    c = _table(twiddle_ptr, L, L)
    s = _table(twiddle_ptr + L * L, L, L)
    turned_r = _registers(re * c - im * s, L, FRAMES, L)
    turned_i = _registers(re * s + im * c, L, FRAMES, L)
    re, im = _fft(turned_r, turned_i, L)
    power = ()
    for k in tl.static_range(L):
        power += (re[k] * re[k] + im[k] * im[k],)
    return power


@triton.constexpr_function
def _power_of_2(n):
    return max(2, triton.next_power_of_2(n))


@triton.constexpr_function
def _item(values, i):
    """Triton 3.6 takes an item of a constant tuple for a variable."""
    return values[i]


@triton.jit
def _bands(power, weights_ptr, BAND: tl.constexpr,
           STARTS: tl.constexpr, REGISTERS: tl.constexpr,
           FRAMES: tl.constexpr, L: tl.constexpr):
    """Power of the L mel bands from BAND on, one a lane: [FRAMES, L]."""
    parts = ()
    first: tl.constexpr = _item(STARTS, BAND)
    # Loaded as one tensor: Triton compiles in the square of the operations a load reaches. What
    # lies beyond the bands' own rows is never used, and so never loaded.
    rows: tl.constexpr = _power_of_2(_item(STARTS, BAND + L) - first)
    weights = _registers(_table(weights_ptr + first * L, rows, L), rows, FRAMES, L)
    for m in tl.static_range(BAND, BAND + L):
        part = tl.zeros([FRAMES, L], tl.float32)
        for i in tl.static_range(_item(STARTS, m), _item(STARTS, m + 1)):
            part += power[_item(REGISTERS, i)] * weights[i - first]
        parts += (part,)
    return _sum_of(_registers(_transposed(parts, FRAMES, L), L, FRAMES, L), L)


@triton.jit
def _odd_power(x, twiddle_ptr, FRAMES: tl.constexpr, L: tl.constexpr):
    """L taps -> power at k1 = 1, 5, 9, ...; the other odd k1 are their conjugates."""
    re = ()
    im = ()
    for a in tl.static_range(L):
        re += (x[a] * COS[a * TURN_ // (4 * L)],)
        im += (x[a] * -SIN[a * TURN_ // (4 * L)],)
    re, im = _fft(re, im, L)
    return _power(re, im, twiddle_ptr, FRAMES, L)


@triton.jit
def _even_power(x, twiddle_ptr, HALF: tl.constexpr, FRAMES: tl.constexpr, L: tl.constexpr):
    """Taps -> 4 x power of their real 2 L-point transform; last the squares of k1 = L."""
    re, im = x[0::2], x[1::2]  # as one complex number
    if HALF:
        re, im = _fft_of_half(re, im, L)
    else:
        re, im = _fft(re, im, L)
    lo_r = (2.0 * (re[0] + im[0]),)
    lo_i = (tl.zeros([FRAMES, L], tl.float32),)
    hi_r = ()
    hi_i = ()
    for k in tl.static_range(1, L // 2):
        even_r = re[k] + re[L - k]
        even_i = im[k] - im[L - k]
        odd_r = im[k] + im[L - k]
        odd_i = re[L - k] - re[k]
        sum_r = even_r + odd_r * COS[k * TURN_ // (2 * L)] + odd_i * SIN[k * TURN_ // (2 * L)]
        sum_i = even_i + odd_i * COS[k * TURN_ // (2 * L)] - odd_r * SIN[k * TURN_ // (2 * L)]
        lo_r += (sum_r,)
        lo_i += (sum_i,)
        hi_r = (2.0 * even_r - sum_r,) + hi_r
        hi_i = (sum_i - 2.0 * even_i,) + hi_i
    lo_r += (2.0 * re[L // 2],)
    lo_i += (-2.0 * im[L // 2],)
    last = tl.reshape(re[0] - im[0], (1, FRAMES, L))
    power = _power(lo_r + hi_r, lo_i + hi_i, twiddle_ptr, FRAMES, L)
    last = tl.permute(last * _table(twiddle_ptr + 2 * L * L, L, L), (2, 1, 0))
    last = _sum_of(_registers(last, L, FRAMES, L), L)
    return power + (last * last,)


@triton.jit(do_not_specialize_on_alignment=["tables_ptr"], do_not_specialize=["wave_sr", "zero"])
def _log_mel_kernel(
    wave_ptr,                   # [B + M, S] int16 or float32, rows wave_sr apart
    counts_ptr, levels_ptr,     # [B, 4], [B, 4]: of _clips_kernel
    time_ptr, freq_ptr,         # [B, 2] int64 each: start and width of the masks, or None
    tables_ptr,
    out_ptr,                    # [B, T, F] float32
    T, TILES, wave_sr, zero,
    scale, floor, mean_out, scale_out,
    F: tl.constexpr, HOP: tl.constexpr, LEFT: tl.constexpr, WINDOW: tl.constexpr,
    L: tl.constexpr, TAPS: tl.constexpr, STRETCH: tl.constexpr,
    KALDI: tl.constexpr, PREEMPHASIS: tl.constexpr, MIXED: tl.constexpr, MASKED: tl.constexpr,
    ODD_STARTS: tl.constexpr, ODD_REGISTERS: tl.constexpr, ODD_PTR: tl.constexpr,
    STARTS: tl.constexpr, REGISTERS: tl.constexpr, PTR: tl.constexpr,
    FRAMES: tl.constexpr, RELOAD: tl.constexpr,
):
    b = (tl.program_id(0) // TILES).to(tl.int64)
    t = tl.program_id(0) % TILES * FRAMES + tl.arange(0, FRAMES)
    n = tl.load(counts_ptr + 4 * b)
    num_real = tl.load(counts_ptr + 4 * b + 1)
    partner = tl.load(counts_ptr + 4 * b + 2).to(tl.int64)
    n_other = tl.load(counts_ptr + 4 * b + 3)
    mean = tl.load(levels_ptr + 4 * b)
    other_mean = tl.load(levels_ptr + 4 * b + 1)
    mixture = tl.load(levels_ptr + 4 * b + 2)
    lam = tl.load(levels_ptr + 4 * b + 3)
    own_ptr = wave_ptr + b * wave_sr
    other_ptr = wave_ptr + partner * wave_sr
    first = t * HOP - LEFT
    # Without a stride that the compiler cannot see through, one frame would load for all.
    tables_ptr += (tl.arange(0, FRAMES) * zero)[None, :, None]

    mels = ()
    if STRETCH == 2:
        x = _frames(first, tables_ptr, own_ptr, other_ptr, n, n_other, mean, other_mean, mixture,
                    lam, scale, FRAMES, L, TAPS, WINDOW, KALDI, PREEMPHASIS, MIXED)
        power = _odd_power(x, tables_ptr + ODD_PTR, FRAMES, L)
        for group in tl.static_range(F // L):
            mels += (_bands(power, tables_ptr + ODD_PTR + 2 * L * L, group * L,
                            ODD_STARTS, ODD_REGISTERS, FRAMES, L),)
        if RELOAD:  # or the compiler sees that it has them
            own_ptr += zero
            other_ptr += zero
    x = _frames(first, tables_ptr, own_ptr, other_ptr, n, n_other, mean, other_mean, mixture,
                lam, scale, FRAMES, L, TAPS, WINDOW, KALDI, PREEMPHASIS, MIXED)
    power = _even_power(x, tables_ptr + PTR, STRETCH == 2, FRAMES, L)
    t = t[:, None]
    for group in tl.static_range(F // L):
        mel = _bands(power, tables_ptr + PTR + 3 * L * L, group * L,
                     STARTS, REGISTERS, FRAMES, L)
        if STRETCH == 2:
            mel += mels[group]
        mel = tl.log(tl.maximum(mel, floor))
        if not KALDI:
            mel *= DECIBEL
        band = group * L + tl.arange(0, L)[None, :]
        silent = t >= num_real
        if MASKED:
            start = tl.load(time_ptr + 2 * b)
            silent |= (t >= start) & (t < start + tl.load(time_ptr + 2 * b + 1))
            start = tl.load(freq_ptr + 2 * b)
            silent |= (band >= start) & (band < start + tl.load(freq_ptr + 2 * b + 1))
        out = (tl.where(silent, 0.0, mel) - mean_out) * scale_out
        tl.store(out_ptr + (b * T + t) * F + band, out, t < T)
# fmt: on


# --------------------------------------------------------------------- launchers
def _configs(arch: int, lanes: int) -> list[Config]:
    """The configuration that launches take, then others worth timing.

    A thread holds one lane of one frame, in some 190 registers: blocks of two warps fill an SM
    better than larger ones (168 registers a thread spill). For sm_80 Triton 3.6 spills 8 bytes
    where the frames are kept.
    """
    return [Config(warps * 32 // lanes, warps, arch == 80) for warps in (2, 4, 1, 8)]


def _log_mel_triton(
    waveform: Tensor,
    num_samples: Tensor | None,
    mix_into: Tensor | None,
    lam: Tensor | None,
    time_mask: Tensor | None,
    freq_mask: Tensor | None,
    window: Tensor,
    bank: Tensor,
    tables: Tensor,
    schedule: Sequence[int],
    n_fft: int,
    hop_samples: int,
    kaldi: bool,
    preemphasis: float,
    floor: float,
    num_frames: int,
    remove_mean: bool,
    mean: float,
    scale: float,
    *,
    config: Config | None = None,
) -> Tensor:
    if OPAQUE and target(waveform) == 100:
        raise RuntimeError(f"log_mel needs Triton 3.7 on sm_100, this is {triton.__version__}")
    rows, samples = waveform.shape
    width, num_mels = window.shape[0], bank.shape[1]
    partners = 0 if mix_into is None else mix_into.shape[0]
    clips, mixed = rows - partners, partners > 0
    lanes, taps, stretch = transform_shape(n_fft, width)
    config = config or _configs(target(waveform), lanes)[0]
    device = waveform.device
    out = torch.empty((clips, num_frames, num_mels), dtype=torch.float32, device=device)
    if clips == 0:
        return out
    if waveform.stride(1) != 1:
        waveform = waveform.contiguous()
    vectors = [x if x is None else x.contiguous() for x in (num_samples, mix_into, lam)]
    masks = [x if x is None else x.contiguous() for x in (time_mask, freq_mask)]
    to_unit = INT16_SCALE if waveform.dtype == torch.int16 else 1.0
    chunks = triton.cdiv(samples, SUM_BLOCK)
    sum_type = torch.int32 if waveform.dtype == torch.int16 else torch.float32
    sums = torch.empty((rows, chunks), dtype=sum_type, device=device)
    cut = torch.empty((partners, chunks), dtype=sum_type, device=device)
    counts = torch.empty((clips, 4), dtype=torch.int32, device=device)
    levels = torch.empty((clips, 4), dtype=torch.float32, device=device)
    if remove_mean:
        _row_sums_kernel[(rows, chunks)](
            waveform, *vectors[:2], sums, cut, samples, clips, chunks, waveform.stride(0),
            MIXED=mixed, BLOCK=SUM_BLOCK, num_warps=4, **LAUNCH,
        )  # fmt: skip
    _clips_kernel[(clips,)](
        *vectors, sums, cut, counts, levels,
        samples, clips, partners, num_frames, chunks, to_unit,
        WINDOW=width, HOP=hop_samples, KALDI=kaldi, MIXED=mixed, REMOVE_MEAN=remove_mean,
        BLOCK=128, num_warps=4, **LAUNCH,
    )  # fmt: skip
    passes = _passes(tuple(schedule), num_mels)
    odd_starts, odd_registers = passes[0] if stretch == 2 else ((), ())
    starts, registers = passes[-1]
    odd_ptr = taps * lanes
    ptr = odd_ptr + (lanes * (2 * lanes + len(odd_registers)) if stretch == 2 else 0)
    tiles = triton.cdiv(num_frames, config.frames)
    _log_mel_kernel[(clips * tiles,)](
        waveform, counts, levels, *masks, tables, out,
        num_frames, tiles, waveform.stride(0), 0, to_unit, floor, mean, scale,
        F=num_mels, HOP=hop_samples, LEFT=0 if kaldi else width // 2, WINDOW=width,
        L=lanes, TAPS=taps, STRETCH=stretch, KALDI=kaldi, PREEMPHASIS=preemphasis,
        MIXED=mixed, MASKED=time_mask is not None,
        ODD_STARTS=odd_starts, ODD_REGISTERS=odd_registers, ODD_PTR=odd_ptr,
        STARTS=starts, REGISTERS=registers, PTR=ptr,
        FRAMES=config.frames, RELOAD=config.reload, num_warps=config.num_warps, **LAUNCH,
    )  # fmt: skip
    return out


# ---------------------------------------------------- op: one name, two backends
def _fake(
    waveform: Tensor,
    num_samples: Tensor | None,
    mix_into: Tensor | None,
    lam: Tensor | None,
    time_mask: Tensor | None,
    freq_mask: Tensor | None,
    window: Tensor,
    bank: Tensor,
    tables: Tensor,
    schedule: Sequence[int],
    n_fft: int,
    hop_samples: int,
    kaldi: bool,
    preemphasis: float,
    floor: float,
    num_frames: int,
    remove_mean: bool,
    mean: float,
    scale: float,
) -> Tensor:
    clips = waveform.shape[0] - (0 if mix_into is None else mix_into.shape[0])
    return waveform.new_empty((clips, num_frames, bank.shape[1]), dtype=torch.float32)


_log_mel = operator("log_mel", plain=log_mel_ref, kernel=_log_mel_triton, fake=_fake)


# ------------------------------------------------------------------- public API
class Feature(NamedTuple):
    """What a log-mel feature is."""

    window: Tensor
    """[samples] float32."""
    bank: Tensor
    """[n_fft / 2 + 1, F] float32: weights from power to mel."""
    plan: Plan
    """``make_plan`` of the two, on their device."""
    n_fft: int
    hop_samples: int
    kaldi: bool
    """Frames inside the clip, each without its mean and pre-emphasised, natural logarithm; else
    frames centred on multiples of the hop, decibels."""
    preemphasis: float
    """The window's first sample must be 0 for any other than 0."""
    floor: float
    """Least power before the logarithm."""


def log_mel(
    waveform: Tensor,
    feature: Feature,
    num_frames: int,
    num_samples: Tensor | None = None,
    *,
    mix_into: Tensor | None = None,
    lam: Tensor | None = None,
    time_mask: Tensor | None = None,
    freq_mask: Tensor | None = None,
    remove_mean: bool = True,
    mean: float = 0.0,
    scale: float = 1.0,
) -> Tensor:
    """Normalised log-mel features, (log mel - mean) * scale. No gradient.

    Args:
        waveform: [B + M, S] int16 (scaled by 1/32768) or float32.
        num_frames: T; frames beyond a clip's real ones are 0 before normalisation.
        num_samples: [B + M] integers, each row's real samples, 0..S; None: all.
        mix_into: [M] int64, the clip that row B + j is mixed into; a clip at most once.
        lam: [M] float32, the weight of the clip itself.
        time_mask, freq_mask: [B, 2] int64, start and width of what is 0 before normalisation.
        remove_mean: subtract the mean of a row's real samples, before and after mixing.

    Returns:
        [B, T, F] float32.

    Raises:
        ValueError: other shapes or dtypes; one of ``mix_into`` and ``lam`` or of the masks alone.
    """
    if waveform.ndim != 2 or waveform.dtype not in (torch.int16, torch.float32):
        raise ValueError(
            f"waveform: expected [B + M, S] int16 or float32, "
            f"got {list(waveform.shape)} {waveform.dtype}"
        )
    rows = waveform.shape[0]
    partners = 0 if mix_into is None else mix_into.shape[0]
    expected: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
        "num_samples": (num_samples, (rows,)),
        "mix_into": (mix_into, (partners,)),
        "lam": (lam, (partners,)),
        "time_mask": (time_mask, (rows - partners, 2)),
        "freq_mask": (freq_mask, (rows - partners, 2)),
    }
    for name, (x, shape) in expected.items():
        if x is not None and x.shape != shape:
            raise ValueError(f"{name}: expected {list(shape)}, got {list(x.shape)}")
    if (mix_into is None) != (lam is None) or (time_mask is None) != (freq_mask is None):
        raise ValueError("expected both of mix_into and lam or neither; the same of the two masks")
    if partners > rows - partners:
        raise ValueError(f"mix_into: expected at most {rows // 2} of {rows} rows, got {partners}")
    args = (
        waveform, num_samples, mix_into, lam, time_mask, freq_mask,
        feature.window, feature.bank, feature.plan.tables, feature.plan.schedule,
        feature.n_fft, feature.hop_samples, feature.kaldi, feature.preemphasis, feature.floor,
        num_frames, remove_mean, mean, scale,
    )  # fmt: skip
    with torch.no_grad():
        if use_kernel("log_mel", waveform):
            out: Tensor = _log_mel(*args)
            return out
        with torch.autocast(waveform.device.type, enabled=False):
            return log_mel_ref(*args)
