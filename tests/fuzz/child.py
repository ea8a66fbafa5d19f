"""Cases run in a forked child: one that crashes, hangs or takes all memory is that case's fault.

A fork costs nothing beside the seconds that importing torch takes, and leaves the tests' own
process alive when libhdf5 kills the child.
"""

import multiprocessing
import os
import resource
import signal
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

from fastat.system.errors import Failure, UserError, one_line

CASE_SECONDS = 20.0
"""A case takes milliseconds; one that takes this long hangs, on a busy machine too."""
ADDRESS_BYTES = 2 << 30
"""What a case may reserve beyond what the tests' process has."""
SPARE_BYTES = 24 << 20
"""Of memory, beyond twice the undamaged input's: what allocators keep, and lazy imports."""

Check = Callable[[int], str | None]
"""What is wrong with the code under test in the case of that number; None: nothing."""


class Outcome(NamedTuple):
    """What became of a case."""

    complaint: str | None
    peak_bytes: int
    """Of memory, beyond what the process had before the case."""


def run_cases(check: Check, numbers: Sequence[int]) -> dict[int, Outcome]:
    """Each case's outcome; after a crash or a hang a new child goes on behind it."""
    found: dict[int, Outcome] = {}
    context = multiprocessing.get_context("fork")
    while left := [number for number in numbers if number not in found]:
        ours, theirs = context.Pipe(duplex=False)
        child = context.Process(target=_serve, args=(theirs, check, left), daemon=True)
        child.start()
        theirs.close()
        for number in left:
            try:
                if not ours.poll(CASE_SECONDS):
                    found[number] = Outcome(f"no end after {CASE_SECONDS:.0f} s", 0)
                    break
                found[number] = ours.recv()
            except EOFError:
                child.join()
                found[number] = Outcome(f"the process died: {_fate(child.exitcode)}", 0)
                break
        child.kill()
        child.join()
        ours.close()
    return found


def _fate(exit_code: int | None) -> str:
    if exit_code is None or exit_code >= 0:
        return f"exit code {exit_code}"
    return signal.Signals(-exit_code).name


def _serve(connection: Connection, check: Check, numbers: Sequence[int]) -> None:
    # mpg123 and FFmpeg write their own complaints there.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    reserved = _status("VmSize") + ADDRESS_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (reserved, reserved))
    for number in numbers:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = _status("VmRSS")
        try:
            complaint = check(number)
        except BaseException:
            lines = traceback.format_exc().splitlines()
            complaint = f"not one line but a traceback: {' | '.join(lines[-5:])}"
        connection.send(Outcome(complaint, _status("VmHWM") - before))


def _status(field: str) -> int:
    """Of this process, bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return 1024 * int(line.split()[1])
    raise AssertionError(f"{field} is not in /proc/self/status")


def error_of(call: Callable[[], object], *, names: str) -> str | None:
    """What is wrong with the way ``call`` fails; None when it does not fail, or as it should.

    It should raise UserError or Failure whose line, as the command prints it, names the file.
    """
    try:
        call()
    except (UserError, Failure) as error:
        if names not in (line := one_line(str(error))):
            return f"an error that does not name {names}: {line}"
    return None
