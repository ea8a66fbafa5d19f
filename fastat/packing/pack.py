"""``fastat pack``: a table of labelled audio -> a packed set.

The lines of the table are cut into blocks, a function of the table and the layout alone. One task
decodes one block into one shard (``block``), and any number of workers run the tasks, in any order
and on any host (``workers``). A shard has its name when it is whole, and says which block it holds.
So the missing shards are all the work that is left: after a kill, after a file was mended, or for
another host. The process that finds all shards writes dataset.json from what they say (``index``),
and with that the set is finished.
"""

import hashlib
import json
import os
import signal
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from fastat.data.shards import SAMPLE_RATE, VERSION
from fastat.packing.bad_files import BAD_FILE, NOTES_FILE, has_changed
from fastat.packing.block import Block, Layout, pack_block, try_file
from fastat.packing.manifest import read_manifest
from fastat.packing.options import check_ranges, check_split, named, sampled_clips, split_table
from fastat.packing.plan import Part, Plan, bad_in_table, check_bad
from fastat.packing.split import Holdout
from fastat.packing.summary import PackSummary, count_notes, empty_classes, rarest_class
from fastat.packing.table_layout import ColumnNames
from fastat.packing.workers import Killed, Processes, Workers, dask_cluster
from fastat.system.errors import Failure, UserError
from fastat.system.host import cores_of_rank
from fastat.system.progress import progress

MAX_KILLS = 3
"""If a block's process is killed so often, no single file is the cause, and the command fails."""


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
    check_split(holdout, group_by, seed)
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
    for role, directory, share in split_table(manifest, out, holdout, seed, source):
        if not share.entries:
            raise UserError(f"{source}: no clips in it")
        own = options | {"role": role}
        command = json.dumps([VERSION, layout[:-1], own, paths, columns])
        plans.append(
            Plan(
                directory=directory,
                classes=share.classes,
                entries=share.entries,
                layout=layout,
                stats_clips=sampled_clips(share.entries, segments, seed),
                options=own,
                command=hashlib.sha256(command.encode()).hexdigest(),
            )
        )
    # Both folders are looked at before either is written.
    for plan in plans:
        plan.find_shards()
    todo = [plan for plan in plans if not plan.finished]
    found = {which: sum(p.partial_content(which).clips for p in todo) for which in (None, part)}
    waiting_for: tuple[int, ...] = ()
    if todo:
        num_files = sum(len(plan.entries) for plan in plans)
        run_blocks(todo, part, workers or cores_of_rank(), scheduler, max_bad, num_files)
        waiting_for = unfinished_parts(todo, part)
    if waiting_for:
        contents = [plan.partial_content(part) for plan in plans]
    else:
        contents = [plan.content() for plan in plans]
        if todo:
            check_bad([plan for plan in plans if not plan.finished], num_files, max_bad)
        for plan, content in zip(plans, contents, strict=True):
            if not plan.finished:
                plan.finish(content)
            plan.tidy(content)
    resumed = found[part if waiting_for else None] if todo else sum(c.clips for c in contents)
    bad_reasons: Counter[str] = Counter(file.reason for content in contents for file in content.bad)

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
        bad=bad_reasons.total(),
        bad_reasons=dict(bad_reasons),
        bad_lists=lists(BAD_FILE, [content.bad for content in contents]),
        notes=count_notes(contents),
        note_lists=lists(NOTES_FILE, [content.noted for content in contents]),
        empty_classes=() if waiting_for else empty_classes(classes, train.label_counts),
        eval_directory=plans[1].directory if held_out else None,
        eval_clips=held_out.clips if held_out else 0,
        eval_audio_seconds=held_out.seconds if held_out else 0.0,
        resumed_clips=resumed,
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
    max_bad: float,
    num_files: int,
) -> None:
    """Packs the blocks of ``part`` (None: all) whose shards are not there.

    Of the command's ``num_files`` files the share ``max_bad`` may be bad.

    Raises:
        UserError: too many bad files, or a folder that cannot be written.
        Failure: the disk, or a worker process.
    """
    check_bad(plans, num_files, max_bad)
    todo = [
        (plan, number)
        for plan in plans
        for number in plan.missing()
        if part is None or part.has(number)
    ]
    if not todo:
        return
    _check_space(plans, max_bad * num_files)
    running: dict[Future[Any], tuple[Plan, int, Block]] = {}
    kills: Counter[Path] = Counter()
    # Not concurrent.futures.wait, in which Ctrl-C may keep a lock.
    done: SimpleQueue[Future[Any]] = SimpleQueue()
    files_left = sum(len(plan.entries[plan.block_slice(number)]) for plan, number in todo)
    title = f"pack {plans[0].directory.name}" + (f" {part}" if part else "")
    with (
        _executor(num_workers, scheduler, todo) as workers,
        progress(title, files_left, "files") as advance,
    ):

        def start(plan: Plan, number: int, block: Block, *more: Any) -> None:
            future = workers.submit(pack_block, block, *more)
            running[future] = (plan, number, block)
            future.add_done_callback(done.put)

        for plan in plans:
            _make_folder(plan.directory)
        waiting = iter(todo)
        while True:
            while len(running) < workers.count and (following := next(waiting, None)):
                plan, number = following
                start(plan, number, plan.block(number))
            if not running:
                break
            future = done.get()
            plan, number, block = running.pop(future)
            try:
                report = future.result()
            except workers.killed as killed:
                kills[block.path] += 1
                start(plan, number, block, _crashing_files(block, kills[block.path], killed))
                continue
            plan.reports[number] = report
            if len(report.bad) > len(bad_in_table(block.entries)):
                check_bad(plans, num_files, max_bad)
            advance(len(block.entries))


