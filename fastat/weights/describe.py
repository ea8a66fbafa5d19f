"""The model that a foreign checkpoint is of: what the shapes of its tensors say.

What they cannot say comes from the user (``feature``, ``settings``) or is the paper's.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from fastat.errors import UserError
from fastat.features import FEATURES
from fastat.models.ast import patch_grid
from fastat.procedures import AUTHORS_OPTIONS
from fastat.weights.foreign import (
    CONFIG,
    HEAD_WIDTH,
    HF_MODEL,
    PREPROCESSOR,
    Foreign,
    number,
    own_entry,
)
from fastat.weights.layouts import HF_AST
from fastat_kernels.patch_embed import NUM_SPECIAL, PATCH

CLIP_SECONDS = 10.0
AST_SIZES = {192: "tiny224", 384: "small224", 768: "base384"}
"""Our size by width; base224 has base384's shapes."""
AST_STRIDES = range(4, 17)
"""Strides that are tried where only the number of patches is known."""

HF_NORM_EPS = 1e-12
"""transformers' default of layer_norm_eps, of every LayerNorm."""
OUR_NORM_EPS = 1e-6
"""What we write as layer_norm_eps for an AST of ours without norm_eps."""
MAX_NORM_EPS = 0.1
MAX_FRAMES = 2**20
"""Three hours of fbank128."""
EXTRACTOR, EXTRACTOR_FEATURE = "ASTFeatureExtractor", "fbank128"
"""transformers' one for AST, and what it computes."""


@dataclass(frozen=True, kw_only=True)
class Described:
    """The model that a checkpoint is of."""

    options: dict[str, Any]
    feature: str | None
    """None: the weights fit any, and the user named none."""
    num_frames: int | None
    clip_seconds: float = CLIP_SECONDS
    grid: tuple[int, int] | None = None
    """AST's patches along the mel and the time axis."""
    notes: list[str] = field(default_factory=list)


