"""``pack`` with a fault, in a process of its own: faulty_pack.py TABLE OUT POINT FAULT.

Its worker processes run this file too, as multiprocessing has them do, so faults reach them.
"""

import multiprocessing.forkserver
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastat.audio.decode import decode
from fastat.packing import block
from fastat.packing.pack import pack
from fastat.system.errors import Failure, UserError

replace = os.replace
TABLE, OUT, POINT, FAULT = sys.argv[1:]
COMMAND = "COMMAND_PROCESS"


def interrupt() -> None:
    os.kill(int(os.environ[COMMAND]), signal.SIGINT)
    time.sleep(60)


def limit_files(num_bytes: int) -> None:
    """Fails writes as a full disk does, in the processes that are started from now on, too."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))


def limit_files_of_command() -> None:
    multiprocessing.forkserver.ensure_running()
    limit_files(2_000)


FAULTS: dict[str, Callable[[], None]] = {
    "none": lambda: None,
    "kill all": lambda: os.killpg(0, signal.SIGKILL),
    "kill command": lambda: os.kill(int(os.environ[COMMAND]), signal.SIGKILL),
    "crash": lambda: os.kill(os.getpid(), signal.SIGSEGV),
    "interrupt": interrupt,
    "disk full": lambda: limit_files(20_000),
    "disk full for command": limit_files_of_command,
}


def at(point: str) -> None:
    if point == POINT:
        FAULTS[FAULT]()


def faulty_decode(path: Path, *args: Any) -> Any:
    at(f"decode {path.name}")
    return decode(path, *args)


def faulty_replace(source: Path, target: Path) -> None:
    at(f"before {target.name}")
    replace(source, target)
    at(f"after {target.name}")


vars(block)["decode"], vars(os)["replace"] = faulty_decode, faulty_replace

if __name__ == "__main__":
    # A shell that starts the tests in its background has them ignore SIGINT.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ[COMMAND] = str(os.getpid())
    at("start")
    try:
        pack(Path(TABLE), Path(OUT), clip_seconds=0.5, workers=1, max_bad=0.1)
    except (Failure, UserError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