def _executor(
    count: int, scheduler: str | None, todo: Sequence[tuple[Plan, int]]
) -> AbstractContextManager[Workers]:
    if scheduler is not None:
        return dask_cluster(scheduler)
    modules = ["fastat.packing.block"]
    if any(plan.stats_clips[plan.block_slice(number)].any() for plan, number in todo):
        modules.append("fastat.packing.statistics")  # brings torch
    return Processes(max(1, min(count, len(todo))), modules)


def _crashing_files(block: Block, kills: int, killed: Exception) -> dict[str, str]:
    """The files that end the process that decodes them, with what happens; each is tried alone.

    SIGKILL comes from the system or the user, not from a decoder.
    """
    crashing: dict[str, str] = {}
    with Processes(1, ["fastat.packing.block"]) as process:
        for entry in block.entries:
            if entry.bad is None:
                try:
                    process.submit(try_file, entry, block.layout).result()
                except Killed as reason:
                    if reason.exit_code != -signal.SIGKILL:
                        crashing[entry.path] = f"decoding it ends the process: {reason}"
    if kills >= MAX_KILLS:
        raise Failure(
            f"the process that packed {block.path.name} ended ({killed}), {kills} times, also "
            "without the files that do that alone: perhaps it had too little memory; the same "
            "command goes on, perhaps with fewer --workers"
        )
    return crashing


def _make_folder(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        reason = "" if os.access(directory, os.W_OK) else "Permission denied"
    except OSError as error:
        reason = error.strerror or str(error)
    if reason:
        raise UserError(f"--out {directory}: cannot write there: {reason}")


def _check_space(plans: Sequence[Plan], spare_files: float) -> None:
    """Raises Failure when the disk cannot hold what is missing: better now than hours later.

    ``spare_files`` may be bad. Nobody knows before decoding how many clips segments are, or how
    long FLAC rows.
    """
    layout, directory = plans[0].layout, plans[0].directory
    if layout.segments or layout.codec != "pcm16":
        return
    slices = [(plan, plan.block_slice(number)) for plan in plans for number in plan.missing()]
    clips = sum(len(plan.entries[lines]) for plan, lines in slices)
    needed = int((clips - spare_files) * 2 * layout.clip_samples)
    folder = directory.absolute()
    disk = os.statvfs(next(path for path in (folder, *folder.parents) if path.exists()))
    free = disk.f_bavail * disk.f_frsize
    if disk.f_blocks and needed > free:
        raise Failure(
            f"{directory}: {needed / 2**30:.1f} GiB needed for {clips:,} clips, "
            f"the disk has {free / 2**30:.1f} GiB left"
        )


def unfinished_parts(plans: Sequence[Plan], part: Part | None) -> tuple[int, ...]:
    """The other parts whose shards are not all there.

    Raises:
        Failure: shards of this part are not to be seen.
    """
    for plan in plans:
        plan.find_shards()
    missing = [number for plan in plans for number in plan.missing()]
    parts = {number % part.count for number in missing} if part is not None else set()
    if missing and (part is None or part.index in parts):
        raise Failure(
            f"{plans[0].directory}: {len(missing)} shards that were packed are not to be seen "
            "there; if the file system is slow, run the same command again"
        )
    return tuple(sorted(parts))
