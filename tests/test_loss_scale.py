"""float16: the loss scale moves as GradScaler's, an overflow is no fault, and a run resumes."""

from contextlib import nullcontext
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastat.evaluation.evaluate import evaluate_checkpoint
from fastat.system.distributed import ALONE
from fastat.system.errors import Failure
from fastat.training import loss_scale
from fastat.training import step as stepping
from fastat.training.loss_scale import FIRST_SCALE, GROWTH_INTERVAL, LARGEST, LossScale
from fastat.training.optim import create_adam, train_step
from fastat.training.step import StepResult
from fastat.training.trainer import Trainer
from tests.conftest import TinySets, fastat
from tests.test_nonfinite import poison
from tests.test_step import CPU, NAMES, NoHostSync, inputs, small, step_of
from tests.test_train import arguments, assert_same_run, metrics, trainer

FINE, BAD = torch.tensor(0.0), torch.tensor(1.0)
LOSS = torch.tensor(0.7)


# ------------------------------------------------------------------------- the rule
def test_the_scale_moves_as_grad_scalers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Overflows at the start, at once after it grew, one step before it would grow, at random."""
    theirs = torch.amp.GradScaler("cpu")
    assert theirs.get_scale() == FIRST_SCALE
    assert theirs.get_growth_interval() == GROWTH_INTERVAL
    n = 20
    theirs.set_growth_interval(n)
    monkeypatch.setattr(loss_scale, "GROWTH_INTERVAL", n)
    flags = [True] * 2 + [False] * (n + 1) + [True] + [False] * (n - 1) + [True]
    draws = torch.rand(400, generator=torch.Generator().manual_seed(0)) < 0.03
    flags += draws.tolist()
    p = nn.Parameter(torch.zeros(()))
    optimizer = torch.optim.SGD([p], lr=0.0)
    theirs.scale(p)
    ours, seen = LossScale(CPU), []
    for i, bad in enumerate(flags):
        p.grad = torch.tensor(float("inf") if bad else 1.0)
        theirs.step(optimizer)
        theirs.update()
        assert ours.update(LOSS, BAD if bad else FINE).item() == bad
        assert ours.scale.item() == theirs.get_scale(), i
        seen.append(ours.scale.item())
    grown = sum(later > before for before, later in zip(seen, seen[1:], strict=False))
    assert grown > 5 and sum(draws) > 5


def test_an_overflow_at_1_is_a_fault_and_the_scale_stays() -> None:
    scale = LossScale(CPU)
    scale.scale.fill_(4)
    assert [scale.update(LOSS, BAD).item() for _ in range(4)] == [1, 1, 0, 0]
    assert scale.scale.item() == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_a_fault_at_any_scale_and_moves_nothing(value: float) -> None:
    scale = LossScale(CPU)
    scale.update(LOSS, FINE)
    assert scale.update(torch.tensor(value), BAD).item() == 0
    assert (scale.scale.item(), scale.good.item()) == (FIRST_SCALE, 1)


def test_the_scale_stays_finite() -> None:
    scale = LossScale(CPU)
    scale.scale.fill_(LARGEST)
    scale.good.fill_(GROWTH_INTERVAL - 1)
    scale.update(LOSS, FINE)
    assert (scale.scale.item(), scale.good.item()) == (LARGEST, 0)


# ------------------------------------------------------------------------- the step
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_scaled_step_is_the_step(accumulate: int) -> None:
    """In float32, which a power of two does not round: bit for bit, loss and norm too."""
    results = []
    for scale in (None, torch.tensor(2.0**20)):
        torch.manual_seed(1)
        model = small("conformer")
        params = list(model.parameters())
        adam, _ = create_adam(params, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.01, device=CPU)
        state: list[Tensor] = []
        for i in range(2):
            given = (model, params, adam, *inputs(i), nullcontext(), accumulate, ALONE, scale)
            state += train_step(*given)
        results.append([*state, *model.state_dict().values()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def gradient_of(model: nn.Module, precision: str) -> tuple[Tensor, StepResult]:
    """Of a first step: what Adam was given, as its first moment has it."""
    features, target = inputs(0)
    if hasattr(model, "trunk"):  # ResNet50: the CPU is slow at it
        features = features[:, :40]
    torch.manual_seed(2)
    step = step_of(model, CPU, precision=precision)
    with NoHostSync():
        taken = step(features, target, 1e-3)
    return torch.cat([s["exp_avg"].flatten() for s in step.optimizer.state.values()]) / 0.1, taken


@pytest.mark.parametrize("name", NAMES)
def test_a_step_in_half_precision_is_float32s(name: str) -> None:
    """To the error that rounding weights and features alone to half precision makes; and it does
    not wait for the device."""
    model = small(name)
    with torch.no_grad():
        for part, module in model.named_modules():
            if part.endswith("bn3"):  # ResNet50 at random: rounding turns its gradient around
                module.weight.mul_(0.1)
    rounded = deepcopy(model).half().float()
    half, taken = gradient_of(deepcopy(model), "fp16")
    want, _ = gradient_of(model, "fp32")
    bar = 6 * (gradient_of(rounded, "fp32")[0] - want).norm()
    assert (taken.found_inf.item(), taken.overflow.item()) == (0, 0)
    assert 0 < (half - want).norm() < bar < want.norm()
    torch.testing.assert_close(taken.norm.double(), half.double().norm(), rtol=1e-2, atol=0)


def test_a_step_that_overflows_moves_nothing_but_the_scale() -> None:
    model = small("cnn_trans")
    step = step_of(model, CPU, precision="fp16")
    assert step.loss_scale is not None
    step.loss_scale.scale.fill_(2.0**40)
    before = deepcopy(model.state_dict())
    taken = step(*inputs(0), 1e-3)
    assert (taken.found_inf.item(), taken.overflow.item()) == (1, 1)
    assert taken.loss.isfinite() and step.loss_scale.scale.item() == 2.0**39
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    step.loss_scale.scale.fill_(FIRST_SCALE)
    assert step(*inputs(0), 1e-3).found_inf.item() == 0
    assert not all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


# ------------------------------------------------------------------------- a run
@pytest.fixture
def overflowing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs in half precision begin with some steps that overflow, of the first epoch's four."""
    monkeypatch.setattr(loss_scale, "FIRST_SCALE", 2.0**17)


