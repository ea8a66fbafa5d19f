"""The training step: nothing in it waits for the device, and a graph of it is the same step."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastat.audio.frontend import Augment, Frontend
from fastat.models import create_model
from fastat.system.distributed import ALONE, Ranks
from fastat.training.loss_scale import LossScale
from fastat.training.nonfinite import BufferGuard
from fastat.training.optim import create_adam, finite_flag, train_step
from fastat.training.readback import BEHIND, DelayedReadback
from fastat.training.step import WARM_UP, StepResult, TrainingStep, why_not_captured
from tests.conftest import SMALL_MODELS, TinySets, fastat
from tests.test_train import arguments

NAMES = [name for name in SMALL_MODELS if name != "resnet34"]
CPU, CUDA, META = (torch.device(name) for name in ("cpu", "cuda", "meta"))
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
CLIPS, PARTNERS, SAMPLES = 4, 2, 40_000


def small(name: str, device: torch.device = CPU, **options: Any) -> nn.Module:
    with device:
        model = create_model(
            name, num_mels=64, num_frames=100, num_classes=5, **SMALL_MODELS[name], **options
        )
    return model.to(memory_format=torch.channels_last).train()


def step_of(
    model: nn.Module, device: torch.device, *, graph: bool = False, precision: str = "bf16"
) -> TrainingStep:
    params = list(model.parameters())
    optimizer, _ = create_adam(
        [{"params": params[:3], "lr_scale": 0.5}, {"params": params[3:], "lr_scale": 1.0}],
        lr=1e-3,
        betas=(0.9, 0.999),
        weight_decay=0.0,
        device=device,
    )
    guard = BufferGuard(model)
    return TrainingStep(
        model, params, optimizer, precision=precision, device=device, guard=guard, graph=graph
    )


def inputs(seed: int, device: torch.device = CPU) -> tuple[Tensor, Tensor]:
    draws = torch.Generator().manual_seed(seed)
    x = torch.randn(CLIPS, 100, 64, generator=draws)
    return x.to(device), torch.rand(CLIPS, 5, generator=draws).to(device)


# ------------------------------------------------------------------------- nothing waits
class WaitsForTheDevice(AssertionError):
    pass


class NoHostSync(TorchDispatchMode):
    """Raises where an operator hands a number or a shape that depends on one to the host."""

    FORBIDDEN = (
        "_local_scalar_dense", "item", "nonzero", "masked_select", "is_nonzero", "equal",
        "allclose", "unique_dim", "_unique2", "unique_consecutive", "bincount",
    )  # fmt: skip

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masks = name in ("index", "index_put", "index_put_", "_index_put_impl_") and any(
            isinstance(i, Tensor) and i.dtype == torch.bool for i in args[1]
        )
        if name in self.FORBIDDEN or masks:
            raise WaitsForTheDevice(name)
        devices = {x.device.type for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        out = func(*args, **(kwargs or {}))
        made = {x.device.type for x in tree_leaves(out) if isinstance(x, Tensor)}
        if name in ("_to_copy", "copy_") and len(devices | made) > 1:
            raise WaitsForTheDevice(f"{name}: {devices} -> {made}")
        return out


@pytest.mark.parametrize("name", NAMES)
def test_no_model_waits_for_the_device(name: str) -> None:
    """Steps on the CPU; then features, forward and flag on fake tensors of a GPU, which have no
    numbers to hand out, and take the branches that a CPU does not."""
    step = step_of(small(name), CPU)
    given = [inputs(i) for i in range(2)]
    with NoHostSync():
        for features, target in given:
            step(features, target, 1e-3)

    model = small(name, META)
    with FakeTensorMode(), torch.no_grad():
        make_fake(model, CUDA)
        frontend = fake_frontend()
        with CUDA:
            waveform = torch.empty(CLIPS + PARTNERS, SAMPLES, dtype=torch.int16)
            augment = Augment(
                torch.empty(PARTNERS, dtype=torch.int64),
                torch.empty(PARTNERS),
                torch.empty(CLIPS, 2, dtype=torch.int64),
                torch.empty(CLIPS, 2, dtype=torch.int64),
            )
            num_samples = torch.empty(CLIPS + PARTNERS, dtype=torch.int64)
        guard, scale = BufferGuard(model), LossScale(CUDA)
        with NoHostSync():
            features = frontend(waveform, num_samples, augment)
            if name == "crnn":  # cuDNN's GRU asks the driver
                return
            guard.remember()
            logits = model(features)
            loss = nn.functional.binary_cross_entropy_with_logits(logits, torch.zeros_like(logits))
            for p in model.parameters():
                p.grad = torch.zeros_like(p)
            found_inf, _ = finite_flag(loss, model.parameters())
            scale.update(loss, found_inf)
            guard.undo_if(found_inf)


def make_fake(model: nn.Module, device: torch.device) -> None:
    """Gives ``model`` parameters and buffers of the current fake mode, as if on ``device``."""

    def faked(x: Tensor) -> Tensor:
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)

    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(faked(p), requires_grad=p.requires_grad))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, faked(buffer))


def fake_frontend() -> Frontend:
    """On the GPU of the current fake mode, without the operator, whose plan is made of numbers."""
    frontend = Frontend("logmel64", clip_samples=SAMPLES)
    make_fake(frontend, CUDA)
    return frontend


class Looks(nn.Module):
    """A model that takes a look at its features."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.fc, self.how = nn.Linear(64, 5), how

    def forward(self, x: Tensor) -> Tensor:
        match self.how:
            case "number":
                x = x * float(x.abs().max())
            case "branch" if x.sum() > 0:
                x = -x
            case "mask":
                x = x + x[x > 0].mean()
            case "copy":
                x = x.to("cpu")
        out: Tensor = self.fc(x.mean(1))
        return out


