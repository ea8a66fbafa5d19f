"""What ``fastat profile`` is asked for: models, procedures and strides.

Imports no torch, so that a mistake on the command line is answered at once.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fastat.config.paper import TABLE_2, TABLE_3
from fastat.config.procedures import AST_STRIDE, PROCEDURES
from fastat.config.run import parse_settings, parse_stride
from fastat.system.errors import UserError, nearest

MAX_STRIDE = 16
"""Width of a patch: a larger stride would leave gaps between patches."""


@dataclass(frozen=True)
class Choice:
    """A model under a procedure."""

    model: str
    proc: str
    options: dict[str, Any] = field(default_factory=dict)
    """Keyword options of create_model, on top of the procedure's."""


def choices(
    procs: Sequence[str], models: Sequence[str], strides: str | None, settings: Sequence[str]
) -> list[Choice]:
    """The cases to measure, sorted by procedure.

    Args:
        procs, models: names; empty: all, of which the filled cells of Table 2 are taken.
        strides: only the AST, under the procedures of Table 3, at each of these strides.
        settings: ``model.KEY=value`` for every model.

    Raises:
        UserError: a name or stride is unknown, or nothing remains.
    """
    procs = _known("--proc", procs, PROCEDURES)
    models = _known("--model", models, TABLE_2)
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
        # A model that the user names may also be one that the paper does not have (ResNet34).
        if proc in TABLE_2[model].mAP or (models and not TABLE_2[model].mAP)
    ]
    if not found:
        raise UserError(
            f"{', '.join(models)}: {', '.join(procs)} starts from ImageNet weights, and none exist "
            "for that architecture (a dash in the paper's Table 2)"
        )
    return found


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
        UserError: another form, or a number that is not in 1..16.
    """
    pairs = [parse_stride(word, option="--strides") for word in text.split(",")]
    for pair in pairs:
        if max(pair.values()) > MAX_STRIDE:
            raise UserError(f"--strides takes numbers from 1 to {MAX_STRIDE}, got {text}")
    return pairs


def _known(option: str, names: Sequence[str], known: Iterable[str]) -> list[str]:
    """The names without repetitions. Raises UserError where one is unknown."""
    for name in names:
        if name not in known:
            raise UserError(f"{option}: unknown {name!r}{nearest(name, known)}")
    return list(dict.fromkeys(names))
