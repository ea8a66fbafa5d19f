"""Every kernel the models launch compiles for every chip: no spills, and it fits in memory."""

import json
import os
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import pytest

from fastat_kernels.choice import OPERATORS
from tests.kernels.aot import SHARED_LIMIT, Compiled, complaint

ROOT = Path(__file__).parents[2]


@cache
def compiled(arch: int, *options: str) -> list[Compiled]:
    """What tests.kernels.aot reports of all operators, from a process that does not interpret."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.json"
        command = [sys.executable, "-m", "tests.kernels.aot", str(arch), "--json", str(out)]
        done = subprocess.run(
            [*command, *options], cwd=ROOT, env=env, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return [Compiled(**row) for row in json.loads(out.read_text())]


def complaints(op: str, rows: list[Compiled]) -> list[str]:
    mine = [row for row in rows if row.operator == op]
    assert mine, f"nothing was compiled for {op}"
    return [f"{row.kernel} {row.launch}: {why}" for row in mine if (why := complaint(row))]


@pytest.mark.parametrize("op", OPERATORS)
@pytest.mark.parametrize("arch", SHARED_LIMIT)
def test_every_launch_fits_the_chip(arch: int, op: str) -> None:
    assert complaints(op, compiled(arch)) == []


@pytest.mark.full
@pytest.mark.parametrize("op", OPERATORS)
@pytest.mark.parametrize("arch", SHARED_LIMIT)
def test_every_candidate_fits_the_chip(arch: int, op: str) -> None:
    assert complaints(op, compiled(arch, "--candidates")) == []
