"""From the options of ``fastat train`` to a configuration, and what is refused before any work."""

import json
import os
import pwd
import sys
import tempfile
import types
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import fastat.training.launch
from fastat.config.run import TrainConfig
from fastat.data import practice as demo
from fastat.data import shards
from fastat.system.errors import Failure, UserError
from fastat.system.files import new_folder
from fastat.training.launch import (
    cache_folder,
    configure,
    practice_sets,
    run_folder_of,
    run_training,
)
from tests.conftest import TINY_MODEL, TinySets
from tests.conftest import fastat as command


@pytest.fixture(autouse=True)
def no_practice_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """Making it is the work that a mistake must not wait for."""
    monkeypatch.setattr(
        fastat.training.launch, "practice_sets", lambda: pytest.fail("set was made")
    )


@pytest.fixture
def weights(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Path, str]]:
    """A stand-in for fastat.weights.initial; what its initial_options was asked."""
    asked = []
    stub = types.ModuleType("fastat.weights.initial")

    def initial_options(path: Path, model: str) -> dict[str, Any]:
        asked.append((path, model))
        return {"embedding": 128, "num_heads": 3}

    stub.initial_options = initial_options  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fastat.weights.initial", stub)
    return asked


def configured(
    sets: TinySets, proc: str = "A4", model: str = "cnn_trans", **overrides: Any
) -> TrainConfig:
    given = {"data": sets.train} | overrides
    return configure(proc, model, given, Path("run"), resume=False)


