"""The trainer: read it from top to bottom."""

import os
import time
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from fastat.checkpoint import (
    ModelMeta,
    build_frontend,
    find_checkpoint,
    load_trainer_state,
    load_weights,
    save_checkpoint,
)
from fastat.config import TrainConfig
from fastat.data.cache import CachedSource, TooLittleMemory
from fastat.data.loader import Batch, PackedSource, Source
from fastat.data.sampler import Sampler, balanced_weights
from fastat.data.shards import PackedSet
from fastat.display import Display, Status
from fastat.distributed import (
    ALONE,
    Ranks,
    Vote,
    peers_may_fail,
    seed_rank,
)
from fastat.environment import autocast, default_device, device_name, peak_memory_gib
from fastat.errors import Failure, UserError
from fastat.evaluate import Evaluation, evaluate, match_classes, save_predictions
from fastat.features import FEATURES
from fastat.finetune import freeze, parameter_groups, train_mode
from fastat.metrics import TaggingMetrics, finite
from fastat.models.sync_batchnorm import synchronise_batchnorm
from fastat.optim import create_adam, train_step
from fastat.run_folder import (
    BAD_CLIPS_FILE,
    Progress,
    append_bad_clips,
    append_metrics,
    open_run_folder,
    random_state,
    restore_trainer_state,
    trainer_state,
)
from fastat.schedule import lr_factor
from fastat.signals import Interrupted, StopSignals
from fastat_kernels.backend import chosen_kernels, set_kernels
from fastat_kernels.choice import parse_kernels

LESS_MEMORY = "a smaller --batch, or more of --accumulate, needs less"


def train(
    config: TrainConfig,
    run: Path,
    notes: list[str],
    *,
    resume: bool,
    ranks: Ranks = ALONE,
) -> TaggingMetrics | None:
    """Trains ``config`` into the folder ``run``; returns the last epoch's metrics, if any.

    Raises:
        UserError: data, model and options do not fit together.
        Failure: a damaged row, a full disk, a loss that is not finite, another rank that is gone.
        Interrupted: SIGINT or SIGTERM; a checkpoint was saved.
    """
    with Display(shown=ranks.first) as display, peers_may_fail(ranks):
        try:
            trainer = Trainer(config, run, notes, display, resume=resume, ranks=ranks)
            return trainer.run_epochs()
        except torch.OutOfMemoryError as error:
            raise Failure(f"the GPU's memory is full: {LESS_MEMORY} ({error})") from error
        except RuntimeError as error:
            if "DefaultCPUAllocator" not in str(error):
                raise
            raise Failure(f"memory is full: {LESS_MEMORY} ({error})") from error


