"""An AST's folder as transformers has it: reading its JSON files, and writing such a folder."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from fastat.audio.features import FEATURES
from fastat.data.shards import ClassInfo
from fastat.system.errors import UserError
from fastat.weights.checkpoint import ModelMeta, save_tensors
from fastat.weights.layouts import HF_RULES
from fastat.weights.translate import to_theirs
from fastat_kernels.patch_embed import PATCH

CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"
SAFETENSORS = "model.safetensors"

MODEL_TYPE = "audio-spectrogram-transformer"
EXTRACTOR = "ASTFeatureExtractor"
AST_FEATURE = "fbank128"
"""What ASTFeatureExtractor computes."""
AST_STATISTICS = {"mean": -4.2677393, "std": 4.5689974, "remove_mean": False}
"""AudioSet's statistics in AST's code and in transformers, which remove no clip's mean."""

HEAD_WIDTH = 64
"""Width of an attention head in every size of DeiT."""
HF_NORM_EPS = 1e-12
"""transformers' default of layer_norm_eps, which holds for every LayerNorm."""
OUR_NORM_EPS = 1e-6
"""What we write as layer_norm_eps for an AST of ours without norm_eps."""

OURS = "fastat"
"""Key of the config.json that we write, for what none of transformers' keys can say."""


@dataclass(frozen=True, kw_only=True)
class AstConfig:
    """What config.json and preprocessor_config.json say about an AST."""

    num_mels: int
    num_frames: int
    num_heads: int | None
    options: dict[str, Any]
    classes: tuple[ClassInfo, ...] | None
    clip_seconds: float | None = None
    """None in folders that fastat did not write."""
    statistics: dict[str, Any] = field(default_factory=dict)


def read_config(folder: Path) -> AstConfig:
    """Reads the JSON files of a Hugging Face folder; keys left out have transformers' defaults.

    Raises:
        UserError: a file is missing or damaged, or describes a model that is no AST of ours.
    """
    path = folder / CONFIG
    config = _read_json(path)
    fixed = {"model_type": MODEL_TYPE, "hidden_act": "gelu", "patch_size": PATCH, "qkv_bias": True}
    _check_fixed(config, fixed, path)
    own = config.get(OURS, {})
    try:
        options = {
            "fstride": int(config.get("frequency_stride", 10)),
            "tstride": int(config.get("time_stride", 10)),
            "norm_eps": float(config.get("layer_norm_eps", HF_NORM_EPS)),
        }
        num_mels = int(config.get("num_mel_bins", 128))
        num_frames = int(config.get("max_length", 1024))
        classes = _classes(config.get("id2label"), own.get("classes", ()))
    except KeyError as error:
        raise UserError(
            f"{path}: expected id2label with the keys 0, 1, ..., lacks {error}"
        ) from error
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is damaged: {error}") from error
    if own.get("norm_eps", 0.0) is None and options["norm_eps"] == OUR_NORM_EPS:
        del options["norm_eps"]
    statistics = {k: own[k] for k in ("mean", "std", "remove_mean", "normalize") if k in own}
    if (folder / PREPROCESSOR).exists():
        statistics = (statistics or AST_STATISTICS) | _preprocessor_statistics(folder)
    return AstConfig(
        num_mels=num_mels,
        num_frames=num_frames,
        num_heads=config.get("num_attention_heads"),
        options=options,
        classes=classes,
        clip_seconds=own.get("clip_seconds"),
        statistics=statistics,
    )


def _preprocessor_statistics(folder: Path) -> dict[str, Any]:
    """mean, std and normalize by preprocessor_config.json."""
    path = folder / PREPROCESSOR
    document = _read_json(path)
    spec = FEATURES[AST_FEATURE]
    fixed = {
        "feature_extractor_type": EXTRACTOR,
        "sampling_rate": spec.sample_rate,
        "num_mel_bins": spec.num_mels,
    }
    _check_fixed(document, fixed, path)
    return {
        "mean": document.get("mean", AST_STATISTICS["mean"]),
        "std": document.get("std", AST_STATISTICS["std"]),
        "normalize": document.get("do_normalize", True),
    }


def _classes(labels: Any, ours: Any) -> tuple[ClassInfo, ...] | None:
    """The classes of id2label, whose ids are their names; None where transformers filled it in.

    ``ours`` are the classes that we wrote beside it. They have ids, and count unless the head was
    fine-tuned for others since.
    """
    names = [labels[str(i)] for i in range(len(labels or ()))]
    if all(name == f"LABEL_{i}" for i, name in enumerate(names)):
        return None
    classes = tuple(ClassInfo(*c) for c in ours)
    if names in ([c.name for c in classes], [c.id for c in classes]):
        return classes
    return tuple(ClassInfo(name, name) for name in names)


