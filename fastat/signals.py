"""Stopping a run with a signal: finish the step, save, leave with the exit code it stands for."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

PREEMPTION = (signal.SIGTERM, signal.SIGUSR1)
"""What schedulers send ahead of the end; SLURM and torchrun both may, one after the other."""

GRACE_SECONDS = 10.0
"""How long an evaluation may go on after a signal; what it has not scored by then, a resume does.
Schedulers give half a minute, and a checkpoint must be written in it too."""


class Interrupted(BaseException):
    """A signal ended the run. As with KeyboardInterrupt, no ``except Exception`` holds it up."""

    def __init__(self, signum: int, *, saved: bool = True) -> None:
        super().__init__(signum)
        self.exit_code = 130 if signum == signal.SIGINT else 143
        self.saved = saved
        """Whether a checkpoint of where the run stood was written."""


@contextmanager
def leaving_at_once() -> Iterator[None]:
    """Outside training there is nothing to save: SIGTERM and SIGUSR1 raise Interrupted.

    For a command, in the main thread: after an Interrupted both stay ignored, so that a repeated
    one leaves the exit code alone.
    """

    def leave(signum: int, _frame: FrameType | None) -> None:
        _ignore()
        raise Interrupted(signum, saved=False)

    after = {s: signal.signal(s, leave) for s in PREEMPTION}
    try:
        yield
    except Interrupted:
        after = dict.fromkeys(after, signal.SIG_IGN)
        raise
    finally:
        for signum, handler in after.items():
            signal.signal(signum, handler)


def _ignore() -> None:
    for signum in PREEMPTION:
        signal.signal(signum, signal.SIG_IGN)


class StopSignals:
    """Remembers the first SIGINT, SIGTERM or SIGUSR1; main thread only.

    Python hears of a signal between two operations of its own: a compilation, or a kernel that
    runs on the processor, ends first. More of SIGTERM and SIGUSR1 change nothing: they come twice
    from a scheduler and must not kill a process that is saving. Ctrl-C while the run is stopping
    ends it at once.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self.since = 0.0

    def __enter__(self) -> "StopSignals":
        handled = (signal.SIGINT, *PREEMPTION)
        self.before = {s: signal.signal(s, self._remember) for s in handled}
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self.before.items():
            signal.signal(signum, handler)

    @property
    def overdue(self) -> bool:
        """Whether a signal came longer ago than an evaluation may go on."""
        return self.signum is not None and time.monotonic() - self.since > GRACE_SECONDS

    def _remember(self, signum: int, _frame: FrameType | None) -> None:
        if self.signum is None:
            self.signum, self.since = signum, time.monotonic()
            # Not print(): the signal may have come in the middle of one, which cannot be nested.
            os.write(2, b"\nstopping after this step; Ctrl-C (once more) to stop at once\n")
        elif signum == signal.SIGINT:
            raise KeyboardInterrupt
