"""The front end: both features to the criterion, and every step before and after them."""

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import ASTFeatureExtractor

from fastat.audio import frontend
from fastat.audio.features import FEATURES
from fastat.audio.frontend import Augment, Frontend
from tests import reference_features as reference

SAMPLES = 160_000
WAVES = reference.synthetic()
NAMES = list(FEATURES)
RECORDINGS = ("esc10/audio/*-[AB]-*.flac", "fsdd/audio/*.wav", "audioset/*.wav")


@pytest.fixture(scope="session")
def clips(recordings: Path) -> dict[str, NDArray[np.float32]]:
    """A few clips of every collection: 16 kHz, mono, padded to ten seconds."""
    found = {}
    for pattern in RECORDINGS:
        for path in sorted(recordings.glob(pattern))[::25][:4]:
            wave, rate = soundfile.read(path, dtype="float32", always_2d=True)
            wave = soxr.resample(wave.mean(axis=1), rate, 16000)[:SAMPLES]
            found[path.name] = np.pad(wave, (0, SAMPLES - len(wave)))
    assert len(found) >= 6, f"expected recordings under {recordings}, found {sorted(found)}"
    return found


def log_mel(name: str, wave: NDArray[np.float32], device: torch.device) -> NDArray[np.float32]:
    """The real frames of one full clip."""
    model = Frontend(name, clip_samples=len(wave)).to(device)
    mel = model.log_mel(torch.from_numpy(wave)[None].to(device))[0]
    assert mel.shape == (FEATURES[name].num_frames(len(wave)), FEATURES[name].num_mels)
    real = FEATURES[name].real_frames(len(wave), len(wave))
    assert torch.all(mel[real:] == 0.0)
    return np.asarray(mel[:real].cpu().numpy())


# ------------------------------------------------------------------------------- the features
@pytest.mark.parametrize("wave", WAVES)
@pytest.mark.parametrize("name", NAMES)
def test_synthetic_waves_meet_the_criterion(name: str, wave: str, device: torch.device) -> None:
    reference.assert_right(name, log_mel(name, WAVES[wave], device), wide(WAVES[wave]))


@pytest.mark.parametrize("gain", [1.0, 1e-3, 50.0], ids=["as is", "quiet", "clipping"])
@pytest.mark.parametrize("name", NAMES)
def test_recordings_meet_the_criterion(
    name: str, gain: float, clips: dict[str, NDArray[np.float32]], device: torch.device
) -> None:
    for wave in clips.values():
        scaled = np.clip(wave * np.float32(gain), -1, 1)
        reference.assert_right(name, log_mel(name, scaled, device), wide(scaled))


def test_logmel64_is_librosas(clips: dict[str, NDArray[np.float32]], device: torch.device) -> None:
    import librosa  # the others also run where there is none

    for wave in clips.values():
        power = librosa.feature.melspectrogram(
            y=wide(wave), sr=16000, n_fft=4096, win_length=1024, hop_length=400, power=2.0,
            n_mels=64, fmin=0, fmax=8000, htk=False, center=True, pad_mode="constant",
        )  # fmt: skip
        want = 10 * np.log10(np.maximum(power, 1e-10)).T[:400]
        got = log_mel("logmel64", wave, device)
        assert reference.near_error("logmel64", got, want) <= 1e-3


def test_fbank128_is_the_ast_extractors(
    clips: dict[str, NDArray[np.float32]], device: torch.device
) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="At least one mel filter")
        extract = ASTFeatureExtractor(num_mel_bins=128, do_normalize=False)
    for wave in clips.values():
        want = np.asarray(extract(wave, sampling_rate=16000)["input_values"][0], np.float64)
        got = log_mel("fbank128", wave, device)
        assert reference.near_error("fbank128", got, want[:998]) <= 1e-3
        assert np.all(want[998:] == 0.0)


@pytest.mark.parametrize("samples", [400, 1000, 15_999, 16_000, 40_123])
@pytest.mark.parametrize("name", NAMES)
def test_other_clip_lengths(name: str, samples: int, device: torch.device) -> None:
    wave = reference.synthetic(samples)["noise"]
    got = log_mel(name, wave, device)
    want = reference.REFERENCE[name](wide(wave))
    # The clip's last centred frame is cut: ten seconds make 400 frames, not 401.
    assert len(got) == len(want)
    reference.assert_right(name, got, wide(wave))


