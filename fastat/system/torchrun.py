"""``fastat train --gpus N``: torchrun's agent in this process, a rank for each GPU below it."""

import logging
import os
import signal
import sys
import uuid

import torch
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from fastat.system.errors import UserError
from fastat.system.host import cores_of_rank


def run_ranks(num_ranks: int, arguments: list[str]) -> int:
    """Runs ``fastat ARGUMENTS`` in ``num_ranks`` processes, one for each GPU; the exit code.

    A signal reaches every rank; the exit code is that of one process which it stopped.

    Raises:
        UserError: there are not so many GPUs.
    """
    available = torch.cuda.device_count()
    if not 1 <= num_ranks <= available:
        raise UserError(
            f"--gpus must be 1 to {available}, the GPUs of this machine, got {num_ranks}"
            if available
            else f"--gpus {num_ranks}: this machine has no GPU; without --gpus it trains on the "
            "processor"
        )
    os.environ.setdefault("OMP_NUM_THREADS", str(cores_of_rank(num_ranks)))
    agent = logging.getLogger("torch.distributed.elastic.agent.server.api")
    agent.setLevel(logging.ERROR)  # its words on every signal
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_ranks,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        signals_to_handle="SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",
    )
    command = ["-m", "fastat.cli", *arguments, "--gpus", "1"]  # the last --gpus counts
    try:
        elastic_launch(config, sys.executable)(*command)
    except SignalException as received:
        return 130 if received.sigval == signal.SIGINT else 143
    except ChildFailedError as failed:  # which has said why
        code = failed.get_first_failure()[1].exitcode
        return code if code > 0 else 1
    return 0
