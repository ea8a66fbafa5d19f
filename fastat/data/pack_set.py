"""Packs one set: feeds the workers, gives rows to clips in the table's order, closes shards."""

import hashlib
import json
import math
import os
from collections import Counter, deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastat.atomic import fsync
from fastat.data.classes import ClassList
from fastat.data.flac import PCM_SHARE
from fastat.data.manifest import BadFile, Entry
from fastat.data.pack_messages import Bad, Clip, Decode, Decoded, Job, Write
from fastat.data.pack_pool import BATCHES_AHEAD, Pool
from fastat.data.pack_state import BAD_FILE, FinishedShard, PackState
from fastat.data.shard_writer import ShardPart
from fastat.data.shards import FORMAT, SAMPLE_RATE, VERSION, ShardInfo, ShardRows, codec_of
from fastat.errors import Failure, UserError
from fastat.features import FEATURES
from fastat.progress import progress

BATCH_FILES = 8
"""Files a message: enough to make messages rare, few enough to keep all workers busy to the
end."""


FLUSH_BYTES = 64 << 20
"""Written rows go to the disk while others are decoded, not all when the shard is sealed."""


class Plan(NamedTuple):
    """A set to be packed."""

    directory: Path
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

    def add(self, files: Sequence[BadFile]) -> None:
        """Counts files."""
        self.reasons.update(bad.reason for bad in files)

    def exceeded(self) -> bool:
        """Whether there are more than --max-bad of them."""
        return self.reasons.total() > self.max_bad * self.num_files

    def error(self, directory: Path, example: BadFile) -> UserError:
        """What to tell the user when there are."""
        count = self.reasons.total()
        enough = math.ceil(100 * count / self.num_files) / 100
        reasons = ", ".join(f"{n:,} {reason}" for reason, n in self.reasons.most_common())
        detail = f" ({example.detail})" if example.detail else ""
        return UserError(
            f"{count:,} of {self.num_files:,} files are bad, more than --max-bad {self.max_bad:g}: "
            f"{reasons}, such as {example.path}{detail}; listed in {directory / BAD_FILE}; "
            f"--max-bad {enough:g} or more packs the others"
        )


class SetResult(NamedTuple):
    """What became of a set."""

    clips: int
    shards: int
    label_counts: NDArray[np.int64]  # [K]
    resumed_clips: int


def pack_set(plan: Plan, num_workers: int, bad_count: BadCount) -> SetResult:
    """Packs ``plan`` into its folder, going on where a killed run of it stopped.

    Raises:
        UserError: too many bad files, no good one, or a folder that is not ours to write.
        Failure: the disk, or a worker.
    """
    with PackState(plan.directory, plan.inputs) as state:
        builder = _Builder(plan, state, bad_count)
        try:
            builder.check_bad()
            builder.check_space()
            resumed_clips = sum(shard.rows for shard in builder.shards)
            if builder.first_entry < len(plan.entries):
                _run(plan, builder, num_workers)
            builder.finish()
        except OSError as error:
            reason = error.strerror or str(error)
            raise Failure(f"{plan.directory}: cannot write: {reason}") from error
        finally:
            builder.stop()
        return SetResult(
            sum(shard.rows for shard in builder.shards),
            len(builder.shards),
            builder.label_counts(),
            resumed_clips,
        )


