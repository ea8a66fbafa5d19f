"""fastat extract: whole files in blocks, equal to the front end in one piece."""

import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import torch
from numpy.typing import NDArray

from fastat.audio.features import FEATURES
from fastat.audio.frontend import Frontend
from fastat.cli import app as cli
from fastat.evaluation.extract import BLOCK_FRAMES, extract, extract_files

RATE = 16_000


def samples(num_samples: int, seed: int = 0) -> NDArray[np.int16]:
    rng = np.random.default_rng(seed)
    return (3000 * rng.standard_normal(num_samples) + 700).astype(np.int16)


CLOSE = 1e-2
"""Two float32 ways to one feature: each is within 1e-3 of float64 near a frame's peak, and further
off in a spectral null, as the order of the sums will have it. A wrong block is off by decibels."""


@pytest.mark.parametrize("feature", ["logmel64", "fbank128"])
@pytest.mark.parametrize("blocks", [0.1, 1.0, 2.3])
def test_blocks_equal_the_front_end_over_the_whole_file(feature: str, blocks: float) -> None:
    spec = FEATURES[feature]
    x = samples(int(blocks * BLOCK_FRAMES * spec.hop_samples) + 123)
    frontend = Frontend(feature, clip_samples=len(x), normalize=False)
    want = frontend(torch.from_numpy(x)[None], torch.tensor([len(x)]))[0].numpy()
    got = extract(x, spec)
    assert got.dtype == np.float32 and got.shape == want.shape
    np.testing.assert_allclose(got, want, atol=CLOSE)


def test_ten_seconds_are_what_the_models_read(tmp_path: Path) -> None:
    sf.write(tmp_path / "a.wav", samples(10 * RATE), RATE, subtype="PCM_16")
    for feature, shape in (("logmel64", (400, 64)), ("fbank128", (1024, 128))):
        extract_files([tmp_path / "a.wav"], feature, tmp_path / feature)
        saved = np.load(tmp_path / feature / "a.npy")
        assert saved.dtype == np.float32 and saved.shape == shape
        clip = torch.from_numpy(samples(10 * RATE))[None]
        want = Frontend(feature, normalize=False)(clip, torch.tensor([10 * RATE]))[0]
        np.testing.assert_allclose(saved, want.numpy(), atol=CLOSE)
    assert not saved[998:].any() and saved[997].any(), "padding frames are zeros"


def test_the_files_mean_is_removed() -> None:
    x = samples(3 * RATE)
    for feature in FEATURES.values():
        np.testing.assert_allclose(extract(x, feature), extract(x - 700, feature), atol=CLOSE)


def test_mistakes_and_bad_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fastat(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fastat", "extract", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capsys.readouterr()
        return int(stop.value.code or 0), out, err

    good, short, gone = (tmp_path / f"{name}.wav" for name in ("good", "short", "gone"))
    sf.write(good, samples(RATE), RATE)
    sf.write(short, samples(100), RATE)
    out = tmp_path / "features"

    code, _, err = fastat(good, "--feature", "logmel46", "--out", out)
    assert code == 2 and "did you mean 'logmel64'" in err
    code, _, err = fastat(gone, "--feature", "logmel64", "--out", out)
    assert code == 2 and "does not exist" in err
    code, _, err = fastat(good, "--feature", "logmel64", "--out", good)
    assert code == 2 and "takes a folder" in err

    other = tmp_path / "other"
    other.mkdir()
    sf.write(other / "good.flac", samples(RATE), RATE)
    code, _, err = fastat(good, other / "good.flac", "--feature", "logmel64", "--out", out)
    assert code == 2 and "2 files would be written to good.npy" in err
    assert not out.exists(), "a mistake leaves nothing behind"

    code, text, err = fastat(short, gone, good, "--feature", "fbank128", "--out", out)
    assert code == 1
    assert f"{short}: empty: 100 samples hold no frame of fbank128" in err
    assert f"{gone}: missing" in err and "2 of 3 files could not be used" in err
    assert [path.name for path in out.iterdir()] == ["good.npy"]
    assert text == f"{out / 'good.npy'}  128 x 128\n"
