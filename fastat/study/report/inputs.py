"""What ``fastat report`` reads: run folders, folders of runs, and the JSON of profiles."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fastat.study.ablate import RESULT_FILE, Ablation, read_ablation
from fastat.study.report.runs import Run, distinguish, numbers, read_run
from fastat.system.errors import Failure, UserError

PROFILE_SCHEMA = "fastat.profile/1"
MAX_DEPTH = 3
"""How many folders deep runs are searched for below a given folder."""

ROW_NUMBERS = (
    "fstride", "tstride", "patches", "paper_patches", "params", "gflop", "batch", "clips_per_s",
    "hours_per_epoch", "hours", "tflops", "percent_of_ceiling", "peak_memory_gib", "kwh",
    "paper_hours_per_epoch", "paper_hours", "paper_gpus", "paper_map",
)  # fmt: skip


@dataclass(frozen=True)
class ProfileRow:
    """A row of ``fastat profile --json``."""

    model: str
    proc: str
    precision: str
    grid: list[int] | None
    out_of_memory: bool
    step_ms: float | None
    """Median of the whole step; None if the step did not fit into the memory."""
    values: dict[str, float]
    """The numbers of ROW_NUMBERS that the row has."""

    @property
    def stride(self) -> str:
        """Strides of the AST's patches, frequency x time; empty for other models."""
        if "fstride" not in self.values:
            return ""
        return f"{self.values['fstride']:g}×{self.values['tstride']:g}"


@dataclass(frozen=True)
class Profile:
    """The JSON of ``fastat profile``."""

    path: Path
    name: str
    """The device, and the file if there are several profiles of the device."""
    conditions: str
    """Device, epoch, versions and date, in words."""
    rows: list[ProfileRow]


@dataclass
class Inputs:
    """Everything that the page shows."""

    runs: list[Run] = field(default_factory=list)
    ablations: list[Ablation] = field(default_factory=list)
    profiles: list[Profile] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What was left out, and why."""

    @property
    def counts(self) -> str:
        """How many runs and profiles there are, in words."""
        found = (("run", len(self.runs)), ("profile", len(self.profiles)))
        return ", ".join(f"{n} {word}{'s' * (n > 1)}" for word, n in found if n)


def read_inputs(paths: Sequence[Path]) -> Inputs:
    """Reads what ``paths`` name. A run that cannot be read is left out, and noted.

    Raises:
        UserError: a path does not exist, or is neither a folder with runs nor a profile.
        Failure: every run is damaged.
    """
    inputs = Inputs()
    found: dict[Path, Path] = {}  # resolved: a run that is given twice is shown once
    for path in paths:  # mistakes are reported before the runs are read, which takes a while
        if path.is_dir():
            files = list(_find(path, MAX_DEPTH))
            if not files:
                raise UserError(
                    f"{path}: expected a run or a folder of runs, found no config.json in it"
                )
            found |= {file.resolve(): file for file in files}
        elif path.exists():
            inputs.profiles.append(_read_profile(path))
        else:
            raise UserError(f"{path} does not exist")
    for file in found.values():
        try:
            if file.name == RESULT_FILE:
                inputs.ablations.append(read_ablation(file))
            else:
                inputs.runs.append(read_run(file.parent))
        except Failure as error:
            inputs.notes.append(f"left out: {error}")
    if not (inputs.runs or inputs.profiles):
        raise Failure("; ".join(inputs.notes))
    inputs.runs = distinguish(inputs.runs)
    names = [profile.name for profile in inputs.profiles]
    inputs.profiles = [
        replace(p, name=f"{p.name} ({p.path.name})") if names.count(p.name) > 1 else p
        for p in inputs.profiles
    ]
    return inputs


def _find(path: Path, depth: int) -> Iterator[Path]:
    """The ``config.json`` of every run, and every ``ablate.json``, in ``path`` and below it."""
    if (path / "config.json").is_file():
        yield path / "config.json"
        return
    if (path / RESULT_FILE).is_file():
        yield path / RESULT_FILE
    if depth:
        for folder in sorted(p for p in path.iterdir() if p.is_dir()):
            if not folder.name.startswith("."):
                yield from _find(folder, depth - 1)


def _read_profile(path: Path) -> Profile:
    try:
        document = json.loads(path.read_text("utf-8"))
        if document["schema"] != PROFILE_SCHEMA:
            raise ValueError(f"schema {document['schema']!r} is not {PROFILE_SCHEMA}")
        rows = [_profile_row(row) for row in document["rows"]]
        return Profile(path, document["device"], _conditions(document), rows)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: expected a run folder or the JSON of fastat profile "
            f"({type(error).__name__}: {error})"
        ) from error


def _profile_row(row: dict[str, Any]) -> ProfileRow:
    step = row["ms"] and row["ms"]["step"]
    return ProfileRow(
        model=row["model"],
        proc=row["proc"],
        precision=row["precision"],
        grid=row["grid"],
        out_of_memory=row["out_of_memory"],
        step_ms=numbers(step, ["median"])["median"] if step else None,
        values=numbers(row, ROW_NUMBERS),
    )


def _conditions(document: dict[str, Any]) -> str:
    words = [document["device"], f"epochs of {document['clips']:,.0f} clips"]
    for name in ("torch", "commit"):
        if document[name]:
            words.append(f"{name} {document[name]}")
    words.append(document["date"])
    if (ceiling := document["ceiling_tflops"]) is not None:
        words.append(f"matrix products at most {ceiling:.3g} TFLOP/s")
    return ", ".join(words)