def _run(plan: Plan, builder: "_Builder", num_workers: int) -> None:
    """Decodes what is left of the entries and has every clip written."""
    starts = range(builder.first_entry, len(plan.entries), BATCH_FILES)
    num_workers = min(num_workers, len(starts))
    # How far decoding may run ahead of the oldest unfinished batch: bounds the samples held.
    window = 2 * BATCHES_AHEAD * num_workers
    decoded: dict[int, Decoded] = {}
    sent = taken = 0
    with (
        progress(f"pack {plan.directory.name}", len(plan.entries), "files", starts[0]) as advance,
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
        return FinishedShard(
            *info, self.next_entry, self.next_clip, counts.tolist(), self.bad, moments
        )


class _Builder:
    """Gives clips their rows and turns full shards into finished ones, in order."""

    def __init__(self, plan: Plan, state: PackState, bad_count: BadCount) -> None:
        self.plan, self.state, self.bad_count = plan, state, bad_count
        self.shards = list(state.finished)
        self.first_entry = self.shards[-1].next_entry if self.shards else 0
        self._skip_clips = self.shards[-1].next_clip if self.shards else 0
        self._bad = [*plan.bad, *(bad for shard in self.shards for bad in shard.bad)]
        self._bad_since: list[BadFile] = []
        bad_count.add(self._bad)
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
        """Raises UserError when too many files are bad; bad.csv then lists those found so far."""
        if self.bad_count.exceeded():
            self.state.write_bad(self._bad)
            raise self.bad_count.error(self.plan.directory, self._bad[-1])

    def check_space(self) -> None:
        """Raises Failure when the disk cannot hold the clips: better now than hours later."""
        if self.plan.job.segments:
            return
        left = len(self.plan.entries) - self.first_entry
        sure = left - self.bad_count.max_bad * self.bad_count.num_files
        pcm_bytes = sure * 2 * self.plan.job.clip_samples
        needed = int(pcm_bytes * (PCM_SHARE if self.plan.job.codec == "flac" else 1))
        disk = os.statvfs(self.plan.directory)
        free = disk.f_bavail * disk.f_frsize
        if needed > free:
            raise Failure(
                f"{self.plan.directory}: {needed / 2**30:.1f} GiB needed for {left:,} clips, "
                f"the disk has {free / 2**30:.1f} GiB left"
            )

    def take(self, first_entry: int, batch: Decoded) -> list[Write]:
        """Rows for the next batch's clips; what its worker must write where."""
        writes: list[Write] = []
        held = 0
        for number, clips in enumerate(batch.files, first_entry):
            if isinstance(clips, Bad):
                self._take_bad(self.plan.entries[number], clips)
                continue
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
        file = BadFile(entry.path, bad.reason, bad.detail, labels, entry.line)
        self._bad.append(file)
        self._bad_since.append(file)
        self.bad_count.add([file])
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

    def label_counts(self) -> NDArray[np.int64]:
        """Clips of each class, [K]."""
        counts = np.zeros(len(self.plan.classes), np.int64)
        for shard in self.shards:
            counts += shard.label_counts
        return counts

    def finish(self) -> None:
        """Closes the last shard and makes the set."""
        if self._rows is not None:
            self._complete(self._rows)
        self._seal()
        while self._sealing:
            self.shards.append(self._sealing.popleft().result())
        self.state.write_bad(self._bad)
        if not self.shards:
            raise UserError(
                f"{self.plan.directory}: no clip is left, all {len(self._bad)} files are bad; "
                f"{BAD_FILE} there says why"
            )
        self.state.finish(self._index())

    def stop(self) -> None:
        """Ends the sealing thread."""
        self._sealer.shutdown(cancel_futures=True)

    def _index(self) -> dict[str, Any]:
        """dataset.json."""
        plan = self.plan
        shards = [ShardInfo(*shard[:5]) for shard in self.shards]
        content = {
            "classes": [c._asdict() for c in plan.classes.classes],
            "clip_samples": plan.job.clip_samples,
            "shards": [info._asdict() for info in shards],
        }
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode())
        return {
            "format": FORMAT,
            "version": VERSION,
            "fingerprint": digest.hexdigest(),
            "inputs": plan.inputs,
            "clips": sum(shard.rows for shard in self.shards),
            "bad_files": len(self._bad),
            "clip_seconds": plan.job.clip_samples / SAMPLE_RATE,
            "clip_samples": plan.job.clip_samples,
            "sample_rate": SAMPLE_RATE,
            "codec": codec_of(shards),
            "options": plan.options,
            "stats": {name: self._stats(name) for name in FEATURES},
            "shards": content["shards"],
            "label_counts": self.label_counts().tolist(),
            "classes": content["classes"],
        }

    def _stats(self, feature: str) -> dict[str, float]:
        clips = bins = 0
        total = squares = 0.0
        for shard in self.shards:  # in order: the same sum after any resume
            m = shard.moments[feature]
            clips, bins, total, squares = clips + m[0], bins + m[1], total + m[2], squares + m[3]
        mean = total / bins if bins else math.nan
        std = math.sqrt(max(squares / bins - mean**2, 0.0)) if bins else math.nan
        if not std > 0.0:
            raise UserError(
                f"{self.plan.directory}: no statistics of {feature}: the {clips} sampled clips are "
                "silent or too short for a frame"
            )
        return {"mean": mean, "std": std, "clips": clips}
