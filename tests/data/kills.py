"""Kills a call at a durable step, in a fork of the tests' own process: cheap enough for all."""

import os
import shutil
import signal
from collections.abc import Callable
from typing import Any


def killed_at(step: int, call: Callable[[], object]) -> bool:
    """Whether ``call`` came to its ``step``-th durable step and was killed there.

    Before every fsync, rename and removal of a folder: between any two a power cut finds the same
    files. ``call`` must not start workers, whose server a fork cannot use.
    """
    child = os.fork()
    if child:
        return os.WIFSIGNALED(os.waitpid(child, 0)[1])
    left = step

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return wrapper

    for module, name in ((os, "replace"), (os, "fsync"), (shutil, "rmtree")):
        setattr(module, name, counted(getattr(module, name)))
    try:
        call()
    finally:
        os._exit(0)
