"""The command line: help, procedures, evaluation, and mistakes in one line each."""

import csv
import json
import logging
import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score
from torch import Tensor, nn
from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

from fastat.cli.app import COMMANDS, main
from fastat.config.procedures import PROCEDURES
from fastat.data.shards import ClassInfo, PackedSet
from fastat.evaluation.predictions import read_predictions
from fastat.packing.pack import pack
from fastat.study.report.curves import class_curves
from fastat.system.display import show_messages
from fastat.training.checkpoints import write_checkpoint
from fastat.weights.checkpoint import ModelMeta, load_model
from tests.conftest import QUIET, TinySets, fastat, one_line, write_tiny_audio


@pytest.fixture(scope="module")
def checkpoint(tiny_sets: TinySets, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained model of the tiny set's classes."""
    packed = PackedSet.open(tiny_sets.train)
    stats = packed.stats["logmel64"]
    return save(tmp_path_factory.mktemp("model"), packed.classes, stats.mean, stats.std)


def save(folder: Path, classes: tuple[ClassInfo, ...], mean: float, std: float) -> Path:
    meta = ModelMeta(
        model="cnn_trans",
        feature="logmel64",
        clip_seconds=1.0,
        num_mels=64,
        num_frames=40,
        mean=mean,
        std=std,
        classes=classes,
        options={"embedding": 64, "num_heads": 4},
    )
    write_checkpoint(folder / "checkpoints", 1, meta.create().state_dict(), meta, {}, best=False)
    return folder


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["fastat", command, "--help"])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 0
    text = capsys.readouterr().out
    assert "Usage:" in text
    assert f"fastat {command}" in text.split("Usage:")[1].split("\n", 1)[1]


def test_no_command_shows_them_all() -> None:
    text = fastat().stdout
    assert all(command in text for command in COMMANDS)


def test_procs() -> None:
    assert json.loads(fastat("procs", "--json").stdout) == {
        name: asdict(p) for name, p in PROCEDURES.items()
    }
    table = fastat("procs").stdout
    assert all(name in table for name in PROCEDURES) and "448" in table


def test_eval_scores_what_it_writes(checkpoint: Path, tiny_sets: TinySets, tmp_path: Path) -> None:
    scores, table = tmp_path / "p.h5", tmp_path / "ap.csv"
    out = ("--json", "--predictions", scores, "--per-class", table)
    result = json.loads(fastat("eval", checkpoint, "--data", tiny_sets.eval, *out).stdout)
    with h5py.File(scores) as file:
        logit, target = file["logit"][:], file["target"][:]
        assert file["probability"][:] == pytest.approx(1 / (1 + np.exp(-logit)), abs=1e-6)
        names = file["audio_name"].asstr()[:].tolist()
        ids = file["class_id"].asstr()[:].tolist()
    packed = PackedSet.open(tiny_sets.eval)
    assert names == packed.names(np.arange(15)) and ids == [c.id for c in packed.classes]
    assert np.array_equal(target, packed.targets(np.arange(15)) > 0)
    want = [average_precision_score(target[:, k], logit[:, k]) for k in range(3)]
    assert result["mAP"] == pytest.approx(np.mean(want), abs=1e-6)
    assert result["clips"] == 15 and result["classes_scored"] == 3
    with table.open() as file:
        rows = list(csv.DictReader(file))
    assert [float(r["average_precision"]) for r in rows] == pytest.approx(want, abs=1e-5)


class Certain(nn.Module):
    """Logits of 40 and up, whose probabilities are all 1 in float32."""

    def forward(self, x: Tensor) -> Tensor:
        loud = x.mean((1, 2))
        return 45.0 + torch.stack([loud, -loud, x.std((1, 2))], 1)


