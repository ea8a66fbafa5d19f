"""Plants mistakes in the kernels, one at a time, and checks that the named test finds each.

    python -m tests.kernels.mutants [OPERATOR...]

The mistakes of an operator are listed at the end of its test file. Each runs in a fork of this
process, which has imported all that is slow to import and none of the kernels.
"""

import argparse
import contextlib
import importlib
import io
import multiprocessing
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.library

from tests.kernels.mutant import Mutant

ROOT = Path(__file__).parents[2]
PACKAGE = "fastat_kernels"


class Verdict(NamedTuple):
    operator: str
    mutant: Mutant
    held: bool
    """The mistake was found; without one, the tests passed."""
    message: str


def planned(operators: list[str]) -> list[tuple[str, Mutant]]:
    """Every operator with each mistake that its test file lists; of all operators without names."""
    operators = operators or importlib.import_module(f"{PACKAGE}.choice").OPERATORS
    tests = {op: importlib.import_module(f"tests.kernels.test_{op}") for op in operators}
    return [(op, mutant) for op in operators for mutant in tests[op].MUTANTS]


def run_tests(op: str, names: list[str], kernels: Path) -> tuple[int, str]:
    """pytest's exit code and output for some tests of ``op``, on the package in ``kernels``."""
    assert PACKAGE not in sys.modules, "the mistake would not be seen"
    tests = [f"{ROOT}/tests/kernels/test_{op}.py::{name}" for name in names]
    options = ["-x", "-q", "--no-header", "-p", "no:cacheprovider", f"--rootdir={ROOT}"]
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        code = pytest.main([*options, "-o", f"pythonpath={ROOT} {kernels}", *tests])
    return int(code), output.getvalue()


def unharmed(op: str, names: list[str]) -> Verdict:
    """Whether the tests that are to find mistakes pass without any."""
    code, output = run_tests(op, names, ROOT / "kernels")
    return Verdict(
        op, Mutant("nothing planted, all pass", "", "", ", ".join(names)), not code, output
    )


def verdict(op: str, mutant: Mutant) -> Verdict:
    """Plants one mistake in a copy of the package and runs the test that is to find it."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(ROOT / "kernels" / PACKAGE, Path(folder) / PACKAGE)
        file = Path(folder) / PACKAGE / f"{op}.py"
        source = file.read_text()
        if (times := source.count(mutant.old)) != 1:
            return Verdict(op, mutant, False, f"its source text occurs {times} times, not once")
        file.write_text(source.replace(mutant.old, mutant.new))
        code, output = run_tests(op, [mutant.killed_by], Path(folder))
    complaints = [line for line in output.splitlines() if line.startswith("E  ")]
    message = complaints[0].removeprefix("E").strip() if complaints else output
    return Verdict(op, mutant, code == pytest.ExitCode.TESTS_FAILED, message)


def survey(operators: list[str]) -> list[Verdict]:
    """A verdict for every mistake, after one for each operator without any."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")
    with multiprocessing.get_context("fork").Pool(2, maxtasksperchild=1) as pool:
        plan = pool.apply(planned, (operators,))
        killers: dict[str, set[str]] = {}
        for op, mutant in plan:
            killers.setdefault(op, set()).add(mutant.killed_by)
        healthy = [(op, sorted(names)) for op, names in killers.items()]
        return pool.starmap(unharmed, healthy, 1) + pool.starmap(verdict, plan, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("operators", nargs="*")
    verdicts = survey(parser.parse_args().operators)
    for v in verdicts:
        print(f"{'as said' if v.held else 'NOT SO'}  {v.operator}: {v.mutant.what}")
        print(f"    {v.mutant.killed_by}\n    {v.message[:2000]}")
    raise SystemExit(0 if all(v.held for v in verdicts) else 1)


if __name__ == "__main__":
    main()
