"""A batch of waveforms -> normalised log-mel features, on the device.

Mean removal, waveform mixup, log-mel, padding, SpecAugment and normalisation (the paper's section
3, in the authors' order), batched and in float32 whatever the autocast and the matmul precision.
Nothing here draws a random number: the sampler decides and ``Augment`` carries what it decided, so
the same step gives the same features on any rank and after any resume.

On the CPU the work is done in blocks of frames that stay in a core's cache: a whole batch of
4096-point frames is 6.5 MB a clip before and after the transform, and the memory would set the
pace, not the FFT. On a GPU the operator ``fastat::log_mel`` does all of it in one, where it is
chosen.

Axis letters: B clips, M mixup partners, S samples, T frames, F mel bins, N rows of a block of
frames.
"""

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, Self

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from fastat.audio.features import CLIP_SAMPLES, FEATURES, Feature, get_feature
from fastat_kernels.backend import use_kernel

INT16_SCALE = 1.0 / 32768.0

MAX_CLIP_SAMPLES = 2**24
"""Positions up to here are exact in float32, which the padding mask computes in."""

CPU_BLOCK_BYTES = 2 << 20
"""Frames transformed at a time, per thread. Measured on one core with 1 MiB of L2, the transform
alone: 1.5 ms a clip of ``logmel64`` in blocks of 100 to 200 frames, 1.7 to 2.2 of 400, 2.6 of
800."""

DEVICE_BLOCK_BYTES = 1 << 30
"""The same on a GPU, which only needs a bound on its memory: 160 clips of ``logmel64``."""

BANDS_PER_PRODUCT = 16
"""Mel bands a matrix product computes together. A band needs few bins, its neighbours nearly the
same ones: products over the bins of 16 bands take a third of the time of one over all bins, and of
more or fewer bands each takes longer (measured)."""


class Augment(NamedTuple):
    """What the sampler decided for one step. Tensors on the device of the batch."""

    mix_into: Tensor
    """[M] int64: the clip, 0..B-1, that partner row B + j is mixed into; a clip at most once."""
    lam: Tensor
    """[M] float32: the weight of the clip itself; the partner gets 1 - lam."""
    time_mask: Tensor
    """[B, 2] int64: start and width of the time mask in frames; width 0 masks nothing."""
    freq_mask: Tensor
    """[B, 2] int64: start and width of the frequency mask in mel bins."""


