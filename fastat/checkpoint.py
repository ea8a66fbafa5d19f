"""Checkpoints: weights in safetensors, what prediction needs in JSON, the trainer's state beside.

``checkpoints/step-00001234/`` holds one; ``last`` and ``best`` are links to such folders, replaced
atomically, so either always names a whole checkpoint. The one before ``last`` is kept too: should a
disk damage the newest, which the checksums in ``model.json`` show, a run goes on from that one.
Nothing read here can run code.
"""

import hashlib
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
WEIGHTS_FILE, META_FILE, TRAINER_FILE = "model.safetensors", "model.json", "trainer.pt"
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
    """``write_checkpoint`` of a model as it is."""
    write_checkpoint(folder, step, model.state_dict(), meta, trainer, best=best)


def write_checkpoint(
    folder: Path,
    step: int,
    state: dict[str, Tensor],
    meta: ModelMeta,
    trainer: dict[str, Any],
    *,
    best: bool,
) -> None:
    """Writes ``folder``/step-... and points ``last`` (and ``best``) at it; drops unused ones.

    Kept are ``last``, the one before it, and ``best``.

    Raises:
        Failure: the disk is full or the folder cannot be written; the checkpoints before stay.
    """
    target = folder / step_name(step)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # One is there already when it is damaged, was not scored, or last never pointed at it.
        with atomic_path(target, over_folder=True) as temporary:
            temporary.mkdir()
            with (temporary / TRAINER_FILE).open("wb") as file:  # its errors say what is wrong
                torch.save(trainer, file)
            write_model(temporary, state, meta)
        # last comes last: killed in between, the run takes this epoch again, and finds both.
        for name in ("best", "last") if best else ("last",):
            _point(folder / name, target)
        _drop_unused(folder, step)
    except (OSError, SafetensorError, RuntimeError) as error:  # torch.save: RuntimeError on ENOSPC
        raise Failure(f"cannot write checkpoint {target}: {error}") from error


def _drop_unused(folder: Path, last: int) -> None:
    """Keeps ``last``, the newest before it, and ``best``; what is newer is of a past given up."""
    before = [step for step in saved_steps(folder) if step < last]
    keep = {last, *before[:1], linked_step(folder, "best")}
    for step in saved_steps(folder):
        if step not in keep:
            shutil.rmtree(folder / step_name(step))


def save_weights(path: Path, state: dict[str, Tensor], meta: ModelMeta) -> None:
    """Writes the folder ``path``: a checkpoint to predict with or to start from, not to resume.

    Raises:
        Failure: the disk is full or the folder cannot be written; nothing is left of it.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            temporary.mkdir()
            write_model(temporary, state, meta)
    except (OSError, SafetensorError) as error:
        raise Failure(f"cannot write checkpoint {path}: {error}") from error


def write_model(folder: Path, state: dict[str, Tensor], meta: ModelMeta) -> None:
    """Writes weights and ``model.json``, with the checksums of all that ``folder`` holds."""
    save_tensors({k: v.contiguous() for k, v in state.items()}, folder / WEIGHTS_FILE)
    document = {"format": FORMAT, "version": VERSION, **asdict(meta)}
    sums = {path.name: _file_checksum(path) for path in sorted(folder.iterdir())}
    sums[META_FILE] = _document_checksum(document)
    (folder / META_FILE).write_text(json.dumps({**document, "checksums": sums}, indent=1))


def save_tensors(
    tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None
) -> None:
    """safetensors' ``save_file``, which makes files for their owner alone; these heed the umask."""
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata=metadata)
    path.chmod(mode)


def _file_checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _document_checksum(document: dict[str, Any]) -> str:
    """Of ``model.json`` without its checksums, as JSON gives it back."""
    return hashlib.sha256(json.dumps(document).encode()).hexdigest()


def step_name(step: int) -> str:
    """The folder of a checkpoint."""
    return f"step-{step:08d}"


def saved_steps(folder: Path) -> list[int]:
    """The steps that ``folder`` has a checkpoint of, newest first."""
    names = [path.name for path in folder.glob("step-*")]
    return sorted((int(n) for name in names if (n := name[5:]).isdigit()), reverse=True)


def holds_checkpoints(folder: Path) -> bool:
    """Whether there is, or was, a checkpoint to go on from."""
    return bool(saved_steps(folder)) or os.path.lexists(folder / "last")


def linked_step(folder: Path, link: str) -> int | None:
    """The step that ``last`` or ``best`` points at, also where nothing is there any more."""
    try:
        return int(os.readlink(folder / link).removeprefix("step-"))
    except (OSError, ValueError):  # there is no link, or none of ours
        return None


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
    folder = path.parent if path.name == WEIGHTS_FILE else path
    if (folder / META_FILE).is_file():
        return folder
    for candidate in (path / "checkpoints" / prefer, path / "checkpoints" / other):
        if os.path.lexists(candidate):  # one that is damaged is not silently another
            return candidate
    return None


