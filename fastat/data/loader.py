"""Plans into batches: rows of a packed set, read a step ahead of the model.

One background thread reads (the reads release the GIL); on CUDA a batch lands in pinned memory and
is copied without waiting. Order and content depend on the plans alone.
"""

import queue
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastat.data.sampler import StepPlan
from fastat.data.shards import PackedSet
from fastat.frontend import Augment, Frontend

PREFETCH = 2


@dataclass(frozen=True)
class Batch:
    """One step's input. B clips; M mixup partners behind them in ``waveform``."""

    rows: NDArray[np.int64]  # [B] rows of the set, to name a clip by
    target: Tensor  # [B, K] float32, mixed as the audio is
    num_samples: Tensor  # [B + M] (with log_mel: [B]) real samples of each row
    augment: Augment | None
    waveform: Tensor | None = None  # [B + M, S] int16, or float32 in [-1, 1]
    log_mel: Tensor | None = None  # [B, T, F] float32: mixed, not yet masked or normalised

    def features(self, frontend: Frontend) -> Tensor:
        """[B, T, F] float32, what the model reads."""
        if self.log_mel is not None:
            return frontend.finish(self.log_mel, self.num_samples, self.augment)
        assert self.waveform is not None
        features: Tensor = frontend(self.waveform, self.num_samples, self.augment)
        return features


class Source(Protocol):
    """Where batches come from: the packed rows, or DALI."""

    def batches(self, plans: Iterable[StepPlan]) -> Iterator[Batch]: ...

    def close(self) -> None: ...


def evaluation_plans(rows: NDArray[np.int64], batch: int) -> Iterator[StepPlan]:
    """Every row once, in order, nothing mixed or masked; the last plan may be smaller."""
    none = np.zeros(0, np.int64)
    for start in range(0, len(rows), batch):
        part = rows[start : start + batch]
        no_mask = np.zeros((len(part), 2), np.int64)
        yield StepPlan(part, none, none, np.zeros(0, np.float32), no_mask, no_mask)


def mixed_targets(packed: PackedSet, plan: StepPlan) -> Tensor:
    """[B, K] float32: each clip's labels, mixed with its partner's by the weight of the audio."""
    target = packed.targets(plan.rows)
    lam = plan.lam[:, None]
    target[plan.mix_into] *= lam
    target[plan.mix_into] += (1 - lam) * packed.targets(plan.partners)
    return torch.from_numpy(target)


def augment_of(plan: StepPlan) -> Augment:
    """The plan's decisions as tensors."""
    return Augment(
        *(torch.from_numpy(a) for a in (plan.mix_into, plan.lam, plan.time_mask, plan.freq_mask))
    )


class PackedSource:
    """Batches of int16 rows of a packed set, on ``device``."""

    def __init__(self, packed: PackedSet, device: torch.device) -> None:
        self.packed = packed
        self.device = device

    def _read(self, plan: StepPlan) -> Batch:
        rows = np.concatenate([plan.rows, plan.partners])
        pin = self.device.type == "cuda"
        waveform = torch.empty(
            (len(rows), self.packed.clip_samples), dtype=torch.int16, pin_memory=pin
        )
        self.packed.read_rows(rows, waveform.numpy())
        return Batch(
            rows=plan.rows,
            target=mixed_targets(self.packed, plan),
            num_samples=torch.from_numpy(self.packed.num_samples[rows].astype(np.int64)),
            augment=augment_of(plan),
            waveform=waveform,
        )

    def batches(self, plans: Iterable[StepPlan]) -> Iterator[Batch]:
        """One batch a plan, in order.

        Raises:
            Failure: a row is damaged; says which shard, row and clip.
        """
        for batch in prefetch(map(self._read, plans), PREFETCH):
            yield to_device(batch, self.device)

    def close(self) -> None:
        """Closes the set's files."""
        self.packed.close()


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch's tensors on ``device``, copied without waiting where memory is pinned."""
    if device.type == "cpu":
        return batch

    def move(x: Tensor) -> Tensor:
        return x.to(device, non_blocking=True)

    return Batch(
        rows=batch.rows,
        target=move(batch.target),
        num_samples=move(batch.num_samples),
        augment=None if batch.augment is None else Augment(*map(move, batch.augment)),
        waveform=None if batch.waveform is None else move(batch.waveform),
        log_mel=None if batch.log_mel is None else move(batch.log_mel),
    )


def prefetch(batches: Iterator[Batch], depth: int) -> Iterator[Batch]:
    """``batches``, made up to ``depth`` ahead by a thread that ends with the consumer.

    An exception of the producer is raised where its batch would have come.
    """
    ready: queue.Queue[Batch | BaseException | None] = queue.Queue(maxsize=depth)
    stopped = threading.Event()

    def put(item: Batch | BaseException | None) -> None:
        while not stopped.is_set():
            try:
                ready.put(item, timeout=0.1)
                return
            except queue.Full:
                continue

    def produce() -> None:
        try:
            for batch in batches:
                put(batch)
                if stopped.is_set():
                    return
            put(None)
        except BaseException as error:  # handed over, raised in the consumer
            put(error)

    thread = threading.Thread(target=produce, name="fastat-loader", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stopped.set()
        thread.join()
