"""What ``fastat profile`` is asked for: which models, procedures and strides, at which batch.

Imports no torch, so that a mistake on the command line is answered at once.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fastat.config import parse_settings, parse_stride
from fastat.errors import UserError, nearest
from fastat.paper import TABLE_2, TABLE_3
from fastat.procedures import PROCEDURES, Procedure

CPU_BATCH = {"logmel64": 4, "fbank128": 1}
"""Clips a step by default on a CPU, by feature: about as many numbers in either."""

MAX_STRIDE = 16
"""A patch is as wide: farther apart they would leave gaps."""


@dataclass(frozen=True)
class Choice:
    """A model under a procedure; the AST at a stride of its own."""

    model: str
    proc: str
    options: dict[str, Any] = field(default_factory=dict)
    """Of create_model, on top of the procedure's."""

    @property
    def procedure(self) -> Procedure:
        """Table 1's."""
        return PROCEDURES[self.proc]


def choices(
    procs: Sequence[str], models: Sequence[str], strides: str | None, settings: Sequence[str]
) -> list[Choice]:
    """What there is to measure, by procedure.

    Without ``procs`` or ``models`` all, of which Table 2's filled cells remain; with ``strides``
    the AST alone, under the procedures of Table 3.

    Raises:
        UserError: an unknown or repeated name or stride, or nothing remains.
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


def parse_strides(text: str) -> list[dict[str, int]]:
    """``4,6,8x10``: distances of patches, FxT or one number for both axes, as AST's options.

    Raises:
        UserError: not of that form, not in 1..16, or the same twice.
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


def default_batch(choice: Choice, device: str) -> int:
    """Clips a step: on a GPU the procedure's batch, which ``fastat train`` takes on one."""
    p = choice.procedure
    return p.batch if device == "cuda" else CPU_BATCH[p.feature]


def _known(option: str, names: Sequence[str], known: dict[str, Any]) -> None:
    for name in names:
        if name not in known:
            raise UserError(f"{option}: unknown {name!r}{nearest(name, known)}")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{option} names {twice} twice")
