"""What a training run leaves in its folder beside the checkpoints, and where it goes on from."""

import csv
import errno
import fcntl
import io
import json
import math
import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, Self

import numpy as np
import torch
from torch import Tensor

from fastat.adam_state import load_state, saved_state
from fastat.atomic import append, atomic_write_text, drop_temporaries
from fastat.config import TrainConfig
from fastat.data.shards import PackedSet
from fastat.distributed import Ranks, seed_rank
from fastat.environment import environment, numerics, restore_random_state
from fastat.errors import Failure, UserError
from fastat.loss_scale import FIRST_SCALE, LossScale
from fastat.outputs import finite

BAD_CLIPS_FILE = "bad_clips.csv"


@dataclass
class Progress:
    """Where a run is; saved with every checkpoint."""

    step: int = 0
    """Optimizer steps done."""
    best_map: float = -math.inf
    loss_sum: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    """Over the steps done of the current epoch."""
    train_seconds: float = 0.0
    """Of the current epoch: training alone."""
    wait_seconds: float = 0.0
    """Of the current epoch: waiting for data."""
    best_step: int | None = None
    """Of the checkpoint that is the best; None: there is none, or an older fastat did not say."""
    unscored: bool = False
    """A signal cut the evaluation off: the steps of the epoch are done, its score is not."""
    left_out: list[int] = field(default_factory=list)
    """Steps, from 0, that were not or will not be taken, because they are not finite."""
    overflows: int = 0
    """Steps of the current epoch that were not taken because fp16 overflowed; none is in
    ``left_out``."""

    def taken(self, first: int, end: int | None = None) -> int:
        """How many steps were taken from step ``first`` on, before ``end`` (None: so far), and how
        many of fp16 overflowed."""
        end = self.step if end is None else end
        return end - first - sum(first <= s < end for s in self.left_out)

    def mean_loss(self, first: int) -> float:
        """Of the steps taken from step ``first`` on; NaN without any."""
        summed = self.taken(first) - self.overflows
        return self.loss_sum.item() / summed if summed else math.nan


NO_LOCKS = frozenset({errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK})
"""What flock says on a file system without locks, as Lustre mounted without them."""


def lock(file: IO[Any]) -> bool:
    """Locks ``file`` for this process alone; False where its file system has no locks.

    Raises:
        BlockingIOError: another process holds the lock.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in NO_LOCKS:
            return False
        raise
    return True


def locks_work(folder: Path) -> bool:
    """Whether the file system of ``folder``, which can be written, has locks.

    Raises:
        OSError: no file can be made in it.
    """
    with tempfile.TemporaryFile(dir=folder) as file:
        return lock(file)


class RunLock:
    """Held by the one training that may write to a run folder. Any death releases it.

    Args:
        note: called with a message where the file system has no locks; training goes on.
    """

    def __init__(self, run: Path, note: Callable[[str], None]) -> None:
        self.run, self.note = run, note
        self._file: IO[str] | None = None

    def acquire(self) -> None:
        """Makes the folder where there is none, and takes the lock, unless it is held already.

        Raises:
            UserError: another training holds it.
            Failure: the folder cannot be written.
        """
        if self._file is not None:
            return
        try:
            self.run.mkdir(parents=True, exist_ok=True)
            file = (self.run / ".lock").open("a")
            locked = lock(file)
        except BlockingIOError as error:
            raise UserError(
                f"another training is running in {self.run}: wait for it, or take another --out"
            ) from error
        except OSError as error:
            raise Failure(f"cannot write the run folder {self.run}: {error.strerror}") from error
        self._file = file
        if not locked:
            self.note(
                f"the file system of {self.run} has no locks: nothing keeps a second training out "
                "of this folder"
            )

    def __enter__(self) -> Self:
        self.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        """Lets the next one in."""
        if self._file is not None:
            self._file.close()
            self._file = None


def check_writable(run: Path) -> None:
    """Before anything else costs time: ``run`` can be written or made.

    Raises:
        UserError: a file has that name, or that of a folder it is to be in.
        Failure: the folder is read-only.
    """
    there = next(path for path in (run, *run.absolute().parents) if path.exists())
    if not there.is_dir():
        raise UserError(f"--out takes a folder for the run, and {there} is a file")
    if not os.access(there, os.W_OK | os.X_OK):
        raise Failure(f"cannot write the run folder {run}: {there} is read-only")


def open_run_folder(
    run: Path, config: TrainConfig, device: torch.device, keep_epochs: int | None
) -> None:
    """Writes ``config.json`` and ``env.json``; drops the metrics of epochs to be trained again.

    Also drops what a killed run left half-written. The caller holds the lock.

    Args:
        keep_epochs: epochs whose metrics stay; None: all.

    Raises:
        Failure: the folder cannot be written.
    """
    try:
        run.mkdir(parents=True, exist_ok=True)
        for folder in (run, run / "checkpoints", run / "nonfinite"):
            drop_temporaries(folder)
        config.save(run / "config.json")
        atomic_write_text(run / "env.json", json.dumps(environment(device), indent=1) + "\n")
        if keep_epochs is not None:
            drop_metrics(run, keep_epochs)
    except OSError as error:
        raise Failure(f"cannot write the run folder {run}: {error.strerror}") from error


def drop_metrics(run: Path, keep_epochs: int) -> None:
    """Drops the lines of epochs that will be trained again from ``metrics.jsonl``."""
    metrics = run / "metrics.jsonl"
    if metrics.exists():
        # A power cut may have left part of a line.
        try:
            lines = [x for x in metrics.read_text().splitlines() if x.endswith("}")]
            kept = [x for x in lines if json.loads(x)["epoch"] <= keep_epochs]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise Failure(f"{metrics} is damaged: {error!r}; remove that line") from error
        atomic_write_text(metrics, "".join(x + "\n" for x in kept))


def append_metrics(run: Path, line: dict[str, Any]) -> None:
    """Adds an epoch to ``metrics.jsonl``, whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    with (run / "metrics.jsonl").open("ab", buffering=0) as file:
        append(file, (json.dumps(finite(line)) + "\n").encode())


