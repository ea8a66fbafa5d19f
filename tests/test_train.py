"""fastat train: the run folder, resuming, signals, what may not reach the weights."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fastat.audio.features import FEATURES
from fastat.config.run import resolve
from fastat.config.schedule import lr_factor
from fastat.data.shards import PackedSet
from fastat.packing.pack import pack
from fastat.system.display import StatusDisplay
from fastat.system.errors import Failure, UserError
from fastat.training import step as stepping
from fastat.training import trainer as training
from fastat.training.optim import train_step
from fastat.training.trainer import Trainer
from fastat.weights.checkpoint import ModelMeta, load_model
from tests.conftest import (
    QUIET,
    TINY_MODEL,
    TinySets,
    fastat,
    one_line,
    write_tiny_audio,
)

A4 = ("train", "--proc", "A4", "--model", "cnn_trans", *TINY_MODEL)


def arguments(sets: TinySets, out: Path, *more: object) -> tuple[object, ...]:
    sizes = ("--epochs", 3, "--batch", 8)
    return (*A4, "--data", sets.train, "--eval", sets.eval, "--out", out, *sizes, *more)


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def learned(run: Path) -> list[dict[str, Any]]:
    """The epochs' lines without what depends on the clock."""
    timed = ("clips_per_s", "data_wait_fraction", "epoch_s", "peak_memory_gib")
    return [{k: v for k, v in line.items() if k not in timed} for line in metrics(run)]