@pytest.mark.parametrize("block_bytes", [1 << 16, 1 << 20, 1 << 26])
@pytest.mark.parametrize("name", NAMES)
def test_any_block_size_gives_the_same(
    name: str, block_bytes: int, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    """Parts of a clip, a clip, several clips with a smaller last block."""
    monkeypatch.setattr(frontend, "CPU_BLOCK_BYTES", block_bytes)
    monkeypatch.setattr(frontend, "DEVICE_BLOCK_BYTES", block_bytes)
    names = ["noise", "tone", "quiet", "chirp", "two tones"]
    batch = torch.from_numpy(np.stack([WAVES[wave] for wave in names])).to(device)
    mel = Frontend(name).to(device).log_mel(batch).cpu().numpy()
    real = FEATURES[name].real_frames(SAMPLES)
    assert np.all(mel[:, real:] == 0.0)
    for row, wave in zip(mel, names, strict=True):
        reference.assert_right(name, row[:real], wide(WAVES[wave]))


@pytest.mark.parametrize("name", NAMES)
def test_a_clip_does_not_feel_its_batch(name: str, device: torch.device) -> None:
    """Not even a broken neighbour: the loud, the silent and the non-finite one."""
    batch = torch.from_numpy(
        np.stack([WAVES["clipped"], WAVES["quiet"], WAVES["noise"], WAVES["silence"]])
    ).to(device)
    batch[2] = float("nan")
    model = Frontend(name).to(device)
    together = model(batch)
    for i in (0, 1, 3):
        torch.testing.assert_close(together[i], model(batch[i : i + 1])[0], rtol=0, atol=1e-4)
    assert not together[2].isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_low_precision_asked_for_elsewhere_changes_nothing(name: str, device: torch.device) -> None:
    model = Frontend(name).to(device)
    wave = torch.from_numpy(WAVES["noise"])[None].to(device)
    want = model(wave)
    for precision in ("high", "medium"):
        with matmul_precision(precision), torch.autocast(device.type, dtype=torch.bfloat16):
            got = model(wave)
            assert torch.get_float32_matmul_precision() == precision
        assert got.dtype == torch.float32
        assert torch.equal(got, want)


# -------------------------------------------------------------------------------- the pipeline
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("num_samples", [0, 1, 399, 400, 401, 80_000, 159_999, SAMPLES])
def test_short_clips(name: str, num_samples: int, device: torch.device) -> None:
    """The mean is that of the real samples; frames beyond them are 0 in the log domain."""
    wave = WAVES["offset"]  # a large mean, and garbage in the padding
    counts = torch.tensor([num_samples, SAMPLES], device=device)
    batch = torch.from_numpy(np.stack([wave, wave])).to(device)
    got = features(name, batch, counts)
    assert_hand_made(name, got[0], by_hand(wide(wave), num_samples), num_samples)
    assert_hand_made(name, got[1], by_hand(wide(wave), SAMPLES), SAMPLES)


@pytest.mark.parametrize("name", NAMES)
def test_mean_removal_can_be_switched_off(name: str, device: torch.device) -> None:
    wave = WAVES["noise"] + np.float32(0.25)
    batch = torch.from_numpy(wave)[None].to(device)
    off = features(name, batch, None, remove_mean=False)
    assert_hand_made(name, off[0], wide(wave), SAMPLES)
    on = features(name, batch, None)
    assert_hand_made(name, on[0], by_hand(wide(wave), SAMPLES), SAMPLES)
    if name == "logmel64":  # Kaldi's frames lose theirs in any case
        assert off[0, :, 0].mean() > on[0, :, 0].mean() + 10


@pytest.mark.parametrize("name", NAMES)
def test_normalisation(name: str, device: torch.device) -> None:
    batch = torch.from_numpy(WAVES["noise"])[None].to(device)
    plain = Frontend(name, normalize=False).to(device)(batch)
    feature = FEATURES[name]
    for mean, std in ((None, None), (-7.5, 3.25)):
        got = Frontend(name, mean=mean, std=std).to(device)(batch)
        used = (feature.mean, feature.std) if mean is None or std is None else (mean, std)
        want = (plain.double() - used[0]) / (2 * used[1])
        torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_int16_is_float_scaled(name: str, device: torch.device) -> None:
    wave = torch.from_numpy((WAVES["clipped"] * 32768).astype(np.int16))[None].to(device)
    assert wave.min() == -32768
    model = Frontend(name).to(device)
    assert torch.equal(model(wave), model(wave.float() / 32768))


LENGTHS = {
    "full": None,
    "own longer": (SAMPLES, 90_000, 120_000, SAMPLES, 30_000),
    "own shorter": (SAMPLES, 30_000, 70_001, SAMPLES, SAMPLES),
}


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("name", NAMES)
def test_mixup_is_that_of_waveforms(name: str, lengths: str, device: torch.device) -> None:
    """Clips 2 and 1 get partners 0 and 1; clip 0 stays as it is."""
    waves = [WAVES[w] for w in ("chirp", "offset", "noise", "two tones", "infrasound")]
    counts = LENGTHS[lengths] or (SAMPLES,) * 5
    augment = no_masks(3, device)._replace(
        mix_into=torch.tensor([2, 1], device=device), lam=torch.tensor([0.3, 0.6], device=device)
    )
    num_samples = None if LENGTHS[lengths] is None else torch.tensor(counts, device=device)
    got = features(name, torch.from_numpy(np.stack(waves)).to(device), num_samples, augment)
    assert got.shape[0] == 3

    centred = [by_hand(wide(w), n) for w, n in zip(waves, counts, strict=True)]
    want = list(centred[:3])
    for partner, (own, lam) in enumerate([(2, 0.3), (1, 0.6)]):
        mixed = lam * centred[own] + (1 - lam) * centred[3 + partner]
        want[own] = by_hand(mixed, counts[own])
    for row in range(3):
        assert_hand_made(name, got[row], want[row], counts[row])


def test_mixup_without_mean_removal(device: torch.device) -> None:
    waves = np.stack([WAVES["offset"], WAVES["noise"]])
    augment = no_masks(1, device)._replace(
        mix_into=torch.tensor([0], device=device), lam=torch.tensor([0.25], device=device)
    )
    got = features("logmel64", torch.from_numpy(waves).to(device), None, augment, remove_mean=False)
    want = 0.25 * wide(waves[0]) + 0.75 * wide(waves[1])
    assert_hand_made("logmel64", got[0], want, SAMPLES)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_masks_and_padding_are_zero_before_normalisation(
    name: str, normalize: bool, device: torch.device
) -> None:
    feature = FEATURES[name]
    mean, std = (feature.mean, feature.std) if normalize else (0.0, 0.5)
    batch = torch.from_numpy(np.stack([WAVES["noise"]] * 3)).to(device)
    counts = torch.tensor([SAMPLES, SAMPLES, 50_000], device=device)
    augment = no_masks(3, device)._replace(
        time_mask=torch.tensor([[0, 7], [350, 50], [20, 1]], device=device),
        freq_mask=torch.tensor([[60, 4], [5, 0], [0, 12]], device=device),
    )
    model = Frontend(name, normalize=normalize).to(device)
    got, plain = model(batch, counts, augment), model(batch, counts)
    real = [feature.real_frames(int(n)) for n in counts]

    silent = torch.zeros_like(got, dtype=torch.bool)
    silent[0, :7] = silent[1, 350:400] = silent[2, 20:21] = True
    silent[0, :, 60:64] = silent[2, :, :12] = True
    for row, frames in enumerate(real):
        silent[row, frames:] = True
    assert torch.equal(got[~silent], plain[~silent])
    want = torch.full_like(got[silent], (0.0 - mean) / (2 * std))
    torch.testing.assert_close(got[silent], want, rtol=1e-6, atol=0)
    assert not torch.any(torch.isclose(plain[0], want[0], rtol=1e-6, atol=0)[:7])


@pytest.mark.parametrize("name", NAMES)
def test_finish_takes_features_made_elsewhere(name: str, device: torch.device) -> None:
    """The DALI source computes the features in its graph; the same steps follow."""
    waves = np.stack([WAVES["noise"], WAVES["clipped"]])
    counts = torch.tensor([SAMPLES, 70_000], device=device)
    augment = no_masks(2, device)._replace(
        time_mask=torch.tensor([[3, 9], [0, 0]], device=device),
        freq_mask=torch.tensor([[0, 0], [1, 2]], device=device),
    )
    model = Frontend(name).to(device)
    want = model(torch.from_numpy(waves).to(device), counts, augment)

    quiet = np.stack([by_hand(wide(waves[0]), SAMPLES), by_hand(wide(waves[1]), 70_000)])
    made = model.log_mel(torch.from_numpy(quiet.astype(np.float32)).to(device))
    before = made.clone()
    got = model.finish(made, counts, augment)
    assert torch.equal(made, before)
    torch.testing.assert_close(got, want, rtol=0, atol=2e-3)


@pytest.mark.parametrize("name", NAMES)
def test_inputs_are_left_alone(name: str, device: torch.device) -> None:
    batch = torch.from_numpy(np.stack([WAVES["offset"]] * 3)).to(device)
    counts = torch.tensor([SAMPLES, 1000, 5000], device=device)
    augment = no_masks(2, device)._replace(
        mix_into=torch.tensor([1], device=device), lam=torch.tensor([0.5], device=device)
    )
    copies = [x.clone() for x in (batch, counts, *augment)]
    model = Frontend(name, remove_mean=False).to(device)
    model(batch, counts, augment)
    model(batch, None, augment)
    model.log_mel(batch)
    for x, copy in zip((batch, counts, *augment), copies, strict=True):
        assert torch.equal(x, copy)


def test_it_has_no_state_and_no_gradient(device: torch.device) -> None:
    model = Frontend("logmel64").to(device)
    assert not model.state_dict()
    assert not list(model.parameters())
    batch = torch.zeros(1, SAMPLES, device=device, requires_grad=True)
    assert not model(batch).requires_grad


@pytest.mark.parametrize("name", NAMES)
def test_compiles_whole(name: str, device: torch.device) -> None:
    torch._dynamo.reset()
    model = Frontend(name, clip_samples=16_000).to(device)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for rows in (3, 4, 6):
        wave = torch.randn(rows + 1, 16_000, device=device) * 0.1
        counts = torch.full((rows + 1,), 12_345, device=device)
        augment = no_masks(rows, device)._replace(
            mix_into=torch.tensor([1], device=device), lam=torch.tensor([0.5], device=device)
        )
        got = compiled(wave, counts, augment)
        torch.testing.assert_close(got, model(wave, counts, augment), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_operator(name: str, device: torch.device) -> None:
    model = Frontend(name, clip_samples=16_000).to(device)
    wave = torch.randn(2, 16_000, device=device)
    args = (wave, model.window, model.bank, name, model.num_frames)
    torch.library.opcheck(frontend._log_mel_operator, args)


# ------------------------------------------------------------------------------------ mistakes
def test_rejects_bad_waveforms(device: torch.device) -> None:
    model = Frontend("logmel64").to(device)
    cases = {
        "[B + M, 160000], got [1, 159999]": torch.zeros(1, SAMPLES - 1),
        "[B + M, 160000], got [160000]": torch.zeros(SAMPLES),
        "int16 or float32, got torch.float64": torch.zeros(1, SAMPLES, dtype=torch.float64),
    }
    for message, wave in cases.items():
        with pytest.raises(ValueError, match=re.escape(message)):
            model(wave.to(device))
    with pytest.raises(ValueError, match=re.escape("[B, 160000], got [1, 5]")):
        model.log_mel(torch.zeros(1, 5, device=device))
    with pytest.raises(ValueError, match="float32, got torch.int16"):
        model.log_mel(torch.zeros(1, SAMPLES, dtype=torch.int16, device=device))
    with pytest.raises(ValueError, match=re.escape("[B, 400, 64], got [1, 64, 400]")):
        model.finish(torch.zeros(1, 64, 400, device=device))


def test_rejects_bad_counts() -> None:
    model = Frontend("logmel64")
    wave = torch.zeros(2, SAMPLES)
    with pytest.raises(ValueError, match=re.escape("0..160000, got 5..160001")):
        model(wave, torch.tensor([5, SAMPLES + 1]))
    with pytest.raises(ValueError, match=re.escape("0..160000, got -1..5")):
        model(wave, torch.tensor([5, -1]))
    with pytest.raises(ValueError, match=re.escape("num_samples: expected [2] on cpu, got [3]")):
        model(wave, torch.tensor([1, 2, 3]))
    with pytest.raises(ValueError, match="on cpu, got .* on meta"):
        model(wave, torch.empty(2, dtype=torch.int64, device="meta"))


def test_rejects_bad_augments(device: torch.device) -> None:
    model = Frontend("logmel64").to(device)
    wave = torch.zeros(3, SAMPLES, device=device)
    good = no_masks(2, device)._replace(
        mix_into=torch.tensor([0], device=device), lam=torch.tensor([0.5], device=device)
    )
    model(wave, None, good)
    with pytest.raises(ValueError, match=re.escape("lam: expected [1]")):
        model(wave, None, good._replace(lam=torch.zeros(2, device=device)))
    with pytest.raises(ValueError, match=re.escape("time_mask: expected [2, 2]")):
        model(wave, None, good._replace(time_mask=torch.zeros(3, 2, device=device)))
    with pytest.raises(ValueError, match=re.escape("freq_mask: expected [2, 2]")):
        model(wave, None, good._replace(freq_mask=torch.zeros(2, device=device)))
    with pytest.raises(ValueError, match="at most one partner a clip, got 2 for 1"):
        model(wave, None, good._replace(mix_into=torch.tensor([0, 0], device=device)))


def test_rejects_bad_settings() -> None:
    with pytest.raises(ValueError, match="got 399"):
        Frontend("fbank128", clip_samples=399)
    with pytest.raises(ValueError, match="got 16777217"):
        Frontend("logmel64", clip_samples=2**24 + 1)
    with pytest.raises(ValueError, match="std: expected a positive number, got 0"):
        Frontend("logmel64", std=0.0)
    with pytest.raises(ValueError, match="logmel64, fbank128"):
        Frontend("logmel")


# --------------------------------------------------------------------------------------- tools
def features(
    name: str,
    batch: Tensor,
    num_samples: Tensor | None,
    augment: Augment | None = None,
    remove_mean: bool = True,
) -> NDArray[np.float32]:
    """The front end without normalisation, [B, T, F]."""
    model = Frontend(name, remove_mean=remove_mean, normalize=False).to(batch.device)
    return np.asarray(model(batch, num_samples, augment).cpu().numpy())


def by_hand(wave: reference.Array, num_samples: int) -> reference.Array:
    """wave [S] cut to its real samples, their mean removed, silence after them; float64."""
    out = np.zeros_like(wave)
    if num_samples:
        out[:num_samples] = wave[:num_samples] - wave[:num_samples].mean()
    return out


def assert_hand_made(
    name: str, got: NDArray[np.float32], wave: reference.Array, num_samples: int
) -> None:
    """Rows ``got`` [T, F] are the feature of ``wave`` up to its real frames, and 0 after them."""
    real = FEATURES[name].real_frames(num_samples)
    assert np.all(got[real:] == 0.0)
    if real:
        reference.assert_right(name, got[:real], wave, num_frames=real)


def no_masks(num_clips: int, device: torch.device) -> Augment:
    mask = torch.zeros(num_clips, 2, dtype=torch.int64, device=device)
    return Augment(
        mix_into=torch.zeros(0, dtype=torch.int64, device=device),
        lam=torch.zeros(0, device=device),
        time_mask=mask,
        freq_mask=mask,
    )


def wide(wave: NDArray[np.float32]) -> reference.Array:
    return wave.astype(np.float64)


@contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
