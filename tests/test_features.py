"""What the features are: banks, windows and frame counts, and the tests' own reference for them."""

import re
import warnings

import librosa
import numpy as np
import pytest
import torch
from librosa.filters import mel as librosa_mel
from scipy.signal.windows import hann
from transformers import ASTFeatureExtractor

from fastat.audio.features import FEATURES, get_feature
from tests import reference_features as reference

WAVES = reference.synthetic()


def test_slaney_bank_is_librosas() -> None:
    want = librosa_mel(sr=16000, n_fft=4096, n_mels=64, fmin=0, fmax=8000, norm="slaney")
    for bank in (FEATURES["logmel64"].mel_bank(), reference.slaney_bank()):
        np.testing.assert_allclose(bank, want.T, rtol=1e-6, atol=1e-9)


def test_kaldi_bank_is_the_ast_extractors() -> None:
    want = ast_extractor().mel_filters
    for bank in (FEATURES["fbank128"].mel_bank(), reference.kaldi_bank()):
        np.testing.assert_allclose(bank, want, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "samples", "symmetric"), [("logmel64", 1024, False), ("fbank128", 400, True)]
)
def test_window_is_scipys_hann(name: str, samples: int, symmetric: bool) -> None:
    want = hann(samples, sym=symmetric)
    np.testing.assert_allclose(FEATURES[name].window(), want, atol=1e-15)


def test_statistics_are_the_papers_after_normalisation() -> None:
    """The authors' 64-band scale is 20 log10 of the power, ours 10 log10."""
    logmel, fbank = FEATURES["logmel64"], FEATURES["fbank128"]
    decibels = np.array([-100.0, -30.0, 12.0])
    authors = (2 * decibels - -29.686901) / (2 * 40.898224)
    np.testing.assert_allclose((decibels - logmel.mean) / (2 * logmel.std), authors, rtol=1e-6)
    assert (fbank.mean, fbank.std) == (-3.6788461, 4.3739743)


@pytest.mark.parametrize(
    ("name", "clip_samples", "frames"),
    [
        ("logmel64", 160_000, 400),
        ("logmel64", 160_399, 400),
        ("logmel64", 160_400, 401),
        ("fbank128", 160_000, 1024),
        ("fbank128", 399, 0),
        ("fbank128", 400, 128),
        ("fbank128", 400 + 127 * 160, 128),
        ("fbank128", 400 + 128 * 160, 256),
    ],
)
def test_num_frames(name: str, clip_samples: int, frames: int) -> None:
    assert FEATURES[name].num_frames(clip_samples) == frames


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("logmel64", {0: 0, 1: 1, 399: 1, 400: 2, 80_000: 201, 159_600: 400, 160_000: 400}),
        ("fbank128", {0: 0, 1: 0, 399: 0, 400: 1, 559: 1, 560: 2, 80_000: 498, 160_000: 998}),
    ],
)
def test_real_frames(name: str, counts: dict[int, int]) -> None:
    feature = FEATURES[name]
    assert {n: feature.real_frames(n) for n in counts} == counts
    tensor = feature.real_frames(torch.tensor(list(counts)))
    assert tensor.tolist() == list(counts.values())


def test_unknown_feature_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match=re.escape("logmel64, fbank128, got 'mfcc'")):
        get_feature("mfcc")


@pytest.mark.parametrize("wave", ["noise", "quiet", "two tones", "chirp"])
def test_reference_logmel64_is_librosas(wave: str) -> None:
    got = reference.logmel64(WAVES[wave].astype(np.float64))
    want = librosa_logmel64(WAVES[wave].astype(np.float64))
    np.testing.assert_allclose(got, want, atol=1e-6)


@pytest.mark.parametrize("wave", ["noise", "quiet", "two tones", "offset"])
def test_reference_fbank128_is_the_ast_extractors(wave: str) -> None:
    """It frames in float64 but keeps the spectrum in complex64, so only its digits bound this."""
    got = reference.fbank128(WAVES[wave].astype(np.float64))
    want = ast_extractor()(WAVES[wave], sampling_rate=16000)["input_values"][0]
    assert reference.near_error("fbank128", want[:998], got) <= 1e-3
    assert reference.far_errors("fbank128", want[:998], got)[0] <= 1e-3


def test_the_criterion_rejects_small_mistakes() -> None:
    """Each of these is a plausible slip; a check that let one pass would check nothing."""
    x = WAVES["noise"].astype(np.float64)
    right = {name: REF(x).astype(np.float32) for name, REF in reference.REFERENCE.items()}
    for name, good in right.items():
        reference.assert_right(name, good, x)
        slips = {
            "one frame late": np.roll(good, 1, axis=0),
            "one band high": np.roll(good, 1, axis=1),
            "0.002 too loud": good + 0.002,
            "scaled": good * 1.001,
        }
        for slip, bad in slips.items():
            with pytest.raises(AssertionError, match="near the peak"):
                reference.assert_right(name, bad, x)
                pytest.fail(f"{name}: '{slip}' was accepted")
        with pytest.raises(AssertionError, match="shape"):
            reference.assert_right(name, good[:-1], x)


def librosa_logmel64(x: reference.Array) -> reference.Array:
    power = librosa.feature.melspectrogram(
        y=x, sr=16000, n_fft=4096, win_length=1024, hop_length=400, power=2.0, n_mels=64,
        fmin=0, fmax=8000, htk=False, norm="slaney", center=True, pad_mode="constant",
    )  # fmt: skip
    decibels: reference.Array = 10 * np.log10(np.maximum(power, 1e-10)).T[: len(x) // 400]
    return decibels


def ast_extractor() -> ASTFeatureExtractor:
    with warnings.catch_warnings():
        # Some of Kaldi's lowest filters are empty at 512 points; that is the feature.
        warnings.filterwarnings("ignore", message="At least one mel filter")
        return ASTFeatureExtractor(num_mel_bins=128, do_normalize=False)
