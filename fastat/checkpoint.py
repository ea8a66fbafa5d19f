"""Checkpoints: weights in safetensors, what prediction needs in JSON, the trainer's state beside.

``checkpoints/step-00001234/`` holds one; ``last`` and ``best`` are links to such folders, replaced
atomically, so either always names a whole checkpoint. Nothing read here can run code.
"""

import json
import math
import os
import pickle
import shutil
import struct
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastat.atomic import atomic_path, fsync
from fastat.data.shards import ClassInfo
from fastat.errors import Failure, UserError
from fastat.features import FEATURES
from fastat.frontend import Frontend
from fastat.models import create_model
from fastat.models.base import TaggingModel

FORMAT = "fastat-checkpoint"
VERSION = 1
MAX_CLIP_SECONDS = 3600

TORCH_LOAD_ERRORS = (
    OSError, RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError,
    AssertionError, ArithmeticError, struct.error,
)  # fmt: skip
"""What torch.load raises on damage: its archive is a program for a small machine."""


@dataclass(frozen=True, kw_only=True)
class ModelMeta:
    """All that prediction needs beside the weights; ``model.json``."""

    model: str
    feature: str
    clip_seconds: float
    num_mels: int
    num_frames: int
    mean: float
    """Of the training features, in the feature's units."""
    std: float
    classes: tuple[ClassInfo, ...]
    options: dict[str, Any] = field(default_factory=dict)
    """Keyword options of create_model."""
    remove_mean: bool = True
    normalize: bool = True
    trained: dict[str, Any] = field(default_factory=dict)
    """Where it comes from: procedure, epoch, step, mAP."""

    def __post_init__(self) -> None:
        for name in ("clip_seconds", "mean", "std"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, float | int):
                raise TypeError(f"{name} must be a number, got {value!r}")
            if not math.isfinite(value) or (value <= 0 and name != "mean"):
                raise ValueError(f"{name} must be finite and positive, got {value}")
        if self.clip_seconds > MAX_CLIP_SECONDS:
            raise ValueError(f"clip_seconds must be at most {MAX_CLIP_SECONDS}")
        for c in self.classes:
            if not isinstance(c.id, str) or not isinstance(c.name, str):
                raise TypeError(f"expected a class's id and name, got {c}")
        for name in ("remove_mean", "normalize"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be true or false, got {getattr(self, name)!r}")
        for name in ("num_mels", "num_frames"):
            if type(getattr(self, name)) is not int:
                raise TypeError(f"{name} must be an integer, got {getattr(self, name)!r}")
        if not isinstance(self.model, str) or not isinstance(self.options, dict):
            raise TypeError(f"expected a model and its options, got {self.model}, {self.options}")

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
    """The front end that a model was, or is to be, trained with."""
    return Frontend(
        meta.feature,
        clip_samples=meta.clip_samples,
        mean=meta.mean,
        std=meta.std,
        remove_mean=meta.remove_mean,
        normalize=meta.normalize,
    )


def save_checkpoint(
    folder: Path,
    step: int,
    model: nn.Module,
    meta: ModelMeta,
    trainer: dict[str, Any],
    *,
    best: bool,
) -> None:
    """Writes ``folder``/step-... and points ``last`` (and ``best``) at it; drops unused ones.

    Raises:
        Failure: the disk is full or the folder cannot be written; the checkpoints before stay.
    """
    target = folder / f"step-{step:08d}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.path.realpath(folder / "last") != os.path.realpath(target):
            if target.exists():  # of a run that was killed before it pointed here
                shutil.rmtree(target)
            with atomic_path(target) as temporary:
                _write_model(temporary, model.state_dict(), meta)
                torch.save(trainer, temporary / "trainer.pt")
        # last comes last: killed in between, the run takes this epoch again, and finds both.
        for name in ("best", "last") if best else ("last",):
            _point(folder / name, target)
    except (OSError, SafetensorError, RuntimeError) as error:  # torch.save: RuntimeError on ENOSPC
        raise Failure(f"cannot write checkpoint {target}: {error}") from error
    linked = {os.path.realpath(folder / name) for name in ("last", "best")}
    for old in folder.glob("step-*"):
        if os.path.realpath(old) not in linked:
            shutil.rmtree(old)


def save_weights(path: Path, state: dict[str, Tensor], meta: ModelMeta) -> None:
    """Writes the folder ``path``: a checkpoint to predict with or to start from, not to resume.

    Raises:
        Failure: the disk is full or the folder cannot be written; nothing is left of it.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            _write_model(temporary, state, meta)
    except (OSError, SafetensorError) as error:
        raise Failure(f"cannot write checkpoint {path}: {error}") from error


def _write_model(folder: Path, state: dict[str, Tensor], meta: ModelMeta) -> None:
    folder.mkdir()
    save_file({k: v.contiguous() for k, v in state.items()}, folder / "model.safetensors")
    document = {"format": FORMAT, "version": VERSION, **asdict(meta)}
    (folder / "model.json").write_text(json.dumps(document, indent=1))


def _point(link: Path, target: Path) -> None:
    """Makes ``link`` a relative link to ``target``, in one step."""
    temporary = link.with_name(f".{link.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target.name)
    os.replace(temporary, link)
    fsync(link.parent)


def find_checkpoint(path: Path | str, prefer: str = "best") -> Path:
    """The checkpoint folder that ``path`` means: itself, or the best (else last) of a run folder.

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
    """The same, also by its weights' file; None when there is none of ours."""
    other = {"best": "last", "last": "best"}[prefer]
    folder = path.parent if path.name == "model.safetensors" else path
    for candidate in (folder, path / "checkpoints" / prefer, path / "checkpoints" / other):
        if (candidate / "model.json").is_file():
            return candidate
    return None


def load_meta(checkpoint: Path) -> ModelMeta:
    """``model.json`` of a checkpoint folder.

    Raises:
        Failure: it is damaged, or written by a newer fastat.
    """
    path = checkpoint / "model.json"
    try:
        document = json.loads(path.read_text())
        if (document.pop("format"), document.pop("version")) != (FORMAT, VERSION):
            raise Failure(f"{path} is not a {FORMAT} of version {VERSION}")
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
    except (
        OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError
    ) as error:  # fmt: skip
        raise Failure(f"{path} is damaged: {error!r}") from error


def load_weights(model: nn.Module, checkpoint: Path) -> None:
    """Reads the checkpoint's weights into ``model``.

    Raises:
        Failure: the file is missing, damaged or of another shape.
    """
    try:
        model.load_state_dict(read_weights(checkpoint))
    except RuntimeError as error:
        path = checkpoint / "model.safetensors"
        raise Failure(f"{path} does not fit its model.json: {error}") from error


def read_weights(checkpoint: Path) -> dict[str, Tensor]:
    """The state dict of a checkpoint folder.

    Raises:
        Failure: the file is missing or damaged.
    """
    path = checkpoint / "model.safetensors"
    try:
        state: dict[str, Tensor] = load_file(path)
        return state
    except (OSError, SafetensorError) as error:
        raise Failure(f"{path} is damaged: {error}") from error


def load_model(
    path: Path | str, device: str | torch.device = "cpu"
) -> tuple[TaggingModel, ModelMeta]:
    """A run folder or checkpoint -> (model in evaluation mode, what goes with it).

    Raises:
        UserError: no checkpoint there, or one that carries code.
        Failure: a damaged one.
    """
    checkpoint = find_checkpoint(path)
    meta = load_meta(checkpoint)
    _check_sizes(meta, checkpoint)
    model = meta.create()
    load_weights(model, checkpoint)
    return model.to(device).eval(), meta


def _check_sizes(meta: ModelMeta, checkpoint: Path) -> None:
    """Raises Failure unless the weights' file holds the model that model.json describes.

    Nothing is allocated for the model: a digit too many in model.json would take all memory.
    """
    path = checkpoint / "model.json"
    try:
        with torch.device("meta"):
            expected = {name: x.shape for name, x in meta.create().state_dict().items()}
    except (UserError, RuntimeError, TypeError, ArithmeticError) as error:
        raise Failure(f"{path} is damaged: {error}") from error
    found = {name: x.shape for name, x in read_weights(checkpoint).items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise Failure(
                f"{checkpoint / 'model.safetensors'} does not fit its model.json: expected {name} "
                f"of shape {_shape(expected.get(name))}, found {_shape(found.get(name))}"
            )


def _shape(shape: torch.Size | None) -> str:
    return "none" if shape is None else str(list(shape))


def load_trainer_state(checkpoint: Path) -> dict[str, Any]:
    """``trainer.pt``: tensors and plain values only.

    Raises:
        UserError: it carries code.
        Failure: it is missing or damaged.
    """
    path = checkpoint / "trainer.pt"
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        return state
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} is damaged, or carries more than tensors and plain values: refused"
        ) from error
    except TORCH_LOAD_ERRORS as error:
        raise Failure(f"{path} cannot be read: {error!r}") from error
