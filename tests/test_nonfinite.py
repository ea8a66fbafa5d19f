"""Steps that are not finite: stop, skip, rollback, and what is kept of them."""

import csv
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fastat import checkpoint_writer, nonfinite
from fastat.checkpoint import ModelMeta, load_model
from fastat.data.loader import Batch, PackedSource
from fastat.data.shards import PackedSet
from fastat.errors import Failure, UserError
from fastat.frontend import Frontend
from fastat.models import create_model
from fastat.models.crnn import Crnn
from fastat.nonfinite import BufferGuard, why_stop
from fastat.run_checkpoints import write_checkpoint
from fastat.run_folder import Progress
from fastat.train import Trainer
from tests.conftest import QUIET, TinySets
from tests.test_train import assert_same_run, metrics, trainer


def poison(monkeypatch: pytest.MonkeyPatch, run: Trainer, steps: set[int], place: int = 2) -> None:
    """The clip at ``place`` of these steps (from 0) has features that are infinite."""
    of_epoch = run.sampler.steps_per_epoch
    rows = [run.sampler.plan(*divmod(step, of_epoch)).rows for step in steps]
    features = Batch.features

    def poisoned(batch: Batch, frontend: Frontend) -> Tensor:
        out = features(batch, frontend)
        if any(np.array_equal(batch.rows, r) for r in rows):
            out[place] = torch.inf
        return out

    monkeypatch.setattr(Batch, "features", poisoned)


