"""Stopping a run with a signal: finish the step, save, leave with the signal's exit code."""

import signal
import sys
from types import FrameType


class Interrupted(Exception):
    """A signal ended the run, after a checkpoint was saved."""

    def __init__(self, signum: int) -> None:
        self.exit_code = 128 + signum


class StopSignals:
    """Remembers the first SIGINT or SIGTERM; a second one acts at once."""

    def __init__(self) -> None:
        self.signum: int | None = None

    def __enter__(self) -> "StopSignals":
        self.before = {s: signal.signal(s, self._remember) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self.before.items():
            signal.signal(signum, handler)

    def _remember(self, signum: int, _frame: FrameType | None) -> None:
        self.signum = signum
        print("\nstopping after this step; once more to stop at once", file=sys.stderr)
        for s, handler in self.before.items():
            signal.signal(s, handler)
