"""Checkpoints: what is written comes back, nothing that carries code does."""

import json
import math
import os
import pickle
import shutil
import zipfile
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch

from fastat.data.shards import ClassInfo
from fastat.system.errors import Failure, UserError
from fastat.training.checkpoints import load_trainer_state, saved_steps, write_checkpoint
from fastat.weights.checkpoint import ModelMeta, find_checkpoint, load_meta, load_model

META = ModelMeta(
    model="cnn_trans",
    feature="logmel64",
    clip_seconds=1.0,
    num_mels=64,
    num_frames=40,
    mean=-20.5,
    std=17.25,
    classes=(ClassInfo("/m/a", "Ä bell, rung"), ClassInfo("/m/b", "B")),
    options={"embedding": 64, "num_heads": 4, "pooling": "max"},
)


def damage(path: Path) -> None:
    """One bit, in the middle: where model.json has a value, and the others have a tensor."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with one checkpoint."""
    write_checkpoint(
        tmp_path / "checkpoints", 3, META.create().state_dict(), META, {"step": 3}, best=True
    )
    return tmp_path


def test_model_and_meta_come_back(tmp_path: Path) -> None:
    model = META.create().eval()
    write_checkpoint(tmp_path / "checkpoints", 3, model.state_dict(), META, {"step": 3}, best=True)
    for path in (tmp_path, str(tmp_path / "checkpoints" / "last")):
        loaded, meta = load_model(path)
        assert meta == META
        x = torch.randn(2, 40, 64)
        assert torch.equal(loaded(x), model(x))
    state = load_trainer_state(tmp_path / "checkpoints" / "last")
    assert state == {"step": 3}


def test_last_and_best_are_kept_and_nothing_else(run: Path) -> None:
    folder = run / "checkpoints"
    for step, best in ((5, False), (7, True), (9, False)):
        write_checkpoint(folder, step, META.create().state_dict(), META, {}, best=best)
    assert sorted(os.listdir(folder)) == ["best", "last", "step-00000007", "step-00000009"]
    write_checkpoint(folder, 11, META.create().state_dict(), META, {}, best=False)
    write_checkpoint(folder, 13, META.create().state_dict(), META, {}, best=False)
    assert saved_steps(folder) == [13, 11, 7], "the one before the last is kept"
    assert find_checkpoint(run).name == "best"
    assert (folder / "best").readlink() == Path("step-00000007")
    assert find_checkpoint(run, prefer="last").name == "last"


def test_a_run_folder_can_be_moved(run: Path, tmp_path: Path) -> None:
    moved = tmp_path.parent / f"{tmp_path.name}-moved"
    shutil.move(run, moved)
    assert load_model(moved)[1] == META


