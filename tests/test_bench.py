"""What a benchmark session relies on: bench/gpu.sh's parts, what is kept, and what is compared."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.compare import against, cases, key, last_and_before, report, save, targets

ROOT = Path(__file__).parents[1]
DEVICE = "Chip 9"


def run(*command: object, **env: str) -> subprocess.CompletedProcess[str]:
    # pytest-benchmark measures nothing where it takes itself for a worker of pytest-xdist.
    outside = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    env = outside | {"PYTHON": sys.executable} | env
    return subprocess.run(
        list(map(str, command)), cwd=ROOT, env=env, capture_output=True, text=True, timeout=300
    )


def gpu_sh(*args: object) -> subprocess.CompletedProcess[str]:
    return run("bash", "bench/gpu.sh", *args)


def compare(*args: object) -> subprocess.CompletedProcess[str]:
    return run(sys.executable, "-m", "bench.compare", *args)


def row(impl: str, ms: float, run: str = "now", **more: object) -> dict[str, object]:
    known = {
        "run": run, "device": DEVICE, "precision": "bf16", "commit": "abc1234",
        "area": "kernels", "op": "attention",
        "shape": "80x345x12x64", "passes": "fwd",
    }  # fmt: skip
    return known | {"impl": impl, "ms": ms} | more


def write(folder: Path, rows: list[dict[str, object]]) -> None:
    (folder / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


# ------------------------------------------------------------------------------ gpu.sh
def test_help_lists_the_parts() -> None:
    done = gpu_sh("--help")
    assert done.returncode == 0
    parts = ("ceilings", "cuda_more", "targets_ast", "patch_embed", "a4", "tune")
    assert all(part in done.stdout for part in parts)


def test_unknown_part_measures_nothing(tmp_path: Path) -> None:
    done = gpu_sh("--out", tmp_path, "ceilings", "flash")
    assert done.returncode == 2 and done.stderr.strip() == "gpu.sh: no part named flash"
    assert not any(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU can be tuned for")
def test_a_part_that_fails_is_named(tmp_path: Path) -> None:
    done = gpu_sh("--out", tmp_path, "tune=dropout_of_none")
    assert done.returncode == 2
    done = gpu_sh("--out", tmp_path, "tune=patch_embed")
    assert done.returncode == 1
    assert "needs a CUDA device" in done.stderr
    assert "failed: tune=patch_embed (exit code 1)" in done.stderr


def test_parts_that_have_no_time_left_are_named(tmp_path: Path) -> None:
    done = gpu_sh("--within", 1, "--out", tmp_path, "ceilings", "a4")
    assert done.returncode == 1
    assert "failed: ceilings (no time left) a4 (no time left)" in done.stderr
    assert not any(tmp_path.iterdir())
    done = gpu_sh("--within", "soon", "ceilings")
    assert done.returncode == 2
    assert done.stderr.strip() == "gpu.sh: --within takes seconds, got soon"


def test_a_part_leaves_results_and_the_table(tmp_path: Path) -> None:
    done = gpu_sh("--out", tmp_path, "patch_embed")
    assert done.returncode == 0, done.stdout + done.stderr
    (kept,) = set(tmp_path.glob("*.json")) - {tmp_path / "ceilings.json"}
    document = json.loads(kept.read_text())
    assert document["ceilings"]["flop_per_s"] > 0
    results = document["results"]
    assert {r["impl"] for r in results} == {"ours", "compiled", "unfold"}
    assert len({r["run"] for r in results}) == 1
    assert "0 of 4 cases were measured before" in done.stdout
    assert done.stdout.count("patch_embed  4x") == 4


def test_training_is_measured_beside_its_peers(tmp_path: Path) -> None:
    pytest_ = (sys.executable, "-m", "pytest", "-q", "bench/bench_targets.py")
    done = run(*pytest_, "-k", "resnet50 and not eager", FASTAT_BENCH_OUT=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [r["impl"] for r in rows] == ["ours", "torchvision"]
    for r in rows:
        batch = int(r["shape"].split()[-1])
        assert r["clips_per_s"] == pytest.approx(batch / (r["ms"] / 1e3))
        assert r["hours_per_epoch"] * r["clips_per_s"] * 3600 == pytest.approx(1_998_999)
        assert r["ms_min"] <= r["ms"] and r["target_clips_per_s"] == 8000
    (line,) = [line for line in report(tmp_path).splitlines() if "resnet50 A4, batch" in line]
    assert "8,000" in line and line.split()[-2] == "torchvision"


# ------------------------------------------------------------------------------ what is compared
def test_the_last_run_beside_the_one_before() -> None:
    saved = [row("ours", 9.0, "old"), row("flash", 3.0, "old")]
    rows = [row("ours", 8.0, "older today"), row("ours", 4.0), row("ours", 2.0)]
    now, before = last_and_before(rows, saved)
    assert [r["ms"] for r in now.values()] == [2.0]  # the last of the run
    assert sorted(r["ms"] for r in before.values()) == [3.0, 8.0]  # newer than what was saved


def test_a_run_that_was_saved_is_not_compared_with_itself() -> None:
    rows = [row("ours", 2.0)]
    assert last_and_before(rows, rows)[1] == {}


@pytest.mark.parametrize(
    "ms, fastest, text",
    [
        (2.0, 2.0, "1.00"),
        (1.0, 0.9, "2.00"),
        (2.1, 2.1, "0.95"),  # within a tenth
        (4.0, 3.9, "0.50 SLOWER"),
        (4.0, 1.9, "0.50"),  # a busy machine: one round was as fast as before
    ],
)
def test_what_counts_as_slower(ms: float, fastest: float, text: str) -> None:
    then = row("ours", 2.0, "old")
    assert against(row("ours", ms, ms_min=fastest), {key(then): then}) == text


def test_another_case_is_not_compared() -> None:
    then = row("ours", 2.0, "old", shape="another")
    assert against(row("ours", 4.0), {key(then): then}) == ""


def test_ours_stands_beside_the_best_peer() -> None:
    rows = [row("ours", 2.0), row("ours split", 1.0), row("flash", 3.0), row("eager", 8.0)]
    ((ours, peer),) = cases({key(r): r for r in rows}).values()
    assert peer is not None and (ours["impl"], peer["impl"]) == ("ours", "flash")


def test_ours_without_a_peer_is_in_the_table_too(tmp_path: Path) -> None:
    write(tmp_path, [row("ours", 2.0, area="data", op="pack"), row("compiled", 1.0)])
    text = report(tmp_path)
    assert "\ndata\n" in text and "kernels" not in text  # a peer alone is not


def step_row(impl: str, ms: float, rate: float) -> dict[str, object]:
    return row(
        impl, ms, area="steps", op="ast A3", shape="A3 batch 80", clips_per_s=rate,
        target_clips_per_s=1700, aim_clips_per_s=2300, percent_of_ceiling=41.0,
        hours_per_epoch=0.3, paper_hours_per_epoch=2.1, data_wait_percent=0.1,
    )  # fmt: skip


@pytest.mark.parametrize("rate, said", [(1699, "missed"), (1700, "met"), (2300, "aim met")])
def test_targets_are_met_or_missed_on_their_device(rate: float, said: str) -> None:
    rows = [step_row("ours", 40.0, rate), step_row("eager", 80.0, 1), step_row("timm", 50.0, 1)]
    now = {key(r): r for r in rows}
    _, line = targets(now, "NVIDIA H200").splitlines()
    assert f" {said} " in line and " 2.00 " in line and "1.25 timm" in line
    _, elsewhere = targets(now, "AMD EPYC, 2 threads").splitlines()
    assert " met " not in elsewhere and " missed " not in elsewhere


# ------------------------------------------------------------------------------ the command
def test_devices_are_compared_with_themselves_alone(tmp_path: Path) -> None:
    other = row("ours", 1.0, "old") | {"device": "Chip 8"}
    write(tmp_path, [other, row("ours", 2.0), row("eager", 5.0)])
    eight, nine = report(tmp_path).split("Chip 9, run now")
    assert eight.startswith("Chip 8, run old")
    assert "0 of 1 cases were measured before on this device" in nine
    assert "2.50" in nine and "0.50" not in nine


def test_saved_results_are_what_the_next_run_is_compared_with(tmp_path: Path) -> None:
    write(tmp_path, [row("ours", 2.0, "first"), row("eager", 5.0, "first")])
    save(tmp_path)
    write(tmp_path, [row("ours", 4.0, "second")])
    done = compare(tmp_path, "--save")
    assert done.returncode == 0 and "0.50 SLOWER" in done.stdout
    kept = json.loads((tmp_path / "chip-9.json").read_text())
    assert [(r["impl"], r["ms"]) for r in kept["results"]] == [("ours", 4.0), ("eager", 5.0)]


def test_damaged_results_are_named(tmp_path: Path) -> None:
    write(tmp_path, [row("ours", 1.0)])
    (tmp_path / "chip-9.json").write_text('{"results": [')
    with pytest.raises(SystemExit, match="chip-9.json is damaged"):
        report(tmp_path)


NO_TIME = json.dumps({k: v for k, v in row("ours", 1.0).items() if k != "ms"})


@pytest.mark.parametrize("line", ["{", "3", '{"device": "Chip 9"}', NO_TIME])
def test_a_damaged_line_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "results.jsonl").write_text(json.dumps(row("ours", 1.0)) + f"\n{line}\n")
    with pytest.raises(SystemExit, match=r"results.jsonl, line 2: no result"):
        report(tmp_path)


def test_no_results(tmp_path: Path) -> None:
    (tmp_path / "results.jsonl").touch()
    with pytest.raises(SystemExit, match="results.jsonl is empty"):
        report(tmp_path)
    (tmp_path / "results.jsonl").unlink()
    done = compare(tmp_path)
    assert done.returncode == 1 and done.stderr.startswith("bench.compare: no ")
    assert len(done.stderr.splitlines()) == 1
