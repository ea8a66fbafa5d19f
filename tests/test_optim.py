"""Which Adam is taken, with what; a step that is not finite; a step computed in parts."""

import sys
import types
from collections.abc import Iterator
from contextlib import nullcontext
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastat.training.checkpoints import load_optimizer_state
from fastat.training.optim import create_adam, finite_flag, guarded_step, set_lr, train_step

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
BETAS = (0.9, 0.999)


@pytest.fixture(autouse=True)
def no_apex(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever is installed here, a test brings its own apex or none."""
    path = [p for p in sys.path if not (Path(p) / "apex").exists()]
    monkeypatch.setattr(sys, "path", path)
    for name in [*sys.modules]:
        if name.split(".")[0] in ("apex", "amp_C"):
            monkeypatch.delitem(sys.modules, name)
    yield
    for name in [*sys.modules]:  # what a test imported
        if name.split(".")[0] == "apex":
            del sys.modules[name]


def parameters() -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(5))]


def adam(params: list[nn.Parameter], device: torch.device) -> tuple[torch.optim.Optimizer, str]:
    return create_adam(params, lr=1e-3, betas=BETAS, weight_decay=0.01, device=device)


# ------------------------------------------------------------------------------------ whose Adam
class StubFusedAdam(torch.optim.Optimizer):
    """The contract of apex.optimizers.FusedAdam that we rely on, capturable, in plain torch.

    From its source (``apex/optimizers/fused_adam.py``): what the gradient scaler is asked, when the
    step of a group is counted, and that nothing moves where the overflow buffer is 1. L2 decay.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        set_grad_none: bool = True,
        capturable: bool = False,
        master_weights: bool = False,
    ) -> None:
        self.given = (lr, betas, eps, adam_w_mode, weight_decay, amsgrad, capturable)
        defaults = {"lr": torch.tensor(lr), "betas": betas, "eps": eps, "bias_correction": True}
        super().__init__(params, defaults | {"weight_decay": weight_decay})
        self._dummy_overflow_buf = torch.zeros(1, dtype=torch.int)

    def zero_grad(self) -> None:  # type: ignore[override]
        for p in (p for group in self.param_groups for p in group["params"]):
            p.grad = None

    def step(self, closure: Any = None, grad_scaler: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            device = group["params"][0].device
            if "step" in group:
                group["step"] += (self._dummy_overflow_buf != 1).to(torch.int)
            else:
                group["step"] = torch.tensor([1], dtype=torch.int)
            self._dummy_overflow_buf.copy_(grad_scaler._check_inf_per_device(self)[device])
            scale = grad_scaler._get_scale_async() if grad_scaler else torch.ones(1)
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if not self.state[p]:
                    moments = {n: torch.zeros_like(p) for n in ("exp_avg", "exp_avg_sq")}
                    self.state[p] = moments
                if self._dummy_overflow_buf == 1:
                    continue
                grad = p.grad / scale + group["weight_decay"] * p.detach()
                m, v = self.state[p]["exp_avg"], self.state[p]["exp_avg_sq"]
                m.lerp_(grad, 1 - beta1)
                v.lerp_(grad * grad, 1 - beta2)
                step = group["step"].float()
                denominator = (v / (1 - beta2**step)).sqrt() + group["eps"]
                p.data -= group["lr"] * (m / (1 - beta1**step)) / denominator


@pytest.fixture
def stub_apex(monkeypatch: pytest.MonkeyPatch) -> None:
    apex, optimizers = types.ModuleType("apex"), types.ModuleType("apex.optimizers")
    apex.optimizers = optimizers  # type: ignore[attr-defined]
    optimizers.FusedAdam = StubFusedAdam  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "apex", apex)
    monkeypatch.setitem(sys.modules, "apex.optimizers", optimizers)
    monkeypatch.setitem(sys.modules, "amp_C", types.ModuleType("amp_C"))


def test_nvidia_apex_on_cuda(stub_apex: None) -> None:
    optimizer, whose = adam(parameters(), CUDA)
    assert isinstance(optimizer, StubFusedAdam)
    assert whose == "NVIDIA apex FusedAdam"
    # L2 weight decay (adam_w_mode off), as in torch's Adam and in the paper's code.
    assert optimizer.given == (1e-3, BETAS, 1e-8, False, 0.01, False, True)
    assert len(optimizer.param_groups[0]["params"]) == 2


def test_groups_reach_both(stub_apex: None) -> None:
    first, second = parameters()
    groups = [{"params": [first], "lr_scale": 0.5}, {"params": [second], "lr_scale": 1.0}]
    for device in (CPU, CUDA):
        optimizer, _ = create_adam(
            ({**g} for g in groups), lr=1.0, betas=BETAS, weight_decay=0.0, device=device
        )
        assert [g["lr_scale"] for g in optimizer.param_groups] == [0.5, 1.0]
        assert [g["params"] for g in optimizer.param_groups] == [[first], [second]]