def run_half(sets: TinySets, run: Path, **overrides: Any) -> Trainer:
    return trainer(sets, run, precision="fp16", **overrides)


def scale_of(run: Path) -> tuple[float, int]:
    state = torch.load(run / "checkpoints" / "last" / "trainer.pt", weights_only=True)
    return state["loss_scale"]["scale"].item(), state["loss_scale"]["good"].item()


def test_overflows_are_no_faults_and_not_in_the_mean_loss(
    tiny_sets: TinySets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overflowing: None
) -> None:
    losses: list[float | None] = []

    def watched(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
        loss, norm, found_inf = train_step(*args)
        losses.append(None if found_inf else loss.item())
        return loss, norm, found_inf

    monkeypatch.setattr(stepping, "train_step", watched)
    run = run_half(tiny_sets, tmp_path / "run")
    run.run_epochs()
    assert run.progress.skipped == []
    for line, seen in zip(metrics(tmp_path / "run"), (losses[:4], losses[4:]), strict=True):
        taken = [x for x in seen if x is not None]
        assert line["overflows"] == len(seen) - len(taken)
        assert line["train_loss"] == pytest.approx(sum(taken) / len(taken), rel=1e-9)
    overflows = losses.count(None)
    assert 0 < overflows < 8
    assert scale_of(tmp_path / "run")[0] == 2.0 ** (17 - overflows)


@pytest.mark.parametrize("steps", [1, 4, 6], ids=["after an overflow", "epoch", "second epoch"])
def test_resuming_equals_the_whole_run(
    tiny_sets: TinySets, tmp_path: Path, overflowing: None, steps: int
) -> None:
    """Bit for bit: weights, moments, metrics, overflows, scale and count."""
    run_half(tiny_sets, tmp_path / "whole").run_epochs()
    run_half(tiny_sets, tmp_path / "run", steps=steps).run_epochs()
    again = run_half(tiny_sets, tmp_path / "run", resume=True)
    again.run_epochs()
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    assert scale_of(tmp_path / "run") == scale_of(tmp_path / "whole")


def test_a_gradient_that_is_never_finite_is_a_fault_once_the_scale_is_1(
    tiny_sets: TinySets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_scale, "FIRST_SCALE", 4.0)
    run = run_half(tiny_sets, tmp_path / "run", eval=None)
    run.network.params[-1].register_hook(lambda gradient: gradient * torch.nan)
    with pytest.raises(Failure, match="not finite at step 3 "):
        run.run_epochs()
    assert run.progress.overflows == 2


def test_a_step_with_a_loss_that_is_not_finite_stops_at_once(
    tiny_sets: TinySets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_half(tiny_sets, tmp_path / "run", eval=None)
    poison(monkeypatch, run, {5})
    with pytest.raises(Failure, match="not finite at step 6 "):
        run.run_epochs()
    overflows = metrics(tmp_path / "run")[0]["overflows"] + run.progress.overflows
    assert run.step.loss_scale is not None and overflows < 5
    assert run.step.loss_scale.scale.item() == FIRST_SCALE / 2**overflows


def test_the_command_line_trains_and_scores_in_half_precision(
    tiny_sets: TinySets, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    done = fastat(*arguments(tiny_sets, run, "--precision", "fp16", "--epochs", 1))
    assert ", fp16 on " in done.stderr
    (line,) = metrics(run)
    assert 0 <= line["overflows"] < 4 and f"mAP {line['mAP']:.4f}" in done.stderr
    options: dict[str, Any] = {"predictions": None, "per_class": None}
    again = evaluate_checkpoint(run, tiny_sets.eval, batch=64, precision="fp16", **options)
    assert again["eval_loss"] == pytest.approx(line["eval_loss"], abs=1e-6)
