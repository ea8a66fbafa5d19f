"""Which parameters are trained, and how fast: frozen ones, and a learning rate for each layer."""

import logging
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastat.system.errors import UserError

log = logging.getLogger(__name__)

NAMES_SHOWN = 5


def freeze(model: nn.Module, patterns: list[str]) -> None:
    """Stops training the parameters whose name matches a shell pattern.

    Raises:
        UserError: a pattern matches no parameter, or nothing is left to train.
    """
    if not patterns:
        return
    names = [name for name, _ in model.named_parameters()]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            spread = range(0, len(names) - 1, max(1, len(names) // NAMES_SHOWN))
            shown = ", ..., ".join([*(names[i] for i in spread), names[-1]])
            raise UserError(
                f"--freeze {pattern!r} matches none of the model's {len(names)} parameters: {shown}"
            )
    for name, p in model.named_parameters():
        p.requires_grad_(not any(fnmatchcase(name, pattern) for pattern in patterns))
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if not trained:
        raise UserError(f"--freeze {' '.join(patterns)} leaves no parameter to train")
    log.info(f"{trained:,} of {total:,} parameters are trained, the others frozen")


def train_mode(model: nn.Module) -> None:
    """``model.train()``, but a BatchNorm whose parameters are all frozen keeps its statistics."""
    model.train()
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        if isinstance(module, _BatchNorm) and own and not any(p.requires_grad for p in own):
            module.eval()


def parameter_groups(model: nn.Module, layer_decay: float) -> list[dict[str, Any]]:
    """The parameters to train, as groups for an optimizer, each with its ``lr_scale``.

    The head and the norms before it take the learning rate as it is; from a layer to the one
    before it, and from the first layer to what feeds it, the rate is multiplied by
    ``layer_decay``. At 1 there is one group.
    """
    top = len(getattr(model, "layers", ())) + 1
    groups: dict[float, list[nn.Parameter]] = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            scale = layer_decay ** (top - _depth(name, top))
            groups.setdefault(scale, []).append(p)
    return [{"params": params, "lr_scale": scale} for scale, params in groups.items()]


def _depth(name: str, top: int) -> int:
    if name.startswith("layers."):
        return int(name.split(".")[1]) + 1
    return top if name.startswith(("head", "norm")) else 0
