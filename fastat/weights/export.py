"""Our checkpoints in other projects' formats: Hugging Face AST folders, and timm trunks."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from fastat.atomic import atomic_path
from fastat.checkpoint import ModelMeta, save_tensors
from fastat.errors import Failure, UserError
from fastat.features import FEATURES
from fastat.weights.describe import EXTRACTOR, EXTRACTOR_FEATURE, OUR_NORM_EPS
from fastat.weights.foreign import CONFIG, HEAD_WIDTH, HF_MODEL, HF_WEIGHTS, OURS, PREPROCESSOR
from fastat.weights.layouts import HF_RULES, RESNET_TRUNK
from fastat.weights.translate import to_theirs
from fastat_kernels.patch_embed import PATCH

TRUNK_SUFFIX = ".safetensors"


def save_hugging_face(folder: Path, state: dict[str, Tensor], meta: ModelMeta) -> list[str]:
    """Writes what ASTForAudioClassification and ASTFeatureExtractor load; returns notes.

    Raises:
        UserError: the model has no such layout.
        Failure: the disk is full or the folder cannot be written; nothing is left of it.
    """
    if meta.model != "ast":
        raise UserError(
            f"only ast has a Hugging Face layout, this is {meta.model} (resnet50 and resnet34 can "
            f"be written as timm's trunk, to a file with {TRUNK_SUFFIX})"
        )
    notes = []
    documents = {CONFIG: _config(state, meta)}
    if meta.feature == EXTRACTOR_FEATURE:
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
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(folder) as temporary:
            temporary.mkdir()
            # transformers refuses a safetensors file that does not name its framework.
            theirs = to_theirs(state, HF_RULES)
            save_tensors(theirs, temporary / HF_WEIGHTS[0], metadata={"format": "pt"})
            for name, document in documents.items():
                (temporary / name).write_text(json.dumps(document, indent=2) + "\n")
    except (OSError, SafetensorError) as error:
        raise Failure(f"cannot write {folder}: {error}") from error
    return notes


def _config(state: dict[str, Tensor], meta: ModelMeta) -> dict[str, Any]:
    width = state["head_norm.weight"].numel()
    names = [c.name for c in meta.classes]
    norm_eps = meta.options.get("norm_eps")
    labels = names if len(set(names)) == len(names) else [c.id for c in meta.classes]
    return {
        "architectures": ["ASTForAudioClassification"],
        "model_type": HF_MODEL,
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
        # What no key of theirs can say.
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


def save_trunk(path: Path, state: dict[str, Tensor], meta: ModelMeta) -> list[str]:
    """Writes a ResNet's trunk under timm's and torchvision's names; returns notes.

    Raises:
        UserError: the model has no such trunk.
        Failure: the disk is full or the file cannot be written; nothing is left of it.
    """
    if not meta.model.startswith("resnet"):
        raise UserError(
            f"only resnet50 and resnet34 have a trunk that timm can load, this is {meta.model}"
        )
    trunk = to_theirs(state, RESNET_TRUNK.rules)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            save_tensors(trunk, temporary)
    except (OSError, SafetensorError) as error:
        raise Failure(f"cannot write {path}: {error}") from error
    return ["the stem has one channel: timm.create_model(..., in_chans=1, num_classes=0)"]
