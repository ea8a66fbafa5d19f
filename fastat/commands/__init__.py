"""The commands of ``fastat``, a function each; what they need is imported when they run."""

from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output.")]