def test_eval_ranks_clips_by_their_logits(
    tiny_sets: TinySets,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _, meta = load_model(checkpoint)
    monkeypatch.setattr(
        "fastat.evaluation.evaluate.load_model", lambda run, device: (Certain(), meta)
    )
    scores = tmp_path / "p.h5"
    argv = ["fastat", "eval", "any", "--data", tiny_sets.eval, "--json", "--predictions", scores]
    monkeypatch.setattr("sys.argv", [str(x) for x in argv])
    with pytest.raises(SystemExit):
        main()
    result = json.loads(capsys.readouterr().out)
    with h5py.File(scores) as file:
        logit, target = file["logit"][:], file["target"][:]
        assert (file["probability"][:] == 1).all()
    assert logit.dtype == np.float32 and len(np.unique(logit)) > 15
    want = np.mean([average_precision_score(target[:, k], logit[:, k]) for k in range(3)])
    assert want > 0.4, "equal scores would get the share of positives, 1/3"
    assert result["mAP"] == pytest.approx(want, abs=1e-6)
    curves = class_curves(read_predictions(scores))
    assert curves.average_precision.mean() == pytest.approx(want, abs=1e-6)


def test_eval_matches_classes_by_id(tiny_sets: TinySets, tmp_path: Path) -> None:
    """Another order, one unknown to the set: columns follow the ids, and it says so."""
    classes = tuple(ClassInfo(i, i) for i in ("hiss", "whistle", "buzz"))
    run = save(tmp_path / "run", classes, -30.0, 20.0)
    scores = tmp_path / "p.h5"
    done = fastat("eval", run, "--data", tiny_sets.eval, "--predictions", scores, "--json")
    assert "2 classes are shared" in done.stderr
    assert json.loads(done.stdout)["classes_scored"] == 2
    packed = PackedSet.open(tiny_sets.eval)
    column = {c.id: k for k, c in enumerate(packed.classes)}
    with h5py.File(scores) as file:
        assert file["class_id"].asstr()[:].tolist() == ["hiss", "buzz"]
        want = packed.targets(np.arange(15))[:, [column["hiss"], column["buzz"]]] > 0
        assert np.array_equal(file["target"][:], want)


def test_classes_without_a_positive_are_left_out_and_counted(
    checkpoint: Path, tiny_sets: TinySets, tmp_path: Path
) -> None:
    audio = write_tiny_audio(tmp_path / "audio", 4, seed=2)
    for path in (audio / "hiss").iterdir():
        path.unlink()
    (audio / "hiss").rmdir()
    pack(audio, tmp_path / "set", clip_seconds=1.0, workers=1, classes_from=tiny_sets.train)
    done = fastat("eval", checkpoint, "--data", tmp_path / "set", "--json")
    result = json.loads(done.stdout)
    assert (result["classes_scored"], result["classes_without_positive"]) == (2, 1)


def test_a_checkpoint_of_other_classes(tiny_sets: TinySets, tmp_path: Path) -> None:
    run = save(tmp_path / "run", (ClassInfo("x", "X"), ClassInfo("y", "Y")), -30.0, 20.0)
    done = fastat("eval", run, "--data", tiny_sets.eval, code=2)
    assert "share no class" in one_line(done)


def test_no_clip_of_a_known_class(checkpoint: Path, tiny_sets: TinySets, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (write_tiny_audio(tmp_path, 3, seed=2) / "hiss").rename(tmp_path / "folder" / "other")
    names = "".join(f"{i},{c},{c}\n" for i, c in enumerate(("other", "buzz", "click", "hiss")))
    (tmp_path / "classes.csv").write_text("index,mid,display_name\n" + names)
    labels = tmp_path / "classes.csv"
    pack(tmp_path / "folder", tmp_path / "set", clip_seconds=1.0, workers=1, labels=labels)
    done = fastat("eval", checkpoint, "--data", tmp_path / "set", code=2)
    assert "has no clip of a class that the model knows" in one_line(done)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--batch", 0), "--batch must be at least 1"),
        (
            ("--precision", "fp8"),
            "'--precision': 'fp8' is not one of 'auto', 'bf16', 'fp16', 'fp32'",
        ),
        (("--predictions", "."), "--predictions takes a file"),
        (("--per-class", "nowhere/x.csv"), "--per-class nowhere/x.csv: there is no folder"),
    ],
)
def test_mistakes_of_eval_are_found_before_the_work(
    checkpoint: Path, tiny_sets: TinySets, args: tuple[object, ...], message: str
) -> None:
    assert message in one_line(fastat("eval", checkpoint, "--data", tiny_sets.eval, *args, code=2))


