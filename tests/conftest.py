"""Without a GPU the Triton launchers run under the interpreter; must be set before import."""

import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

if TYPE_CHECKING:  # the kernels' tests also run where DALI and the rest are not installed
    from fastat.data.loader import Batch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def seeded_fp32_exact() -> None:
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


@pytest.fixture(scope="session")
def recordings() -> Path:
    """The folder of real recordings that FASTAT_TEST_AUDIO names; skips without it."""
    folder = os.environ.get("FASTAT_TEST_AUDIO")
    if not folder:
        pytest.skip("FASTAT_TEST_AUDIO is not set: no real recordings to test on")
    return Path(folder)


TINY_CLASSES = ("buzz", "click", "hiss")


def write_tiny_audio(folder: Path, num_clips: int, seed: int) -> Path:
    """One-second clips of three plain classes, a folder for each; returns ``folder``."""
    import soundfile as sf  # the kernels' tests also run where there is none

    rng = np.random.default_rng(seed)
    t = np.arange(16_000) / 16_000
    for i in range(num_clips):
        name = TINY_CLASSES[i % 3]
        noise = rng.standard_normal(16_000)
        sound = {
            "buzz": np.sign(np.sin(2 * np.pi * rng.uniform(80, 300) * t)),
            "click": (np.arange(16_000) % rng.integers(2000, 4000) < 20) * 2.0,
            "hiss": noise,
        }[name]
        wave = 0.2 * rng.uniform(0.5, 1) * sound + 0.002 * noise
        path = folder / name / f"{name}-{i}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        sf.write(path, wave, 16_000, subtype="PCM_16")
    return folder


@dataclass(frozen=True)
class TinySets:
    """A packed training and evaluation set of one-second clips, and their audio."""

    train: Path
    eval: Path
    audio: Path


@pytest.fixture(scope="session")
def tiny_sets(tmp_path_factory: pytest.TempPathFactory) -> TinySets:
    from fastat.packing.pack import pack

    root = tmp_path_factory.mktemp("tiny")
    for split, clips, seed in (("train", 36, 0), ("eval", 15, 1)):
        audio = write_tiny_audio(root / f"{split}-audio", clips, seed)
        pack(audio, root / split, clip_seconds=1.0, workers=1)
    return TinySets(root / "train", root / "eval", root / "train-audio")


def kept(batch: "Batch") -> "Batch":
    """The batch with a waveform of its own, which the next batch does not overwrite."""
    assert batch.waveform is not None
    return replace(batch, waveform=batch.waveform.clone())


TINY_MODEL = ("--set", "model.embedding=64", "--set", "model.num_heads=4")
"""Options that make cnn_trans small enough for a test."""


SMALL_MODELS: dict[str, dict[str, Any]] = {
    "ast": {"size": "tiny224", "num_layers": 1, "fstride": 16, "tstride": 8},
    "transformer": {"num_layers": 2, "num_heads": 4, "width": 64},
    "cnn_trans": {"embedding": 64, "num_heads": 4},
    "conformer": {"num_layers": 2, "num_heads": 4, "width": 64, "hidden": 64},
    "resnet50": {},
    "resnet34": {},
    "crnn": {"embedding": 64},
}
"""Options that make each model small enough for a test; the ResNets have none."""


QUIET = {"COLUMNS": "200", "OMP_NUM_THREADS": "1"}
"""Environment of a command under test: one thread is quicker at this size, and reproducible."""


def fastat(*args: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Runs the real command in a process of its own and checks its exit code."""
    command = [sys.executable, "-m", "fastat.cli", *map(str, args)]
    env = os.environ | QUIET
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=600)
    assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def one_line(done: subprocess.CompletedProcess[str]) -> str:
    """The command's complaint: exactly one line on standard error, nothing on standard output."""
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("fastat: "), done.stderr
    assert done.stdout == ""
    return lines[0]
