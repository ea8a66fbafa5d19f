"""A training run as the report shows it, read from its folder, finished or not."""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from fastat.config import TrainConfig
from fastat.data.shards import read_index, sizes_of
from fastat.errors import Failure, UserError
from fastat.predictions import PREDICTIONS_FILE, read_predictions
from fastat.procedures import PROCEDURES, Procedure, model_options, procedure_of
from fastat.report.curves import Curves, class_curves

EPOCH_NUMBERS = (
    "lr", "train_loss", "clips_per_s", "epoch_s", "peak_memory_gib", "eval_loss", "mAP", "AUC",
    "d_prime",
)  # fmt: skip

LARGEST = 1e300
"""JSON has whole numbers that no float can be."""


@dataclass(frozen=True)
class Epoch:
    """A line of ``metrics.jsonl``."""

    epoch: int
    step: int
    values: dict[str, float]
    """By EPOCH_NUMBERS; what is null or not there is left out."""


@dataclass(frozen=True)
class EvalSet:
    """A set that runs are scored on."""

    key: str
    """Of its clips and classes where a run's predictions name them, else of its path."""
    path: str
    clips: int | None
    classes: int | None

    @property
    def name(self) -> str:
        """The end of its path."""
        return "/".join(Path(self.path).parts[-2:])

    @property
    def size(self) -> str:
        """Clips and classes, in words."""
        clips = "unknown number of" if self.clips is None else f"{self.clips:,}"
        classes = "unknown number of" if self.classes is None else f"{self.classes:,}"
        return f"{clips} clips, {classes} classes"


@dataclass(frozen=True)
class Run:
    """A run folder."""

    path: Path
    name: str
    """The end of its path, as long as it takes to tell it from the other runs."""
    config: TrainConfig
    device: str | None
    commit: str | None
    epochs: list[Epoch]
    predictions: Curves | None
    train_clips: int | None
    clips_source: str
    """Where ``train_clips`` is from."""
    eval_set: EvalSet | None
    gaps: list[str]
    """What is missing or damaged, in words."""

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
        """Of training, scoring left out."""
        return sum(e.values.get("epoch_s", 0.0) for e in self.epochs) / 3600

    def noise_scale(self, lr: float) -> float | None:
        """g = LR (N / B - 1) of the paper, section 4.3."""
        if self.train_clips is None:
            return None
        return noise_scale(lr, self.train_clips, self.config.batch)


def noise_scale(lr: float, num_clips: int, batch: int) -> float:
    """g = LR (N / B - 1): how strongly the noise of a step's sample moves the weights.

    Source: "AudioTagging Done Right", section 4.3.
    """
    return lr * (num_clips / batch - 1)


def read_run(path: Path) -> Run:
    """The run in the folder ``path``; what is not there yet, or damaged, stands in its ``gaps``.

    Raises:
        Failure: ``config.json`` is damaged.
    """
    config = TrainConfig.load(path / "config.json")
    if config.proc not in PROCEDURES:
        raise Failure(f"{path / 'config.json'} is damaged: unknown procedure {config.proc!r}")
    gaps: list[str] = []
    environment = _read_environment(path, gaps)
    epochs = _read_epochs(path, gaps)
    if len(epochs) < config.epochs and (
        config.steps is None or not epochs or epochs[-1].step < config.steps
    ):
        gaps.append(f"{len(epochs)} of {config.epochs} epochs are there")
    predictions = None
    if config.eval is None:
        gaps.append("trained without an evaluation set: no scores")
    elif not (path / PREDICTIONS_FILE).is_file():
        gaps.append("no predictions.h5: nothing by class")
    else:
        try:
            predictions = class_curves(read_predictions(path / PREDICTIONS_FILE))
        except Failure as error:
            gaps.append(str(error))
    train_clips, source = _train_clips(config, epochs)
    return Run(
        path=path,
        name=path.resolve().name,
        config=config,
        device=environment.get("device"),
        commit=environment.get("commit"),
        epochs=epochs,
        predictions=predictions,
        train_clips=train_clips,
        clips_source=source,
        eval_set=_eval_set(config, predictions),
        gaps=gaps,
    )


def _read_environment(path: Path, gaps: list[str]) -> dict[str, str]:
    try:
        document = json.loads((path / "env.json").read_text("utf-8"))
    except FileNotFoundError:
        gaps.append("no env.json: device and commit are unknown")
        return {}
    except (OSError, ValueError, RecursionError) as error:
        gaps.append(f"env.json is damaged: {error}")
        return {}
    if not isinstance(document, dict):
        gaps.append("env.json is damaged: expected an object")
        return {}
    return {k: v for k, v in document.items() if isinstance(v, str)}


