"""What ``fastat profile`` is asked for: models, procedures, strides, the batch and the budget.

Imports no torch, so that a mistake on the command line is answered at once.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fastat.config import parse_settings, parse_stride
from fastat.errors import UserError, nearest
from fastat.paper import TABLE_2, TABLE_3
from fastat.procedures import AST_STRIDE, PROCEDURES, Procedure, small_set_sizes

CPU_BATCH = {"logmel64": 4, "fbank128": 1}
"""Default number of clips in a step on a CPU, by feature: both are about 100,000 numbers."""

MAX_STRIDE = 16
"""Width of a patch: a larger stride would leave gaps between patches."""


@dataclass(frozen=True)
class Choice:
    """A model under a procedure."""

    model: str
    proc: str
    options: dict[str, Any] = field(default_factory=dict)
    """Keyword options of create_model, on top of the procedure's."""

    @property
    def procedure(self) -> Procedure:
        """The procedure of Table 1."""
        return PROCEDURES[self.proc]


@dataclass(frozen=True)
class Budget:
    """What a training may take; None: any amount.

    Raises:
        UserError: a limit is not a positive, finite number.
    """

    hours: float | None = None
    memory_gib: float | None = None

    def __post_init__(self) -> None:
        limits = (("--budget-hours", self.hours), ("--memory-gib", self.memory_gib))
        for option, value in limits:
            if value is not None and not 0 < value < math.inf:
                raise UserError(f"{option} takes a positive number, got {value:g}")


def choices(
    procs: Sequence[str], models: Sequence[str], strides: str | None, settings: Sequence[str]
) -> list[Choice]:
    """The cases to measure, sorted by procedure.

    Args:
        procs, models: names; empty: all, of which the filled cells of Table 2 are taken.
        strides: only the AST, under the procedures of Table 3, at each of these strides.
        settings: ``model.KEY=value`` for every model.

    Raises:
        UserError: a name or stride is unknown or repeated, or nothing remains.
    """
    _known("--proc", procs, PROCEDURES)
    _known("--model", models, TABLE_2)
    parsed = parse_settings(list(settings))
    options = parsed.pop("model_options", {})
    if parsed:
        raise UserError(f"--set of profile takes model.KEY=value, got {next(iter(parsed))}")
    if strides is not None:
        if any(model != "ast" for model in models):
            raise UserError(f"--strides is for ast, got --model {' '.join(models)}")
        pairs = parse_strides(strides)
        if twice := options.keys() & pairs[0]:
            raise UserError(f"--strides and --set model.{min(twice)} exclude each other")
        return [
            Choice("ast", proc, options | pair)
            for proc in sorted(procs or TABLE_3)
            for pair in pairs
        ]
    found = [
        Choice(model, proc, options)
        for proc in sorted(procs or PROCEDURES)
        for model in models or TABLE_2
        if trainable(model, proc) and (models or TABLE_2[model].mAP)
    ]
    if not found:
        raise UserError(
            f"{', '.join(models)}: {', '.join(procs)} starts from ImageNet weights, and none exist "
            "for that architecture (a dash in the paper's Table 2)"
        )
    return found


def trainable(model: str, proc: str) -> bool:
    """Whether the paper has the model under the procedure, or could have had it."""
    return proc in TABLE_2[model].mAP or not TABLE_2[model].mAP


def at_paper_strides(choice: Choice) -> list[Choice]:
    """The paper's AST at its procedure's stride and at those for which Table 3 has an mAP; any
    other model, or an AST with options of the user's, as it is."""
    if choice.model != "ast" or choice.options.keys() - {"activation_checkpointing"}:
        return [choice]
    columns = TABLE_3.get(choice.proc, {})
    scored = {stride for stride, column in columns.items() if column.mAP is not None}
    return [
        replace(choice, options=choice.options | {"fstride": stride, "tstride": stride})
        for stride in sorted(scored | {AST_STRIDE[choice.proc]})
    ]


def parse_strides(text: str) -> list[dict[str, int]]:
    """``4,6,8x10``: strides of the patches, FxT or one number for both axes, as AST's options.

    Raises:
        UserError: another form, a number that is not in 1..16, or the same stride twice.
    """
    pairs: list[dict[str, int]] = []
    for word in text.split(","):
        if not re.fullmatch(r"[1-9][0-9]*(x[1-9][0-9]*)?|0", word):
            raise UserError(
                "--strides takes distances of patches with commas between, each one number or FxT "
                f"(mel bins, frames), as 8,10x12; got {text!r}"
            )
        if not all(1 <= int(number) <= MAX_STRIDE for number in word.split("x")):
            raise UserError(f"--strides takes distances from 1 to {MAX_STRIDE}, got {word}")
        pair = parse_stride(word)
        if pair in pairs:
            raise UserError(f"--strides names {word} twice")
        pairs.append(pair)
    return pairs


def trained_batch(procedure: Procedure, clips: int) -> int:
    """Clips in a step of ``fastat train`` without --batch, on a set of ``clips``."""
    small = small_set_sizes(procedure, clips)
    return procedure.batch if small is None else small.batch


def trained_epochs(procedure: Procedure, clips: int) -> int:
    """Epochs of ``fastat train`` without --epochs, on a set of ``clips``."""
    small = small_set_sizes(procedure, clips)
    return procedure.epochs if small is None else small.epochs


def _known(option: str, names: Sequence[str], known: dict[str, Any]) -> None:
    for name in names:
        if name not in known:
            raise UserError(f"{option}: unknown {name!r}{nearest(name, known)}")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{option} names {twice} twice")
