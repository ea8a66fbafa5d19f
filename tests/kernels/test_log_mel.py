"""log_mel: Triton against float64 by the features' own criterion, with all that goes around it."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastat.audio import frontend
from fastat.audio.features import FEATURES
from fastat.audio.frontend import Augment, Frontend
from fastat_kernels.backend import target
from fastat_kernels.log_mel import (
    Config,
    Feature,
    _configs,
    _log_mel,
    _log_mel_triton,
    log_mel,
    log_mel_ref,
    make_plan,
    transform_shape,
)
from tests import reference_features as reference
from tests.kernels.mutant import Mutant

NAMES = list(FEATURES)
DTYPES = [torch.float32, torch.int16]
WHOLE = Config(64, 4, reload=False)
"""More frames a program: the interpreter's time goes by programs."""

SAMPLES = 5000
FRAMES = {"logmel64": 12, "fbank128": 31}
"""Of a clip of SAMPLES; fbank128's last two are padding."""


def constants(name: str, device: torch.device | str) -> Feature:
    feature = FEATURES[name]
    window, bank = feature.window(), feature.mel_bank()
    plan = make_plan(window, bank, feature.n_fft)
    return Feature(
        window=torch.from_numpy(window).float().to(device),
        bank=torch.from_numpy(bank).float().to(device),
        plan=plan._replace(tables=plan.tables.to(device)),
        n_fft=feature.n_fft,
        hop_samples=feature.hop_samples,
        kaldi=feature.kaldi,
        preemphasis=feature.preemphasis,
        floor=feature.floor,
    )


def arguments(
    name: str,
    waveform: Tensor,
    num_frames: int,
    num_samples: Tensor | None = None,
    augment: Augment | None = None,
    remove_mean: bool = True,
    mean: float = 0.0,
    scale: float = 1.0,
) -> tuple[Any, ...]:
    """The operator's."""
    f = constants(name, waveform.device)
    return (
        waveform, num_samples, *(augment or (None,) * 4), f.window, f.bank,
        f.plan.tables, list(f.plan.schedule), f.n_fft, f.hop_samples, f.kaldi, f.preemphasis,
        f.floor, num_frames, remove_mean, mean, scale,
    )  # fmt: skip


def waves(names: list[str], dtype: torch.dtype, device: torch.device) -> Tensor:
    rows = np.stack([reference.synthetic(SAMPLES)[name] for name in names])
    if dtype == torch.int16:
        rows = np.clip(np.rint(rows * 32768), -32768, 32767).astype(np.int16)
    return torch.from_numpy(rows).to(device)


def by_hand(row: Tensor, num_samples: int) -> reference.Array:
    """A row's real samples in float64, without their mean, and silence after them."""
    wave = row.double().cpu().numpy() / (32768 if row.dtype == torch.int16 else 1)
    return centred(wave, num_samples)


def centred(wave: reference.Array, num_samples: int) -> reference.Array:
    out = np.zeros_like(wave)
    if num_samples:
        out[:num_samples] = wave[:num_samples] - wave[:num_samples].mean()
    return out


def assert_right(name: str, got: Tensor, wave: reference.Array, num_samples: int) -> None:
    real = min(FEATURES[name].real_frames(num_samples, SAMPLES), got.shape[0])
    assert torch.all(got[real:] == 0.0)
    if real:
        reference.assert_right(name, got[:real].cpu().numpy(), wave, num_frames=real)


def no_masks(clips: int, device: torch.device) -> Tensor:
    return torch.zeros(clips, 2, dtype=torch.int64, device=device)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("name", NAMES)
def test_lengths(name: str, dtype: torch.dtype, device: torch.device) -> None:
    """Nothing, one sample, a frame less one, an odd number; a neighbour's NaN stays there."""
    counts = (SAMPLES, 0, 1, 399, 2777)
    rows = waves(["offset", "noise", "clipped", "two tones", "infrasound"], dtype, device)
    if dtype == torch.float32:
        rows[1] = float("nan")
    num_samples = torch.tensor(counts, device=device)
    got = _log_mel_triton(*arguments(name, rows, FRAMES[name], num_samples), config=WHOLE)
    for row, n in enumerate(counts):
        assert_right(name, got[row], by_hand(rows[row].nan_to_num(), n), n)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("name", NAMES)