def test_an_infinite_feature_stops_the_run_and_names_the_clip(
    tiny_sets: TinySets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trainer(tiny_sets, tmp_path / "run", mixup=1.0)
    poison(monkeypatch, run, {5})
    with pytest.raises(Failure, match="not finite at step 6;") as error:
        run.run_epochs()
    folder = tmp_path / "run" / "nonfinite" / "step-00000006"
    plan = run.sampler.plan(1, 1)
    clips, partners = run.data.train_set.names(plan.rows), run.data.train_set.names(plan.partners)
    assert f"(kept in {folder}: alone not finite: {clips[2]})" in str(error.value)
    with (folder / "clips.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [line["clip"] for line in table] == clips
    assert [line["row"] for line in table] == [str(row) for row in plan.rows]
    assert [line["partner"] for line in table] == partners
    assert [float(line["lambda"]) for line in table] == pytest.approx(plan.lam.tolist())
    sound = ("finite", "finite")
    verdicts = [(line["features"], line["loss"]) for line in table]
    assert verdicts == [("not finite",) * 2 if i == 2 else sound for i in range(8)]
    waveform = load_file(folder / "batch.safetensors")["waveform"]
    (batch,) = PackedSource(PackedSet.open(tiny_sets.train), torch.device("cpu")).batches([plan])
    assert batch.waveform is not None and torch.equal(waveform, batch.waveform)
    weights = load_model(folder)[0].state_dict()
    assert all(torch.isfinite(x).all() for x in weights.values()), "BatchNorm's statistics too"
    assert str(folder) in (folder / "README.txt").read_text()
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1, "as the umask says"


@pytest.fixture(scope="module")
def skipped(tiny_sets: TinySets, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two epochs of four steps, of which step 6 was skipped."""
    out = tmp_path_factory.mktemp("skipped") / "run"
    with pytest.MonkeyPatch.context() as patch:
        run = trainer(tiny_sets, out, on_nan="skip", checkpoint_every_steps=1)
        poison(patch, run, {5})
        run.run_epochs()
    assert run.progress.left_out == [5]
    return out


def test_a_skipped_step_leaves_no_trace(skipped: Path) -> None:
    weights = load_file(skipped / "checkpoints" / "last" / "model.safetensors")
    assert all(torch.isfinite(x).all() for x in weights.values())
    lines = metrics(skipped)
    assert [line["step"] for line in lines] == [4, 8]
    assert all(0 < line["train_loss"] < 2 for line in lines), "the mean of the steps taken"


def test_resuming_after_a_skipped_step_equals_the_whole_run(
    skipped: Path, tiny_sets: TinySets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    run = trainer(tiny_sets, out, on_nan="skip", steps=7)
    poison(monkeypatch, run, {5})
    run.run_epochs()
    again = trainer(tiny_sets, out, on_nan="skip", resume=True)
    assert again.progress.left_out == [5]
    again.run_epochs()
    assert_same_run(out, skipped)


def test_too_many_skipped_steps_in_a_row_stop_the_run(
    tiny_sets: TinySets,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = trainer(tiny_sets, tmp_path / "run", on_nan="skip", epochs=4, eval=None)
    poison(monkeypatch, run, set(range(1, 16)))
    with pytest.raises(Failure, match="not finite at step 12; .*11th in a row"):
        run.run_epochs()
    assert run.progress.left_out == list(range(1, 11))
    assert capsys.readouterr().err.count("left out so far") == nonfinite.MAX_IN_A_ROW
    kept = list((tmp_path / "run" / "nonfinite").iterdir())
    assert len(kept) == nonfinite.MAX_RECORDED
    assert metrics(tmp_path / "run")[1]["train_loss"] is None, "no step of this epoch was taken"


def never_had(sets: TinySets, run: Path, steps: list[int], **overrides: Any) -> Path:
    """The run without these steps."""
    clean = trainer(sets, run, **overrides)
    clean.progress.left_out = steps
    clean.run_epochs()
    return run


@pytest.mark.parametrize("every", [None, 1], ids=["epochs", "steps"])
def test_a_run_rolled_back_is_the_one_that_never_had_the_step(
    tiny_sets: TinySets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int | None
) -> None:
    """Step 2 goes back to the start, steps 6 and 7 to where the last checkpoint is."""
    run = trainer(tiny_sets, tmp_path / "run", on_nan="rollback", checkpoint_every_steps=every)
    poison(monkeypatch, run, {1, 5, 6})
    run.run_epochs()
    assert run.progress.left_out == [1, 5, 6]
    assert_same_run(tmp_path / "run", never_had(tiny_sets, tmp_path / "clean", [1, 5, 6]))


def test_a_run_may_be_rolled_back_into_the_epoch_before(
    tiny_sets: TinySets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint between was not written; the epoch has one line of metrics all the same."""
    failed: list[int] = []

    def full_once(folder: Path, step: int, *args: Any, **options: Any) -> None:
        if step == 4 and not failed:
            failed.append(step)
            raise Failure("cannot write checkpoint 4")
        write_checkpoint(folder, step, *args, **options)

    monkeypatch.setattr(checkpoint_writer, "write_checkpoint", full_once)
    run = trainer(tiny_sets, tmp_path / "run", on_nan="rollback")
    poison(monkeypatch, run, {5})
    run.run_epochs()
    assert failed == [4]
    assert_same_run(tmp_path / "run", never_had(tiny_sets, tmp_path / "clean", [5]))


def test_a_run_rolled_back_and_killed_resumes_to_the_same_end(
    tiny_sets: TinySets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before and after a checkpoint knows of the step: it is found again, or left out."""
    for steps in (4, 6):
        out = tmp_path / f"run-{steps}"
        run = trainer(tiny_sets, out, on_nan="rollback", steps=steps)
        poison(monkeypatch, run, {5})
        run.run_epochs()
        again = trainer(tiny_sets, out, on_nan="rollback", resume=True)
        assert again.progress.left_out == ([5] if steps == 6 else [])
        again.run_epochs()
        assert again.progress.left_out == [5]
        monkeypatch.undo()
    assert_same_run(tmp_path / "run-4", never_had(tiny_sets, tmp_path / "clean", [5]))
    assert_same_run(tmp_path / "run-6", tmp_path / "clean")


def test_too_many_rollbacks_in_an_epoch_stop_the_run(
    tiny_sets: TinySets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trainer(tiny_sets, tmp_path / "run", on_nan="rollback", eval=None)
    poison(monkeypatch, run, {3, 4, 5, 6, 7})
    with pytest.raises(Failure, match="not finite at step 8; .*3 rollbacks in its epoch"):
        run.run_epochs()
    assert run.progress.left_out == [3, 4, 5, 6]


def test_a_gradient_that_is_not_finite_leaves_the_statistics_alone(
    tiny_sets: TinySets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss and the clips are finite: BatchNorm has taken in a batch that was not trained on."""
    run = trainer(tiny_sets, tmp_path / "run", on_nan="skip", steps=1, eval=None)
    before = {name: x.clone() for name, x in run.raw_model.state_dict().items()}
    last = run.network.params[-1]
    last.register_hook(lambda gradient: gradient * torch.nan)
    run.run_epochs()
    assert run.progress.left_out == [0]
    after = run.raw_model.state_dict()
    assert all(torch.equal(after[name], x) for name, x in before.items())


@pytest.mark.parametrize(
    ("on_nan", "step", "left_out", "stops"),
    [
        ("stop", 5, [], True),
        ("skip", 0, [], False),
        ("skip", 20, list(range(11, 20)), False),
        ("skip", 20, list(range(10, 20)), True),
        ("skip", 20, [*range(5, 15), *range(16, 20)], False),
        ("rollback", 7, [0, 1, 2], False),
        ("rollback", 7, [4, 5], False),
        ("rollback", 7, [4, 5, 6], True),
    ],
)
def test_what_ends_a_run(on_nan: str, step: int, left_out: list[int], stops: bool) -> None:
    assert (why_stop(on_nan, step, left_out, steps_per_epoch=4) is not None) == stops


@pytest.mark.parametrize("flag", [0.0, 1.0])
def test_buffers_are_put_back_where_the_flag_says_so(flag: float) -> None:
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3))
    guard = BufferGuard(model)
    model(torch.randn(2, 1, 8, 8))
    before = {name: b.clone() for name, b in model.named_buffers()}
    guard.remember()
    model(torch.full((2, 1, 8, 8), torch.nan))
    guard.undo_if(torch.tensor(flag))
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name]) == (flag == 1), name
    assert len(before) == 3


