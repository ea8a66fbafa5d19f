"""Kills a pack at a point of its way, or lets another one happen in the middle of it."""

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from fastat.system.progress import progress
from tests.data.audio import run_python


def files(directory: Path) -> dict[str, bytes]:
    """Every file of a set; no folder is left in it."""
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def killed_at(step: int, call: Callable[[], object]) -> bool:
    """Whether ``call`` came to its ``step``-th durable step and was killed there.

    Before every fsync, rename and removal of a folder: between any two a power cut finds the same
    files. ``call`` runs in a fork of the tests' own process and must not start workers, whose
    server a fork cannot use.
    """
    child = os.fork()
    if child:
        return os.WIFSIGNALED(os.waitpid(child, 0)[1])
    at_step(step, lambda: os.kill(os.getpid(), signal.SIGKILL), setattr)
    try:
        call()
    finally:
        os._exit(0)


def at_step(
    step: int, call: Callable[[], object], replace: Callable[[Any, str, Any], None]
) -> None:
    """Has ``call`` happen before the ``step``-th durable step from now on.

    ``replace`` is setattr, or undoes it some time.
    """
    left = step

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                call()
            return function(*args, **kwargs)

        return wrapper

    for module, name in ((os, "replace"), (os, "fsync"), (shutil, "rmtree")):
        replace(module, name, counted(getattr(module, name)))


KILLED_BETWEEN_BLOCKS = """
import os, signal, sys
from contextlib import contextmanager
from pathlib import Path
from fastat.packing import append, pack, plan

@contextmanager
def progress(*args):
    yield lambda n: os.killpg(0, signal.SIGKILL)

pack.progress = progress
source, out = map(Path, sys.argv[1:3])
"""


def kill_between_blocks(call: str, source: Path, out: Path) -> None:
    """Runs ``call`` of ``source`` and ``out`` in a process, which dies with all its workers when
    the first block is packed."""
    done = run_python(KILLED_BETWEEN_BLOCKS + call, source, out)
    assert done.returncode == -signal.SIGKILL, done.stderr


@contextmanager
def in_the_middle(call: Callable[[], object]) -> Iterator[None]:
    """Has the next pack of this process wait for ``call`` after it has looked at its folder."""
    with pytest.MonkeyPatch.context() as patch:

        def after_call(*args: Any) -> Any:
            patch.undo()
            call()
            return progress(*args)

        patch.setattr("fastat.packing.pack.progress", after_call)
        yield
