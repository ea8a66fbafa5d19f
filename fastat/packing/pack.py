"""``fastat pack``: a table of labelled audio -> a packed set.

The lines of the table are cut into blocks, a function of the table and the layout alone. One task
decodes one block into one shard (``block``), and any number of workers run the tasks, in any order
and on any host (``workers``). A shard has its name when it is whole, and says which block it holds.
So what is missing is all that there is to do: after a kill, after a file was mended, or for
another host. Who finds that nothing is missing writes dataset.json from what the shards say
(``index``), and with that the set is finished.
"""

import hashlib
import json
import math
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastat.data.manifest import BadFile, Entry, Manifest, read_manifest
from fastat.data.shards import SAMPLE_RATE, VERSION, ClassInfo
from fastat.data.split import Holdout, holdout_mask
from fastat.data.table_layout import ColumnNames
from fastat.errors import Failure, UserError
from fastat.host import cores_of_rank
from fastat.packing.bad_files import BAD_FILE, NOTES_FILE, has_changed
from fastat.packing.block import Block, Layout, pack_block, try_file
from fastat.packing.index import Content
from fastat.packing.plan import Part, Plan, known_bad
from fastat.packing.workers import Killed, Processes, Workers, dask_cluster
from fastat.progress import progress

CODECS = ("pcm16", "flac", "none")
MIN_CLIP_SECONDS, MAX_CLIP_SECONDS = 0.1, 1000.0
EVAL_SUFFIX = "-eval"
MAX_KILLS = 3
"""A block whose process is killed so often, though none of its files does it, ends the command."""

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
    scheduler: str | None = None,
    max_bad: float = 0.01,
    seed: int = 0,
    part: Part | None = None,
) -> PackSummary:
    """Packs SOURCE into the folder ``out``; with ``holdout`` also an eval set into ``<out>-eval``.

    ``source`` is a segments CSV of AudioSet or VGGSound, an AST data file, a CSV or TSV of files
    and labels (DCASE's also without a header), a folder of classes (``table_forms``) or an HDF5
    file (``hdf5_source``). ``holdout`` is a share of the clips or the value of a column.
    ``workers``, ``scheduler`` (address of a Dask scheduler), ``part`` and ``max_bad`` may differ
    when a killed command is run again; everything else is part of the set. With ``part`` this packs
    one of several parts, and makes the set when it is the last.

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
    held = str(holdout) if isinstance(holdout, Holdout) else holdout
    options = {"segments": segments, "seed": seed, "holdout": held, "group_by": group_by}
    given = (source, audio, labels, classes_from)
    paths = [None if path is None else os.path.abspath(path) for path in given]
    ids = tuple(c.id for c in manifest.classes.classes)
    layout = Layout(round(clip_seconds * SAMPLE_RATE), segments, codec, ids)
    plans = []
    for role, directory, share in _roles(manifest, out, holdout, seed, source):
        if not share.lines:
            raise UserError(f"{source}: no clips in it")
        own = options | {"role": role}
        command = json.dumps([VERSION, layout[:-1], own, paths, columns])
        plans.append(
            Plan(
                directory=directory,
                classes=share.classes,
                entries=share.lines,
                layout=layout,
                stats_clips=_stats_clips(share.lines, segments, seed),
                options=own,
                command=hashlib.sha256(command.encode()).hexdigest(),
            )
        )
    # Both folders are looked at before either is written.
    for plan in plans:
        plan.look()
    todo = [plan for plan in plans if not plan.finished]
    resumed = sum(report.clips for plan in todo for report in plan.reports.values())
    bad_count = BadCount(sum(len(plan.entries) for plan in plans), max_bad)
    if todo:
        run_blocks(todo, part, workers or cores_of_rank(), scheduler, bad_count)
    waiting_for = unfinished_parts(todo, part)
    if waiting_for:
        contents = [plan.partial_content(part) for plan in plans]
    else:
        contents = [plan.content() for plan in plans]
        bad_count.recount(contents)
        bad_count.check(todo)
        for plan, content in zip(plans, contents, strict=True):
            if not plan.finished:
                plan.finish(content)

    def lists(name: str, files: Sequence[Sequence[object]]) -> tuple[Path, ...]:
        """The list ``name`` of each set that has one, once the sets are whole."""
        pairs = zip(plans, files, strict=True)
        return tuple(plan.directory / name for plan, has in pairs if has and not waiting_for)

    train, held_out = contents[0], contents[1] if holdout is not None else None
    classes = manifest.classes.classes
    return PackSummary(
        directory=out,
        clips=train.clips,
        audio_seconds=train.seconds,
        shards=len(train.reports),
        num_classes=len(classes),
        rarest=rarest_class(classes, train.label_counts),
        bad=bad_count.reasons.total(),
        bad_reasons=dict(bad_count.reasons),
        bad_lists=lists(BAD_FILE, [content.bad for content in contents]),
        notes=count_notes(contents),
        note_lists=lists(NOTES_FILE, [content.noted for content in contents]),
        empty_classes=tuple(classes[k].id for k in np.flatnonzero(train.label_counts == 0)),
        eval_directory=plans[1].directory if held_out else None,
        eval_clips=held_out.clips if held_out else 0,
        eval_audio_seconds=held_out.seconds if held_out else 0.0,
        resumed_clips=resumed if todo else sum(content.clips for content in contents),
        already_packed=not todo,
        changed_bad=sum(has_changed(file) for content in contents for file in content.bad),
        part=None if part is None else str(part),
        waiting_for=waiting_for,
        seconds=time.monotonic() - started,
    )


def run_blocks(
    plans: Sequence[Plan],
    part: Part | None,
    num_workers: int,
    scheduler: str | None,
    bad_count: "BadCount",
) -> None:
    """Packs the blocks of ``part`` (None: all) whose shards are not there.

    Raises:
        UserError: too many bad files, or a folder that cannot be written.
        Failure: the disk, or a worker process.
    """
    for plan in plans:
        bad_count.add(plan.bad_files())
    bad_count.check(plans)
    todo = [
        (plan, number)
        for plan in plans
        for number in range(plan.num_blocks)
        if number not in plan.reports and (part is None or part.has(number))
    ]
    running: dict[Future[Any], tuple[Plan, int, Block]] = {}
    kills: Counter[Path] = Counter()
    num_files = sum(len(plan.entries[plan.lines(number)]) for plan, number in todo)
    with _folders(plans, running), _workers(num_workers, scheduler, todo) as workers:
        for plan in plans:
            _check_space(plan, bad_count)
        title = f"pack {plans[0].directory.name}" + (f" {part}" if part else "")
        with progress(title, num_files, "files") as advance:
            waiting = iter(todo)
            while True:
                while len(running) < workers.count and (following := next(waiting, None)):
                    plan, number = following
                    block = plan.block(number)
                    running[workers.submit(pack_block, block)] = (plan, number, block)
                if not running:
                    break
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    plan, number, block = running[future]
                    try:
                        report = future.result()
                    except workers.killed as killed:
                        kills[block.path] += 1
                        block = _without_crashes(block, kills[block.path], killed)
                        running[workers.submit(pack_block, block)] = (plan, number, block)
                    else:
                        plan.reports[number] = report
                        bad_count.replace(known_bad(block.entries), report.bad)
                        bad_count.check(plans)
                        advance(len(block.entries))
                    del running[future]


def _workers(
    count: int, scheduler: str | None, todo: Sequence[tuple[Plan, int]]
) -> AbstractContextManager[Workers]:
    if scheduler is not None:
        return dask_cluster(scheduler)
    modules = ["fastat.packing.block"]
    if any(plan.stats_clips[plan.lines(number)].any() for plan, number in todo):
        modules.append("fastat.packing.statistics")  # brings torch
    return Processes(max(1, min(count, len(todo))), modules)


def _without_crashes(block: Block, kills: int, killed: Exception) -> Block:
    """The block of a process that ended, without the files that did it: each is tried by itself."""
    crashing = dict(block.crashing)
    with Processes(1, ["fastat.packing.block"]) as process:
        for entry in block.entries:
            if entry.bad is None and entry.path not in crashing:
                try:
                    process.submit(try_file, entry, block.layout).result()
                except Killed as reason:
                    crashing[entry.path] = f"decoding it ends the process: {reason}"
    if len(crashing) == len(block.crashing) and kills >= MAX_KILLS:
        raise Failure(
            f"the process that packed {block.path.name} ended ({killed}), {kills} times, though "
            "none of its files does that alone: perhaps it had too little memory; the same command "
            "goes on, perhaps with fewer --workers"
        )
    return block._replace(crashing=crashing)


@contextmanager
def _folders(
    plans: Sequence[Plan], running: dict[Future[Any], tuple[Plan, int, Block]]
) -> Iterator[None]:
    """Makes the folders of ``plans``; after an error removes what is half written, and a folder in
    which nothing else is."""
    made = []
    try:
        for plan in plans:
            if not plan.directory.exists():
                made.append(plan.directory)
                plan.directory.mkdir(parents=True)
            if not os.access(plan.directory, os.W_OK):
                raise UserError(f"--out {plan.directory}: cannot write there: Permission denied")
    except OSError as error:
        raise UserError(f"--out {plan.directory}: cannot write there: {error.strerror}") from error
    try:
        yield
    except BaseException:
        for _, _, block in running.values():
            for path in block.path.parent.glob(f".{block.path.name}.*.tmp"):
                path.unlink(missing_ok=True)
        for directory in made:
            if not any(directory.iterdir()):
                directory.rmdir()
        raise


def _check_space(plan: Plan, bad_count: "BadCount") -> None:
    """Raises Failure when the disk cannot hold what is missing: better now than hours later.

    Nobody knows before decoding how many clips segments are, or how long FLAC rows.
    """
    if plan.layout.segments or plan.layout.codec != "pcm16":
        return
    clips = sum(
        len(plan.entries[plan.lines(number)])
        for number in range(plan.num_blocks)
        if number not in plan.reports
    )
    needed = int((clips - bad_count.max_bad * bad_count.num_files) * 2 * plan.layout.clip_samples)
    disk = os.statvfs(plan.directory)
    free = disk.f_bavail * disk.f_frsize
    if needed > free:
        raise Failure(
            f"{plan.directory}: {needed / 2**30:.1f} GiB needed for {clips:,} clips, "
            f"the disk has {free / 2**30:.1f} GiB left"
        )


def unfinished_parts(plans: Sequence[Plan], part: Part | None) -> tuple[int, ...]:
    """The other parts whose shards are not all there.

    Raises:
        Failure: shards of this part are not to be seen.
    """
    missing = [number for plan in plans for number in plan.missing()]
    parts = {number % part.count for number in missing} if part is not None else set()
    if missing and (part is None or part.index in parts):
        raise Failure(
            f"{plans[0].directory}: {len(missing)} shards that were packed are not to be seen "
            "there; if the file system is slow, run the same command again"
        )
    return tuple(sorted(parts))


def count_notes(contents: Iterable[Content]) -> dict[str, int]:
    """Files that were noted, by what was noted."""
    return dict(Counter(file.note for content in contents for file in content.noted))


class BadCount:
    """Bad files over all sets of a command, against --max-bad."""

    def __init__(self, num_files: int, max_bad: float) -> None:
        self.num_files, self.max_bad = num_files, max_bad
        self.reasons: Counter[str] = Counter()
        self._example: BadFile | None = None

    def add(self, files: Iterable[BadFile]) -> None:
        """Counts files."""
        for self._example in files:
            self.reasons[self._example.reason] += 1

    def replace(self, files: Iterable[BadFile], others: Iterable[BadFile]) -> None:
        """Counts ``others`` in the place of ``files``, which have been counted."""
        self.reasons -= Counter(file.reason for file in files)
        self.add(others)

    def recount(self, contents: Iterable[Content]) -> None:
        """Counts the files of whole sets, instead of all counted so far."""
        self.reasons.clear()
        for content in contents:
            self.add(content.bad)

    def check(self, plans: Sequence[Plan]) -> None:
        """Raises UserError when there are more than --max-bad; lists those of each set."""
        count = self.reasons.total()
        if count <= self.max_bad * self.num_files:
            return
        example = self._example
        assert example is not None, "no file is bad"
        lists = []
        for plan in plans:
            if bad := plan.bad_files():
                lists.append(str(plan.list_bad(bad)))
        enough = math.ceil(100 * count / self.num_files) / 100
        reasons = ", ".join(f"{n:,} {reason}" for reason, n in self.reasons.most_common())
        detail = f" ({example.detail})" if example.detail else ""
        others = f"--max-bad {enough:g} or more packs the others"
        raise UserError(
            f"{count:,} of {self.num_files:,} files are bad, more than --max-bad {self.max_bad:g}: "
            f"{reasons}, such as {example.path}{detail}; listed in {' and '.join(lists)}; "
            + (others if count < self.num_files else "there are no others")
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
        raise UserError(f"--codec: expected {', '.join(CODECS[:-1])} or {CODECS[-1]}, got {codec}")
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
    is_held = iter(mask)
    marked = [(entry, entry.bad is None and next(is_held)) for entry in manifest.lines]
    return [
        ("train", out, manifest._replace(lines=[entry for entry, held in marked if not held])),
        ("eval", eval_out, manifest._replace(lines=[entry for entry, held in marked if held])),
    ]


def _stats_clips(entries: Sequence[Entry], segments: bool, seed: int) -> NDArray[np.int64]:
    """How many clips of each entry to measure, [entries]: a function of the seed and the table."""
    num_entries = len(entries)
    if num_entries <= STATS_CLIPS:
        each = STATS_CLIPS // max(num_entries, 1) if segments else 1
        return np.full(num_entries, each, np.int64)
    clips = np.zeros(num_entries, np.int64)
    order = np.random.default_rng([seed, 0x57A75]).permutation(num_entries).tolist()
    clips[list(islice((i for i in order if entries[i].bad is None), STATS_CLIPS))] = 1
    return clips
