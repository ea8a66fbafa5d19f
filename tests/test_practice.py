"""``fastat train`` without data: the practice set, made, packed and trained on."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastat.data.shards import PackedSet


def train_on_practice_set(folder: Path, *args: object) -> list[dict[str, float]]:
    """Runs the README's command with its cache in ``folder``; returns the epochs' metrics."""
    command = [sys.executable, "-m", "fastat.cli", "train", "--proc", "A4", "--model", "cnn_trans"]
    out = ["--out", str(folder / "run"), *map(str, args)]
    env = os.environ | {"FASTAT_CACHE": str(folder / "cache")}
    subprocess.run([*command, *out], check=True, env=env, timeout=1500)
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_two_steps_of_the_whole_model(tmp_path: Path) -> None:
    (line,) = train_on_practice_set(tmp_path, "--steps", 2)
    assert line["classes_scored"] == len(
        PackedSet.open(next((tmp_path / "cache").glob("practice-*")) / "eval").classes
    )


@pytest.mark.full
def test_make_demo_reaches_its_map(tmp_path: Path) -> None:
    """The practice run to its end: mAP 0.80 or more on the eval split."""
    lines = train_on_practice_set(tmp_path)
    assert lines[-1]["mAP"] >= 0.80