class Frontend(nn.Module):
    """Waveforms [B, S] in [-1, 1] -> features [B, T, F], float32.

    ``feature`` names one of ``FEATURES``; ``clip_samples`` is S. ``mean`` and ``std`` are those of
    the training set, in the feature's units; None takes the authors' values. ``remove_mean`` and
    ``normalize`` switch the first and the last step off; mixup and SpecAugment are off without an
    ``Augment``.
    """

    window: Tensor
    bank: Tensor

    def __init__(
        self,
        feature: str,
        *,
        clip_samples: int = CLIP_SAMPLES,
        mean: float | None = None,
        std: float | None = None,
        remove_mean: bool = True,
        normalize: bool = True,
    ) -> None:
        super().__init__()
        self.feature = get_feature(feature)
        self.clip_samples = clip_samples
        self.num_frames = self.feature.num_frames(clip_samples)
        if self.num_frames < 1 or clip_samples > MAX_CLIP_SAMPLES:
            raise ValueError(
                f"clip_samples: expected one frame of {feature} or more and at most "
                f"{MAX_CLIP_SAMPLES} samples, got {clip_samples}"
            )
        self.mean = self.feature.mean if mean is None else mean
        self.std = self.feature.std if std is None else std
        if not self.std > 0:
            raise ValueError(f"std: expected a positive number, got {self.std}")
        self.remove_mean = remove_mean
        self.normalize = normalize
        # Centred frames reach half a window beyond the clip on either side.
        self._margin = 0 if self.feature.kaldi else self.feature.window_samples // 2
        # The transform leaves real and imaginary parts side by side; with every weight twice, the
        # product adds their squares, which saves a pass over the spectrum.
        bank = self.feature.mel_bank().repeat(2, axis=0)
        # Not in the state dict: constants of the feature, not of a checkpoint.
        self.register_buffer("window", _float32(self.feature.window()), persistent=False)
        self.register_buffer("bank", _float32(bank), persistent=False)
        self._fused: Callable[..., Tensor] | None = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        # The operator brings Triton, whose import a CPU has no use for.
        self._fused = self.fused() if self.window.is_cuda else None
        return self

    def fused(self) -> Callable[..., Tensor]:
        """(waveform, num_samples, augment) -> features by one operator, for where the module is."""
        from fastat_kernels import log_mel

        feature, device = self.feature, self.window.device
        plan = log_mel.make_plan(feature.window(), feature.mel_bank(), feature.n_fft)
        constants = log_mel.Feature(
            window=self.window,
            bank=self.bank[::2],
            plan=plan._replace(tables=plan.tables.to(device)),
            n_fft=feature.n_fft,
            hop_samples=feature.hop_samples,
            kaldi=feature.kaldi,
            preemphasis=feature.preemphasis,
            floor=feature.floor,
        )
        mean, scale = (self.mean, 0.5 / self.std) if self.normalize else (0.0, 1.0)

        def run(waveform: Tensor, num_samples: Tensor | None, augment: Augment | None) -> Tensor:
            masks: dict[str, Tensor] = {} if augment is None else augment._asdict()
            return log_mel.log_mel(
                waveform,
                constants,
                self.num_frames,
                num_samples,
                remove_mean=self.remove_mean,
                mean=mean,
                scale=scale,
                **masks,
            )

        return run

    def forward(
        self, waveform: Tensor, num_samples: Tensor | None = None, augment: Augment | None = None
    ) -> Tensor:
        """waveform [B + M, S] int16 or float32, num_samples [B + M] -> [B, T, F] float32.

        int16 is scaled by 1/32768. ``num_samples`` counts each row's real samples (None: all S);
        what lies beyond is padding, whatever finite values it holds. The last M rows are the mixup
        partners of ``augment``; a mixed clip keeps its own length, its partner is cut or padded
        with silence to it.

        Raises ValueError for other shapes, dtypes and devices, and for ``num_samples`` outside 0..S
        where the counts lie on the CPU (elsewhere looking would stall the device).
        """
        num_clips = self._check(waveform, num_samples, augment)
        if self._fused is not None and use_kernel("log_mel", waveform):
            return self._fused(waveform, num_samples, augment)
        with _plain_float32(waveform.device):
            padded = self._prepare(waveform, num_samples, augment, num_clips)
            own = None if num_samples is None else num_samples[:num_clips]
            return self.finish(self._run(padded[:num_clips]), own, augment)

    def log_mel(self, waveform: Tensor) -> Tensor:
        """waveform [B, S] float32 -> [B, T, F]: the feature alone, in decibels or natural log.

        Padding frames (``fbank128``) are 0. Raises ValueError for another shape or dtype.
        """
        if waveform.ndim != 2 or waveform.shape[1] != self.clip_samples:
            raise ValueError(
                f"waveform: expected [B, {self.clip_samples}], got {list(waveform.shape)}"
            )
        if waveform.dtype != torch.float32:
            raise ValueError(f"waveform: expected float32, got {waveform.dtype}")
        with _plain_float32(waveform.device):
            return self._run(F.pad(waveform, (self._margin, self._margin)))

    def finish(
        self, log_mel: Tensor, num_samples: Tensor | None = None, augment: Augment | None = None
    ) -> Tensor:
        """log_mel [B, T, F], num_samples [B] -> [B, T, F]: padding frames and masks 0, normalised.

        Raises ValueError for shapes that do not fit.
        """
        num_frames, num_mels = self.num_frames, self.feature.num_mels
        if log_mel.ndim != 3 or log_mel.shape[1:] != (num_frames, num_mels):
            raise ValueError(
                f"log_mel: expected [B, {num_frames}, {num_mels}], got {list(log_mel.shape)}"
            )
        rows, device = log_mel.shape[0], log_mel.device
        if num_samples is not None:
            _expect("num_samples", num_samples, (rows,), device)
        if augment is not None:
            _expect("time_mask", augment.time_mask, (rows, 2), device)
            _expect("freq_mask", augment.freq_mask, (rows, 2), device)
        with _plain_float32(device):
            x = log_mel
            frame = torch.arange(num_frames, device=device)
            if num_samples is not None:
                real = self.feature.real_frames(num_samples, self.clip_samples)
                x = x.masked_fill((frame >= real[:, None])[:, :, None], 0.0)
            if augment is not None:
                mel = torch.arange(num_mels, device=device)
                x = x.masked_fill(_inside(frame, augment.time_mask)[:, :, None], 0.0)
                x = x.masked_fill(_inside(mel, augment.freq_mask)[:, None, :], 0.0)
            if self.normalize:
                x = (x - self.mean) / (2.0 * self.std)
            return x

    def _prepare(
        self,
        waveform: Tensor,
        num_samples: Tensor | None,
        augment: Augment | None,
        num_clips: int,
    ) -> Tensor:
        """The clips and their partners, centred and mixed: [B + M, margin + S + margin] float32."""
        rows, samples = waveform.shape
        padded = waveform.new_zeros((rows, samples + 2 * self._margin), dtype=torch.float32)
        x = padded[:, self._margin : self._margin + samples]
        x.copy_(waveform)
        if waveform.dtype == torch.int16:
            x.mul_(INT16_SCALE)
        real = None
        if num_samples is not None:
            # 1 where the clip is, 0 where its padding is; in float32 this is several times as fast
            # on a CPU as comparing integers, and products with it as filling under a mask.
            position = torch.arange(samples, device=x.device, dtype=torch.float32)
            real = (num_samples[:, None].float() - position).clamp_(0.0, 1.0)
            x.mul_(real)
        if self.remove_mean:
            _remove_mean(x, real, num_samples)
        if augment is None or rows == num_clips:
            return padded
        own = augment.mix_into
        mixed = x[num_clips:].lerp_(x[own], augment.lam[:, None])
        if real is not None and num_samples is not None:
            real, num_samples = real[own], num_samples[own]
            mixed.mul_(real)
        if self.remove_mean:
            _remove_mean(mixed, real, num_samples)
        x[:num_clips].index_copy_(0, own, mixed)
        return padded

    def _run(self, padded: Tensor) -> Tensor:
        # Calling the operator costs a second of imports, which a CPU has no use for.
        eager = padded.is_cpu and not torch.compiler.is_compiling()
        run = _log_mel if eager else _log_mel_operator
        out: Tensor = run(padded, self.window, self.bank, self.feature.name, self.num_frames)
        return out

    def _check(self, waveform: Tensor, num_samples: Tensor | None, augment: Augment | None) -> int:
        """The number of clips B; ValueError where the arguments do not fit."""
        if waveform.ndim != 2 or waveform.shape[1] != self.clip_samples:
            raise ValueError(
                f"waveform: expected [B + M, {self.clip_samples}], got {list(waveform.shape)}"
            )
        if waveform.dtype not in (torch.int16, torch.float32):
            raise ValueError(f"waveform: expected int16 or float32, got {waveform.dtype}")
        rows = waveform.shape[0]
        if num_samples is not None:
            _expect("num_samples", num_samples, (rows,), waveform.device)
            if num_samples.is_cpu and rows and not torch.compiler.is_compiling():
                low, high = (int(n) for n in torch.aminmax(num_samples))
                if low < 0 or high > self.clip_samples:
                    raise ValueError(
                        f"num_samples: expected 0..{self.clip_samples}, got {low}..{high}"
                    )
        if augment is None:
            return rows
        partners = augment.mix_into.shape[0]
        num_clips = rows - partners
        if num_clips < partners:
            raise ValueError(
                f"mix_into: expected at most one partner a clip, got {partners} for {num_clips}"
            )
        _expect("mix_into", augment.mix_into, (partners,), waveform.device)
        _expect("lam", augment.lam, (partners,), waveform.device)
        return num_clips


