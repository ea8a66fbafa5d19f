"""What a run trains on and is scored on: sets, classes, the steps, and where batches come from."""

import logging
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from fastat.audio.features import FEATURES
from fastat.config.run import TrainConfig
from fastat.data.cache import CachedSource, TooLittleMemory
from fastat.data.loader import PackedSource, Source
from fastat.data.sampler import Sampler, StepPlan, balanced_weights
from fastat.data.shards import PackedSet
from fastat.evaluation.evaluate import ClassMatch, match_classes
from fastat.system.distributed import Ranks
from fastat.system.errors import UserError
from fastat.system.host import cores_of_rank
from fastat.weights.checkpoint import ModelMeta

log = logging.getLogger(__name__)

Opened = tuple[Source, NDArray[np.bool_] | None]
"""A source, and the clips of its set that it can deliver; None: all."""


@dataclass
class TrainingData:
    """Opened for one rank of a run."""

    train_set: PackedSet
    sampler: Sampler
    source: Source
    meta: ModelMeta
    eval_set: PackedSet | None
    eval_source: Source | None
    eval_rows: NDArray[np.int64] | None
    """Of the evaluation set, those that can be read; None: all."""
    match: ClassMatch | None

    def own_part(self, plan: StepPlan, ranks: Ranks) -> StepPlan:
        """What the source takes on this rank: its part, or the whole plan to take it from."""
        whole = isinstance(self.source, CachedSource)
        return plan if whole else plan.part(ranks.rank, ranks.size)

    def clips_of(self, plan: StepPlan) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The rows of a whole step's clips and mixup partners, as they were trained on.

        Only the packed source draws others in the place of damaged rows, and reads them to know.
        """
        if isinstance(self.source, PackedSource):
            batch = next(iter(self.source.batches([plan])))
            return batch.rows, batch.partners
        return plan.rows, plan.partners

    def bad_clips(self) -> dict[int, str]:
        """Rows that were found damaged, and why; the original files that DALI reads are not
        rows."""
        if isinstance(self.source, PackedSource | CachedSource):
            return dict(self.source.bad)
        return {}

    def share_bad_clips(self, ranks: Ranks) -> dict[int, str]:
        """The rows that any rank found damaged; every rank then counts all of them.

        Raises:
            Failure: they are more than --max-bad.
        """
        found = {row: why for bad in ranks.gather(self.bad_clips()) for row, why in bad.items()}
        if ranks.size > 1 and isinstance(self.source, PackedSource):
            self.source.bad |= found
            ranks.from_first(self.source.check_bad)
        return found

    def close(self) -> None:
        """Closes the files."""
        self.source.close()
        if self.eval_source is not None:
            self.eval_source.close()


def open_data(config: TrainConfig, device: torch.device, ranks: Ranks) -> TrainingData:
    """Opens the sets of a run.

    Raises:
        UserError: the sets do not fit together, are not the same on every rank, or hold no audio
            where the rows are trained on.
        Failure: one is damaged.
    """
    with ranks.first_goes_ahead():  # and says what is wrong
        train_set = PackedSet.open(config.data)
        eval_set = None if config.eval is None else PackedSet.open(config.eval)
        if config.source == "packed":
            train_set.require_audio()
            if eval_set is not None:
                eval_set.require_audio()
        if eval_set is not None and eval_set.clip_samples != train_set.clip_samples:
            raise UserError(
                f"clips of {config.data} have {train_set.clip_samples} samples, "
                f"those of {config.eval} {eval_set.clip_samples}: pack both alike"
            )
        match = None if eval_set is None else match_classes(train_set.classes, eval_set)
    if match is not None and match.note:
        log.info(match.note)
    meta = model_meta(config, train_set)
    if len(set(ranks.gather(train_set.fingerprint))) > 1:
        raise UserError(f"{config.data} is not the same set on every host")
    source: Source | None = None
    usable = None
    if config.cache != "none":
        source, usable = _cached(config, train_set, device, ranks)
    elif config.source == "dali":
        with ranks.first_goes_ahead():  # the other ranks then read its results of the check
            source, usable = _dali(config, train_set, config.batch // ranks.size, device)
    with ranks.first_goes_ahead():
        weights = balanced_weights(train_set.target_bits, train_set.label_counts)
        sampler = Sampler(
            train_set.num_clips,
            config.batch,
            seed=config.seed,
            num_frames=meta.num_frames,
            num_mels=meta.num_mels,
            weights=weights if config.balance else None,
            usable=usable,
            mixup=config.mixup,
            mixup_alpha=config.mixup_alpha,
            time_mask=config.time_mask,
            freq_mask=config.freq_mask,
        )
    eval_source, eval_rows = None, None
    if eval_set is not None:
        eval_source, eval_usable = _open_evaluation(config, eval_set, device, ranks)
        eval_rows = None if eval_usable is None else np.flatnonzero(eval_usable)
    if source is None:
        source = PackedSource(train_set, device, sampler=sampler, max_bad=config.max_bad)
    return TrainingData(
        train_set,
        sampler,
        source,
        meta,
        eval_set,
        eval_source,
        eval_rows,
        match,
    )


def model_meta(config: TrainConfig, train_set: PackedSet) -> ModelMeta:
    """What a model that ``config`` trains on ``train_set`` is made from."""
    feature = FEATURES[config.feature]
    stats = train_set.stats[feature.name] if config.statistics == "set" else feature
    return ModelMeta(
        model=config.model,
        feature=feature.name,
        clip_seconds=train_set.clip_samples / feature.sample_rate,
        num_mels=feature.num_mels,
        num_frames=feature.num_frames(train_set.clip_samples),
        mean=stats.mean,
        std=stats.std,
        classes=train_set.classes,
        options=config.model_options,
        remove_mean=config.remove_mean,
        normalize=config.normalize,
    )


def _open_evaluation(
    config: TrainConfig,
    packed: PackedSet,
    device: torch.device,
    ranks: Ranks,
) -> Opened:
    if config.source == "dali":
        with ranks.first_goes_ahead():
            return _dali(config, packed, config.eval_batch, device)
    if config.cache != "none":
        stretches = np.array_split(np.arange(packed.num_clips), ranks.size)  # as in evaluate
        try:
            own = stretches[ranks.rank]
            return _cached(config, packed, device, ranks, own)[0], None
        except TooLittleMemory as error:
            log.info(f"the evaluation set is read from disk: {error}")
    return PackedSource(packed, device), None


def _dali(config: TrainConfig, packed: PackedSet, batch: int, device: torch.device) -> Opened:
    from fastat.data.dali import DaliSource  # DALI is heavy, and only needed here

    source = DaliSource(
        packed,
        config.feature,
        batch=batch,
        threads=cores_of_rank(),
        device=device,
        max_bad=config.max_bad,
        remove_mean=config.remove_mean,
    )
    if source.bad:
        row, path, reason = source.bad[0]
        log.info(f"DALI cannot take {len(source.bad)} clips; the first: {path}: {reason}")
    return source, source.usable


def _cached(
    config: TrainConfig,
    packed: PackedSet,
    device: torch.device,
    ranks: Ranks,
    rows: NDArray[np.int64] | None = None,
) -> Opened:
    """Log-mels kept in memory: of all clips, shared by the ranks, or of this rank's ``rows``."""
    training = rows is None
    source = CachedSource(
        packed,
        config.feature,
        device,
        place=config.cache,
        dtype=config.cache_dtype,
        remove_mean=config.remove_mean,
        max_bad=config.max_bad if training else 0.0,
        rows=rows,
        ranks=ranks,
    )
    log.info(source.summary())
    if training and config.mixup:
        log.info("mixup adds the mel powers of cached clips, an approximation of mixing waveforms")
    return source, source.usable
