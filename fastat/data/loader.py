"""Turns plans into batches: reads rows of a packed set a step ahead of the model.

While the model works on one batch, a background thread reads the next one (with the threads of
``row_reader``) and asks the kernel for the rows of the one after. On CUDA a batch is read into
pinned memory and copied on a stream of its own. The order and the content of batches depend only on
the plans and on which rows of the set can be read.
"""

import functools
import queue
import threading
import time
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastat.audio.frontend import Augment, Frontend
from fastat.data.sampler import Sampler, StepPlan
from fastat.data.shards import PackedSet
from fastat.system.errors import Failure

PREFETCH = 1
"""Number of batches that are ready before the model asks for them."""
ADVISED_ROWS = 512
"""Least number of rows that the kernel is asked to read ahead. Measured: 512 gave more rows a
second than 128, one step's, and 1024 gave no more than 512."""
MAX_ATTEMPTS = 100
"""Number of draws for the place of one bad row. With half of all rows bad, 100 draws fail once in
10^30 times."""


@dataclass(frozen=True)
class Batch:
    """Input of one step: B clips, followed in ``waveform`` by M mixup partners.

    A batch is valid until the next one is asked for, which may reuse its memory.
    """

    rows: NDArray[np.int64]  # [B] rows of the set, by which clips are named
    target: Tensor  # [B, K] float32, mixed as the audio is
    num_samples: Tensor  # [B + M] (with log_mel: [B]) real samples of each row
    augment: Augment | None
    partners: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))  # [M] rows
    waveform: Tensor | None = None  # [B + M, S] int16, or float32 in [-1, 1]
    log_mel: Tensor | None = None  # [B, T, F] float32: mixed, not yet masked or normalised

    def features(self, frontend: Frontend) -> Tensor:
        """The model's input, [B, T, F] float32."""
        if self.log_mel is not None:
            return frontend.finish(self.log_mel, self.num_samples, self.augment)
        assert self.waveform is not None
        features: Tensor = frontend(self.waveform, self.num_samples, self.augment)
        return features


class Source(Protocol):
    """Where batches come from: packed rows, DALI or the cache."""

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
    """The plan's augmentation as tensors."""
    return Augment(
        *(torch.from_numpy(a) for a in (plan.mix_into, plan.lam, plan.time_mask, plan.freq_mask))
    )


class PackedSource:
    """Batches of int16 rows of a packed set, on ``device``.

    With a ``sampler``, a row that cannot be read (or is cut short, or fails its CRC) is replaced by
    a fresh draw: for a clip by the sampler's weights, for a mixup partner uniformly. The draw is a
    function of (seed, epoch, step, place in the step's batch, attempt): any number of ranks sees
    the same. Without one, as in evaluation, such a row is a Failure.

    Args:
        sampler: the sampler that made the plans.
        max_bad: share of the set's clips that may be bad.
    """

    bad: dict[int, str]
    """Reasons why rows could not be read so far, by row."""

    def __init__(
        self,
        packed: PackedSet,
        device: torch.device,
        *,
        sampler: Sampler | None = None,
        max_bad: float = 0.0,
    ) -> None:
        self.packed = packed
        self.device = device
        self.sampler = sampler
        self.max_bad = max_bad
        self.bad = {}
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None

    def batches(self, plans: Iterable[StepPlan]) -> Generator[Batch]:
        """One batch a plan, in order; a batch is valid until the next one is asked for.

        Raises:
            Failure: a row is damaged and may not be replaced; says which shard, row and clip.
        """
        memory = _Memory(self.packed.clip_samples, pinned=self.device.type == "cuda")
        read = (self._read(plan, memory) for plan in self._announced(plans))
        for batch in prefetch(read, PREFETCH):
            yield to_device(batch, self.device, self._copies)

    def close(self) -> None:
        """Closes the set's files."""
        self.packed.close()

    def _announced(self, plans: Iterable[StepPlan]) -> Iterator[StepPlan]:
        """Yields ``plans``, after asking the kernel for the rows that later ones need.

        It is asked for the rows of several plans at a time, ADVISED_ROWS or more of them, in file
        order: a part of them with each plan of the stretch before.
        """
        plans = iter(plans)
        current = list(islice(plans, 1))
        self.packed.reader.advise(_rows(current))
        while current:
            num_plans = -(-ADVISED_ROWS // len(current[0].rows))
            following = list(islice(plans, num_plans))
            parts = np.array_split(np.unique(_rows(following)), len(current))
            for plan, part in zip(current, parts, strict=True):
                self.packed.reader.advise(part)
                yield plan
            current = following

    def _read(self, plan: StepPlan, memory: "_Memory") -> Batch:
        rows = _rows([plan])
        waveform = memory.take(len(rows))
        bad = self.packed.read(rows, waveform.numpy())
        for place, reason in sorted(bad.items()):
            self._replace(plan, rows, waveform.numpy(), place, reason)
        if bad:
            num_clips = len(plan.rows)
            plan = replace(plan, rows=rows[:num_clips], partners=rows[num_clips:])
        return Batch(
            rows=plan.rows,
            target=mixed_targets(self.packed, plan),
            num_samples=torch.from_numpy(self.packed.num_samples[rows].astype(np.int64)),
            augment=augment_of(plan),
            partners=plan.partners,
            waveform=waveform,
        )

    def _replace(
        self,
        plan: StepPlan,
        rows: NDArray[np.int64],  # [B + M] clips, then partners
        waveform: NDArray[np.int16],  # [B + M, S]
        place: int,
        reason: str,
    ) -> None:
        """Draws and reads another row into ``place``, whose row is bad."""
        partner = place - len(plan.rows)  # negative: a clip itself
        clip = plan.first + (int(plan.mix_into[partner]) if partner >= 0 else place)
        here = slice(place, place + 1)
        for attempt in range(1, MAX_ATTEMPTS + 1):
            self._note(int(rows[place]), reason)
            assert self.sampler is not None, "the limit is 0 without one"
            rows[place] = self.sampler.replacement(
                plan.epoch, plan.step, clip, attempt, partner=partner >= 0
            )
            bad = self.packed.read(rows[here], waveform[here])
            if not bad:
                return
            reason = bad[0]
        raise Failure(
            f"{self.packed.directory}: {MAX_ATTEMPTS} draws, and none could be read; the last: "
            f"{self.packed.describe(int(rows[place]), reason)}"
        )

    def _note(self, row: int, reason: str) -> None:
        """Records a bad row. Raises Failure if there are too many."""
        self.bad[row] = reason
        if self.sampler is None:
            raise Failure(f"{self.packed.describe(row, reason)}; pack the set again")
        self.check_bad()

    def check_bad(self) -> None:
        """Raises Failure if more than ``max_bad`` of the clips are bad."""
        if len(self.bad) > self.max_bad * self.packed.num_clips:
            raise too_many_bad(self.packed, self.bad, self.max_bad)


def too_many_bad(packed: PackedSet, bad: dict[int, str], max_bad: float) -> Failure:
    """The error for the rows ``bad`` (with reasons) being more than ``max_bad`` of the clips."""
    last = packed.describe(*list(bad.items())[-1])
    return Failure(
        f"{len(bad):,} of {packed.num_clips:,} clips are damaged, more than "
        f"--max-bad {max_bad:g}; the last: {last}; pack the set again"
    )


def _rows(plans: list[StepPlan]) -> NDArray[np.int64]:
    """The rows of each plan: those of its clips, then those of their partners."""
    parts = [rows for plan in plans for rows in (plan.rows, plan.partners)]
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)


