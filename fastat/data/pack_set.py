"""Packs one set: feeds the workers, gives rows to clips in the table's order, closes shards."""

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastat.atomic import fsync
from fastat.data.manifest import BadFile, Entry
from fastat.data.pack_messages import Bad, Clip, Decode, Decoded, Write
from fastat.data.pack_plan import BadCount, Plan, SetResult
from fastat.data.pack_pool import BATCHES_AHEAD, Pool
from fastat.data.pack_state import FinishedShard, PackState
from fastat.data.shard_writer import ShardPart
from fastat.data.shards import ShardInfo, ShardRows
from fastat.errors import Failure, UserError
from fastat.features import FEATURES
from fastat.packing.bad_files import BAD_FILE, NOTES_FILE, NotedFile, stamp, write_bad, write_notes
from fastat.packing.index import index_of, set_result
from fastat.progress import progress

BATCH_FILES = 8
"""Files a message: enough to make messages rare, few enough to keep all workers busy to the
end."""

FLUSH_BYTES = 64 << 20
"""Written rows go to the disk while others are decoded, not all when the shard is sealed."""


class Packed(NamedTuple):
    """What of a plan is on the disk: all of it."""

    shards: list[FinishedShard]
    bad: list[BadFile]
    resumed_clips: int
    """Clips of the shards that an earlier run finished."""


def pack_set(plan: Plan, num_workers: int, bad_count: BadCount) -> SetResult:
    """Packs ``plan`` into its folder, going on where a killed run of it stopped.

    Raises:
        UserError: too many bad files, no good one, or a folder that is not ours to write.
        Failure: the disk, or a worker.
    """
    with PackState(plan.directory, plan.inputs) as state, disk_errors(plan.directory):
        packed = pack_rows(plan, state, num_workers, bad_count)
        write_bad(plan.directory / BAD_FILE, packed.bad)
        write_notes(plan.directory / NOTES_FILE, (n for s in packed.shards for n in s.noted))
        require_clips(plan.directory, packed.shards, packed.bad)
        state.finish(index_of(plan, packed.shards, len(packed.bad)))
    return set_result(plan, packed.shards, packed.bad, packed.resumed_clips)


def pack_rows(plan: Plan, state: PackState, num_workers: int, bad_count: BadCount) -> Packed:
    """Packs what earlier runs have left of ``plan`` into finished shards; raises as ``pack_set``.

    All bad files are added to ``bad_count``, those found earlier included.
    """
    builder = _Builder(plan, state, bad_count)
    try:
        builder.check_bad()
        builder.check_space()
        resumed_clips = sum(shard.rows for shard in builder.shards)
        if builder.first_entry < len(plan.entries):
            _run(plan, builder, num_workers)
        return Packed(builder.finish(), builder.bad, resumed_clips)
    finally:
        builder.stop()


def require_clips(directory: Path, shards: list[FinishedShard], bad: list[BadFile]) -> None:
    """Raises UserError when there is no shard."""
    if not shards:
        raise UserError(
            f"{directory}: no clip is left, all {len(bad)} files are bad; {BAD_FILE} there says why"
        )


def require_space(plan: Plan, num_clips: int, bad_count: BadCount, written: int = 0) -> None:
    """Raises Failure when the disk cannot hold ``num_clips``, of which ``written`` bytes are there:
    better now than hours later.

    Nobody knows before decoding how many clips segments are, or how long FLAC rows.
    """
    if plan.job.segments or plan.job.codec == "flac":
        return
    sure = num_clips - bad_count.max_bad * bad_count.num_files
    needed = int(sure * 2 * plan.job.clip_samples) - written
    disk = os.statvfs(plan.directory)
    free = disk.f_bavail * disk.f_frsize
    if needed > free:
        raise Failure(
            f"{plan.directory}: {needed / 2**30:.1f} GiB needed for {num_clips:,} clips, "
            f"the disk has {free / 2**30:.1f} GiB left"
        )


