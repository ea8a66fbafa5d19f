"""A training run as the report shows it, read from its folder, finished or not."""

import hashlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from fastat.config.paper import TABLE_2
from fastat.config.procedures import PROCEDURES, Procedure, model_options
from fastat.config.run import TrainConfig
from fastat.data.shards import sizes_of
from fastat.evaluation.predictions import PREDICTIONS_FILE, read_predictions
from fastat.study.report.curves import Curves, class_curves
from fastat.system.errors import Failure, UserError, first_line

EPOCH_NUMBERS = (
    "lr", "train_loss", "clips_per_s", "epoch_s", "eval_loss", "mAP", "AUC", "d_prime",
)  # fmt: skip


@dataclass(frozen=True)
class Epoch:
    """A line of ``metrics.jsonl``."""

    epoch: int
    step: int
    values: dict[str, float]
    """The numbers of EPOCH_NUMBERS that the line has."""


@dataclass(frozen=True)
class EvalSet:
    """A set that runs are scored on."""

    key: str
    """The same for sets of the same clips and classes."""
    path: str
    clips: int
    classes: int

    @property
    def name(self) -> str:
        """The last two parts of its path."""
        return "/".join(Path(self.path).parts[-2:])

    @property
    def size(self) -> str:
        """The number of clips and classes, in words."""
        return f"{self.clips:,} clips, {self.classes:,} classes"


@dataclass(frozen=True)
class Run:
    """A run folder."""

    path: Path
    name: str
    """Its path below the folder that all runs of the page share."""
    config: TrainConfig
    device: str
    commit: str | None
    epochs: list[Epoch]
    predictions: Curves | None
    """None before the first score, or if ``predictions.h5`` was deleted."""
    train_clips: int | None
    clips_source: str
    """Where ``train_clips`` comes from."""
    eval_set: EvalSet | None
    """None without ``predictions``, which name its clips and classes."""

    @property
    def best(self) -> Epoch | None:
        """The epoch of the highest mAP."""
        scored = [e for e in self.epochs if "mAP" in e.values]
        return max(scored, key=lambda e: e.values["mAP"], default=None)

    @property
    def best_map(self) -> float:
        """NaN before the first score."""
        return self.best.values["mAP"] if self.best else math.nan

    @property
    def hours(self) -> float:
        """Hours of training without scoring."""
        return sum(e.values.get("epoch_s", 0.0) for e in self.epochs) / 3600

    def noise_scale(self, lr: float) -> float | None:
        """g = LR (N / B - 1) of the paper, section 4.3."""
        if self.train_clips is None:
            return None
        return noise_scale(lr, self.train_clips, self.config.batch)


def noise_scale(lr: float, num_clips: int, batch: int) -> float:
    """g = LR (N / B - 1): how strongly the sampling noise of a step moves the weights.

    Source: "AudioTagging Done Right", section 4.3.
    """
    return lr * (num_clips / batch - 1)


def read_run(path: Path) -> Run:
    """The run in the folder ``path``. A run that has not finished has fewer epochs and scores.

    Raises:
        Failure: a file of the run is missing or damaged.
    """
    config = TrainConfig.load(path / "config.json")
    if config.proc not in PROCEDURES or config.model not in TABLE_2:
        raise Failure(
            f"{path / 'config.json'} is damaged: unknown procedure {config.proc!r} "
            f"or model {config.model!r}"
        )
    with reading(path / "env.json") as file:
        environment = json.loads(file.read_text("utf-8"))
        device, commit = environment["device"], environment["commit"]
    epochs: list[Epoch] = []
    predictions = eval_set = None
    if (path / "metrics.jsonl").is_file():
        with reading(path / "metrics.jsonl") as file:
            epochs = [_epoch(json.loads(line)) for line in file.read_text("utf-8").splitlines()]
    if config.eval is not None and (path / PREDICTIONS_FILE).is_file():
        with reading(path / PREDICTIONS_FILE) as file:
            predictions = class_curves(read_predictions(file))
        eval_set = _eval_set(config.eval, predictions)
    train_clips, source = _train_clips(config, epochs)
    return Run(
        path=path,
        name=path.resolve().name,
        config=config,
        device=device,
        commit=commit,
        epochs=epochs,
        predictions=predictions,
        train_clips=train_clips,
        clips_source=source,
        eval_set=eval_set,
    )


