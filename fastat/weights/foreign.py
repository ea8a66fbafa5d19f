"""Other people's checkpoints: reading them, without running code, under our names."""

import json
import pickle
import re
import struct
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from fastat.checkpoint import load_tensors
from fastat.data.classes import check_class_name
from fastat.data.shards import ClassInfo
from fastat.errors import Failure, UserError
from fastat.weights.layouts import HF_AST
from fastat.weights.translate import Translated, translate

CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"
HF_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
PICKLES = (".pth", ".pt", ".bin", ".ckpt", ".pkl")
NESTED = ("state_dict", "model_state_dict", "model")
"""Keys under which training scripts save a state dict beside other things."""

DAMAGE = (
    OSError, RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError,
    AssertionError, struct.error,
)  # fmt: skip
"""What torch.load raises for damaged files, beside UnpicklingError: found by damaging some."""

OURS = "fastat"
"""Key of the config.json that we write, for what no key of theirs can say."""

HF_MODEL = "audio-spectrogram-transformer"
HEAD_WIDTH = 64
"""Of an attention head, in every size of DeiT."""


@dataclass(frozen=True, kw_only=True)
class Foreign:
    """Another project's checkpoint under our names."""

    source: str
    translated: Translated
    config: dict[str, Any] | None = None
    """config.json of a Hugging Face folder."""
    preprocessor: dict[str, Any] | None = None
    """Its preprocessor_config.json."""


def read_foreign(path: Path) -> Foreign:
    """A Hugging Face folder, a pickle (read with weights_only) or a safetensors file.

    Raises:
        UserError: nothing of the kind there, one that carries code, or in no known layout.
        Failure: a damaged file.
    """
    config = preprocessor = None
    file = path
    if path.is_dir():
        found = [path / name for name in HF_WEIGHTS if (path / name).is_file()]
        if not found:
            raise UserError(
                f"{path}: expected a run, a checkpoint, or a Hugging Face folder with "
                f"{' or '.join(HF_WEIGHTS)}; found neither"
            )
        file = found[0]
        config = _read_json(path / CONFIG)
        if (path / PREPROCESSOR).exists():
            preprocessor = _read_json(path / PREPROCESSOR)
    translated = translate(read_tensors(file), str(path))
    if translated.layout is not HF_AST:
        config = preprocessor = None
    return Foreign(
        source=str(path), translated=translated, config=config, preprocessor=preprocessor
    )


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


def label_names(foreign: Foreign) -> list[str] | None:
    """The class names of a Hugging Face config.json; None when it has none.

    Raises:
        UserError: numbers left out, or a name that is no string.
    """
    labels = None if foreign.config is None else foreign.config.get("id2label")
    if not labels:
        return None
    if not isinstance(labels, dict) or set(labels) != {str(i) for i in range(len(labels))}:
        raise UserError(f"{foreign.source}/{CONFIG}: expected id2label with the keys 0, 1, ...")
    names = [labels[str(i)] for i in range(len(labels))]
    for i, name in enumerate(names):
        if not isinstance(name, str):
            raise UserError(
                f"{foreign.source}/{CONFIG}: expected a name as id2label {i}, got {name!r}"
            )
        check_class_name(name, f"{foreign.source}/{CONFIG}")
    if all(name == f"LABEL_{i}" for i, name in enumerate(names)):  # transformers' own filling
        return None
    return names


def classes_of(foreign: Foreign) -> tuple[ClassInfo, ...] | None:
    """The class list of a Hugging Face config.json, id = name; None when it has none.

    Raises:
        UserError: numbers left out, or a name twice.
    """
    names = label_names(foreign)
    if names is None:
        return None
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(
            f"{foreign.source}/{CONFIG}: class {twice!r} is there twice: --labels gives ids"
        )
    kept = own_entry(foreign.config).get("classes")
    if isinstance(kept, list) and all(
        isinstance(c, list) and [type(part) for part in c] == [str, str] for c in kept
    ):
        if names in ([c[1] for c in kept], [c[0] for c in kept]):  # no head fine-tuned since
            return tuple(ClassInfo(*c) for c in kept)
    return tuple(ClassInfo(name, name) for name in names)


def number(document: dict[str, Any], name: str, source: str, default: float | None = None) -> float:
    """A finite number of a JSON document.

    Raises:
        UserError: it is none, or is missing and has no default.
    """
    value: Any = document.get(name, default)
    # Not math.isfinite, which a whole number of 400 digits overflows.
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    if not (plain and abs(value) <= sys.float_info.max):
        raise UserError(f"{source}: expected a finite number as {name}, got {value!r}")
    return float(value)


def flag(document: dict[str, Any], name: str, source: str, default: bool) -> bool:
    """True or false in a JSON document.

    Raises:
        UserError: it is neither.
    """
    value = document.get(name, default)
    if not isinstance(value, bool):
        raise UserError(f"{source}: expected true or false as {name}, got {value!r}")
    return value


def own_entry(config: dict[str, Any] | None) -> dict[str, Any]:
    """What we wrote into a Hugging Face config.json beside its own keys; empty if nothing."""
    entry = (config or {}).get(OURS, {})
    return entry if isinstance(entry, dict) else {}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: expected JSON: {error}") from error
    if not isinstance(document, dict):
        raise UserError(f"{path}: expected a JSON object, got {type(document).__name__}")
    return document
