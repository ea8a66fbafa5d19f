"""The folder of a training run: lock, configuration, environment, metrics, curves, predictions.

The checkpoints in it are ``fastat.training.checkpoints``'s.
"""

import csv
import io
import json
import logging
import math
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any, Self

import numpy as np
import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from fastat.config.run import TrainConfig
from fastat.data.shards import ClassInfo, PackedSet
from fastat.evaluation.evaluate import Evaluation
from fastat.evaluation.predictions import PREDICTIONS_FILE, save_predictions
from fastat.system.environment import environment
from fastat.system.errors import Failure, UserError
from fastat.system.files import append, atomic_write_text, lock, remove_temporaries
from fastat.system.outputs import finite
from fastat.training.readback import Reading

log = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
BAD_CLIPS_FILE = "bad_clips.csv"


@dataclass
class Progress:
    """How far a run has come; saved with every checkpoint."""

    step: int = 0
    """Optimizer steps done."""
    best_map: float = -math.inf
    loss_sum: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    """Sum of the losses of the current epoch's steps."""
    train_seconds: float = 0.0
    """Time spent training in the current epoch, without evaluation."""
    wait_seconds: float = 0.0
    """Time spent waiting for data in the current epoch."""
    best_step: int | None = None
    """Step of the best checkpoint; None before the first scored epoch."""
    unscored: bool = False
    """A signal interrupted the evaluation: the epoch's steps are done, but it is not scored."""
    skipped: list[int] = field(default_factory=list)
    """Steps, from 0, that were skipped because their loss or a gradient was not finite."""
    overflows: int = 0
    """Steps of the current epoch that were skipped because fp16 overflowed; none of them is in
    ``skipped``."""

    def taken(self, first: int, end: int | None = None) -> int:
        """Number of steps in [first, end) that are not in ``skipped``; ``end`` is by default the
        current step."""
        end = self.step if end is None else end
        return end - first - sum(first <= s < end for s in self.skipped)

    def mean_loss(self, first: int) -> float:
        """Mean loss of the steps taken since step ``first``; NaN if there is none."""
        summed = self.taken(first) - self.overflows
        return self.loss_sum.item() / summed if summed else math.nan


