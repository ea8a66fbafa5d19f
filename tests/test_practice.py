"""``make demo``: the practice set, made, packed and trained on."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from fastat.data.shards import PackedSet

ROOT = Path(__file__).parents[1]


def train_on_practice_set(folder: Path, *args: object) -> list[dict[str, float]]:
    """Runs what ``make demo`` does after installing, with its cache in ``folder``; returns the
    epochs' metrics."""
    makefile = ["make", "--dry-run", "--no-print-directory", "demo"]
    lines = subprocess.run(makefile, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    program, *words = shlex.split(lines.splitlines()[-1])
    assert program.endswith("fastat") and words[0] == "train"
    command = [sys.executable, "-m", "fastat.cli", *words]
    out = ["--out", str(folder / "run"), *map(str, args)]
    env = os.environ | {"FASTAT_CACHE": str(folder / "cache")}
    subprocess.run([*command, *out], check=True, env=env, timeout=1500)
    metrics = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in metrics]


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
