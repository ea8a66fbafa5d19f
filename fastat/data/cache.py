"""The cached source: log-mels of a whole set, computed once and kept in memory.

It gives the same batches as the packed source for the same plans, but reads and transforms nothing
while training: the log-mels, after mean removal and before masks and normalisation, are kept in the
memory of the device or of the host, in 16 or 8 bits (``codes``). Only mixup differs: it adds mel
powers, an approximation of mixing waveforms.

With several ranks, each computes and keeps the rows whose number modulo the number of ranks is its
own. Every rank has the whole plan of a step, so it knows which rows each of the others needs: one
all-to-all of known sizes exchanges them, in 16 or 8 bits.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from fastat.audio.features import get_feature
from fastat.audio.frontend import Frontend
from fastat.data.codes import DTYPES, decode, encode, log_floor, mix, row_bytes
from fastat.data.loader import (
    PREFETCH,
    Batch,
    augment_of,
    evaluation_plans,
    mixed_targets,
    prefetch,
    to_device,
    too_many_bad,
)
from fastat.data.sampler import StepPlan
from fastat.data.shards import PackedSet
from fastat.system.distributed import ALONE, Ranks
from fastat.system.errors import Failure, UserError
from fastat.system.host import free_memory, ranks_here
from fastat.system.progress import Advance, progress

FILL_CLIPS = 64
"""Number of clips whose log-mels are computed at a time."""
SPARE_BYTES = 1 << 30
"""Memory that is left free beside the cache: computing the log-mels takes as much, and training
needs some."""


class TooLittleMemory(UserError):
    """The cache does not fit. The message says what it needs, what is free, and what would fit."""


class _Gathered(NamedTuple):
    """What a rank contributes to one step from its own memory."""

    batch: Batch  # of this rank's clips, without their log-mels
    rows: NDArray[np.int64]  # [B + M] this rank's clips and partners
    codes: Tensor  # [R, T, F] rows kept by this rank that rank 0 needs, then rank 1, ...
    counts: list[int]  # number of rows that each rank needs


class CachedSource:
    """Batches of log-mels of ``packed``, computed at construction.

    Args:
        feature: the name of the log-mel.
        device: the device of the batches.
        place: "device" or "host", whose memory keeps the log-mels. The host's is not pinned, which
            would take long and round its size up: a batch is gathered into pinned memory.
        dtype: "float16" or "uint8".
        remove_mean: as ``Frontend``'s.
        max_bad: share of the set's clips that may be damaged; with 0 the first is a Failure.
        rows: [R] the only rows of the plans, kept by this rank for itself, as for evaluation. None:
            all rows, shared with the other ranks; ``batches`` then takes the plans of whole steps
            on every rank, and gives this rank's part of them.
        ranks: which of the run's processes this is.

    Raises:
        TooLittleMemory: it does not fit on one of the ranks.
        Failure: more than ``max_bad`` of the clips are damaged; names the last.
    """

    bad: dict[int, str]
    """Reasons why rows are damaged, by row."""
    usable: NDArray[np.bool_]
    """[N] whether a plan may hold the row: it is not damaged, and this or another rank keeps it."""

    def __init__(
        self,
        packed: PackedSet,
        feature: str,
        device: torch.device,
        *,
        place: str,
        dtype: str,
        remove_mean: bool = True,
        max_bad: float = 0.0,
        rows: NDArray[np.int64] | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.packed, self.device, self.max_bad = packed, device, max_bad
        self.feature, self.dtype = get_feature(feature), DTYPES[dtype]
        self.on_host = place == "host"
        # Rows that a rank keeps for itself are not exchanged.
        self.ranks = ranks if rows is None else ALONE
        self.rank, self.num_ranks = self.ranks.rank, self.ranks.size
        N = packed.num_clips
        self.usable = np.full(N, rows is None)
        self.rows = np.arange(self.rank, N, self.num_ranks) if rows is None else rows
        self.usable[self.rows] = True
        self._place = np.full(N, -1, np.int64)  # [N] place of a row in ``codes``
        self._place[self.rows] = np.arange(len(self.rows))
        problems = self.ranks.gather(self._too_little(place, dtype), patient=True)
        self.ranks.from_first(lambda: _refuse(problems))

        self.codes = torch.empty(
            len(self.rows),
            self.feature.num_frames(packed.clip_samples),
            self.feature.num_mels,
            dtype=self.dtype,
            device="cpu" if self.on_host else device,
        )  # [R, T, F]
        self.scales = torch.zeros(N, 2)  # of every rank's rows
        self.bad = {}
        shown = progress(f"caching {packed.directory.name}", len(self.rows))
        with shown if ranks.first else nullcontext(lambda n=1: None) as advance:
            self._fill(remove_mean, advance)
        self._share()
        packed.close()  # nothing is read from here on

    def summary(self) -> str:
        """What is kept and what is left out, in one line."""
        size = self.codes.nbytes + self.scales.nbytes
        of = f"{len(self.codes):,} of {self.packed.num_clips:,}"
        what = f"log-mels of {of} clips as {str(self.dtype).removeprefix('torch.')}"
        where = "host" if self.codes.is_cpu else "GPU"
        text = f"{self.packed.directory}: {what}, {_size(size)} of {where} memory"
        if self.bad:
            first = self.packed.describe(*next(iter(self.bad.items())))
            text += f"; {len(self.bad):,} damaged clips are left out, the first: {first}"
        return text

    def batches(self, plans: Iterable[StepPlan]) -> Iterator[Batch]:
        """One batch a plan, in order, on the device; plans hold usable rows only."""
        floor = log_floor(self.feature)
        gathered = self._ahead(plans) if self.on_host else map(self._gather, plans)
        for step in gathered:
            batch = to_device(step.batch, self.device)
            scales = self.scales[_index(step.rows, self.device)]
            log_mel = decode(self._exchange(step), scales, floor)
            assert batch.augment is not None
            yield replace(batch, log_mel=mix(log_mel, batch.augment, self.feature))

    def close(self) -> None:
        """Closes the set's files."""
        self.packed.close()

    # ------------------------------------------------------------------ a step
    def _gather(self, plan: StepPlan) -> _Gathered:
        parts = [plan.part(rank, self.num_ranks) for rank in range(self.num_ranks)]
        wanted = [np.concatenate([part.rows, part.partners]) for part in parts]
        mine = [rows[rows % self.num_ranks == self.rank] for rows in wanted]
        everyones = np.concatenate(wanted)
        if not self.usable[everyones].all():
            unusable = everyones[~self.usable[everyones]].tolist()
            raise ValueError(f"rows: expected usable ones, got {unusable}")
        places = _index(self._place[np.concatenate(mine)], self.codes.device)
        own = parts[self.rank]
        codes = torch.empty(
            (len(places), *self.codes.shape[1:]),
            dtype=self.dtype,
            device=self.codes.device,
            pin_memory=self.on_host and self.device.type == "cuda",
        )
        torch.index_select(self.codes, 0, places, out=codes)
        batch = Batch(
            rows=own.rows,
            partners=own.partners,
            target=mixed_targets(self.packed, own),
            num_samples=torch.from_numpy(self.packed.num_samples[own.rows].astype(np.int64)),
            augment=augment_of(own),
        )
        return _Gathered(batch, wanted[self.rank], codes, [len(rows) for rows in mine])

    def _ahead(self, plans: Iterable[StepPlan]) -> Iterator[_Gathered]:
        """Yields ``_gather`` of each plan, which a thread computes ahead of the model."""
        coming: deque[Future[_Gathered]] = deque()
        with ThreadPoolExecutor(1, "fastat-cache") as thread:
            for plan in plans:
                coming.append(thread.submit(self._gather, plan))
                if len(coming) > PREFETCH:
                    yield coming.popleft().result()
            while coming:
                yield coming.popleft().result()

    def _exchange(self, step: _Gathered) -> Tensor:
        """[B + M, T, F] codes of this rank's clips and partners, from the ranks that keep them.

        Runs in the caller's thread, since all ranks must start collectives, the model's included,
        in the same order.
        """
        codes = step.codes.to(self.device, non_blocking=True)
        if self.num_ranks == 1:
            return codes
        keeper = step.rows % self.num_ranks
        order = np.argsort(keeper, kind="stable")  # of the rows as they arrive
        arriving = codes.new_empty((len(order), *codes.shape[1:]))
        counts = np.bincount(keeper, minlength=self.num_ranks).tolist()
        dist.all_to_all_single(arriving, codes, counts, step.counts, group=self.ranks.device_group)
        return arriving[_index(np.argsort(order), self.device)]

    # ---------------------------------------------------------------- the start
    def _fill(self, remove_mean: bool, advance: Advance) -> None:
        frontend = Frontend(
            self.feature.name,
            clip_samples=self.packed.clip_samples,
            remove_mean=remove_mean,
            normalize=False,
        ).to(self.device)
        frame = torch.arange(frontend.num_frames, device=self.device)
        floor = log_floor(self.feature)
        plans = evaluation_plans(self.rows, FILL_CLIPS)
        filled = 0
        for batch in prefetch((self._read(plan.rows) for plan in plans), PREFETCH):
            batch = to_device(batch, self.device)
            log_mel = batch.features(frontend)
            real = self.feature.real_frames(batch.num_samples, self.packed.clip_samples)
            # A clip's padding is silence, also when it is mixed with another.
            log_mel.masked_fill_((frame >= real[:, None])[:, :, None], floor)
            codes, scales = encode(log_mel, self.dtype, floor)
            self.codes[filled : filled + len(codes)] = codes
            self.scales[torch.from_numpy(batch.rows)] = scales.cpu()
            filled += len(codes)
            advance(len(codes))

    def _share(self) -> None:
        """Gives every rank the scales and the damaged rows of all ranks."""
        own = self.scales[self.rank :: self.num_ranks]
        for rank, (scales, bad) in enumerate(self.ranks.gather((own, self.bad), patient=True)):
            self.scales[rank :: self.num_ranks] = scales
            self.bad |= bad
        self.ranks.from_first(self._check_bad)
        self.scales = self.scales.to(self.device)
        self.usable[list(self.bad)] = False

    def _read(self, rows: NDArray[np.int64]) -> Batch:
        """Reads the waveforms of ``rows``; damaged ones become silence and go into ``bad``."""
        waveform = torch.empty(
            (len(rows), self.packed.clip_samples),
            dtype=torch.int16,
            pin_memory=self.device.type == "cuda",
        )
        into = waveform.numpy()
        for place, reason in self.packed.read(rows, into).items():
            into[place] = 0
            self.bad[int(rows[place])] = reason
            self._check_bad()
        num_samples = torch.from_numpy(self.packed.num_samples[rows].astype(np.int64))
        nothing = torch.empty(len(rows), 0)
        return Batch(rows, nothing, num_samples, None, waveform=waveform)

    def _check_bad(self) -> None:
        if len(self.bad) <= self.max_bad * self.packed.num_clips:
            return
        if self.max_bad == 0:
            last = list(self.bad.items())[-1]
            raise Failure(f"{self.packed.describe(*last)}; pack the set again")
        raise too_many_bad(self.packed, self.bad, self.max_bad)

    def _too_little(self, place: str, dtype: str) -> str:
        """Why the cache does not fit, and what would; empty if it fits."""
        clips = len(self.rows)
        needed, smaller = (
            clips * row_bytes(self.feature, self.packed.clip_samples, name)
            for name in (dtype, "uint8")
        )
        free = free_bytes(place, self.device)
        if needed <= free:
            return ""
        on_gpu = place == "device" and self.device.type == "cuda"
        ways = []
        if smaller <= free:
            ways.append(f"--set cache_dtype=uint8 ({_size(smaller)})")
        if on_gpu and needed <= free_bytes("host", self.device):
            ways.append("--cache host")
        if on_gpu and free > 0:
            ways.append(f"{-(-needed * self.num_ranks // free)} GPUs")
        return (
            f"--cache {place} needs {_size(needed)} of {'GPU' if on_gpu else 'host'} memory for "
            f"{clips:,} clips of {self.packed.directory} in {dtype}, {_size(free)} are free; "
            f"what fits: {', '.join(ways) or 'no cache'}"
        )


def _index(places: NDArray[np.int64], device: torch.device) -> Tensor:
    """Copies ``places`` to ``device`` through pinned memory, which does not block the host."""
    index = torch.from_numpy(places)
    return index if device.type == "cpu" else index.pin_memory().to(device, non_blocking=True)


def _refuse(problems: list[str]) -> None:
    for problem in problems:
        if problem:
            raise TooLittleMemory(problem)


def free_bytes(place: str, device: torch.device) -> int:
    """Bytes that a rank may take for a cache in ``place``: its part of the free memory, without
    SPARE_BYTES. The ranks of one machine share the host's memory."""
    if place == "device" and device.type == "cuda":
        return max(0, torch.cuda.mem_get_info(device)[0] - SPARE_BYTES)
    return max(0, (free_memory() - SPARE_BYTES) // ranks_here())


def _size(count: int) -> str:
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 else f"{count / 2**20:,.1f} MiB"
