"""The models by name. Every model maps [B, T, F] float32 features to [B, K] float32 logits."""

import inspect
from typing import Any

from torch import nn

from fastat.errors import UserError, nearest
from fastat.models.cnn_trans import CnnTransformer

MODELS: dict[str, type[nn.Module]] = {"cnn_trans": CnnTransformer}

IMAGENET_MODELS: frozenset[str] = frozenset()
"""Models with an ImageNet-trained trunk to start from."""


def list_models() -> list[str]:
    """The names that create_model knows."""
    return list(MODELS)


def create_model(
    name: str, *, num_mels: int, num_frames: int, num_classes: int, **options: Any
) -> nn.Module:
    """A model with fresh weights.

    Raises:
        UserError: an unknown name or option (with the nearest known one), or an impossible value.
    """
    if name not in MODELS:
        raise UserError(f"unknown model {name!r}{nearest(name, MODELS)}")
    known = list(inspect.signature(MODELS[name]).parameters)
    for option in options:
        if option not in known:
            raise UserError(f"model {name} has no option {option!r}{nearest(option, known)}")
    try:
        return MODELS[name](
            num_mels=num_mels, num_frames=num_frames, num_classes=num_classes, **options
        )
    except (ValueError, TypeError) as error:
        raise UserError(f"model {name}: {error}") from error
