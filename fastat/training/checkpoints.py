"""The checkpoints of a training run: saved in the background, and restored to resume it.

A folder ``checkpoints/step-00001234/`` has the files of ``fastat.weights.checkpoint``, and the
trainer's state in ``trainer.pt``. ``last`` and ``best`` are symbolic links to such folders that are
replaced atomically, so each always names a whole checkpoint. The one before ``last`` is kept too:
if the newest is damaged, which the checksums in ``model.json`` show, the run resumes from that one.
Nothing that is read here can run code."""

import logging
import math
import os
import pickle
import shutil
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from fastat.config.fields import check_keys
from fastat.data.shards import PackedSet
from fastat.system.distributed import Ranks, seed_rank
from fastat.system.environment import numerics, random_state, restore_random_state
from fastat.system.errors import Failure, UserError
from fastat.system.files import atomic_path, fsync
from fastat.training.loss_scale import LossScale
from fastat.training.run_folder import Progress
from fastat.weights.checkpoint import (
    ModelMeta,
    check_file,
    load_meta,
    put_weights,
    read_weights,
    write_model,
)

log = logging.getLogger(__name__)

TRAINER_FILE = "trainer.pt"


class CheckpointManager:
    """Saves a run's checkpoints and restores the newest whole one.

    A thread writes one checkpoint at a time. Training only waits for the snapshot: a copy in host
    memory, which on CUDA goes to pinned memory in stream order, so that the host does not wait for
    the device either. If a write fails, training goes on and the next checkpoint is tried as usual.
    A process that is killed while it writes leaves a ``.tmp`` folder, which the next start removes.

    All ranks call ``save``, ``restore`` and ``finish`` at the same steps; rank 0 alone reads and
    writes, and uses the manager as a context manager.

    Args:
        run: the run folder.
        train_set: a run is only resumed on the set that it was started with.
        every_steps, every_minutes: how often ``is_due`` asks for a checkpoint; None: never.
    """

    def __init__(
        self,
        run: Path,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        ranks: Ranks,
        *,
        train_set: PackedSet,
        every_steps: int | None,
        every_minutes: float | None,
    ) -> None:
        self.run, self.folder = run, run / "checkpoints"
        self.model, self.optimizer, self.device, self.ranks = model, optimizer, device, ranks
        self.train_set = train_set
        self._every_steps = every_steps or math.inf
        self._every_seconds = 60 * (every_minutes or math.inf)
        self._due, self._saved_at = False, time.monotonic()
        self._thread = ThreadPoolExecutor(1, "fastat-checkpoint")
        self._write: Future[None] | None = None
        self._write_best: tuple[float, int | None] | None = None
        """mAP and step of the checkpoint being written, if it is to be the best."""
        self._best: tuple[float, int | None] = -math.inf, None
        """mAP and step of the best checkpoint on disk."""

    def __enter__(self) -> Self:
        self._saved_at = time.monotonic()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Waits for the write in progress, except after a second Ctrl-C."""
        self._thread.shutdown(wait=False)
        if kind is KeyboardInterrupt:
            return
        try:
            self._result(wait=True)
        except Failure as error:  # it must not hide the error that ends the run
            log.warning(str(error))

    # ------------------------------------------------------------------------------------ saving
    def is_due(self, progress: Progress) -> bool:
        """Whether rank 0 should save now, in mid-epoch; False on other ranks.

        A checkpoint that becomes due during a write stays due until the write is done.
        """
        if not self.ranks.first:
            return False
        self.check_last_write(progress)
        waited = time.monotonic() - self._saved_at
        self._due |= progress.step % self._every_steps == 0 or waited >= self._every_seconds
        return self._due and self._write is None

    def save(
        self, progress: Progress, meta: ModelMeta, loss_scale: LossScale | None, *, best: bool
    ) -> None:
        """Takes a snapshot, which is then written in the background; waits for the write before it.

        Every rank takes part, because the random states of all ranks are saved.
        """
        random_states = self.ranks.gather(random_state(self.device), patient=True)
        if not self.ranks.first:
            return
        self.check_last_write(progress, wait=True)
        trainer = {
            "optimizer": self.optimizer.state_dict(),
            "optimizer_class": _class_name(self.optimizer),
            "progress": asdict(progress),
            "random": random_states,
            "loss_scale": None if loss_scale is None else loss_scale.state(),
            "data": self.train_set.fingerprint,
            "numerics": numerics(self.device),
        }
        weights, trainer = to_host(self.model.state_dict()), to_host(trainer)
        copied = torch.cuda.Event() if self.device.type == "cuda" else None
        if copied is not None:
            copied.record()
        step = progress.step

        def write() -> None:
            if copied is not None:
                copied.synchronize()
            write_checkpoint(self.folder, step, weights, meta, trainer, best=best)

        self._write = self._thread.submit(write)
        self._write_best = (progress.best_map, step) if best else None
        self._due, self._saved_at = False, time.monotonic()

    def check_last_write(self, progress: Progress, *, wait: bool = False) -> None:
        """Logs a warning if the last write failed; the best is then the best one on disk.

        Args:
            wait: wait for a write in progress.
        """
        try:
            self._result(wait=wait)
        except Failure as error:
            log.warning(f"{error}; training goes on, and the next checkpoint tries again")
            if self._write_best is not None:
                progress.best_map, progress.best_step = self._best

    def finish(self) -> None:
        """Waits for the last checkpoint. All ranks wait, because torchrun ends all of them when one
        leaves.

        Raises:
            Failure: it cannot be written.
        """
        self._result(wait=True)
        self.ranks.gather(None, patient=True)

    def _result(self, *, wait: bool) -> None:
        """Raises what the last write raised, once; an error other than Failure is a bug of ours."""
        if self._write is None or not (wait or self._write.done()):
            return
        write, self._write = self._write, None
        write.result()
        if self._write_best is not None:
            self._best = self._write_best

    # ---------------------------------------------------------------------------------- resuming
    def restore(self, loss_scale: LossScale | None) -> Progress:
        """Restores the newest whole checkpoint, which rank 0 reads, on all ranks.

        The optimizer has other tensors afterwards, so a captured CUDA graph of the step is void. A
        rank that the run did not have before draws its random numbers from a seed of its own.

        Raises:
            UserError: the training set or the optimizer is not the one of the run.
            Failure: no checkpoint can be read.
        """
        newest, best_is_whole = self.ranks.from_first(self._read_newest)
        saved = newest.trainer
        put_weights(self.model, newest.weights, self.folder / step_name(newest.step))
        load_optimizer_state(self.optimizer, saved["optimizer"])
        progress = Progress(**saved["progress"])
        progress.loss_sum = progress.loss_sum.to(self.device)
        if not best_is_whole:
            progress.best_map, progress.best_step = -math.inf, None
        self._best = progress.best_map, progress.best_step
        if loss_scale is not None:
            loss_scale.restore(saved["loss_scale"])
        random_states = saved["random"]
        if self.ranks.rank < len(random_states):
            restore_random_state(random_states[self.ranks.rank], self.device)
        else:
            seed_rank(progress.step, self.ranks)

        log.info(f"resuming {self.run} at step {progress.step:,}")
        if len(random_states) != self.ranks.size:
            log.warning(
                f"the run had {len(random_states)} ranks and has {self.ranks.size} now: each step "
                "has the same clips, but dropout and the order of sums differ"
            )
        if (now := numerics(self.device)) != saved["numerics"]:
            log.warning(
                f"numerics changed from {saved['numerics']} to {now}: the results will not be "
                "bit-identical to those of an uninterrupted run"
            )
        return progress

    def _read_newest(self) -> tuple["SavedRun", bool]:
        """The newest whole checkpoint, and whether the best one is whole too; ``last`` and ``best``
        point at them afterwards."""
        newest = newest_whole(self.folder)
        if newest.trainer["data"] != self.train_set.fingerprint:
            raise UserError(
                f"{self.train_set.directory} is not the set that {self.run} was trained on, or it "
                "has grown since (fastat pack --append)"
            )
        before, now = newest.trainer["optimizer_class"], _class_name(self.optimizer)
        if before != now:
            raise UserError(
                f"{self.run} was trained with {before}, and here the optimizer is {now}: resume it "
                f"where fastat uses {before}"
            )
        progress = newest.trainer["progress"]
        path = self.folder / step_name(newest.step) / TRAINER_FILE
        check_keys(path, progress, Progress)
        return newest, point_links(self.folder, newest.step, progress["best_step"])


def _class_name(optimizer: torch.optim.Optimizer) -> str:
    """``torch.optim.adam.Adam``, or ``apex.optimizers.fused_adam.FusedAdam``."""
    return f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"


def load_optimizer_state(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Loads moments and step counts from ``optimizer.state_dict()``, saved on any device.

    The options of each group stay: on CUDA the learning rate is a tensor that a captured step
    reads, and ``capturable`` is set, while on a CPU neither is so.
    """
    groups = []
    for own, theirs in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        group = own | {"params": theirs["params"]}
        if "step" in own:  # apex counts the steps of a group, torch those of a parameter
            group["step"] = theirs["step"].to(own["step"].device)
        groups.append(group)
    optimizer.load_state_dict({"state": saved["state"], "param_groups": groups})