def _check_fixed(document: dict[str, Any], expected: dict[str, Any], path: Path) -> None:
    for key, value in expected.items():
        if (got := document.get(key, value)) not in (value, [value, value]):
            raise UserError(f"{path}: expected {key} {value!r}, got {got!r}")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: expected JSON: {error}") from error
    if not isinstance(document, dict):
        raise UserError(f"{path}: expected a JSON object, got {type(document).__name__}")
    return document


def clip_seconds_of(num_frames: int, feature: str, given: float | None) -> float | None:
    """The clip length that has ``num_frames`` frames: ``given``, else in whole seconds if possible.

    None when ``given`` (or any length) has another number of frames.
    """
    spec = FEATURES[feature]
    longest = num_frames * spec.hop_samples / spec.sample_rate
    candidates = (*range(math.floor(longest), 0, -1), longest) if given is None else (given,)
    fitting = (s for s in candidates if spec.num_frames(round(s * spec.sample_rate)) == num_frames)
    seconds = next(fitting, None)
    return None if seconds is None else float(seconds)


# ---------------------------------------------------------------------------------------- writing
def write_hugging_face(folder: Path, state: dict[str, Tensor], meta: ModelMeta) -> list[str]:
    """Writes what ASTForAudioClassification and ASTFeatureExtractor load; returns notes."""
    notes = []
    documents = {CONFIG: _config(state, meta)}
    if meta.feature == AST_FEATURE:
        documents[PREPROCESSOR] = _preprocessor(meta)
    else:
        notes.append(
            f"transformers has no extractor for {meta.feature}: no {PREPROCESSOR} is written; "
            "fastat extract gives the features"
        )
    if len({c.name for c in meta.classes}) < len(meta.classes):
        notes.append("two classes share a name: id2label holds ids")
    if meta.options.get("norm_eps") is None:
        notes.append(
            f"transformers has one epsilon for every LayerNorm: {OUR_NORM_EPS:g} also in the head, "
            "where it is 1e-5 here"
        )
    folder.mkdir()
    # transformers refuses a safetensors file that does not name its framework.
    save_tensors(to_theirs(state, HF_RULES), folder / SAFETENSORS, metadata={"format": "pt"})
    for name, document in documents.items():
        (folder / name).write_text(json.dumps(document, indent=2) + "\n")
    return notes


def _config(state: dict[str, Tensor], meta: ModelMeta) -> dict[str, Any]:
    width = state["head_norm.weight"].numel()
    names = [c.name for c in meta.classes]
    norm_eps = meta.options.get("norm_eps")
    labels = names if len(set(names)) == len(names) else [c.id for c in meta.classes]
    return {
        "architectures": ["ASTForAudioClassification"],
        "model_type": MODEL_TYPE,
        "hidden_size": width,
        "num_hidden_layers": len({n.split(".")[1] for n in state if n.startswith("layers.")}),
        "num_attention_heads": width // HEAD_WIDTH,
        "intermediate_size": 4 * width,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": OUR_NORM_EPS if norm_eps is None else norm_eps,
        "patch_size": PATCH,
        "qkv_bias": True,
        "frequency_stride": meta.options.get("fstride", 10),
        "time_stride": meta.options.get("tstride", 10),
        "max_length": meta.num_frames,
        "num_mel_bins": meta.num_mels,
        "problem_type": "multi_label_classification",
        "id2label": {str(i): label for i, label in enumerate(labels)},
        "label2id": {label: i for i, label in enumerate(labels)},
        # What none of their keys can say.
        OURS: {
            "clip_seconds": meta.clip_seconds,
            "mean": meta.mean,
            "std": meta.std,
            "remove_mean": meta.remove_mean,
            "normalize": meta.normalize,
            "norm_eps": norm_eps,
            "classes": meta.classes,
        },
    }


def _preprocessor(meta: ModelMeta) -> dict[str, Any]:
    return {
        "feature_extractor_type": EXTRACTOR,
        "feature_size": 1,
        "sampling_rate": FEATURES[meta.feature].sample_rate,
        "num_mel_bins": meta.num_mels,
        "max_length": meta.num_frames,
        "padding_value": 0.0,
        "padding_side": "right",
        "do_normalize": meta.normalize,
        "mean": meta.mean,
        "std": meta.std,
        "return_attention_mask": False,
    }
