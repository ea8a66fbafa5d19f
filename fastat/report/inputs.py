"""What ``fastat report`` is given: run folders, folders of them, profiles, benchmark results."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fastat.errors import Failure, UserError
from fastat.report.runs import Run, read_run, told_apart

PROFILE_SCHEMA = "fastat.profile/1"
MAX_DEPTH = 3
"""Folders below one that is given in which runs are looked for."""

PROFILE_TEXTS = ("model", "proc")
PROFILE_NUMBERS = ("params", "gflop", "batch")
BENCH_TEXTS = ("op", "shape", "passes", "impl")


@dataclass(frozen=True)
class Profile:
    """The JSON of ``fastat profile``."""

    path: Path
    device: str
    name: str
    """The device, and which file where there are several of it."""
    document: dict[str, Any]
    rows: list[dict[str, Any]]


@dataclass(frozen=True)
class Bench:
    """The results of a device, as ``bench/`` keeps them."""

    path: Path
    device: str
    rows: list[dict[str, Any]]


@dataclass
class Inputs:
    """Everything that the page is made of."""

    runs: list[Run] = field(default_factory=list)
    profiles: list[Profile] = field(default_factory=list)
    benches: list[Bench] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What was left out, and why."""

    @property
    def counts(self) -> str:
        """How many there are of each kind, in words."""
        numbers = {
            ("run", "runs"): len(self.runs),
            ("profile", "profiles"): len(self.profiles),
            ("set of benchmark results", "sets of benchmark results"): len(self.benches),
        }
        return ", ".join(f"{n} {words[n > 1]}" for words, n in numbers.items() if n)


def read_inputs(paths: Sequence[Path]) -> Inputs:
    """Reads what ``paths`` name; what a folder of runs holds that is no run is left out, and noted.

    Raises:
        UserError: a path that does not exist, or is none of these.
        Failure: a run, named itself, whose ``config.json`` is damaged.
    """
    inputs = Inputs()
    seen: set[Path] = set()
    for path in paths:  # the mistakes first: reading the runs takes a while
        if not path.exists():
            raise UserError(f"{path} does not exist")
        if path.is_file() and path.resolve() not in seen:
            _read_json(path, inputs)
            seen.add(path.resolve())
        elif path.is_dir() and not _run_folders(path, MAX_DEPTH):
            raise UserError(
                f"{path}: expected a run or a folder of runs, found no config.json in it"
            )
    for path in paths:
        if not path.is_dir():
            continue
        for folder in _run_folders(path, MAX_DEPTH):
            if folder.resolve() in seen:
                inputs.notes.append(f"{folder} is given twice, and shown once")
                continue
            seen.add(folder.resolve())
            try:
                inputs.runs.append(read_run(folder))
            except Failure as error:
                if folder == path:
                    raise
                inputs.notes.append(f"left out: {error}")
    inputs.runs = told_apart(inputs.runs)
    devices = [profile.device for profile in inputs.profiles]
    inputs.profiles = [
        replace(p, name=f"{p.device} ({p.path.name})") if devices.count(p.device) > 1 else p
        for p in inputs.profiles
    ]
    if not (inputs.runs or inputs.profiles or inputs.benches):
        raise Failure("; ".join(inputs.notes))
    return inputs


def _run_folders(path: Path, depth: int) -> list[Path]:
    if (path / "config.json").is_file():
        return [path]
    if not depth:
        return []
    folders = sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
    return [run for folder in folders for run in _run_folders(folder, depth - 1)]


def _read_json(path: Path, inputs: Inputs) -> None:
    try:
        document = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        more = ""
        if path.suffix == ".jsonl":
            more = "; python -m bench.compare --save makes it of results.jsonl"
        raise UserError(
            f"{path}: expected a run folder, or the JSON of fastat profile or of bench/, "
            f"got no JSON ({error}){more}"
        ) from None
    if not isinstance(document, dict):
        raise UserError(f"{path}: expected a JSON object, got {type(document).__name__}")
    schema = document.get("schema")
    if schema == PROFILE_SCHEMA:
        rows = _rows(path, document, "rows", PROFILE_TEXTS, PROFILE_NUMBERS)
        device = document["device"]
        inputs.profiles.append(Profile(path, device, device, document, rows))
    elif schema is None and "results" in document:
        rows = _rows(path, document, "results", BENCH_TEXTS, ("ms",))
        inputs.benches.append(Bench(path, document["device"], rows))
    elif schema is not None:
        raise UserError(f"{path}: expected schema {PROFILE_SCHEMA}, got {schema!r}")
    else:
        raise UserError(
            f'{path}: expected {{"schema": "{PROFILE_SCHEMA}", ...}} of fastat profile --json or '
            f'{{"device", "results"}} of bench/, got the keys {", ".join(list(document)[:8])}'
        )


def _rows(
    path: Path,
    document: dict[str, Any],
    key: str,
    texts: tuple[str, ...],
    numbers: tuple[str, ...],
) -> list[dict[str, Any]]:
    """The rows under ``key``. Raises UserError where they lack what every one of them must have."""
    if not isinstance(document.get("device"), str):
        raise UserError(f"{path}: expected the name of a device, got {document.get('device')!r}")
    rows = document.get(key)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path}: expected a list of objects as {key}")
    for number, row in enumerate(rows):
        for name in texts:
            if not isinstance(row.get(name), str):
                raise UserError(f"{path}: {key}[{number}]: expected {name}, got {row.get(name)!r}")
        for name in numbers:
            if number_of(row, name, path) is None:
                raise UserError(f"{path}: {key}[{number}]: expected the number {name}, got none")
    return rows


def number_of(row: dict[str, Any], name: str, path: Path) -> float | None:
    """A number of a row, ``.`` between the names of objects in objects; None: not measured.

    Raises:
        UserError: it is something else.
    """
    value: Any = row
    for part in name.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    if value is not None and (type(value) not in (int, float) or abs(value) > 1e300):
        raise UserError(f"{path}: expected a number as {name}, got {value!r}")
    return value if value == value else None  # NaN, which Python's JSON has
