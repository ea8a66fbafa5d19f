"""--precision: what auto comes to in a run and in the commands, and what a resumed run keeps."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from fastat.cli.app import main
from fastat.config.run import TrainConfig
from fastat.data.shards import PackedSet
from fastat.evaluation.evaluate import evaluate_checkpoint
from fastat.evaluation.predict import Tagger
from fastat.evaluation.predictions import read_predictions
from fastat.system import device as devices
from fastat.system.device import PrecisionChoice, auto_precision
from fastat.system.errors import UserError
from fastat.training.introduction import log_device_choices
from fastat.training.launch import configure
from fastat.weights.checkpoint import ModelMeta, save_weights
from tests.conftest import TinySets

CPU = torch.device("cpu")


@pytest.fixture
def fp32_suits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that multiplies float32 best, whatever the one at hand does."""
    choice = PrecisionChoice("fp32", "this CPU is old")
    monkeypatch.setattr(devices, "auto_precision", lambda device: choice)


@pytest.fixture(scope="module")
def checkpoint(tiny_sets: TinySets, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained model of the tiny set's classes."""
    torch.manual_seed(0)
    packed = PackedSet.open(tiny_sets.train)
    stats = packed.stats["logmel64"]
    meta = ModelMeta(
        model="cnn_trans", feature="logmel64", clip_seconds=1.0, num_mels=64, num_frames=40,
        mean=stats.mean, std=stats.std, classes=packed.classes,
        options={"embedding": 64, "num_heads": 4},
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("model") / "checkpoint"
    save_weights(folder, meta.create().state_dict(), meta)
    return folder


def configured(sets: TinySets, out: Path, **overrides: str) -> TrainConfig:
    return configure("A4", "crnn", {"data": sets.train} | overrides, out, resume=False)


@pytest.mark.usefixtures("fp32_suits")
@pytest.mark.parametrize("overrides", [{}, {"precision": "auto"}])
def test_a_run_takes_what_suits_the_device(
    tiny_sets: TinySets,
    tmp_path: Path,
    overrides: dict[str, str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level("INFO", "fastat"):
        config = configured(tiny_sets, tmp_path / "run", **overrides)
    assert config.precision == "fp32"
    assert any("fp32" in line and "this CPU is old" in line for line in caplog.messages)


@pytest.mark.usefixtures("fp32_suits")
def test_a_run_takes_what_is_asked_for(
    tiny_sets: TinySets, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "fastat"):
        config = configured(tiny_sets, tmp_path / "run", precision="bf16")
    assert config.precision == "bf16" and "this CPU" not in caplog.text
    caplog.clear()
    log_device_choices(config, CPU)
    (warning,) = caplog.messages
    assert "bf16" in warning and "fp32" in warning


@pytest.mark.usefixtures("fp32_suits")
def test_a_resumed_run_keeps_its_precision(tiny_sets: TinySets, tmp_path: Path) -> None:
    config = configured(tiny_sets, tmp_path, precision="bf16")
    config.save(tmp_path / "config.json")
    for given in ({}, {"precision": "auto"}, {"precision": "bf16"}):
        again = configure(None, None, given, tmp_path, resume=True)
        assert again.precision == "bf16"
    with pytest.raises(UserError, match="precision may not change"):
        configure(None, None, {"precision": "fp32"}, tmp_path, resume=True)


def test_eval_in_each_precision(checkpoint: Path, tiny_sets: TinySets, tmp_path: Path) -> None:
    logits = {}
    for precision in ("auto", "fp32", "bf16"):
        file = tmp_path / f"{precision}.h5"
        document = evaluate_checkpoint(
            checkpoint, tiny_sets.eval, batch=8, precision=precision, predictions=file,
            per_class=None,
        )  # fmt: skip
        suited = auto_precision(CPU).precision
        assert document["precision"] == (suited if precision == "auto" else precision)
        logits[precision] = read_predictions(file).logit
    assert np.abs(logits["fp32"] - logits["bf16"]).max() > 0
    assert np.array_equal(logits["auto"], logits[auto_precision(CPU).precision])
    assert np.allclose(logits["fp32"], logits["bf16"], atol=0.1)


def test_predict_and_embed_in_each_precision(checkpoint: Path) -> None:
    wave = np.random.default_rng(0).integers(-9000, 9000, 40_000).astype(np.int16)
    for method in ("tag", "embed"):
        found = {}
        for precision in ("auto", "fp32", "bf16"):
            result = getattr(Tagger(checkpoint, precision), method)(Path("a.wav"), wave)
            found[precision] = result.logits if method == "tag" else result
            assert found[precision].dtype == np.float32
        assert np.abs(found["fp32"] - found["bf16"]).max() > 0
        assert np.array_equal(found["auto"], found[auto_precision(CPU).precision])


@pytest.mark.parametrize(
    "command",
    [
        "train --proc A4 --model crnn",
        "eval RUN --data SET",
        "predict RUN a.wav",
        "extract a.wav --embedding RUN --out OUT",
        "profile --proc A4 --model crnn",
        "landscape RUN --data SET",
    ],
)
def test_an_unknown_precision_is_refused(
    command: str,
    checkpoint: Path,
    tiny_sets: TinySets,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    sound = next(tiny_sets.audio.rglob("*.wav"))
    names = {"RUN": checkpoint, "SET": tiny_sets.eval, "OUT": tmp_path / "out", "a.wav": sound}
    words = [str(names.get(word, word)) for word in command.split()]
    monkeypatch.setattr("sys.argv", ["fastat", *words, "--precision", "fp8"])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 2
    message = capsys.readouterr().err
    assert "'fp8' is not one of 'auto', 'bf16', 'fp16', 'fp32'" in message


def test_features_have_one_precision(
    tiny_sets: TinySets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sound = next(tiny_sets.audio.rglob("*.wav"))
    words = ["fastat", "extract", sound, "--feature", "logmel64", "--out", tmp_path]
    monkeypatch.setattr("sys.argv", [*map(str, words), "--precision", "bf16"])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 2


# ------------------------------------------------------------------------------ fastat doctor
def test_doctor_says_what_a_run_would_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FASTAT_CACHE", str(tmp_path / "cache"))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    choice = auto_precision(device)

    def doctor(*options: str) -> str:
        monkeypatch.setattr("sys.argv", ["fastat", "doctor", *options])
        with pytest.raises(SystemExit) as left:
            main()
        assert left.value.code == 0
        return capsys.readouterr().out

    found = json.loads(doctor("--json"))
    assert found["auto_precision"] == choice._asdict()
    assert found["versions"]["torch"] and found["free_memory_gib"] > 0
    assert found["cache"]["folder"] == str(tmp_path / "cache") and found["cache"]["locks"]
    assert found["variables"]["FASTAT_CACHE"] == str(tmp_path / "cache")
    assert not (tmp_path / "cache").exists(), "doctor leaves nothing behind"
    text = doctor()
    assert len(text.splitlines()) <= 40
    for part in (choice.reason, found["optimizer"], found["versions"]["h5py"]):
        assert part in text


def test_the_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["fastat", "--version"])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 0
    name, version = capsys.readouterr().out.split()
    assert name == "fastat" and version[0].isdigit()


def test_doctor_reports_a_cache_that_cannot_be_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is asked when something is wrong, so nothing that is wrong may stop it."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("FASTAT_CACHE", str(tmp_path / "file"))
    monkeypatch.setenv("PATH", str(tmp_path))  # no compilers
    for options in ([], ["--json"]):
        monkeypatch.setattr("sys.argv", ["fastat", "doctor", *options])
        with pytest.raises(SystemExit) as left:
            main()
        assert left.value.code == 0
    *lines, document = capsys.readouterr().out.splitlines()
    assert any(line.startswith("cache") and "FASTAT_CACHE" in line for line in lines)
    found = json.loads(document)
    assert found["cache"]["problem"] and found["c_compiler"] is None