def load_meta(checkpoint: Path) -> ModelMeta:
    """``model.json`` of a checkpoint folder.

    Raises:
        Failure: it is damaged, or written by a newer fastat.
    """
    path = checkpoint / META_FILE
    try:
        document = json.loads(path.read_text())
        sums = document.pop("checksums", None)
        if sums is not None and sums[META_FILE] != _document_checksum(document):
            raise Failure(f'{path} is damaged (or edited, and kept its "checksums")')
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


def _check_file(path: Path) -> None:
    """Raises Failure when ``path`` is not the file whose checksum the checkpoint has.

    Checkpoints of before there were checksums pass.
    """
    try:
        document = json.loads((path.parent / META_FILE).read_text())
        expected = document.get("checksums", {}).get(path.name)
        if expected is not None and _file_checksum(path) != expected:
            raise Failure(f"{path} is damaged: its content is not what was written")
    except (OSError, ValueError, AttributeError) as error:
        raise Failure(f"{path} cannot be checked: {error}") from error


def load_weights(model: nn.Module, checkpoint: Path) -> None:
    """Reads the checkpoint's weights into ``model``.

    Raises:
        Failure: the file is missing, damaged or of another shape.
    """
    put_weights(model, read_weights(checkpoint), checkpoint)


def put_weights(model: nn.Module, state: dict[str, Tensor], checkpoint: Path) -> None:
    """Puts what ``read_weights`` gave into ``model``.

    Raises:
        Failure: it is of another shape.
    """
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        path = checkpoint / WEIGHTS_FILE
        raise Failure(f"{path} does not fit its model.json: {error}") from error


def read_weights(checkpoint: Path) -> dict[str, Tensor]:
    """The state dict of a checkpoint folder.

    Raises:
        Failure: the file is missing or damaged.
    """
    path = checkpoint / WEIGHTS_FILE
    try:
        state: dict[str, Tensor] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise Failure(f"{path} is damaged: {error}") from error
    _check_file(path)
    return state


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
    path = checkpoint / TRAINER_FILE
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} is damaged, or carries more than tensors and plain values: refused"
        ) from error
    except TORCH_LOAD_ERRORS as error:
        raise Failure(f"{path} cannot be read: {error!r}") from error
    _check_file(path)
    return state


# ---------------------------------------------------------------------------------- going on
@dataclass(frozen=True)
class Resumable:
    """A whole checkpoint, read."""

    step: int
    state: dict[str, Tensor]
    """The model's."""
    trainer: dict[str, Any]
    notes: list[str]
    """Which newer ones are damaged."""


def newest_whole(folder: Path) -> Resumable:
    """The checkpoint that ``last`` points at, or the newest before it that is not damaged.

    Reads only.

    Raises:
        Failure, UserError: all are damaged, or carry code: what is wrong with the newest.
    """
    last = linked_step(folder, "last")
    # A newer one is of a run that was killed before last pointed at it.
    steps = [step for step in saved_steps(folder) if last is None or step <= last]
    errors: list[Failure | UserError] = []
    if last is not None and last not in steps:
        errors.append(Failure(f"{folder / step_name(last)} is gone"))
    for step in steps:
        checkpoint = folder / step_name(step)
        try:
            load_meta(checkpoint)
            state, trainer = read_weights(checkpoint), load_trainer_state(checkpoint)
        except (Failure, UserError) as error:
            errors.append(error)
            continue
        return Resumable(step, state, trainer, [f"{e}; an older one serves" for e in errors])
    raise errors[0] if errors else Failure(f"{folder} holds no checkpoint")


def best_there(folder: Path) -> tuple[float, int | None]:
    """mAP and step of the best checkpoint there is; -inf and None without one.

    Raises:
        Failure: it is damaged.
    """
    step = linked_step(folder, "best")
    if step is None:
        return -math.inf, None
    return load_meta(folder / "best").trained["best_mAP"], step


def go_back(folder: Path, step: int, best_step: int | None) -> str | None:
    """Points ``last`` at ``step``, and ``best`` at what was the best then; a note, if it is lost.

    Args:
        best_step: the best of the run up to ``step``; None: it had none, or does not know.

    ``best`` then links to a whole checkpoint, or, after a note, to nothing or to a damaged one,
    which the next scored epoch is to replace.

    Raises:
        Failure: the folder cannot be written.
    """
    try:
        if linked_step(folder, "last") != step:
            _point(folder / "last", folder / step_name(step))
        best = linked_step(folder, "best")
        if best is None:
            return None if best_step is None else f"the best checkpoint, step {best_step}, is gone"
        if best > step:  # of a past given up: it will be made again
            if best_step is None or not (folder / step_name(best_step)).is_dir():
                (folder / "best").unlink()
                return "the best checkpoint up to here is gone: the next scored epoch becomes it"
            _point(folder / "best", folder / step_name(best_step))
        load_meta(folder / "best")
        read_weights(folder / "best")
    except OSError as error:
        raise Failure(f"cannot write in {folder}: {error.strerror}") from error
    except Failure as error:
        return f"{error}: the next scored epoch becomes the best"
    return None
