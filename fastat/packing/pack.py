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
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from fastat.data.manifest import read_manifest
from fastat.data.shards import SAMPLE_RATE, VERSION
from fastat.data.split import Holdout
from fastat.data.table_layout import ColumnNames
from fastat.errors import Failure, UserError
from fastat.host import cores_of_rank
from fastat.packing.bad_count import BadCount
from fastat.packing.bad_files import BAD_FILE, NOTES_FILE, has_changed
from fastat.packing.block import Block, Layout, pack_block, try_file
from fastat.packing.options import check_ranges, check_split, named, sampled_clips, split_table
from fastat.packing.plan import Part, Plan, known_bad
from fastat.packing.summary import PackSummary, count_notes, rarest_class
from fastat.packing.workers import Killed, Processes, Workers, dask_cluster
from fastat.progress import progress

MAX_KILLS = 3
"""A block whose process is killed so often, though none of its files does it, ends the command."""


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
                stats_clips=sampled_clips(share.lines, segments, seed),
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
            plan.tidy(content)

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
    bad_count: BadCount,
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
    if not todo:
        return
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


def _check_space(plan: Plan, bad_count: BadCount) -> None:
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
