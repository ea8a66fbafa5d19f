"""What fastat profile measures with: the step, a set of noise, memory, watts."""

import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from fastat.config.paper import TRAIN_CLIPS
from fastat.config.run import TrainConfig, resolve
from fastat.data.shards import PackedSet
from fastat.study.profile import device as device_module
from fastat.study.profile.device import OutOfMemory, gpu_watts, out_of_memory
from fastat.study.profile.measure import Spread, Training, measure, step_key
from fastat.study.profile.noise import noise_set
from tests.conftest import SMALL_MODELS

CPU = torch.device("cpu")


def config_of(model: str, proc: str, batch: int, **overrides: Any) -> TrainConfig:
    given = {"data": "", "batch": batch} | overrides
    return resolve(proc, model, given, num_clips=TRAIN_CLIPS, clip_seconds=1.0)


TINY = config_of("cnn_trans", "A4", 3, model_options=SMALL_MODELS["cnn_trans"])


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
    before = [p.detach().clone() for p in training.network.params]
    loss = training.step(next(training.batches()))
    assert loss.isfinite()
    moved = [not torch.equal(a, b) for a, b in zip(before, training.network.params, strict=True)]
    assert all(moved)


@pytest.mark.parametrize("num_clips", [3, 40])
def test_batches_larger_than_the_set(noise: PackedSet, num_clips: int) -> None:
    training = Training(replace(TINY, batch=num_clips), CPU, noise)
    batch = next(training.batches())
    assert batch.target.shape == (num_clips, 11) and batch.rows.max() < 8


def test_marks_are_in_order(noise: PackedSet, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pause in the forward pass is found there, one in Adam there."""
    plain = Training.__init__

    def slow(self: Training, *args: Any) -> None:
        plain(self, *args)
        self.network.raw_model.register_forward_pre_hook(lambda *_: time.sleep(0.12))
        self.network.optimizer.register_step_post_hook(lambda *_: time.sleep(0.03))

    monkeypatch.setattr(Training, "__init__", slow)
    ms = measure(TINY, CPU, noise, seconds=0.01).ms
    assert ms["forward"].median > 120 and 30 < ms["optimizer"].median < 120
    assert ms["step"].median > 150


def test_a_step_beyond_the_memory_is_not_taken(
    noise: PackedSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_module, "free_memory", lambda: 64 << 20)
    with pytest.raises(OutOfMemory):
        measure(replace(TINY, batch=400), CPU, noise)
    monkeypatch.undo()
    assert torch.empty(64 << 20).numel() == 64 << 20, "no limit stays"


def test_the_peak_is_that_of_each_step(noise: PackedSet) -> None:
    """A larger step takes more, and what it took does not count for a smaller one after it."""
    small, large, again = (
        measure(replace(TINY, batch=batch), CPU, noise, seconds=0.01).peak_bytes
        for batch in (2, 400, 2)
    )
    assert large > small + (64 << 20)
    assert again < small + (large - small) / 2


def test_out_of_memory_is_told_from_other_errors() -> None:
    with pytest.raises(OutOfMemory), out_of_memory(CPU):
        raise torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(OutOfMemory), out_of_memory(CPU):
        torch.empty(1 << 55)
    with pytest.raises(RuntimeError, match="shapes"), out_of_memory(CPU):
        torch.empty(2, 3) @ torch.empty(2, 3)


def test_configurations_with_the_same_step() -> None:
    a3, a4 = (step_key(config_of("ast", proc, 4)) for proc in ("A3", "A4"))
    assert a3 == a4
    less_memory = {"activation_checkpointing": True}
    for other in (
        config_of("ast", "A1", 4),
        config_of("ast", "A3", 5),
        config_of("ast", "A3", 4, model_options=less_memory),
        config_of("ast", "A3", 4, precision="bf16"),
        config_of("ast", "A3", 4, compile=True),
    ):
        assert step_key(other) != a3


def test_spread() -> None:
    assert Spread.of([1.0, 2.0, 3.0, 4.0, 5.0]) == Spread(3.0, 2.0, 4.0)
    assert Spread.of([7.0]) == Spread(7.0, 7.0, 7.0)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compiled", [False, True])
def test_measure_on_a_gpu(noise: PackedSet, compiled: bool) -> None:
    found = measure(replace(TINY, compile=compiled), torch.device("cuda"), noise, seconds=0.5)
    assert found.peak_bytes > 1 << 20
    assert all(s.low > 0 for s in found.ms.values())
    assert found.watts is None or 5 < found.watts < 2000


# ---------------------------------------------------------------------------- the device
@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Stands for nvidia-ml-py."""
    module = ModuleType("pynvml")
    module.__spec__ = ModuleSpec("pynvml", None)
    module.NVMLError = type("NVMLError", (Exception,), {})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pynvml", module)
    return module


def test_watts_of_a_gpu(nvml: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "power_draw", lambda device: 250_500)
    assert gpu_watts(torch.device("cuda")) == 250.5


def test_no_watts(nvml: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def not_supported(device: torch.device) -> int:
        raise nvml.NVMLError("Not Supported")

    monkeypatch.setattr(torch.cuda, "power_draw", not_supported)
    assert gpu_watts(torch.device("cuda")) is None
    monkeypatch.delitem(sys.modules, "pynvml")
    monkeypatch.setattr(device_module, "find_spec", lambda name: None)
    assert gpu_watts(torch.device("cuda")) is None


def test_a_cpu_has_no_watts(noise: PackedSet) -> None:
    assert measure(TINY, CPU, noise, seconds=0.01).watts is None
