"""A checkpoint: a folder with weights in safetensors, and in JSON what prediction needs.

``model.json`` has the checksums of all files in the folder. Nothing that is read here can run code.
A run's checkpoints have one more file, from which it is resumed, see ``training.checkpoints``.
"""

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor, nn

from fastat.audio.features import FEATURES
from fastat.audio.frontend import Frontend
from fastat.config.fields import (
    ANOTHER_VERSION,
    Finite,
    Limit,
    Positive,
    check_fields,
    check_keys,
    fits,
)
from fastat.data.shards import ClassInfo
from fastat.models import create_model
from fastat.models.base import TaggingModel
from fastat.system.errors import Failure, UserError
from fastat.system.files import atomic_path

FORMAT = "fastat-checkpoint"
VERSION = 1
WEIGHTS_FILE, META_FILE = "model.safetensors", "model.json"
MAX_CLIP_SECONDS = 3600
ClipSeconds = Annotated[
    float, Limit(f"a number in (0, {MAX_CLIP_SECONDS}]", lambda x: 0 < x <= MAX_CLIP_SECONDS)
]
Class = Annotated[
    ClassInfo, Limit("a class's id and name", lambda c: fits(c.id, str) and fits(c.name, str))
]


@dataclass(frozen=True, kw_only=True)
class ModelMeta:
    """All that prediction needs beside the weights; ``model.json``.

    Raises:
        UserError: a value is not of its field's type.
    """

    model: str
    feature: str
    clip_seconds: ClipSeconds
    num_mels: int
    num_frames: int
    mean: Finite
    """Of the training features, in the feature's units."""
    std: Positive
    classes: tuple[Class, ...]
    options: dict[str, Any] = field(default_factory=dict)
    """Keyword options of create_model."""
    remove_mean: bool = True
    normalize: bool = True
    trained: dict[str, Any] = field(default_factory=dict)
    """Where it comes from: procedure, epoch, step, mAP."""

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def clip_samples(self) -> int:
        """Length of a clip."""
        return round(self.clip_seconds * FEATURES[self.feature].sample_rate)

    def create(self) -> TaggingModel:
        """The model, with fresh weights."""
        return create_model(
            self.model,
            num_mels=self.num_mels,
            num_frames=self.num_frames,
            num_classes=len(self.classes),
            **self.options,
        )


def build_frontend(meta: ModelMeta) -> Frontend:
    """The front end that the model is trained and used with."""
    return Frontend(
        meta.feature,
        clip_samples=meta.clip_samples,
        mean=meta.mean,
        std=meta.std,
        remove_mean=meta.remove_mean,
        normalize=meta.normalize,
    )


