"""Other people's checkpoints: reading them without running code, and the model they are of.

The model is recognised by the shapes of its tensors. What those leave open comes from config.json
of a Hugging Face folder, from the user (``feature``, ``settings``) or from the paper.
"""

import math
import pickle
import re
import struct
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from fastat.audio.features import FEATURES
from fastat.config.procedures import AUTHORS_OPTIONS
from fastat.models.ast import patch_grid
from fastat.system.errors import Failure, UserError
from fastat.weights.checkpoint import load_tensors
from fastat.weights.hugging_face import (
    CONFIG,
    HEAD_WIDTH,
    HF_NORM_EPS,
    SAFETENSORS,
    AstConfig,
    clip_seconds_of,
    read_config,
)
from fastat.weights.layouts import HF_AST
from fastat.weights.translate import Weights, translate
from fastat_kernels.patch_embed import NUM_SPECIAL, PATCH

HF_FILES = (SAFETENSORS, "pytorch_model.bin")
PICKLES = (".pth", ".pt", ".bin", ".ckpt", ".pkl")
NESTED = ("state_dict", "model_state_dict", "model")
"""Keys under which training scripts save a state dict beside other things."""
DAMAGE = (OSError, RuntimeError, EOFError, LookupError, struct.error)
"""What torch.load raises for truncated files, beside UnpicklingError."""

AST_SIZES = {192: "tiny224", 384: "small224", 768: "base384"}
"""Our size by width; base224 has base384's shapes."""


# ------------------------------------------------------------------------------------------ reading
def read_foreign(
    path: Path,
    feature: str | None = None,
    settings: dict[str, Any] | None = None,
    clip_seconds: float | None = None,
) -> Weights:
    """Reads a Hugging Face folder, a pickle (with weights_only) or a safetensors file.

    Args:
        feature, settings, clip_seconds: what the user says of the model, beside the file.

    Raises:
        UserError: nothing of the kind there, one that carries code or fits no layout, or the model
            is not determined by it; says what was found and what to add.
        Failure: a damaged safetensors file.
    """
    file = path
    if path.is_dir():
        found = [path / name for name in HF_FILES if (path / name).is_file()]
        if not found:
            raise UserError(
                f"{path}: expected a run, a checkpoint, or a Hugging Face folder with "
                f"{' or '.join(HF_FILES)}; found neither"
            )
        file = found[0]
    weights = translate(read_tensors(file), str(path))
    config = read_config(path) if path.is_dir() and weights.layout is HF_AST else None
    describe(weights, config, feature, settings or {}, clip_seconds)
    return weights


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The state dict in a file.

    Raises:
        UserError: no such file, of another kind, without a state dict, or one that carries code.
        Failure: a damaged safetensors file.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint")
    if path.suffix == ".safetensors":
        try:
            return load_tensors(path)
        except (OSError, SafetensorError) as error:
            raise Failure(f"{path} is damaged: {error}") from error
    if path.suffix not in PICKLES:
        raise UserError(
            f"{path}: expected a folder, .safetensors or {', '.join(PICKLES)}, got {path.name!r}"
        )
    content = _unpickled(path)
    for key in NESTED:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not content:
        raise UserError(f"{path}: expected a state dict, got {type(content).__name__}")
    for name, value in content.items():
        if not isinstance(value, Tensor):
            raise UserError(f"{path}: expected only tensors, got {name!r}: {type(value).__name__}")
        if value.layout is not torch.strided or value.is_meta or value.is_nested:
            raise UserError(f"{path}: expected dense tensors, and {name!r} is none")
    return {str(name): tensor for name, tensor in content.items()}


