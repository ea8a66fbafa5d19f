"""The few steps that a plan's predictions rest on: which, measured, and kept for the next plan."""

import hashlib
import json
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from fastat.atomic import atomic_write_text
from fastat.data.shards import PackedSet
from fastat.environment import environment
from fastat.errors import Failure
from fastat.features import FEATURES
from fastat.profile.costmodel import BAR, Point, Work, count_work, left_out_errors
from fastat.profile.measure import Case, OutOfMemory, measure
from fastat.progress import progress

VERSION = 1
"""Of the file of points."""

SECONDS = {"cuda": 1.0, "cpu": 2.0}
"""That a point's steps are timed for, about, and at least two of them."""

BATCHES = {
    "cuda": {"logmel64": (64, 256), "fbank128": (16, 64)},
    "cpu": {"logmel64": (4, 12), "fbank128": (2, 4)},
}
"""By feature. Not one clip: what a step costs whatever its batch would hide what a clip costs."""

AST_STEPS = {
    "cuda": (("A3", 16, 64), ("A3", 16, 256), ("A3", 8, 64), ("A1", 16, 32), ("A1", 10, 16)),
    "cpu": (("A3", 16, 8), ("A3", 16, 16), ("A3", 8, 4), ("A1", 16, 2), ("A1", 10, 2)),
}
"""Procedure, stride, batch: from 100 to 1,212 patches. Other strides lie between, and share the
rates. No step is so short that Adam's pass over 86 M parameters would be much of it: plans are made
for batches that hide it."""

PROC_OF = {"logmel64": "A4", "fbank128": "A2"}
"""Whose steps stand for a feature's: with dropout where the paper has it in either procedure."""

MEASURED_AGAIN = 2
"""How often, at most, the points that the others find too slow are measured again."""


@dataclass(frozen=True)
class Setup:
    """What steps are taken with."""

    device: torch.device
    precision: str
    compile: bool
    clip_samples: int
    num_classes: int

    def case(self, model: str, proc: str, options: dict[str, Any], batch: int) -> Case:
        """A step."""
        return Case(
            model=model,
            proc=proc,
            options=options,
            batch=batch,
            precision=self.precision,
            compile=self.compile,
        )

    def key(self) -> dict[str, Any]:
        """What the kept points hold for."""
        env = environment(self.device)
        return {
            "numerics": env["numerics"],
            "versions": env["versions"],
            "precision": self.precision,
            "compile": self.compile,
            "clip_samples": self.clip_samples,
            "num_classes": self.num_classes,
            "version": VERSION,
        }


def cases_to_measure(pairs: Iterable[tuple[str, str]], setup: Setup) -> list[Case]:
    """The steps for (model, feature) pairs, the quickest kinds first.

    The AST's short sequences are measured for the long ones as well: they cost little.
    """
    pairs = set(pairs)
    kind = setup.device.type
    cases = [
        setup.case(model, PROC_OF[feature], {}, batch)
        for feature in BATCHES[kind]
        for model in sorted({m for m, f in pairs if f == feature and m != "ast"})
        for batch in BATCHES[kind][feature]
    ]
    ast_features = {f for m, f in pairs if m == "ast"}
    for proc, stride, batch in AST_STEPS[kind] if ast_features else ():
        case = setup.case("ast", proc, {"fstride": stride, "tstride": stride}, batch)
        if case.procedure.feature in ast_features | {"logmel64"}:
            cases.append(case)
    return cases


class Works:
    """The counted work of models; each is counted once."""

    def __init__(self, clip_samples: int, num_classes: int) -> None:
        self.size = clip_samples, num_classes
        self._of = cache(self._count)

    def __call__(self, case: Case) -> Work:
        """The batch plays no part."""
        return self._of(case.model, case.proc, json.dumps(case.options))

    def _count(self, model: str, proc: str, options: str) -> Work:
        case = Case(model=model, proc=proc, options=json.loads(options), batch=1)
        with torch.device("meta"):
            created = case.create(*self.size)
        feature = FEATURES[case.procedure.feature]
        return count_work(created, feature.num_frames(self.size[0]), feature.num_mels)


@dataclass(frozen=True)
class Known:
    """A measured step. ``value``: bytes, or seconds: the lower quartile, since what disturbs a step
    makes it longer."""

    model: str
    proc: str
    options: dict[str, Any]
    asked: int
    """The batch of ``cases_to_measure``."""
    batch: int
    """Less than ``asked`` where that did not fit."""
    value: float


@dataclass(frozen=True)
class Points:
    """What is known of a device."""

    seconds: list[Known]
    bytes: list[Known]
    measured: int
    """Steps measured just now; the others were kept from an earlier plan."""
    took: float
    """Seconds that this took."""
    date: str
    """Of the oldest."""
    path: Path

    @staticmethod
    def fitted(known: Iterable[Known], setup: Setup, works: Works) -> list[Point]:
        """As the cost model takes them."""
        return [
            Point(k.model, works(setup.case(k.model, k.proc, k.options, 1)), k.batch, k.value)
            for k in known
        ]