def assert_same_run(run: Path, other: Path) -> None:
    """Bit-identical weights, optimizer and metrics."""
    assert learned(run) == learned(other)
    for name in ("last", "best"):
        ours = load_file(run / "checkpoints" / name / "model.safetensors")
        theirs = load_file(other / "checkpoints" / name / "model.safetensors")
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    states = [
        torch.load(r / "checkpoints" / "last" / "trainer.pt", weights_only=True)
        for r in (run, other)
    ]
    for a, b in zip(*(s["optimizer"]["state"].values() for s in states), strict=True):
        assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def whole_run(tiny_sets: TinySets, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three epochs of four steps, undisturbed."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    fastat(*arguments(tiny_sets, out))
    return out


def test_run_folder_holds_what_was_promised(whole_run: Path) -> None:
    lines = metrics(whole_run)
    assert [line["epoch"] for line in lines] == [1, 2, 3]
    assert [line["step"] for line in lines] == [4, 8, 12]
    promised = {
        "epoch", "step", "lr", "train_loss", "eval_loss", "mAP", "AUC", "d_prime",
        "classes_scored", "clips_per_s", "data_wait_fraction", "epoch_s", "peak_memory_gib",
    }  # fmt: skip
    for line in lines:
        assert promised <= line.keys()
        assert all(math.isfinite(line[k]) for k in promised - {"d_prime"})
        assert line["d_prime"] is None or math.isfinite(line["d_prime"])
    config = json.loads((whole_run / "config.json").read_text())
    assert config["model_options"] == {"dropout": 0.75, "embedding": 64, "num_heads": 4}
    assert config["time_mask"] == 8  # 75 frames of 400, for one second of ten: 7.5
    assert json.loads((whole_run / "env.json").read_text())["versions"]["torch"]
    assert list((whole_run / "tb").glob("events.out.tfevents.*"))
    for name in ("last", "best"):
        files = {p.name for p in (whole_run / "checkpoints" / name).iterdir()}
        assert files == {"model.safetensors", "model.json", "trainer.pt"}


def test_checkpoint_holds_all_that_predicting_needs(whole_run: Path, tiny_sets: TinySets) -> None:
    model, meta = load_model(whole_run)
    packed = PackedSet.open(tiny_sets.train)
    assert meta.classes == packed.classes
    assert (meta.mean, meta.std) == packed.stats["logmel64"][:2]
    assert model(torch.randn(2, meta.num_frames, meta.num_mels)).shape == (2, 3)
    assert not model.training


def test_predictions_are_those_of_the_best_epoch(whole_run: Path, tiny_sets: TinySets) -> None:
    done = fastat("eval", whole_run, "--data", tiny_sets.eval, "--json")
    result = json.loads(done.stdout)
    best = max(metrics(whole_run), key=lambda line: line["mAP"])
    assert result["mAP"] == pytest.approx(best["mAP"], abs=1e-9)
    assert result["eval_loss"] == pytest.approx(best["eval_loss"], abs=1e-6)


def test_it_learns(tiny_sets: TinySets, tmp_path: Path) -> None:
    plain = ("--no-mixup", "--no-specaug", "--schedule", "constant")
    more = ("--epochs", 12, "--set", "model.dropout=0", "--lr", 2e-3, *plain)
    fastat(*arguments(tiny_sets, tmp_path / "run", *more))
    lines = metrics(tmp_path / "run")
    assert lines[-1]["train_loss"] < 0.7 * lines[0]["train_loss"]
    assert max(line["mAP"] for line in lines) > 0.9


def test_dali_trains_as_the_packed_rows_do(
    whole_run: Path, tiny_sets: TinySets, tmp_path: Path
) -> None:
    """The same clips, partners and masks, from the original 16 kHz files: the same losses."""
    out = tmp_path / "run"
    fastat(*arguments(tiny_sets, out, "--source", "dali"))
    for ours, packed in zip(metrics(out), metrics(whole_run), strict=True):
        assert ours["train_loss"] == pytest.approx(packed["train_loss"], rel=0.02)
        assert ours["eval_loss"] == pytest.approx(packed["eval_loss"], rel=0.1)


def test_dali_names_the_files_that_are_gone(tiny_sets: TinySets, tmp_path: Path) -> None:
    audio = write_tiny_audio(tmp_path / "audio", 12, seed=5)
    pack(audio, tmp_path / "set", clip_seconds=1.0, workers=1)
    next(audio.rglob("buzz-0.wav")).unlink()
    args = (*A4, "--data", tmp_path / "set", "--out", tmp_path / "run", "--source", "dali")
    done = fastat(*args, code=2)
    assert "DALI cannot take 1 of 12 clips" in done.stderr.strip().splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()
    done = fastat(*args, "--max-bad", 0.1, "--steps", 2)
    assert "DALI cannot take 1 clips" in done.stderr and "buzz-0.wav" in done.stderr


# ------------------------------------------------------------------------------------ resuming
@pytest.mark.parametrize("steps", [3, 4, 6], ids=["mid-epoch", "epoch", "second epoch"])
def test_resuming_after_steps_equals_the_whole_run(
    whole_run: Path, tiny_sets: TinySets, tmp_path: Path, steps: int
) -> None:
    out = tmp_path / "run"
    fastat(*arguments(tiny_sets, out, "--steps", steps))
    assert metrics(out)[-1]["step"] == steps
    fastat("train", "--resume", "--out", out, "--set", "steps=null")
    assert_same_run(out, whole_run)


SLOW_WRITES = (
    "import time; import fastat.system.files as atomic; fsync = atomic.fsync\n"
    "def slow(path): time.sleep(0.2); fsync(path)\n"
    "atomic.fsync = slow; from fastat.cli.app import main; main()"
)
KILLED = [("at", 1), ("writing", 5), ("at", 10)]
"""At a step, or while the checkpoint of it, or of the next one that has one, is written."""


@pytest.mark.parametrize(
    ("when", "step"),
    [
        kill if kill in KILLED else pytest.param(*kill, marks=pytest.mark.full)
        for kill in [*(("at", k) for k in range(1, 12)), *(("writing", k) for k in range(1, 12))]
    ],
)
def test_killed_with_9_it_resumes_to_the_same_end(
    whole_run: Path, tiny_sets: TinySets, tmp_path: Path, when: str, step: int
) -> None:
    out = tmp_path / "run"
    args = arguments(tiny_sets, out, "--set", "checkpoint_every_steps=1")
    if when == "at":
        process = start(*args)
        wait_for_step(process, out, step)
    else:
        process = start(*args, program=SLOW_WRITES)
        wait_for_write(process, out, step)
    process.kill()
    process.wait()
    if when == "writing":
        assert list((out / "checkpoints").glob(".step-*.tmp"))
    fastat(*arguments(tiny_sets, out, "--resume"))
    assert_same_run(out, whole_run)
    assert not list(out.rglob("*.tmp"))


@pytest.mark.parametrize(
    ("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["SIGTERM", "SIGINT"]
)
def test_signals_save_and_leave(
    whole_run: Path, tiny_sets: TinySets, tmp_path: Path, signum: int, code: int
) -> None:
    out = tmp_path / "run"
    process = start(*arguments(tiny_sets, out, "--set", "checkpoint_every_steps=1"))
    wait_for_step(process, out, 2)
    process.send_signal(signum)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == code, stderr
    assert f"go on with: fastat train --resume --out {out}" in stderr
    assert "Traceback" not in stderr
    fastat(*arguments(tiny_sets, out, "--resume"))
    assert_same_run(out, whole_run)


def test_a_signal_at_an_epochs_last_step_still_scores_the_epoch(
    whole_run: Path, tiny_sets: TinySets, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    program = (
        "import os, signal, sys; import fastat.training.step as t\n"
        "from fastat.cli.app import main\n"
        "step, done = t.train_step, []\n"
        "def counted(*args):\n"
        "    done.append(step(*args))\n"
        "    if len(done) == 4: os.kill(os.getpid(), signal.SIGTERM)\n"
        "    return done[-1]\n"
        "t.train_step = counted; main()"
    )
    command = [sys.executable, "-c", program, *map(str, arguments(tiny_sets, out))]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | QUIET)
    assert done.returncode == 143, done.stderr
    assert [line["step"] for line in metrics(out)] == [4]
    fastat("train", "--resume", "--out", out)
    assert_same_run(out, whole_run)


def test_part_of_a_line_of_metrics_is_dropped_on_resume(
    whole_run: Path, tiny_sets: TinySets, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    fastat(*arguments(tiny_sets, out, "--steps", 4))
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 2, "st')
    fastat("train", "--resume", "--out", out, "--set", "steps=null")
    assert_same_run(out, whole_run)


def test_without_git_it_trains(tiny_sets: TinySets, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fastat.cli"]
    args = arguments(tiny_sets, tmp_path / "run", "--steps", 1)
    env = os.environ | QUIET | {"PATH": str(tmp_path)}
    subprocess.run([*command, *map(str, args)], check=True, env=env, capture_output=True)
    assert json.loads((tmp_path / "run" / "env.json").read_text())["commit"] is None


def start(*args: object, program: str | None = None) -> subprocess.Popen[str]:
    """The command, or ``program`` with the command's arguments."""
    code = ["-m", "fastat.cli"] if program is None else ["-c", program]
    command = [sys.executable, *code, *map(str, args)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | QUIET)


def wait_for_step(process: subprocess.Popen[str], run: Path, step: int) -> None:
    link = run / "checkpoints" / "last"
    wait(
        process,
        lambda: link.is_symlink() and int(link.readlink().name.removeprefix("step-")) >= step,
    )


def wait_for_write(process: subprocess.Popen[str], run: Path, step: int) -> None:
    folder = run / "checkpoints"
    wait(
        process,
        lambda: any(int(path.name[6:14]) >= step for path in folder.glob(".step-*.tmp")),
    )


def wait(process: subprocess.Popen[str], seen: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if seen():
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    raise AssertionError("what was waited for did not come")


def test_resume_where_nothing_is_left(whole_run: Path, tiny_sets: TinySets) -> None:
    before = learned(whole_run)
    done = fastat("train", "--resume", "--out", whole_run)
    assert "nothing left to train" in done.stderr
    assert learned(whole_run) == before


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--lr", 1e-3), "lr may not change on --resume"),
        (("--proc", "A2"), "proc may not change"),
        (("--set", "model.num_heads=8"), "model_options may not change"),
    ],
)
def test_mathematics_may_not_change_on_resume(
    whole_run: Path, more: tuple[object, ...], message: str
) -> None:
    done = fastat("train", "--resume", "--out", whole_run, *more, code=2)
    assert message in one_line(done)


def test_another_set_is_refused_on_resume(whole_run: Path, tiny_sets: TinySets) -> None:
    more = ("--data", tiny_sets.eval)
    done = fastat("train", "--resume", "--out", whole_run, *more, code=2)
    assert "is not the set that" in one_line(done)


# ------------------------------------------------------------------------- what must not happen
def test_nonfinite_loss_never_reaches_the_weights(tiny_sets: TinySets, tmp_path: Path) -> None:
    out = tmp_path / "run"
    more = ("--lr", 1e30, "--precision", "fp32", "--set", "checkpoint_every_steps=1")
    done = fastat(*arguments(tiny_sets, out, *more), code=1)
    last = done.stderr.strip().splitlines()[-1]
    assert "not finite at step" in last and "Traceback" not in done.stderr
    names = set(PackedSet.open(tiny_sets.train).names(np.arange(36)))
    assert sum(name in last for name in names) >= 3, "the step's clips are named"
    weights = load_file(out / "checkpoints" / "last" / "model.safetensors")
    assert all(torch.isfinite(w.float()).all() for w in weights.values())


def test_weights_that_diverge_between_steps_are_one_line(
    tiny_sets: TinySets, tmp_path: Path
) -> None:
    more = ("--lr", 1e30, "--precision", "fp32", "--steps", 1)
    done = fastat(*arguments(tiny_sets, tmp_path / "run", *more), code=1)
    assert done.stderr.strip().splitlines()[-1].startswith("fastat: the model's scores are not")


def test_full_disk_keeps_the_checkpoint_before(tiny_sets: TinySets, tmp_path: Path) -> None:
    """A limit on a file's size stops the second run's larger checkpoint as a full disk would."""
    out = tmp_path / "run"
    fastat(*arguments(tiny_sets, out, "--steps", 4))
    limit = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (60000, 60000));"
    program = limit + "from fastat.cli.app import main; sys.argv[0] = 'fastat'; main()"
    resume = [sys.executable, "-c", program, "train", "--resume", "--out", str(out)]
    more = ["--set", "steps=8"]
    done = subprocess.run([*resume, *more], capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stderr
    assert "cannot write checkpoint" in done.stderr.strip().splitlines()[-1]
    assert "Traceback" not in done.stderr
    folder = out / "checkpoints"
    assert sorted(p.name for p in folder.iterdir()) == ["best", "last", "step-00000004"]
    load_model(out)


def test_a_damaged_row_stops_the_run(tiny_sets: TinySets, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(tiny_sets.train, data)
    shard = data / "shard-00000.h5"
    content = bytearray(shard.read_bytes())
    middle = len(content) // 2
    content[middle] ^= 0xFF
    shard.write_bytes(content)
    out = tmp_path / "run"
    args = (*A4, "--data", data, "--out", out, "--epochs", 4, "--batch", 8, "--no-balance")
    done = fastat(*args, code=1)
    last = done.stderr.strip().splitlines()[-1]
    assert "shard-00000.h5" in last and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--epochs", 0), "--epochs must be an integer from 1 on"),
        (("--batch", 37), "a batch needs 1 to 36 clips"),
        (("--set", "batchh=3"), "did you mean 'batch'"),
        (("--set", "batch"), "--set takes key=value"),
        (("--set", "lr=fast"), "--set lr must be a positive number"),
        (("--set", "model.embeding=64"), "did you mean 'embedding'"),
        (("--set", "model.num_mels=32"), "--set takes no model.num_mels"),
        (("--set", "model.dropout=1"), "dropout must be in [0, 1)"),
        (("--seed", 2**70), "--seed must be an integer from 0 to 2^63"),
        (("--lr", "nan"), "--lr must be a positive number"),
        (("--schedule", "cosine"), "'cosine' is not one of 'step'"),
        (("--precision", "fp8"), "'fp8' is not one of 'auto'"),
        (("--source", "tape"), "'tape' is not one of 'packed'"),
        (("--model", "cnn_tran"), "did you mean 'cnn_trans'"),
        (("--proc", "A5"), "unknown procedure"),
        (("--proc", "A1"), "none exist for cnn_trans"),
        (("--stride", "8x8"), "--stride is for ast"),
        (("--freeze", "trunk.*"), "--freeze 'trunk.*' matches none of the model's"),
        (("--epoch", 3), "--epochs"),
    ],
)
def test_mistakes_are_one_line(
    tiny_sets: TinySets, tmp_path: Path, args: tuple[object, ...], message: str
) -> None:
    out = tmp_path / "run"
    done = fastat(*arguments(tiny_sets, out, *args), code=2)
    assert message in one_line(done)
    assert not out.exists()


def test_a_folder_that_is_no_set(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    done = fastat(*A4, "--data", tmp_path / "data", "--out", tmp_path / "run", code=2)
    assert str(tmp_path / "data") in one_line(done)
    assert not (tmp_path / "run").exists()


def test_a_run_is_not_overwritten(whole_run: Path, tiny_sets: TinySets) -> None:
    done = fastat(*arguments(tiny_sets, whole_run), code=2)
    assert "already holds a run" in one_line(done)


def test_a_run_folder_inside_a_file(tiny_sets: TinySets, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = fastat(*arguments(tiny_sets, tmp_path / "file" / "run"), code=2)
    assert f"{tmp_path / 'file'} is a file" in one_line(done)


def test_switches_reach_the_configuration(tiny_sets: TinySets, tmp_path: Path) -> None:
    off = ("--no-balance", "--no-mixup", "--no-specaug", "--no-normalize", "--steps", 1)
    tuned = ("--freeze", "talnet.*", "--freeze", "*norm1*", "--layer-decay", 0.9)
    other = ("--accumulate", 2, "--preset", "authors", "--schedule", "cyclic", *tuned)
    out = tmp_path / "run"
    done = fastat(*A4, "--data", tiny_sets.train, "--out", out, "--batch", 4, *off, *other)
    assert "training without scoring" in done.stderr
    config = json.loads((out / "config.json").read_text())
    got = {k: config[k] for k in ("balance", "mixup", "time_mask", "freq_mask", "normalize")}
    want = {"balance": False, "mixup": 0.0, "time_mask": 0, "freq_mask": 0, "normalize": False}
    assert got == want
    assert config["freeze"] == ["talnet.*", "*norm1*"]
    assert (config["layer_decay"], config["accumulate"]) == (0.9, 2)
    got = {k: config[k] for k in ("preset", "schedule", "beta1")}
    assert got == {"preset": "authors", "schedule": "cyclic", "beta1": 0.95}
    assert "mAP" not in metrics(out)[0]


def test_stride_is_asts(tiny_sets: TinySets, tmp_path: Path) -> None:
    out = tmp_path / "run"
    small = ("--set", "model.size=tiny224", "--set", "model.num_layers=1", "--batch", 4)
    run = ("--proc", "A4", "--model", "ast", "--data", tiny_sets.train, "--out", out, *small)
    fastat("train", *run, "--stride", "16x12", "--steps", 1)
    options = json.loads((out / "config.json").read_text())["model_options"]
    assert options == {"fstride": 16, "tstride": 12, "size": "tiny224", "num_layers": 1}
    assert load_model(out)[1].options == options


def test_a_run_starts_from_another_runs_weights(
    whole_run: Path, tiny_sets: TinySets, tmp_path: Path
) -> None:
    """Its size comes with them, also where the procedure would ask for ImageNet's."""
    out, old = tmp_path / "run", tmp_path / "old"
    shutil.copytree(whole_run, old, symlinks=True)
    run = ("train", "--proc", "A3", "--model", "cnn_trans", "--data", tiny_sets.train)
    still = ("--lr", 1e-12, "--freeze", "talnet.*", "--batch", 8, "--steps", 1)
    fastat(*run, "--out", out, "--init", old, *still)
    config = json.loads((out / "config.json").read_text())
    assert (config["init"], config["pretrained"]) == (str(old), False)
    ours, theirs = load_model(out)[0].state_dict(), load_model(old)[0].state_dict()
    assert ours.keys() == theirs.keys()
    for name, x in ours.items():
        torch.testing.assert_close(x, theirs[name], rtol=0, atol=1e-9, msg=name)
    shutil.rmtree(old)
    fastat("train", "--resume", "--out", out, "--set", "steps=2")
    assert metrics(out)[-1]["step"] == 2


# --------------------------------------------------------------------------- in this process
def trainer(sets: TinySets, run: Path, *, resume: bool = False, **overrides: Any) -> Trainer:
    """A tiny run of two epochs of four steps, not yet started."""
    given = {
        "data": str(sets.train),
        "eval": str(sets.eval),
        "epochs": 2,
        "batch": 8,
        "model_options": {"embedding": 64, "num_heads": 4},
    }
    config = resolve("A4", "cnn_trans", given | overrides, num_clips=36, clip_seconds=1.0)
    return Trainer(config, run, StatusDisplay(), resume=resume)


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: x.clone() for name, x in model.state_dict().items()}


def test_frozen_parameters_stay_and_resuming_knows_them(
    tiny_sets: TinySets, tmp_path: Path
) -> None:
    """With layers at rates of their own and batches in parts, stopped in mid-epoch."""
    more: dict[str, Any] = {
        "freeze": ["talnet.*", "*norm1*"],
        "layer_decay": 0.5,
        "accumulate": 2,
        "lr": 1e-2,
    }
    whole = trainer(tiny_sets, tmp_path / "whole", **more)
    before = weights_of(whole.raw_model)
    whole.run_epochs()
    for name, x in weights_of(whole.raw_model).items():
        kept = name.startswith("talnet.") or "norm1" in name  # BatchNorm's statistics too
        assert torch.equal(x, before[name]) == kept, name

    run = tmp_path / "run"
    trainer(tiny_sets, run, steps=6, **more).run_epochs()
    trainer(tiny_sets, run, resume=True, **more).run_epochs()
    assert_same_run(run, tmp_path / "whole")


def test_the_log_says_what_is_trained(
    tiny_sets: TinySets, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    trainer(tiny_sets, tmp_path / "run", freeze=["talnet.*"])
    assert "parameters are trained, the others frozen" in caplog.text


@pytest.mark.parametrize("patterns", [["nothing.*"], ["*"]])
def test_what_cannot_be_frozen_leaves_no_run_folder(
    tiny_sets: TinySets, tmp_path: Path, patterns: list[str]
) -> None:
    with pytest.raises(UserError, match="--freeze"):
        trainer(tiny_sets, tmp_path / "run", freeze=patterns)
    assert not (tmp_path / "run").exists()


def test_layer_decay_scales_every_steps_rate(tiny_sets: TinySets, tmp_path: Path) -> None:
    """Warm-up and halvings act on every group alike; the rate on record is the head's."""
    run = trainer(tiny_sets, tmp_path / "run", layer_decay=0.5, epochs=3)
    run.run_epochs()
    lines = metrics(tmp_path / "run")
    for line in lines:
        factor = lr_factor(
            line["step"] - 1, schedule="step", warmup_steps=1, steps_per_epoch=4, epochs=3
        )
        assert line["lr"] == pytest.approx(4e-4 * factor)
    rates = [group["lr"] / lines[-1]["lr"] for group in run.optimizer.param_groups]
    assert sorted(rates) == [0.25, 0.5, 1.0]


def test_a_batch_is_computed_in_the_parts_asked_for(tiny_sets: TinySets, tmp_path: Path) -> None:
    run = trainer(tiny_sets, tmp_path / "run", accumulate=4, steps=2, eval=None)
    sizes = []
    run.raw_model.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    run.run_epochs()
    assert sizes == [2] * 8
    assert metrics(tmp_path / "run")[-1]["step"] == 2


@pytest.mark.parametrize("pretrained", [False, True])
def test_weights_to_start_from_are_loaded_once(
    tiny_sets: TinySets,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    pretrained: bool,
) -> None:
    caplog.set_level("INFO")
    loaded = []
    stub = types.ModuleType("fastat.weights.initial")

    def load_initial(model: nn.Module, meta: ModelMeta, path: Path) -> list[str]:
        loaded.append((meta.model, path))
        with torch.no_grad():
            for p in model.parameters():
                p.fill_(0.01)
        return ["head made anew"]

    stub.load_initial = load_initial  # type: ignore[attr-defined]
    stub.load_imagenet = lambda model, meta: load_initial(model, meta, Path("imagenet"))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fastat.weights.initial", stub)
    more: dict[str, Any] = {"pretrained": True} if pretrained else {"init": str(tmp_path / "old")}
    run = trainer(tiny_sets, tmp_path / "run", steps=1, **more)
    assert loaded == [("cnn_trans", Path("imagenet") if pretrained else tmp_path / "old")]
    assert "head made anew" in caplog.text
    assert all((p == 0.01).all() for p in run.raw_model.parameters())
    run.run_epochs()

    # its source need not exist any more
    monkeypatch.setitem(sys.modules, "fastat.weights.initial", None)
    again = trainer(tiny_sets, tmp_path / "run", resume=True, **more)
    assert again.progress.step == 1
    assert weights_of(again.raw_model).keys() == weights_of(run.raw_model).keys()
    for name, x in weights_of(again.raw_model).items():
        assert torch.equal(x, run.raw_model.state_dict()[name]), name


def test_no_weights_are_asked_for_without_need(
    tiny_sets: TinySets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "fastat.weights.initial", None)
    trainer(tiny_sets, tmp_path / "run")


def test_the_authors_statistics_reach_the_model(tiny_sets: TinySets, tmp_path: Path) -> None:
    meta = trainer(tiny_sets, tmp_path / "run", preset="authors").meta
    feature = FEATURES["logmel64"]
    assert (meta.mean, meta.std) == (feature.mean, feature.std)
    assert meta.options["input_scale"] == 8


def test_a_step_that_is_not_finite_names_its_clips_and_partners(
    tiny_sets: TinySets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trainer(tiny_sets, tmp_path / "run", mixup=1.0)
    taken = []

    def bad_at_6(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
        loss, norm, flag = train_step(*args)
        taken.append(flag)
        return loss, norm, flag + (len(taken) == 6)

    monkeypatch.setattr(stepping, "train_step", bad_at_6)
    with pytest.raises(Failure, match="not finite at step 6;") as error:
        run.run_epochs()
    plan = run.sampler.plan(1, 1)
    clips = ", ".join(run.data.train_set.names(plan.rows))
    partners = ", ".join(run.data.train_set.names(plan.partners))
    assert len(plan.partners) == 8
    assert str(error.value).endswith(f"Its clips: {clips}; mixed in: {partners}")


def test_full_memory_is_one_line(
    tiny_sets: TinySets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = trainer(tiny_sets, tmp_path / "made").config
    monkeypatch.setattr(stepping, "train_step", lambda *_: torch.empty(1 << 55))
    with pytest.raises(Failure, match="memory is full: a smaller --batch"):
        training.train(config, tmp_path / "run", resume=False)

    def broken(*_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(stepping, "train_step", broken)
    with pytest.raises(RuntimeError, match="^a bug$"):
        training.train(config, tmp_path / "other", resume=False)
