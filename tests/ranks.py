"""Several ranks of gloo on this machine, forked from one process that has imported torch."""

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from typing import Any

from fastat.system.distributed import started

SECONDS = 180


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


def run_ranks(num_ranks: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """What ``function(ranks, *args)`` returns on each rank; raises what one of them raised.

    ``function`` is a module's, its arguments and results are pickled.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fastat.training.trainer", "fastat.models.cnn_trans"])
    port = free_port()
    pipes, processes = [], []
    for rank in range(num_ranks):
        ours, theirs = context.Pipe()
        job = (rank, num_ranks, port, theirs, function, args)
        process = context.Process(target=_rank, args=job, daemon=True)
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    results = []
    for rank, (pipe, process) in enumerate(zip(pipes, processes, strict=True)):
        assert pipe.poll(SECONDS), f"rank {rank} did not end"
        try:
            ok, value = pipe.recv()
        except EOFError:
            process.join()
            raise AssertionError(f"rank {rank} ended with {process.exitcode}") from None
        assert ok, f"rank {rank}:\n{value}"
        results.append(value)
    for process in processes:
        process.join(SECONDS)
        assert process.exitcode == 0
    return results


def _rank(
    rank: int, size: int, port: int, pipe: Any, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    import torch

    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    try:
        with started() as ranks:
            result = function(ranks, *args)
        pipe.send((True, result))
    except BaseException:
        pipe.send((False, traceback.format_exc()))
