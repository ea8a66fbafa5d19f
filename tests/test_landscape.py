"""fastat landscape: curvature against differences and dense Hessians, the slice, the plot."""

import json
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastat.cli import study
from fastat.config.run import TrainConfig
from fastat.models import create_model
from fastat.study.landscape import (
    Landscape,
    LossSurface,
    Sharpness,
    Slice,
    dot,
    filter_normalised,
    loss_slice,
    sharpness,
)
from fastat.study.landscape_plot import draw
from fastat.system.errors import Failure, UserError
from tests.conftest import SMALL_MODELS, TINY_MODEL, TinySets, fastat

CLIPS, FRAMES, MELS, CLASSES = 3, 32, 64, 3


def small_model(name: str) -> nn.Module:
    model = create_model(
        name, num_mels=MELS, num_frames=FRAMES, num_classes=CLASSES, **SMALL_MODELS[name]
    )
    for module in model.modules():  # as if trained: norms that are more than the identity
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean = 0.1 * torch.randn(module.num_features)
            module.running_var = 0.5 + torch.rand(module.num_features)
    return model


def small_batches(dtype: torch.dtype = torch.float32) -> list[tuple[Tensor, Tensor]]:
    """Two batches of unequal size."""
    x = torch.randn(CLIPS, FRAMES, MELS, dtype=dtype)
    y = (torch.rand(CLIPS, CLASSES) < 0.4).to(dtype)
    return [(x[:2], y[:2]), (x[2:], y[2:])]


def gradient(surface: LossSurface) -> list[Tensor]:
    """Of the loss on all clips, in one piece."""
    x, y = (torch.cat(parts) for parts in zip(*surface.batches, strict=True))
    with torch.enable_grad():
        loss = F.binary_cross_entropy_with_logits(surface.model(x), y)
        return list(torch.autograd.grad(loss, surface.parameters, materialize_grads=True))


@contextmanager
def moved(surface: LossSurface, v: list[Tensor], step: float) -> Iterator[None]:
    before = [p.detach().clone() for p in surface.parameters]
    with torch.no_grad():
        for p, d in zip(surface.parameters, v, strict=True):
            p.add_(d, alpha=step)
    yield
    with torch.no_grad():
        for p, start in zip(surface.parameters, before, strict=True):
            p.copy_(start)


def product_by_differences(surface: LossSurface, v: list[Tensor], step: float) -> list[Tensor]:
    with moved(surface, v, step):
        ahead = gradient(surface)
    with moved(surface, v, -step):
        behind = gradient(surface)
    return [(a - b) / (2 * step) for a, b in zip(ahead, behind, strict=True)]


SIX = [
    pytest.param(name, marks=pytest.mark.full if name == "resnet34" else ())
    for name in SMALL_MODELS
]


@pytest.mark.parametrize("name", SIX)
def test_products_are_the_gradient_s_differences(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64, where a step is so small that no ReLU and no maximum changes its mind."""
    monkeypatch.setattr(torch.Tensor, "float", lambda x: x)  # the models' float32 heads
    surface = LossSurface(small_model(name).double(), small_batches(torch.float64))
    v = filter_normalised(surface.parameters, seed=1)
    got = surface.hessian_product(v)
    want = product_by_differences(surface, v, 1e-7)
    error = [g - w for g, w in zip(got, want, strict=True)]
    assert dot(error, error).sqrt() < 1e-4 * dot(want, want).sqrt()
    assert dot(want, want) > 0


@pytest.mark.parametrize("name", ["transformer", "crnn"])
def test_sharpness_is_the_largest_eigenvalue_of_the_dense_hessian(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a few vectors, before attention or in the GRU: a column for each of their numbers."""
    monkeypatch.setattr(torch.Tensor, "float", lambda x: x)
    model = small_model(name).double()
    ends = ("proj_norm.bias", "bias_ih_l0_reverse", "fc_att.bias", "fc_prob.bias")
    chosen = [p for n, p in model.named_parameters() if n.endswith(ends)]
    surface = LossSurface(model, small_batches(torch.float64))
    surface.parameters = chosen
    columns = []
    for i, p in enumerate(chosen):
        for j in range(len(p)):
            unit = [torch.zeros_like(q) for q in chosen]
            unit[i][j] = 1
            columns.append(torch.cat(product_by_differences(surface, unit, 1e-6)).numpy())
    want = np.linalg.eigvalsh(np.array(columns))
    got = sharpness(surface, tolerance=1e-3, max_iterations=1000)
    assert len(chosen) == 3 and want[0] < -1e-3 * want[-1]
    assert got.converged and got.eigenvalue == pytest.approx(want[-1], rel=2e-3)


class Quadratic(nn.Module):
    """A stand-in for a model: the loss's Hessian in ``w`` is known."""

    def __init__(self, eigenvalues: list[float]) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(len(eigenvalues)))
        torch.manual_seed(3)
        basis = torch.linalg.qr(torch.randn(len(eigenvalues), len(eigenvalues)))[0]
        self.hessian = basis @ torch.diag(torch.tensor(eigenvalues)) @ basis.T

    def forward(self, x: Tensor) -> Tensor:
        # The cross-entropy with target 0 is log 2 + z / 2 around z = 0.
        z: Tensor = self.w @ self.hessian @ self.w
        return z.expand(len(x), 1)


