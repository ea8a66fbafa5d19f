"""The paper's Table 4 for one model, what each part of a procedure is worth: ``fastat ablate``.

It trains a baseline and one run without each part, all with the same seed, one after the other.
Each is a ``fastat train --resume`` in a process of its own, so that the same command continues an
ablation that was stopped.
"""

import json
import logging
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from fastat.config.paper import TABLE_4
from fastat.config.run import TrainConfig
from fastat.evaluation.predictions import read_predictions
from fastat.study.compare import Comparison, Estimate, compare, passes
from fastat.system.errors import Failure
from fastat.system.outputs import finite, written
from fastat.system.progress import progress

BASELINE = "baseline"
OFF: dict[str, tuple[str, dict[str, Any]]] = {
    "balancing": ("no-balancing", {"balance": False}),
    "mixup": ("no-mixup", {"mixup": 0.0}),
    "SpecAugment": ("no-specaug", {"time_mask": 0, "freq_mask": 0}),
    "normalisation": ("no-normalisation", {"normalize": False}),
}
"""The parts of Table 4, each with the run folder's name and the settings that switch it off."""

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
"""Signals that are passed on to the running training; SIGHUP only if nohup did not ignore it."""
STOPPED = (130, 143)
"""Exit codes of a training that saved a checkpoint and ended because of a signal."""

RESULT_FILE = "ablate.json"
TRAIN = [sys.executable, "-m", "fastat.cli", "train"]

log = logging.getLogger(__name__)


class Stopped(Exception):
    """A training ended early, after reporting the reason itself."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(exit_code)
        self.exit_code = exit_code


@dataclass(frozen=True)
class AblationRow:
    """A row of Table 4."""

    part: str
    run: str
    mAP: float
    difference: Estimate
    """mAP without the part minus the baseline's."""
    lost_percent: Estimate
    """The loss in percent of the baseline's mAP; negative if the run without the part is better."""
    p: float
    """Two-sided p-value of the difference."""
    paper_lost_percent: tuple[float, float]
    """Mean and spread over the models that the paper reports for A4."""


@dataclass(frozen=True)
class Ablation:
    """Table 4 for one model."""

    proc: str
    model: str
    data: str
    eval: str
    clips: int
    """Clips of the evaluation set, which the bootstrap resamples."""
    classes: int
    classes_scored: int
    """Classes with a positive clip."""
    baseline: str
    baseline_mAP: Estimate
    rows: tuple[AblationRow, ...]
    resamples: int
    seed: int
    """Seed of the training runs."""


def run_folders(out: Path) -> dict[str, Path]:
    """The folders of the baseline and of the run without each part."""
    return {BASELINE: out / BASELINE} | {part: out / name for part, (name, _) in OFF.items()}


def train_all(arguments: list[str], out: Path, *, auto_batch: bool) -> None:
    """Trains the runs that are not finished yet.

    Args:
        arguments: arguments of ``fastat train`` without --out and --resume.
        auto_batch: whether they contain --batch auto. All runs then use the batch that was found
            for the baseline.

    Raises:
        Stopped: a training ended with an exit code, or a signal arrived.
        Failure: a training was killed.
    """
    found: dict[str, Any] = {}
    with _Trainings() as trainings:
        for i, (part, run) in enumerate(run_folders(out).items(), start=1):
            off: list[str] = []
            if part != BASELINE:  # nothing before the baseline: a user's mistake stays one line
                log.info(f"ablate: {i} of {len(OFF) + 1}, without {part}")
                # The settings come last, so that they override the arguments.
                for key, value in (OFF[part][1] | found).items():
                    text = value if isinstance(value, str) else json.dumps(value)
                    off += ["--set", f"{key}={text}"]
            trainings.run([*arguments, *off, "--resume", "--out", str(run)])
            if part == BASELINE:  # all runs use what was chosen for its device
                config = TrainConfig.load(run / "config.json")
                found = {"precision": config.precision}
                if auto_batch:
                    found["batch"] = config.batch


class _Trainings:
    """Runs trainings one after the other, and passes on the signals that this process receives.

    Every training is in a process group of its own. Otherwise Ctrl-C would reach it twice, from the
    terminal and from here, and the second one ends a training without saving.
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
        """Runs one training. Its standard output goes to standard error."""
        self._check_signal()
        command = [*TRAIN, *arguments]
        process = subprocess.Popen(command, stdout=2, process_group=0)
        self._process = process
        if self._received is not None:  # it arrived while the process was starting
            process.send_signal(self._received)
        try:
            code = process.wait()
        finally:
            self._process = None
        if code > 0 and code not in STOPPED:  # it failed, perhaps while it was stopping
            raise Stopped(code)
        self._check_signal()
        if code < 0:
            name = signal.Signals(-code).name
            raise Failure(
                f"the training in {arguments[-1]} was killed ({name}): run the same command again "
                "to continue"
            )
        if code:
            raise Stopped(code)

    def _check_signal(self) -> None:
        if self._received is not None:
            raise Stopped(130 if self._received == signal.SIGINT else 143)


def table_4(out: Path, *, resamples: int) -> Ablation:
    """Compares the trained runs in ``out``, and writes the result to ``ablate.json`` there.

    Raises:
        UserError: a run was not scored.
        Failure: a file is damaged, or the result cannot be written.
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
        classes=first.classes,
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


def read_ablation(path: Path) -> Ablation:
    """The ``ablate.json`` that ``table_4`` wrote. Raises Failure when it is damaged."""
    try:
        document = json.loads(path.read_text("utf-8"))
        rows = tuple(
            AblationRow(
                **row
                | {name: Estimate(**row[name]) for name in ("difference", "lost_percent")}
                | {"paper_lost_percent": tuple(row["paper_lost_percent"])}
            )
            for row in document["rows"]
        )
        baseline_map = Estimate(**document["baseline_mAP"])
        result = Ablation(**document | {"baseline_mAP": baseline_map, "rows": rows})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Failure(f"{path} is damaged: {error}") from error
    if [row.part for row in rows] != list(OFF):
        raise Failure(f"{path} is damaged: expected one row for each of {', '.join(OFF)}")
    return result


def _row(part: str, run: Path, c: Comparison) -> AblationRow:
    lost = Estimate(-c.percent.value, -c.percent.high, -c.percent.low)
    return AblationRow(part, str(run), c.map_b.value, c.difference, lost, c.p, TABLE_4[part])
