"""dataset.json: what a finished set says of itself."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastat.data.manifest import BadFile
from fastat.data.pack_plan import Plan, SetResult
from fastat.data.pack_state import FinishedShard
from fastat.data.shards import (
    FORMAT,
    SAMPLE_RATE,
    VERSION,
    ShardInfo,
    codec_of,
    read_index,
)
from fastat.errors import UserError
from fastat.features import FEATURES
from fastat.packing.bad_files import NOTES_FILE, read_notes


def index_of(plan: Plan, shards: Sequence[FinishedShard], num_bad: int) -> dict[str, Any]:
    """The index of a set of ``shards``, in order.

    Raises:
        UserError: its sampled clips give no statistics.
    """
    infos = [shard.info for shard in shards]
    return {
        "format": FORMAT,
        "version": VERSION,
        "inputs": plan.inputs,
        "clips": sum(shard.rows for shard in shards),
        "seconds": _seconds(shards),
        "bad_files": num_bad,
        "clip_seconds": plan.job.clip_samples / SAMPLE_RATE,
        "clip_samples": plan.job.clip_samples,
        "sample_rate": SAMPLE_RATE,
        "codec": codec_of(infos),
        "options": plan.options,
        "stats": {name: _stats(plan, shards, name) for name in FEATURES},
        "shards": [info._asdict() for info in infos],
        "label_counts": label_counts(shards, len(plan.classes)).tolist(),
        "classes": [c._asdict() for c in plan.classes.classes],
    }


def appended(base: dict[str, Any], shards: Sequence[FinishedShard], num_bad: int) -> dict[str, Any]:
    """The index of the set ``base`` with further ``shards`` behind its own.

    Statistics, options and ``inputs`` stay those of the first pack: runs on the grown set are
    comparable with runs before, and the first command still finds its own set.
    """
    counts = np.array(base["label_counts"], np.int64)
    clips = sum(shard.rows for shard in shards)
    infos = [ShardInfo(**entry) for entry in base["shards"]] + [shard.info for shard in shards]
    return base | {
        "clips": base["clips"] + clips,
        "seconds": base["seconds"] + _seconds(shards),
        "appends": base.get("appends", 0) + 1,
        "appended_clips": base.get("appended_clips", 0) + clips,
        "bad_files": num_bad,
        "codec": codec_of(infos),
        "shards": [info._asdict() for info in infos],
        "label_counts": (counts + label_counts(shards, len(counts))).tolist(),
    }


def set_result(
    plan: Plan, shards: Sequence[FinishedShard], bad: Sequence[BadFile], resumed_clips: int
) -> SetResult:
    """The result of a set of ``shards``, or of a part of one."""
    return SetResult(
        sum(shard.rows for shard in shards),
        _seconds(shards),
        len(shards),
        len(bad),
        [file for shard in shards for file in shard.noted],
        label_counts(shards, len(plan.classes)),
        resumed_clips,
    )


def finished_result(directory: Path) -> SetResult:
    """The result of a set that is finished."""
    index = read_index(directory)
    return SetResult(
        index["clips"],
        index["seconds"],
        len(index["shards"]),
        index["bad_files"],
        read_notes(directory / NOTES_FILE),
        np.array(index["label_counts"], np.int64),
        0,
    )


def _seconds(shards: Iterable[FinishedShard]) -> float:
    return sum(shard.num_samples for shard in shards) / SAMPLE_RATE


def label_counts(shards: Iterable[FinishedShard], num_classes: int) -> NDArray[np.int64]:
    """Clips of each class, [K]."""
    counts = np.zeros(num_classes, np.int64)
    for shard in shards:
        counts += shard.label_counts
    return counts


def _stats(plan: Plan, shards: Sequence[FinishedShard], feature: str) -> dict[str, float]:
    clips = bins = 0
    total = squares = 0.0
    for shard in shards:  # in order: the same sum after any resume
        m = shard.moments[feature]
        clips, bins, total, squares = clips + m[0], bins + m[1], total + m[2], squares + m[3]
    mean = total / bins if bins else math.nan
    std = math.sqrt(max(squares / bins - mean**2, 0.0)) if bins else math.nan
    if not std > 0.0:
        raise UserError(
            f"{plan.directory}: no statistics of {feature}: the {clips} sampled clips are "
            "silent or too short for a frame"
        )
    return {"mean": mean, "std": std, "clips": clips}
