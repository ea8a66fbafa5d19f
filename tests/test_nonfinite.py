"""Steps that are not finite: stop and skip."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fastat.audio.frontend import Frontend
from fastat.data.loader import Batch
from fastat.system.errors import Failure
from fastat.training.nonfinite import MAX_IN_A_ROW, BufferGuard, reason_to_stop
from fastat.training.run_folder import Progress
from fastat.training.trainer import Trainer
from tests.conftest import TinySets
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


def test_an_infinite_feature_stops_the_run_and_names_the_clips(
    tiny_sets: TinySets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trainer(tiny_sets, tmp_path / "run", mixup=1.0)
    poison(monkeypatch, run, {5})
    with pytest.raises(Failure, match="not finite at step 6;") as error:
        run.run_epochs()
    plan = run.sampler.plan(1, 1)
    clips, partners = run.data.train_set.names(plan.rows), run.data.train_set.names(plan.partners)
    assert all(name in str(error.value) for name in clips + partners)
    weights = run.raw_model.state_dict().values()
    assert all(torch.isfinite(x).all() for x in weights), "BatchNorm's statistics too"


@pytest.fixture(scope="module")
def skipped(tiny_sets: TinySets, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two epochs of four steps, of which step 6 was skipped."""
    out = tmp_path_factory.mktemp("skipped") / "run"
    with pytest.MonkeyPatch.context() as patch:
        run = trainer(tiny_sets, out, on_nan="skip", checkpoint_every_steps=1)
        poison(patch, run, {5})
        run.run_epochs()
    assert run.progress.skipped == [5]
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
    assert again.progress.skipped == [5]
    again.run_epochs()
    assert_same_run(out, skipped)


def test_too_many_skipped_steps_in_a_row_stop_the_run(
    tiny_sets: TinySets,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    run = trainer(tiny_sets, tmp_path / "run", on_nan="skip", epochs=4, eval=None)
    poison(monkeypatch, run, set(range(1, 16)))
    with pytest.raises(Failure, match="not finite at step 12; .*11th in a row"):
        run.run_epochs()
    assert run.progress.skipped == list(range(1, 11))
    assert caplog.text.count("skipped so far") == MAX_IN_A_ROW
    assert metrics(tmp_path / "run")[1]["train_loss"] is None, "no step of this epoch was taken"


def test_a_gradient_that_is_not_finite_leaves_the_statistics_alone(
    tiny_sets: TinySets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss and the clips are finite: BatchNorm has taken in a batch that was not trained on."""
    run = trainer(tiny_sets, tmp_path / "run", on_nan="skip", steps=1, eval=None)
    before = {name: x.clone() for name, x in run.raw_model.state_dict().items()}
    last = run.network.params[-1]
    last.register_hook(lambda gradient: gradient * torch.nan)
    run.run_epochs()
    assert run.progress.skipped == [0]
    after = run.raw_model.state_dict()
    assert all(torch.equal(after[name], x) for name, x in before.items())


@pytest.mark.parametrize(
    ("on_nan", "step", "skipped", "stops"),
    [
        ("stop", 5, [], True),
        ("skip", 0, [], False),
        ("skip", 20, list(range(11, 20)), False),
        ("skip", 20, list(range(10, 20)), True),
        ("skip", 20, [*range(5, 15), *range(16, 20)], False),
    ],
)
def test_what_ends_a_run(on_nan: str, step: int, skipped: list[int], stops: bool) -> None:
    assert (reason_to_stop(on_nan, step, skipped) is not None) == stops


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
    assert Progress(step=8, skipped=[1, 5, 7, 9]).taken(4) == 2
