"""What a training run shows while it runs: a live panel on a terminal, plain lines when piped.

Modules report through ``logging``; ``show_messages`` prints what they log.
"""

import logging
import sys
import time
from dataclasses import dataclass
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fastat.system.errors import one_line

PLAIN_LINE_SECONDS = 15.0


@dataclass(frozen=True)
class Status:
    """One moment of a run."""

    epoch: int
    """From 1."""
    epochs: int
    step: int
    """Optimizer steps done in the run."""
    total_steps: int
    loss: float
    """Running mean of this epoch."""
    lr: float
    clips_per_s: float
    data_wait: float
    """Share of the time spent waiting for data, 0..1."""
    seconds_left: float


def clock(seconds: float) -> str:
    """``h:mm:ss``, or ``m:ss`` under an hour."""
    minutes, s = divmod(round(max(seconds, 0.0)), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"


log = logging.getLogger(__name__)
_console = Console(stderr=True, highlight=False, soft_wrap=True)


class _ConsoleHandler(logging.Handler):
    """Prints each message as a line of its own, above the live panel if there is one.

    A warning, like an error, begins with the program's name.
    """

    held: list[logging.LogRecord] | None = None
    """Messages to print later; None: they are printed at once."""

    def emit(self, record: logging.LogRecord) -> None:
        if self.held is not None:
            self.held.append(record)
            return
        who = "fastat: " if record.levelno >= logging.WARNING else ""
        _console.print(Text(f"{who}{one_line(record.getMessage())}"))


def show_messages(*, shown: bool = True) -> None:
    """Prints what fastat logs at level INFO and above on standard error.

    Args:
        shown: False prints nothing, for every rank of a distributed run but the first.
    """
    fastat = logging.getLogger("fastat")
    fastat.handlers = [_ConsoleHandler() if shown else logging.NullHandler()]
    fastat.setLevel(logging.INFO)


def hold_messages() -> None:
    """Holds messages back until ``release_messages``: a mistake found before is the only line."""
    for handler in logging.getLogger("fastat").handlers:
        if isinstance(handler, _ConsoleHandler):
            handler.held = []


def release_messages() -> None:
    """Prints the messages held back, and further ones at once."""
    for handler in logging.getLogger("fastat").handlers:
        if isinstance(handler, _ConsoleHandler):
            held, handler.held = handler.held or [], None
            for record in held:
                handler.emit(record)


class StatusDisplay:
    """The status of a running training on standard error, refreshed while it runs."""

    def __init__(self, *, shown: bool = True) -> None:
        """``shown``: False for every rank but the first."""
        self._live = Live(console=_console, refresh_per_second=4, transient=True)
        self._on_terminal = shown and sys.stderr.isatty()
        self._last_line = time.monotonic()

    def __enter__(self) -> "StatusDisplay":
        if self._on_terminal:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self._live.stop()

    def update(self, s: Status) -> None:
        """Refreshes the panel, or logs a line when the last one is old enough."""
        if self._on_terminal:
            self._live.update(_panel(s))
        elif time.monotonic() - self._last_line >= PLAIN_LINE_SECONDS:
            self._last_line = time.monotonic()
            log.info(
                f"epoch {s.epoch}/{s.epochs} step {s.step}/{s.total_steps} loss {s.loss:.4f} "
                f"lr {s.lr:.2e} {s.clips_per_s:.1f} clips/s data wait {s.data_wait:.1%} "
                f"{clock(s.seconds_left)} left"
            )


def _panel(s: Status) -> Table:
    table = Table.grid(padding=(0, 2))
    labels = ("epoch", "step", "loss", "LR", "clips/s", "waiting for data", "left")
    values = (
        f"{s.epoch}/{s.epochs}",
        f"{s.step:,}/{s.total_steps:,}",
        f"{s.loss:.4f}",
        f"{s.lr:.2e}",
        f"{s.clips_per_s:,.1f}",
        f"{s.data_wait:.1%}",
        clock(s.seconds_left),
    )
    table.add_row(*(Text(label, style="dim") for label in labels))
    table.add_row(*(Text(value, style="bold") for value in values))
    panel = Table.grid()  # a bar ends no line of its own
    panel.add_row(ProgressBar(total=s.total_steps, completed=s.step, width=72))
    panel.add_row(table)
    return panel
