"""``fastat pack``: a table of labelled audio -> a packed set.

Files are decoded once, in parallel, and their clips become rows in the order of the table: a row's
number depends on which earlier files are good and on nothing else. A finished shard is kept when
the command is killed and run again; what else a killed run leaves is redone.

State while packing, in OUT/.pack: ``state.json`` (a fingerprint of the command and its inputs),
``lock``, and for every finished shard ``shard-00000.h5.json`` with what its rows add to the set.
dataset.json is written last and makes the set. Several processes pack a part each, and so does
--append (``pack_parts``).
"""

import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastat.data.flac import max_row_bytes
from fastat.data.manifest import Manifest, read_manifest
from fastat.data.pack_messages import Job
from fastat.data.pack_parts import Part, check_known, pack_parts, settle
from fastat.data.pack_plan import BadCount, Plan, SetResult
from fastat.data.pack_set import pack_set
from fastat.data.pack_state import Claim, Standing, standing
from fastat.data.shards import SAMPLE_RATE, VERSION, ClassInfo
from fastat.data.split import Holdout, holdout_mask
from fastat.data.table_layout import ColumnNames
from fastat.errors import UserError
from fastat.host import cores_of_rank
from fastat.packing.bad_files import BAD_FILE, NOTES_FILE, has_changed, read_bad
from fastat.packing.index import finished_result

CODECS = ("pcm16", "flac")
SHARD_BYTES = 1 << 30
SHARD_OVERHEAD = 64 << 10
"""More than HDF5's own structures in a shard, bytes."""
MIN_CLIP_SECONDS, MAX_CLIP_SECONDS = 0.1, 1000.0
EVAL_SUFFIX = "-eval"

STATS_CLIPS = 1_000
"""Clips that the statistics are taken from. Features of a clip cost as much as decoding it, and
1,000 clips fix the mean to about 1 % of the scale that normalisation divides by (clip means of
AudioSet-like material spread by half a standard deviation: 0.5 / sqrt(1000) / 2 = 0.8 %)."""


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


