"""The rows of ``fastat profile`` within a budget, ranked, and the command that trains the best."""

import shlex
from pathlib import Path
from typing import Any

from fastat.config.procedures import PROCEDURES, small_set_sizes
from fastat.study.profile.rows import Document, Row, stride_of


def rank(
    document: Document, hours: float | None, memory_gib: float | None, data: Path | None
) -> dict[str, Any]:
    """What ``--budget-hours`` and ``--memory-gib`` add to the document, as "budget".

    Args:
        hours, memory_gib: what a training may take; None: any amount.
        data: the packed set to train on, for the command; None: a name for the user to replace.

    Returns:
        both limits; "ranking": indices of the rows that fit and have an mAP in the paper, the
        highest first, then the fewest hours; "unranked": those that fit without one, the fewest
        hours first, as nothing says what they are worth; "command": ``fastat train`` of the first
        in the ranking, None where there is none.
    """
    rows = document["rows"]
    fitting = sorted(
        (i for i, row in enumerate(rows) if fits(row, hours, memory_gib)),
        key=lambda i: (-(rows[i]["paper_map"] or 0.0), rows[i]["hours"]),
    )
    ranking = [i for i in fitting if rows[i]["paper_map"] is not None]
    return {
        "hours": hours,
        "memory_gib": memory_gib,
        "ranking": ranking,
        "unranked": [i for i in fitting if rows[i]["paper_map"] is None],
        "command": train_command(rows[ranking[0]], document, data) if ranking else None,
    }


def fits(row: Row, hours: float | None, memory_gib: float | None) -> bool:
    """Whether a row was measured and takes no more than the limits."""
    if row["out_of_memory"]:
        return False
    within_hours = hours is None or row["hours"] <= hours
    return within_hours and (memory_gib is None or row["peak_memory_gib"] <= memory_gib)


def train_command(row: Row, document: Document, data: Path | None) -> str:
    """The ``fastat train`` that takes the steps of a row."""
    words = ["fastat", "train", "--proc", row["proc"], "--model", row["model"]]
    if row["fstride"] is not None:
        words += ["--stride", stride_of(row)]
    procedure = PROCEDURES[row["proc"]]
    if row["batch"] != (small_set_sizes(procedure, document["clips"]) or procedure).batch:
        words += ["--batch", str(row["batch"])]
    words += ["--precision", row["precision"]]
    if row["compiled"] != (document["device_type"] == "cuda"):
        words.append("--compile" if row["compiled"] else "--no-compile")
    if row["activation_checkpointing"]:
        words += ["--set", "model.activation_checkpointing=true"]
    words += ["--data", str(data or "packed/train")]
    if data is None:
        words += ["--eval", "packed/eval"]
    return shlex.join(words)
