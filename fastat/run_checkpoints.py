"""The checkpoints of a run: written, kept, found again, gone back to.

``checkpoints/step-00001234/`` holds one, the trainer's state beside the weights; ``last`` and
``best`` are links to such folders, replaced atomically, so either always names a whole checkpoint.
The one before ``last`` is kept too: should a disk damage the newest, which the checksums in
``model.json`` show, a run goes on from that one. Nothing read here can run code.
"""

import math
import os
import pickle
import shutil
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from fastat.atomic import atomic_path, fsync
from fastat.checkpoint import ModelMeta, check_file, load_meta, read_weights, write_model
from fastat.errors import Failure, UserError

TRAINER_FILE = "trainer.pt"

TORCH_LOAD_ERRORS = (
    OSError, RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError,
    AssertionError, ArithmeticError, struct.error,
)  # fmt: skip
"""What torch.load raises on damage: its archive is a program for a small machine."""


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


# ---------------------------------------------------------------------------------- going on
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
    check_file(path)
    return state


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
