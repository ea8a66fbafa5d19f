"""Small audio files and tables for the tests of packing."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import soundfile as sf
import soxr
from numpy.typing import NDArray

RATES = (16_000, 8_000, 44_100, 48_000, 22_050)


def noise(seconds: float, rate: int, seed: int, channels: int = 1) -> NDArray[np.float32]:
    """Noise under a slow envelope with an offset, [S] or [S, C]."""
    rng = np.random.default_rng(seed)
    shape = (round(seconds * rate),) if channels == 1 else (round(seconds * rate), channels)
    x = 0.1 * rng.standard_normal(shape) + 0.02
    return x.astype(np.float32)


def reference(path: Path, seconds: float | None = None) -> NDArray[np.int16]:
    """What a file's samples must become, by soundfile and soxr in one piece."""
    x, rate = sf.read(path, dtype="float32", always_2d=True)
    mono = x.mean(axis=1, dtype=np.float32)
    if rate != 16_000:
        mono = soxr.resample(mono, rate, 16_000, quality="HQ")
    if seconds is not None:
        mono = mono[: round(seconds * 16_000)]
    rounded: NDArray[np.int16] = np.clip(np.rint(mono * 32768.0), -32768, 32767).astype(np.int16)
    return rounded


def write_table(
    folder: Path, num_files: int, seconds: float = 0.5, classes: Sequence[str] = ("a", "b", "c")
) -> Path:
    """``num_files`` WAV and FLAC files of several rates and a CSV that labels them."""
    audio = folder / "audio"
    audio.mkdir(parents=True)
    lines = ["path,labels,source"]
    for i in range(num_files):
        rate = RATES[i % len(RATES)]
        name = f"{i:04d}.{'flac' if i % 2 else 'wav'}"
        sf.write(audio / name, noise(seconds * (0.5 + i % 3 / 2), rate, i), rate, subtype="PCM_16")
        labels = classes[i % len(classes)]
        if i % 5 == 0:
            labels += f";{classes[(i + 1) % len(classes)]}"
        lines.append(f"{name},{labels},s{i // 3}")
    table = folder / "table.csv"
    table.write_text("\n".join(lines) + "\n")
    return table


def run_python(code: str, *args: object) -> subprocess.CompletedProcess[str]:
    """Runs ``code`` in a fresh interpreter, in a process group of its own."""
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, start_new_session=True, check=False
    )