def pack(
    source: Path,
    out: Path,
    *,
    audio: Path | None = None,
    labels: Path | None = None,
    classes_from: Path | None = None,
    columns: ColumnNames | None = None,
    holdout: float | Holdout | None = None,
    group_by: str | None = None,
    clip_seconds: float = 10.0,
    segments: bool = False,
    codec: str = "pcm16",
    workers: int | None = None,
    max_bad: float = 0.01,
    seed: int = 0,
    shard_bytes: int = SHARD_BYTES,
    part: Part | None = None,
) -> PackSummary:
    """Packs SOURCE into the folder ``out``; with ``holdout`` also an eval set into ``<out>-eval``.

    ``source`` is a segments CSV of AudioSet or VGGSound, an AST data file, a CSV or TSV of files
    and labels (DCASE's also without a header), a folder of classes (``table_forms``) or an HDF5
    file (``hdf5_source``). ``holdout`` is a share of the clips or the value of a column.
    ``workers`` and ``max_bad`` may differ when a killed command is run again; everything else is
    part of the set. With ``part`` this packs one of several parts, and makes the set when it is
    the last.

    Raises:
        UserError: a wrong argument, table or folder, or too many bad files.
        Failure: the disk, or a worker process.
    """
    started = time.monotonic()
    check_ranges(clip_seconds, codec, workers, max_bad)
    _check(holdout, group_by, seed)
    out = named(out)
    manifest = read_manifest(
        source,
        audio=audio,
        labels=labels,
        classes_from=classes_from,
        columns=columns,
        group_by=group_by,
        holdout=holdout if isinstance(holdout, Holdout) else None,
    )
    clip_samples = round(clip_seconds * SAMPLE_RATE)
    job = Job(clip_samples, segments, min(SAMPLE_RATE, clip_samples), codec)
    held = str(holdout) if isinstance(holdout, Holdout) else holdout
    options = {"segments": segments, "seed": seed, "holdout": held, "group_by": group_by}
    plans = []
    for role, directory, share in _roles(manifest, out, holdout, seed, source):
        if not share.entries and not share.bad:
            raise UserError(f"{source}: no clips in it")
        plans.append(
            Plan(
                title=f"pack {directory.name}",
                directory=directory,
                bad_list=directory / BAD_FILE,
                inputs=inputs_of(share, job, shard_bytes, {**options, "role": role}),
                classes=share.classes,
                entries=share.entries,
                bad=share.bad,
                job=job,
                shard_room=shard_bytes - SHARD_OVERHEAD,
                label_bytes=label_bytes(share, job, shard_bytes),
                stats_clips=_stats_clips(len(share.entries), segments, seed),
                options={**options, "role": role},
            )
        )
    num_files = sum(len(plan.entries) + len(plan.bad) for plan in plans)
    num_workers = workers or cores_of_rank()
    parts = part.count if part is not None and part.count > 1 else 0
    # Both folders are looked at before either is written.
    finished = [
        standing(plan.directory, Claim(plan.inputs, parts)) is Standing.FINISHED for plan in plans
    ]
    waiting_for: tuple[int, ...] = ()
    if part is not None and parts and not all(finished):
        results, waiting_for, bad_count = pack_parts(plans, part, num_workers, num_files, max_bad)
    else:
        unfinished = [plan for plan, done in zip(plans, finished, strict=True) if not done]
        check_known(unfinished, num_files, max_bad)
        bad_count = BadCount(num_files, max_bad)
        results = [
            _finished(plan, bad_count) if done else pack_set(plan, num_workers, bad_count)
            for plan, done in zip(plans, finished, strict=True)
        ]

    def listed(name: str, has_files: list[bool]) -> tuple[Path, ...]:
        """The list ``name`` of each set that has one, once the sets are whole."""
        pairs = zip(plans, has_files, strict=True)
        return tuple(plan.directory / name for plan, has in pairs if has and not waiting_for)

    train = results[0]
    classes = manifest.classes.classes
    return PackSummary(
        directory=out,
        clips=train.clips,
        audio_seconds=train.seconds,
        shards=train.shards,
        num_classes=len(classes),
        rarest=rarest_class(classes, train.label_counts),
        bad=bad_count.reasons.total(),
        bad_reasons=dict(bad_count.reasons),
        bad_lists=listed(BAD_FILE, [result.bad > 0 for result in results]),
        notes=dict(Counter(file.note for result in results for file in result.noted)),
        note_lists=listed(NOTES_FILE, [len(result.noted) > 0 for result in results]),
        empty_classes=tuple(classes[k].id for k in np.flatnonzero(train.label_counts == 0)),
        eval_directory=plans[1].directory if holdout is not None else None,
        eval_clips=results[1].clips if holdout is not None else 0,
        eval_audio_seconds=results[1].seconds if holdout is not None else 0.0,
        resumed_clips=sum(result.resumed_clips for result in results),
        already_packed=all(finished),
        changed_bad=sum(map(_num_changed, plans)) if all(finished) else 0,
        part=None if part is None else str(part),
        waiting_for=waiting_for,
        seconds=time.monotonic() - started,
    )


def rarest_class(
    classes: Sequence[ClassInfo], label_counts: NDArray[np.int64]
) -> RarestClass | None:
    """Of several the first; None when no class has a clip."""
    with_clips = np.flatnonzero(label_counts)
    if not with_clips.size:
        return None
    k = int(with_clips[label_counts[with_clips].argmin()])
    return RarestClass(classes[k].id, classes[k].name, int(label_counts[k]))


def named(out: Path) -> Path:
    """``out`` with a name of its own, not ``.`` or ``..``."""
    return Path(os.path.abspath(out)) if not out.name or out.name == ".." else out


def check_ranges(
    clip_seconds: float | None, codec: str | None, workers: int | None, max_bad: float
) -> None:
    """Raises UserError when an option that --append has too is out of its range."""
    if codec is not None and codec not in CODECS:
        raise UserError(f"--codec: expected {' or '.join(CODECS)}, got {codec}")
    if clip_seconds is not None and not MIN_CLIP_SECONDS <= clip_seconds <= MAX_CLIP_SECONDS:
        raise UserError(
            f"--clip-seconds: expected {MIN_CLIP_SECONDS} to {MAX_CLIP_SECONDS}, "
            f"got {clip_seconds:g}"
        )
    if workers is not None and workers < 1:
        raise UserError(f"--workers: expected at least 1, got {workers}")
    if not 0.0 <= max_bad <= 1.0:
        raise UserError(f"--max-bad: expected a fraction from 0 to 1, got {max_bad:g}")


