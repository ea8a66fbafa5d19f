"""The ranks of a run: processes of torch DDP under torchrun, or one process alone.

Every rank takes its part of each step's clips. Rank 0 alone reads and writes the run folder and
speaks to the user; what it reads, it sends to the others.
"""

import hashlib
import os
import re
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from fastat.system.errors import Failure, RankZeroFailed, UserError, first_line

T = TypeVar("T")

PATIENCE = timedelta(hours=24)
"""How long ranks wait for work that is no step: making the practice set, filling a cache."""


@dataclass(frozen=True)
class Ranks:
    """Which of a run's processes this is, and how it talks to the others."""

    rank: int = 0
    size: int = 1
    control: dist.ProcessGroup | None = None
    """Of gloo, for what is in the host's memory; None: there are no others."""
    device_group: dist.ProcessGroup | None = None
    """Of NCCL on GPUs, for gradients and losses."""

    @property
    def first(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def with_timeout(self, seconds: float) -> "Ranks":
        """The same ranks, which give up waiting for each other in a step after ``seconds``."""
        if self.control is None:
            return self
        timeout = timedelta(seconds=seconds)
        control = cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=timeout))
        device_group = control
        if torch.cuda.is_available():
            nccl = dist.new_group(backend="nccl", timeout=timeout)
            device_group = cast(dist.ProcessGroup, nccl)
        return Ranks(self.rank, self.size, control, device_group)

    def from_first(self, make: Callable[[], T]) -> T:
        """Calls ``make`` on rank 0 alone and returns its value on every rank.

        The other ranks wait for it as long as it takes.

        Raises:
            RankZeroFailed: ``make`` raised on rank 0, which reports it.
        """
        if self.control is None:
            return make()
        if not self.first:
            return cast(T, self._receive())
        with self._failure_broadcast():
            value = make()
        self._send(value, None)
        return value

    def gather(self, value: T, *, patient: bool = False) -> list[T]:
        """Every rank's value, in order of rank, on every rank.

        Args:
            patient: wait for ranks that may be working for much longer than a step takes.
        """
        if self.control is None:
            return [value]
        if patient:
            self._wait_for_all()
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.control)
        return values

    @contextmanager
    def first_goes_ahead(self) -> Iterator[None]:
        """Runs the block on rank 0 first, so that the others find the files that it made.

        The block must not exchange anything between ranks.

        Raises:
            RankZeroFailed: the block raised on rank 0, which reports it.
        """
        if self.control is None:
            yield
        elif self.first:
            with self._failure_broadcast():
                yield
            self._send(None, None)
        else:
            self._receive()
            yield

    def _wait_for_all(self) -> None:
        """Waits until every rank calls this, for up to PATIENCE: the default group's timeout."""
        dist.barrier()

    def _send(self, value: object, exit_code: int | None) -> None:
        """Sends what rank 0 made, or the exit code with which it failed, to the other ranks."""
        self._wait_for_all()
        dist.broadcast_object_list([value, exit_code], src=0, group=self.control)

    @contextmanager
    def _failure_broadcast(self) -> Iterator[None]:
        """On rank 0: reports an error in the block to the other ranks, which wait for it."""
        try:
            yield
        except BaseException as error:
            code = 2 if isinstance(error, UserError) else getattr(error, "exit_code", 1)
            with suppress(RuntimeError):  # another rank is gone too, which matters less
                self._send(None, 130 if isinstance(error, KeyboardInterrupt) else code)
            raise

    def _receive(self) -> Any:
        """On the other ranks: returns what rank 0 sends, or raises RankZeroFailed."""
        self._wait_for_all()
        box: list[Any] = [None, None]
        dist.broadcast_object_list(box, src=0, group=self.control)
        value, code = box
        if code is not None:
            # torchrun ends all ranks with the first that leaves: rank 0 must have spoken by then.
            with suppress(RuntimeError):  # which says that rank 0 is gone
                dist.barrier(group=self.control)
            raise RankZeroFailed(code)
        return value

    def share_buffers(self, model: nn.Module) -> None:
        """Gives every rank the statistics that rank 0 has, and saves, of its BatchNorms."""
        if self.device_group is not None:
            for buffer in model.buffers():
                dist.broadcast(buffer, src=0, group=self.device_group)

    def mean(self, x: Tensor) -> Tensor:
        """The mean of ``x`` over the ranks, in place, without waiting for the device."""
        if self.device_group is not None:
            dist.all_reduce(x, group=self.device_group)
            x /= self.size
        return x

    def parallel(self, model: nn.Module, gradient_dtype: str, accumulate: int) -> nn.Module:
        """``model``, its weights those of rank 0, its gradients averaged over the ranks.

        Buckets of gradients are exchanged while the backward pass goes on, in bfloat16 if asked.
        """
        if self.device_group is None:
            return model
        ddp = DistributedDataParallel(
            model,
            process_group=self.device_group,
            gradient_as_bucket_view=True,
            static_graph=accumulate == 1,  # torch's cannot begin with a backward pass alone
        )
        if gradient_dtype == "bfloat16":
            ddp.register_comm_hook(self.device_group, bf16_compress_hook)
        return ddp


