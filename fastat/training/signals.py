"""A signal stops a run: it finishes the step, saves, and exits with the signal's exit code."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

PREEMPTION = (signal.SIGTERM, signal.SIGUSR1)
"""What schedulers send before they end a job; SLURM and torchrun may both send one."""

GRACE_SECONDS = 10.0
"""How long an evaluation may go on after a signal; if it is not done by then, the resumed run
evaluates again. Schedulers wait half a minute, in which a checkpoint must be written too."""


class Interrupted(BaseException):
    """A signal ended the run. Like KeyboardInterrupt it is no subclass of Exception."""

    def __init__(self, signum: int, *, saved: bool = True) -> None:
        super().__init__(signum)
        self.exit_code = 130 if signum == signal.SIGINT else 143
        self.saved = saved
        """Whether a checkpoint of the last step was written."""


@contextmanager
def leaving_at_once() -> Iterator[None]:
    """SIGTERM and SIGUSR1 raise Interrupted at once, where there is nothing to save.

    For a command, in the main thread. After an Interrupted both signals stay ignored, so that a
    second one does not change the exit code.
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

    Python handles a signal between two of its instructions: a compilation or a kernel on the CPU
    ends first. Further SIGTERM and SIGUSR1 change nothing: schedulers send them twice, and they
    must not kill a process that is saving. Ctrl-C while the run is stopping ends it at once.
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
        """Whether ``GRACE_SECONDS`` have passed since a signal came."""
        return self.signum is not None and time.monotonic() - self.since > GRACE_SECONDS

    def _remember(self, signum: int, _frame: FrameType | None) -> None:
        if self.signum is None:
            self.signum, self.since = signum, time.monotonic()
            if os.environ.get("RANK", "0") == "0":  # set by torchrun
                # Not print(): the signal may have interrupted one, which cannot be nested.
                os.write(2, b"\nstopping after this step; Ctrl-C (once more) to stop at once\n")
        elif signum == signal.SIGINT:
            raise KeyboardInterrupt