class Trainer:
    """One training run, on one device a rank."""

    def __init__(
        self,
        config: TrainConfig,
        run: Path,
        notes: list[str],
        display: Display,
        *,
        resume: bool,
        ranks: Ranks = ALONE,
    ) -> None:
        self.config, self.run, self.display = config, run, display
        if config.batch % (ranks.size * config.accumulate):
            raise UserError(
                f"batch must be a multiple of ranks x accumulate: got batch {config.batch}, "
                f"{ranks.size} ranks, accumulate {config.accumulate}"
            )
        preparing, self.ranks = ranks, ranks.with_timeout(config.rank_timeout)
        self.notes = list(notes)  # shown once everything fits together
        torch.manual_seed(config.seed)
        self.device = default_device()
        set_kernels(parse_kernels(config.kernels))
        if self.device.type == "cuda":
            self.notes.append(f"Triton kernels: {', '.join(chosen_kernels()) or 'none'}")
        elif config.kernels != "auto":
            self.notes.append(f"kernels={config.kernels}: Triton kernels run on CUDA only")

        # ---- data
        self.train_set = PackedSet.open(config.data)
        self.eval_set = None if config.eval is None else PackedSet.open(config.eval)
        feature = FEATURES[config.feature]
        num_frames = feature.num_frames(self.train_set.clip_samples)
        stats = self.train_set.stats[feature.name] if config.statistics == "set" else feature
        self.meta = ModelMeta(
            model=config.model,
            feature=feature.name,
            clip_seconds=self.train_set.clip_samples / feature.sample_rate,
            num_mels=feature.num_mels,
            num_frames=num_frames,
            mean=stats.mean,
            std=stats.std,
            classes=self.train_set.classes,
            options=config.model_options,
            remove_mean=config.remove_mean,
            normalize=config.normalize,
        )
        self.match = None
        if self.eval_set is not None:
            if self.eval_set.clip_samples != self.train_set.clip_samples:
                raise UserError(
                    f"clips of {config.data} have {self.train_set.clip_samples} samples, "
                    f"those of {config.eval} {self.eval_set.clip_samples}: pack both alike"
                )
            self.match = match_classes(self.meta.classes, self.eval_set)
            if self.match.note:
                self.notes.append(self.match.note)
        self.frontend = build_frontend(self.meta).to(self.device)
        if len(set(ranks.gather(self.train_set.fingerprint))) > 1:
            raise UserError(f"{config.data} is not the same set on every host")
        if config.cache != "none":
            self.source, usable = self._open_cached(self.train_set, preparing)
        else:
            with preparing.first_goes_ahead():
                self.source, usable = self._open_source(self.train_set, config.batch // ranks.size)
        self.eval_source, self.eval_rows = None, None
        if self.eval_set is not None:
            self.eval_source, eval_usable = self._open_source(self.eval_set, config.eval_batch)
            self.eval_rows = None if eval_usable is None else np.flatnonzero(eval_usable)
        balanced = balanced_weights(self.train_set.target_bits, self.train_set.label_counts)
        self.sampler = Sampler(
            self.train_set.num_clips,
            config.batch,
            seed=config.seed,
            num_frames=num_frames,
            num_mels=feature.num_mels,
            weights=balanced if config.balance else None,
            usable=usable,
            mixup=config.mixup,
            mixup_alpha=config.mixup_alpha,
            time_mask=config.time_mask,
            freq_mask=config.freq_mask,
            window=config.window,
        )
        if isinstance(self.source, PackedSource):
            self.source = PackedSource(
                self.train_set, self.device, sampler=self.sampler, max_bad=config.max_bad
            )

        # ---- model
        self.raw_model = self.meta.create()
        resuming = ranks.from_first(lambda: resume and (run / "checkpoints" / "last").exists())
        if not resuming:
            self.notes += ranks.from_first(self._start_weights)
        self.raw_model.to(self.device).to(memory_format=torch.channels_last)
        if note := freeze(self.raw_model, config.freeze):
            self.notes.append(note)
        if config.sync_batchnorm and self.ranks.device_group is not None:
            synchronise_batchnorm(self.raw_model, self.ranks.device_group)
        self.params = [p for p in self.raw_model.parameters() if p.requires_grad]
        self.optimizer, whose = create_adam(
            parameter_groups(self.raw_model, config.layer_decay),
            lr=config.lr,
            betas=(config.beta1, config.beta2),
            weight_decay=config.weight_decay,
            device=self.device,
        )

        # ---- where it stands
        seed_rank(config.seed, ranks)
        self.progress = Progress()
        self.pending: deque[tuple[int, Tensor]] = deque()
        self.vote = Vote(self.ranks)
        if resuming:
            self._restore()
        self.model = self.ranks.parallel(self.raw_model, config.gradient_dtype)
        if config.compile:
            self.model = cast(nn.Module, torch.compile(self.model))
        self.eval_model = self.model
        if ranks.size > 1:  # DDP would wait for a rank that has fewer clips
            compiled = torch.compile(self.raw_model) if config.compile else self.raw_model
            self.eval_model = cast(nn.Module, compiled)
        total_steps = self.sampler.steps_per_epoch * config.epochs
        self.last_step = min(total_steps, config.steps or total_steps)
        unfinished = self.progress.step < self.last_step
        whole_epochs = self.progress.step // self.sampler.steps_per_epoch
        if ranks.first:
            open_run_folder(run, config, self.device, whole_epochs if unfinished else None)
        size = sum(p.numel() for p in self.raw_model.parameters())
        self.notes.append(
            f"{config.model}: {size:,} parameters, {config.proc}, {feature.name} "
            f"{feature.num_mels} x {num_frames}, {config.precision} on "
            f"{f'{ranks.size} x ' if ranks.size > 1 else ''}{device_name(self.device)}, {whose}"
        )
        self.notes.append(
            f"{self.train_set.num_clips:,} clips, {len(self.meta.classes)} classes: "
            f"{config.epochs} epochs of {self.sampler.steps_per_epoch:,} steps, "
            f"batch {config.batch}, LR {config.lr:g} -> {run}"
        )
        if self.eval_set is None:
            self.notes.append("no --eval set: training without scoring")
        for note in self.notes:
            display.note(note)

    def _open_source(
        self, packed: PackedSet, batch: int
    ) -> tuple[Source, NDArray[np.bool_] | None]:
        """A source of batches of ``packed``, and the clips it can deliver (None: all)."""
        if self.config.cache != "none":
            return self._open_cached(packed, self.ranks)
        if self.config.source == "packed":
            return PackedSource(packed, self.device), None
        from fastat.data.dali import DaliSource  # DALI is heavy, and only needed here

        source = DaliSource(
            packed,
            self.config.feature,
            batch=batch,
            threads=os.cpu_count() or 1,
            device=self.device,
            max_bad=self.config.max_bad,
            remove_mean=self.config.remove_mean,
        )
        if source.bad:
            row, path, reason = source.bad[0]
            self.notes.append(
                f"DALI cannot take {len(source.bad)} clips; the first: {path}: {reason}"
            )
        return source, source.usable

    def _open_cached(
        self, packed: PackedSet, preparing: Ranks
    ) -> tuple[Source, NDArray[np.bool_] | None]:
        """``_open_source`` for log-mels kept in memory: the training set's shared by the ranks, of
        the evaluation set those that this rank scores."""
        c, training = self.config, packed is self.train_set
        stretches = np.array_split(np.arange(packed.num_clips), self.ranks.size)
        try:
            source = CachedSource(
                packed,
                c.feature,
                self.device,
                place=c.cache,
                dtype=c.cache_dtype,
                remove_mean=c.remove_mean,
                max_bad=c.max_bad if training else 0.0,
                rows=None if training else stretches[self.ranks.rank],
                ranks=self.ranks,
                preparing=preparing,
            )
        except TooLittleMemory as error:
            if training:
                raise
            self.notes.append(f"the evaluation set is read from disk: {error}")
            return PackedSource(packed, self.device), None
        self.notes.append(source.summary())
        if training and c.mixup:
            self.notes.append(
                "mixup adds the mel powers of cached clips, an approximation of mixing waveforms"
            )
        return source, source.usable if training else None

    def _start_weights(self) -> list[str]:
        """Loads the weights that the run starts from, if any; returns notes on them."""
        if self.config.init is None and not self.config.pretrained:
            return []
        from fastat.weights.initial import load_imagenet, load_initial  # only needed here

        if self.config.init is not None:
            return load_initial(self.raw_model, self.meta, Path(self.config.init))
        return load_imagenet(self.raw_model, self.meta)

    # ------------------------------------------------------------------ epochs
    def run_epochs(self) -> TaggingMetrics | None:
        """Trains from where the run stands to its end."""
        steps = self.sampler.steps_per_epoch
        metrics = None
        with ExitStack() as stack:
            self.stop = stack.enter_context(StopSignals())
            if self.ranks.first:
                events = SummaryWriter(str(self.run / "tb"), purge_step=self.progress.step)
                self.tensorboard = stack.enter_context(events)
            if self.progress.step >= self.last_step:
                self.display.note(
                    f"{self.run} has its {self.last_step:,} steps: nothing left to train"
                )
            while self.progress.step < self.last_step:
                epoch = self.progress.step // steps
                try:
                    self._train_epoch(epoch)
                finally:
                    self._list_bad_clips()
                evaluation = self._evaluate()
                metrics = evaluation.metrics if evaluation else None
                self._finish_epoch(epoch, evaluation)
                signum = self.vote.now(self.stop.signum or 0)
                if signum and self.progress.step < self.last_step:
                    raise Interrupted(signum)
        self.display.note(f"saved in {self.run}; tag a sound with: fastat predict {self.run} FILE")
        self.source.close()
        if self.eval_source is not None:
            self.eval_source.close()
        return metrics

    def _train_epoch(self, epoch: int) -> None:
        """The rest of an epoch, from the run's current step."""
        c, p = self.config, self.progress
        steps = self.sampler.steps_per_epoch
        end = min((epoch + 1) * steps, self.last_step)
        train_mode(self.model)
        plans = (self.sampler.plan(epoch, step - epoch * steps) for step in range(p.step, end))
        if not isinstance(self.source, CachedSource):  # it has to know what the others need
            plans = (plan.part(self.ranks.rank, self.ranks.size) for plan in plans)
        for batch, waited in timed(self.source.batches(plans)):
            started = time.perf_counter()
            features = batch.features(self.frontend)
            lr = self._lr(p.step)
            for group in self.optimizer.param_groups:
                group["lr"] = lr * group["lr_scale"]
            loss, norm, found_inf = train_step(
                self.model,
                self.params,
                self.optimizer,
                features,
                batch.target,
                autocast(self.device, c.precision),
                c.accumulate,
                self.ranks,
            )
            p.loss_sum += loss
            self.pending.append((p.step, found_inf))
            p.step += 1
            signum = self.vote(self.stop.signum or 0)
            self._look_for_nonfinite()

            p.wait_seconds += waited
            p.train_seconds += waited + time.perf_counter() - started
            if self.device.type == "cpu" or p.step % 50 == 0:  # reading the loss waits for a GPU
                self._report(epoch, loss, norm, lr)
            if signum and p.step < end:
                self._look_for_nonfinite(wait=True)
                self._save(best=False)
                raise Interrupted(signum)
            if c.checkpoint_every_steps and p.step % c.checkpoint_every_steps == 0 and p.step < end:
                self._look_for_nonfinite(wait=True)
                self._save(best=False)
        self._look_for_nonfinite(wait=True)

    def _lr(self, step: int) -> float:
        """The learning rate of the head; layers below may have less of it."""
        return self.config.lr * lr_factor(
            step,
            schedule=self.config.schedule,
            warmup_steps=self.config.warmup_steps,
            steps_per_epoch=self.sampler.steps_per_epoch,
            epochs=self.config.epochs,
        )

    def _look_for_nonfinite(self, *, wait: bool = False) -> None:
        """Reads the flags of steps surely over: a step back on a GPU, at once on a CPU."""
        keep = 1 if self.device.type == "cuda" and not wait else 0
        while len(self.pending) > keep:
            step, flag = self.pending.popleft()
            if flag.item():
                plan = self.sampler.plan(*divmod(step, self.sampler.steps_per_epoch))
                clips = ", ".join(self.train_set.names(plan.rows))
                partners = ", ".join(self.train_set.names(plan.partners))
                mixed = f"; mixed in: {partners}" if partners else ""
                raise Failure(
                    f"the loss or a gradient is not finite at step {step + 1}; "
                    f"that step was not taken. Its clips: {clips}{mixed}"
                )

    def _report(self, epoch: int, loss: Tensor, norm: Tensor, lr: float) -> None:
        if not self.ranks.first:
            return
        p, c = self.progress, self.config
        done = p.step - epoch * self.sampler.steps_per_epoch
        rate = done * c.batch / p.train_seconds
        self.tensorboard.add_scalar("train/loss", loss.item(), p.step)
        self.tensorboard.add_scalar("train/grad_norm", norm.item(), p.step)
        self.tensorboard.add_scalar("train/lr", lr, p.step)
        self.display.status(
            Status(
                epoch=epoch + 1,
                epochs=c.epochs,
                step=p.step,
                total_steps=self.last_step,
                loss=p.loss_sum.item() / done,
                lr=lr,
                clips_per_s=rate,
                data_wait=p.wait_seconds / p.train_seconds,
                seconds_left=(self.last_step - p.step) * c.batch / rate,
            )
        )

    def _list_bad_clips(self) -> None:
        """Says how many clips were found damaged since the last time, and lists them."""
        bad = self.source.bad if isinstance(self.source, PackedSource) else {}
        if new := append_bad_clips(self.run, self.train_set, bad):
            self.display.note(
                f"{new:,} damaged clips were replaced by others, {len(bad):,} in all; "
                f"{self.run / BAD_CLIPS_FILE} lists them"
            )

    def _evaluate(self) -> Evaluation | None:
        if self.eval_set is None or self.eval_source is None or self.match is None:
            return None
        return evaluate(
            self.eval_model,
            self.frontend,
            self.eval_set,
            self.eval_source,
            self.match,
            device=self.device,
            precision=self.config.precision,
            batch=self.config.eval_batch,
            rows=self.eval_rows,
            ranks=self.ranks,
        )

    def _finish_epoch(self, epoch: int, evaluation: Evaluation | None) -> None:
        """Records the epoch, saves it, and starts the next one's sums."""
        p, c = self.progress, self.config
        steps = self.sampler.steps_per_epoch
        done = p.step - epoch * steps
        line: dict[str, Any] = {
            "epoch": epoch + 1,
            "step": p.step,
            "lr": self._lr(p.step - 1),
            "train_loss": p.loss_sum.item() / done,
            "clips_per_s": done * c.batch / p.train_seconds,
            "data_wait_fraction": p.wait_seconds / p.train_seconds,
            "epoch_s": p.train_seconds,
            "peak_memory_gib": peak_memory_gib(self.device),
        }
        best = False
        text = f"epoch {epoch + 1}/{c.epochs}  train loss {line['train_loss']:.4f}"
        if evaluation is not None:
            m = evaluation.metrics
            line |= {
                "eval_loss": evaluation.loss,
                "mAP": m.mAP,
                "AUC": m.AUC,
                "d_prime": m.d_prime,
                "classes_scored": m.classes_scored,
            }
            best = m.mAP > p.best_map
            p.best_map = max(p.best_map, m.mAP)
            text += f"  eval loss {evaluation.loss:.4f}  mAP {m.mAP:.4f}  AUC {m.AUC:.4f}"
            text += f"  d' {m.d_prime:.3f}"
            if m.classes_scored < len(self.meta.classes):
                text += f"  ({m.classes_scored} of {len(self.meta.classes)} classes scored)"
        text += f"  {line['clips_per_s']:.1f} clips/s  data wait {line['data_wait_fraction']:.1%}"
        if done == steps:  # an epoch that --steps cut short goes on from its sums on resume
            p.loss_sum, p.train_seconds, p.wait_seconds = p.loss_sum.new_zeros(()), 0.0, 0.0
        if self.ranks.first:
            self._record_epoch(line, evaluation if best else None)
        self._save(best=best)
        self.display.note(text + ("  *" if best else ""))

    def _record_epoch(self, line: dict[str, Any], best: Evaluation | None) -> None:
        for name, value in line.items():
            if name not in ("epoch", "step"):
                self.tensorboard.add_scalar(f"epoch/{name}", value, line["epoch"])
        append_metrics(self.run, line)
        if best is not None:
            assert self.eval_set is not None and self.match is not None
            classes = [self.meta.classes[k] for k in self.match.model_columns]
            save_predictions(self.run / "predictions.h5", best, self.eval_set, classes)

    # -------------------------------------------------------------- checkpoints
    def _save(self, *, best: bool) -> None:
        """Saves a checkpoint; every rank takes part, rank 0 writes."""
        p = self.progress
        random_states = self.ranks.gather(random_state(self.device))
        if not self.ranks.first:
            return
        trained = {
            "procedure": self.config.proc,
            "step": p.step,
            "epoch": p.step / self.sampler.steps_per_epoch,
            "best_mAP": p.best_map,
        }
        meta = replace(self.meta, trained=finite(trained))
        state = trainer_state(
            self.optimizer, p, self.train_set.fingerprint, self.device, random_states
        )
        save_checkpoint(self.run / "checkpoints", p.step, self.raw_model, meta, state, best=best)

    def _restore(self) -> None:
        state = self.ranks.from_first(self._read_checkpoint)
        if state["data"] != self.train_set.fingerprint:
            raise UserError(f"{self.config.data} is not the set that {self.run} was trained on")
        self.progress, notes = restore_trainer_state(state, self.optimizer, self.device, self.ranks)
        self.notes += [f"resuming {self.run} at step {self.progress.step:,}", *notes]

    def _read_checkpoint(self) -> dict[str, Any]:
        """For rank 0: loads the weights, which DDP sends on; returns the trainer's state."""
        checkpoint = find_checkpoint(self.run, prefer="last")
        load_weights(self.raw_model, checkpoint)
        return load_trainer_state(checkpoint)


def timed(batches: Iterator[Batch]) -> Iterator[tuple[Batch, float]]:
    """Each batch with the seconds that waiting for it took."""
    while True:
        started = time.perf_counter()
        try:
            batch = next(batches)
        except StopIteration:
            return
        yield batch, time.perf_counter() - started
