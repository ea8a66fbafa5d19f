"""The trainer: read it from top to bottom."""

import logging
import shlex
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import torch

from fastat.config.run import TrainConfig
from fastat.config.schedule import lr_factor
from fastat.data.loader import with_features
from fastat.evaluation.evaluate import Evaluation, evaluate
from fastat.evaluation.metrics import TaggingMetrics
from fastat.system.compiling import CompileClock
from fastat.system.device import choose_kernels, default_device
from fastat.system.display import Status, StatusDisplay, release_messages
from fastat.system.distributed import ALONE, Ranks, Vote, peers_may_fail, seed_rank
from fastat.system.environment import memory_is_full, peak_memory_gib
from fastat.system.errors import Failure, UserError
from fastat.system.outputs import check_writable, finite
from fastat.training.checkpoints import CheckpointManager, holds_checkpoints
from fastat.training.data import open_data
from fastat.training.finetune import train_mode
from fastat.training.introduction import log_device_choices, log_introduction
from fastat.training.network import build_network, training_step
from fastat.training.nonfinite import reason_to_stop
from fastat.training.readback import DelayedReadback, Reading
from fastat.training.run_folder import Progress, RunFolder, epoch_line, epoch_text
from fastat.training.signals import Interrupted, StopSignals
from fastat.weights.checkpoint import build_frontend
from fastat_kernels.backend import set_kernels

log = logging.getLogger(__name__)

LESS_MEMORY = (
    "a smaller --batch, a larger --accumulate or --set model.activation_checkpointing=true "
    "needs less"
)


def train(
    config: TrainConfig,
    run: Path,
    *,
    resume: bool,
    ranks: Ranks = ALONE,
) -> TaggingMetrics | None:
    """Trains ``config`` into the folder ``run``; returns the last epoch's metrics, if any.

    Raises:
        UserError: data, model and options do not fit together, or the run is under way already.
        Failure: a damaged row, a full disk, a loss that is not finite, another rank that is gone.
        Interrupted: SIGINT, SIGTERM or SIGUSR1; a checkpoint was saved.
    """
    with StatusDisplay(shown=ranks.first) as display, peers_may_fail(ranks):
        try:
            trainer = Trainer(config, run, display, resume=resume, ranks=ranks)
            release_messages()
            return trainer.run_epochs()
        except RuntimeError as error:
            if not memory_is_full(error):
                raise
            which = "the GPU's memory" if isinstance(error, torch.OutOfMemoryError) else "memory"
            raise Failure(f"{which} is full: {LESS_MEMORY} ({error})") from error


