"""Progress of long work on standard error: a bar on a terminal, now and then a line when piped."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from fastat.system.errors import one_line

PLAIN_LINE_SECONDS = 10.0


class Advance(Protocol):
    """Reports ``n`` more units as done."""

    def __call__(self, n: int = 1) -> None: ...


class _RateColumn(ProgressColumn):
    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else _rate(speed, self.unit), style="cyan")


def _rate(per_second: float, unit: str) -> str:
    """By the second; what is slower than one a second, by the minute."""
    if per_second < 1:
        return f"{60 * per_second:,.1f} {unit}/min"
    return f"{per_second:,.0f} {unit}/s"


@contextmanager
def progress(title: str, total: int, unit: str = "clips", done: int = 0) -> Iterator[Advance]:
    """A display over ``total`` units, ``done`` of them already done; yields ``advance(n)``."""
    title = one_line(title)
    if sys.stderr.isatty():
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            _RateColumn(unit),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(title, total=total, completed=done)
            yield lambda n=1: bar.advance(task, n)
        return

    started = last = time.monotonic()
    count = done

    def line(now: float) -> None:
        rate = (count - done) / max(now - started, 1e-9)
        left = (total - count) / rate if rate else 0.0
        print(
            f"{title}: {count:,}/{total:,} {unit}, {_rate(rate, unit)}, {left:,.0f} s left",
            file=sys.stderr,
            flush=True,
        )

    def advance(n: int = 1) -> None:
        nonlocal count, last
        count += n
        now = time.monotonic()
        if now - last >= PLAIN_LINE_SECONDS:
            last = now
            line(now)

    yield advance
    line(time.monotonic())
