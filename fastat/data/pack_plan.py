"""What a pack is to do, and how many bad files it may meet."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastat.data.classes import ClassList
from fastat.data.manifest import BadFile, Entry
from fastat.data.pack_messages import Job
from fastat.errors import UserError
from fastat.packing.bad_files import NotedFile


class Plan(NamedTuple):
    """A set to be packed."""

    title: str
    """What progress is shown of."""
    directory: Path
    bad_list: Path
    """Where the bad files are listed when there are too many."""
    inputs: str
    """Fingerprint of the command and what it reads."""
    classes: ClassList
    entries: Sequence[Entry]
    bad: Sequence[BadFile]
    """Known to be bad without decoding."""
    job: Job
    shard_room: int
    """What the rows of a shard may take with their labels, bytes."""
    label_bytes: int
    """The most that everything of a row but its samples takes."""
    stats_clips: NDArray[np.int64]  # [entries]
    """How many clips of each entry the statistics are taken from."""
    options: dict[str, Any]
    """Of the command, for dataset.json."""


class BadCount:
    """Bad files over all sets of a command, against --max-bad."""

    def __init__(self, num_files: int, max_bad: float) -> None:
        self.num_files, self.max_bad = num_files, max_bad
        self.reasons: Counter[str] = Counter()
        self._example: BadFile | None = None
        self._lists: dict[Path, None] = {}

    def add(self, files: Iterable[BadFile], listed: Path) -> None:
        """Counts files, which are or will be listed in the file ``listed``."""
        for self._example in files:
            self.reasons[self._example.reason] += 1
            self._lists[listed] = None

    def exceeded(self) -> bool:
        """Whether there are more than --max-bad of them."""
        return self.reasons.total() > self.max_bad * self.num_files

    def error(self) -> UserError:
        """What to tell the user when there are, and the lists are written."""
        example = self._example
        assert example is not None, "no file is bad"
        count = self.reasons.total()
        enough = math.ceil(100 * count / self.num_files) / 100
        reasons = ", ".join(f"{n:,} {reason}" for reason, n in self.reasons.most_common())
        listed = " and ".join(str(path) for path in self._lists if path.is_file())
        detail = f" ({example.detail})" if example.detail else ""
        others = f"--max-bad {enough:g} or more packs the others"
        return UserError(
            f"{count:,} of {self.num_files:,} files are bad, more than --max-bad {self.max_bad:g}: "
            f"{reasons}, such as {example.path}{detail}; listed in {listed}; "
            + (others if count < self.num_files else "there are no others")
        )


class SetResult(NamedTuple):
    """What became of a set, or of a part of one."""

    clips: int
    seconds: float
    """Of audio, without padding."""
    shards: int
    bad: int
    """Lines of its bad.csv; of a part, the bad files of this part alone."""
    noted: list[NotedFile]
    """Lines of its notes.csv; of a part, the noted files of this part alone."""
    label_counts: NDArray[np.int64]  # [K]
    resumed_clips: int
