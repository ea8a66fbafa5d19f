"""``fastat pack --append``: what of a table is not in a finished set yet -> further shards of it.

A file counts as packed by its path. The set's statistics stay, so that runs before and after are
comparable; its fingerprint changes, so that a run that goes on notices. The further shards are
named by what they hold, and until the new dataset.json names them the set stays as it is.
"""

import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from fastat.data.shard_file import ShardInfo, read_shard
from fastat.data.shards import INDEX_FILE, SAMPLE_RATE, read_index, write_index
from fastat.packing.bad_files import has_changed
from fastat.packing.block import APPEND, Layout
from fastat.packing.classes import ClassList
from fastat.packing.index import Content, grown_index
from fastat.packing.manifest import Entry, read_manifest
from fastat.packing.options import check_ranges, named
from fastat.packing.pack import run_blocks, unfinished_parts
from fastat.packing.plan import APPEND_BAD_FILE, Part, Plan, check_bad, disk_errors, write_lists
from fastat.packing.summary import AppendSummary, count_notes, rarest_class
from fastat.packing.table_layout import ColumnNames
from fastat.system.errors import UserError
from fastat.system.files import lock
from fastat.system.host import cores_of_rank


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
    scheduler: str | None = None,
    max_bad: float = 0.01,
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
    base = read_index(out)
    classes = ClassList.from_packed(out)
    _check_classes(classes, labels, classes_from, out)
    _check_layout(base, clip_seconds, segments, out)
    before = Content(np.zeros(len(classes), np.int64))
    packed: set[str] = set()
    for shard in base["shards"]:
        info = ShardInfo(**shard)
        _, rows = read_shard(out, info, base["clip_samples"], len(classes))
        before.add(info, rows)
        packed.update(map(os.fsdecode, rows.audio_path))
    table = read_manifest(source, audio=audio, classes_from=out, columns=columns).entries
    others = [entry for entry in table if entry.path not in packed]
    new = _entries_to_append(others, before)
    plan = Plan(
        directory=out,
        classes=classes,
        entries=new,
        layout=_layout(base, classes, codec, out),
        stats_clips=np.zeros(len(new), np.int64),
        options=base["options"],
        command=APPEND,
        base=base,
    )
    plan.find_shards()
    found = {which: plan.partial_content(which).clips for which in (None, part)}
    waiting_for: tuple[int, ...] = ()
    whole = before
    if new:
        run_blocks([plan], part, workers or cores_of_rank(), scheduler, max_bad, len(new))
        waiting_for = unfinished_parts([plan], part)
        if not waiting_for:
            whole = plan.content()
            check_bad([plan], len(new), max_bad)
            _replace_index(out, base, whole)
            plan.tidy(whole)
    ours = plan.partial_content(part if waiting_for else None)
    if waiting_for:
        whole = ours
    bad_reasons: Counter[str] = Counter(file.reason for file in ours.bad)
    return AppendSummary(
        directory=out,
        clips=whole.clips,
        shards=len(whole.reports),
        appended_clips=ours.clips,
        audio_seconds=whole.seconds,
        num_classes=len(classes),
        rarest=rarest_class(classes.classes, whole.label_counts),
        already_there=len(table) - len(others),
        known_bad=len(others) - len(new),
        bad=bad_reasons.total(),
        bad_reasons=dict(bad_reasons),
        notes=count_notes([ours]),
        resumed_clips=found[part if waiting_for else None],
        part=None if part is None else str(part),
        waiting_for=waiting_for,
        seconds=time.monotonic() - started,
    )


def _entries_to_append(entries: list[Entry], before: Content) -> list[Entry]:
    """The entries to pack, of those that the set does not hold.

    A file that bad.csv lists is tried again when it has changed since; a line of the table that
    was bad then and is now does not count again.
    """
    unchanged = {bad.path for bad in before.bad if not has_changed(bad)}
    listed = {(bad.path, bad.reason, bad.labels) for bad in before.bad}
    return [
        entry
        for entry in entries
        if (
            entry.path not in unchanged
            if entry.bad is None
            else (entry.path, entry.bad.reason, entry.bad.labels) not in listed
        )
    ]


def _replace_index(out: Path, base: dict[str, Any], content: Content) -> None:
    """Writes the lists and dataset.json of the grown set, unless it is no longer ``base``."""
    grown = grown_index(base, content)
    with disk_errors(out), (out / INDEX_FILE).open("r+b") as file:
        lock(file, wait=True)
        now = read_index(out)
        if now["shards"] == grown["shards"]:
            return  # another process of the same command was first
        if now["checksum"] != base["checksum"]:
            raise UserError(
                f"--out {out}: another --append has changed the set since; run the same command "
                "again"
            )
        write_lists(out, content)
        (out / APPEND_BAD_FILE).unlink(missing_ok=True)
        write_index(out, grown)


def _layout(base: dict[str, Any], classes: ClassList, codec: str | None, out: Path) -> Layout:
    earlier = ShardInfo(**base["shards"][-1]).codec
    codec = codec or earlier
    if (codec == "none") != (base["codec"] == "none"):
        raise UserError(
            f"--codec {codec}: {out} was packed with --codec {base['codec']}; all of a set has its "
            "audio, or none"
        )
    ids = tuple(c.id for c in classes.classes)
    return Layout(base["clip_samples"], base["options"]["segments"], codec, ids)


def _check_classes(
    classes: ClassList, labels: Path | None, classes_from: Path | None, out: Path
) -> None:
    if labels is not None and classes_from is not None:
        raise UserError("expected --labels or --classes-from, got both")
    if labels is not None:
        given = ClassList.from_csv(labels)
    else:
        given = ClassList.from_packed(classes_from or out)
    if [c.id for c in given.classes] != [c.id for c in classes.classes]:
        raise UserError(
            f"{given.source}: expected the {len(classes)} classes of {out} in their order, "
            f"got {len(given)} others; without this option --append takes the set's"
        )


def _check_layout(
    base: dict[str, Any], clip_seconds: float | None, segments: bool, out: Path
) -> None:
    clip_samples = base["clip_samples"]
    if clip_seconds is not None and round(clip_seconds * SAMPLE_RATE) != clip_samples:
        raise UserError(
            f"--clip-seconds: expected {clip_samples / SAMPLE_RATE:g} as in {out}, "
            f"got {clip_seconds:g}"
        )
    if segments and not base["options"]["segments"]:
        raise UserError(f"--segments: {out} was packed without, and --append does the same")