@contextmanager
def reading(path: Path) -> Iterator[Path]:
    """Yields ``path``. Raises Failure with the path for whatever a damaged file raises."""
    try:
        yield path
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise Failure(f"{path} is missing or damaged ({reason})") from error


def numbers(document: dict[str, Any], names: Sequence[str]) -> dict[str, float]:
    """The numbers under ``names``, without those that are null or absent.

    Raises:
        ValueError: something else is in a number's place.
    """
    found = {}
    for name in names:
        value = document.get(name)
        if value is None:
            continue
        if type(value) not in (int, float) or not abs(value) < 1e300:
            raise ValueError(f"expected a number as {name}, got {value!r}")
        found[name] = float(value)
    return found


def _epoch(line: dict[str, Any]) -> Epoch:
    return Epoch(line["epoch"], line["step"], numbers(line, EPOCH_NUMBERS))


def _train_clips(config: TrainConfig, epochs: list[Epoch]) -> tuple[int | None, str]:
    """The number of training clips, and where it comes from.

    It is read from the set's index if the set is still there and matches the steps of an epoch.
    Otherwise it is steps x batch, which is up to one batch too few: an epoch drops the clips that
    fill no batch.
    """
    whole = [e for e in epochs if e.step != config.steps and e.step % e.epoch == 0]
    steps = whole[0].step // whole[0].epoch if whole else None
    clips = _set_size(config.data)
    if clips is not None and (steps is None or clips // config.batch == steps):
        return clips, "its index"
    if steps is None:
        return None, "unknown"
    return steps * config.batch, "steps × batch"


def _set_size(path: str) -> int | None:
    """Clips of a packed set; None where it was moved, or is on another machine."""
    try:
        return sizes_of(Path(path))[0]
    except (UserError, Failure, OSError):
        return None


def _eval_set(path: str, predictions: Curves) -> EvalSet:
    text = "\0".join([*sorted(predictions.ids), "", *predictions.clips])
    key = hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()
    return EvalSet(key, path, len(predictions.clips), len(predictions.ids))


def distinguish(runs: Sequence[Run]) -> list[Run]:
    """The runs, each named by its path below the folder that they share."""
    paths = [run.path.resolve() for run in runs]
    common = os.path.commonpath([path.parent for path in paths]) if paths else ""
    return [
        replace(run, name=str(path.relative_to(common)))
        for run, path in zip(runs, paths, strict=True)
    ]


COMPARED = tuple(
    f.name
    for f in fields(Procedure)
    if f.name in {g.name for g in fields(TrainConfig)} and f.name not in ("name", "preset")
)
"""The fields that a run and a procedure share."""


def departures(config: TrainConfig) -> list[str]:
    """How a run differs from its procedure in Table 1 and from the model's defaults, in words."""
    procedure = PROCEDURES[config.proc]
    found = []
    for name in COMPARED:
        ours, paper = getattr(config, name), getattr(procedure, name)
        if ours != paper:
            found.append(f"{name.replace('_', ' ')} {setting(ours)} instead of {setting(paper)}")
    expected = model_options(config.model, procedure)
    for name, value in config.model_options.items():
        if name not in expected:
            found.append(f"model {name} {setting(value)}")
        elif value != expected[name]:
            found.append(f"model {name} {setting(value)} instead of {setting(expected[name])}")
    if not config.normalize:
        found.append("no normalisation")
    if config.init is not None:
        found.append("weights from another checkpoint")
    if config.schedule != "step":
        found.append(f"schedule {config.schedule}")
    if config.steps is not None:
        found.append(f"ended after {config.steps} steps")
    return found


def setting(value: object) -> str:
    """A setting as the page prints it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)