@contextmanager
def disk_errors(directory: Path) -> Iterator[None]:
    """Raises what the disk refuses as Failure."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise Failure(f"{directory}: cannot write: {reason}") from error


def _run(plan: Plan, builder: "_Builder", num_workers: int) -> None:
    """Decodes what is left of the entries and has every clip written."""
    starts = range(builder.first_entry, len(plan.entries), BATCH_FILES)
    num_workers = min(num_workers, len(starts))
    # How far decoding may run ahead of the oldest unfinished batch: bounds the samples held.
    window = 2 * BATCHES_AHEAD * num_workers
    decoded: dict[int, Decoded] = {}
    sent = taken = 0
    with (
        progress(plan.title, len(plan.entries), "files", starts[0]) as advance,
        Pool(num_workers, plan.job) as pool,
    ):
        while taken < len(starts) or builder.writing:
            while sent < min(len(starts), taken + window):
                worker = pool.idle_worker()
                if worker is None:
                    break
                batch = slice(starts[sent], starts[sent] + BATCH_FILES)
                paths = tuple(entry.path for entry in plan.entries[batch])
                measured = tuple(plan.stats_clips[batch].tolist())
                pool.decode(worker, Decode(sent, paths, measured))
                sent += 1
            for reply in pool.replies():
                if isinstance(reply, Decoded):
                    decoded[reply.batch] = reply
                else:
                    builder.written(reply.path)
            while taken in decoded:
                reply = decoded.pop(taken)
                for write in builder.take(starts[taken], reply):
                    pool.write(write)
                pool.forget(taken)
                advance(len(reply.files))
                taken += 1


class _Rows:
    """The rows of the shard being filled."""

    def __init__(self, part: ShardPart, num_classes: int) -> None:
        self.part = part
        self.num_classes = num_classes
        self.writing = 0
        """Writes that have not been reported done."""
        self.clips: list[Clip] = []
        self.entries: list[Entry] = []
        self.next_entry = self.next_clip = 0
        self.bad: list[BadFile] = []
        self.noted: list[NotedFile] = []
        self.flushed = 0
        """Bytes that were on their way when the file was last flushed."""

    def arrays(self) -> ShardRows:
        """Everything but the waveform, as it goes into the file."""
        target = np.zeros((len(self.entries), self.num_classes), np.uint8)
        for row, entry in enumerate(self.entries):
            target[row, list(entry.labels)] = 1
        return ShardRows(
            np.array([clip.num_samples for clip in self.clips], np.int32),
            np.packbits(target, axis=1),
            np.array([os.fsencode(entry.name) for entry in self.entries], np.bytes_),
            np.array([os.fsencode(entry.path) for entry in self.entries], np.bytes_),
            np.array([clip.start_seconds for clip in self.clips], np.float64),
            np.array([clip.crc for clip in self.clips], np.uint32),
            self._flac_offsets(),
        )

    def _flac_offsets(self) -> NDArray[np.int64] | None:
        if self.part.codec != "flac":
            return None
        return np.cumsum([0, *(clip.num_bytes for clip in self.clips)], dtype=np.int64)

    def note(self, info: ShardInfo) -> FinishedShard:
        """What the shard adds to the set, summed in row order: the same after any resume."""
        counts = np.zeros(self.num_classes, np.int64)
        for entry in self.entries:
            counts[list(entry.labels)] += 1
        moments = {name: (0, 0, 0.0, 0.0) for name in FEATURES}
        for clip in self.clips:
            for name, m in (clip.moments or {}).items():
                clips, bins, total, squares = moments[name]
                moments[name] = (clips + 1, bins + m.num_bins, total + m.total, squares + m.squares)
        num_samples = sum(clip.num_samples for clip in self.clips)
        return FinishedShard(
            *info,
            self.next_entry,
            self.next_clip,
            num_samples,
            counts.tolist(),
            self.bad,
            self.noted,
            moments,
        )


class _Builder:
    """Gives clips their rows and turns full shards into finished ones, in order."""

    def __init__(self, plan: Plan, state: PackState, bad_count: BadCount) -> None:
        self.plan, self.state, self.bad_count = plan, state, bad_count
        self.shards = list(state.finished)
        self.first_entry = self.shards[-1].next_entry if self.shards else 0
        self._skip_clips = self.shards[-1].next_clip if self.shards else 0
        self.bad = [*plan.bad, *(bad for shard in self.shards for bad in shard.bad)]
        self._bad_since: list[BadFile] = []
        self._noted_since: list[NotedFile] = []
        bad_count.add(self.bad, plan.bad_list)
        self._rows: _Rows | None = None
        self._full: deque[_Rows] = deque()
        self._num_started = len(self.shards)
        self._sealer = ThreadPoolExecutor(1, "fastat-seal")
        self._flushing: deque[Future[None]] = deque()
        self._sealing: deque[Future[FinishedShard]] = deque()

    @property
    def writing(self) -> bool:
        """Whether a worker is still writing rows."""
        return any(rows.writing for rows in (self._rows, *self._full) if rows is not None)

    def check_bad(self) -> None:
        """Raises UserError when too many files are bad; lists those found so far."""
        if self.bad_count.exceeded():
            write_bad(self.plan.bad_list, self.bad)
            raise self.bad_count.error()

    def check_space(self) -> None:
        """As ``require_space``, for what is left."""
        require_space(self.plan, len(self.plan.entries) - self.first_entry, self.bad_count)

    def take(self, first_entry: int, batch: Decoded) -> list[Write]:
        """Rows for the next batch's clips; what its worker must write where."""
        writes: list[Write] = []
        held = 0
        for number, file in enumerate(batch.files, first_entry):
            entry = self.plan.entries[number]
            if isinstance(file, Bad):
                self._take_bad(entry, file)
                continue
            clips = file.clips
            if self._skip_clips == 0:
                self._noted_since.extend(
                    NotedFile(entry.path, *note, entry.line) for note in file.notes
                )
            for index in range(self._skip_clips, len(clips)):
                more = index + 1 < len(clips)
                upto = (number, index + 1) if more else (number + 1, 0)
                place = held + index
                write = self._take_clip(number, clips[index], upto, batch.batch, place)
                last = writes[-1] if writes else None
                if last and last.path == write.path and last.first + last.num_clips == place:
                    writes[-1] = last._replace(num_clips=last.num_clips + 1)
                else:
                    writes.append(write)
            held += len(clips)
            self._skip_clips = 0
        for write in writes:
            self._rows_at(write.path).writing += 1
        return writes

    def _take_bad(self, entry: Entry, bad: Bad) -> None:
        labels = ";".join(self.plan.classes.classes[k].id for k in entry.labels)
        file = BadFile(entry.path, bad.reason, bad.detail, labels, entry.line, *stamp(entry.path))
        self.bad.append(file)
        self._bad_since.append(file)
        self.bad_count.add([file], self.plan.bad_list)
        self.check_bad()

    def _take_clip(
        self, number: int, clip: Clip, upto: tuple[int, int], batch: int, place: int
    ) -> Write:
        """A row for a clip of entry ``number``, the clip at ``place`` of its batch."""
        rows = self._rows or self._start()
        offset = rows.part.add_row(clip.num_bytes)
        rows.clips.append(clip)
        rows.entries.append(self.plan.entries[number])
        rows.next_entry, rows.next_clip = upto
        if rows.part.full:
            self._complete(rows)
        return Write(batch, place, 1, str(rows.part.path), offset)

    def _start(self) -> _Rows:
        plan = self.plan
        part = ShardPart(
            plan.directory,
            self._num_started,
            plan.job.codec,
            plan.job.clip_samples,
            plan.label_bytes,
            plan.shard_room,
        )
        self._num_started += 1
        self._rows = _Rows(part, len(self.plan.classes))
        return self._rows

    def _complete(self, rows: _Rows) -> None:
        """No more rows: the shard is sealed when its last write is done."""
        rows.bad, self._bad_since = self._bad_since, []
        rows.noted, self._noted_since = self._noted_since, []
        self._rows = None
        self._full.append(rows)

    def written(self, path: str) -> None:
        """A write into the shard at ``path`` is done."""
        rows = self._rows_at(path)
        rows.writing -= 1
        if rows.part.end - rows.flushed >= FLUSH_BYTES:
            rows.flushed = rows.part.end
            self._flushing.append(self._sealer.submit(fsync, rows.part.path))
        self._seal()

    def _rows_at(self, path: str) -> _Rows:
        candidates = (self._rows, *self._full)
        return next(r for r in candidates if r is not None and str(r.part.path) == path)

    def _seal(self) -> None:
        # In a thread: flushing 1 GiB takes seconds, in which the next shard is decoded. One
        # thread, so that shards finish in order.
        while self._full and not self._full[0].writing:
            self._sealing.append(self._sealer.submit(self._seal_shard, self._full.popleft()))
        while self._flushing and self._flushing[0].done():
            self._flushing.popleft().result()
        while self._sealing and self._sealing[0].done():
            self.shards.append(self._sealing.popleft().result())

    def _seal_shard(self, rows: _Rows) -> FinishedShard:
        note = rows.note(rows.part.seal(rows.arrays()))
        self.state.record(note)
        rows.part.publish()
        return note

    def finish(self) -> list[FinishedShard]:
        """Closes the last shard; all shards, in order."""
        if self._rows is not None:
            # With the bad files behind its last clip: a run that goes on must not try them again.
            self._rows.next_entry, self._rows.next_clip = len(self.plan.entries), 0
            self._complete(self._rows)
        self._seal()
        while self._sealing:
            self.shards.append(self._sealing.popleft().result())
        return self.shards

    def stop(self) -> None:
        """Ends the sealing thread."""
        self._sealer.shutdown(cancel_futures=True)
