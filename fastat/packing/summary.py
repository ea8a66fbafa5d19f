"""What ``fastat pack`` and ``fastat pack --append`` report when they are done."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastat.data.shards import ClassInfo
from fastat.packing.index import Content


@dataclass(frozen=True)
class RarestClass:
    """The class with the fewest clips of those that have any."""

    id: str
    name: str
    clips: int


@dataclass(frozen=True, kw_only=True)
class PackSummary:
    """What ``pack`` made."""

    directory: Path
    clips: int
    """Of the set in ``directory``, without the held-out ones; of a part while others are not
    finished."""
    audio_seconds: float
    """Of these clips, without the padding."""
    shards: int
    num_classes: int
    rarest: RarestClass | None
    """In ``directory``."""
    bad: int
    """Files in bad.csv, of both sets."""
    bad_reasons: dict[str, int]
    bad_lists: tuple[Path, ...]
    """The bad.csv of each set that has bad files."""
    notes: dict[str, int]
    """Files that were read and noted, of both sets, by what was noted."""
    note_lists: tuple[Path, ...]
    """The notes.csv of each set that has noted files."""
    empty_classes: tuple[str, ...]
    """Ids of classes without a clip in ``directory``."""
    eval_directory: Path | None
    """Where --holdout put the eval set: beside ``directory``, with ``-eval`` behind its name."""
    eval_clips: int
    eval_audio_seconds: float
    resumed_clips: int
    """Clips that a killed run of the same command had already packed."""
    already_packed: bool
    """The same command had finished before; nothing was done."""
    changed_bad: int
    """Files in bad.csv that have changed since they were tried; --append tries them again."""
    part: str | None
    """i/n when this was one of several parts."""
    waiting_for: tuple[int, ...]
    """Parts that are not finished; none: the set is whole."""
    seconds: float
    """Wall time."""


@dataclass(frozen=True, kw_only=True)
class AppendSummary:
    """What ``append`` did."""

    directory: Path
    clips: int
    """Of the whole set; of a part while others are not finished."""
    shards: int
    appended_clips: int
    audio_seconds: float
    num_classes: int
    rarest: RarestClass | None
    """Of the whole set, as ``clips``."""
    already_there: int
    """Files of the table that the set has."""
    known_bad: int
    """Files of the table that bad.csv lists, as they were."""
    bad: int
    """Bad files of the table that bad.csv did not list, or that have changed since."""
    bad_reasons: dict[str, int]
    notes: dict[str, int]
    """Files that were appended and noted, by what was noted."""
    resumed_clips: int
    """Clips that a killed run of the same command had already packed."""
    part: str | None
    """i/n when this was one of several parts."""
    waiting_for: tuple[int, ...]
    """Parts that are not finished; none: the set has grown."""
    seconds: float
    """Wall time."""


def rarest_class(
    classes: Sequence[ClassInfo], label_counts: NDArray[np.int64]
) -> RarestClass | None:
    """The first of several equally rare classes; None if no class has a clip."""
    with_clips = np.flatnonzero(label_counts)
    if not with_clips.size:
        return None
    k = int(with_clips[label_counts[with_clips].argmin()])
    return RarestClass(classes[k].id, classes[k].name, int(label_counts[k]))


def count_notes(contents: Iterable[Content]) -> dict[str, int]:
    """Files that were noted, by what was noted."""
    return dict(Counter(file.note for content in contents for file in content.noted))


def empty_classes(classes: Sequence[ClassInfo], label_counts: NDArray[np.int64]) -> tuple[str, ...]:
    """Ids of the classes without a clip."""
    return tuple(classes[k].id for k in np.flatnonzero(label_counts == 0).tolist())
