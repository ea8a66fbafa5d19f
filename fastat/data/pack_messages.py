"""What ``fastat pack`` and its worker processes say to each other."""

from typing import NamedTuple

from fastat.data.bad_audio import Note, Reason


class Job(NamedTuple):
    """What holds for all files."""

    clip_samples: int
    segments: bool
    min_segment_samples: int
    """A shorter remainder of a file is dropped, unless it is all there is."""
    codec: str


class Decode(NamedTuple):
    """Parent to worker: decode these files."""

    batch: int
    paths: tuple[str, ...]
    stats_clips: tuple[int, ...]
    """How many clips of each file to measure."""


class Write(NamedTuple):
    """Parent to worker: write ``num_clips`` clips of a batch, from ``first`` on, into a shard."""

    batch: int
    first: int
    num_clips: int
    path: str
    offset: int


class Forget(NamedTuple):
    """Parent to worker: nothing more of this batch will be written."""

    batch: int


class Moments(NamedTuple):
    """Of one feature over the bins of real frames."""

    num_bins: int
    total: float
    squares: float


class Clip(NamedTuple):
    """A clip that a worker holds."""

    start_seconds: float
    num_samples: int
    num_bytes: int
    """Of its row in the shard, and the CRC-32 of these bytes."""
    crc: int
    moments: dict[str, Moments] | None


class Good(NamedTuple):
    """A file with clips."""

    clips: list[Clip]
    notes: tuple[Note, ...]


class Bad(NamedTuple):
    """A file without clips."""

    reason: Reason
    detail: str


class Decoded(NamedTuple):
    """Worker to parent: for every file of a batch its clips, or why it has none."""

    batch: int
    files: list[Good | Bad]


class Written(NamedTuple):
    """Worker to parent: a Write is done."""

    path: str


class Refused(NamedTuple):
    """Worker to parent: the system refused a Write, or there was no memory for a file."""

    errno: int
    path: str


Message = Decode | Write | Forget
Reply = Decoded | Written | Refused
