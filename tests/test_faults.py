"""What goes wrong around a training run: full and read-only disks, pre-emption, a second run."""

import json
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fastat.data.shards import PackedSet
from fastat.evaluation import evaluate
from fastat.system.errors import Failure, UserError
from fastat.training import checkpoints, signals
from fastat.training import step as stepping
from fastat.training.checkpoints import linked_step, write_checkpoint
from fastat.training.optim import train_step
from fastat.training.readback import Reading
from fastat.training.run_folder import RunFolder
from fastat.training.signals import Interrupted
from fastat.weights.checkpoint import load_model
from tests.conftest import TinySets, fastat, one_line
from tests.test_checkpoint import damage, sign
from tests.test_train import (
    SLOW_WRITES,
    arguments,
    assert_same_run,
    metrics,
    start,
    trainer,
    wait_for_step,
    wait_for_write,
)


@pytest.fixture(scope="module")
def whole(tiny_sets: TinySets, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two epochs of four steps, undisturbed."""
    out = tmp_path_factory.mktemp("whole") / "run"
    trainer(tiny_sets, out).run_epochs()
    return out


def at_step(monkeypatch: pytest.MonkeyPatch, **actions: Callable[[], object]) -> None:
    """Calls ``actions["step_5"]`` in the fifth training step from here on, and so on."""
    done = []

    def counted(*args: Any) -> Any:
        result = train_step(*args)
        done.append(1)
        actions.get(f"step_{len(done)}", lambda: None)()
        return result

    monkeypatch.setattr(stepping, "train_step", counted)


def skip_no_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint that comes due waits for the write before it, instead of for a later step."""
    check = checkpoints.CheckpointManager.check_last_write

    def waiting(self: checkpoints.CheckpointManager, progress: Any, *, wait: bool = True) -> None:
        check(self, progress, wait=True)

    monkeypatch.setattr(checkpoints.CheckpointManager, "check_last_write", waiting)


def kill_myself(signum: int) -> Callable[[], object]:
    return lambda: os.kill(os.getpid(), signum)


# ---------------------------------------------------------------------------------- full disks
class Disk:
    """A small file system."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def fill(self) -> None:
        """Takes all the space that is left."""
        with (self.folder / "ballast").open("wb", buffering=0) as file:
            for size in (1 << 16, 1):
                try:
                    while True:
                        file.write(b"x" * size)
                except OSError:
                    continue

    def empty(self) -> None:
        (self.folder / "ballast").unlink()


def mount(folder: Path, *options: str) -> None:
    command = ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount(folder, "size=8m")
    yield Disk(folder)
    subprocess.run(["umount", "-l", str(folder)], check=True)


no_traceback_of_a_thread = pytest.mark.filterwarnings(
    "error::pytest.PytestUnhandledThreadExceptionWarning"
)


@no_traceback_of_a_thread
def test_training_waits_out_a_full_disk(
    whole: Path,
    tiny_sets: TinySets,
    disk: Disk,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Full from the third step to the sixth, the end of an epoch between: the same run, in full."""
    out = disk.folder / "run"
    run = trainer(tiny_sets, out, checkpoint_every_steps=2)
    at_step(monkeypatch, step_3=disk.fill, step_6=disk.empty)
    run.run_epochs()
    said = [record.getMessage() for record in caplog.records]
    for what in ("checkpoint .*step-00000004", "metrics of epoch 1", "predictions.h5"):
        assert any(re.search(f"cannot write .*{what}.*No space", line) for line in said), what
    assert_same_run(out, whole)
    assert (out / "predictions.h5").stat().st_size == (whole / "predictions.h5").stat().st_size


def test_a_disk_that_stays_full_fails_the_run(
    whole: Path, tiny_sets: TinySets, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = disk.folder / "run"
    run = trainer(tiny_sets, out, checkpoint_every_steps=2)
    skip_no_checkpoint(monkeypatch)

    def fill_after_the_sixth() -> None:
        run.checkpoints.finish()
        disk.fill()

    at_step(monkeypatch, step_7=fill_after_the_sixth)
    with pytest.raises(Failure, match="cannot write checkpoint .*step-00000008.*"):
        run.run_epochs()
    assert linked_step(out / "checkpoints", "last") == 6
    disk.empty()
    monkeypatch.undo()
    trainer(tiny_sets, out, resume=True).run_epochs()
    assert_same_run(out, whole)


def test_a_signal_on_a_full_disk_says_that_nothing_was_saved(
    tiny_sets: TinySets, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trainer(tiny_sets, disk.folder / "run")

    def fill_and_stop() -> None:
        disk.fill()
        os.kill(os.getpid(), signal.SIGTERM)

    at_step(monkeypatch, step_2=fill_and_stop)
    with pytest.raises(Failure, match="cannot write checkpoint"):
        run.run_epochs()


def test_a_best_that_was_not_written_is_not_the_best(
    tiny_sets: TinySets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What comes after is measured against the best there is, also when the write fails late."""
    scores, third = iter((0.3, 0.9, 0.5, 0.4)), threading.Event()

    def scored(*args: Any, **options: Any) -> evaluate.Evaluation:
        result = evaluate.evaluate(*args, **options)
        assert result is not None
        object.__setattr__(result.metrics, "mAP", score := next(scores))
        if score == 0.5:
            third.set()
        return result

    def full_at_8(folder: Path, step: int, *args: Any, **options: Any) -> None:
        if step == 8:
            assert third.wait(60)
            time.sleep(0.2)
            raise Failure("cannot write checkpoint 8")
        write_checkpoint(folder, step, *args, **options)

    monkeypatch.setattr("fastat.training.trainer.evaluate", scored)
    monkeypatch.setattr(checkpoints, "write_checkpoint", full_at_8)
    run = trainer(tiny_sets, tmp_path / "run", epochs=4)
    run.run_epochs()
    assert linked_step(tmp_path / "run" / "checkpoints", "best") == 12
    assert (run.progress.best_map, run.progress.best_step) == (0.5, 12)


def test_a_line_of_metrics_is_written_whole_or_not_at_all(disk: Disk) -> None:
    """And it is written once there is space again."""
    with RunFolder(disk.folder) as folder:
        folder.add_epoch({"epoch": 1, "step": 1})
        disk.fill()
        folder.add_epoch({"epoch": 2, "step": 2} | {f"value_{i}": float(i) for i in range(1000)})
        assert metrics(disk.folder) == [{"epoch": 1, "step": 1}]
        with pytest.raises(Failure, match=r"metrics of epoch 2: No space left"):
            folder.finish()
        disk.empty()
        folder.add_epoch({"epoch": 3, "step": 3})
        folder.finish()
    assert [line["epoch"] for line in metrics(disk.folder)] == [1, 2, 3]


def step_of(step: int, loss: float) -> Reading:
    return Reading(
        step, lr=0.1, loss=loss, norm=1.0, found_inf=False, overflow=False, loss_sum=loss
    )


@no_traceback_of_a_thread
def test_curves_are_readable_after_a_full_disk(
    disk: Disk, caplog: pytest.LogCaptureFixture
) -> None:
    """By TensorBoard's own reader; the points of the time between are gone."""
    with RunFolder(disk.folder) as folder:
        folder.open_curves(step=0)
        for step in range(10):
            folder.add_step(step_of(step, loss=0.5))
        time.sleep(1.1)  # points are written in the background, and files sorted by second
        disk.fill()
        last = 9
        while not (warnings := warned(caplog)) and last < 5_000:
            last += 1
            folder.add_step(step_of(last, loss=0.25))  # some fit into the file's last page
            time.sleep(0.002)
        folder.add_epoch({"epoch": 1, "step": last + 1, "mAP": 0.5})
        disk.empty()
        folder.add_step(step_of(last + 1, loss=0.25))
        folder.add_epoch({"epoch": 2, "step": last + 2, "mAP": 0.75})
        folder.add_step(step_of(last + 2, loss=0.125))
    assert warnings and all("No space left" in warning for warning in warned(caplog))
    losses = curve(disk.folder, "train/loss")
    assert [loss for step, loss in losses if step <= 10] == [0.5] * 10
    assert losses[-1] == (last + 3, 0.125)
    assert curve(disk.folder, "epoch/mAP") == [(last + 2, 0.75)]


def warned(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What was said of the curves."""
    messages = [record.getMessage() for record in caplog.records]
    return [message for message in messages if "curves" in message]


def curve(run: Path, tag: str) -> list[tuple[int, float]]:
    """Steps and values that TensorBoard shows."""
    reader = EventAccumulator(str(run / "tb"), size_guidance={"scalars": 0})
    reader.Reload()
    return [(point.step, point.value) for point in reader.Scalars(tag)]


def test_resuming_hides_the_points_that_are_made_again(tmp_path: Path) -> None:
    for first, loss in ((0, 0.5), (3, 0.25)):
        with RunFolder(tmp_path) as folder:
            folder.open_curves(step=first)
            for step in range(first, 5):
                folder.add_step(step_of(step, loss))
        time.sleep(1.1)  # the files are sorted by the second that is in their names
    curve_of_both = curve(tmp_path, "train/loss")
    assert [step for step, _ in curve_of_both] == [1, 2, 3, 4, 5]
    assert [loss for _, loss in curve_of_both] == [0.5, 0.5, 0.5, 0.25, 0.25]


@pytest.mark.parametrize("made", [False, True], ids=["new", "resumed"])
def test_a_read_only_folder_is_found_before_the_data_are_opened(
    tiny_sets: TinySets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: bool
) -> None:
    folder = tmp_path / "disk"
    (folder / "run" if made else folder).mkdir(parents=True)
    mount(folder, "ro")
    try:
        monkeypatch.setattr(PackedSet, "open", lambda *_: pytest.fail("opened the data"))
        with pytest.raises(Failure, match=f"cannot write the run folder {folder}/run"):
            trainer(tiny_sets, folder / "run", resume=made)
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


# ------------------------------------------------------------------------------- another version
def test_a_trainer_state_of_another_version_is_not_resumed(
    whole: Path, tiny_sets: TinySets, tmp_path: Path
) -> None:
    shutil.copytree(whole, tmp_path / "run", symlinks=True)
    checkpoint = tmp_path / "run" / "checkpoints" / "last"
    state = torch.load(checkpoint / "trainer.pt", weights_only=True)
    state["progress"]["warp"] = 9
    torch.save(state, checkpoint / "trainer.pt")
    sign(checkpoint / "model.json", json.loads((checkpoint / "model.json").read_text()))
    done = fastat("train", "--resume", "--out", tmp_path / "run", code=1)
    line = done.stderr.strip().splitlines()[-1]
    assert "trainer.pt" in line and "'warp'" in line and "another version" in line
    assert "damaged" not in line and "Traceback" not in done.stderr


# ------------------------------------------------------------------------------- a second run
def test_two_runs_in_one_folder(tiny_sets: TinySets, tmp_path: Path) -> None:
    first = trainer(tiny_sets, tmp_path / "run", steps=1)
    with pytest.raises(UserError, match="another training is running in"):
        trainer(tiny_sets, tmp_path / "run", resume=True)
    first.run_epochs()
    trainer(tiny_sets, tmp_path / "run", steps=2, resume=True).run_epochs()


def test_the_second_run_is_one_line_and_no_mark_on_the_first(
    whole: Path, tiny_sets: TinySets
) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    with RunFolder(whole):
        done = fastat("train", "--resume", "--out", whole, code=2)
    assert f"another training is running in {whole}" in one_line(done)
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*")} == before


@pytest.mark.full
def test_a_killed_run_lets_the_next_one_in(tiny_sets: TinySets, tmp_path: Path) -> None:
    out = tmp_path / "run"
    every = ("--set", "checkpoint_every_steps=1", "--epochs", 1000)
    process = start(*arguments(tiny_sets, out, *every))
    wait_for_step(process, out, 1)
    done = fastat("train", "--resume", "--out", out, code=2)
    assert "another training is running" in one_line(done)
    process.kill()
    process.wait()
    fastat("train", "--resume", "--out", out, "--set", "steps=2")


# ------------------------------------------------------------------------------- pre-emption
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1])
def test_an_evaluation_that_takes_long_is_cut_off_and_made_up_for(
    whole: Path,
    tiny_sets: TinySets,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    signum: signal.Signals,
) -> None:
    out = tmp_path / "run"
    run = trainer(tiny_sets, out)
    monkeypatch.setattr(signals, "GRACE_SECONDS", -1.0)
    at_step(monkeypatch, step_4=kill_myself(signum))
    with pytest.raises(Interrupted) as stop:
        run.run_epochs()
    assert stop.value.exit_code == 143
    assert linked_step(out / "checkpoints", "last") == 4
    assert not (out / "metrics.jsonl").exists()
    monkeypatch.undo()
    trainer(tiny_sets, out, resume=True).run_epochs()
    assert_same_run(out, whole)


def test_the_last_evaluation_may_be_cut_off_too(
    whole: Path, tiny_sets: TinySets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    run = trainer(tiny_sets, out)
    monkeypatch.setattr(signals, "GRACE_SECONDS", -1.0)
    at_step(monkeypatch, step_8=kill_myself(signal.SIGTERM))
    with pytest.raises(Interrupted):
        run.run_epochs()
    monkeypatch.undo()
    again = trainer(tiny_sets, out, resume=True)
    again.run_epochs()
    assert_same_run(out, whole)
    assert not again.progress.unscored


def test_an_end_that_steps_set_is_not_scored_when_it_is_none_any_more(
    whole: Path, tiny_sets: TinySets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    run = trainer(tiny_sets, out, steps=6)
    monkeypatch.setattr(signals, "GRACE_SECONDS", -1.0)
    at_step(monkeypatch, step_6=kill_myself(signal.SIGTERM))
    with pytest.raises(Interrupted):
        run.run_epochs()
    monkeypatch.undo()
    trainer(tiny_sets, out, resume=True).run_epochs()
    assert_same_run(out, whole)


def test_signals_while_a_checkpoint_is_written(
    whole: Path, tiny_sets: TinySets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first comes during a write in the background, more of them during the one it causes."""
    out = tmp_path / "run"
    writes: list[int] = []

    def signalled(folder: Path, step: int, *args: Any, **options: Any) -> None:
        writes.append(step)
        for signum in signals.PREEMPTION if len(writes) > 1 else (signal.SIGTERM,):
            signal.pthread_kill(threading.main_thread().ident or 0, signum)
        write_checkpoint(folder, step, *args, **options)

    monkeypatch.setattr(checkpoints, "write_checkpoint", signalled)
    run = trainer(tiny_sets, out, checkpoint_every_steps=1)
    with pytest.raises(Interrupted) as stop:
        run.run_epochs()
    assert stop.value.exit_code == 143
    assert writes[0] == 1 and len(writes) == 2
    assert linked_step(out / "checkpoints", "last") == writes[1]
    monkeypatch.undo()
    trainer(tiny_sets, out, resume=True).run_epochs()
    assert_same_run(out, whole)


def test_usr1_saves_and_leaves_with_143(tiny_sets: TinySets, tmp_path: Path) -> None:
    out = tmp_path / "run"
    every = ("--set", "checkpoint_every_steps=1", "--epochs", 1000)
    process = start(*arguments(tiny_sets, out, *every))
    wait_for_step(process, out, 2)
    for signum in (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM):
        process.send_signal(signum)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 143, stderr
    assert f"go on with: fastat train --resume --out {out}" in stderr
    assert "Traceback" not in stderr
    load_model(out)


def test_ctrl_c_does_not_wait_for_a_write(tiny_sets: TinySets, tmp_path: Path) -> None:
    """The second: the first waits for a checkpoint, which this disk takes minutes for."""
    program = SLOW_WRITES.replace("0.2", "30 if 'step' in str(path) else 0")
    process = start(*arguments(tiny_sets, tmp_path / "run"), program=program)
    wait_for_write(process, tmp_path / "run", 4)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=10)
    assert process.returncode == 130, stderr
    assert stderr.splitlines()[-1] == "fastat: interrupted"


# ------------------------------------------------------------------------------- checkpoints
def test_minutes_between_checkpoints(
    tiny_sets: TinySets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[int] = []

    def noted(folder: Path, step: int, *args: Any, **options: Any) -> None:
        saved.append(step)

    monkeypatch.setattr(checkpoints, "write_checkpoint", noted)
    now = [0.0]
    at_step(monkeypatch, **{f"step_{k}": lambda: now.append(now[-1] + 60) for k in range(1, 9)})
    monkeypatch.setattr(time, "monotonic", lambda: now[-1])
    run = trainer(tiny_sets, tmp_path / "run", checkpoint_every_minutes=1.5, eval=None)
    skip_no_checkpoint(monkeypatch)
    run.run_epochs()
    assert saved == [2, 4, 6, 8], "a minute a step: every second one; 4 and 8 end an epoch"


def test_a_slow_disk_delays_checkpoints_not_training(
    whole: Path, tiny_sets: TinySets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first write takes until the third step is done: the second step's is left to then."""
    out, saved, go_on = tmp_path / "run", [], threading.Event()

    def slow(folder: Path, step: int, *args: Any, **options: Any) -> None:
        saved.append(step)
        assert go_on.wait(60), "training stands still"
        write_checkpoint(folder, step, *args, **options)

    monkeypatch.setattr(checkpoints, "write_checkpoint", slow)
    at_step(monkeypatch, step_3=go_on.set)
    trainer(tiny_sets, out, checkpoint_every_steps=1).run_epochs()
    assert saved[0] == 1 and 2 not in saved
    assert {4, 8} <= set(saved), "the end of an epoch waits for its turn"
    monkeypatch.undo()
    assert_same_run(out, whole)


@pytest.mark.parametrize("name", ["model.safetensors", "trainer.pt", "model.json"])
def test_resuming_from_the_one_before_a_damaged_checkpoint(
    whole: Path,
    tiny_sets: TinySets,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    name: str,
) -> None:
    """The damaged one is also the best: it is the best again once it is made again."""
    out = tmp_path / "run"
    skip_no_checkpoint(monkeypatch)
    trainer(tiny_sets, out, steps=8, checkpoint_every_steps=3).run_epochs()
    damage(out / "checkpoints" / "last" / name)
    again = trainer(tiny_sets, out, resume=True)
    assert again.progress.step == 6
    assert f"step-00000008/{name}" in caplog.text and "step 6 is used instead" in caplog.text
    again.run_epochs()
    assert_same_run(out, whole)


def test_what_a_killed_run_left_half_written_is_removed(
    tiny_sets: TinySets, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    trainer(tiny_sets, out, steps=1).run_epochs()
    folder = out / "checkpoints" / ".step-00000002.123.tmp"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"half")
    (out / "checkpoints" / ".last.123.tmp").symlink_to("step-00000002")
    (out / ".predictions.h5.123.tmp").write_bytes(b"half")
    trainer(tiny_sets, out, resume=True)
    assert not list(out.rglob("*.tmp"))