ALONE = Ranks()
"""A run in one process."""


class Vote:
    """Numbers that every rank proposes at every step, and whose maxima all of them learn.

    The exchange of a step goes on while the step is computed; its outcome is known at the next.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.under_way: tuple[Tensor, dist.Work] | None = None

    def __call__(self, *values: int) -> list[int]:
        """Proposes ``values``; returns the maxima of the step before, alone those of this one."""
        if self.ranks.control is None:
            return list(values)
        outcome = self._outcome(len(values))
        box = torch.tensor(values)
        work = dist.all_reduce(box, dist.ReduceOp.MAX, group=self.ranks.control, async_op=True)
        assert work is not None
        self.under_way = box, work
        return outcome

    def now(self, *values: int) -> list[int]:
        """Proposes ``values`` and waits for the others; the maxima."""
        if self.ranks.control is None:
            return list(values)
        before = self(*values)
        return list(map(max, before, self._outcome(len(values))))

    def _outcome(self, count: int) -> list[int]:
        if self.under_way is None:
            return [0] * count
        box, work = self.under_way
        self.under_way = None
        work.wait()
        return [int(x) for x in box.tolist()]


@contextmanager
def started() -> Iterator[Ranks]:
    """The ranks that torchrun, or what sets the same variables, started; ends their groups.

    Raises:
        UserError: more processes on this host than GPUs, or variables that mean nothing.
    """
    size = _number("WORLD_SIZE", 1, 2**31)
    _number("RANK", 0, size)
    _number("MASTER_PORT", 0, 2**16)
    if torch.cuda.is_available():
        local = _number("LOCAL_RANK", 0, size) if "LOCAL_RANK" in os.environ else 0
        if local >= torch.cuda.device_count():
            raise UserError(
                f"torchrun started {local + 1} or more processes on a host of "
                f"{torch.cuda.device_count()} GPUs: --nproc-per-node may be no more than that"
            )
        torch.cuda.set_device(local)
    try:
        store, rank, size = next(rendezvous("env://", timeout=PATIENCE))
    except dist.DistError as error:
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise UserError(f"the ranks cannot meet at {place}: {_reason(error)}") from error
    store = _fresh_part(store, rank, size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=PATIENCE)
    group = cast(dist.ProcessGroup, dist.group.WORLD)
    yield Ranks(rank, size, group, group)
    dist.destroy_process_group()  # not after an error: it may wait for a rank that is gone


def _number(name: str, low: int, end: int) -> int:
    """The whole number in an environment variable. Raises UserError outside [low, end)."""
    text = os.environ[name]
    number = int(text) if text.isdecimal() else -1
    if not low <= number < end:
        raise UserError(
            f"the environment variable {name}, which torchrun sets, must be a whole number of at "
            f"least {low} and below {end}, got {text!r}"
        )
    return number


def _fresh_part(store: Store, rank: int, size: int) -> Store:
    """A part of torchrun's store that no rank has used before.

    Ranks that torchrun starts again find the addresses of those before them in the store (torch
    2.15 with a c10d rendezvous), and nothing that all hosts know tells one start from the next. So
    every rank leaves a name of its own, and rank 0 says go once it has heard from all who hold
    the names it knows.
    """
    own = uuid.uuid4().hex
    store.set(f"fastat/name/{rank}", own)
    heard = ""
    while True:
        if rank == 0:
            names = " ".join(store.get(f"fastat/name/{r}").decode() for r in range(size))
            if names != heard:
                store.set("fastat/names", names)
                heard = names
            if store.add(f"fastat/heard/{heard}", 0) == size - 1:
                store.set("fastat/go", heard)
                break
        else:
            names = store.get("fastat/names").decode()
            if names != heard and own in names:
                store.add(f"fastat/heard/{names}", 1)
                heard = names
            if heard and store.check(["fastat/go"]) and store.get("fastat/go").decode() == heard:
                break
        time.sleep(0.02)
    return PrefixStore(hashlib.sha256(heard.encode()).hexdigest(), store)


@contextmanager
def peers_may_fail(ranks: Ranks) -> Iterator[None]:
    """Turns the back ends' errors about other ranks into one line.

    Raises:
        Failure: another rank died, or did not answer in time.
    """
    try:
        yield
    except RuntimeError as error:
        from_backend = isinstance(error, dist.DistError) or "gloo" in str(error)
        if ranks.size == 1 or isinstance(error, Failure) or not from_backend:
            raise
        reason = _reason(error)
        if "imed out" in reason:
            raise Failure(
                f"another rank did not answer in time (rank_timeout): {reason}"
            ) from error
        raise Failure(f"another rank is gone: {reason}") from error


def _reason(error: BaseException) -> str:
    """The first sentence of a back end's error, without the place in gloo's source."""
    return re.sub(r"^\[[^]]*\] *", "", first_line(error)).split(". ")[0]


def seed_rank(seed: int, ranks: Ranks) -> None:
    """Gives each rank but the first, which goes on as a run alone would, draws of its own."""
    if ranks.rank:
        torch.manual_seed(int(np.random.SeedSequence((seed, ranks.rank)).generate_state(1)[0]))
