"""What to train within a budget: every model, procedure, stride and batch, ranked by the paper's
mAP, with the hours and the memory that a cost model predicts for this device.

Schema ``fastat.plan/1``.
"""

import math
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from fastat.compiling import keep_compiled
from fastat.config import TrainConfig, resolve
from fastat.data.shards import SAMPLE_RATE, PackedSet
from fastat.environment import environment
from fastat.features import CLIP_SAMPLES
from fastat.launch import cache_folder
from fastat.memory import memory_limit
from fastat.paper import NUM_CLASSES
from fastat.procedures import AST_STRIDE, ATTENTION_MODELS, small_set_sizes
from fastat.profile.cases import Choice
from fastat.profile.costmodel import BAR, CostModel, Point, Trust, Work, left_out_errors
from fastat.profile.plan_choices import paper_map
from fastat.profile.plan_points import Points, Setup, Works, cases_to_measure, points
from fastat.profile.run import Settings, opened
from fastat.system.device import device_name, supports_triton

SCHEMA = "fastat.plan/1"

WORTH_ANOTHER_BATCH = 0.05
"""Share of the hours that a batch larger than the procedure's has to save to be offered: the
paper's mAP is that of the procedure's."""

FITS, OVER_BUDGET, OVER_MEMORY = "fits", "over budget", "over memory"


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a training may take."""

    hours: float
    """inf: any number."""
    bytes: float
    given: bool
    """Whether the user set the memory; else it is what is free on the device."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A training that the plan ranks."""

    model: str
    proc: str
    feature: str
    fstride: int | None
    """AST: distance of patches along the mel axis; None for the other models."""
    tstride: int | None
    paper_map: float
    """Table 3's at the stride, else Table 2's; at the procedure's batch, on AudioSet."""
    batch: int
    procedure_batch: int
    """The procedure's, or what the rule for small sets makes of it."""
    accumulate: int
    """Parts that a batch is computed in."""
    epochs: int
    clips_per_s: float
    hours_per_epoch: float
    hours: float
    memory_gib: float
    verdict: str = FITS
    hours_over: float = 0.0
    gib_over: float = 0.0
    command: str = ""


