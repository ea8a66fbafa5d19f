"""Every benchmark compiles for its own shapes, and runs on one stream."""

from collections.abc import Iterator

import pytest
import torch

from bench.timing import on_one_stream


@pytest.fixture(autouse=True)
def compiled_anew() -> None:
    """Without this, a function that saw other shapes before would be compiled for any shape."""
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def one_stream() -> Iterator[None]:
    with on_one_stream():
        yield