def _log_mel(padded: Tensor, window: Tensor, bank: Tensor, name: str, num_frames: int) -> Tensor:
    """padded [B, margin + S + margin] float32, bank [2 * bins, F] -> log-mel [B, T, F].

    An operator, so that torch.compile keeps the blocks and their buffers out of its graph.
    """
    feature = FEATURES[name]
    frames = padded.unfold(1, feature.window_samples, feature.hop_samples)[:, :num_frames]
    mean = _frame_means(padded, feature) if feature.kaldi else None
    num_clips, num_real = frames.shape[:2]
    out = padded.new_zeros(num_clips, num_frames, feature.num_mels)
    clips, span = _block(feature, num_clips, num_real, padded.device)
    # Zeros beyond the window once and for all: every block overwrites only what lies under it.
    work = padded.new_zeros(clips, span, feature.n_fft)
    with _float32_products():
        for b in range(0, num_clips, clips):
            for t in range(0, num_real, span):
                here = (slice(b, b + clips), slice(t, min(t + span, num_real)))
                block = frames[here]
                windowed = work[: block.shape[0], : block.shape[1]]
                under = windowed[..., : feature.window_samples]
                if mean is None:
                    torch.mul(block, window, out=under)
                else:
                    # Kaldi pre-emphasises a frame's first sample with itself. The window is 0
                    # there, so the 0 that the buffer holds does as well.
                    centred = block - mean[here][..., None]
                    rest, previous = centred[..., 1:], centred[..., :-1]
                    torch.add(rest, previous, alpha=-feature.preemphasis, out=under[..., 1:])
                    under.mul_(window)
                mel = _mel(windowed, bank, feature).clamp_(min=feature.floor)
                mel = mel.log_() if feature.kaldi else mel.log10_().mul_(10.0)
                out[here] = mel.view(*block.shape[:2], feature.num_mels)
    return out