def to_host(tree: Any) -> Any:
    """Copies dicts, lists and tuples of tensors and plain values, all tensors to host memory.

    Copies of CUDA tensors are complete only after the work queued so far on the current stream.
    """
    if isinstance(tree, Tensor):
        if tree.device.type == "cpu":
            return tree.clone()
        return torch.empty_like(tree, device="cpu", pin_memory=True).copy_(tree, non_blocking=True)
    if isinstance(tree, dict):
        return {key: to_host(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(to_host(value) for value in tree)
    return tree


# ------------------------------------------------------------------------------------------- files
def write_checkpoint(
    folder: Path,
    step: int,
    weights: dict[str, Tensor],
    meta: ModelMeta,
    trainer: dict[str, Any],
    *,
    best: bool,
) -> None:
    """Writes ``folder``/step-..., points ``last`` (and ``best``) at it, and removes old ones.

    ``last``, the one before it and ``best`` are kept.

    Raises:
        Failure: the disk is full or the folder cannot be written; earlier checkpoints stay.
    """
    target = folder / step_name(step)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # A folder of this step exists if it is damaged or not scored, or last never pointed at it.
        with atomic_path(target, over_folder=True) as temporary:
            temporary.mkdir()
            with (temporary / TRAINER_FILE).open("wb") as file:  # its errors say what is wrong
                torch.save(trainer, file)
            write_model(temporary, weights, meta)
        # last comes last: if killed in between, the run trains this epoch again, and finds both.
        for name in ("best", "last") if best else ("last",):
            _point(folder / name, step)
        _remove_unused(folder, step)
    except (OSError, SafetensorError, RuntimeError) as error:  # torch.save: RuntimeError on ENOSPC
        raise Failure(f"cannot write checkpoint {target}: {error}") from error


def _remove_unused(folder: Path, last: int) -> None:
    """Keeps ``last``, the one before it and ``best``. Later steps were abandoned when the run went
    back to an earlier checkpoint."""
    before = [step for step in saved_steps(folder) if step < last]
    keep = {last, *before[:1], linked_step(folder, "best")}
    for step in saved_steps(folder):
        if step not in keep:
            shutil.rmtree(folder / step_name(step))


def step_name(step: int) -> str:
    """Name of a checkpoint's folder."""
    return f"step-{step:08d}"


def saved_steps(folder: Path) -> list[int]:
    """The steps of the checkpoints in ``folder``, newest first."""
    names = [path.name for path in folder.glob("step-*")]
    return sorted((int(n) for name in names if (n := name[5:]).isdigit()), reverse=True)


def holds_checkpoints(folder: Path) -> bool:
    """Whether ``folder`` has, or had, a checkpoint to resume from."""
    return bool(saved_steps(folder)) or os.path.lexists(folder / "last")


def linked_step(folder: Path, link: str) -> int | None:
    """The step that ``last`` or ``best`` points at, even if its folder is gone; None: no link."""
    try:
        return int(os.readlink(folder / link).removeprefix("step-"))
    except (OSError, ValueError):  # there is no link, or none of ours
        return None


def _point(link: Path, step: int) -> None:
    """Makes ``link`` a relative link to the checkpoint of ``step``, atomically."""
    temporary = link.with_name(f".{link.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(step_name(step))
    os.replace(temporary, link)
    fsync(link.parent)


def load_trainer_state(checkpoint: Path) -> dict[str, Any]:
    """``trainer.pt``: tensors and plain values only.

    Raises:
        UserError: it carries code.
        Failure: it is missing or damaged.
    """
    path = checkpoint / TRAINER_FILE
    check_file(path)
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(f"{path} has more than tensors and plain values: refused") from error
    return state


@dataclass(frozen=True)
class SavedRun:
    """What a run resumes from."""

    step: int
    weights: dict[str, Tensor]
    trainer: dict[str, Any]


def newest_whole(folder: Path) -> SavedRun:
    """Reads the checkpoint that ``last`` points at, or the newest before it that is not damaged.

    Logs which ones are damaged.

    Raises:
        Failure, UserError: all are damaged, or carry code: what is wrong with the newest.
    """
    last = linked_step(folder, "last")
    # Later steps are of a process that was killed before last pointed at them.
    steps = [step for step in saved_steps(folder) if last is None or step <= last]
    errors: list[Failure | UserError] = []
    if last is not None and last not in steps:
        errors.append(Failure(f"{folder / step_name(last)} is gone"))
    for step in steps:
        checkpoint = folder / step_name(step)
        try:
            load_meta(checkpoint)
            weights, trainer = read_weights(checkpoint), load_trainer_state(checkpoint)
        except (Failure, UserError) as error:
            errors.append(error)
            continue
        for problem in errors:
            log.warning(f"{problem}; the checkpoint of step {step:,} is used instead")
        return SavedRun(step, weights, trainer)
    raise errors[0] if errors else Failure(f"{folder} holds no checkpoint")


def point_links(folder: Path, step: int, best_step: int | None) -> bool:
    """Points ``last`` at ``step``, and ``best`` at the best one up to then; whether that is whole.

    If it is damaged or gone, which is logged, the next scored epoch is to replace it.

    Args:
        best_step: the best checkpoint of the run up to ``step``; None: no epoch was scored.

    Raises:
        Failure: the folder cannot be written.
    """
    try:
        if linked_step(folder, "last") != step:
            _point(folder / "last", step)
        linked = linked_step(folder, "best")
        if linked is not None and linked > step:  # that epoch will be trained again
            if best_step is not None and (folder / step_name(best_step)).is_dir():
                _point(folder / "best", best_step)
            else:
                (folder / "best").unlink()
        if best_step is not None:
            load_meta(folder / "best")
            read_weights(folder / "best")
    except OSError as error:
        raise Failure(f"cannot write in {folder}: {error.strerror}") from error
    except Failure as error:
        log.warning(f"{error}: the next scored epoch becomes the best checkpoint")
        return False
    return True
