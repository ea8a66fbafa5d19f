"""The models by name. Every model maps [B, T, F] float32 features to [B, K] float32 logits."""

import inspect
from typing import Any

from fastat.config.fields import check_value
from fastat.models.ast import Ast
from fastat.models.base import TaggingModel
from fastat.models.cnn_trans import CnnTransformer
from fastat.models.conformer import Conformer
from fastat.models.crnn import Crnn
from fastat.models.resnet import ResNet34, ResNet50
from fastat.models.transformer import Transformer
from fastat.system.errors import UserError, first_line, nearest

MODELS: dict[str, type[TaggingModel]] = {
    "ast": Ast,
    "transformer": Transformer,
    "cnn_trans": CnnTransformer,
    "conformer": Conformer,
    "resnet50": ResNet50,
    "resnet34": ResNet34,
    "crnn": Crnn,
}

MAX_LAYERS = 1000
"""More would take hours to make, let alone to train."""

IMAGENET_MODELS = frozenset({"ast", "resnet50", "resnet34"})
"""Models with an ImageNet-trained trunk to start from."""


def list_models() -> list[str]:
    """The names that create_model knows."""
    return list(MODELS)


def create_model(
    name: str,
    *,
    num_mels: int,
    num_frames: int,
    num_classes: int,
    activation_checkpointing: bool = False,
    **options: Any,
) -> TaggingModel:
    """A model with fresh weights.

    Args:
        activation_checkpointing: computes each block's activations again in the backward pass
            instead of keeping them: less memory, a third more operations.
        options: the model's own.

    Raises:
        UserError: an unknown name or option (with the nearest known one), or an impossible value.
    """
    if name not in MODELS:
        raise UserError(f"unknown model {name!r}{nearest(name, MODELS)}")
    if min(num_mels, num_frames, num_classes) < 1:
        raise UserError(
            f"model {name}: num_mels, num_frames and num_classes must be >= 1, "
            f"got {num_mels}, {num_frames} and {num_classes}"
        )
    parameters = inspect.signature(MODELS[name]).parameters
    known = {key: p.annotation for key, p in parameters.items()}
    known["activation_checkpointing"] = bool
    given = options | {"activation_checkpointing": activation_checkpointing}
    for option, value in given.items():
        if option not in known:
            raise UserError(f"model {name} has no option {option!r}{nearest(option, known)}")
        check_value(f"model {name}: {option}", value, known[option])
    if options.get("num_layers", 1) > MAX_LAYERS:
        raise UserError(
            f"model {name}: num_layers must be at most {MAX_LAYERS}, got {options['num_layers']}"
        )
    try:
        model = MODELS[name](
            num_mels=num_mels, num_frames=num_frames, num_classes=num_classes, **options
        )
    except (ValueError, TypeError) as error:
        raise UserError(f"model {name}: {error}") from error
    except RuntimeError as error:
        if "overflow" not in str(error):
            raise
        raise UserError(f"model {name} is too large: {first_line(error)}") from error
    model.checkpointing = activation_checkpointing
    return model
