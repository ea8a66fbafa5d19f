"""What a GPU session relies on: bench/gpu.sh's parts and the table of results."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.table import merged, table

ROOT = Path(__file__).parents[1]


def gpu_sh(*args: object) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(ROOT / "bench" / "gpu.sh"), *map(str, args)]
    env = os.environ | {"PYTHON": sys.executable}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)


def row(impl: str, ms: float, **more: object) -> dict[str, object]:
    known = {"op": "attention", "shape": "80x345x12x64", "passes": "fwd", "device": "Chip 9"}
    return known | {"impl": impl, "ms": ms} | more


def test_help_lists_the_parts() -> None:
    done = gpu_sh("--help")
    assert done.returncode == 0
    assert all(part in done.stdout for part in ("ceilings", "attention_pool", "a4", "tune"))


def test_unknown_part_measures_nothing(tmp_path: Path) -> None:
    done = gpu_sh("--out", tmp_path, "ceilings", "flash")
    assert done.returncode == 2 and done.stderr.strip() == "gpu.sh: no part named flash"
    assert not any(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has ceilings")
def test_a_part_that_fails_is_named(tmp_path: Path) -> None:
    done = gpu_sh("--out", tmp_path, "ceilings")
    assert done.returncode == 1
    assert "needs a CUDA device" in done.stderr and "failed: ceilings (exit code 1)" in done.stderr


def test_newer_results_replace_older_ones(tmp_path: Path) -> None:
    old = {"device": "Chip 9", "results": [row("ours", 9.0), row("flash", 3.0)]}
    (tmp_path / "chip-9.json").write_text(json.dumps(old))
    lines = [row("ours", 4.0), row("ours", 2.0)]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (results,) = merged(tmp_path).values()
    assert sorted((r["impl"], r["ms"]) for r in results.values()) == [("flash", 3.0), ("ours", 2.0)]


def test_table_sets_ours_beside_the_best_peer() -> None:
    rows = [row("ours", 2.0, clips_per_s=500.4), row("flash", 3.0), row("eager", 8.0)]
    header, line = table(rows).splitlines()
    assert header.split()[:3] == ["operator", "shape", "passes"]
    assert line.split() == "attention 80x345x12x64 fwd 2.0000 flash 3.0000 1.50 500".split()
