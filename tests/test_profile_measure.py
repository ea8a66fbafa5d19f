"""What fastat profile measures with: the step, a set of noise, memory by module, watts, traces."""

import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fastat.data.shards import PackedSet
from fastat.memory import LiveStorages
from fastat.profile import device as device_module
from fastat.profile import measure as measure_module
from fastat.profile.device import PowerMeter, energy_counters, parse_watts
from fastat.profile.measure import Case, OutOfMemory, Spread, Training, measure, out_of_memory
from fastat.profile.modules import FakeMemory, called_modules, memory_by_module, watched
from fastat.profile.noise import noise_set
from fastat.profile.trace import input_bytes, operators
from tests.conftest import SMALL_MODELS

CPU = torch.device("cpu")
TINY = Case(model="cnn_trans", proc="A4", options=SMALL_MODELS["cnn_trans"], batch=3)


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PackedSet]:
    folder = tmp_path_factory.mktemp("noise")
    packed = noise_set(folder, num_clips=8, clip_samples=16_000, num_classes=11)
    yield packed
    packed.close()


def test_noise_is_a_sound_set(noise: PackedSet) -> None:
    rows = np.arange(8)
    out = np.empty((8, 16_000), np.int16)
    assert noise.read(rows, out) == {}, "rows whose CRC is wrong would be named"
    assert out.std() > 1000 and not (out[0] == out[1]).all()
    labels = noise.targets(rows).sum(1)
    assert labels.min() >= 1 and labels.max() <= 2
    assert (noise.targets(rows).sum(0) == noise.label_counts).all()


# ---------------------------------------------------------------------------- the step
def test_the_step_is_the_trainers(noise: PackedSet, device: torch.device) -> None:
    training = Training(TINY, device, noise)
    before = [p.detach().clone() for p in training.params]
    loss = training.step(next(training.batches()))
    assert loss.isfinite()
    moved = [not torch.equal(a, b) for a, b in zip(before, training.params, strict=True)]
    assert all(moved)


@pytest.mark.parametrize("num_clips", [3, 40])
def test_batches_larger_than_the_set(noise: PackedSet, num_clips: int) -> None:
    case = Case(model="cnn_trans", proc="A4", options=SMALL_MODELS["cnn_trans"], batch=num_clips)
    batch = next(Training(case, CPU, noise).batches())
    assert batch.target.shape == (num_clips, 11) and batch.rows.max() < 8


