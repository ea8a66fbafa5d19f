"""The models that benchmarks train: ours as the procedures build them, and those of the libraries
that a user would pick instead; and what a training step of them is."""

import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.results import DEVICE, PRECISION
from fastat.audio.features import CLIP_SAMPLES, FEATURES
from fastat.config.paper import NUM_CLASSES
from fastat.config.procedures import AST_STRIDE, Procedure, model_options
from fastat.models import create_model
from fastat.models.ast import patch_grid
from fastat.models.costs import forward_gflop
from fastat.system.device import autocast
from fastat.system.distributed import ALONE
from fastat.training.finetune import parameter_groups
from fastat.training.nonfinite import BufferGuard
from fastat.training.optim import create_adam
from fastat.training.step import TrainingStep, why_not_captured
from fastat_kernels.backend import kernels

LR = 1e-5

Step = Callable[[Tensor, Tensor], Tensor]
"""Trains on features [B, T, F] and targets [B, K]; the loss."""


# ------------------------------------------------------------------------------ models
def size_of(proc: Procedure) -> tuple[int, int]:
    """Frames and mel bins of a procedure's feature."""
    feature = FEATURES[proc.feature]
    return feature.num_frames(CLIP_SAMPLES), feature.num_mels


def created(name: str, proc: Procedure) -> nn.Module:
    """Our model as the procedure builds it."""
    num_frames, num_mels = size_of(proc)
    options = model_options(name, proc)
    return create_model(
        name, num_mels=num_mels, num_frames=num_frames, num_classes=NUM_CLASSES, **options
    )


class Image(nn.Module):
    """[B, T, F] features as an image of one channel, [B, 1, F, T], for a model of pictures."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x.mT.unsqueeze(1))
        return out


def timm_vit(proc: Procedure) -> nn.Module:
    """timm's DeiT, the AST's trunk, with patches as far apart as the AST's: the same tokens."""
    import timm

    num_frames, num_mels = size_of(proc)
    stride = AST_STRIDE[proc.name]
    f, t = patch_grid(num_mels, num_frames, stride, stride)
    net: Any = timm.create_model(
        "deit_base_distilled_patch16_384", img_size=(16 * f, 16 * t), in_chans=1,
        num_classes=NUM_CLASSES,
    )  # fmt: skip
    net.patch_embed.proj = nn.Conv2d(1, net.embed_dim, 16, stride)
    net.patch_embed.strict_img_size = False
    return Image(net)


def torchvision_resnet50(proc: Procedure) -> nn.Module:
    """torchvision's ResNet50 with a stem for one channel."""
    net: Any = importlib.import_module("torchvision.models").resnet50(num_classes=NUM_CLASSES)
    net.conv1 = nn.Conv2d(1, 64, 7, stride=2, padding=3, bias=False)
    return Image(net)


PEERS: dict[str, tuple[str, Callable[[Procedure], nn.Module]]] = {
    "ast": ("timm ViT", timm_vit),
    "resnet50": ("torchvision", torchvision_resnet50),
}
"""What a user would pick instead of a model of ours, and whose it is."""


def gflop_of(make: Callable[[], nn.Module], proc: Procedure) -> float:
    """GFLOP of a clip's forward pass, counted without computing it."""
    with torch.device("meta"):
        model = make()
    return forward_gflop(model, *size_of(proc))


@torch.no_grad()
def check_loss(model: nn.Module, features: Tensor, target: Tensor) -> None:
    """PRECISION, with the kernels under test, is to give float32's loss before it is timed."""
    model.eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train()  # fresh running statistics do not normalise
    with kernels([]):
        want = F.binary_cross_entropy_with_logits(model(features), target)
    with autocast(DEVICE, PRECISION):
        logits = model(features)
    got = F.binary_cross_entropy_with_logits(logits.float(), target)
    torch.testing.assert_close(got, want, rtol=0.03, atol=0)
    model.train()


# ------------------------------------------------------------------------------ steps
def plain_step(model: nn.Module, precision: str, *, fused: bool = False) -> Step:
    """A step as a first script has it; Adam as torch has it, or fused."""
    adam = torch.optim.Adam(model.parameters(), lr=LR, fused=fused or None)
    context = autocast(DEVICE, precision)

    def step(features: Tensor, target: Tensor) -> Tensor:
        with context:
            logits = model(features)
        loss = F.binary_cross_entropy_with_logits(logits.float(), target)
        adam.zero_grad()
        loss.backward()
        adam.step()
        return loss.detach()

    return step


def trainer_step(model: nn.Module) -> Step:
    """The trainer's step, in PRECISION; on a GPU a CUDA graph from its fourth call on."""
    model.to(memory_format=torch.channels_last)
    groups = parameter_groups(model, 1.0)
    adam, _ = create_adam(groups, lr=LR, betas=(0.9, 0.999), weight_decay=0.0, device=DEVICE)
    step = TrainingStep(
        model,
        [p for group in groups for p in group["params"]],
        adam,
        precision=PRECISION,
        device=DEVICE,
        guard=BufferGuard(model),
        graph=why_not_captured(DEVICE, ALONE, checkpointing=False) is None,
    )
    return lambda features, target: step(features, target, LR).loss