@pytest.mark.parametrize("how", ["number", "branch", "mask"])
def test_a_look_at_the_device_is_found(how: str) -> None:
    step = step_of(Looks(how), CPU)
    with NoHostSync(), pytest.raises(WaitsForTheDevice):
        step(*inputs(0), 1e-3)


def test_a_copy_to_the_host_is_found() -> None:
    with FakeTensorMode(), torch.no_grad():
        features = torch.empty(CLIPS, 100, 64, device=CUDA)
        with NoHostSync(), pytest.raises(WaitsForTheDevice):
            Looks("copy")(features)


# ------------------------------------------------------------------------- on the CPU
def test_the_step_is_train_step_between_the_guards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, with rates by group; a step that is not finite moves nothing."""
    torch.manual_seed(1)
    model, plain = small("cnn_trans"), small("cnn_trans")
    plain.load_state_dict(model.state_dict())
    step = step_of(model, CPU)
    params = list(plain.parameters())
    groups = [{"params": params[:3], "lr": 5e-4}, {"params": params[3:], "lr": 1e-3}]
    adam = torch.optim.Adam(groups, betas=(0.9, 0.999), fused=True)
    for i in range(2):
        features, target = inputs(i)
        taken = step(features, target, 1e-3)
        precision = torch.autocast("cpu", torch.bfloat16)
        theirs = train_step(plain, params, adam, features, target, precision)
        assert all(torch.equal(a, b) for a, b in zip(taken[:3], theirs, strict=True))
    bad = inputs(2)[0].index_fill(0, torch.tensor([1]), float("nan"))
    assert step(bad, target, 1e-3).found_inf == 1
    for (name, a), b in zip(model.state_dict().items(), plain.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_float32_is_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA its convolutions would be tf32's; beside half precision that costs nothing."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    model = small("crnn")
    for precision, rounded in (("fp32", False), ("bf16", True)):
        adam = torch.optim.Adam(model.parameters())
        TrainingStep(model, list(model.parameters()), adam, precision=precision, device=CPU)
        assert torch.backends.cudnn.allow_tf32 == rounded


def test_what_is_not_captured_has_a_reason() -> None:
    two = Ranks(rank=0, size=2)
    assert why_not_captured(CUDA, ALONE, checkpointing=False) is None
    assert "ranks" in str(why_not_captured(CUDA, two, checkpointing=False))
    under_torchrun: Any = SimpleNamespace(size=1, device_group=object())
    assert "ranks" in str(why_not_captured(CUDA, under_torchrun, checkpointing=False))
    assert "random state" in str(why_not_captured(CUDA, ALONE, checkpointing=True))
    assert "CUDA" in str(why_not_captured(CPU, ALONE, checkpointing=False))


def test_readings_come_at_once_on_the_cpu_and_in_order() -> None:
    readback, total = DelayedReadback(CPU), torch.zeros((), dtype=torch.float64)
    for i in range(3):
        taken = StepResult(*map(torch.tensor, (0.1 * i, 2.0, float(i > 0), float(i > 1))))
        total += taken.loss
        readback.put(i, 0.5, taken, total)
        (seen,) = readback.due()
        assert (seen.step, seen.lr, seen.norm) == (i, 0.5, 2.0)
        assert (seen.found_inf, seen.overflow) == (i > 0, i > 1)
        assert seen.loss == taken.loss.item() and seen.loss_sum == total.item()


# ------------------------------------------------------------------------- compiled
def test_what_was_compiled_is_kept_between_runs(
    tiny_sets: TinySets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes: the second takes every graph from the cache, and says so."""
    monkeypatch.setenv("FASTAT_CACHE", str(tmp_path / "cache"))
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    tiny = (
        "--set", "model.num_layers=1", "--set", "model.width=16", "--set", "model.num_heads=2",
        "--set", "model.dropout=0", "--set", "model.pooling=ave", "--precision", "fp32",
        "--freeze", "proj*", "--freeze", "layers.*",  # fewer kernels to compile
    )  # fmt: skip
    said, lines = [], []
    for run in ("first", "second"):
        done = fastat(
            "train", "--proc", "A4", "--model", "transformer", *tiny, "--compile", "--batch", 8,
            "--data", tiny_sets.train, "--epochs", 2, "--steps", 6, "--out", tmp_path / run,
        )  # fmt: skip
        said.append([x for x in done.stderr.splitlines() if "compiled in" in x])
        text = (tmp_path / run / "metrics.jsonl").read_text()
        lines.append([json.loads(line) for line in text.splitlines()])
    assert len(said[0]) == len(said[1]) == 1
    assert said[0][0].endswith("0 of 2 graphs from the cache")
    assert said[1][0].endswith("2 of 2 graphs from the cache")
    for first, second in lines:
        assert first["compile_s"] > 0 == second["compile_s"]
        assert first["epoch_s"] > 0
    assert list((tmp_path / "cache" / "compiled" / "inductor").iterdir())