def test_clips_of_another_length(checkpoint: Path, tmp_path: Path) -> None:
    audio = write_tiny_audio(tmp_path / "audio", 3, seed=2)
    pack(audio, tmp_path / "set", clip_seconds=2.0, workers=1)
    done = fastat("eval", checkpoint, "--data", tmp_path / "set", code=2)
    assert "16000 samples" in one_line(done) and "32000" in one_line(done)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("trian",), "train"),
        (("train", "--epoch", 3), "--epochs"),
        (("train", "--epochs", "three"), "--epochs must be an integer from 1 on, got 'three'"),
        (("pack", "x", "--workers", "two"), "--workers': Input should be a valid integer"),
        (("pack", "x", "--workers", "two"), "got 'two'"),
        (("train", "--preset", "theirs"), "'theirs' is not one of 'paper', 'authors'"),
        (("train",), "--proc"),
        (("train", "--resume"), "--resume needs --out"),
        (("train", "--proc", "A4", "--model", "cnn_trans", "--eval", "x"), "--eval without --data"),
        (("eval", "nowhere", "--data", "x"), "nowhere does not exist"),
        (("predict", "nowhere", __file__), "nowhere does not exist"),
        (("pack", "nowhere.csv", "--out", "x"), "nowhere.csv"),
        (("extract", "x.wav", "--feature", "mfcc", "--out", "y"), "logmel64"),
    ],
)
def test_mistakes_are_one_line(
    args: tuple[object, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in one_line(fastat(*args, code=2))
    assert not list(tmp_path.iterdir())


OPTIONS: dict[str, dict[str, Any]] = {
    "--epochs 3": {"epochs": 3},
    "--batch 8": {"batch": 8},
    "--batch auto": {"batch": "auto"},
    "--lr 1e-3": {"lr": 1e-3},
    "--steps 7": {"steps": 7},
    "--stride 8x10": {"model_options": {"fstride": 8, "tstride": 10}},
    "--source dali": {"source": "dali"},
    "--preset authors": {"preset": "authors"},
    "--schedule step2": {"schedule": "step2"},
    "--precision bf16": {"precision": "bf16"},
    "--no-balance": {"balance": False},
    "--no-mixup": {"mixup": 0.0},
    "--no-specaug": {"time_mask": 0, "freq_mask": 0},
    "--no-normalize": {"normalize": False},
    "--pretrained": {"pretrained": True},
    "--no-pretrained": {"pretrained": False},
    "--init runs/a": {"init": Path("runs/a")},
    "--freeze a.* --freeze b": {"freeze": ["a.*", "b"]},
    "--layer-decay 1": {"layer_decay": 1.0},
    "--accumulate 2": {"accumulate": 2},
    "--compile": {"compile": True},
    "--no-compile": {"compile": False},
    "--cache host": {"cache": "host"},
    "--gpus 1": {},
    "--on-nan skip": {"on_nan": "skip"},
    "--max-bad 0": {"max_bad": 0.0},
    "--lr .001 --epochs +3": {"lr": 0.001, "epochs": 3},
    "--seed 5": {"seed": 5},
    "--set beta1=0.5 --set seed=6 --seed 5": {"beta1": 0.5, "seed": 6},
    "--data a --eval b": {"data": Path("a"), "eval": Path("b")},
}


@pytest.mark.parametrize("options", OPTIONS)
def test_every_option_of_train_sets_its_field(
    options: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def run_training(*arguments: Any, resume: bool) -> int:
        asked.append((*arguments, resume))
        return 0

    monkeypatch.setattr("fastat.training.launch.run_training", run_training)
    argv = ["fastat", "train", "--proc", "A4", "--model", "ast", "--out", "runs/x", "--resume"]
    monkeypatch.setattr("sys.argv", [*argv, *options.split()])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 0
    want = {"precision": "auto"} | OPTIONS[options]
    assert asked == [("A4", "ast", want, Path("runs/x"), True)]
    (given,) = asked
    assert [type(given[2][name]) for name in want] == [type(value) for value in want.values()]


def test_warnings_have_the_programs_name_and_notes_have_not(
    capsys: pytest.CaptureFixture[str],
) -> None:
    log = logging.getLogger("fastat.some.module")
    show_messages()
    log.info("saved in\nruns/a")
    log.warning("fp16 is slow\x1b[2J")
    log.debug("not shown")
    assert capsys.readouterr().err == "saved in runs/a\nfastat: fp16 is slow\\x1b[2J\n"
    show_messages(shown=False)
    log.warning("of another rank")
    assert capsys.readouterr().err == ""
    show_messages()


# ------------------------------------------------------------------------------ odd surroundings
def in_shell(script: str, *args: object, **env: str) -> subprocess.CompletedProcess[str]:
    """``script``, in which "$@" is the command ``fastat ARGS``."""
    command = ["sh", "-c", script, "sh", sys.executable, "-m", "fastat.cli", *map(str, args)]
    root = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}  # also from another folder
    return subprocess.run(
        command, capture_output=True, text=True, env=os.environ | QUIET | root | env, timeout=300
    )


def test_closed_standard_streams(checkpoint: Path, tiny_sets: TinySets, tmp_path: Path) -> None:
    clip = next(tiny_sets.audio.rglob("*.wav"))
    done = in_shell('exec "$@" >&- <&-', "predict", checkpoint, clip)
    assert (done.returncode, done.stderr) == (0, "")
    out = ("--out", tmp_path / "set", "--workers", 1, "--clip-seconds", 1)
    done = in_shell('exec "$@" >&- 2>&- <&-', "pack", tiny_sets.audio, *out)
    assert done.returncode == 0
    assert PackedSet.open(tmp_path / "set").num_clips == 36


def test_file_names_that_are_no_text(tiny_sets: TinySets, tmp_path: Path) -> None:
    clip = tmp_path / os.fsdecode(b"caf\xe9 \xff.wav")
    shutil.copy(next(tiny_sets.audio.rglob("*.wav")), clip)
    for encoding in ("utf-8:strict", "ascii:strict"):
        out = tmp_path / os.fsdecode(b"\xff") / encoding
        args = (clip, "--feature", "logmel64", "--out", out)
        done = in_shell('"$@" > "$OUT"', "extract", *args, OUT=str(tmp_path / encoding),
                        PYTHONIOENCODING=encoding)  # fmt: skip
        assert (done.returncode, done.stderr) == (0, "")
        assert len(list(out.glob("*.npy"))) == 1
    assert os.fsencode(tmp_path) + b"/\xff" in (tmp_path / "utf-8:strict").read_bytes()


def test_the_current_folder_was_deleted(tmp_path: Path) -> None:
    done = in_shell(f'mkdir {tmp_path}/gone && cd {tmp_path}/gone && rmdir "$PWD" && "$@"', "procs")
    assert done.returncode == 2
    assert "deleted" in one_line(done)


@pytest.mark.parametrize(
    ("name", "value"),
    [("RANK", "x"), ("RANK", "2"), ("WORLD_SIZE", "0"), ("MASTER_PORT", "-1")],
)
def test_variables_of_torchrun_that_mean_nothing(name: str, value: str) -> None:
    good = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    done = in_shell('"$@"', "train", "--proc", "A4", "--model", "ast", **good | {name: value})
    assert done.returncode == 2
    assert name in done.stderr and value in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (CppCompileError(["g++", "x.cpp"], "x.h:1: fatal error: Python.h: none"), "Python.h"),
        (InvalidCxxCompiler(), "--no-compile"),
        (torch.OutOfMemoryError("CUDA out of memory"), "memory"),
    ],
)
def test_torchs_failures_are_one_line(
    error: RuntimeError,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fails(*args: object) -> None:
        raise error

    monkeypatch.setattr("fastat.evaluation.evaluate.load_model", fails)
    monkeypatch.setattr("sys.argv", ["fastat", "eval", str(tmp_path), "--data", str(tmp_path)])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 1
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1
