"""What a training run shows while it runs: a live panel on a terminal, plain lines when piped."""

import sys
import time
from dataclasses import dataclass
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fastat.errors import one_line

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


class Display:
    """Notes, the running status and a line an epoch, on standard error."""

    def __init__(self, *, shown: bool = True) -> None:
        """``shown``: False for a rank that keeps quiet."""
        self.console = Console(stderr=True, highlight=False, soft_wrap=True, quiet=not shown)
        self.live = Live(console=self.console, refresh_per_second=4, transient=True)
        self.on_terminal = shown and sys.stderr.isatty()
        self.last_plain = time.monotonic()

    def __enter__(self) -> "Display":
        if self.on_terminal:
            self.live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.live.stop()

    def note(self, text: str) -> None:
        """A line that stays, whatever names it holds."""
        self.console.print(Text(one_line(text)))

    def status(self, s: Status) -> None:
        """Refreshes the panel, or prints a line when the last is old enough."""
        if self.on_terminal:
            self.live.update(_panel(s))
        elif time.monotonic() - self.last_plain >= PLAIN_LINE_SECONDS:
            self.last_plain = time.monotonic()
            self.note(
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
