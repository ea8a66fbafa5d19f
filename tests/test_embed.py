"""fastat extract --embedding: the vector before the classifier, for all models."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile as sf
import torch

from fastat.audio.features import FEATURES
from fastat.data.shards import ClassInfo
from fastat.evaluation.extract import read_waveform
from fastat.training.checkpoints import write_checkpoint
from fastat.weights.checkpoint import ModelMeta, build_frontend, load_model
from tests.conftest import SMALL_MODELS, fastat, one_line

RATE = 16_000


def saved_run(folder: Path, model: str, options: dict[str, Any]) -> Path:
    """A run folder with a small model of random weights that reads clips of a second."""
    spec = FEATURES["logmel64"]
    meta = ModelMeta(
        model=model,
        feature=spec.name,
        clip_seconds=1.0,
        num_mels=spec.num_mels,
        num_frames=spec.num_frames(RATE),
        mean=spec.mean,
        std=spec.std,
        classes=(ClassInfo("a", "A"), ClassInfo("b", "B")),
        options=options,
    )
    write_checkpoint(folder / "checkpoints", 1, meta.create().state_dict(), meta, {}, best=True)
    return folder


def sound(path: Path, seconds: float) -> Path:
    noise = np.random.default_rng(0).standard_normal(round(seconds * RATE))
    sf.write(path, 0.1 * noise, RATE, subtype="PCM_16")
    return path


@pytest.mark.parametrize("name", SMALL_MODELS)
def test_a_row_for_each_window(name: str, tmp_path: Path) -> None:
    run = saved_run(tmp_path / "run", name, SMALL_MODELS[name])
    path = sound(tmp_path / "sound.wav", 2.5)
    fastat("extract", path, "--embedding", run, "--out", tmp_path / "out", "--precision", "fp32")
    got = np.load(tmp_path / "out" / "sound.npy")

    model, meta = load_model(run)
    waveform = torch.from_numpy(read_waveform(path))
    windows = torch.stack([waveform[s : s + RATE] for s in (0, RATE, 24_000)])
    with torch.inference_mode():
        features = build_frontend(meta)(windows, torch.full((3,), RATE))
        want = model.embed(features)
    assert got.dtype == np.float32 and got.shape == (3, model.embedding_size)
    size = np.abs(want.numpy()).max()
    np.testing.assert_allclose(got / size, want.numpy() / size, atol=1e-3)
    assert np.abs(got[0] - got[1]).max() > 5e-3 * size, "windows differ"


def test_windows_may_overlap(tmp_path: Path) -> None:
    run = saved_run(tmp_path / "run", "crnn", SMALL_MODELS["crnn"])
    path = sound(tmp_path / "sound.wav", 2.0)
    more = ("--out", tmp_path / "out", "--hop-seconds", 0.5)
    fastat("extract", path, "--embedding", run, *more)
    assert len(np.load(tmp_path / "out" / "sound.npy")) == 3


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    path = sound(tmp_path / "sound.wav", 1.0)
    out = ("--out", tmp_path / "out")
    assert "one of the two" in one_line(fastat("extract", path, *out, code=2))
    both = ("--feature", "logmel64", "--embedding", tmp_path)
    assert "one of the two" in one_line(fastat("extract", path, *both, *out, code=2))
    hop = ("--feature", "logmel64", "--hop-seconds", 1)
    assert "goes with --embedding" in one_line(fastat("extract", path, *hop, *out, code=2))
    nothing = ("--embedding", tmp_path / "gone")
    assert "does not exist" in one_line(fastat("extract", path, *nothing, *out, code=2))
    assert not (tmp_path / "out").exists()