@pytest.mark.parametrize(
    "eigenvalues",
    [
        [5.0, 1.0, 0.0, -1.0],
        [5.0, 4.5, 0.0, -5.0],  # two of the same magnitude: plain power iteration never settles
        [2.0, 0.1, 0.0, -9.0],  # it would find -9
        [0.0, 0.0, 0.0, 0.0],
    ],
)
def test_the_largest_eigenvalue_not_the_largest_magnitude(eigenvalues: list[float]) -> None:
    surface = LossSurface(Quadratic(eigenvalues), [(torch.zeros(2, 1), torch.zeros(2, 1))])
    got = sharpness(surface, tolerance=1e-3, max_iterations=300)
    assert got.converged
    assert got.eigenvalue == pytest.approx(eigenvalues[0], rel=1e-3, abs=1e-6)
    assert got.estimates[-1] == got.eigenvalue


def test_a_negative_eigenvalue_is_not_the_largest() -> None:
    """A coarse tolerance is met at it first, before the shift is as large as it must be."""
    small = np.random.default_rng(0).normal(0.0, 0.2, 998).tolist()
    surface = LossSurface(Quadratic([5.0, -100.0, *small]), [(torch.zeros(2, 1),) * 2])
    got = sharpness(surface, tolerance=0.3, max_iterations=300)
    assert got.converged and got.eigenvalue == pytest.approx(5.0, rel=0.3)


def test_what_does_not_converge_says_so() -> None:
    surface = LossSurface(Quadratic([5.0, 4.99, 1.0]), [(torch.zeros(2, 1), torch.zeros(2, 1))])
    got = sharpness(surface, tolerance=1e-6, max_iterations=3)
    assert not got.converged and len(got.estimates) == 3 and got.residual > 1e-6


def test_a_flat_loss() -> None:
    surface = LossSurface(Quadratic([0.0, 0.0]), [(torch.zeros(2, 1), torch.zeros(2, 1))])
    assert sharpness(surface) == Sharpness(0.0, 0.0, True, (0.0,))


def test_diverged_weights() -> None:
    model = nn.Linear(2, 1)
    with torch.no_grad():
        model.weight.fill_(math.nan)
    surface = LossSurface(model, [(torch.ones(2, 2), torch.ones(2, 1))])
    with pytest.raises(Failure, match="not finite"):
        sharpness(surface)


def test_a_direction_is_as_long_as_the_weights_filter_by_filter() -> None:
    model = small_model("cnn_trans")
    parameters = list(model.parameters())
    direction = filter_normalised(parameters, seed=2)
    for d, p in zip(direction, parameters, strict=True):
        if p.ndim == 1:
            assert not d.any()
        else:
            torch.testing.assert_close(d.flatten(1).norm(dim=1), p.flatten(1).norm(dim=1))
            assert not torch.equal(d, p)
    again = filter_normalised(parameters, seed=2)
    assert all(torch.equal(a, b) for a, b in zip(direction, again, strict=True))
    other = filter_normalised(parameters, seed=3)
    assert not torch.equal(direction[0], other[0])


def test_the_slice_and_that_weights_are_put_back() -> None:
    surface = LossSurface(small_model("conformer"), small_batches())
    before = {name: x.clone() for name, x in surface.model.state_dict().items()}
    direction = filter_normalised(surface.parameters)
    alphas = (-1.0, -0.5, 0.0, 0.5, 1.0)
    got = loss_slice(surface, direction, alphas)
    assert got.alphas == alphas
    assert got.losses[2] == surface.loss()
    with moved(surface, direction, 0.5):
        assert got.losses[3] == pytest.approx(surface.loss(), rel=1e-6)
    for name, x in surface.model.state_dict().items():
        assert torch.equal(x, before[name]), name


def test_activation_checkpointing_does_not_change_a_product() -> None:
    products = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = create_model(
            "transformer", num_mels=MELS, num_frames=FRAMES, num_classes=CLASSES,
            activation_checkpointing=checkpointing, **SMALL_MODELS["transformer"],
        )  # fmt: skip
        surface = LossSurface(model, small_batches())
        products.append(surface.hessian_product(filter_normalised(surface.parameters)))
    assert all(torch.equal(a, b) for a, b in zip(*products, strict=True))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("name", list(SMALL_MODELS))
def test_on_a_gpu_as_on_a_processor(name: str) -> None:
    model, batches = small_model(name), small_batches()
    v = filter_normalised(list(model.parameters()), seed=1)
    want = LossSurface(model, batches).hessian_product(v)
    model.cuda()
    on_gpu = [(x.cuda(), y.cuda()) for x, y in batches]
    got = LossSurface(model, on_gpu).hessian_product([x.cuda() for x in v])
    error = [g.cpu() - w for g, w in zip(got, want, strict=True)]
    assert dot(error, error).sqrt() < 1e-2 * dot(want, want).sqrt()