def test_failed_writing_keeps_what_was(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(Failure, match="No space left"):
        write_checkpoint(run / "checkpoints", 4, META.create().state_dict(), META, {}, best=True)
    assert sorted(os.listdir(run / "checkpoints")) == ["best", "last", "step-00000003"]
    assert load_model(run)[1] == META


class Evil:
    """Unpickling it would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.path,))


def test_a_trainer_state_with_code_is_refused(run: Path, tmp_path: Path) -> None:
    state = {"step": 4, "x": Evil(tmp_path / "pwned")}
    write_checkpoint(run / "checkpoints", 4, META.create().state_dict(), META, state, best=False)
    with pytest.raises(UserError, match="refused"):
        load_trainer_state(run / "checkpoints" / "last")
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".pkl"])
def test_a_pickle_is_refused_unread(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"model{suffix}"
    path.write_bytes(pickle.dumps(Evil(tmp_path / "pwned")))
    with pytest.raises(UserError, match="refused"):
        load_model(path)
    assert not (tmp_path / "pwned").exists()


def test_weights_that_are_a_pickle_are_not_read(run: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(run / "checkpoints/last/model.safetensors", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Evil(tmp_path / "pwned")))
    with pytest.raises(Failure, match="model.safetensors"):
        load_model(run)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: json.dumps({**json.loads(text), "version": 99}),
        lambda text: json.dumps({k: v for k, v in json.loads(text).items() if k != "mean"}),
        lambda text: json.dumps({**json.loads(text), "classes": [[1]]}),
        lambda text: json.dumps({**json.loads(text), "num_mels": "x"}),
        lambda text: json.dumps({**json.loads(text), "options": None}),
        lambda text: json.dumps({**json.loads(text), "model": [1]}),
        lambda text: json.dumps({**json.loads(text), "mean": "x"}),
        lambda text: json.dumps({**json.loads(text), "std": 0}),
        lambda text: json.dumps({**json.loads(text), "clip_seconds": math.nan}),
    ],
    ids=[
        "cut",
        "a list",
        "newer",
        "a key is gone",
        "bad classes",
        "bad mels",
        "no options",
        "bad model",
        "bad mean",
        "no spread",
        "no length",
    ],  # fmt: skip
)
def test_damaged_meta_is_a_failure(run: Path, damage: object) -> None:
    path = run / "checkpoints" / "last" / "model.json"
    path.write_text(damage(path.read_text()))  # type: ignore[operator]
    with pytest.raises(Failure, match="model.json"):
        load_meta(path.parent)


def test_damaged_weights_are_a_failure(run: Path) -> None:
    path = run / "checkpoints" / "last" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(Failure, match="model.safetensors"):
        load_model(run)


def test_weights_of_another_shape_are_a_failure(run: Path) -> None:
    meta = replace(META, options=META.options | {"embedding": 128})
    write_checkpoint(run / "checkpoints", 4, META.create().state_dict(), meta, {}, best=True)
    with pytest.raises(Failure, match="does not fit"):
        load_model(run)


def test_a_missing_trainer_state_is_a_failure(run: Path) -> None:
    (run / "checkpoints" / "last" / "trainer.pt").unlink()
    with pytest.raises(Failure, match="trainer.pt"):
        load_trainer_state(run / "checkpoints" / "last")


@pytest.mark.parametrize("name", ["nothing", ""])
def test_no_checkpoint_there(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="a run folder or a checkpoint"):
        load_model(tmp_path / name)


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("options", {**META.options, "embedding": 10**9}),
        ("options", {**META.options, "num_layers": 10**9}),
        ("options", {**META.options, "embedding": 10**30}),
        ("num_frames", 10**9),
        ("num_mels", 10**9),
        ("clip_seconds", 1e308),
        ("clip_seconds", 10**400),
        ("classes", [[1, 2]]),
        ("model", "x" * 10_000),
    ],
)
def test_absurd_sizes_take_no_memory(run: Path, key: str, value: object) -> None:
    path = run / "checkpoints" / "last" / "model.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(Failure, match="model.json"):
        load_model(run)


def sign(path: Path, document: dict[str, Any]) -> None:
    """Writes ``model.json`` with the checksums of what is in its folder now."""
    sums = document.pop("checksums")
    sums |= {name: sha256((path.parent / name).read_bytes()).hexdigest() for name in sums}
    sums["model.json"] = sha256(json.dumps(document).encode()).hexdigest()
    path.write_text(json.dumps(document | {"checksums": sums}))


@pytest.mark.parametrize("where", ["document", "options"])
def test_a_key_of_another_version_is_no_damage(run: Path, where: str) -> None:
    path = run / "checkpoints" / "last" / "model.json"
    document = json.loads(path.read_text())
    (document if where == "document" else document["options"])["warp"] = 9
    sign(path, document)
    with pytest.raises(Failure, match=r"model\.json.*another version.*") as raised:
        load_model(run)
    assert "'warp'" in str(raised.value)


def test_json_that_python_does_not_read(run: Path) -> None:
    path = run / "checkpoints" / "last" / "model.json"
    for text in ("[" * 100_000, "9" * 10_000):
        path.write_text(text)
        with pytest.raises(Failure, match="model.json is damaged"):
            load_model(run)


def test_any_damage_of_the_trainers_state_is_one_error(run: Path) -> None:
    path = run / "checkpoints" / "last" / "trainer.pt"
    data = path.read_bytes()
    start = data.index(b"step")
    for place in range(start - 40, start + 20):
        path.write_bytes(data[:place] + bytes([data[place] ^ 0xFF]) + data[place + 1 :])
        with pytest.raises(Failure, match=r"trainer\.pt is damaged"):
            load_trainer_state(path.parent)


@pytest.mark.parametrize("name", ["model.safetensors", "model.json"])
def test_a_damaged_best_is_named_and_nothing_else_is_taken(run: Path, name: str) -> None:
    folder = run / "checkpoints"
    write_checkpoint(folder, 4, META.create().state_dict(), META, {}, best=False)
    damage(folder / "best" / name)
    with pytest.raises(Failure, match=f"best/{name}"):
        load_model(run)
    shutil.rmtree(folder / "step-00000003")
    with pytest.raises(Failure, match="best/model.json"):
        load_model(run)