class RunFolder:
    """What a run writes beside its checkpoints. Rank 0 alone has use for it.

    When the disk is full, training goes on. What could not be written is tried again with the next
    write, but for points of TensorBoard's curves, which are lost until the next epoch. As a context
    manager the folder holds the lock, and closes the curves in the end.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: IO[str] | None = None
        self._curves: SummaryWriter | None = None
        self._curves_folder: int | None = None
        self._purge_step: int | None = None
        self._unwritten: dict[str, Callable[[], None]] = {}

    # -------------------------------------------------------------------------- start and end
    def lock(self) -> None:
        """Makes the folder if needed and locks it, unless this object holds the lock already.

        Closing the file releases the lock, as does any death of the process.

        Raises:
            UserError: another training holds it.
            Failure: the folder cannot be written.
        """
        if self._lock is not None:
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            file = (self.path / ".lock").open("a")
            locked = lock(file)
        except BlockingIOError as error:
            raise UserError(
                f"another training is running in {self.path}: wait for it, or choose another --out"
            ) from error
        except OSError as error:
            raise self._failure(error) from error
        self._lock = file
        if not locked:
            log.warning(
                f"the file system of {self.path} has no locks: nothing prevents a second training "
                "in this folder"
            )

    def __enter__(self) -> Self:
        self.lock()
        self._excepthook, threading.excepthook = threading.excepthook, self._thread_failed
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Closes the curves, except after a second Ctrl-C, and releases the lock."""
        try:
            if self._curves is not None and kind is not KeyboardInterrupt:
                self._curves.close()
        except OSError as error:
            log.warning(f"cannot write TensorBoard's curves in {self.path}: {error}")
        finally:
            threading.excepthook = self._excepthook
            if self._curves_folder is not None:
                os.close(self._curves_folder)
                self._curves_folder = None
            if self._lock is not None:
                self._lock.close()
                self._lock = None

    def prepare(self, config: TrainConfig, device: torch.device, keep_epochs: int | None) -> None:
        """Writes ``config.json`` and ``env.json``, and removes what a killed run left half-written
        and the metrics of epochs that will be trained again.

        Args:
            keep_epochs: number of epochs whose metrics stay; None: all.

        Raises:
            Failure: the folder cannot be written, or ``metrics.jsonl`` is damaged.
        """
        try:
            (self.path / "checkpoints").mkdir(exist_ok=True)
            for folder in (self.path, self.path / "checkpoints"):
                remove_temporaries(folder)
            config.save(self.path / "config.json")
            atomic_write_text(
                self.path / "env.json", json.dumps(environment(device), indent=1) + "\n"
            )
            if keep_epochs is not None:
                self._remove_metrics_after(keep_epochs)
        except OSError as error:
            raise self._failure(error) from error

    def _remove_metrics_after(self, epoch: int) -> None:
        path = self.path / METRICS_FILE
        if not path.exists():
            return
        try:
            # A power cut may have left part of a line.
            lines = [x for x in path.read_text().splitlines() if x.endswith("}")]
            kept = [x for x in lines if json.loads(x)["epoch"] <= epoch]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise Failure(f"{path} is damaged: {error!r}; remove that line") from error
        atomic_write_text(path, "".join(x + "\n" for x in kept))

    def _failure(self, error: OSError) -> Failure:
        return Failure(f"cannot write the run folder {self.path}: {error.strerror}")

    # ------------------------------------------------------------------------ while it trains
    def open_curves(self, step: int) -> None:
        """Starts a file of TensorBoard's curves.

        Args:
            step: number of steps done; points that an earlier start made after it are hidden.
        """
        self._purge_step = step + 1
        self._add_points({}, step)

    def add_step(self, reading: Reading) -> None:
        """Adds a training step to the curves."""
        values = {"loss": reading.loss, "grad_norm": reading.norm, "lr": reading.lr}
        if self._curves is not None:
            self._add_points({f"train/{k}": v for k, v in values.items()}, reading.step + 1)

    def add_epoch(self, line: dict[str, Any]) -> None:
        """Adds an epoch to ``metrics.jsonl`` and to the curves."""
        values = {f"epoch/{k}": v for k, v in line.items() if k not in ("epoch", "step")}
        self._add_points(values, line["step"])
        text = json.dumps(finite(line)) + "\n"
        self._write(
            f"metrics of epoch {line['epoch']}",
            partial(append, self.path / METRICS_FILE, text.encode()),
        )

    def save_predictions(
        self, evaluation: Evaluation, packed: PackedSet, classes: list[ClassInfo]
    ) -> None:
        """Replaces ``predictions.h5`` by the scores of the best epoch so far."""
        path, names = self.path / PREDICTIONS_FILE, packed.names(evaluation.rows)
        scores = evaluation.logits, evaluation.targets
        self._write(path.name, partial(save_predictions, path, *scores, names, classes))

    def add_bad_clips(self, packed: PackedSet, bad: dict[int, str]) -> None:
        """Lists the damaged rows of ``packed`` in ``bad_clips.csv``, and logs how many are new.

        Args:
            bad: all rows found so far, and what is wrong with them.
        """
        path = self.path / BAD_CLIPS_FILE

        def write() -> None:
            if new := append_bad_clips(path, packed, bad):
                log.warning(
                    f"{new:,} damaged clips were replaced by others, {len(bad):,} in all; "
                    f"{path} lists them"
                )

        self._write(path.name, write)

    def finish(self) -> None:
        """Tries a last time to write what could not be written.

        Raises:
            Failure: something stays unwritten.
        """
        if errors := self._write_all():
            files = "; ".join(f"{name}: {reason}" for name, reason in errors.items())
            raise Failure(f"cannot write {files}")

    def _write(self, name: str, write: Callable[[], None]) -> None:
        """Calls ``write`` after those that failed before; it replaces one of the same name."""
        self._unwritten[name] = write
        errors = self._write_all()
        if name in errors:
            log.warning(f"cannot write {name}: {errors[name]}; training goes on, and tries again")

    def _write_all(self) -> dict[str, str]:
        """Tries all that is not written yet; returns the reason for each that still is not."""
        errors = {}
        for name, write in list(self._unwritten.items()):
            try:
                write()
                del self._unwritten[name]
            except OSError as error:
                errors[name] = error.strerror or str(error)
        return errors

    def _add_points(self, values: dict[str, float], step: int) -> None:
        """Adds a point to each curve; opens a new file first if an error ended the last one."""
        try:
            if self._curves is None:
                folder = self.path / "tb"
                folder.mkdir(exist_ok=True)
                if self._curves_folder is None:
                    self._curves_folder = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
                # This name of the folder is UTF-8, as SummaryWriter needs it, whatever its own is.
                # The queue is long, so that a slow disk does not make training wait.
                self._curves = SummaryWriter(
                    f"/proc/self/fd/{self._curves_folder}",
                    purge_step=self._purge_step,
                    max_queue=10_000,
                )
                self._purge_step = None
            for name, value in values.items():
                self._curves.add_scalar(name, value, step)
        except OSError as error:
            self._curves = None
            log.warning(
                f"cannot write TensorBoard's curves in {self.path}: {error}; training goes on, "
                "and the next epoch tries again"
            )

    def _thread_failed(self, args: threading.ExceptHookArgs) -> None:
        """Keeps an error of SummaryWriter's thread, which its next call raises again, from being
        printed with a traceback."""
        if not type(args.thread).__module__.startswith("tensorboard."):
            self._excepthook(args)


