"""What a model costs: parameters and operations a clip, counted on the instantiated model."""

from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fastat.audio.features import CLIP_SAMPLES, FEATURES
from fastat.config.paper import NUM_CLASSES
from fastat.config.procedures import A1, A2, A3, A4, model_options
from fastat.models import create_model

PASSES = 3
"""Operations of a training step per operation of its forward pass: the backward pass has twice as
many as the forward pass."""


@dataclass(frozen=True)
class ModelCost:
    """A model at one feature."""

    feature: str
    procedures: tuple[str, str]
    """Those that use this feature: the one from ImageNet weights, and the one from scratch."""
    num_mels: int
    num_frames: int
    params: int
    gflop: float
    """GFLOP of one clip's forward pass; a multiplication and an addition are two operations."""


def count_parameters(model: nn.Module) -> int:
    """Number of values in all parameters."""
    return sum(p.numel() for p in model.parameters())


def forward_gflop(model: nn.Module, num_frames: int, num_mels: int) -> float:
    """GFLOP of one clip's forward pass: 2 x MAC of every matrix product and convolution.

    Args:
        model: on any device; on "meta" nothing is computed. It is left in evaluation mode.
        num_frames, num_mels: size of the clip's features.
    """
    return _flop_by_name(model, num_frames, num_mels)["Global"] / 1e9


def gflop_by_module(model: nn.Module, num_frames: int, num_mels: int) -> dict[str, float]:
    """``forward_gflop`` by module: "layers.attn" is the attention modules of all layers together.

    Names are the first two parts of torch's, without indices of layers. An operation counts once,
    for the innermost module around it, and for "model" outside of all modules that the model calls.
    """
    counts = _flop_by_name(model, num_frames, num_mels)
    prefix = f"{type(model).__name__}."
    called = {n.removeprefix(prefix): flop for n, flop in counts.items() if n.startswith(prefix)}
    found = {"model": counts["Global"]}
    for name, flop in called.items():  # which includes the operations of the modules it calls
        caller = name.rpartition(".")[0]
        while caller and caller not in called:  # a list of modules, which is never called
            caller = caller.rpartition(".")[0]
        found[_short(name)] = found.get(_short(name), 0) + flop
        found[_short(caller)] = found.get(_short(caller), 0) - flop
    return {name: flop / 1e9 for name, flop in found.items() if flop}


@torch.no_grad()
def _flop_by_name(model: nn.Module, num_frames: int, num_mels: int) -> dict[str, int]:
    device = next(model.parameters()).device
    with FlopCounterMode(display=False) as counter:
        model.eval()(torch.empty(1, num_frames, num_mels, device=device))
    by_name = {name: sum(flop.values()) for name, flop in counter.get_flop_counts().items()}
    return {"Global": 0} | by_name


def _short(module: str) -> str:
    parts = [part for part in module.split(".") if not part.isdecimal()]
    return ".".join(parts[:2]) or "model"


def model_costs(name: str) -> list[ModelCost]:
    """A model at both features, as the procedures build it."""
    costs = []
    for pretrained, scratch in ((A3, A4), (A1, A2)):
        feature = FEATURES[scratch.feature]
        num_frames = feature.num_frames(CLIP_SAMPLES)
        with torch.device("meta"):
            model = create_model(
                name,
                num_mels=feature.num_mels,
                num_frames=num_frames,
                num_classes=NUM_CLASSES,
                **model_options(name, scratch),
            )
        cost = ModelCost(
            feature=feature.name,
            procedures=(pretrained.name, scratch.name),
            num_mels=feature.num_mels,
            num_frames=num_frames,
            params=count_parameters(model),
            gflop=forward_gflop(model, num_frames, feature.num_mels),
        )
        costs.append(cost)
    return costs