def _unpickled(path: Path) -> Any:
    """Tensors and plain values; nothing in the file is run."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        code = re.search(r"GLOBAL (\S+)", str(error))
        what = f"it would run {code[1]} when loaded" if code else "it is damaged or carries code"
        raise UserError(f"{path}: refused: {what}; save its state dict alone") from error
    except DAMAGE as error:
        raise UserError(f"{path} is damaged, or no pickle of torch: {error!r}") from error


# --------------------------------------------------------------------------- the model they are of
def describe(
    weights: Weights,
    config: AstConfig | None = None,
    feature: str | None = None,
    settings: dict[str, Any] | None = None,
    clip_seconds: float | None = None,
) -> None:
    """Completes ``weights`` with the model's options, its feature and what else is known.

    Raises:
        UserError: what is known is contradictory or insufficient; says what to add.
    """
    settings = settings or {}
    weights.feature = feature
    weights.clip_seconds = clip_seconds or weights.clip_seconds
    if weights.model == "ast":
        _describe_ast(weights, config, settings, clip_seconds)
    elif not weights.trunk:
        _describe_authors(weights, settings)
    weights.options |= settings


def _describe_authors(weights: Weights, settings: dict[str, Any]) -> None:
    model, options = weights.model, weights.options
    if "head.fc_att.weight" not in weights.state and "pooling" not in settings:
        raise UserError(
            f"{weights.source}: without fc_att its pooling is unknown: say which to fastat convert "
            "with --set model.pooling=max, ave, lin or exp"
        )
    if model in ("cnn_trans", "crnn"):
        width = shape_of(weights, "head.fc_prob.weight", 2)[1]
        channels = shape_of(weights, "talnet.blocks.0.conv.weight", 4)[0]
        options["embedding"] = width
        weights.feature = _feature_of(2 * width // channels, weights)
    if model == "cnn_trans":
        options |= {"num_layers": 2, "num_heads": 8} | AUTHORS_OPTIONS[model]
    if model.startswith("resnet"):
        options["pooling"] = "sigatt"
        if weights.feature == "logmel64":
            weights.notes.append(
                "at 64 mels the authors' code scrambles time and channels before it pools, which "
                "is not reproduced: the weights are theirs, the output differs"
            )


def _describe_ast(
    weights: Weights,
    config: AstConfig | None,
    settings: dict[str, Any],
    clip_seconds: float | None,
) -> None:
    source, options = weights.source, weights.options
    _, num_tokens, width = shape_of(weights, "pos_embed", 3)
    num_patches = num_tokens - NUM_SPECIAL
    if width not in AST_SIZES:
        known = ", ".join(f"{width} ({name})" for width, name in AST_SIZES.items())
        raise UserError(f"{source}: width {width} is no AST of ours; known: {known}")
    layers = {name.split(".")[1] for name in weights.state if name.startswith("layers.")}
    options |= {"size": AST_SIZES[width], "num_layers": len(layers)}
    if weights.trunk:
        side = math.isqrt(num_patches)
        if side * side != num_patches:
            raise UserError(f"{source}: expected a square of patches, got {num_patches}")
        weights.grid = (side, side)
    elif config is not None:
        _apply_config(weights, config, num_patches, width // HEAD_WIDTH, clip_seconds)
    else:
        weights.feature, (fstride, tstride) = _search(weights, num_patches, settings)
        options |= {"fstride": fstride, "tstride": tstride}
        num_mels = FEATURES[weights.feature].num_mels
        weights.grid = patch_grid(num_mels, weights.num_frames, fstride, tstride)
        if weights.layout is HF_AST:
            options["norm_eps"] = HF_NORM_EPS
            weights.notes.append(f"no {CONFIG}: layer_norm_eps is taken to be {HF_NORM_EPS:g}")


def _search(
    weights: Weights, num_patches: int, settings: dict[str, Any]
) -> tuple[str, tuple[int, int]]:
    """The feature and the strides (mel, time) that have so many patches.

    Without strides in ``settings`` both are taken to be the same.
    """
    f_given, t_given = settings.get("fstride"), settings.get("tstride")
    square = f_given is None and t_given is None
    strides = [
        (f, t)
        for f in range(1, PATCH + 1)
        for t in range(1, PATCH + 1)
        if f_given in (None, f) and t_given in (None, t) and (f == t or not square)
    ]
    found: list[tuple[str, tuple[int, int]]] = []
    for name in FEATURES if weights.feature is None else (weights.feature,):
        spec = FEATURES[name]
        frames = spec.num_frames(round(weights.clip_seconds * spec.sample_rate))
        if frames >= PATCH:
            grids = {(f, t): patch_grid(spec.num_mels, frames, f, t) for f, t in strides}
            found += [(name, s) for s, grid in grids.items() if math.prod(grid) == num_patches]
    if len(found) != 1:
        fitting = [f"{name} {f}x{t}" for name, (f, t) in found]
        raise UserError(
            f"{weights.source}: its {num_patches} positions fit "
            f"{', '.join(fitting) or 'no feature and stride'}: say which to fastat convert with "
            "--feature, --set model.fstride=.. --set model.tstride=.."
        )
    return found[0]


def _apply_config(
    weights: Weights,
    config: AstConfig,
    num_patches: int,
    num_heads: int,
    clip_seconds: float | None,
) -> None:
    """Takes over what a Hugging Face config.json says, once it fits the weights."""
    source = f"{weights.source}/{CONFIG}"
    if config.num_heads not in (None, num_heads):
        raise UserError(
            f"{source}: expected num_attention_heads {num_heads}, got {config.num_heads}"
        )
    num_classes = shape_of(weights, "head.weight", 2)[0]
    if config.classes is not None and len(config.classes) != num_classes:
        raise UserError(
            f"{source}: expected id2label of the head's {num_classes} classes, "
            f"got {len(config.classes)}"
        )
    weights.feature = _feature_of(config.num_mels, weights)
    fstride, tstride = config.options["fstride"], config.options["tstride"]
    try:
        weights.grid = patch_grid(config.num_mels, config.num_frames, fstride, tstride)
    except (ValueError, ZeroDivisionError) as error:
        raise UserError(f"{source}: {error}") from error
    if math.prod(weights.grid) != num_patches:
        raise UserError(
            f"{source}: {config.num_mels} x {config.num_frames} with strides {fstride}x{tstride} "
            f"has {math.prod(weights.grid)} patches, the weights have positions for {num_patches}"
        )
    given = clip_seconds if clip_seconds is not None else config.clip_seconds
    seconds = clip_seconds_of(config.num_frames, weights.feature, given)
    if seconds is None:
        clip = "no clip" if given is None else f"no clip of {given:g} s"
        raise UserError(f"{source}: {clip} has max_length {config.num_frames} of {weights.feature}")
    weights.clip_seconds = seconds
    weights.options |= config.options
    weights.classes, weights.statistics = config.classes, config.statistics


def shape_of(weights: Weights, name: str, ndim: int) -> tuple[int, ...]:
    """Shape of a tensor (our name) that is needed to recognise the model.

    Raises:
        UserError: it is missing, or has another number of axes.
    """
    if name not in weights.state:
        raise UserError(f"{weights.source}: lacks tensor {weights.theirs(name)}")
    shape = tuple(weights.state[name].shape)
    if len(shape) != ndim:
        theirs = weights.theirs(name)
        raise UserError(f"{weights.source}: expected {ndim} axes of {theirs}, got {shape}")
    return shape


def _feature_of(num_mels: int, weights: Weights) -> str:
    """The feature with so many mel bins, which must be the user's if there is one."""
    features = [f for f in FEATURES.values() if weights.feature in (None, f.name)]
    name = next((f.name for f in features if f.num_mels == num_mels), None)
    if name is None:
        expected = " or ".join(f"{f.num_mels} ({f.name})" for f in features)
        raise UserError(f"{weights.source}: expected {expected} mel bins, it takes {num_mels}")
    return name
