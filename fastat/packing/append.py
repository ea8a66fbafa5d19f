"""``fastat pack --append``: what of a table is not in a finished set yet -> further shards of it.

A file counts as packed by its path. The set's statistics stay, so that runs before and after are
comparable; its fingerprint changes, so that a run that goes on notices.
"""

import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastat.data.classes import ClassList
from fastat.data.manifest import BadFile, Manifest, read_manifest
from fastat.data.pack_messages import Job
from fastat.data.pack_parts import APPEND_BAD_FILE, Part, pack_parts, settle
from fastat.data.pack_plan import Plan
from fastat.data.shards import SAMPLE_RATE, PackedSet, ShardInfo, checksum, read_index
from fastat.data.table_layout import ColumnNames
from fastat.errors import UserError
from fastat.host import cores_of_rank
from fastat.packing.bad_files import BAD_FILE, has_changed, read_bad
from fastat.packing.index import finished_result
from fastat.packing.pack import (
    SHARD_BYTES,
    SHARD_OVERHEAD,
    RarestClass,
    check_ranges,
    inputs_of,
    label_bytes,
    named,
    rarest_class,
)

CHUNK_ROWS = 65_536
"""Number of rows whose paths are read at once."""


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


def append(
    source: Path,
    out: Path,
    *,
    audio: Path | None = None,
    labels: Path | None = None,
    classes_from: Path | None = None,
    clip_seconds: float | None = None,
    segments: bool = False,
    columns: ColumnNames | None = None,
    codec: str | None = None,
    workers: int | None = None,
    max_bad: float = 0.01,
    shard_bytes: int = SHARD_BYTES,
    part: Part | None = None,
) -> AppendSummary:
    """Adds to the finished set ``out`` the files of SOURCE that it does not have.

    Classes, clip length and segments are the set's; given, they must be the same. ``codec`` is that
    of the further shards, by default the last one's. A label that the set does not know makes a
    file bad. ``max_bad`` is the share of the files that are new. Nothing new changes nothing. Until
    all is packed the set stays as it is; a killed command goes on when it is run again, and with
    ``part`` several share the work.

    Raises:
        UserError: a wrong argument, table or folder, or too many bad files.
        Failure: the set is damaged, the disk, or a worker process.
    """
    started = time.monotonic()
    check_ranges(clip_seconds, codec, workers, max_bad)
    out = named(out)
    base = _open_base(out)
    _check_classes(base, labels, classes_from, out)
    _check_layout(base, clip_seconds, segments, out)
    new = _news(base, read_manifest(source, audio=audio, classes_from=out, columns=columns))
    result = None
    if new.manifest.entries or new.manifest.bad:
        num_files = len(new.manifest.entries) + len(new.manifest.bad)
        result = pack_parts(
            [_plan(out, base, new.manifest, codec, shard_bytes)],
            part or Part(0, 1),
            workers or cores_of_rank(),
            num_files,
            max_bad,
            base.index,
        )
    whole = finished_result(out) if result is None else result.sets[0]
    clips = whole.clips
    waiting_for = () if result is None else result.waiting_for
    return AppendSummary(
        directory=out,
        clips=clips,
        shards=whole.shards,
        appended_clips=clips if waiting_for else clips - base.index["clips"],
        audio_seconds=whole.seconds,
        num_classes=len(base.classes),
        rarest=rarest_class(base.classes.classes, whole.label_counts),
        already_there=new.already_there,
        known_bad=new.known_bad,
        bad=0 if result is None else result.bad_count.reasons.total(),
        bad_reasons={} if result is None else dict(result.bad_count.reasons),
        notes=dict(Counter(file.note for file in whole.noted if file.path not in base.paths)),
        resumed_clips=0 if result is None else result.sets[0].resumed_clips,
        part=None if part is None else str(part),
        waiting_for=waiting_for,
        seconds=time.monotonic() - started,
    )


@dataclass(frozen=True)
class _Base:
    """The set that is appended to."""

    index: dict[str, Any]
    classes: ClassList
    paths: set[str]
    """Files in it."""
    bad: list[BadFile]


class _News(NamedTuple):
    """What is new in a table."""

    manifest: Manifest
    already_there: int
    known_bad: int


def _open_base(directory: Path) -> _Base:
    """Opens the set, which must be whole, and ends what a killed append has left."""
    index = read_index(directory)
    settle(directory)
    packed = PackedSet.open(directory)
    paths: set[str] = set()
    for start in range(0, packed.num_clips, CHUNK_ROWS):
        rows = np.arange(start, min(start + CHUNK_ROWS, packed.num_clips))
        paths.update(path for path, _ in packed.sources(rows))
    packed.close()
    bad = read_bad(directory / BAD_FILE)
    return _Base(index, ClassList.from_packed(directory), paths, bad)


def _check_classes(base: _Base, labels: Path | None, classes_from: Path | None, out: Path) -> None:
    if labels is not None and classes_from is not None:
        raise UserError("expected --labels or --classes-from, got both")
    if labels is not None:
        given = ClassList.from_csv(labels)
    else:
        given = ClassList.from_packed(classes_from or out)
    if [c.id for c in given.classes] != [c.id for c in base.classes.classes]:
        raise UserError(
            f"{given.source}: expected the {len(base.classes)} classes of {out} in their order, "
            f"got {len(given)} others; without this option --append takes the set's"
        )


def _check_layout(base: _Base, clip_seconds: float | None, segments: bool, out: Path) -> None:
    clip_samples = base.index["clip_samples"]
    if clip_seconds is not None and round(clip_seconds * SAMPLE_RATE) != clip_samples:
        raise UserError(
            f"--clip-seconds: expected {clip_samples / SAMPLE_RATE:g} as in {out}, "
            f"got {clip_seconds:g}"
        )
    if segments and not base.index["options"]["segments"]:
        raise UserError(f"--segments: {out} was packed without, and --append does the same")


def _news(base: _Base, manifest: Manifest) -> _News:
    """What of ``manifest`` is to be packed.

    A file that bad.csv lists is tried again when it has changed since; a line of the table that
    was bad then and is now does not count again.
    """
    unchanged = {bad.path for bad in base.bad if not has_changed(bad)}
    listed = {(bad.path, bad.reason, bad.labels) for bad in base.bad}
    others = [entry for entry in manifest.entries if entry.path not in base.paths]
    entries = [entry for entry in others if entry.path not in unchanged]
    bad = [bad for bad in manifest.bad if (bad.path, bad.reason, bad.labels) not in listed]
    return _News(
        manifest._replace(entries=entries, bad=bad),
        already_there=len(manifest.entries) - len(others),
        known_bad=len(others) - len(entries) + len(manifest.bad) - len(bad),
    )


def _plan(out: Path, base: _Base, manifest: Manifest, codec: str | None, shard_bytes: int) -> Plan:
    clip_samples = base.index["clip_samples"]
    job = Job(
        clip_samples,
        base.index["options"]["segments"],
        min(SAMPLE_RATE, clip_samples),
        codec or ShardInfo(**base.index["shards"][-1]).codec,
    )
    return Plan(
        title=f"append to {out.name}",
        directory=out,
        bad_list=out / APPEND_BAD_FILE,
        inputs=inputs_of(manifest, job, shard_bytes, {"append to": checksum(base.index)}),
        classes=manifest.classes,
        entries=manifest.entries,
        bad=manifest.bad,
        job=job,
        shard_room=shard_bytes - SHARD_OVERHEAD,
        label_bytes=label_bytes(manifest, job, shard_bytes),
        stats_clips=np.zeros(len(manifest.entries), np.int64),
        options=base.index["options"],
    )
