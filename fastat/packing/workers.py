"""Who runs the tasks of ``fastat pack``: processes of this machine, or a Dask cluster."""

import asyncio
import ctypes
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple, Protocol, Self

from threadpoolctl import threadpool_limits

from fastat.system.errors import Failure, UserError, first_line

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
CONNECT_SECONDS = 10
END_SECONDS = 2
"""A process that has not ended so long after it was told to is killed."""


class Killed(Exception):
    """The process that ran a call ended without an answer."""

    def __init__(self, exit_code: int) -> None:
        name = f"signal {signal.Signals(-exit_code).name}" if exit_code < 0 else ""
        super().__init__(name or f"exit code {exit_code}")
        self.exit_code = exit_code


class Workers(Protocol):
    """Runs calls at the same time."""

    @property
    def killed(self) -> type[Exception]:
        """What ``result()`` of a call raises whose process ended."""
        ...

    @property
    def count(self) -> int:
        """Calls that it is worth to have under way."""

    def submit(self, function: Callable[..., Any], *args: Any) -> Future[Any]:
        """Starts a call when there is a worker for it."""
        ...


_lock = threading.Lock()
"""Starting and joining a process look at all others, which no two threads may do at once."""


class _Process(NamedTuple):
    """A process that answers one call after the other."""

    process: BaseProcess
    connection: Connection


class Processes:
    """Runs calls in ``count`` processes of this machine, one call in each at a time.

    Each process has one call at a time, so a process that dies identifies its call; a new one
    replaces it. They are forked from a server process that has imported ``modules`` and has no
    threads. Used as a context manager; leaving it ends them.
    """

    killed = Killed

    def __init__(self, count: int, modules: Sequence[str]) -> None:
        self.count = count
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(list(modules))
        _start_server()
        self._threads = ThreadPoolExecutor(count, "fastat-pack")
        self._idle: list[_Process] = []
        self._all: list[_Process] = []
        self._ended = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._ended = True
        with _lock:
            for worker in self._all:
                worker.process.terminate()
            deadline = time.monotonic() + END_SECONDS
            for worker in self._all:
                worker.process.join(max(0.0, deadline - time.monotonic()))
                worker.process.kill()
        self._threads.shutdown(cancel_futures=True)
        for worker in self._all:
            worker.process.join()
            worker.connection.close()

    def submit(self, function: Callable[..., Any], *args: Any) -> Future[Any]:
        """Calls ``function`` in a process; Killed if that ends without an answer."""
        return self._threads.submit(self._call, function, args)

    def _call(self, function: Callable[..., Any], args: Sequence[Any]) -> Any:
        with _lock:
            if self._ended:
                raise CancelledError
            worker = self._idle.pop() if self._idle else self._start()
        try:
            worker.connection.send((function, args))
            result, error = worker.connection.recv()
        except (EOFError, OSError):
            with _lock:
                self._all.remove(worker)
                worker.process.join()
            worker.connection.close()
            raise Killed(worker.process.exitcode or 0) from None
        with _lock:
            self._idle.append(worker)
        if error is not None:
            raise error
        return result

    def _start(self) -> _Process:
        try:
            ours, theirs = self._context.Pipe()
            process = self._context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
        except (EOFError, OSError) as error:
            raise Failure(
                f"cannot start a worker process: {error or 'its server ended'}"
            ) from error
        theirs.close()
        self._all.append(_Process(process, ours))
        return self._all[-1]


def _start_server() -> None:
    """Starts the server process that the others are forked from, without Ctrl-C: that would reach
    it while it imports, and it would print a traceback."""
    resource_tracker.ensure_running()  # it would let Ctrl-C in again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(connection: Connection) -> None:
    """Answers calls with their result and None, or with None and their error, until the parent
    closes the connection or is gone."""
    # Ctrl-C reaches the whole group; the parent ends its processes.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # removes a half-written shard
    _keep_freed_memory()
    threadpool_limits(1)  # numpy's BLAS and torch would take every core in every process
    # mpg123 and FFmpeg print warnings into the progress bar; Python's tracebacks stay visible.
    sys.stderr = os.fdopen(os.dup(2), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    with suppress(EOFError, ConnectionError):
        while True:
            function, args = connection.recv()
            try:
                connection.send((function(*args), None))
            except ConnectionError:
                raise
            except Exception as error:  # the caller raises it again
                error.add_note(traceback.format_exc())
                connection.send((None, error))


def _keep_freed_memory() -> None:
    """Has glibc's malloc keep what is freed.

    Giving a clip's megabytes back to the system and faulting them in for the next clip costs a
    quarter of its decoding: 10.2 ms against 7.8.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # glibc alone has it, and needs it
        mallopt(M_MMAP_THRESHOLD, 1 << 30)
        mallopt(M_TRIM_THRESHOLD, 1 << 30)


class _Cluster:
    """The workers of a Dask cluster."""

    def __init__(self, client: Any, killed: type[Exception]) -> None:
        self.killed = killed
        self._client = client
        self._executor = client.get_executor(pure=False)

    @property
    def count(self) -> int:
        """Two calls for each thread, so that none waits; workers come and go."""
        threads: int = sum(self._client.nthreads().values())
        return 2 * max(1, threads)

    def submit(self, function: Callable[..., Any], *args: Any) -> Future[Any]:
        future: Future[Any] = self._executor.submit(function, *args)
        return future


@contextmanager
def dask_cluster(address: str) -> Iterator[Workers]:
    """The workers of the Dask scheduler at ``address``; they must have fastat and see the files.

    Leaving it cancels the calls that have not started.

    Raises:
        UserError: Dask is not installed, no scheduler answers, or its workers have no fastat.
        Failure: the connection to the scheduler is lost.
    """
    try:
        from distributed import Client, KilledWorker, Security, rpc
        from distributed.comm.core import CommClosedError
    except ImportError as error:
        raise UserError(f"--scheduler needs Dask (pip install 'fastat[dask]'): {error}") from None
    # It would print each attempt to connect; what matters is raised.
    for name in ("distributed", "distributed.client", "distributed.gc"):
        logging.getLogger(name).setLevel(logging.CRITICAL)

    async def check() -> None:
        security = Security().get_connection_args("client")
        async with (
            asyncio.timeout(CONNECT_SECONDS),
            rpc(address, connection_args=security) as scheduler,
        ):
            await scheduler.identity(n_workers=0)  # a worker's takes no such argument

    try:
        asyncio.run(check())  # a Client without a scheduler takes 20 seconds to end
        client = Client(address, timeout=CONNECT_SECONDS, set_as_default=False)
    except (OSError, ValueError, TypeError, RuntimeError) as error:  # each scheme has its own
        reason = first_line(error)
        raise UserError(f"--scheduler {address}: no Dask scheduler answers: {reason}") from error
    with client:
        try:
            # A worker that cannot load a call never answers.
            client.run(exec, "import fastat.packing.block")
            yield _Cluster(client, KilledWorker)
        except ImportError as error:
            raise UserError(f"--scheduler {address}: its workers need fastat: {error}") from error
        except (CancelledError, CommClosedError) as error:
            raise Failure(
                f"--scheduler {address}: the connection is lost; the same command goes on"
            ) from error
