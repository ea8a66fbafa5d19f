"""One training step of each model under A4, features in memory: ours and the same in float32.

Ours is what the trainer runs on the device: bf16 autocast, channels_last, fused Adam, on a GPU also
torch.compile. The peer is the same model as a first script would train it: float32, contiguous,
eager, Adam in its own loops.
"""

from statistics import median

import pytest
import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor, nn

from fastat.costs import forward_gflop
from fastat.environment import default_device, device_name
from fastat.evaluate import autocast
from fastat.features import FEATURES
from fastat.models import create_model, list_models
from fastat.optim import create_adam, train_step
from fastat.procedures import A4, model_options

CLASSES = 527
DEVICE = default_device()
BATCH, ROUNDS = (4, 3) if DEVICE.type == "cpu" else (64, 20)
FEATURE, NUM_FRAMES = FEATURES[A4.feature], 400


def created(name: str) -> nn.Module:
    return create_model(
        name,
        num_mels=FEATURE.num_mels,
        num_frames=NUM_FRAMES,
        num_classes=CLASSES,
        **model_options(name, A4),
    )


@torch.no_grad()
def check_loss(model: nn.Module, features: Tensor, target: Tensor) -> None:
    """bf16 is to give float32's loss before it is timed."""
    model.eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train()  # fresh running statistics do not normalise
    want = F.binary_cross_entropy_with_logits(model(features), target)
    with autocast(DEVICE, "bf16"):
        logits = model(features)
    got = F.binary_cross_entropy_with_logits(logits, target)
    torch.testing.assert_close(got, want, rtol=0.03, atol=0)
    model.train()


@pytest.mark.parametrize("impl", ["ours", "float32"])
@pytest.mark.parametrize("name", list_models())
def test_model_step(benchmark: BenchmarkFixture, name: str, impl: str) -> None:
    benchmark.group = f"training step, {name} A4, batch {BATCH}"
    torch.manual_seed(0)
    model = created(name).to(DEVICE).train()
    features = torch.randn(BATCH, NUM_FRAMES, FEATURE.num_mels, device=DEVICE)
    target = (torch.rand(BATCH, CLASSES, device=DEVICE) < 0.01).float()
    params = list(model.parameters())
    if impl == "ours":
        check_loss(model, features, target)
        model = model.to(memory_format=torch.channels_last)
        fused, _ = create_adam(params, lr=1e-5, betas=(0.9, 0.999), weight_decay=0.0, device=DEVICE)
        if DEVICE.type == "cuda":
            model.compile()

        def step() -> Tensor:
            precision = autocast(DEVICE, "bf16")
            return train_step(model, params, fused, features, target, precision)[0]
    else:
        plain = torch.optim.Adam(params, lr=1e-5, foreach=False)

        def step() -> Tensor:
            loss = F.binary_cross_entropy_with_logits(model(features), target)
            plain.zero_grad()
            loss.backward()
            plain.step()
            return loss.detach()

    def synchronized() -> Tensor:
        loss = step()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        return loss

    loss = benchmark.pedantic(synchronized, rounds=ROUNDS, warmup_rounds=1)
    assert torch.isfinite(loss)
    seconds = median(benchmark.stats.stats.data)
    with torch.device("meta"):
        empty = created(name)
    benchmark.extra_info.update(
        device=device_name(DEVICE),
        clips_per_s=BATCH / seconds,
        # the backward pass has twice the forward's products
        tflop_per_s=3 * BATCH * forward_gflop(empty, NUM_FRAMES, FEATURE.num_mels) / seconds / 1e3,
    )