def test_marks_are_in_order(noise: PackedSet, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pause in the forward pass is found there, one in Adam there."""
    plain = Training.__init__

    def slow(self: Training, *args: Any) -> None:
        plain(self, *args)
        self.raw_model.register_forward_hook(lambda *_: time.sleep(0.12))
        self.optimizer.register_step_post_hook(lambda *_: time.sleep(0.03))

    monkeypatch.setattr(Training, "__init__", slow)
    ms = measure(TINY, CPU, noise, seconds=0.01).ms
    assert ms["forward"].median > 120 and 30 < ms["optimizer"].median < 120
    assert ms["step"].median > 150


def test_a_step_beyond_the_memory_is_not_taken(
    noise: PackedSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure_module, "free_memory", lambda: 1 << 20)
    with pytest.raises(OutOfMemory, match="GiB"):
        measure(TINY, CPU, noise)


def test_out_of_memory_is_told_from_other_errors() -> None:
    with pytest.raises(OutOfMemory), out_of_memory(CPU):
        raise torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(OutOfMemory), out_of_memory(CPU):
        torch.empty(1 << 55)
    with pytest.raises(RuntimeError, match="shapes"), out_of_memory(CPU):
        torch.empty(2, 3) @ torch.empty(2, 3)


def test_cases_with_the_same_step() -> None:
    a3, a4 = (Case(model="ast", proc=proc, batch=4) for proc in ("A3", "A4"))
    assert a3.step == a4.step
    assert a3.step != Case(model="ast", proc="A1", batch=4).step
    assert a3.step != Case(model="ast", proc="A3", batch=5).step
    assert a3.step != Case(model="ast", proc="A3", batch=4, activation_checkpointing=True).step


def test_spread() -> None:
    assert Spread.of([1.0, 2.0, 3.0, 4.0, 5.0]) == Spread(3.0, 2.0, 4.0)
    assert Spread.of([7.0]) == Spread(7.0, 7.0, 7.0)


def test_watts_are_those_of_the_timed_steps(
    noise: PackedSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    step = Training.step

    class Meter:
        watts = 99.0

        def __init__(self, device: torch.device) -> None:
            pass

        def __enter__(self) -> "Meter":
            steps.append("on")
            return self

        def __exit__(self, *_: object) -> None:
            steps.append("off")

    def noted(self: Training, batch: Any) -> Tensor:
        steps.append("step")
        return step(self, batch)

    monkeypatch.setattr(measure_module, "PowerMeter", Meter)
    monkeypatch.setattr(Training, "step", noted)
    found = measure(TINY, CPU, noise, seconds=0.01)
    assert found.watts == 99.0
    assert steps == ["step", "on", *["step"] * found.rounds, "off"]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compiled", [False, True])
def test_measure_on_a_gpu(noise: PackedSet, compiled: bool) -> None:
    options = SMALL_MODELS["cnn_trans"]
    case = Case(model="cnn_trans", proc="A4", options=options, batch=3, compile=compiled)
    found = measure(case, torch.device("cuda"), noise, seconds=0.5)
    assert found.peak_bytes > 1 << 20
    assert all(s.low > 0 for s in found.ms.values())
    assert found.watts is None or 5 < found.watts < 2000


# ---------------------------------------------------------------------------- memory by module
class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(100, 1000), nn.Linear(1000, 50)])
        self.head = nn.Linear(50, 2)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        out: Tensor = self.head(x)
        return out


def test_kept_and_peaks_of_a_toy() -> None:
    B = 10_000
    with FakeTensorMode(), LiveStorages() as live:
        model = Toy()
        adam = torch.optim.Adam(model.parameters(), fused=True)
        with watched(model, adam, FakeMemory(live)) as found:
            model(torch.empty(B, 100)).sum().backward()
            adam.step()
    by_name = {m.name: m for m in found}
    assert list(by_name) == ["(outside modules)", "layers.0", "layers.1", "head"]
    assert by_name["layers.0"].kept == B * 1000 * 4
    assert by_name["layers.1"].kept == B * 50 * 4
    weights = sum(p.numel() for p in model.parameters()) * 4
    outputs = B * 4 * (1000 + 50 + 2)
    inputs = B * 4 * 100
    assert by_name["head"].peak_forward == pytest.approx(weights + inputs + outputs, rel=0.01)
    # The gradients of its output and of its input, which is still there; its output is not.
    want = weights + inputs + B * 4 * (50 + 1000 + 1000)
    assert by_name["layers.1"].peak_backward == pytest.approx(want, rel=0.02)
    assert max(found, key=lambda m: m.peak).name in ("layers.1", "layers.0")


@pytest.mark.parametrize("name", SMALL_MODELS)
def test_memory_of_every_model(noise: PackedSet, name: str) -> None:
    case = Case(model=name, proc="A4", options=SMALL_MODELS[name], batch=3)
    found = {m.name: m for m in memory_by_module(case, CPU, noise)}
    model = case.create(noise.clip_samples, len(noise.classes))
    with_weights = {n for n, module in called_modules(model) if [*module.parameters()]}
    # Of the AST's projection only the weights are used; timm's ResNets have parts without any.
    assert with_weights - {"patch_embed"} <= set(found)
    weights = sum(p.numel() for p in model.parameters()) * 4
    assert max(m.peak for m in found.values()) >= 3 * weights, "weights and both moments"
    assert any(m.kept and m.peak_backward for m in found.values())


def test_checkpointing_keeps_less(noise: PackedSet) -> None:
    plain, less = (
        sum(m.kept for m in memory_by_module(case, CPU, noise))
        for case in (TINY, replace(TINY, activation_checkpointing=True))
    )
    assert less < 0.6 * plain


# ---------------------------------------------------------------------------- the device
def test_watts_of_rapl(tmp_path: Path) -> None:
    zones = []
    for name in ("intel-rapl:0", "intel-rapl:1", "intel-rapl:0:0"):
        zone = tmp_path / name
        zone.mkdir()
        (zone / "energy_uj").write_text("900000000")
        (zone / "max_energy_range_uj").write_text("1000000000")
        zones.append(zone)
    assert len(energy_counters(tmp_path)) == 2, "not the part of a package"
    with PowerMeter(CPU, tmp_path) as power:
        time.sleep(0.2)
        (zones[0] / "energy_uj").write_text("910000000")  # 10 J
        (zones[1] / "energy_uj").write_text("20000000")  # 120 J: the counter began anew
    assert power.watts is not None and 130 / 2 < power.watts <= 130 / 0.2


def test_no_watts(tmp_path: Path) -> None:
    with PowerMeter(CPU, tmp_path) as power:
        pass
    assert power.watts is None


def test_watts_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    command = [sys.executable, "-c", "print(' 250.5')"]
    monkeypatch.setattr(device_module, "nvidia_smi", lambda device: command)
    monkeypatch.setattr(device_module, "SAMPLE_SECONDS", 0.01)
    with PowerMeter(torch.device("cuda")) as power:
        time.sleep(0.5)
    assert power.watts == 250.5
    assert parse_watts("[N/A]\n") is None and parse_watts("") is None
    assert parse_watts("68.32\n") == 68.32


# ---------------------------------------------------------------------------- traces
def test_bytes_and_shares_of_operators() -> None:
    a, b = torch.randn(300, 200), torch.randn(200, 100, dtype=torch.bfloat16)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(
        activities=activities, record_shapes=True, profile_memory=True
    ) as profiler:
        c = a @ b.float()
    shapes = {"Input Dims": [[300, 200], [200, 100]], "Input type": ["float", "float"]}
    event = {"cat": "cpu_op", "name": "aten::mm", "args": shapes}
    other = {"cat": "cpu_op", "name": "aten::mm", "args": {}}
    read = input_bytes([event, event, other, {"name": "x"}])
    assert read == {"aten::mm": 2 * 4 * (300 * 200 + 200 * 100)}
    found = {o.name: o for o in operators(profiler.key_averages(), read, on_cpu=True)}
    assert found["aten::mm"].bytes * 3 == pytest.approx(read["aten::mm"] + c.numel() * 4)
    assert sum(o.share for o in found.values()) == pytest.approx(1)
