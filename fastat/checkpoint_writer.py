"""Checkpoints written by a thread of their own, while training goes on."""

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from fastat.checkpoint import ModelMeta
from fastat.errors import Failure
from fastat.run_checkpoints import write_checkpoint


@dataclass(frozen=True)
class Unwritten:
    """A checkpoint that could not be written."""

    failure: Failure
    best: bool
    """Whether it was to be the best."""


class CheckpointWriter:
    """Writes one checkpoint at a time into ``folder``.

    Training only waits for the snapshot: a copy in host memory, on CUDA into pinned memory and
    ordered before the next step by the stream, so that not even the host waits for it. There is
    one snapshot at most; who asks while ``busy`` waits for the one before.

    The thread dies with the process: a write that this cuts off leaves a ``.tmp`` folder, which
    the next start removes, and the checkpoints before.

    Args:
        note: hears of a write that failed while an error was ending the run.
    """

    def __init__(self, folder: Path, note: Callable[[str], None]) -> None:
        self.folder, self._note = folder, note
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._best = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Lets the write under way come to its end; only Ctrl-C does not wait for it."""
        if kind is not KeyboardInterrupt and (unwritten := self.outcome(wait=True)) is not None:
            self._note(str(unwritten.failure))

    @property
    def busy(self) -> bool:
        """Whether a write is under way."""
        return self._thread is not None and self._thread.is_alive()

    def start(
        self,
        step: int,
        state: dict[str, Tensor],
        meta: ModelMeta,
        trainer: dict[str, Any],
        *,
        best: bool,
    ) -> None:
        """Takes a snapshot and starts to write it. What came of the one before must be known."""
        assert self._thread is None, "outcome() comes first"
        self._best = best
        state, trainer = to_host(state), to_host(trainer)
        copied = None
        if torch.cuda.is_available():
            copied = torch.cuda.Event()
            copied.record()

        def write() -> None:
            try:
                if copied is not None:
                    copied.synchronize()
                write_checkpoint(self.folder, step, state, meta, trainer, best=best)
            except BaseException as error:  # handed over, see outcome
                self._error = error

        self._thread = threading.Thread(target=write, name="fastat-checkpoint", daemon=True)
        self._thread.start()

    def outcome(self, *, wait: bool) -> Unwritten | None:
        """What went wrong with a write that ended since the last call, if one did.

        Args:
            wait: for the write under way.

        Raises:
            BaseException: a fault in our own code, which the thread met.
        """
        if self._thread is None or (self.busy and not wait):
            return None
        self._thread.join()
        self._thread, error, self._error = None, self._error, None
        if error is None:
            return None
        if not isinstance(error, Failure):
            raise error
        return Unwritten(error, self._best)

    def finish(self) -> None:
        """Waits for the write under way.

        Raises:
            Failure: it could not be written.
        """
        if (unwritten := self.outcome(wait=True)) is not None:
            raise unwritten.failure


class Due:
    """When a checkpoint in mid-epoch is due.

    One that comes due while another is being written stays due until a step finds that done.
    """

    def __init__(self, every_steps: int | None, every_minutes: float | None) -> None:
        self.every_steps = every_steps or math.inf
        self.every_seconds = 60 * (every_minutes or math.inf)
        self.saved()

    def saved(self) -> None:
        """Starts anew."""
        self._due, self._since = False, time.monotonic()

    def after(self, step: int) -> bool:
        """Whether one is due after ``step`` steps."""
        waited = time.monotonic() - self._since
        self._due |= step % self.every_steps == 0 or waited >= self.every_seconds
        return self._due


def to_host(tree: Any) -> Any:
    """A copy of dicts, lists and tuples of tensors and plain values, its tensors in host memory.

    Copies of CUDA tensors are only complete after the current stream's work so far.
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