def points(
    cases: list[Case],
    setup: Setup,
    works: Works,
    folder: Path,
    open_set: Callable[[ExitStack], PackedSet],
    *,
    seconds: float | None,
    again: bool,
    note: Callable[[str], None],
) -> Points:
    """``cases`` and what was measured earlier on this device, from ``folder`` or measured now.

    Args:
        folder: where points are kept, in a file for each device and set of versions.
        open_set: opens what steps are taken from; called where there is something to measure.
        seconds: that a step is timed for, about; None: SECONDS.
        again: what is kept counts for nothing.
        note: is told what is about to be measured.

    Raises:
        Failure: the kept points are damaged, or not even one clip of a model fits.
    """
    key = setup.key()
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    path = folder / f"{name}.json"
    kept = _Kept(path, key, again=again)
    missing = [case for case in cases if not kept.has(case)]
    started = time.perf_counter()
    if missing:
        note(
            f"measuring {len(missing)} steps of {len({c.model for c in missing})} models for the "
            f"cost model; the next plan finds them in {path}"
        )
        with ExitStack() as stack:
            packed = open_set(stack)
            with progress("measuring", len(missing), "steps") as advance:
                for case in missing:
                    _measure(case, setup, packed, kept, seconds)
                    advance()
            for _ in range(MEASURED_AGAIN):
                slow = _too_slow(kept, setup, works)
                if not slow:
                    break
                note(f"measuring {len(slow)} again that took longer than the others let expect")
                for known in slow:
                    _measure_again(known, setup, packed, kept, seconds)
    took = time.perf_counter() - started
    return Points(kept.seconds, kept.bytes, len(missing), took, kept.date, path)


class _Kept:
    """The file of points, written after every one: a plan that is stopped goes on from there."""

    def __init__(self, path: Path, key: dict[str, Any], *, again: bool) -> None:
        self.path, self.key = path, key
        self.seconds: list[Known] = []
        self.bytes: list[Known] = []
        self.date = time.strftime("%Y-%m-%d")
        if path.exists() and not again:
            try:
                document = json.loads(path.read_text())
                self.seconds = [Known(**k) for k in document["seconds"]]
                self.bytes = [Known(**k) for k in document["bytes"]]
                self.date = str(document["date"])
            except (ValueError, TypeError, KeyError) as error:
                raise Failure(
                    f"{path} is damaged, or of another version of fastat: {error}; --measure-again "
                    "measures its points anew"
                ) from error

    def has(self, case: Case) -> bool:
        """Whether the step was measured."""
        asked = case.model, case.proc, case.options, case.batch
        return any((k.model, k.proc, k.options, k.asked) == asked for k in self.seconds)

    def quicker(self, known: Known, seconds: float) -> None:
        """Another measurement of a step; the lesser counts."""
        i = self.seconds.index(known)
        self.seconds[i] = replace(known, value=min(known.value, seconds))
        self._write()

    def add(self, case: Case, batch: int, seconds: float, peak_bytes: int) -> None:
        """A step measured at ``batch``."""
        what = case.model, case.proc, case.options, case.batch, batch
        self.bytes.append(Known(*what, peak_bytes))
        self.seconds.append(Known(*what, seconds))
        self._write()

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        document = {
            "key": self.key,
            "date": self.date,
            "seconds": [asdict(k) for k in self.seconds],
            "bytes": [asdict(k) for k in self.bytes],
        }
        atomic_write_text(self.path, json.dumps(document, indent=1) + "\n")


def _measure(
    case: Case, setup: Setup, packed: PackedSet, kept: _Kept, seconds: float | None
) -> None:
    seconds = SECONDS[setup.device.type] if seconds is None else seconds
    batch = case.batch
    while True:
        tried = setup.case(case.model, case.proc, case.options, batch)
        try:
            found = measure(tried, setup.device, packed, seconds=seconds)
            break
        except OutOfMemory:
            if batch == 1:
                raise
            batch //= 2
    kept.add(case, batch, found.ms["step"].low / 1e3, found.peak_bytes)


def _too_slow(kept: _Kept, setup: Setup, works: Works) -> list[Known]:
    """Points that the others predict to be quicker by more than BAR: something else may have had
    the machine."""
    if len(kept.seconds) < 3:
        return []
    errors = left_out_errors(Points.fitted(kept.seconds, setup, works))
    return [k for k, error in zip(kept.seconds, errors, strict=True) if error < -BAR]


def _measure_again(
    known: Known, setup: Setup, packed: PackedSet, kept: _Kept, seconds: float | None
) -> None:
    case = setup.case(known.model, known.proc, known.options, known.batch)
    seconds = SECONDS[setup.device.type] if seconds is None else seconds
    found = measure(case, setup.device, packed, seconds=seconds)
    kept.quicker(known, found.ms["step"].low / 1e3)
