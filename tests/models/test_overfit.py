"""Every model learns eight real clips by heart, at the paper's width and on its feature."""

import csv
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastat.audio.frontend import Frontend
from fastat.evaluation.extract import read_waveform
from fastat.models import create_model
from fastat.models.base import TaggingModel
from fastat.system.device import auto_precision, autocast

NUM_CLIPS = 8
MAX_STEPS = 60
LEARNT = 0.02
"""Binary cross-entropy; knowing nothing but how rare each class is gives 0.33."""


class Recipe(NamedTuple):
    """How a model is trained on eight clips."""

    lr: float
    warmup_steps: int = 0
    options: dict[str, Any] = {}


STRIDES = {"fstride": 8, "tstride": 8}

QUICK = {
    # half the patches along time: half the operations a step
    "ast": Recipe(3e-4, 10, {"fstride": 8, "tstride": 16, "num_layers": 2}),
    "transformer": Recipe(1e-3, 10, {"num_layers": 2}),
    "cnn_trans": Recipe(3e-4),
    "conformer": Recipe(1e-3, 10, {"num_layers": 2}),
    "resnet50": Recipe(3e-4),
    "crnn": Recipe(1e-3),
}
"""Full width, but only two layers of what takes minutes at full depth."""

FULL = {
    "ast": Recipe(1e-4, 10, STRIDES),
    "transformer": Recipe(3e-4, 10),
    "conformer": Recipe(3e-4, 10),
}
"""The depths that QUICK leaves out."""


class Clips(NamedTuple):
    """Features [8, 400, 64], normalised, and one-hot targets [8, 10]."""

    x: Tensor
    y: Tensor


@pytest.fixture(scope="module")
def clips(recordings: Path) -> Clips:
    """A clip of each of eight of ESC-10's ten classes, padded to ten seconds."""
    folder = recordings / "esc10"
    with (folder / "esc10.csv").open() as table:
        first = {row["category"]: row["filename"] for row in reversed(list(csv.DictReader(table)))}
    assert len(first) == 10
    names = sorted(first)[:NUM_CLIPS]
    waveform = np.zeros((NUM_CLIPS, 160_000), np.int16)
    num_samples = []
    for row, name in zip(waveform, names, strict=True):
        samples = read_waveform(folder / "audio" / first[name])
        row[: len(samples)] = samples
        num_samples.append(len(samples))
    x = Frontend("logmel64")(torch.from_numpy(waveform), torch.tensor(num_samples))
    return Clips(x, torch.eye(NUM_CLIPS, 10))


def create(name: str, options: dict[str, Any]) -> TaggingModel:
    return create_model(name, num_mels=64, num_frames=400, num_classes=10, **options)


def loss_of(model: TaggingModel, x: Tensor, y: Tensor) -> Tensor:
    with autocast(x.device, auto_precision(x.device).precision):
        return F.binary_cross_entropy_with_logits(model(x), y)


def steps_to_learn(name: str, recipe: Recipe, clips: Clips) -> int:
    """Steps until the training loss is LEARNT, of at most MAX_STEPS."""
    model = create(name, recipe.options)
    optimizer = torch.optim.Adam(model.parameters(), recipe.lr)
    warmup = max(recipe.warmup_steps, 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min((i + 1) / warmup, 1.0))
    losses: list[float] = []
    while len(losses) < MAX_STEPS:
        loss = loss_of(model, clips.x, clips.y)
        losses.append(loss.item())
        if losses[-1] < LEARNT:
            return len(losses)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    pytest.fail(f"the loss is {losses[-1]:.4f} after {MAX_STEPS} steps: {losses[::10]}")


@pytest.mark.parametrize("name", QUICK)
def test_overfits_eight_clips(name: str, clips: Clips) -> None:
    assert steps_to_learn(name, QUICK[name], clips) > 1


@pytest.mark.full
@pytest.mark.parametrize("name", FULL)
def test_overfits_eight_clips_at_full_depth(name: str, clips: Clips) -> None:
    assert steps_to_learn(name, FULL[name], clips) > 1


@pytest.mark.parametrize("name", FULL)
def test_a_step_at_full_depth_lowers_the_loss(name: str, clips: Clips) -> None:
    model = create(name, FULL[name].options)
    optimizer = torch.optim.Adam(model.parameters(), 1e-5)
    x, y = clips.x[:2], clips.y[:2]
    loss = loss_of(model, x, y)
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    optimizer.step()
    with torch.no_grad():
        assert loss_of(model, x, y) < loss
