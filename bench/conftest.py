"""Every benchmark compiles for its own shapes, and runs on one stream; the session knows what the
device can do at most, and says where its results are."""

from collections.abc import Iterator

import pytest
import torch

from bench import ceilings
from bench.results import PRECISION, folder
from bench.results import ceilings as known_ceilings
from bench.timing import on_one_stream


@pytest.fixture(autouse=True)
def compiled_anew() -> None:
    """Without this, a function that saw other shapes before would be compiled for any shape."""
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def one_stream() -> Iterator[None]:
    with on_one_stream():
        yield


@pytest.fixture(autouse=True, scope="session")
def measured_ceilings(request: pytest.FixtureRequest) -> None:
    """Where there are none of this device in its precision; ``python -m bench.ceilings`` measures
    them again."""
    if known_ceilings().get("precision") != PRECISION and not request.config.getoption(
        "benchmark_disable"
    ):
        ceilings.main(folder())


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if (folder() / "results.jsonl").exists():
        terminalreporter.write_line(f"results in {folder()}: python -m bench.compare {folder()}")