def append_bad_clips(run: Path, packed: PackedSet, bad: dict[int, str]) -> int:
    """Adds those of ``bad``, rows of ``packed`` with reasons, to ``bad_clips.csv`` that it does not
    list yet; their number. Columns: shard, row (of the shard), clip, reason."""
    path = run / BAD_CLIPS_FILE
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
        with path.open("ab", buffering=0) as file:
            append(file, text.getvalue().encode("utf-8", "surrogateescape"))
    return len(lines)


def trainer_state(
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    data: str,
    device: torch.device,
    random_states: list[dict[str, Tensor | None]],
    loss_scale: LossScale | None,
) -> dict[str, Any]:
    """``trainer.pt``: what a run needs to go on, bit for bit.

    Args:
        data: fingerprint of the training set.
        random_states: of every rank.
    """
    return {
        "optimizer": saved_state(optimizer),
        "progress": asdict(progress),
        "random": random_states,
        "loss_scale": None if loss_scale is None else loss_scale.state(),
        "data": data,
        "numerics": numerics(device),
    }


def restore_trainer_state(
    state: dict[str, Any],
    optimizer: torch.optim.Optimizer,
    device: torch.device,
    ranks: Ranks,
    loss_scale: LossScale | None,
) -> tuple[Progress, list[str]]:
    """Puts ``trainer_state`` back; returns where the run stands, and what there is to say.

    A rank that the run did not have before draws from a seed of its own.
    """
    load_state(optimizer, state["optimizer"])
    progress = Progress(**state["progress"])
    progress.loss_sum = progress.loss_sum.to(device)
    random_states = state.get("random") or [state]  # older checkpoints have one rank's
    if ranks.rank < len(random_states):
        restore_random_state(random_states[ranks.rank], device)
    else:
        seed_rank(progress.step, ranks)
    notes = []
    if loss_scale is not None:
        if state.get("loss_scale"):
            loss_scale.restore(state["loss_scale"])
        else:
            notes.append(f"the checkpoint has no loss scale: it starts at {FIRST_SCALE:,.0f}")
    if len(random_states) != ranks.size:
        notes.append(
            f"the run had {len(random_states)} ranks and has {ranks.size} now: the same clips a "
            "step, but dropout and the order of sums differ"
        )
    if (now := numerics(device)) != state["numerics"]:
        notes.append(
            f"numerics changed from {state['numerics']} to {now}: "
            "the run goes on, not bit for bit as it would have"
        )
    return progress, notes
