"""Without a GPU the Triton launchers run under the interpreter; must be set before import."""

import os
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def seeded_fp32_exact() -> None:
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


@pytest.fixture(scope="session")
def recordings() -> Path:
    """The folder of real recordings that FASTAT_TEST_AUDIO names; skips without it."""
    folder = os.environ.get("FASTAT_TEST_AUDIO")
    if not folder:
        pytest.skip("FASTAT_TEST_AUDIO is not set: no real recordings to test on")
    return Path(folder)
