"""A run's checkpoints: written in the background, passed over when damaged, gone back to."""

import logging
import math
import os
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from fastat.system.distributed import ALONE
from fastat.system.errors import Failure, UserError
from fastat.training import checkpoints
from fastat.training.checkpoints import (
    CheckpointManager,
    linked_step,
    load_trainer_state,
    newest_whole,
    point_links,
    saved_steps,
    to_host,
    write_checkpoint,
)
from fastat.training.run_folder import Progress
from fastat.weights.checkpoint import find_checkpoint, load_model, read_weights
from tests.test_checkpoint import META, damage

FILES = ("model.safetensors", "model.json", "trainer.pt")


def manager_of(run: Path, model: nn.Module) -> CheckpointManager:
    optimizer = torch.optim.Adam(model.parameters())
    device = next(model.parameters()).device
    train_set: Any = SimpleNamespace(directory="a set", fingerprint="its fingerprint")
    options: dict[str, Any] = {"every_steps": None, "every_minutes": None}
    return CheckpointManager(run, model, optimizer, device, ALONE, train_set=train_set, **options)


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """A disk on which no write begins before the event is set."""
    go_on = threading.Event()

    def waiting(*args: Any, **options: Any) -> None:
        go_on.wait()
        write_checkpoint(*args, **options)

    monkeypatch.setattr(checkpoints, "write_checkpoint", waiting)
    yield go_on
    go_on.set()


# ------------------------------------------------------------------------------ in the background
def test_what_training_changes_meanwhile_is_not_written(
    tmp_path: Path, held: threading.Event, device: torch.device
) -> None:
    model = META.create().to(device)
    before = {name: x.cpu().clone() for name, x in model.state_dict().items()}
    manager = manager_of(tmp_path, model)
    progress = Progress(step=3, loss_sum=torch.ones((), device=device))
    manager.save(progress, META, None, best=True)
    with torch.no_grad():
        for x in (*model.state_dict().values(), progress.loss_sum):
            x.zero_()
    held.set()
    manager.finish()
    written = read_weights(tmp_path / "checkpoints" / "best")
    assert written.keys() == before.keys()
    assert all(torch.equal(written[name], x) for name, x in before.items())
    saved = load_trainer_state(tmp_path / "checkpoints" / "last")["progress"]
    assert (saved["step"], saved["loss_sum"].item()) == (3, 1)


def test_a_snapshot_keeps_strides_and_plain_values() -> None:
    x = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    copy = to_host({"a": [x, 1, None], "b": "c"})
    assert copy["a"][0].stride() == x.stride() and torch.equal(copy["a"][0], x)
    assert copy["a"][0].data_ptr() != x.data_ptr()
    assert (copy["a"][1:], copy["b"]) == ([1, None], "c")


def test_saving_takes_no_longer_on_a_slow_disk(tmp_path: Path, held: threading.Event) -> None:
    manager = manager_of(tmp_path, META.create())
    manager.save(Progress(step=3), META, None, best=False)  # returns although the disk does not
    assert not list(tmp_path.iterdir())
    threading.Timer(0.2, held.set).start()
    started = time.monotonic()
    manager.finish()
    assert time.monotonic() - started > 0.1
    assert newest_whole(tmp_path / "checkpoints").step == 3


def test_a_failure_is_reported_once_and_the_best_is_what_is_on_disk(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    manager = manager_of(tmp_path, META.create())
    manager.save(Progress(step=3, best_map=0.25, best_step=3), META, None, best=True)
    manager.finish()
    progress = Progress(step=5, best_map=0.5, best_step=5)
    (tmp_path / "checkpoints").rename(tmp_path / "aside")
    (tmp_path / "checkpoints").write_text("")
    manager.save(progress, META, None, best=True)
    manager.check_last_write(progress, wait=True)
    assert "cannot write checkpoint" in caplog.text
    assert (progress.best_map, progress.best_step) == (0.25, 3)
    caplog.clear()
    manager.check_last_write(progress, wait=True)
    assert not caplog.text
    manager.save(progress, META, None, best=False)
    with pytest.raises(Failure, match="cannot write checkpoint"):
        manager.finish()


def test_our_own_faults_are_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **options: object) -> None:
        raise AttributeError("a bug")

    monkeypatch.setattr(checkpoints, "write_checkpoint", broken)
    manager, progress = manager_of(tmp_path, META.create()), Progress(step=3)
    manager.save(progress, META, None, best=True)
    with pytest.raises(AttributeError, match="a bug"):
        manager.check_last_write(progress, wait=True)