def test_a_generator_of_parameters_reaches_apex(stub_apex: None) -> None:
    params = parameters()
    optimizer, _ = create_adam(
        (p for p in params), lr=1.0, betas=BETAS, weight_decay=0.0, device=CUDA
    )
    assert optimizer.param_groups[0]["params"] == params


def test_torch_on_the_cpu_even_with_apex(stub_apex: None) -> None:
    optimizer, whose = adam(parameters(), CPU)
    assert type(optimizer) is torch.optim.Adam
    assert whose == "torch fused Adam (apex needs CUDA)"
    group = optimizer.param_groups[0]
    assert (group["lr"], group["betas"], group["weight_decay"]) == (1e-3, BETAS, 0.01)
    assert group["fused"] and not group["amsgrad"] and not group["decoupled_weight_decay"]


def test_torch_on_cuda_without_apex() -> None:
    optimizer, whose = adam(parameters(), CUDA)
    assert type(optimizer) is torch.optim.Adam
    assert whose == "torch fused Adam (NVIDIA apex is not installed)"


def test_apex_without_its_extensions_is_not_taken(
    stub_apex: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its FusedAdam raises RuntimeError when it is made."""
    monkeypatch.delitem(sys.modules, "amp_C")
    optimizer, whose = adam(parameters(), CUDA)
    assert type(optimizer) is torch.optim.Adam
    assert "without its CUDA extensions" in whose


@pytest.mark.parametrize(
    "source",
    [
        "VERSION = '0.9.10.dev0'\n",
        # What the real one does beside a current pyramid.
        "from os import UnencryptedCookieSessionFactoryConfig\n",
        "import a_web_framework_that_is_not_installed\n",
    ],
    ids=["importable", "broken name", "missing dependency"],
)
def test_pypis_apex_is_recognised_and_named(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    optimizer, whose = adam(parameters(), CUDA)
    assert type(optimizer) is torch.optim.Adam
    assert str(tmp_path) in whose and "is not NVIDIA's" in whose and "PyPI" in whose


# --------------------------------------------------------------------------------- finite or not
def set_gradients(params: list[nn.Parameter], seed: int, poison: float | None = None) -> None:
    torch.manual_seed(seed)
    for p in params:
        p.grad = torch.randn_like(p)
    if poison is not None:
        grad = params[1].grad
        assert grad is not None
        grad[2] = poison


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_a_bad_gradient_is_flagged(poison: float) -> None:
    params = parameters()
    set_gradients(params, 1)
    found_inf, norm = finite_flag(torch.tensor(1.0), params)
    want = torch.cat([p.grad.flatten() for p in params if p.grad is not None]).norm()
    assert found_inf.item() == 0 and found_inf.dtype == torch.float32 and found_inf.ndim == 0
    torch.testing.assert_close(norm, want)

    set_gradients(params, 1, poison)
    assert finite_flag(torch.tensor(1.0), params)[0].item() == 1
    set_gradients(params, 1)
    assert finite_flag(torch.tensor(poison), params)[0].item() == 1


def test_a_parameter_without_gradient_is_no_matter() -> None:
    params = parameters()
    set_gradients(params, 1)
    params[0].grad = None
    assert finite_flag(torch.tensor(1.0), params)[0].item() == 0


@pytest.mark.parametrize("bad_steps", [(), (0,), (2,), (0, 1, 3)])
def test_a_flagged_step_is_as_if_it_never_was(bad_steps: tuple[int, ...]) -> None:
    """Weights, moments and step count equal those of a plain Adam that only saw the good steps."""
    params, plain = parameters(), parameters()
    optimizer, _ = adam(params, CPU)
    reference = torch.optim.Adam(plain, lr=1e-3, betas=BETAS, weight_decay=0.01, fused=True)
    for step in range(5):
        if step in bad_steps:
            before = [p.detach().clone() for p in params]
            set_gradients(params, step, float("nan"))
            found_inf, _ = finite_flag(torch.tensor(1.0), params)
            guarded_step(optimizer, found_inf)
            for p, b in zip(params, before, strict=True):
                assert torch.equal(p, b)
        else:
            set_gradients(params, step)
            guarded_step(optimizer, finite_flag(torch.tensor(1.0), params)[0])
            set_gradients(plain, step)
            reference.step()
    for p, q in zip(params, plain, strict=True):
        assert torch.equal(p, q)
        mine: dict[str, Tensor] = optimizer.state[p]
        theirs: dict[str, Tensor] = reference.state[q]
        assert mine.keys() == theirs.keys()
        for name in mine:
            assert torch.equal(mine[name], theirs[name]), name


def test_a_whole_step_with_apex(stub_apex: None) -> None:
    model = network().float()
    optimizer, _ = adam(list(model.parameters()), CUDA)
    before = [p.detach().clone() for p in model.parameters()]
    x, y = torch.randn(4, 5), torch.rand(4, 3)
    train_step(model, list(model.parameters()), optimizer, x, y, nullcontext())
    assert not any(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("bad_steps", [(), (0,), (1, 2), (0, 4)])
def test_apex_gets_the_flag_on_the_device(stub_apex: None, bad_steps: tuple[int, ...]) -> None:
    """Weights, moments and step count are those of a torch Adam that only saw the good steps."""
    params, plain = parameters(), parameters()
    optimizer, _ = adam(params, CUDA)
    reference = torch.optim.Adam(plain, lr=1e-3, betas=BETAS, weight_decay=0.01, fused=True)
    for step in range(5):
        bad = step in bad_steps
        set_gradients(params, step, float("nan") if bad else None)
        guarded_step(optimizer, finite_flag(torch.tensor(1.0), params)[0])
        if not bad:
            set_gradients(plain, step)
            reference.step()
    assert optimizer.param_groups[0]["step"].item() == 5 - len(bad_steps)
    for p, q in zip(params, plain, strict=True):
        torch.testing.assert_close(p, q)


def test_apex_gets_the_scale_of_the_gradients(stub_apex: None) -> None:
    """Weights are those of gradients that were never scaled, bit for bit: it is a power of two."""
    results = []
    for scale in (None, torch.tensor(2.0**14)):
        params = parameters()
        optimizer, _ = adam(params, CUDA)
        for step in range(3):
            set_gradients(params, step)
            for p in params:
                assert p.grad is not None
                p.grad *= 1 if scale is None else scale
            guarded_step(optimizer, torch.zeros(()), scale)
        results.append(params)
    assert all(torch.equal(p, q) for p, q in zip(*results, strict=True))


def test_the_learning_rate_on_cuda_is_a_tensor_of_each_group(stub_apex: None) -> None:
    """Which a captured step reads; on the CPU a number, as ever."""
    first, second = parameters()
    for device in (CPU, CUDA):
        groups = [{"params": [first], "lr_scale": 0.5}, {"params": [second], "lr_scale": 1.0}]
        optimizer, _ = create_adam(groups, lr=1.0, betas=BETAS, weight_decay=0.0, device=device)
        kept = [g["lr"] for g in optimizer.param_groups]
        set_lr(optimizer, 0.1)
        assert [float(g["lr"]) for g in optimizer.param_groups] == pytest.approx([0.05, 0.1])
        if device == CUDA:
            assert all(g["lr"] is lr for g, lr in zip(optimizer.param_groups, kept, strict=True))


# -------------------------------------------------------------------------------- its checkpoint
def stepped(
    device: torch.device, steps: int = 3
) -> tuple[torch.optim.Optimizer, list[nn.Parameter]]:
    params = parameters()
    groups = [{"params": [p], "lr_scale": s} for p, s in zip(params, (0.5, 1.0), strict=True)]
    optimizer, _ = create_adam(groups, lr=1e-3, betas=BETAS, weight_decay=0.01, device=device)
    take_more(optimizer, params, range(steps))
    return optimizer, params


def take_more(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], seeds: range) -> None:
    for seed in seeds:
        set_gradients(params, seed)
        set_lr(optimizer, 1e-3 / (seed + 1))
        guarded_step(optimizer, torch.zeros(()))


@pytest.mark.parametrize("apex", [False, True])
def test_adam_continues_from_its_checkpoint(stub_apex: None, apex: bool, tmp_path: Path) -> None:
    before, params = stepped(CUDA if apex else CPU)
    torch.save(before.state_dict(), tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    after, others = stepped(CUDA if apex else CPU, steps=1)
    load_optimizer_state(after, saved)
    for p, q in zip(params, others, strict=True):
        q.data.copy_(p)
    assert [g["lr_scale"] for g in after.param_groups] == [0.5, 1.0]
    assert isinstance(after.param_groups[0]["lr"], Tensor) == apex
    take_more(before, params, range(3, 6))
    take_more(after, others, range(3, 6))
    for p, q in zip(params, others, strict=True):
        assert torch.equal(p, q)


def test_a_cpus_state_leaves_the_tensors_of_the_learning_rates() -> None:
    """A captured step reads the rate in a tensor: a number in its place would stay what it is."""
    before, params = stepped(CPU)
    assert isinstance(before.param_groups[0]["lr"], float)
    after, others = stepped(CPU, steps=1)
    for group in after.param_groups:  # as create_adam has them on CUDA
        group["lr"] = torch.tensor(group["lr"])
    load_optimizer_state(after, deepcopy(before.state_dict()))
    assert all(isinstance(group["lr"], Tensor) for group in after.param_groups)
    rates = [group["lr"] for group in after.param_groups]
    for lr in (0.5, 0.25):
        for optimizer in (before, after):
            set_lr(optimizer, lr)
        assert [rate.item() for rate in rates] == [0.5 * lr, lr]
        assert all(g["lr"] is rate for g, rate in zip(after.param_groups, rates, strict=True))
        for p, q in zip(params, others, strict=True):
            q.data.copy_(p)
        moved = [q.detach().clone() for q in others]
        for optimizer, own in ((before, params), (after, others)):
            set_gradients(own, 7)
            guarded_step(optimizer, torch.zeros(()))
        for p, q, start in zip(params, others, moved, strict=True):
            torch.testing.assert_close(q, p)
            assert (q - start).abs().max() > 0.05 * lr


@pytest.mark.parametrize("bad", [False, True])
def test_a_flag_holds_for_every_group(bad: bool) -> None:
    params = parameters()
    groups = [{"params": [p]} for p in params]
    optimizer, _ = create_adam(groups, lr=1e-3, betas=BETAS, weight_decay=0.0, device=CPU)
    before = [p.detach().clone() for p in params]
    set_gradients(params, 0, float("nan") if bad else None)
    guarded_step(optimizer, finite_flag(torch.tensor(1.0), params)[0])
    assert [torch.equal(p, b) for p, b in zip(params, before, strict=True)] == [bad, bad]


# ------------------------------------------------------------------------------------- in parts
def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.GELU(), nn.Linear(7, 3)).double()


class KeepsGradients(torch.optim.Adam):
    """Keeps a copy of what it is stepped with."""

    def step(self, closure: Any = None) -> Any:
        self.seen = [p.grad.clone() for g in self.param_groups for p in g["params"]]
        self.steps = getattr(self, "steps", 0) + 1


def step_in_parts(
    accumulate: int, features: Tensor, target: Tensor
) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """One step: the gradients it was taken with, and what train_step returns."""
    model = network()
    params = list(model.parameters())
    optimizer = KeepsGradients(params, lr=0.0)
    loss, norm, flag = train_step(
        model, params, optimizer, features, target, nullcontext(), accumulate
    )
    assert optimizer.steps == 1
    return optimizer.seen, loss, norm, flag


def test_gradients_are_those_of_the_step_alone() -> None:
    """Not of those before it: a CPU drops theirs late."""
    model = network()
    params = list(model.parameters())
    optimizer = KeepsGradients(params, lr=0.0)
    batches = [(torch.randn(4, 5).double(), torch.rand(4, 3).double()) for _ in range(2)]
    for features, target in batches:
        train_step(model, params, optimizer, features, target, nullcontext(), 2)
    alone, *_ = step_in_parts(2, *batches[-1])
    assert all(torch.equal(a, b) for a, b in zip(optimizer.seen, alone, strict=True))


@pytest.mark.parametrize("accumulate", [2, 3, 6, 12])
def test_accumulated_gradients_are_the_whole_batchs(accumulate: int) -> None:
    """Without BatchNorm; the loss, in float32, and the gradient's norm too."""
    features, target = torch.randn(12, 5).double(), torch.rand(12, 3)
    whole = step_in_parts(1, features, target)
    parts = step_in_parts(accumulate, features, target)
    for mine, theirs in zip(parts[0], whole[0], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(parts[1:], whole[1:])
    assert parts[3].item() == 0


@pytest.mark.parametrize("row", [0, 5, 11])
def test_a_bad_part_flags_the_whole_step(row: int) -> None:
    features, target = torch.randn(12, 5).double(), torch.rand(12, 3)
    features[row] = float("nan")
    model = network()
    params = list(model.parameters())
    before = [p.detach().clone() for p in params]
    optimizer, _ = adam(params, CPU)
    loss, _, flag = train_step(model, params, optimizer, features, target, nullcontext(), 3)
    assert flag.item() == 1 and not loss.isfinite()
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))


def test_the_model_sees_one_part_at_a_time() -> None:
    sizes = []

    class Watched(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            sizes.append(len(x))
            return super().forward(x)

    model = Watched(5, 3)
    params = list(model.parameters())
    optimizer, _ = adam(params, CPU)
    train_step(model, params, optimizer, torch.randn(12, 5), torch.rand(12, 3), nullcontext(), 4)
    assert sizes == [3, 3, 3, 3]