class Trainer:
    """One training run; each rank has one device.

    Every rank takes the same decisions at the same steps; rank 0 alone writes.
    """

    def __init__(
        self,
        config: TrainConfig,
        run: Path,
        display: StatusDisplay,
        *,
        resume: bool,
        ranks: Ranks = ALONE,
    ) -> None:
        self.config, self.run, self.display = config, run, display
        ranks = self.ranks = ranks.with_timeout(config.rank_timeout)
        self.folder = RunFolder(run)
        ranks.from_first(self._check_early)
        torch.manual_seed(config.seed)
        self.device = default_device()
        set_kernels(choose_kernels(config.kernels, self.device))
        log_device_choices(config, self.device)

        # ---- data
        self.data = open_data(config, self.device, self.ranks)
        self.sampler, self.meta = self.data.sampler, self.data.meta
        self.frontend = build_frontend(self.meta).to(self.device)

        # ---- model
        resuming = ranks.from_first(lambda: resume and holds_checkpoints(run / "checkpoints"))
        self.network = build_network(config, self.meta, self.device, self.ranks, start=not resuming)
        self.raw_model, self.optimizer = self.network.raw_model, self.network.optimizer

        # ---- state of the run
        seed_rank(config.seed, ranks)
        zero = torch.zeros((), dtype=torch.float64, device=self.device)
        self.progress = Progress(loss_sum=zero)
        self.readback = DelayedReadback(self.device)
        self.step = training_step(config, self.network, self.device, self.ranks)
        self.compiling = CompileClock() if config.compile else None
        self.vote = Vote(self.ranks)
        self.stop = StopSignals()
        self.checkpoints = CheckpointManager(
            run,
            self.raw_model,
            self.optimizer,
            self.device,
            self.ranks,
            train_set=self.data.train_set,
            every_steps=config.checkpoint_every_steps,
            every_minutes=config.checkpoint_every_minutes,
        )
        ranks.from_first(lambda: self._lock_run_folder(resume))
        if resuming:
            self._restore()
        total_steps = self.sampler.steps_per_epoch * config.epochs
        self.last_step = min(total_steps, config.steps or total_steps)
        if (
            self.progress.step != self.last_step
            and self.progress.step % self.sampler.steps_per_epoch
        ):
            self.progress.unscored = False  # --steps had ended the run here, and no longer does
        keep = self._whole_epochs()
        ranks.from_first(lambda: self.folder.prepare(config, self.device, keep))
        log_introduction(config, run, self.data, self.network, self.device, self.ranks)

    def _check_early(self) -> None:
        """Checks the batch, the run folder and its lock, before anything costs time."""
        c = self.config
        if c.batch % (self.ranks.size * c.accumulate):
            raise UserError(
                f"batch must be a multiple of ranks x accumulate: got batch {c.batch}, "
                f"{self.ranks.size} ranks, accumulate {c.accumulate}"
            )
        check_writable(self.run)
        if self.run.exists():
            self.folder.lock()

    def _lock_run_folder(self, resume: bool) -> None:
        """Locks the run folder, once data, model and options are known to fit together."""
        self.folder.lock()
        if not resume and (self.run / "config.json").exists():
            # another process made it since the command line was read
            raise UserError(f"{self.run} already holds a run: --resume goes on with it")

    # ------------------------------------------------------------------ epochs
    def run_epochs(self) -> TaggingMetrics | None:
        """Trains from the run's current step to its end."""
        metrics = None
        with ExitStack() as stack:
            stack.enter_context(self.stop)
            if self.compiling is not None:
                stack.enter_context(self.compiling)
            self.ranks.from_first(lambda: self._start_writing(stack))
            if not self._unfinished():
                log.info(f"{self.run} has its {self.last_step:,} steps: nothing left to train")
            while self._unfinished():
                epoch = self._epoch()
                if not self.progress.unscored:
                    try:
                        self._train_epoch(epoch)
                    except Failure:
                        if self.ranks.first:
                            self.folder.add_bad_clips(self.data.train_set, self.data.bad_clips())
                        raise
                bad = self.data.share_bad_clips(self.ranks)
                if self.ranks.first:
                    self.folder.add_bad_clips(self.data.train_set, bad)
                self.progress.unscored = True
                evaluation = self._evaluate()
                self._log_compiling()
                metrics = evaluation.metrics if evaluation else None
                self._finish_epoch(epoch, evaluation)
                signum = self._signal_of_any_rank()
                if signum and self._unfinished():
                    self._stop_after_signal(signum)
            self.checkpoints.finish()
            if self.ranks.first:
                self.folder.finish()
        command = f"fastat predict {shlex.quote(str(self.run))} FILE"
        log.info(f"saved in {self.run}; tag a sound with: {command}")
        self.data.close()
        return metrics

    def _train_epoch(self, epoch: int) -> None:
        """Trains the rest of an epoch, from the run's current step."""
        p = self.progress
        first = epoch * self.sampler.steps_per_epoch
        end = min(first + self.sampler.steps_per_epoch, self.last_step)
        train_mode(self.network.model)
        steps = range(p.step, end)
        plans = (
            self.data.own_part(self.sampler.plan(epoch, step - first), self.ranks) for step in steps
        )
        batches = with_features(self.data.source.batches(plans), self.frontend, self.device)
        clock = self._clock()
        for step, (batch, features, waited) in zip(steps, batches, strict=True):
            lr = self._lr(step)
            result = self.step(features, batch.target, lr)
            zero = torch.zeros_like(result.loss)
            p.loss_sum += torch.where(result.found_inf > 0, zero, result.loss)
            self.readback.put(step, lr, result, p.loss_sum)
            p.step = step + 1
            seen = self._check_finished_steps()

            p.wait_seconds += waited
            p.train_seconds += self._clock() - clock
            self._log_compiling()
            if seen is not None and (self.device.type == "cpu" or seen.step % 50 == 49):
                self._report(epoch, seen)
            if p.step < end:
                self._save_in_mid_epoch()
            clock = self._clock()
        self._check_finished_steps(wait=True)
        p.train_seconds += self._clock() - clock

    def _start_writing(self, stack: ExitStack) -> None:
        """Opens what rank 0 writes. The last checkpoint is written before the lock is released."""
        stack.enter_context(self.folder).open_curves(self.progress.step)
        stack.enter_context(self.checkpoints)

    def _unfinished(self) -> bool:
        """Whether a step is left to train, or an epoch to score."""
        return self.progress.step < self.last_step or self.progress.unscored

    def _epoch(self) -> int:
        """The epoch, from 0, that the run is in."""
        p = self.progress
        return (p.step - p.unscored) // self.sampler.steps_per_epoch

    def _whole_epochs(self) -> int | None:
        """Number of epochs whose metrics stay in the run folder; None: all."""
        return self._epoch() if self._unfinished() else None

    def _clock(self) -> float:
        """A clock in seconds that stands still while torch compiles."""
        return time.perf_counter() - (self.compiling.seconds if self.compiling else 0.0)

    def _log_compiling(self) -> None:
        if self.compiling is not None and (note := self.compiling.note()):
            log.info(note)

    def _lr(self, step: int) -> float:
        """The learning rate of the head; layers below may have less of it."""
        return self.config.lr * lr_factor(
            step,
            schedule=self.config.schedule,
            warmup_steps=self.config.warmup_steps,
            steps_per_epoch=self.sampler.steps_per_epoch,
            epochs=self.config.epochs,
        )

    def _check_finished_steps(self, *, wait: bool = False) -> Reading | None:
        """Reads the results of finished steps: on a GPU those of two steps ago, on a CPU at once.

        Returns:
            the last of these results, if any.
        """
        seen = None
        for seen in self.readback.due(wait=wait):
            if seen.overflow:
                self.progress.overflows += 1
            elif seen.found_inf:
                self._skip_or_stop(seen.step)
        return seen

    def _skip_or_stop(self, step: int) -> None:
        """Reports a step that is not finite, and ends the run where ``on_nan`` says so.

        Raises:
            Failure: the run ends.
        """
        p, on_nan = self.progress, self.config.on_nan
        half = " of float16, which ends at 65,504" if self.config.precision == "fp16" else ""
        text = (
            f"the loss or a gradient is not finite at step {step + 1}{half}; "
            "that step was not taken"
        )
        if (reason := reason_to_stop(on_nan, step, p.skipped)) is not None:
            self.ranks.from_first(lambda: self._fail(f"{text}; {reason}. {self._clips_of(step)}"))
        p.skipped.append(step)
        if self.ranks.first:
            log.warning(f"{text}; {len(p.skipped)} skipped so far. {self._clips_of(step)}")

    def _fail(self, text: str) -> NoReturn:
        raise Failure(text)

    def _clips_of(self, step: int) -> str:
        """Names the clips of a step and those mixed into them, as they were read."""
        plan = self.sampler.plan(*divmod(step, self.sampler.steps_per_epoch))
        rows, partners = self.data.clips_of(plan)
        names = self.data.train_set.names
        mixed = f"; mixed in: {', '.join(names(partners))}" if len(partners) else ""
        return f"Its clips: {', '.join(names(rows))}{mixed}"

    def _report(self, epoch: int, seen: Reading) -> None:
        if not self.ranks.first:
            return
        p, c = self.progress, self.config
        first = epoch * self.sampler.steps_per_epoch
        done = p.taken(first) or 1
        summed = p.taken(first, seen.step + 1) - p.overflows
        rate = done * c.batch / p.train_seconds
        self.folder.add_step(seen)
        self.display.update(
            Status(
                epoch=epoch + 1,
                epochs=c.epochs,
                step=p.step,
                total_steps=self.last_step,
                loss=seen.loss_sum / (summed or 1),
                lr=seen.lr,
                clips_per_s=rate,
                data_wait=p.wait_seconds / p.train_seconds,
                seconds_left=(self.last_step - p.step) * c.batch / rate,
            )
        )

    def _evaluate(self) -> Evaluation | None:
        """Scores the model; None without an evaluation set.

        After a signal an evaluation that takes too long is cut off; resuming the run makes up for
        it.
        """
        d = self.data
        if d.eval_set is None or d.eval_source is None or d.match is None:
            return None
        self.ranks.share_buffers(self.raw_model)
        evaluation = evaluate(
            self.network.eval_model,
            self.frontend,
            d.eval_set,
            d.eval_source,
            d.match,
            device=self.device,
            precision=self.config.precision,
            batch=self.config.eval_batch,
            rows=d.eval_rows,
            ranks=self.ranks,
            should_stop=lambda: self.stop.overdue,
        )
        if evaluation is None:
            self._save(best=False)
            self._stop_after_signal(self._signal_of_any_rank())
        return evaluation

    def _finish_epoch(self, epoch: int, evaluation: Evaluation | None) -> None:
        """Records and saves the epoch, and resets the sums for the next one."""
        p, c = self.progress, self.config
        steps = self.sampler.steps_per_epoch
        first = epoch * steps
        self.checkpoints.check_last_write(p, wait=True)  # corrects best_map if the best failed
        more: dict[str, float] = {}
        if self.compiling is not None:
            more["compile_s"] = self.compiling.of_epoch()
        if self.step.loss_scale is not None:
            more["overflows"] = p.overflows
        line = epoch_line(
            p,
            first,
            epoch + 1,
            evaluation,
            lr=self._lr(p.step - 1),
            batch=c.batch,
            peak_memory_gib=peak_memory_gib(self.device),
            **more,
        )
        best = evaluation is not None and evaluation.metrics.mAP > p.best_map
        if evaluation is not None and best:
            p.best_map, p.best_step = evaluation.metrics.mAP, p.step
        p.unscored = False
        if p.step == first + steps:  # one that --steps cut short goes on from its sums on resume
            p.loss_sum, p.train_seconds, p.wait_seconds = p.loss_sum.new_zeros(()), 0.0, 0.0
            p.overflows = 0
        if self.ranks.first:
            self.folder.add_epoch(line)
            if best and evaluation is not None:
                assert self.data.eval_set is not None and self.data.match is not None
                classes = [self.meta.classes[k] for k in self.data.match.model_columns]
                self.folder.save_predictions(evaluation, self.data.eval_set, classes)
        self._save(best=best)
        text = epoch_text(line, c.epochs, len(self.meta.classes))
        log.info(text + ("  *" if best else ""))

    # -------------------------------------------------------------- checkpoints
    def _save_in_mid_epoch(self) -> None:
        """Saves after a signal or when a save is due; several ranks agree on it a step later."""
        due = self.checkpoints.is_due(self.progress)
        signum, due_on_first = self.vote(self.stop.signum or 0, int(due))
        if signum or due_on_first:
            self._check_finished_steps(wait=True)
            self._save(best=False)
        if signum:
            self._stop_after_signal(signum)

    def _signal_of_any_rank(self) -> int:
        """The signal that any rank has had, or 0."""
        return self.vote.now(self.stop.signum or 0, 0)[0]

    def _stop_after_signal(self, signum: int) -> NoReturn:
        """Waits for the last checkpoint to be written, and ends the training."""
        if self.ranks.first:
            try:
                self.folder.finish()
            except Failure as error:  # the run can be resumed all the same
                log.warning(str(error))
        self.checkpoints.finish()
        raise Interrupted(signum)

    def _save(self, *, best: bool) -> None:
        p = self.progress
        self.checkpoints.check_last_write(p, wait=True)
        trained = {
            "procedure": self.config.proc,
            "step": p.step,
            "epoch": p.step / self.sampler.steps_per_epoch,
            "best_mAP": p.best_map,
        }
        meta = replace(self.meta, trained=finite(trained))
        self.checkpoints.save(p, meta, self.step.loss_scale, best=best)

    def _restore(self) -> None:
        """Goes on from the newest whole checkpoint."""
        self.progress = self.checkpoints.restore(self.step.loss_scale)
        self.step.forget()  # the optimizer has other tensors now