def test_mixup(name: str, dtype: torch.dtype, device: torch.device) -> None:
    """Clip 2 gets a shorter partner and clip 1 a longer one; clip 0 stays as it is."""
    rows = waves(["chirp", "offset", "noise", "offset", "infrasound"], dtype, device)
    counts = (SAMPLES, 3001, 4444, 1700, SAMPLES)
    augment = Augment(
        mix_into=torch.tensor([2, 1], device=device),
        lam=torch.tensor([0.3, 0.6], device=device),
        time_mask=no_masks(3, device),
        freq_mask=no_masks(3, device),
    )
    num_samples = torch.tensor(counts, dtype=torch.int32, device=device)
    args = arguments(name, rows, FRAMES[name], num_samples, augment)
    got = _log_mel_triton(*args, config=WHOLE)
    alone = [by_hand(row, n) for row, n in zip(rows, counts, strict=True)]
    mixed = [0.6 * alone[1] + 0.4 * alone[4], 0.3 * alone[2] + 0.7 * alone[3]]
    want = [alone[0], centred(mixed[0], counts[1]), centred(mixed[1], counts[2])]
    for features in (got, log_mel_ref(*args)):
        for row in range(3):
            assert_right(name, features[row], want[row], counts[row])


@pytest.mark.parametrize("name", NAMES)
def test_mixup_of_whole_clips_that_keep_their_mean(name: str, device: torch.device) -> None:
    rows = waves(["noise", "offset"], torch.float32, device)
    augment = Augment(
        mix_into=torch.tensor([0], device=device),
        lam=torch.tensor([0.25], device=device),
        time_mask=no_masks(1, device),
        freq_mask=no_masks(1, device),
    )
    args = arguments(name, rows, FRAMES[name], None, augment, remove_mean=False)
    wide = rows.double().cpu().numpy()
    got = _log_mel_triton(*args, config=WHOLE)
    assert_right(name, got[0], 0.25 * wide[0] + 0.75 * wide[1], SAMPLES)


