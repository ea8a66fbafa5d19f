"""The commands of ``fastat``, a function each; what they need is imported when they run."""

from typing import Annotated, Literal

import typer
from rich.console import Console

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output.")]
Precision = Annotated[
    Literal["auto", "bf16", "fp16", "fp32"],
    typer.Option(help="auto: the fastest that suits this device."),
]

TABLE_WIDTH = 80
"""Columns that the tables need."""


def table_console() -> Console:
    """Standard output for a table: a narrower terminal wraps its lines, which cuts no number."""
    console = Console(highlight=False)
    console.width = max(console.width, TABLE_WIDTH)
    return console
