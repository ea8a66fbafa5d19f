"""Checkpoints in the background: a snapshot is a snapshot, and what goes wrong is heard of."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastat import checkpoint_writer
from fastat.checkpoint import read_weights
from fastat.checkpoint_writer import CheckpointWriter, to_host
from fastat.errors import Failure
from fastat.run_checkpoints import load_trainer_state, newest_whole, write_checkpoint
from tests.test_checkpoint import META


@pytest.fixture
def state() -> dict[str, Tensor]:
    return META.create().state_dict()


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """A disk on which no write begins before the event is set."""
    go_on = threading.Event()

    def waiting(*args: Any, **options: Any) -> None:
        go_on.wait()
        write_checkpoint(*args, **options)

    monkeypatch.setattr(checkpoint_writer, "write_checkpoint", waiting)
    yield go_on
    go_on.set()


def test_what_training_changes_meanwhile_is_not_written(
    tmp_path: Path, state: dict[str, Tensor], held: threading.Event, device: torch.device
) -> None:
    state = {name: x.to(device) for name, x in state.items()}
    trainer = {"optimizer": [{"m": torch.ones(3, device=device)}], "rng": (1, 2)}
    before = {name: x.cpu().clone() for name, x in state.items()}
    writer = CheckpointWriter(tmp_path, print)
    writer.start(3, state, META, trainer, best=True)
    assert writer.busy and writer.outcome(wait=False) is None
    for x in (*state.values(), trainer["optimizer"][0]["m"]):  # type: ignore[index]
        x.zero_()
    held.set()
    assert writer.outcome(wait=True) is None
    assert not writer.busy
    written = read_weights(tmp_path / "best")
    assert written.keys() == before.keys()
    assert all(torch.equal(written[name], x) for name, x in before.items())
    stored = load_trainer_state(tmp_path / "last")
    assert stored["optimizer"][0]["m"].tolist() == [1, 1, 1]
    assert stored["rng"] == (1, 2)


def test_a_snapshot_keeps_strides_and_plain_values() -> None:
    x = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    copy = to_host({"a": [x, 1, None], "b": "c"})
    assert copy["a"][0].stride() == x.stride() and torch.equal(copy["a"][0], x)
    assert copy["a"][0].data_ptr() != x.data_ptr()
    assert (copy["a"][1:], copy["b"]) == ([1, None], "c")


def test_starting_takes_no_longer_on_a_slow_disk(
    tmp_path: Path, state: dict[str, Tensor], held: threading.Event
) -> None:
    writer = CheckpointWriter(tmp_path, print)
    writer.start(3, state, META, {}, best=False)  # returns although the disk does not
    assert not list(tmp_path.iterdir())
    threading.Timer(0.2, held.set).start()
    started = time.monotonic()
    assert writer.outcome(wait=True) is None
    assert time.monotonic() - started > 0.1, "who asks to wait, waits"
    assert newest_whole(tmp_path).step == 3


def test_a_failure_is_heard_of_once(tmp_path: Path, state: dict[str, Tensor]) -> None:
    (tmp_path / "file").write_text("")
    writer = CheckpointWriter(tmp_path / "file" / "checkpoints", print)
    writer.start(3, state, META, {}, best=True)
    unwritten = writer.outcome(wait=True)
    assert unwritten is not None and unwritten.best
    assert "cannot write checkpoint" in str(unwritten.failure)
    assert writer.outcome(wait=True) is None


def test_our_own_faults_are_raised(tmp_path: Path, state: dict[str, Tensor]) -> None:
    writer = CheckpointWriter(tmp_path, print)
    writer.start(3, state, META, {"x": lambda: 0}, best=True)
    with pytest.raises(AttributeError):
        writer.outcome(wait=True)


def test_an_error_that_ends_the_run_lets_the_write_end(
    tmp_path: Path, state: dict[str, Tensor], held: threading.Event
) -> None:
    with pytest.raises(Failure, match="^of training$"), CheckpointWriter(tmp_path, print) as writer:
        writer.start(3, state, META, {}, best=False)
        threading.Timer(0.1, held.set).start()
        raise Failure("of training")
    assert newest_whole(tmp_path).step == 3
    with pytest.raises(KeyboardInterrupt), CheckpointWriter(tmp_path, print) as writer:
        held.clear()
        writer.start(4, state, META, {}, best=False)
        raise KeyboardInterrupt  # which waits for nothing
    assert newest_whole(tmp_path).step == 3