def save_weights(path: Path, state: dict[str, Tensor], meta: ModelMeta) -> None:
    """Writes a checkpoint to predict with or to start from, but not to resume.

    Raises:
        Failure: the disk is full or the folder cannot be written; nothing of it is left.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            temporary.mkdir()
            write_model(temporary, state, meta)
    except (OSError, SafetensorError) as error:
        raise Failure(f"cannot write checkpoint {path}: {error}") from error


def write_model(folder: Path, state: dict[str, Tensor], meta: ModelMeta) -> None:
    """Writes weights and ``model.json`` into ``folder``, with the checksums of all its files."""
    save_tensors({k: v.contiguous() for k, v in state.items()}, folder / WEIGHTS_FILE)
    document = {"format": FORMAT, "version": VERSION, **asdict(meta)}
    sums = {path.name: _file_checksum(path) for path in sorted(folder.iterdir())}
    sums[META_FILE] = _document_checksum(document)
    (folder / META_FILE).write_text(json.dumps({**document, "checksums": sums}, indent=1))


def save_tensors(
    tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None
) -> None:
    """``safetensors.torch.save_file`` with the permissions of the umask, not the owner's alone."""
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata=metadata)
    path.chmod(mode)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, by name. ``safetensors.torch.load_file`` fails on paths that are not
    UTF-8."""
    return dict(sorted(load(path.read_bytes()).items()))


def _file_checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _document_checksum(document: dict[str, Any]) -> str:
    """Checksum of ``model.json`` without its ``checksums``."""
    return hashlib.sha256(json.dumps(document).encode()).hexdigest()


def find_checkpoint(path: Path | str, prefer: str = "best") -> Path:
    """The checkpoint folder of ``path``: itself, or the ``prefer``red one of a run folder, or the
    other one if there is none.

    Raises:
        UserError: there is none.
    """
    path = Path(path)
    if (found := checkpoint_in(path, prefer)) is not None:
        return found
    if path.is_file() and path.suffix in (".pt", ".pth", ".pkl", ".ckpt", ".bin"):
        raise UserError(
            f"{path} is a pickle, which can run code when loaded: refused; "
            "expected a run folder or a checkpoint, which fastat convert makes of it"
        )
    what = "is not" if path.exists() else "does not exist: expected"
    raise UserError(f"{path} {what} a run folder or a checkpoint (no model.json in it)")


def checkpoint_in(path: Path, prefer: str = "best") -> Path | None:
    """The same, also for the path of the weights file; None if there is no checkpoint."""
    other = {"best": "last", "last": "best"}[prefer]
    folder = path.parent if path.name == WEIGHTS_FILE else path
    if (folder / META_FILE).is_file():
        return folder
    for candidate in (path / "checkpoints" / prefer, path / "checkpoints" / other):
        if os.path.lexists(candidate):  # if it is damaged, the other is no silent substitute
            return candidate
    return None


def load_meta(checkpoint: Path) -> ModelMeta:
    """``model.json`` of a checkpoint folder.

    Raises:
        Failure: it is damaged, or written by another version of fastat.
    """
    path = checkpoint / META_FILE
    try:
        document = json.loads(path.read_text())
        if document.pop("checksums")[META_FILE] != _document_checksum(document):
            raise Failure(f"{path} is damaged, or was edited: its content is not what was written")
        if (document.pop("format"), document.pop("version")) != (FORMAT, VERSION):
            raise Failure(f"{path} is not a {FORMAT} of version {VERSION}")
        check_keys(path, document, ModelMeta)
        document["classes"] = tuple(ClassInfo(*c) for c in document["classes"])
        if document["feature"] not in FEATURES:
            raise Failure(f"{path}: unknown feature {document['feature']!r}")
        meta, spec = ModelMeta(**document), FEATURES[document["feature"]]
        frames = spec.num_frames(meta.clip_samples)
        if (meta.num_mels, meta.num_frames) != (spec.num_mels, frames):
            raise ValueError(
                f"clips of {meta.clip_seconds:g} s are {spec.num_mels} x {frames} of {spec.name}, "
                f"not {meta.num_mels} x {meta.num_frames}"
            )
        return meta
    except OSError as error:
        raise Failure(f"{path} cannot be read: {error.strerror}") from error
    except UserError as error:  # of ModelMeta
        raise Failure(f"{path} is damaged: {error}") from error
    except (
        ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError
    ) as error:  # fmt: skip
        raise Failure(f"{path} is damaged: {error!r}") from error


def check_file(path: Path) -> None:
    """Checks a file of a checkpoint against its checksum in ``model.json``.

    Raises:
        Failure: it is missing or damaged.
    """
    try:
        expected = json.loads((path.parent / META_FILE).read_text())["checksums"][path.name]
        found = _file_checksum(path)
    except OSError as error:
        raise Failure(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise Failure(f"{path.parent / META_FILE} has no checksum of {path.name}") from error
    if found != expected:
        raise Failure(f"{path} is damaged: its content is not what was written")


def read_weights(checkpoint: Path) -> dict[str, Tensor]:
    """The state dict of a checkpoint folder.

    Raises:
        Failure: the file is missing or damaged.
    """
    path = checkpoint / WEIGHTS_FILE
    check_file(path)
    try:
        return load_tensors(path)
    except (OSError, SafetensorError) as error:
        raise Failure(f"{path} is damaged: {error}") from error


def put_weights(model: nn.Module, state: dict[str, Tensor], checkpoint: Path) -> None:
    """Loads what ``read_weights`` returned into ``model``.

    Raises:
        Failure: names or shapes do not fit.
    """
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        path = checkpoint / WEIGHTS_FILE
        raise Failure(f"{path} does not fit its model.json: {error}") from error


def load_model(
    path: Path | str, device: str | torch.device = "cpu"
) -> tuple[TaggingModel, ModelMeta]:
    """Loads a model, in evaluation mode, and its metadata from a run folder or a checkpoint.

    Raises:
        UserError: there is no checkpoint, or it carries code.
        Failure: it is damaged.
    """
    checkpoint = find_checkpoint(path)
    meta = load_meta(checkpoint)
    state = read_weights(checkpoint)
    try:
        model = meta.create()
    except UserError as error:  # a model, an option or a value that this version does not have
        what = f"is damaged, or was written by {ANOTHER_VERSION}"
        raise Failure(f"{checkpoint / META_FILE} {what}: {error}") from error
    except (RuntimeError, TypeError, ArithmeticError) as error:
        raise Failure(f"{checkpoint / META_FILE} is damaged: {error}") from error
    put_weights(model, state, checkpoint)
    return model.to(device).eval(), meta
