"""ImageNet's weights of the trunks, as timm has them: from its cache, else from the hub."""

from typing import Any

from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # its client's
from safetensors import SafetensorError
from torch import Tensor

from fastat.models.ast import TRUNKS
from fastat.system.errors import Failure, UserError

RESNETS = {"resnet50": "resnet50.tv_in1k", "resnet34": "resnet34.tv_in1k"}
"""timm's names of torchvision's weights, which the paper's authors started from."""

WEIGHTS = "model.safetensors"

NO_ANSWER = (OSError, HTTPError)
"""What the hub's client raises without a network, in offline mode, and for a file it refuses."""


def trunk_name(model: str, options: dict[str, Any]) -> str:
    """timm's name for the pretrained trunk of a model.

    Raises:
        UserError: the model has none.
    """
    if model == "ast":
        return f"{TRUNKS[options.get('size', 'base384')]}.fb_in1k"
    if model not in RESNETS:
        raise UserError(f"no ImageNet weights exist for {model}; --no-pretrained does without")
    return RESNETS[model]


def imagenet_state(model: str, options: dict[str, Any]) -> dict[str, Tensor]:
    """The trunk's state dict under timm's names, ImageNet's classifier included.

    Args:
        options: of the model; AST's size decides.

    Raises:
        UserError: the model has none.
        Failure: neither timm's cache nor the hub has it, or it is damaged.
    """
    import timm  # takes three seconds, which other models need not wait for

    name = trunk_name(model, options)
    repository: str = timm.models.get_pretrained_cfg(name).hf_hub_id
    source: dict[str, Any] = {}
    cached = try_to_load_from_cache(repository, WEIGHTS)
    try:
        if isinstance(cached, str):
            # Given the file, timm does not ask the hub for a newer one, which takes 20 s offline.
            source = {"file": cached}
        else:
            # One quick question: timm's own would be retried for 45 s before it fails.
            get_hf_file_metadata(hf_hub_url(repository, WEIGHTS))
        trunk = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=source)
    except NO_ANSWER as error:
        raise Failure(
            f"ImageNet's weights {repository} are neither in timm's cache nor to be had from the "
            f"hub ({error}): --no-pretrained trains from scratch, --init FILE takes weights from "
            "disk"
        ) from error
    except (SafetensorError, RuntimeError) as error:
        raise Failure(f"{cached or repository} is damaged: {error}") from error
    state: dict[str, Tensor] = trunk.state_dict()
    return state