def _check(holdout: float | Holdout | None, group_by: str | None, seed: int) -> None:
    if seed < 0:
        raise UserError(f"--seed: expected 0 or more, got {seed}")
    if isinstance(holdout, int | float) and not 0.0 < holdout < 1.0:
        raise UserError(f"--holdout: expected a fraction between 0 and 1, got {holdout:g}")
    if group_by is not None and isinstance(holdout, Holdout):
        raise UserError(f"--group-by: --holdout {holdout} says of each row where it goes")
    if group_by is not None and holdout is None:
        raise UserError("--group-by: only --holdout groups clips, and it is not given")


def _roles(
    manifest: Manifest, out: Path, holdout: float | Holdout | None, seed: int, source: Path
) -> list[tuple[str, Path, Manifest]]:
    """The sets to pack: role, folder, entries. Files bad from the start are the training set's,
    unless a column says where they belong."""
    if holdout is None:
        return [("set", out, manifest)]
    entries = manifest.entries
    eval_out = out.with_name(out.name + EVAL_SUFFIX)
    if isinstance(holdout, Holdout):
        assert manifest.held is not None
        return [("train", out, manifest), ("eval", eval_out, manifest.held)]
    mask = holdout_mask(
        [entry.group for entry in entries], [entry.labels for entry in entries], holdout, seed
    )
    if entries and not mask.any():
        raise UserError(
            f"--holdout: nothing of {source} can be held out: no class has two groups to spread"
        )
    kept = [entry for entry, held in zip(entries, mask, strict=True) if not held]
    held = [entry for entry, held in zip(entries, mask, strict=True) if held]
    return [
        ("train", out, manifest._replace(entries=kept)),
        ("eval", eval_out, manifest._replace(entries=held, bad=[])),
    ]


def inputs_of(manifest: Manifest, job: Job, shard_bytes: int, options: dict[str, object]) -> str:
    """Of everything that decides the rows, but for the content of the audio files."""
    digest = hashlib.sha256()
    head = [VERSION, job, shard_bytes, options, manifest.classes.classes]
    digest.update(json.dumps(head).encode())
    for line in (*manifest.entries, *manifest.bad):
        digest.update(repr(tuple(line)).encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def label_bytes(manifest: Manifest, job: Job, shard_bytes: int) -> int:
    """The most that everything of a row but its samples takes in a shard."""
    name = max((len(os.fsencode(entry.name)) for entry in manifest.entries), default=0)
    path = max((len(os.fsencode(entry.path)) for entry in manifest.entries), default=0)
    labels = -(-len(manifest.classes) // 8)
    row_labels = name + path + labels + 4 + 8 + 4 + 8 * (job.codec == "flac")
    row_bytes = max_row_bytes(job.codec, job.clip_samples) + row_labels
    if row_bytes > shard_bytes - SHARD_OVERHEAD:
        raise UserError(f"--clip-seconds: a clip of {row_bytes:,} bytes is larger than a shard")
    return row_labels


def _stats_clips(num_entries: int, segments: bool, seed: int) -> NDArray[np.int64]:
    """How many clips of each entry to measure, [entries]: a function of the seed and the table."""
    if num_entries <= STATS_CLIPS:
        each = STATS_CLIPS // max(num_entries, 1) if segments else 1
        return np.full(num_entries, each, np.int64)
    clips = np.zeros(num_entries, np.int64)
    clips[np.random.default_rng([seed, 0x57A75]).permutation(num_entries)[:STATS_CLIPS]] = 1
    return clips


def _finished(plan: Plan, bad_count: BadCount) -> SetResult:
    """The result of a set that an earlier run finished."""
    settle(plan.directory)
    bad_count.add(read_bad(plan.directory / BAD_FILE), plan.bad_list)
    result = finished_result(plan.directory)
    return result._replace(resumed_clips=result.clips)


def _num_changed(plan: Plan) -> int:
    """Bad files of a finished set that are not as they were when they were tried."""
    bad = read_bad(plan.directory / BAD_FILE)
    return sum(has_changed(file) for file in bad if file.reason != "label unknown")
