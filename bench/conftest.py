"""Every benchmark compiles for its own shapes, and runs on one stream; the session says where its
results are."""

from collections.abc import Iterator

import pytest
import torch

from bench.results import folder
from bench.timing import on_one_stream


@pytest.fixture(autouse=True)
def compiled_anew() -> None:
    """Without this, a function that saw other shapes before would be compiled for any shape."""
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def one_stream() -> Iterator[None]:
    with on_one_stream():
        yield


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if (folder() / "results.jsonl").exists():
        terminalreporter.write_line(f"results in {folder()}: python -m bench.compare {folder()}")
