"""Every benchmark compiles for its own shapes."""

import pytest
import torch


@pytest.fixture(autouse=True)
def compiled_anew() -> None:
    """Without this, a function that saw other shapes before would be compiled for any shape."""
    torch._dynamo.reset()
