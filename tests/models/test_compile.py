"""Models under torch.compile: one graph, gradients as good as eager's, few recompiles."""

import copy
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from fastat.models import list_models
from tests.models.test_models import batch, small

MODELS = list_models()
ONE_RESNET = [name for name in MODELS if name != "resnet50"]
"""ResNet34 runs the same code as ResNet50, with smaller blocks."""

QUICK = [(name, False) for name in ONE_RESNET if name != "resnet34"] + [("cnn_trans", True)]
"""Model and checkpointing; the others take minutes."""

GRAPHS = dict.fromkeys(MODELS, 1) | {"crnn": 2}
"""CRNN breaks at its GRU, once."""


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def one_step(model: nn.Module, run: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Logits, gradients and buffers after a forward and a backward pass of ``run``."""
    logits = run(x)
    F.binary_cross_entropy_with_logits(logits, y).backward()
    grads = {f"grad of {key}": p.grad for key, p in model.named_parameters() if p.grad is not None}
    buffers = {key: b for key, b in model.named_buffers() if b.is_floating_point()}
    return {"logits": logits.detach(), **grads, **buffers}


def assert_as_good_as_eager(
    name: str, checkpointing: bool, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Distance to float64 at most twice eager's, of logits, every gradient, every statistic.

    Allowed beside it: 1e-6 of the tensor or of the largest gradient, since a gradient may be zero
    but for rounding, or eager happen to be exact.
    """
    model = small(name, activation_checkpointing=checkpointing)
    x, y = batch()
    compiled = copy.deepcopy(model)
    got = one_step(
        compiled,
        torch.compile(compiled, fullgraph=GRAPHS[name] == 1, backend=backend),  # type: ignore[arg-type]
        x,
        y,
    )
    eager = copy.deepcopy(model)
    plain = one_step(eager, eager, x, y)
    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "float", Tensor.double)  # what models do in float32 whatever comes
        model.double()
        exact = one_step(model, model, x.double(), y.double())
    assert got.keys() == plain.keys() == exact.keys()
    largest = max(t.norm().item() for key, t in exact.items() if key.startswith("grad"))
    for key, want in exact.items():
        assert got[key].dtype == plain[key].dtype
        error, eager_error = ((t[key].double() - want).norm().item() for t in (got, plain))
        limit = 2 * eager_error + 1e-6 * max(want.norm().item(), largest)
        assert error <= limit, f"{key}: {error:.3g} from float64, eager {eager_error:.3g}"


@pytest.mark.parametrize(("name", "checkpointing"), QUICK)
def test_aot_autograd(name: str, checkpointing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_as_good_as_eager(name, checkpointing, "aot_eager", monkeypatch)


@pytest.mark.full
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_inductor(name: str, checkpointing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_as_good_as_eager(name, checkpointing, "inductor", monkeypatch)


@pytest.mark.parametrize("checkpointing", [False, pytest.param(True, marks=pytest.mark.full)])
@pytest.mark.parametrize("name", ONE_RESNET)
def test_three_shapes_cost_two_recompiles_and_a_fourth_none(name: str, checkpointing: bool) -> None:
    counter = CompileCounter()
    model = small(name, activation_checkpointing=checkpointing)
    compiled = torch.compile(model, fullgraph=GRAPHS[name] == 1, backend=counter)
    graphs = []
    for num_clips, num_frames in ((2, 64), (3, 96), (5, 131), (4, 163)):
        compiled(batch(num_clips, num_frames)[0])
        graphs.append(counter.frame_count)
    assert graphs[0] == GRAPHS[name]
    assert graphs[2] <= 3 * GRAPHS[name]
    assert graphs[3] == graphs[2]
