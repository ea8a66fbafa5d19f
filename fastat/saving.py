"""A run's checkpoints as it takes them, and how it goes back to one: on all ranks alike."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from fastat.checkpoint import ModelMeta, put_weights
from fastat.checkpoint_writer import CheckpointWriter, Due
from fastat.config import TrainConfig
from fastat.distributed import Ranks
from fastat.environment import random_state
from fastat.errors import UserError
from fastat.fields import check_keys
from fastat.loss_scale import LossScale
from fastat.network import Network
from fastat.outputs import finite
from fastat.run_checkpoints import (
    TRAINER_FILE,
    Resumable,
    best_there,
    go_back,
    newest_whole,
    step_name,
)
from fastat.run_folder import Progress, restore_trainer_state, trainer_state
from fastat.step import TrainingStep
from fastat.training_data import TrainingData


class Saving:
    """Takes the checkpoints of a run and puts them back.

    Rank 0 alone writes and reads; all ranks call the methods at the same steps.

    Args:
        note: hears of what cannot be written; training goes on.
    """

    def __init__(
        self,
        config: TrainConfig,
        run: Path,
        data: TrainingData,
        network: Network,
        device: torch.device,
        ranks: Ranks,
        note: Callable[[str], object],
    ) -> None:
        self.config, self.run, self.folder = config, run, run / "checkpoints"
        self.network, self.device, self.ranks, self._note = network, device, ranks, note
        self.fingerprint = data.train_set.fingerprint
        self.steps_per_epoch = data.sampler.steps_per_epoch

    def begin(self, writer: CheckpointWriter) -> None:
        """On rank 0, before the first step."""
        self.writer = writer
        self._due = Due(self.config.checkpoint_every_steps, self.config.checkpoint_every_minutes)

    def due(self, progress: Progress) -> bool:
        """Whether rank 0 is to take one in mid-epoch, of which the others hear by a vote."""
        if not self.ranks.first:
            return False
        self.heed(progress)
        busy = self.writer.busy
        return self._due.after(progress.step) and not busy

    def save(
        self,
        progress: Progress,
        meta: ModelMeta,
        loss_scale: LossScale | None,
        *,
        best: bool,
    ) -> None:
        """Takes a snapshot, once the one before is written; it is written in the background.

        Every rank takes part: all their random states are in it.
        """
        random_states = self.ranks.gather(random_state(self.device))
        if not self.ranks.first:
            return
        self.heed(progress, wait=True)
        trained = {
            "procedure": self.config.proc,
            "step": progress.step,
            "epoch": progress.step / self.steps_per_epoch,
            "best_mAP": progress.best_map,
        }
        state = trainer_state(
            self.network.optimizer,
            progress,
            self.fingerprint,
            self.device,
            random_states,
            loss_scale,
        )
        weights = self.network.raw_model.state_dict()
        meta = replace(meta, trained=finite(trained))
        self.writer.start(progress.step, weights, meta, state, best=best)
        self._due.saved()

    def heed(self, progress: Progress, *, wait: bool = False) -> None:
        """Says that a checkpoint could not be written, if so; the next occasion tries again."""
        if not self.ranks.first:
            return
        unwritten = self.writer.outcome(wait=wait)
        if unwritten is not None:
            self._note(f"{unwritten.failure}; training goes on, and tries again")
            if unwritten.best:  # the best is the best that there is
                progress.best_map, progress.best_step = best_there(self.folder)

    def finish(self) -> None:
        """Waits for the last checkpoint. The other ranks wait for rank 0: torchrun ends all of them
        when one leaves.

        Raises:
            Failure: it could not be written.
        """
        if self.ranks.first:
            self.writer.finish()
        self.ranks.gather(None)

    def restore(self, step: TrainingStep) -> tuple[Progress, list[str]]:
        """Puts the newest whole checkpoint back, which rank 0 reads; where it stands, and notes."""
        newest, lost = self.ranks.from_first(self._read)
        put_weights(self.network.raw_model, newest.state, self.folder / step_name(newest.step))
        progress, notes = restore_trainer_state(
            newest.trainer, self.network.optimizer, self.device, self.ranks, step.loss_scale
        )
        step.forget()  # the optimizer has other tensors now
        if lost is not None:
            progress.best_map, progress.best_step = -math.inf, None
            notes.append(lost)
        return progress, [
            *newest.notes, f"resuming {self.run} at step {progress.step:,}", *notes
        ]  # fmt: skip

    def _read(self) -> tuple[Resumable, str | None]:
        """The newest whole checkpoint, and ``go_back``'s note: the run folder is put back to it."""
        newest = newest_whole(self.folder)
        if newest.trainer["data"] != self.fingerprint:
            raise UserError(
                f"{self.config.data} is not the set that {self.run} was trained on, or has grown "
                "since (fastat pack --append)"
            )
        progress = newest.trainer["progress"]
        path = self.folder / step_name(newest.step) / TRAINER_FILE
        check_keys(path, progress, Progress)
        best_step = progress.get("best_step")
        return newest, go_back(self.folder, newest.step, best_step)
