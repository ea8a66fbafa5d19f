"""Worker processes of ``fastat pack``: started, fed, listened to, and ended."""

import errno
import multiprocessing
import os
from collections import deque
from collections.abc import Iterator
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext
from types import TracebackType
from typing import Self

from fastat.data.pack_messages import (
    Decode,
    Decoded,
    Forget,
    Job,
    Message,
    Refused,
    Reply,
    Write,
    Written,
)
from fastat.errors import Failure
from fastat.packing.block import serve

BATCHES_AHEAD = 2
"""A worker decodes one batch while the next waits in its pipe."""


class Pool:
    """Workers that decode batches in any order.

    Used as a context manager; leaving it ends the workers. A worker whose parent is killed sees
    its pipe close and ends by itself.
    """

    def __init__(self, num_workers: int, job: Job) -> None:
        # Forked from a server process that has imported what they need and has no threads: a fork
        # of the parent would copy locks that its threads (progress, sealing) hold.
        context: ForkServerContext = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["fastat.packing.block"])
        self._processes = []
        self._connections: list[Connection] = []
        for _ in range(num_workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(theirs, job), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._connections.append(ours)
        self._decoding: list[deque[Decode]] = [deque() for _ in range(num_workers)]
        """What each worker has to decode, in order."""
        self._worker_of: dict[int, int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            if kind is not None:
                process.terminate()
            process.join()

    def idle_worker(self) -> int | None:
        """A worker that can take a batch; None when all have enough to do."""
        load = [len(batches) for batches in self._decoding]
        worker = min(range(len(load)), key=load.__getitem__)
        return worker if load[worker] < BATCHES_AHEAD else None

    def decode(self, worker: int, message: Decode) -> None:
        """Gives a batch to a worker."""
        self._decoding[worker].append(message)
        self._worker_of[message.batch] = worker
        self._send(worker, message)

    def write(self, message: Write) -> None:
        """Has clips written by the worker that holds them."""
        self._send(self._worker_of[message.batch], message)

    def forget(self, batch: int) -> None:
        """Frees a batch."""
        self._send(self._worker_of.pop(batch), Forget(batch))

    def replies(self) -> Iterator[Decoded | Written]:
        """Waits for what the workers report; at least one reply.

        Raises:
            Failure: a worker could not write, had no memory, or died.
        """
        ready = wait(self._connections)
        for connection in ready:
            worker = self._connections.index(connection)  # type: ignore[arg-type]
            try:
                reply: Reply = self._connections[worker].recv()
            except (EOFError, ConnectionResetError):
                raise self._died(worker) from None
            if isinstance(reply, Refused) and reply.errno == errno.ENOMEM:
                raise Failure(
                    f"not enough memory for {reply.path}; the same command goes on, perhaps with "
                    "fewer --workers"
                )
            if isinstance(reply, Refused):
                raise Failure(f"cannot write {reply.path}: {os.strerror(reply.errno)}")
            if isinstance(reply, Decoded):
                self._decoding[worker].popleft()
            yield reply

    def _send(self, worker: int, message: Message) -> None:
        try:
            self._connections[worker].send(message)
        except (BrokenPipeError, ConnectionResetError):
            raise self._died(worker) from None

    def _died(self, worker: int) -> Failure:
        process = self._processes[worker]
        process.join()
        message = (
            f"a worker process ended with exit code {process.exitcode} (negative: a signal; -9 is "
            "often too little memory); the same command goes on, perhaps with fewer --workers"
        )
        if self._decoding[worker]:
            paths = ", ".join(self._decoding[worker][0].paths)
            message += f"; if it ends so again, one of these files crashes its decoder: {paths}"
        return Failure(message)