# ---------------------------------------------------------------------------- the command
@pytest.fixture(scope="module")
def run(tiny_sets: TinySets, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("landscape") / "run"
    fastat(
        "train", "--proc", "A4", "--model", "cnn_trans", "--data", tiny_sets.train, "--eval",
        tiny_sets.eval, "--out", folder, "--steps", 3, *TINY_MODEL,
    )  # fmt: skip
    return folder


def test_the_command(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plot = tmp_path / "l.png"
    options = ("--clips", 6, "--batch", 4, "--max-iterations", 4)
    done = fastat("landscape", run, *options, "--plot", plot, "--json")
    (found,) = json.loads(done.stdout)
    assert (found["clips"], found["classes"], found["model"]) == (6, 3, "cnn_trans")
    alphas = found["slice"]["alphas"]
    assert (len(alphas), alphas[0], alphas[20], alphas[-1]) == (41, -1.0, 0.0, 1.0)
    assert found["slice"]["losses"][20] == pytest.approx(found["loss"], rel=1e-6)
    assert found["sharpness"]["estimates"][-1] == found["sharpness"]["eigenvalue"]
    assert "iteration 1, eigenvalue" in done.stderr
    assert not found["sharpness"]["converged"] and "not converged after 4" in done.stderr
    assert plot.read_bytes().startswith(b"\x89PNG") and plot.stat().st_size > 20_000
    config = TrainConfig.load(run / "config.json")
    assert config.eval is not None
    assert found["precision"] == config.precision
    study.landscape([run, run], clips=6, batch=4, max_iterations=1)
    shown = capsys.readouterr().out
    assert shown.count(f"{found['slice']['losses'][-1]:.4f}") == 2  # the last column is there
    assert shown.count(f"{found['loss']:.4f}") == 2  # the same clips again


def test_the_loss_is_that_of_the_evaluation(run: Path) -> None:
    done = fastat("landscape", run, "--clips", 1000, "--max-iterations", 1, "--json")
    (found,) = json.loads(done.stdout)
    (epoch,) = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    # The two round differently in bfloat16; in float32 they agree to 1e-7.
    assert found["loss"] == pytest.approx(epoch["eval_loss"], rel=1e-3)


def test_mistakes_are_found_before_the_work(run: Path, tmp_path: Path) -> None:
    for wrong, message in (
        ({"runs": [run, tmp_path / "nowhere"]}, "nowhere does not exist"),
        ({"runs": [run / "checkpoints" / "best"]}, "the set by --data"),
        ({"plot": tmp_path}, "--plot takes a file"),
        ({"plot": tmp_path / "nowhere" / "x.png"}, "there is no folder"),
        ({"data": tmp_path}, "no dataset.json"),
    ):
        with pytest.raises(UserError, match=message):
            study.landscape(**({"runs": [run]} | wrong))


def test_a_run_without_an_evaluation_set(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    document = json.loads((run / "config.json").read_text()) | {"eval": None}
    (copy / "config.json").write_text(json.dumps(document))
    with pytest.raises(UserError, match="give the set by --data"):
        study.landscape([copy])


def test_the_picture_shows_what_was_found() -> None:
    def found(name: str, scale: float, converged: bool) -> Landscape:
        losses = (scale, 0.1, 2 * scale)
        return Landscape(
            run=f"runs/{name}", model="crnn", parameters=1, data="set", clips=1, classes=1,
            precision="fp32", loss=0.1, sharpness=Sharpness(scale, 0.1, converged, (scale,)),
            slice=Slice((-1.0, 0.0, 1.0), losses),
        )  # fmt: skip

    slices, bars = draw([found("a$b$", 0.3, True), found("crnn-b", 40.0, False)]).axes
    assert [np.asarray(line.get_ydata()).tolist() for line in slices.lines] == [
        [0.3, 0.1, 0.6],
        [40.0, 0.1, 80.0],
    ]
    assert slices.get_yscale() == "log"
    widths = [patch.get_window_extent().width for patch in bars.patches]
    assert widths[1] == pytest.approx(widths[0] * 40.0 / 0.3)
    assert [t.get_text() for t in bars.get_yticklabels()] == [
        "a$b$ (crnn)",
        "crnn-b (crnn)\nnot converged",
    ]
    assert [t.get_text() for t in bars.texts] == ["0.3", "40"]
    assert draw([found("a", 0.3, True)]).axes[0].get_yscale() == "linear"


@pytest.mark.parametrize(("suited", "want"), [("bf16", "bf16"), ("fp16", "fp32")])
def test_second_derivatives_are_not_left_to_float16(
    suited: str,
    want: str,
    tiny_sets: TinySets,
    run: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given: list[str] = []

    def landscape(*_: object, precision: str, **__: object) -> NoReturn:
        given.append(precision)
        raise Failure("seen")

    monkeypatch.setattr("fastat.system.device.choose_precision", lambda asked, device: suited)
    monkeypatch.setattr("fastat.study.landscape.landscape", landscape)
    with pytest.raises(Failure, match="seen"):
        study.landscape([run], data=tiny_sets.eval, clips=4, batch=4, max_iterations=1)
    assert given == [want]