@pytest.mark.parametrize("name", NAMES)
def test_masks_are_zero_before_normalisation(name: str, device: torch.device) -> None:
    """Width 0, one in the middle, one to the end, one over all."""
    rows = waves(["noise"], torch.float32, device).expand(3, -1)
    frames, mels = FRAMES[name], FEATURES[name].num_mels
    augment = Augment(
        mix_into=torch.zeros(0, dtype=torch.int64, device=device),
        lam=torch.zeros(0, device=device),
        time_mask=torch.tensor([[5, 0], [2, 3], [0, frames]], device=device),
        freq_mask=torch.tensor([[mels - 4, 4], [30, 5], [9, 0]], device=device),
    )
    got = _log_mel_triton(
        *arguments(name, rows, frames, None, augment, mean=-7.0, scale=0.25), config=WHOLE
    )
    plain = _log_mel_triton(*arguments(name, rows[:1], frames), config=WHOLE)
    want = plain.repeat(3, 1, 1)
    want[0, :, -4:] = want[1, 2:5] = want[1, :, 30:35] = want[2] = 0.0
    torch.testing.assert_close(got, (want + 7.0) * 0.25, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_one_frame_past_a_tile(name: str, device: torch.device) -> None:
    """The configuration that the launcher chooses, rows that lie apart, no clip at all."""
    rows = waves(["noise", "tone"], torch.int16, device).T.contiguous().T
    assert rows.stride(1) != 1
    lanes = transform_shape(FEATURES[name].n_fft, len(FEATURES[name].window())).lanes
    frames = _configs(90, lanes)[0].frames + 1
    got = _log_mel_triton(*arguments(name, rows, frames))
    assert torch.equal(got, _log_mel_triton(*arguments(name, rows, frames))), "not deterministic"
    for row in range(2):
        wave = by_hand(rows[row], SAMPLES)
        reference.assert_right(name, got[row].cpu().numpy(), wave, num_frames=frames)
    assert _log_mel_triton(*arguments(name, rows[:0], frames)).shape == (0, frames, got.shape[2])


@pytest.mark.parametrize("wave", ["offset", "clipped"] if torch.cuda.is_available() else ["offset"])
@pytest.mark.parametrize("name", NAMES)
def test_ten_seconds(name: str, wave: str, device: torch.device) -> None:
    """Sums over many blocks, and every frame of a clip."""
    row = torch.from_numpy(reference.synthetic()[wave])[None].to(device)
    rows = (row * 32767).round().to(torch.int16)
    num_frames = FEATURES[name].num_frames(rows.shape[1])
    # The interpreter holds no more than 2^20 numbers in a tensor.
    config = None if torch.cuda.is_available() else Config(256, 4, reload=True)
    got = _log_mel_triton(*arguments(name, rows, num_frames), config=config)[0]
    real = FEATURES[name].real_frames(rows.shape[1])
    wide = by_hand(rows[0], rows.shape[1])
    reference.assert_right(name, got[:real].cpu().numpy(), wide)
    assert torch.all(got[real:] == 0.0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the interpreter is too slow")
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("name", NAMES)
def test_model_shapes_through_every_configuration(
    name: str, dtype: torch.dtype, mixed: bool, device: torch.device
) -> None:
    clips, partners = 40, 12 * mixed
    rows = torch.randn(clips + partners, 160_000, device=device) * 0.1
    rows = (rows * 32768).to(torch.int16) if dtype == torch.int16 else rows
    augment = Augment(
        mix_into=torch.randperm(clips, device=device)[:partners],
        lam=torch.rand(partners, device=device),
        time_mask=torch.randint(0, 75, (clips, 2), device=device),
        freq_mask=torch.randint(0, 12, (clips, 2), device=device),
    )
    counts = torch.randint(0, 160_001, (clips + partners,), device=device)
    frames = FEATURES[name].num_frames(160_000)
    args = arguments(name, rows, frames, counts, augment if mixed else None)
    want = log_mel_ref(*args)
    lanes = transform_shape(FEATURES[name].n_fft, len(FEATURES[name].window())).lanes
    for config in _configs(90, lanes):
        got = _log_mel_triton(*args, config=config)
        torch.testing.assert_close(got, want, rtol=0, atol=2e-2)


@pytest.mark.parametrize("name", NAMES)
def test_operator(name: str, device: torch.device) -> None:
    rows = waves(["noise", "tone", "chirp"], torch.int16, device)
    augment = Augment(
        mix_into=torch.tensor([1], device=device),
        lam=torch.tensor([0.5], device=device),
        time_mask=no_masks(2, device),
        freq_mask=no_masks(2, device),
    )
    torch.library.opcheck(_log_mel, arguments(name, rows, FRAMES[name], None, augment))
    torch.library.opcheck(_log_mel, arguments(name, rows, FRAMES[name]))


@pytest.mark.parametrize("name", NAMES)
def test_front_end_through_the_kernel(
    name: str, monkeypatch: pytest.MonkeyPatch, triton_everywhere: None, device: torch.device
) -> None:
    """``Frontend`` gives the same features either way, eager and compiled; rows of many lengths."""
    model = Frontend(name, clip_samples=SAMPLES).to(device)
    rows = waves(["noise", "offset", "infrasound"], torch.int16, device)
    augment = Augment(
        mix_into=torch.tensor([1], device=device),
        lam=torch.tensor([0.7], device=device),
        time_mask=torch.tensor([[1, 2], [0, 0]], device=device),
        freq_mask=torch.tensor([[0, 0], [7, 3]], device=device),
    )
    counts = torch.tensor([SAMPLES, 4001, 3000], device=device)
    monkeypatch.setattr(frontend, "use_kernel", lambda op, x: False)
    plain = model(rows, counts, augment)
    alone = model(rows[:1])
    monkeypatch.setattr(frontend, "use_kernel", lambda op, x: True)
    if device.type == "cpu":
        monkeypatch.setattr("fastat_kernels.log_mel._configs", lambda arch, lanes: [WHOLE])
    model._fused = model.fused()
    with torch.autocast(device.type, dtype=torch.bfloat16):
        got = model(rows.float() / 32768, counts, augment)
    torch.testing.assert_close(got, plain, rtol=0, atol=1e-4)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(rows[:1]), alone, rtol=0, atol=1e-4)


def test_rejects_bad_input() -> None:
    feature = constants("fbank128", "cpu")
    wave = torch.zeros(3, SAMPLES)
    into, lam, mask = torch.tensor([0]), torch.tensor([0.5]), torch.zeros(2, 2, dtype=torch.int64)
    bad: dict[str, Callable[[], object]] = {
        r"int16 or float32, got \[3, 5000\] torch.float64": lambda: log_mel(
            wave.double(), feature, 4
        ),
        r"\[B \+ M, S\] int16 or float32, got \[5000\]": lambda: log_mel(wave[0], feature, 4),
        r"num_samples: expected \[3\], got \[2\]": lambda: log_mel(wave, feature, 4, lam.expand(2)),
        r"lam: expected \[1\], got \[2\]": lambda: log_mel(
            wave, feature, 4, mix_into=into, lam=lam.expand(2)
        ),
        r"time_mask: expected \[2, 2\], got \[2\]": lambda: log_mel(
            wave, feature, 4, mix_into=into, lam=lam, time_mask=mask[0], freq_mask=mask
        ),
        "both of mix_into and lam": lambda: log_mel(wave, feature, 4, lam=lam[:0]),
        "at most 1 of 3 rows, got 2": lambda: log_mel(
            wave, feature, 4, mix_into=into.expand(2), lam=lam.expand(2)
        ),
    }
    for message, call in bad.items():
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(ValueError, match="expected 4096 and at most 1024.* got 1024 and 400"):
        make_plan(np.ones(400), np.ones((513, 64)), 1024)
    with pytest.raises(ValueError, match=r"expected \[257, a multiple of 16\], got \[257, 40\]"):
        make_plan(np.ones(400), np.ones((257, 40)), 512)


def meta_arguments(name: str, dtype: torch.dtype, partners: int) -> tuple[Any, ...]:
    def empty(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    clips = 448
    augment = None
    if partners:
        augment = Augment(
            empty(partners),
            empty(partners, dtype=torch.float32),
            time_mask=empty(clips, 2),
            freq_mask=empty(clips, 2),
        )
    rows = empty(clips + partners, 160_000, dtype=dtype)
    counts = empty(clips + partners)
    frames = FEATURES[name].num_frames(160_000)
    return arguments(name, rows, frames, counts, augment, scale=0.3)


def launches() -> Iterator[tuple[str, Callable[[], object]]]:
    """Every launch that the models make, on meta tensors: (label, call)."""
    for name in NAMES:
        mixed, alone = (
            meta_arguments(name, torch.int16, 134),
            meta_arguments(name, torch.float32, 0),
        )
        yield f"{name} int16 mixed", lambda args=mixed: _log_mel_triton(*args)  # type: ignore[misc]
        yield f"{name} float32", lambda args=alone: _log_mel_triton(*args)  # type: ignore[misc]


def candidates() -> Iterator[tuple[str, Callable[[], object]]]:
    """The configurations that are only timed."""
    for name in NAMES:
        args = meta_arguments(name, torch.int16, 134)
        lanes = transform_shape(args[10], args[6].shape[0]).lanes
        for config in _configs(target(args[0]), lanes)[1:]:
            yield (
                f"{name} int16 mixed @ {config.num_warps} warps",
                lambda args=args, config=config: _log_mel_triton(*args, config=config),  # type: ignore[misc]
            )


MUTANTS = [
    Mutant(
        "a partner's mean is that of the whole row, not of what is heard",
        "x = tl.where(i < n_own, x, 0)",
        "x = tl.where(i < S, x, 0)",
        "test_mixup[logmel64-float32]",
    ),
    Mutant(
        "mixed clips are not centred again",
        "x = x * lam - mixture + ",
        "x = x * lam + ",
        "test_mixup[logmel64-int16]",
    ),
    Mutant(
        "a real sequence's bins count twice",
        "weights[lanes // 2 + 1 :, 0] = 0.0",
        "weights[lanes:, 0] = 0.0",
        "test_lengths[logmel64-int16]",
    ),
    Mutant(
        "bins of k1 = L are left out",
        "return power + (last * last,)",
        "return power + (last * 0.0,)",
        "test_lengths[fbank128-int16]",
    ),
    Mutant(
        "a butterfly turns the wrong way",
        "hi_r += (2.0 * er[k] - sum_r,)",
        "hi_r += (2.0 * er[k] + sum_r,)",
        "test_lengths[fbank128-float32]",
    ),
    Mutant(
        "pre-emphasis keeps the frame's mean",
        "PREEMPHASIS * (before - level)",
        "PREEMPHASIS * before",
        "test_mixup_of_whole_clips_that_keep_their_mean[fbank128]",
    ),
    Mutant(
        "masks one frame short",
        "(t < start + tl.load(time_ptr + 2 * b + 1))",
        "(t + 1 < start + tl.load(time_ptr + 2 * b + 1))",
        "test_masks_are_zero_before_normalisation[fbank128]",
    ),
]