def describe(
    foreign: Foreign,
    feature: str | None = None,
    settings: dict[str, Any] | None = None,
    clip_seconds: float | None = None,
) -> Described:
    """Feature and model options: what the shapes say, then ``settings``, then the paper.

    Raises:
        UserError: contradictory or insufficient; says what to add.
    """
    settings = settings or {}
    if feature is not None and feature not in FEATURES:
        raise UserError(f"feature must be one of {', '.join(FEATURES)}, got {feature!r}")
    if clip_seconds is not None and not 0 < clip_seconds < math.inf:
        raise UserError(f"clip-seconds must be finite and > 0, got {clip_seconds}")
    model = foreign.translated.model
    if model == "ast":
        return _describe_ast(foreign, feature, settings, clip_seconds)
    state = foreign.translated.state
    options: dict[str, Any] = {}
    trunk = foreign.translated.layout.trunk
    if "head.fc_att.weight" not in state and "pooling" not in settings and not trunk:
        raise UserError(
            f"{foreign.source}: without fc_att its pooling is unknown: say which to fastat convert "
            "with --set model.pooling=max, ave, lin or exp"
        )
    if model in ("cnn_trans", "crnn"):
        width = shape_of(foreign, "head.fc_prob.weight", 2)[1]
        channels = shape_of(foreign, "talnet.blocks.0.conv.weight", 4)[0]
        options["embedding"] = width
        feature = _feature_of(2 * width // channels, feature, foreign.source)
    if model == "cnn_trans":
        options |= {"num_layers": 2, "num_heads": 8} | AUTHORS_OPTIONS[model]
    if model.startswith("resnet") and not trunk:
        options["pooling"] = "sigatt"
    seconds = clip_seconds or CLIP_SECONDS
    frames = None if feature is None else _frames(feature, seconds)
    notes = []
    if model.startswith("resnet") and feature == "logmel64" and not trunk:
        notes.append(
            "at 64 mels the authors' code scrambles time and channels before it pools, which is "
            "not reproduced: the weights are theirs, the output differs"
        )
    return Described(
        options=options | settings,
        feature=feature,
        num_frames=frames,
        clip_seconds=seconds,
        notes=notes,
    )


def _frames(feature: str, clip_seconds: float) -> int:
    spec = FEATURES[feature]
    return spec.num_frames(round(clip_seconds * spec.sample_rate))


def shape_of(foreign: Foreign, name: str, ndim: int) -> tuple[int, ...]:
    """Of a tensor (our name) that cannot be done without.

    Raises:
        UserError: it is missing, or has another number of axes.
    """
    theirs = foreign.translated.layout.theirs(name)
    if name not in foreign.translated.state:
        raise UserError(f"{foreign.source}: lacks tensor {theirs}")
    shape = tuple(foreign.translated.state[name].shape)
    if len(shape) != ndim or 0 in shape:
        raise UserError(f"{foreign.source}: expected {ndim} axes of tensor {theirs}, got {shape}")
    return shape


def _feature_of(num_mels: int, given: str | None, source: str) -> str:
    """The feature with so many mel bins."""
    name = next((f.name for f in FEATURES.values() if f.num_mels == num_mels), None)
    if name is None:
        known = ", ".join(f"{f.num_mels} ({f.name})" for f in FEATURES.values())
        raise UserError(f"{source}: it takes {num_mels} mel bins; known: {known}")
    if given not in (None, name):
        raise UserError(f"{source}: it takes {num_mels} mel bins, so {name}, not {given}")
    return name


# ---------------------------------------------------------------------------------------------- AST
def _describe_ast(
    foreign: Foreign, feature: str | None, settings: dict[str, Any], clip_seconds: float | None
) -> Described:
    state = foreign.translated.state
    _, num_tokens, width = shape_of(foreign, "pos_embed", 3)
    if width not in AST_SIZES:
        known = ", ".join(f"{width} ({name})" for width, name in AST_SIZES.items())
        raise UserError(f"{foreign.source}: width {width} is no AST of ours; known: {known}")
    layers = {int(name.split(".")[1]) for name in state if name.startswith("layers.")}
    options: dict[str, Any] = {"size": AST_SIZES[width], "num_layers": len(layers)}
    num_patches = num_tokens - NUM_SPECIAL
    if foreign.translated.layout.trunk:
        side = math.isqrt(num_patches)
        if side * side != num_patches:
            raise UserError(f"{foreign.source}: expected a square of patches, got {num_patches}")
        return Described(
            options=options | settings, feature=None, num_frames=None, grid=(side, side)
        )
    notes = []
    if foreign.config is not None:
        feature, num_frames, found = _from_config(foreign, feature, width)
    else:
        clip_seconds = clip_seconds or CLIP_SECONDS
        feature, found = _search(foreign.source, num_patches, feature, settings, clip_seconds)
        num_frames = _frames(feature, clip_seconds)
        if foreign.translated.layout is HF_AST:
            found["norm_eps"] = HF_NORM_EPS
            notes.append(f"no {CONFIG}: layer_norm_eps is taken to be {HF_NORM_EPS:g}")
    options |= found | settings
    _check_strides(options)
    grid = patch_grid(
        FEATURES[feature].num_mels, num_frames, options["fstride"], options["tstride"]
    )
    if math.prod(grid) != num_patches:
        raise UserError(
            f"{foreign.source}: {FEATURES[feature].num_mels} x {num_frames} with strides "
            f"{options['fstride']}x{options['tstride']} has {math.prod(grid)} patches, "
            f"its positions are of {num_patches}"
        )
    if foreign.config is not None:  # now that its max_length is known to be a possible one
        clip_seconds = _clip_seconds(foreign, feature, num_frames, clip_seconds)
        _check_preprocessor(foreign, feature, num_frames)
    assert clip_seconds is not None
    return Described(
        options=options,
        feature=feature,
        num_frames=num_frames,
        clip_seconds=clip_seconds,
        grid=grid,
        notes=notes,
    )


def _check_strides(options: dict[str, Any]) -> None:
    for name in ("fstride", "tstride"):
        value = options.get(name, 1)
        if type(value) is not int or not 1 <= value <= PATCH:
            raise UserError(f"--set model.{name} takes an integer in 1..{PATCH}, got {value!r}")


def _search(
    source: str,
    num_patches: int,
    feature: str | None,
    settings: dict[str, Any],
    clip_seconds: float,
) -> tuple[str, dict[str, Any]]:
    """The feature and the strides that give so many patches."""

    def candidates() -> Iterator[tuple[str, int, int]]:
        given = [settings.get(name) for name in ("fstride", "tstride")]
        for name in FEATURES if feature is None else (feature,):
            frames = _frames(name, clip_seconds)
            if frames < PATCH:
                continue
            for f in AST_STRIDES if given[0] is None else (given[0],):
                for t in AST_STRIDES if given[1] is None else (given[1],):
                    if (f == t or given != [None, None]) and math.prod(
                        patch_grid(FEATURES[name].num_mels, frames, f, t)
                    ) == num_patches:
                        yield name, f, t

    _check_strides(settings)
    found = list(candidates())
    if len(found) != 1:
        what = ", ".join(f"{name} {f}x{t}" for name, f, t in found) or "no feature and stride"
        raise UserError(
            f"{source}: its {num_patches} positions fit {what}: say which to fastat convert with "
            "--feature, --set model.fstride=.. --set model.tstride=.."
        )
    name, f, t = found[0]
    return name, {"fstride": f, "tstride": t}


def _from_config(
    foreign: Foreign, feature: str | None, width: int
) -> tuple[str, int, dict[str, Any]]:
    """Feature, frames and options by a Hugging Face config.json."""
    config, source = foreign.config, f"{foreign.source}/{CONFIG}"
    assert config is not None
    expected = {
        "model_type": HF_MODEL,
        "hidden_act": "gelu",
        "patch_size": PATCH,
        "qkv_bias": True,
        "num_attention_heads": width // HEAD_WIDTH,
    }
    for key, value in expected.items():
        if config.get(key, value) not in (value, [value, value]):
            raise UserError(f"{source}: expected {key} {value!r}, got {config[key]!r}")
    numbers = {}
    for key, default in (
        ("num_mel_bins", 128), ("max_length", 1024), ("frequency_stride", 10), ("time_stride", 10)
    ):  # fmt: skip
        numbers[key] = config.get(key, default)  # transformers' own default where it is left out
        if type(numbers[key]) is not int or numbers[key] < 1:
            raise UserError(f"{source}: expected a whole number as {key}, got {numbers[key]!r}")
    options: dict[str, Any] = {
        "fstride": numbers["frequency_stride"], "tstride": numbers["time_stride"]
    }  # fmt: skip
    if max(options.values()) > PATCH:
        raise UserError(f"{source}: expected strides in 1..{PATCH}, got {options}")
    if not PATCH <= numbers["max_length"] <= MAX_FRAMES:
        raise UserError(
            f"{source}: expected max_length in {PATCH}..{MAX_FRAMES}, got {numbers['max_length']}"
        )
    norm_eps = number(config, "layer_norm_eps", source, HF_NORM_EPS)
    if not 0 <= norm_eps < MAX_NORM_EPS:
        raise UserError(
            f"{source}: expected layer_norm_eps in 0..{MAX_NORM_EPS} (exclusive), got {norm_eps:g}"
        )
    own = own_entry(config)
    if norm_eps != OUR_NORM_EPS or own.get("norm_eps", norm_eps) is not None:
        options["norm_eps"] = norm_eps
    feature = _feature_of(numbers["num_mel_bins"], feature, foreign.source)
    return feature, numbers["max_length"], options


def _check_preprocessor(foreign: Foreign, feature: str, num_frames: int) -> None:
    """It computes this feature."""
    if foreign.preprocessor is None:
        return
    expected = {
        "feature_extractor_type": EXTRACTOR,
        "sampling_rate": FEATURES[feature].sample_rate,
        "num_mel_bins": FEATURES[feature].num_mels,
        "max_length": num_frames,
    }
    source = f"{foreign.source}/{PREPROCESSOR}"
    for key, value in expected.items():
        if (got := foreign.preprocessor.get(key, value)) != value:
            raise UserError(f"{source}: expected {key} {value!r}, got {got!r}")
    if feature != EXTRACTOR_FEATURE:
        raise UserError(f"{source}: {EXTRACTOR} computes no {feature}, only {EXTRACTOR_FEATURE}")


def _clip_seconds(foreign: Foreign, feature: str, num_frames: int, given: float | None) -> float:
    """The user's, ours, or the longest in whole seconds where possible, with so many frames."""
    own, source = own_entry(foreign.config), f"{foreign.source}/{CONFIG}"
    if given is None and "clip_seconds" in own:
        given = number(own, "clip_seconds", source)
        if given <= 0:
            raise UserError(f"{source}: expected clip_seconds > 0, got {given:g}")
    spec = FEATURES[feature]
    exact = num_frames * spec.hop_samples / spec.sample_rate
    whole = range(math.floor(exact), 0, -1)
    for seconds in (*whole, exact) if given is None else (given,):
        if _frames(feature, seconds) == num_frames:
            return float(seconds)
    clip = "no clip" if given is None else f"no clip of {given:g} s"
    raise UserError(f"{source}: {clip} has max_length {num_frames} of {feature}")