# ------------------------------------------------------------------------- on a GPU
@contextmanager
def no_sync() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.cuda
@on_gpu
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("name", NAMES)
def test_no_step_waits_for_the_gpu(name: str, precision: str) -> None:
    """With the front end, the graph, and the numbers read back."""
    step = step_of(small(name, CUDA), CUDA, graph=True, precision=precision)
    frontend = Frontend("logmel64", clip_samples=SAMPLES).to(CUDA)
    waveform = torch.zeros(CLIPS, SAMPLES, dtype=torch.int16, device=CUDA)
    num_samples = torch.full((CLIPS,), SAMPLES, device=CUDA)
    target = torch.rand(CLIPS, 5, device=CUDA)
    readback, total = DelayedReadback(CUDA), torch.zeros((), dtype=torch.float64, device=CUDA)
    steps = WARM_UP + 5
    seen = []
    for i in range(steps):
        taken = step(frontend(waveform, num_samples), target, 1e-3)
        with no_sync() if i > WARM_UP else no_sync_needed():
            taken = step(frontend(waveform, num_samples), target, 1e-3)
            total += taken.loss
            readback.put(i, 1e-3, taken, total)
            seen += [r.step for r in readback.due()]
    assert seen == list(range(steps - BEHIND))
    assert [r.step for r in readback.due(wait=True)] == list(range(steps - BEHIND, steps))