# ---------------------------------------------------------------------------------- candidates
@dataclass(frozen=True)
class Predictor:
    """Seconds and bytes of a step of any choice at any batch."""

    seconds: CostModel
    bytes: CostModel
    work: Callable[[Choice], Work]

    def step_seconds(self, choice: Choice, batch: int, accumulate: int = 1) -> float:
        """A part of an accumulated batch is taken for a whole step: Adam's share counts N times."""
        part = self.seconds.predict(choice.model, self.work(choice), batch // accumulate)
        return accumulate * part

    def step_bytes(self, choice: Choice, batch: int) -> float:
        return self.bytes.predict(choice.model, self.work(choice), batch)

    def largest_batch(self, choice: Choice, limit: float) -> int:
        """That takes at most ``limit`` bytes."""
        return self.bytes.largest_batch(choice.model, self.work(choice), limit)


def candidates(
    choices: Sequence[Choice],
    predict: Predictor,
    limits: Limits,
    *,
    clips: int,
    clip_seconds: float,
    command: Callable[[Candidate], str],
) -> list[Candidate]:
    """Every choice at each batch worth offering, in the order of the plan.

    The order: what fits, then what is over the budget, then what is over the memory; in each by the
    paper's mAP, the highest first, then by hours.
    """
    found = []
    for choice in choices:
        config = resolve(
            choice.proc, choice.model, {"data": ""}, num_clips=clips, clip_seconds=clip_seconds
        )
        small = small_set_sizes(choice.procedure, clips) is not None
        most = min(clips, predict.largest_batch(choice, limits.bytes))
        first: Candidate | None = None
        for batch, accumulate in batches(choice.model, config.batch, most, small=small):
            made = _candidate(choice, config, predict, limits, batch, accumulate, clips)
            if first is None or made.hours < (1 - WORTH_ANOTHER_BATCH) * first.hours:
                found.append(replace(made, command=command(made)))
            first = first or made
    order = (FITS, OVER_BUDGET, OVER_MEMORY)
    return sorted(found, key=lambda c: (order.index(c.verdict), -c.paper_map, c.hours))


def batches(model: str, usual: int, most: int, *, small: bool) -> list[tuple[int, int]]:
    """(batch, parts it is computed in) to offer where ``most`` clips fit.

    ``usual`` where it fits, and the largest multiple of it that does (of a small set, whose batch a
    rule of its own keeps down, no other). Where it does not fit: half of it, a quarter and so on
    for models of Transformer layers, which accumulation breaks (the paper); for the others
    ``usual`` in the fewest equal parts.
    """
    if usual <= most:
        larger = most // usual * usual
        return [(usual, 1)] + ([(larger, 1)] if larger > usual and not small else [])
    if most < 1:
        return [(1, 1)]  # which does not fit: the plan says by how much
    if model in ATTENTION_MODELS:
        batch = usual
        while batch > most:
            batch //= 2
        return [(batch, 1)]
    parts = next(n for n in range(2, usual + 1) if usual % n == 0 and usual // n <= most)
    return [(usual, parts)]


def _candidate(
    choice: Choice,
    config: TrainConfig,
    predict: Predictor,
    limits: Limits,
    batch: int,
    accumulate: int,
    clips: int,
) -> Candidate:
    step = predict.step_seconds(choice, batch, accumulate)
    hours_per_epoch = clips // batch * step / 3600
    hours = config.epochs * hours_per_epoch
    taken = predict.step_bytes(choice, batch // accumulate)
    verdict = OVER_BUDGET if hours > limits.hours else FITS
    if taken > limits.bytes:
        verdict = OVER_MEMORY
    return Candidate(
        model=choice.model,
        proc=choice.proc,
        feature=choice.procedure.feature,
        fstride=choice.options.get("fstride"),
        tstride=choice.options.get("tstride"),
        paper_map=paper_map(choice),
        batch=batch,
        procedure_batch=config.batch,
        accumulate=accumulate,
        epochs=config.epochs,
        clips_per_s=batch / step,
        hours_per_epoch=hours_per_epoch,
        hours=hours,
        memory_gib=taken / 2**30,
        verdict=verdict,
        hours_over=max(0.0, hours - limits.hours),
        gib_over=max(0.0, taken - limits.bytes) / 2**30,
    )


def nearest_miss(found: Sequence[Candidate], verdict: str) -> Candidate | None:
    """Of the candidates with a verdict the one that misses by the least: of those that would be
    ranked above all that fit, if there are any."""
    missed = [c for c in found if c.verdict == verdict]
    reached = max((c.paper_map for c in found if c.verdict == FITS), default=0.0)
    better = [c for c in missed if c.paper_map > reached] or missed
    return min(better, key=lambda c: (c.gib_over, c.hours_over), default=None)


def train_command(candidate: Candidate, settings: Settings, device: torch.device) -> str:
    """The ``fastat train`` of a candidate."""
    c = candidate
    words = ["fastat", "train", "--proc", c.proc, "--model", c.model]
    if c.fstride is not None and c.fstride != AST_STRIDE[c.proc]:
        words += ["--stride", f"{c.fstride}x{c.tstride}"]
    if c.batch != c.procedure_batch:
        words += ["--batch", str(c.batch)]
    if c.accumulate > 1:
        words += ["--accumulate", str(c.accumulate)]
    words += ["--precision", settings.precision]
    if settings.compile is not None and settings.compile != supports_triton(device):
        words.append("--compile" if settings.compile else "--no-compile")
    words += ["--data", "packed/train" if settings.data is None else str(settings.data)]
    if settings.data is None:
        words += ["--eval", "packed/eval"]
    return shlex.join(words)


# ---------------------------------------------------------------------------------- the plan
def plan(
    choices: Sequence[Choice],
    device: torch.device,
    settings: Settings,
    budget: tuple[float, float | None],
    *,
    measure_again: bool,
) -> dict[str, Any]:
    """The document of ``fastat profile --plan``.

    Args:
        choices: as ``planned`` gives them.
        budget: as ``parse_limits`` gives it.
        measure_again: nothing that was measured earlier counts.

    Raises:
        UserError: ``settings.data`` is no packed set.
        Failure: the points kept earlier are damaged, or not a clip of a model fits.
    """
    sizes = CLIP_SAMPLES, NUM_CLASSES
    if settings.data is not None:
        with closing(PackedSet.open(settings.data)) as packed:
            sizes = packed.clip_samples, len(packed.classes)
    compiled = supports_triton(device) if settings.compile is None else settings.compile
    if compiled:
        keep_compiled(cache_folder() / "compiled")
    setup = Setup(device, settings.precision, compiled, *sizes)
    hours, memory = budget
    limits = Limits(
        hours=hours,
        bytes=memory_limit(device) if memory is None else memory,
        given=memory is not None,
    )
    cases = cases_to_measure({(c.model, c.procedure.feature) for c in choices}, setup)
    works = Works(*sizes)
    known = points(
        cases,
        setup,
        works,
        cache_folder() / "plan",
        lambda stack: opened(settings.data, stack),
        seconds=settings.seconds,
        again=measure_again,
        note=lambda text: print(text, file=sys.stderr, flush=True),
    )
    seconds = Points.fitted(known.seconds, setup, works)
    taken = Points.fitted(known.bytes, setup, works)
    predict = Predictor(
        CostModel.fit(seconds),
        CostModel.fit(taken),
        lambda c: works(setup.case(c.model, c.proc, c.options, 1)),
    )
    found = candidates(
        choices, predict, limits,
        clips=settings.clips, clip_seconds=sizes[0] / SAMPLE_RATE,
        command=lambda c: train_command(c, settings, device),
    )  # fmt: skip
    env = environment(device)
    return {
        "schema": SCHEMA,
        "device": device_name(device),
        "torch": torch.__version__,
        "commit": env["commit"] and env["commit"][:7],
        "date": time.strftime("%Y-%m-%d"),
        "clips": settings.clips,
        "precision": settings.precision,
        "compiled": compiled,
        "budget_hours": None if hours == math.inf else hours,
        "memory_gib": limits.bytes / 2**30,
        "memory_given": limits.given,
        "points": {
            "measured_now": known.measured,
            "seconds_taken": known.took,
            "date": known.date,
            "path": str(known.path),
        },
        "prediction_error": _trust(known, seconds, "seconds"),
        "memory_error": _trust(known, taken, "bytes"),
        **answer(found),
    }


def answer(found: Sequence[Candidate]) -> dict[str, Any]:
    """The candidates, the best of them, and what misses the limits by how much."""
    missed = {}
    for name, verdict in (("over_budget", OVER_BUDGET), ("over_memory", OVER_MEMORY)):
        nearest = nearest_miss(found, verdict)
        missed[name] = {
            "count": sum(c.verdict == verdict for c in found),
            "nearest": None if nearest is None else asdict(nearest),
        }
    fitting = [c for c in found if c.verdict == FITS]
    in_memory = [c for c in found if c.verdict != OVER_MEMORY]
    quickest = min(in_memory, key=lambda c: c.hours, default=None)
    return {
        "best": asdict(fitting[0]) if fitting else None,
        "smallest_budget": None if quickest is None else asdict(quickest),
        **missed,
        "candidates": [asdict(c) for c in found],
    }


def _trust(known: Points, fitted: Sequence[Point], what: str) -> dict[str, Any] | None:
    """What leaving out each point in turn shows; None where there is but one."""
    if len(fitted) < 2:
        return None
    errors = left_out_errors(fitted)
    trust = Trust.of(errors)
    listed = getattr(known, what)
    of_points = [asdict(k) | {"error": error} for k, error in zip(listed, errors, strict=True)]
    return {
        "points": len(errors),
        "median": trust.median,
        "worst": trust.worst,
        "worst_point": of_points[trust.worst_point],
        "bar": BAR,
        "left_out": of_points,
    }