def _read_epochs(path: Path, gaps: list[str]) -> list[Epoch]:
    """The lines of ``metrics.jsonl``; of an epoch that is there twice, the later one."""
    try:
        lines = (path / "metrics.jsonl").read_text("utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []
    epochs: dict[int, Epoch] = {}
    for number, line in enumerate(lines, 1):
        try:
            epoch = _epoch(json.loads(line))
        except (ValueError, RecursionError) as error:
            gaps.append(f"metrics.jsonl, line {number} is damaged and left out: {error}")
        else:
            epochs[epoch.epoch] = epoch
    return [epochs[number] for number in sorted(epochs)]


def _epoch(line: Any) -> Epoch:
    """Raises ValueError for what is no line of metrics."""
    if not isinstance(line, dict):
        raise ValueError("expected an object")
    epoch, step = line.get("epoch"), line.get("step")
    if type(epoch) is not int or type(step) is not int or epoch < 1 or step < 0:
        raise ValueError(f"epoch {epoch!r}, step {step!r}")
    values = {}
    for name in EPOCH_NUMBERS:
        value = line.get(name)
        if value is None:
            continue
        if type(value) not in (int, float) or not abs(value) < LARGEST:
            raise ValueError(f"{name} {value!r}"[:80])
        values[name] = float(value)
    return Epoch(epoch, step, values)


def _train_clips(config: TrainConfig, epochs: list[Epoch]) -> tuple[int | None, str]:
    """Clips of the training set: of its index, where it is still there and fits, or of the steps.

    An epoch drops the clips that fill no batch, so steps x batch may be less by up to a batch.
    """
    whole = [e for e in epochs if e.step and e.step != config.steps and not e.step % e.epoch]
    steps = whole[0].step // whole[0].epoch if whole else None
    try:
        clips, _ = sizes_of(Path(config.data))
    except (UserError, Failure, OSError):  # moved, or of another machine: the steps know too
        clips = None
    if clips is not None and (steps is None or clips // config.batch == steps):
        return clips, "its index"
    if steps is None:
        return None, "unknown"
    return steps * config.batch, "steps × batch"


def _eval_set(config: TrainConfig, predictions: Curves | None) -> EvalSet | None:
    if config.eval is None:
        return None
    if predictions is not None:
        text = "\0".join([*sorted(predictions.ids), "", *predictions.clips])
        key = hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()
        return EvalSet(key, config.eval, len(predictions.clips), len(predictions.ids))
    try:
        clips, _ = sizes_of(Path(config.eval))
        classes = read_index(Path(config.eval)).get("classes")
    except (UserError, Failure, OSError):  # then the report says that they are unknown
        return EvalSet(config.eval, config.eval, None, None)
    num_classes = len(classes) if isinstance(classes, list) else None
    return EvalSet(config.eval, config.eval, clips, num_classes)


def told_apart(runs: Sequence[Run]) -> list[Run]:
    """The runs with names that differ, and those without predictions on the sets of the others."""
    names = _short_names([run.path for run in runs])
    known = {r.eval_set.path: r.eval_set for r in runs if r.eval_set and r.predictions}
    told = []
    for run, name in zip(runs, names, strict=True):
        eval_set = run.eval_set
        if eval_set is not None and run.predictions is None:
            eval_set = known.get(eval_set.path, eval_set)
        told.append(replace(run, name=name, eval_set=eval_set))
    return told


def _short_names(paths: list[Path]) -> list[str]:
    """The shortest ends of the paths that differ from one another."""
    parts = [path.resolve().parts for path in paths]
    names = ["/".join(p[-1:]) for p in parts]
    for length in range(2, max(map(len, parts), default=0) + 1):
        twice = {name for name in names if names.count(name) > 1}
        if not twice:
            break
        names = [
            "/".join(p[-length:]) if name in twice else name
            for p, name in zip(parts, names, strict=True)
        ]
    return names


def departures(config: TrainConfig) -> list[str]:
    """In what a run differs from its procedure in Table 1 and the model's defaults, in words."""
    procedure = procedure_of(config.proc, config.model)
    found = []
    for name in COMPARED:
        ours, paper = getattr(config, name), getattr(procedure, name)
        if ours != paper:
            found.append(f"{name.replace('_', ' ')} {_short(ours)} instead of {_short(paper)}")
    expected = model_options(config.model, procedure)
    for name, value in config.model_options.items():
        if name not in expected:
            found.append(f"model {name} {_short(value)}")
        elif value != expected[name]:
            found.append(f"model {name} {_short(value)} instead of {_short(expected[name])}")
    if not config.normalize:
        found.append("no normalisation")
    if config.init is not None:
        found.append("weights from another checkpoint")
    if config.schedule != "step":
        found.append(f"schedule {config.schedule}")
    if config.steps is not None:
        found.append(f"ended after {config.steps} steps")
    return found


COMPARED = tuple(
    f.name
    for f in fields(Procedure)
    if f.name in {g.name for g in fields(TrainConfig)} and f.name not in ("name", "preset")
)
"""The fields that a run and a procedure share."""


def _short(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)
