"""Signals: the first is remembered, schedulers may repeat theirs, Ctrl-C may insist."""

import os
import signal
import subprocess
import sys

import pytest

from fastat.training import signals
from fastat.training.signals import Interrupted, StopSignals, leaving_at_once
from tests.conftest import QUIET


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_the_first_signal_is_remembered_and_schedulers_may_repeat_theirs(
    first: signal.Signals,
) -> None:
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, *signals.PREEMPTION)}
    with StopSignals() as stop:
        assert stop.signum is None and not stop.overdue
        os.kill(os.getpid(), first)
        for repeated in signals.PREEMPTION:
            os.kill(os.getpid(), repeated)
        assert stop.signum == first
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert {s: signal.getsignal(s) for s in before} == before


@pytest.mark.parametrize(
    ("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGUSR1, 143), (signal.SIGINT, 130)]
)
def test_exit_codes(signum: signal.Signals, code: int) -> None:
    assert Interrupted(signum).exit_code == code
    assert not isinstance(Interrupted(signum), Exception)


def test_an_evaluation_has_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    with StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert not stop.overdue
        monkeypatch.setattr(signals, "GRACE_SECONDS", -1.0)
        assert stop.overdue


@pytest.mark.parametrize("signum", signals.PREEMPTION)
def test_outside_training_a_signal_leaves_at_once(signum: signal.Signals) -> None:
    before = {s: signal.getsignal(s) for s in signals.PREEMPTION}
    try:
        with pytest.raises(Interrupted) as error, leaving_at_once():
            os.kill(os.getpid(), signum)
        assert not error.value.saved
        for repeated in signals.PREEMPTION:
            os.kill(os.getpid(), repeated)  # would end this process
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
    with leaving_at_once():
        pass
    assert {s: signal.getsignal(s) for s in before} == before


def test_the_command_leaves_at_its_start_with_143() -> None:
    program = (
        "import os, signal; import fastat.training.launch as launch\n"
        "from fastat.cli.app import main\n"
        "launch.configure = lambda *_, **__: os.kill(os.getpid(), signal.SIGUSR1); main()"
    )
    command = [sys.executable, "-c", program, "train", "--proc", "A4", "--model", "crnn"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | QUIET)
    assert (done.returncode, done.stderr) == (143, "fastat: stopped; there was nothing to save\n")