def test_progress_counts_the_steps_taken() -> None:
    assert Progress(step=8, left_out=[1, 5, 7, 9]).taken(4) == 2


# --------------------------------------------------------------------------------- reproducing
@pytest.fixture(scope="module")
def kept(tiny_sets: TinySets, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recorded step: log-mels, of which those of clip 3 are infinite."""
    run = trainer(tiny_sets, tmp_path_factory.mktemp("kept") / "run", mixup=0.0)
    plan = run.sampler.plan(0, 0)
    (batch,) = run.data.source.batches([plan])
    assert batch.waveform is not None
    log_mel = run.frontend.log_mel(batch.waveform.float() / 32768)
    log_mel[3] = torch.inf
    batch = Batch(batch.rows, batch.target, batch.num_samples, batch.augment, log_mel=log_mel)
    folder = run.run / "nonfinite" / "step-00000001"
    assert run.recorder.write(folder, plan, batch) == [run.data.train_set.names(plan.rows)[3]]
    return folder


def test_the_reproducer_finds_the_clip(kept: Path, tiny_sets: TinySets) -> None:
    """As README.txt in the folder says it is run."""
    (line,) = [x for x in (kept / "README.txt").read_text().splitlines() if "-m fastat" in x]
    _, *arguments = line.split()
    command = [sys.executable, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | QUIET)
    with (kept / "clips.csv").open() as file:
        clip = list(csv.DictReader(file))[3]["clip"]
    assert (done.returncode, done.stdout.splitlines()) == (
        0,
        [f"{clip}: the loss is not finite", "1 of 8 clips, each taken alone, are not finite"],
    ), done.stderr


def test_the_reproducer_finds_gradients(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def with_a_bad_gradient(*args: Any) -> tuple[nn.Module, ModelMeta]:
        model, meta = load_model(*args)
        list(model.parameters())[-1].register_hook(lambda gradient: gradient * torch.nan)
        return model, meta

    monkeypatch.setattr(nonfinite, "load_model", with_a_bad_gradient)
    found = nonfinite.reproduce(kept)
    assert [loss for _, loss, _ in found] == [i != 3 for i in range(8)]
    assert not any(gradient for _, _, gradient in found)


def test_the_reproducer_goes_backward_through_crnn(
    kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clips alone, so in evaluation mode, but for the GRU: cuDNN's has no backward pass there."""
    seen: list[tuple[bool, bool]] = []

    def crnn(*args: Any) -> tuple[nn.Module, ModelMeta]:
        meta = load_model(*args)[1]
        model = create_model(
            "crnn", num_mels=64, num_frames=meta.num_frames, num_classes=3, embedding=64
        ).eval()
        assert isinstance(model, Crnn)
        gru = model.gru
        gru.register_forward_pre_hook(lambda *_: seen.append((gru.training, model.training)))
        return model, meta

    monkeypatch.setattr(nonfinite, "load_model", crnn)
    found = nonfinite.reproduce(kept)
    assert [loss for _, loss, _ in found] == [i != 3 for i in range(8)]
    assert seen == [(True, False)] * 8


def test_the_reproducers_own_errors_are_one_line(
    kept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match="no recorded step"):
        nonfinite.reproduce(tmp_path)
    assert nonfinite.main([]) == 2
    assert nonfinite.main([str(tmp_path)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_what_cannot_be_kept_does_not_hide_the_step(
    tiny_sets: TinySets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trainer(tiny_sets, tmp_path / "run", eval=None)
    poison(monkeypatch, run, {1})

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(nonfinite.Recorder, "write", full)
    with pytest.raises(Failure, match=r"step 2; .*could not be kept in .*No space left"):
        run.run_epochs()
    assert run.progress.step == 2


def test_the_random_numbers_do_not_depend_on_keeping(
    tiny_sets: TinySets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps beyond those that are kept, and those that are, leave the same run."""
    for name, limit in (("kept", 10), ("unkept", 0)):
        monkeypatch.setattr(nonfinite, "MAX_RECORDED", limit)
        run = trainer(tiny_sets, tmp_path / name, on_nan="skip")
        poison(monkeypatch, run, {1})
        run.run_epochs()
        monkeypatch.undo()
    assert_same_run(tmp_path / "kept", tmp_path / "unkept")
    assert not (tmp_path / "unkept" / "nonfinite").exists()


def test_weights_that_overflow_are_recorded_whole(tiny_sets: TinySets, tmp_path: Path) -> None:
    """A rate that blows the weights up: every clip alone gives a loss that is not finite."""
    run = trainer(tiny_sets, tmp_path / "run", lr=1e30, precision="fp32", eval=None)
    with pytest.raises(Failure, match="not finite at step"):
        run.run_epochs()
    (folder,) = (tmp_path / "run" / "nonfinite").iterdir()
    assert not any(loss for _, loss, _ in nonfinite.reproduce(folder))