class _Memory:
    """Memory for batches, reused.

    Touching new memory takes longer than reading rows into it: one page fault for every 4 KiB.
    torch reuses pinned memory by itself, once the copy out of it is over. For the CPU there are as
    many buffers as batches can be alive at once, used in turn: one with the consumer, one being
    read, and the prefetched ones.
    """

    def __init__(self, clip_samples: int, *, pinned: bool) -> None:
        self.clip_samples = clip_samples
        self.pinned = pinned
        self._buffers = [torch.empty((0, clip_samples), dtype=torch.int16)] * (PREFETCH + 2)
        self._turn = 0

    def take(self, num_rows: int) -> Tensor:
        """A tensor for rows, [num_rows, S] int16, with undefined content."""
        if self.pinned:
            return torch.empty((num_rows, self.clip_samples), dtype=torch.int16, pin_memory=True)
        self._turn = (self._turn + 1) % len(self._buffers)
        if len(self._buffers[self._turn]) < num_rows:
            # Some rows more, as the number of partners varies. numpy's memory has large pages.
            buffer = np.empty((num_rows + num_rows // 8, self.clip_samples), np.int16)
            self._buffers[self._turn] = torch.from_numpy(buffer)
        return self._buffers[self._turn][:num_rows]


def to_device(
    batch: Batch, device: torch.device, stream: "torch.cuda.Stream | None" = None
) -> Batch:
    """Copies the batch's tensors to ``device`` without blocking the host.

    The copies run on ``stream`` (by default the current one), and the current stream then waits
    for them.
    """
    if device.type == "cpu":
        return batch
    current = torch.cuda.current_stream(device)
    stream = stream or current

    def move(x: Tensor) -> Tensor:
        if x.device.type == "cuda":
            return x
        with torch.cuda.stream(stream):
            # A copy out of memory that is not pinned would block the host.
            moved = (x if x.is_pinned() else x.pin_memory()).to(device, non_blocking=True)
        moved.record_stream(current)
        return moved

    moved = replace(
        batch,
        target=move(batch.target),
        num_samples=move(batch.num_samples),
        augment=None if batch.augment is None else Augment(*map(move, batch.augment)),
        waveform=None if batch.waveform is None else move(batch.waveform),
        log_mel=None if batch.log_mel is None else move(batch.log_mel),
    )
    current.wait_stream(stream)
    return moved


def prefetch(batches: Iterator[Batch], depth: int) -> Iterator[Batch]:
    """Yields ``batches``, which a thread produces up to ``depth`` ahead of the consumer.

    If the producer raises an exception, the consumer gets it in place of the batch. The thread ends
    when the consumer stops.
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
        except BaseException as error:  # raised again in the consumer
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


def with_features(
    batches: Iterator[Batch], frontend: Frontend, device: torch.device
) -> Iterator[tuple[Batch, Tensor, float]]:
    """Yields each batch with its features [B, T, F] and the seconds spent waiting for the batch.

    On CUDA the copies and the front end run on a stream of their own, so they overlap with the step
    before. The caller's stream waits for the features.
    """
    stream = _frontend_stream(device) if device.type == "cuda" else None
    if stream is not None:
        stream.wait_stream(torch.cuda.current_stream(device))  # it made the front end's tables
    while True:
        started = time.perf_counter()
        with torch.cuda.stream(stream):  # does nothing if it is None
            try:
                batch = next(batches)
            except StopIteration:
                return
            waited = time.perf_counter() - started
            features = batch.features(frontend)
        if stream is not None:
            current = torch.cuda.current_stream(device)
            current.wait_stream(stream)
            for x in (features, batch.target):
                x.record_stream(current)
        yield batch, features, waited


@functools.cache
def _frontend_stream(device: torch.device) -> torch.cuda.Stream:
    """One stream for all epochs, because the allocator reuses memory only within a stream."""
    return torch.cuda.Stream(device)
