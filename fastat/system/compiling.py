"""torch.compile's costs: kept between runs in fastat's cache folder, measured, said."""

import os
import time
from pathlib import Path
from typing import Any, Self

from fastat.system.errors import first_line


def keep_compiled(folder: Path) -> None:
    """Has torch keep compiled graphs and kernels in ``folder``; before anything is compiled.

    Where the user has said where, that holds.
    """
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder / "inductor"))
    os.environ.setdefault("TRITON_CACHE_DIR", str(folder / "triton"))


def compiler_failed(error: RuntimeError) -> bool:
    """Whether torch.compile raised ``error``: it has no C compiler, or its cache has no room."""
    return type(error).__module__ in ("torch._dynamo.exc", "torch._inductor.exc")


def compiler_said(error: RuntimeError) -> str:
    """The line of torch.compile's error that names the cause."""
    lines = str(error).splitlines()
    return next((line.strip() for line in lines if "error:" in line), first_line(error))


class CompileClock:
    """The seconds that torch spends compiling, and the graphs it compiles, while it is entered."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._started = 0.0
        self._epochs = 0.0

    def __enter__(self) -> Self:
        from torch._dynamo.callback import callback_handler

        callback_handler.register_start_callback(self._start)
        callback_handler.register_end_callback(self._end)
        self._said = (self.seconds, *_graphs())
        return self

    def __exit__(self, *_: object) -> None:
        from torch._dynamo.callback import callback_handler

        callback_handler.remove_start_callback(self._start)
        callback_handler.remove_end_callback(self._end)

    def _start(self, _: Any) -> None:
        self._started = time.perf_counter()

    def _end(self, _: Any) -> None:
        self.seconds += time.perf_counter() - self._started

    def of_epoch(self) -> float:
        """The seconds since the last call."""
        before, self._epochs = self._epochs, self.seconds
        return self.seconds - before

    def note(self) -> str | None:
        """What was compiled since the last note, in one line; None: nothing."""
        said, self._said = self._said, (self.seconds, *_graphs())
        seconds, hits, missed = (now - then for now, then in zip(self._said, said, strict=True))
        if not seconds:
            return None
        return f"compiled in {seconds:.0f} s; {hits} of {hits + missed} graphs from the cache"


def _graphs() -> tuple[int, int]:
    """Graphs that torch has taken from its caches in this process, and those it has compiled."""
    from torch._dynamo.utils import counters

    inductor = counters["inductor"]
    bypassed = inductor["fxgraph_cache_bypass"]
    return inductor["fxgraph_cache_hit"], inductor["fxgraph_cache_miss"] + bypassed