@pytest.mark.parametrize(
    ("proc", "model", "overrides", "message"),
    [
        ("A5", "ast", {}, "unknown procedure 'A5'"),
        ("A4", "cnntrans", {}, "did you mean 'cnn_trans'"),
        ("A4", "ast", {"preset": "author"}, "preset must be one of"),
        ("A4", "ast", {"accumulate": 0}, "accumulate must be an integer from 1 on"),
        ("A4", "ast", {"accumulate": 3, "batch": 8}, "batch must be a multiple of accumulate"),
        ("A4", "ast", {"cache": "host", "source": "dali"}, "takes source packed, got dali"),
        ("A4", "crnn", {"layer_decay": 0.5}, "layer_decay is for models of Transformer layers"),
        ("A4", "ast", {"pretrained": True, "init": "x"}, "exclude each other"),
        ("A1", "cnn_trans", {}, "A1 starts from ImageNet weights, and none exist for cnn_trans"),
        ("A3", "crnn", {}, "dash in the paper's Table 2.*--no-pretrained, or --init"),
        ("A2", "conformer", {"pretrained": True}, "--pretrained starts from ImageNet weights, and"),
    ],
)
def test_mistakes_wait_for_no_data(
    proc: str, model: str, overrides: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        configure(proc, model, overrides, None, resume=False)


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("ast", {"fstride": 100, "tstride": 100}, "fstride must be in 1..16, got 100"),
        ("crnn", {"pooling": "median"}, "pooling must be one of"),
        (
            "crnn",
            {"activation_checkpointing": "no"},
            "activation_checkpointing must be true or false",
        ),
    ],
)
def test_a_model_that_cannot_be_is_told_before_the_practice_set_is_made(
    model: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        configure("A4", model, {"model_options": options}, None, resume=False)


def test_a_file_where_the_run_is_to_be(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("mine")
    for out in (tmp_path / "notes", tmp_path / "notes" / "baseline"):
        with pytest.raises(UserError, match=f"takes a folder for the run, and {tmp_path}/notes is"):
            configure("A4", "crnn", {}, out, resume=False)


def test_the_practice_set_of_a_moved_cache_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it lay is in what pack knows its command by."""
    small = tuple(replace(split, num_clips=20, rarest=1) for split in demo.SPLITS)
    monkeypatch.setattr(demo, "SPLITS", small)
    monkeypatch.setenv("FASTAT_CACHE", str(tmp_path / "before"))
    practice_sets()
    (tmp_path / "before").rename(tmp_path / "after")
    monkeypatch.setenv("FASTAT_CACHE", str(tmp_path / "after"))
    train, evaluation = practice_sets()
    assert train.is_relative_to(tmp_path / "after")
    assert [shards.sizes_of(path)[0] for path in (train, evaluation)] == [20, 20]
    assert not (tmp_path / "before").exists()


def test_a_link_to_start_from_stays_a_link(
    tiny_sets: TinySets, weights: list[tuple[Path, str]], tmp_path: Path
) -> None:
    (tmp_path / "step-1").mkdir()
    (tmp_path / "best").symlink_to("step-1")
    assert configured(tiny_sets, init=tmp_path / "best").init == str(tmp_path / "best")


def test_every_way_out_of_missing_imagenet_weights(
    tiny_sets: TinySets, weights: list[tuple[Path, str]]
) -> None:
    assert not configured(tiny_sets, "A1", pretrained=False).pretrained
    assert not configured(tiny_sets, "A1", init="weights").pretrained
    assert configured(tiny_sets, "A1", "ast").pretrained
    assert configured(tiny_sets, "A4", "resnet34", pretrained=True).pretrained


def test_what_the_weights_need_is_asked_of_them(
    tiny_sets: TinySets, weights: list[tuple[Path, str]]
) -> None:
    mine = {"num_heads": 4}
    config = configured(tiny_sets, init="some/run", model_options=mine)
    assert weights == [(Path("some/run").absolute(), "cnn_trans")]
    assert config.model_options == {"dropout": 0.75, "embedding": 128, "num_heads": 4}
    configured(tiny_sets)
    assert len(weights) == 1


def test_paths_are_kept_absolute(
    tiny_sets: TinySets,
    weights: list[tuple[Path, str]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Whether they come from an option (a path) or from --set (text)."""
    monkeypatch.chdir(tiny_sets.train.parent)
    given = {"data": "train", "eval": Path("eval"), "init": "run"}
    config = configure("A4", "cnn_trans", given, Path("run"), resume=False)
    root = tiny_sets.train.parent.resolve()
    got = (config.data, config.eval, config.init)
    assert got == (str(root / "train"), str(root / "eval"), str(root / "run"))
    config.save(tmp_path / "config.json")
    assert configure(None, None, given, tmp_path, resume=True) == config


def test_accumulation_must_divide_the_batch_that_the_set_gets(
    tiny_sets: TinySets, monkeypatch: pytest.MonkeyPatch
) -> None:
    """3,200 clips give a batch of 16, which 8 divides; it does not divide A1's 20."""
    config = configured(tiny_sets, accumulate=4)
    assert (config.batch, config.accumulate) == (4, 4)
    with pytest.raises(UserError, match="got batch 4, accumulate 8"):
        configured(tiny_sets, accumulate=8)
    monkeypatch.setattr(shards, "sizes_of", lambda path: (3200, 16_000))
    config = configured(tiny_sets, "A1", "resnet50", accumulate=8)
    assert (config.batch, config.accumulate) == (16, 8)


def test_a_damaged_set_is_one_line(tiny_sets: TinySets, tmp_path: Path) -> None:
    """Its index alone says so: the shards are not opened."""
    index = json.loads((tiny_sets.train / "dataset.json").read_text())
    (tmp_path / "dataset.json").write_text(json.dumps(index | {"clips": index["clips"] + 1}))
    with pytest.raises(Failure, match="dataset.json: damaged: its checksum differs"):
        configure("A4", "cnn_trans", {"data": tmp_path}, Path("run"), resume=False)


def test_what_was_chosen_is_logged_once_for_the_set_at_hand(
    tiny_sets: TinySets, caplog: pytest.LogCaptureFixture
) -> None:
    """And nothing where the configuration is not final, or stays that of the run."""
    with caplog.at_level("INFO", "fastat"):
        configured(tiny_sets, precision="auto")
    assert sum("a small set (36 clips)" in line for line in caplog.messages) == 1
    assert sum(line.startswith("precision ") for line in caplog.messages) == 1
    assert len(caplog.messages) == len(set(caplog.messages))


def test_a_rank_of_no_distributed_run_is_not_silent(
    tiny_sets: TinySets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batch systems set RANK for other uses."""
    monkeypatch.setenv("RANK", "3")
    args = ("train", "--proc", "A4", "--model", "cnn_trans", *TINY_MODEL, "--data", tiny_sets.train)
    done = command(*args, "--out", tmp_path / "run", "--steps", 1)
    assert "tag a sound with" in done.stderr


# ------------------------------------------------------------------------------ run folders
def test_default_folders_are_always_new(
    tiny_sets: TinySets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also for two trainings that start in the same second."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.strftime", lambda *_: "20261128-120000")
    folders = [run_folder_of(configured(tiny_sets), None) for _ in range(3)]
    assert len(set(folders)) == 3 and all(folder.is_dir() for folder in folders)
    assert {folder.parent for folder in folders} == {Path("runs")}


def test_no_two_processes_get_one_folder(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(new_folder, [tmp_path / "runs" / "a"] * 40))
    assert len(set(folders)) == 40


def test_a_folder_whose_parent_leads_nowhere(tmp_path: Path) -> None:
    """As where the disk behind a link is not mounted."""
    (tmp_path / "runs").symlink_to(tmp_path / "unmounted")
    with pytest.raises(OSError, match="runs"):
        new_folder(tmp_path / "runs" / "a")


@pytest.mark.parametrize("named", [False, True])
def test_a_training_that_did_not_begin_leaves_no_default_folder(
    named: bool, tiny_sets: TinySets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def train(config: TrainConfig, run: Path, **_: Any) -> None:
        run.mkdir(exist_ok=True)
        (run / ".lock").touch()
        raise Failure("a shard is damaged")

    monkeypatch.setattr("fastat.training.trainer.train", train)
    out = tmp_path / "mine" if named else None
    with pytest.raises(Failure, match="a shard is damaged"):
        run_training("A4", "crnn", {"data": tiny_sets.train}, out, resume=False)
    assert list((tmp_path / "runs").glob("*")) == []
    assert (tmp_path / "mine").exists() == named


# ------------------------------------------------------------------------------ the cache folder
@pytest.fixture
def no_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user whom the system does not know; returns the folder of temporary files."""

    def unknown(uid: int) -> None:
        raise KeyError(uid)

    for name in ("FASTAT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, "")
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_without_a_home_the_cache_is_a_temporary_folder(
    no_home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = no_home / f"fastat-{os.getuid()}"
    folder.mkdir(0o755)
    assert cache_folder() == folder == cache_folder()
    assert folder.stat().st_mode & 0o777 == 0o700
    (line,) = caplog.messages
    assert str(folder) in line and "FASTAT_CACHE" in line


def test_the_cache_folder_that_is_named_needs_no_home(
    no_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(no_home / "x"))
    assert cache_folder() == no_home / "x" / "fastat"
    monkeypatch.setenv("FASTAT_CACHE", str(no_home / "y"))
    assert cache_folder() == no_home / "y"
    assert not list(no_home.iterdir())


def test_a_home_that_cannot_be_written_has_no_cache(
    no_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the home of a user id that a container was given."""
    (no_home / "file").touch()
    monkeypatch.setenv("HOME", str(no_home / "file"))
    assert cache_folder() == no_home / f"fastat-{os.getuid()}"


def test_a_cache_folder_that_cannot_be(no_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (no_home / "file").touch()
    for path in (no_home / "file", no_home / "file" / "x"):
        monkeypatch.setenv("FASTAT_CACHE", str(path))
        with pytest.raises(UserError, match=f"FASTAT_CACHE.*{path}"):
            cache_folder()


@pytest.mark.parametrize("kind", ["other user", "link", "file"])
def test_a_temporary_folder_that_is_not_ours_is_refused(
    no_home: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    folder = no_home / f"fastat-{os.getuid()}"
    if kind == "link":
        (no_home / "other").mkdir()
        folder.symlink_to(no_home / "other")
    elif kind == "file":
        folder.touch()
    else:
        uid = os.getuid() + 1
        monkeypatch.setattr(os, "getuid", lambda: uid)
        (no_home / f"fastat-{uid}").mkdir()
    with pytest.raises(UserError, match=r"fastat-\d+ .*FASTAT_CACHE"):
        cache_folder()
