"""The kernels' tests find every mistake that their mutants plant."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastat_kernels.choice import OPERATORS
from tests.kernels.mutants import planned

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("op", OPERATORS)
def test_every_mutant_is_killed(op: str) -> None:
    assert len(planned([op])) >= 3
    command = [sys.executable, "-m", "tests.kernels.mutants", op]
    env = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