def test_an_error_that_ends_the_run_lets_the_write_end(
    tmp_path: Path, held: threading.Event
) -> None:
    with (
        pytest.raises(Failure, match="^of training$"),
        manager_of(tmp_path, META.create()) as manager,
    ):
        manager.save(Progress(step=3), META, None, best=False)
        threading.Timer(0.1, held.set).start()
        raise Failure("of training")
    assert newest_whole(tmp_path / "checkpoints").step == 3
    with pytest.raises(KeyboardInterrupt), manager_of(tmp_path, META.create()) as manager:
        held.clear()
        manager.save(Progress(step=4), META, None, best=False)
        raise KeyboardInterrupt  # which waits for nothing
    assert newest_whole(tmp_path / "checkpoints").step == 3


class FusedAdam(torch.optim.Adam):
    """Another implementation of Adam."""


def test_another_optimizer_does_not_resume_a_run(tmp_path: Path) -> None:
    model = META.create()
    manager = manager_of(tmp_path, model)
    manager.save(Progress(step=3), META, None, best=False)
    manager.finish()
    assert manager.restore(None).step == 3
    manager.optimizer = FusedAdam(model.parameters())
    with pytest.raises(UserError, match=r"torch\.optim\.adam\.Adam.* is .*test_.*\.FusedAdam"):
        manager.restore(None)


# -------------------------------------------------------------------------- damage, going back
@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Checkpoints of steps 4, the best, 6 and 8."""
    for step in (4, 6, 8):
        write(tmp_path / "checkpoints", step, best=step == 4)
    return tmp_path / "checkpoints"


def write(folder: Path, step: int, *, best: bool) -> None:
    state = {"step": step, "x": torch.arange(1000.0)}
    write_checkpoint(folder, step, META.create().state_dict(), META, state, best=best)


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_is_passed_over(
    folder: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    whole = newest_whole(folder)
    assert (whole.step, whole.trainer["step"]) == (8, 8) and not caplog.records
    damage(folder / "last" / name)
    older = newest_whole(folder)
    assert (older.step, older.trainer["step"]) == (6, 6)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and f"step-00000008/{name}" in record.getMessage()
    damage(folder / "step-00000006" / name)
    assert newest_whole(folder).step == 4
    damage(folder / "step-00000004" / name)
    with pytest.raises((Failure, UserError), match=f"step-00000008/{name}"):
        newest_whole(folder)


def test_a_lost_checkpoint_is_passed_over(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.rmtree(folder / "step-00000008")
    assert newest_whole(folder).step == 6
    assert "step-00000008 is gone" in caplog.text


def test_one_that_last_does_not_point_at_yet_is_not_taken(folder: Path) -> None:
    shutil.copytree(folder / "step-00000008", folder / "step-00000010")
    assert newest_whole(folder).step == 8


def test_others_may_read_the_weights_as_the_umask_says(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write(tmp_path, 1, best=False)
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "last").iterdir()}
    assert modes == dict.fromkeys(FILES, 0o640)


def test_a_checkpoint_of_the_same_step_is_replaced(folder: Path) -> None:
    point_links(folder, 6, 4)
    state = {"step": "again"}
    write_checkpoint(folder, 8, META.create().state_dict(), META, state, best=False)
    assert newest_whole(folder).trainer["step"] == "again"
    assert saved_steps(folder) == [8, 6, 4]
    assert not list(folder.glob(".*"))


def test_going_back_leaves_a_best_from_before(folder: Path) -> None:
    assert point_links(folder, 6, 4)
    assert (linked_step(folder, "last"), linked_step(folder, "best")) == (6, 4)


def test_going_back_takes_the_best_back(folder: Path) -> None:
    write(folder, 8, best=True)
    assert point_links(folder, 6, 6)
    assert (linked_step(folder, "last"), linked_step(folder, "best")) == (6, 6)


def test_going_back_to_where_the_best_is_gone(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(folder, 8, best=True)
    assert saved_steps(folder) == [8, 6]
    assert not point_links(folder, 6, 4)
    assert "best" in caplog.text
    assert not os.path.lexists(folder / "best")
    assert find_checkpoint(folder.parent).name == "last"


def test_going_back_says_that_the_best_is_damaged(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    damage(folder / "best" / "model.safetensors")
    assert not point_links(folder, 8, 4)
    assert "best/model.safetensors is damaged" in caplog.text
    with pytest.raises(Failure, match="best"):
        load_model(folder.parent)


def test_a_run_whose_best_is_damaged_has_none(tmp_path: Path) -> None:
    manager = manager_of(tmp_path, META.create())
    manager.save(Progress(step=4, best_map=0.5, best_step=4), META, None, best=True)
    manager.save(Progress(step=8, best_map=0.5, best_step=4), META, None, best=False)
    manager.finish()
    progress = manager.restore(None)
    assert (progress.best_map, progress.best_step) == (0.5, 4)
    damage(tmp_path / "checkpoints" / "best" / "model.safetensors")
    progress = manager.restore(None)
    assert (progress.best_map, progress.best_step) == (-math.inf, None)
