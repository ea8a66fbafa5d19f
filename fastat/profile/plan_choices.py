"""What ``fastat profile --plan`` is asked for, and what it ranks.

Imports no torch, so that a mistake on the command line is answered at once.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fastat.errors import UserError
from fastat.paper import TABLE_2, TABLE_3
from fastat.procedures import AST_STRIDE
from fastat.profile.cases import Choice


def check_options(plan: bool, with_it: dict[str, Any], without_it: dict[str, Any]) -> None:
    """Raises UserError for an option given with ``--plan`` that is not for it, or the reverse.

    The options by name; one that is None, False or empty was not given.
    """
    for option, value in (without_it if plan else with_it).items():
        if value:
            raise UserError(f"{option} goes {'without' if plan else 'with'} --plan")


def parse_limits(
    budget_hours: float | None, memory_gib: float | None
) -> tuple[float, float | None]:
    """``--budget-hours`` and ``--memory-gib`` as hours (inf: any number) and bytes.

    Raises:
        UserError: not positive and finite.
    """
    for option, value in (("--budget-hours", budget_hours), ("--memory-gib", memory_gib)):
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"{option} takes a positive number, got {value:g}")
    hours = math.inf if budget_hours is None else budget_hours
    return hours, None if memory_gib is None else memory_gib * 2**30


def planned(choices: Sequence[Choice]) -> list[Choice]:
    """``choices`` with the AST also at the strides of Table 3 that have an mAP.

    Raises:
        UserError: a model that the paper has no mAP for.
    """
    found = []
    for choice in choices:
        if not TABLE_2[choice.model].mAP:
            raise UserError(
                f"--plan ranks by the paper's mAP, and {choice.model} has none there; leave it out"
            )
        if choice.model != "ast":
            found.append(choice)
            continue
        own = {AST_STRIDE[choice.proc]: TABLE_2["ast"].mAP[choice.proc]}
        for stride in sorted(own | mAP_by_stride(choice.proc)):
            found.append(replace(choice, options={"fstride": stride, "tstride": stride}))
    return found


def mAP_by_stride(proc: str) -> dict[int, float]:
    """Table 3's, where it prints one."""
    table = TABLE_3.get(proc, {})
    return {stride: column.mAP for stride, column in table.items() if column.mAP is not None}


def paper_map(choice: Choice) -> float:
    """Table 3's for a stride that it has, else Table 2's."""
    by_stride = mAP_by_stride(choice.proc) if choice.model == "ast" else {}
    return by_stride.get(choice.options.get("fstride", 0), TABLE_2[choice.model].mAP[choice.proc])
