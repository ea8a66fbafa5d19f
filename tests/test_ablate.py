"""fastat ablate: the real trainings, stopped and gone on with; signals; what is passed on."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest

from fastat.config.paper import TABLE_4
from fastat.config.run import TrainConfig, resolve
from fastat.evaluation.predictions import read_predictions
from fastat.study import ablate
from fastat.study.ablate import (
    OFF,
    Stopped,
    _Trainings,
    read_ablation,
    run_folders,
    table_4,
    train_all,
)
from fastat.study.compare import compare
from fastat.system.errors import Failure
from tests.conftest import QUIET, TINY_MODEL, TinySets, fastat, one_line


def wait_until(there: Callable[[], bool]) -> None:
    for _ in range(1200):
        if there():
            return
        time.sleep(0.05)
    raise AssertionError("waited a minute")


def test_stopped_and_gone_on_with(tiny_sets: TinySets, tmp_path: Path) -> None:
    """SIGTERM while the second run trains; the same command then trains the rest."""
    out = tmp_path / "t 4"
    args = (
        "ablate", "--proc", "A4", "--model", "cnn_trans", "--data", tiny_sets.train, "--eval",
        tiny_sets.eval, "--out", out, "--resamples", "100", "--seed", "5", *TINY_MODEL,
        "--set", "mixup=0.4", "--epochs", "1", "--batch", "12",
    )  # fmt: skip
    command = [sys.executable, "-m", "fastat.cli", *map(str, args)]
    env = os.environ | QUIET
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env) as process:
        wait_until((out / "no-balancing").exists)
        process.terminate()
        _, said = process.communicate(timeout=120)
    assert process.returncode == 143
    assert f"--out '{out}'" in said.splitlines()[-1]
    assert not (out / "no-mixup").exists()
    trained = (out / "baseline" / "metrics.jsonl").read_bytes()

    done = fastat(*args)
    assert done.stderr.count("nothing left to train") == 1
    assert (out / "baseline" / "metrics.jsonl").read_bytes() == trained
    assert "5 of 5, without normalisation" in done.stderr
    document = json.loads((out / "ablate.json").read_text())
    result = table_4(out, resamples=100)
    assert document == json.loads(json.dumps(asdict(result)))
    assert read_ablation(out / "ablate.json") == result
    runs = run_folders(out)
    configs = {part: TrainConfig.load(run / "config.json") for part, run in runs.items()}
    baseline = configs["baseline"]
    assert (baseline.seed, baseline.mixup, baseline.epochs) == (5, 0.4, 1)
    for part, (_, off) in OFF.items():
        for name in baseline.__dataclass_fields__:
            want = off.get(name, getattr(baseline, name))
            assert getattr(configs[part], name) == want, (part, name)
    scores = {part: read_predictions(run) for part, run in runs.items()}
    for row in document["rows"]:
        want = compare(scores["baseline"], scores[row["part"]], resamples=100)
        assert row["mAP"] == want.map_b.value
        assert row["difference"]["low"] == want.difference.low
        lost = 100 * (1 - want.map_b.value / want.map_a.value)
        assert row["lost_percent"]["value"] == pytest.approx(lost)
        assert row["lost_percent"]["low"] == pytest.approx(-want.percent.high)
        assert tuple(row["paper_lost_percent"]) == TABLE_4[row["part"]]
    assert [row["part"] for row in document["rows"]] == list(TABLE_4)
    for row in document["rows"]:
        assert f"{row['mAP']:.4f}" in done.stdout and f"no {row['part']}" in done.stdout


PROGRAM = """
import os, signal, sys, time
got = []
for s in (signal.SIGINT, signal.SIGTERM): signal.signal(s, lambda n, _: got.append(n))
open(sys.argv[1], "w").close()
while not got: time.sleep(0.01)
time.sleep(0.2)
# Two that come at once may be heard as one: what keeps them apart is a group of its own.
alone = len(got) == 1 and os.getpgrp() == os.getpid()
sys.exit(128 + got[0] if alone else 3)
"""


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_training_gets_a_signal_once_and_nothing_follows(
    tmp_path: Path, signum: signal.Signals, code: int
) -> None:
    """To the whole process group, as a terminal sends it; the training still hears of one only."""
    program = (
        "import sys, fastat.study.ablate as a\n"
        f"a.TRAIN = [sys.executable, '-c', {PROGRAM!r}]\n"
        "with a._Trainings() as t:\n"
        "    try: t.run(sys.argv[1:])\n"
        "    except a.Stopped as stop: print(stop.exit_code, t._received)\n"
        "    try: t.run(sys.argv[1:])\n"
        "    except a.Stopped: print('no other')\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "started")]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, process_group=0, env=os.environ | QUIET
    ) as process:
        wait_until((tmp_path / "started").exists)
        os.killpg(process.pid, signum)
        said, _ = process.communicate(timeout=60)
    assert said.splitlines() == [f"{code} {signum.value}", "no other"]


@pytest.mark.parametrize(
    ("program", "error", "message"),
    [
        ("import sys; sys.exit(2)", Stopped, "2"),
        ("import os; os.kill(os.getpid(), 9)", Failure, r"runs/x was killed \(SIGKILL\)"),
    ],
)
def test_a_training_that_ends_badly(
    monkeypatch: pytest.MonkeyPatch, program: str, error: type[Exception], message: str
) -> None:
    monkeypatch.setattr(ablate, "TRAIN", [sys.executable, "-c", program])
    before = [signal.getsignal(s) for s in ablate.FORWARDED]
    with pytest.raises(error, match=message), _Trainings() as trainings:
        trainings.run(["--out", "runs/x"])
    assert [signal.getsignal(s) for s in ablate.FORWARDED] == before


RECORDING = """
import pathlib, shutil, sys
prepared, *arguments = sys.argv[1:]
with open("arguments", "a") as file: print(*arguments, file=file)
run = pathlib.Path(arguments[-1])
run.mkdir(parents=True)
shutil.copy(prepared, run / "config.json")
"""


@pytest.mark.parametrize("auto", [False, True])
def test_what_the_baselines_device_decides_serves_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, auto: bool
) -> None:
    """The batch and the precision: chosen anew for each run, on another day or device, they may
    differ, and then more than the part does."""
    monkeypatch.chdir(tmp_path)
    overrides = {"data": "x", "batch": 72, "precision": "fp16"}
    config = resolve("A4", "cnn_trans", overrides, num_clips=1_000_000, clip_seconds=10.0)
    config.save(Path("config.json"))
    program = [sys.executable, "-c", RECORDING, "config.json"]
    monkeypatch.setattr(ablate, "TRAIN", program)
    train_all(["--batch", "auto" if auto else "72"], Path("t4"), auto_batch=auto)
    first, *others = Path("arguments").read_text().splitlines()
    assert "--set" not in first and len(others) == len(OFF)
    for line in others:
        assert "--set precision=fp16" in line
        assert ("--set batch=72" in line) == auto


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--epoch", 3), "--epochs"),
        (("--epochs", "three"), "--epochs must be an integer from 1 on, got 'three'"),
        (("--set", "mixup=0"), "the baseline without mixup"),
        (("--no-mixup",), "the baseline without mixup"),
        (("--no-specaug",), "the baseline without SpecAugment"),
        (("--no-balance",), "the baseline without balancing"),
        (("--no-normalize",), "the baseline without normalisation"),
        (("--resume",), "ablate sets --resume"),
        (("--data", "x", "--eval", "x"), "x"),
    ],
)
def test_mistakes_are_one_line(
    args: tuple[object, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = fastat("ablate", "--proc", "A4", "--model", "crnn", *args, code=2)
    assert message in one_line(done)
    assert not list(tmp_path.glob("runs/*"))