def append_bad_clips(path: Path, packed: PackedSet, bad: dict[int, str]) -> int:
    """Adds the rows in ``bad`` that the table ``path`` does not list yet; their number.

    Columns: shard, row (of the shard), clip, reason.
    """
    listed = set()
    if path.exists():
        with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
            listed = {(line[0], line[1]) for line in csv.reader(file) if len(line) == 4}
    lines = []
    for row, reason in bad.items():
        shard, place = packed.place(row)
        if (shard.name, str(place)) not in listed:
            lines.append((shard.name, place, packed.names(np.array([row]))[0], reason))
    if lines:
        text = io.StringIO(newline="")
        writer = csv.writer(text)
        if not listed:
            writer.writerow(("shard", "row", "clip", "reason"))
        writer.writerows(lines)
        append(path, text.getvalue().encode("utf-8", "surrogateescape"))
    return len(lines)


def epoch_line(
    progress: Progress,
    first: int,
    epoch: int,
    evaluation: Evaluation | None,
    *,
    lr: float,
    batch: int,
    peak_memory_gib: float,
    **more: float,
) -> dict[str, Any]:
    """A line of ``metrics.jsonl``.

    Args:
        first: the epoch's first step.
        epoch: from 1.
        evaluation: None if the run is not scored.
        more: further fields, which not every run has.
    """
    taken, seconds = progress.taken(first), progress.train_seconds
    line: dict[str, Any] = {
        "epoch": epoch,
        "step": progress.step,
        "lr": lr,
        "train_loss": progress.mean_loss(first),
        "clips_per_s": taken * batch / seconds if taken else 0.0,
        "data_wait_fraction": progress.wait_seconds / seconds if taken else 0.0,
        "epoch_s": seconds,
        "peak_memory_gib": peak_memory_gib,
        **more,
    }
    if evaluation is not None:
        m = evaluation.metrics
        line |= {
            "eval_loss": evaluation.loss,
            "mAP": m.mAP,
            "AUC": m.AUC,
            "d_prime": m.d_prime,
            "classes_scored": m.classes_scored,
        }
    return line


def epoch_text(line: dict[str, Any], epochs: int, num_classes: int) -> str:
    """A line of ``metrics.jsonl`` as it is logged."""
    text = f"epoch {line['epoch']}/{epochs}  train loss {line['train_loss']:.4f}"
    if "mAP" in line:
        text += f"  eval loss {line['eval_loss']:.4f}  mAP {line['mAP']:.4f}"
        text += f"  AUC {line['AUC']:.4f}  d' {line['d_prime']:.3f}"
        if line["classes_scored"] < num_classes:
            text += f"  ({line['classes_scored']} of {num_classes} classes scored)"
    if line.get("overflows"):
        text += f"  {line['overflows']} overflows"
    text += f"  {line['clips_per_s']:.1f} clips/s"
    return f"{text}  data wait {line['data_wait_fraction']:.1%}"
