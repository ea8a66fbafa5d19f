"""Table 4 for one model: what each part of a procedure is worth; ``fastat ablate``.

A baseline and a run without each part, with the same seed, each by ``fastat train --resume`` in a
process of its own, one after the other: started again, an ablation goes on where it was stopped.
"""

import json
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from fastat.compare import Comparison, Estimate, compare, passes
from fastat.config import TrainConfig
from fastat.errors import Failure
from fastat.outputs import finite, written
from fastat.paper import TABLE_4
from fastat.predictions import read_predictions
from fastat.progress import progress

BASELINE = "baseline"
OFF: dict[str, tuple[str, dict[str, Any]]] = {
    "balancing": ("no-balancing", {"balance": False}),
    "mixup": ("no-mixup", {"mixup": 0.0}),
    "SpecAugment": ("no-specaug", {"time_mask": 0, "freq_mask": 0}),
    "normalisation": ("no-normalisation", {"normalize": False}),
}
"""The parts of Table 4: the folder of the run without it, and the settings that switch it off."""

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
"""To the training under way; SIGHUP only where nohup does not have it ignored."""
STOPPED = (130, 143)
"""Exit codes of a training that a signal ended, and that saved."""

RESULT_FILE = "ablate.json"
TRAIN = [sys.executable, "-m", "fastat.cli", "train"]


class Stopped(Exception):
    """A training ended early, and has said why."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(exit_code)
        self.exit_code = exit_code


@dataclass(frozen=True)
class Without:
    """A row of Table 4."""

    part: str
    run: str
    mAP: float
    difference: Estimate
    """mAP without the part minus the baseline's."""
    lost_percent: Estimate
    """Of the baseline's mAP; negative where the run without the part is better."""
    p: float
    """Two-sided, of the difference."""
    paper_lost_percent: tuple[float, float]
    """The paper's, under A4: mean and spread over the models."""


@dataclass(frozen=True)
class Ablation:
    """Table 4 for one model."""

    proc: str
    model: str
    data: str
    eval: str
    clips: int
    """Of the evaluation set; the table's intervals come from them."""
    classes_scored: int
    baseline: str
    baseline_mAP: Estimate
    rows: tuple[Without, ...]
    resamples: int
    seed: int
    """Of the training runs."""


def run_folders(out: Path) -> dict[str, Path]:
    """Where the baseline and the run without each part are."""
    return {BASELINE: out / BASELINE} | {part: out / name for part, (name, _) in OFF.items()}


def train_all(arguments: list[str], out: Path, *, auto_batch: bool) -> None:
    """Trains what is not trained yet.

    Args:
        arguments: of ``fastat train``, without --out and --resume.
        auto_batch: they have --batch auto: the batch that the baseline finds serves all.

    Raises:
        Stopped: a training ended with an exit code, or a signal came.
        Failure: a training was killed.
    """
    found: dict[str, Any] = {}
    with _Trainings() as trainings:
        for i, (part, run) in enumerate(run_folders(out).items(), start=1):
            off: list[str] = []
            if part != BASELINE:  # whose mistakes are to be one line
                print(f"ablate: {i} of {len(OFF) + 1}, without {part}", file=sys.stderr)
                # Settings come last: they win over all that is in the arguments.
                for key, value in (OFF[part][1] | found).items():
                    text = value if isinstance(value, str) else json.dumps(value)
                    off += ["--set", f"{key}={text}"]
            trainings.run([*arguments, *off, "--resume", "--out", str(run)])
            if part == BASELINE:  # whose device chose for all
                config = TrainConfig.load(run / "config.json")
                found = {"precision": config.precision}
                found |= {"batch": config.batch} if auto_batch else {}


class _Trainings:
    """Trainings one after the other, which get the signals that come to this process.

    They are in a process group of their own: Ctrl-C reaches the whole group of a terminal, and
    forwarded as well it would be two, of which the second ends a training without saving.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._received: int | None = None

    def __enter__(self) -> "_Trainings":
        nohup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        forwarded = (s for s in FORWARDED if s != signal.SIGHUP or not nohup)
        self._before = {s: signal.signal(s, self._forward) for s in forwarded}
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _forward(self, signum: int, _frame: FrameType | None) -> None:
        self._received = signum
        if self._process is not None:
            self._process.send_signal(signum)

    def run(self, arguments: list[str]) -> None:
        """One training. Its output goes to standard error, as what it shows does."""
        self._leave_if_stopped()
        command = [*TRAIN, *arguments]
        process = subprocess.Popen(command, stdout=2, process_group=0)
        self._process = process
        if self._received is not None:  # while it was started
            process.send_signal(self._received)
        try:
            code = process.wait()
        finally:
            self._process = None
        if code > 0 and code not in STOPPED:  # it failed, also if it was while it stopped
            raise Stopped(code)
        self._leave_if_stopped()
        if code < 0:
            name = signal.Signals(-code).name
            raise Failure(
                f"the training in {arguments[-1]} was killed ({name}): the same command goes on"
            )
        if code:
            raise Stopped(code)

    def _leave_if_stopped(self) -> None:
        if self._received is not None:
            raise Stopped(130 if self._received == signal.SIGINT else 143)


def table_4(out: Path, *, resamples: int) -> Ablation:
    """The trained runs in ``out``, compared; also written to ``ablate.json`` there.

    Raises:
        Failure: a run was not scored, or a file is damaged.
    """
    runs = run_folders(out)
    config = TrainConfig.load(runs[BASELINE] / "config.json")
    if config.eval is None:
        raise Failure(f"{runs[BASELINE]} was trained without an evaluation set")
    scores = {part: read_predictions(run) for part, run in runs.items()}
    rows, first = [], None
    total = len(OFF) * len(scores[BASELINE].ids) * passes(resamples)
    with progress("resampling", total, unit="classes") as advance:
        for part in OFF:
            c = compare(scores[BASELINE], scores[part], resamples=resamples, advance=advance)
            first = first or c
            rows.append(_row(part, runs[part], c))
    assert first is not None
    result = Ablation(
        proc=config.proc,
        model=config.model,
        data=config.data,
        eval=config.eval,
        clips=first.clips,
        classes_scored=first.classes_scored,
        baseline=str(runs[BASELINE]),
        baseline_mAP=first.map_a,
        rows=tuple(rows),
        resamples=resamples,
        seed=config.seed,
    )
    with written(out / RESULT_FILE) as temporary:
        temporary.write_text(json.dumps(finite(asdict(result)), indent=1) + "\n")
    return result


def _row(part: str, run: Path, c: Comparison) -> Without:
    lost = Estimate(-c.percent.value, -c.percent.high, -c.percent.low)
    return Without(part, str(run), c.map_b.value, c.difference, lost, c.p, TABLE_4[part])