@contextmanager
def no_sync_needed() -> Iterator[None]:
    """The first steps compile and choose, and the capture waits."""
    yield


@pytest.mark.cuda
@on_gpu
@pytest.mark.parametrize("name", NAMES)
def test_a_graph_takes_the_steps_that_are_not_captured(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights, moments, statistics, random numbers and losses, with a step that is not finite.

    Adam's first steps are as long for a gradient that is rounding alone, as that of a bias before
    BatchNorm, as for any other: what is computed must not depend on the order of threads.
    """
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    torch.manual_seed(1)
    start = small(name, CUDA).state_dict()
    results = []
    for graph in (False, True):
        model = small(name, CUDA)
        model.load_state_dict(start)
        step = step_of(model, CUDA, graph=graph, precision="fp32")
        torch.manual_seed(2)
        losses = []
        for i in range(WARM_UP + 5):
            features, target = inputs(i, CUDA)
            if i == WARM_UP + 2:
                features[0] = float("nan")
            with sdpa_kernel(SDPBackend.MATH):
                losses.append(step(features, target, 1e-3 / (1 + i)).loss.clone())
        moments = [x for s in step.optimizer.state.values() for x in s.values()]
        state = [*model.state_dict().values(), *moments]
        results.append((torch.stack(losses), state, torch.cuda.get_rng_state()))
    (losses_a, state_a, random_a), (losses_b, state_b, random_b) = results
    torch.testing.assert_close(losses_a, losses_b, equal_nan=True)
    for a, b in zip(state_a, state_b, strict=True):
        error = torch.linalg.vector_norm(a.double() - b.double())
        assert error <= 1e-3 * torch.linalg.vector_norm(b.double()) + 1e-6
    assert torch.equal(random_a, random_b)


@pytest.mark.cuda
@on_gpu
@pytest.mark.parametrize("name", NAMES)
def test_a_graph_moves_the_loss_scale(name: str) -> None:
    """Down in the steps before the capture and in replays, up in a replay, and not where the loss
    is not finite; as steps that are not captured do."""
    torch.manual_seed(1)
    start = small(name, CUDA).state_dict()
    results = []
    for graph in (False, True):
        model = small(name, CUDA)
        model.load_state_dict(start)
        step = step_of(model, CUDA, graph=graph, precision="fp16")
        scale = step.loss_scale
        assert scale is not None
        scale.scale.fill_(2.0**60)
        seen = []
        for i in range(WARM_UP + 7):
            features, target = inputs(i, CUDA)
            if i == WARM_UP + 2:  # what restore() does, between two replays
                scale.restore({"scale": torch.tensor(64.0), "good": torch.tensor(1998)})
            if i == WARM_UP + 5:
                features[0] = float("nan")
            taken = step(features, target, 0.0)
            seen.append((taken.found_inf.item(), taken.overflow.item(), scale.scale.item()))
        results.append(seen)
    assert results[0] == results[1]
    n = WARM_UP + 2
    assert results[0][:n] == [(1, 1, 2.0 ** (59 - i)) for i in range(n)]
    assert results[0][n:] == [(0, 0, 64), (0, 0, 128), (0, 0, 128), (1, 0, 128), (0, 0, 128)]


@pytest.mark.cuda
@on_gpu
def test_a_run_with_graphs_resumes_as_it_would_have_gone_on(
    tiny_sets: TinySets, tmp_path: Path
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    fastat(*arguments(tiny_sets, whole))
    fastat(*arguments(tiny_sets, parts, "--steps", 6))
    fastat("train", "--resume", "--out", parts, "--steps", 12)
    lines = [(x / "metrics.jsonl").read_text().splitlines()[-1] for x in (whole, parts)]
    losses = [json.loads(line)["train_loss"] for line in lines]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