_log_mel_operator = torch.library.custom_op("fastat::log_mel_blocks", _log_mel, mutates_args=())


@_log_mel_operator.register_fake
def _(padded: Tensor, window: Tensor, bank: Tensor, name: str, num_frames: int) -> Tensor:
    return padded.new_empty(padded.shape[0], num_frames, bank.shape[1])


def _mel(windowed: Tensor, bank: Tensor, feature: Feature) -> Tensor:
    """Windowed frames [b, t, n_fft] -> mel power [N, F], N = b * t."""
    spectrum = torch.view_as_real(torch.fft.rfft(windowed)).view(-1, bank.shape[0])
    power = spectrum.square_()
    mel = power.new_empty(power.shape[0], feature.num_mels)
    for bins, bands in _products(feature):
        torch.mm(power[:, bins], bank[bins, bands], out=mel[:, bands])
    return mel


@functools.cache
def _products(feature: Feature) -> tuple[tuple[slice, slice], ...]:
    """For each group of neighbouring bands: its rows of the doubled bank, and the bands."""
    bank = feature.mel_bank()
    products = []
    for band in range(0, feature.num_mels, BANDS_PER_PRODUCT):
        bands = slice(band, min(band + BANDS_PER_PRODUCT, feature.num_mels))
        used = np.flatnonzero(bank[:, bands].any(axis=1))
        products.append((slice(2 * int(used[0]), 2 * int(used[-1]) + 2), bands))
    return tuple(products)


def _block(
    feature: Feature, num_clips: int, num_frames: int, device: torch.device
) -> tuple[int, int]:
    """Clips and frames of a block: whole clips, or an even part of one where it is too long."""
    block_bytes = DEVICE_BLOCK_BYTES
    if device.type == "cpu":
        block_bytes = CPU_BLOCK_BYTES * torch.get_num_threads()
    frames = max(1, block_bytes // (4 * feature.n_fft))
    clips = max(1, min(num_clips, frames // num_frames))
    parts = -(-num_frames // frames)
    return clips, -(-num_frames // parts)


def _frame_means(x: Tensor, feature: Feature) -> Tensor:
    """x [B, S] -> the mean of every frame, [B, T], from sums of the pieces that frames share."""
    piece = math.gcd(feature.window_samples, feature.hop_samples)
    pieces = x.unfold(1, piece, piece).sum(-1)
    window, hop = feature.window_samples // piece, feature.hop_samples // piece
    return pieces.unfold(1, window, hop).sum(-1) / feature.window_samples


@contextmanager
def _float32_products() -> Iterator[None]:
    """No tf32 or bf16 inside float32 products, whatever the caller chose for the models.

    One tf32 product is 0.4 dB off in quiet bands.
    """
    mkldnn = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    backends = (torch.backends.cuda.matmul, mkldnn)
    chosen = [backend.fp32_precision for backend in backends]
    for backend in backends:
        backend.fp32_precision = "ieee"
    try:
        yield
    finally:
        for backend, precision in zip(backends, chosen, strict=True):
            backend.fp32_precision = precision


@contextmanager
def _plain_float32(device: torch.device) -> Iterator[None]:
    with torch.autocast(device.type, enabled=False), torch.no_grad():
        yield


def _remove_mean(x: Tensor, real: Tensor | None, num_samples: Tensor | None) -> None:
    """Subtract, in place, the mean of the real samples of x [R, S]; padding, already 0, stays 0."""
    if real is None or num_samples is None:
        x.sub_(x.mean(1, keepdim=True))
        return
    mean = x.sum(1) / num_samples.clamp(min=1)
    x.addcmul_(real, mean[:, None], value=-1.0)


def _inside(index: Tensor, span: Tensor) -> Tensor:
    """index [N], span [B, 2] start and width -> [B, N] bool."""
    start = span[:, :1]
    return (index >= start) & (index < start + span[:, 1:])


def _expect(name: str, x: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    if x.shape != shape or x.device != device:
        raise ValueError(
            f"{name}: expected {list(shape)} on {device}, got {list(x.shape)} on {x.device}"
        )


def _float32(x: NDArray[np.float64]) -> Tensor:
    return torch.from_numpy(x.astype(np.float32))
