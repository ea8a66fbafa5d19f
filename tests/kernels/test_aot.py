"""Every kernel the models launch compiles for every chip: no spills, and it fits in memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastat_kernels.choice import OPERATORS
from fastat_kernels.log_mel import OPAQUE
from tests.kernels.aot import SHARED_LIMIT, Compiled, complaint

ROOT = Path(__file__).parents[2]


def complaints(arch: int, op: str, out: Path, *options: str) -> list[str]:
    """What is wrong with what tests.kernels.aot compiles, in a process that does not interpret."""
    if (op, arch) == ("log_mel", 100) and OPAQUE.value:
        pytest.skip("log_mel says that it needs Triton 3.7 on sm_100")
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"
    command = [sys.executable, "-m", "tests.kernels.aot", str(arch), op, "--json", str(out)]
    done = subprocess.run([*command, *options], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [Compiled(**row) for row in json.loads(out.read_text())]
    assert rows or "--candidates" in options  # of which there may be none
    assert {(row.arch, row.operator) for row in rows} <= {(arch, op)}
    return [f"{row.kernel} {row.launch}: {why}" for row in rows if (why := complaint(row))]


QUICK = 90  # sm_90: the other chips' compilation takes minutes, for kernels that seldom change


@pytest.mark.parametrize("op", OPERATORS)
@pytest.mark.parametrize(
    "arch",
    [a if a == QUICK else pytest.param(a, marks=pytest.mark.full) for a in SHARED_LIMIT],
)
def test_every_launch_fits_the_chip(arch: int, op: str, tmp_path: Path) -> None:
    assert complaints(arch, op, tmp_path / "rows.json") == []


@pytest.mark.full
@pytest.mark.parametrize("op", OPERATORS)
@pytest.mark.parametrize("arch", SHARED_LIMIT)
def test_every_candidate_fits_the_chip(arch: int, op: str, tmp_path: Path) -> None:
    assert complaints(arch, op, tmp_path / "rows.json", "--candidates") == []
