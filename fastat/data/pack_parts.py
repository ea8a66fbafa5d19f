"""A set that several processes pack, on one host or on many with a shared file system.

Part i of n takes the i-th block of the table's entries and packs it by itself; whoever finishes
last makes one set of all parts: it renames their shards, in order, and writes dataset.json. The
rows are those of a plain pack. Appending goes the same way, in one part or several: the parts'
shards follow those of the set, which stays as it is until the new dataset.json replaces the old.

State in OUT/.pack, next to what a plain pack keeps there:

    state.json          the command and its number of parts, the same for all
    part-2-of-8/        part 2 while it is packed: its shards, and in .pack their state
    part-2-of-8.json    part 2 is finished: its shards and bad files
    merge.lock          held while parts begin and while they are merged
    bad.csv, notes.csv  of a set that is appended to, until the new dataset.json is written
"""

import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from fastat.atomic import atomic_write_text, fsync
from fastat.data.manifest import BadFile
from fastat.data.pack_plan import BadCount, Plan, SetResult
from fastat.data.pack_set import disk_errors, pack_rows, require_clips, require_space
from fastat.data.pack_state import (
    NOTE_ERRORS,
    STATE_FILE,
    Claim,
    FinishedShard,
    PackState,
    Standing,
    read_claim,
    standing,
)
from fastat.data.shards import (
    INDEX_FILE,
    STATE_FOLDER,
    checksum,
    read_index,
    shard_file,
    write_index,
)
from fastat.errors import Failure, UserError
from fastat.packing.bad_files import (
    BAD_FILE,
    NOTES_FILE,
    read_bad,
    read_notes,
    write_bad,
    write_notes,
)
from fastat.packing.index import appended, finished_result, index_of, set_result

MAX_PARTS = 10_000
APPEND_BAD_FILE = "bad-append.csv"
"""When too many files of an --append are bad; bad.csv stays that of the set."""
REMOVED_FOLDER = STATE_FOLDER + ".removed"


@dataclass(frozen=True)
class Part:
    """One of ``count`` parts of a set, counted from 0."""

    index: int
    count: int

    @classmethod
    def parse(cls, text: str) -> "Part":
        """``--shard i/n``; UserError for anything else."""
        match = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text)
        part = cls(int(match[1]), int(match[2])) if match else cls(0, 0)
        if not 0 <= part.index < part.count <= MAX_PARTS:
            raise UserError(f"--shard: expected i/n, from 0/n to (n-1)/n, got {text}")
        return part

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> "Part | None":
        """This process's part under torchrun, or wherever RANK and WORLD_SIZE are set; None for a
        process alone."""
        rank, size = environment.get("RANK"), environment.get("WORLD_SIZE")
        if rank is None or size is None:
            return None
        if not (rank.isdecimal() and size.isdecimal() and int(rank) < int(size) <= MAX_PARTS):
            raise UserError(f"expected RANK below WORLD_SIZE, got RANK={rank} WORLD_SIZE={size}")
        return cls(int(rank), int(size)) if int(size) > 1 else None

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    @property
    def name(self) -> str:
        """Of its folder, and with .json of its note."""
        if self.count == 1:  # only --append comes here in one part
            return "append"
        return f"part-{self.index}-of-{self.count}"

    def of(self, plan: Plan) -> Plan:
        """What of ``plan`` this part packs, in a folder of its own; without the files known to be
        bad, which are the whole's."""
        total = len(plan.entries)
        block = slice(total * self.index // self.count, total * (self.index + 1) // self.count)
        return plan._replace(
            title=plan.title if self.count == 1 else f"{plan.title} {self}",
            directory=plan.directory / STATE_FOLDER / self.name,
            entries=plan.entries[block],
            bad=[],
            stats_clips=plan.stats_clips[block],
        )


class PartsResult(NamedTuple):
    """What became of a command that packs a part."""

    sets: list[SetResult]
    """The whole sets, or what this part packed of them."""
    waiting_for: tuple[int, ...]
    """The other parts that are not finished; none: the sets are whole."""
    bad_count: BadCount
    """Of the whole, or of this part and what was known before."""


class _Note(NamedTuple):
    """A finished part, or all of them."""

    shards: list[FinishedShard]
    paths: list[Path]
    """Where those shards were written."""
    bad: list[BadFile]


def pack_parts(
    plans: Sequence[Plan],
    part: Part,
    num_workers: int,
    num_files: int,
    max_bad: float,
    base: dict[str, Any] | None = None,
) -> PartsResult:
    """Packs ``part`` of every set of a command, and when it was the last, makes the sets.

    ``base``: index of the set that ``plans``, then a single one, is appended to. Of ``num_files``
    files at most the share ``max_bad`` may be bad, over all parts and sets.

    Raises:
        UserError: too many bad files, no good one, or a folder that is not ours to write.
        Failure: the disk, or a worker.
    """
    known = check_known(plans, num_files, max_bad)
    for plan in plans:
        _claim(plan, part, base)
    if part.count > 1:  # a part alone looks for itself
        for plan in plans:
            _check_space(plan, known)
    own = [_pack_part(plan, part, num_workers, known) for plan in plans]
    waiting_for = sorted({i for plan in plans for i in _unfinished(plan, part)})
    if waiting_for:
        return PartsResult(own, tuple(waiting_for), known)
    bad_count = BadCount(num_files, max_bad)
    wholes = _merge(plans, part, bad_count, base)
    sets = [
        whole._replace(resumed_clips=packed.resumed_clips)
        for whole, packed in zip(wholes, own, strict=True)
    ]
    return PartsResult(sets, (), bad_count)


def check_known(plans: Sequence[Plan], num_files: int, max_bad: float) -> BadCount:
    """Counts the files that are known to be bad before anything is decoded.

    Raises:
        UserError: already they are too many; they are listed.
    """
    known = BadCount(num_files, max_bad)
    for plan in plans:
        known.add(plan.bad, plan.bad_list)
    if known.exceeded():
        raise _too_many(known, plans, [plan.bad for plan in plans])
    return known


def settle(directory: Path) -> None:
    """Ends what a killed command left to do once its dataset.json was there."""
    shutil.rmtree(directory / REMOVED_FOLDER, ignore_errors=True)
    with _merge_lock(directory) as held:
        if not held or not (directory / INDEX_FILE).exists():
            return
        claim = read_claim(directory)
        # A state that appends to the set as it is now is at work, or waits to go on.
        if claim is None or claim.base != checksum(read_index(directory)):
            _remove_temporary(directory)
            _publish_lists(directory)
            _remove_state(directory)


def _claim(plan: Plan, part: Part, base: dict[str, Any] | None) -> None:
    """Says in the folder who packs into it.

    Raises:
        UserError: somebody else does, or it cannot be written.
    """
    claim = Claim(plan.inputs, part.count, None if base is None else checksum(base))
    if standing(plan.directory, claim) is not Standing.NEW:
        return
    state = plan.directory / STATE_FOLDER
    try:
        state.mkdir(parents=True, exist_ok=True)
        with _merge_lock(plan.directory) as held:
            if held and standing(plan.directory, claim) is Standing.NEW:
                atomic_write_text(state / STATE_FILE, json.dumps(claim._asdict()))
    except OSError as error:
        raise UserError(f"--out {plan.directory}: cannot write there: {error.strerror}") from error


def _too_many(
    bad_count: BadCount, plans: Sequence[Plan], bad: Sequence[Sequence[BadFile]]
) -> UserError:
    """Lists the ``bad`` files of each set; the error that says so."""
    for plan, files in zip(plans, bad, strict=True):
        if files:
            with disk_errors(plan.directory):
                plan.directory.mkdir(parents=True, exist_ok=True)
                write_bad(plan.bad_list, files)
    return bad_count.error()


def _check_space(plan: Plan, bad_count: BadCount) -> None:
    """Raises Failure when the disk cannot hold what all parts have not written yet."""
    written = 0
    for path in (plan.directory / STATE_FOLDER).glob("*/shard-*"):
        with suppress(FileNotFoundError):  # a peer renames it
            written += 512 * path.stat().st_blocks
    if (plan.directory / STATE_FOLDER).exists():
        require_space(plan, len(plan.entries), bad_count, written)


def _pack_part(plan: Plan, part: Part, num_workers: int, bad_count: BadCount) -> SetResult:
    """Packs a part of a set, or finds it packed."""
    own = part.of(plan)
    # Under the lock: a part that begins removes what is unfinished in its folder, and a merge
    # moves shards out of it.
    with _merge_lock(plan.directory) as held:
        if not held:
            return finished_result(plan.directory)
        note = _read_note(plan, part)
        state = PackState(own.directory, plan.inputs) if note is None else None
    if note is not None:
        bad_count.add(note.bad, plan.bad_list)
        clips = sum(shard.rows for shard in note.shards)
        return set_result(plan, note.shards, note.bad, resumed_clips=clips)
    assert state is not None
    try:
        with state, disk_errors(plan.directory):
            packed = pack_rows(own, state, num_workers, bad_count)
            shards = [shard._replace(bad=[])._asdict() for shard in packed.shards]
            note_path = plan.directory / STATE_FOLDER / f"{part.name}.json"
            atomic_write_text(note_path, json.dumps({"shards": shards, "bad": packed.bad}))
    finally:
        if part.count == 1:  # parts have peers, who go on
            _drop_empty(plan, own)
    return set_result(plan, packed.shards, packed.bad, packed.resumed_clips)


def _drop_empty(plan: Plan, own: Plan) -> None:
    """Ends the claim of an --append that failed before its first shard, as that of a plain pack
    ends: a corrected table may follow."""
    with _merge_lock(plan.directory) as held:
        # PackState has removed its own when nothing in it was finished.
        if held and not (own.directory / STATE_FOLDER).exists():
            _remove_state(plan.directory)


def _read_note(plan: Plan, part: Part) -> _Note | None:
    """What a part says it finished; None while it is not."""
    path = plan.directory / STATE_FOLDER / f"{part.name}.json"
    try:
        fields = json.loads(path.read_text("utf-8"))
        shards = [FinishedShard.from_json(shard, path) for shard in fields["shards"]]
        bad = [BadFile(*file) for file in fields["bad"]]
    except FileNotFoundError:
        return None
    except NOTE_ERRORS as error:
        raise UserError(f"{path}: damaged ({error!r}); delete {plan.directory}") from error
    folder = part.of(plan).directory
    return _Note(shards, [folder / shard.file for shard in shards], bad)


def _unfinished(plan: Plan, part: Part) -> list[int]:
    """Parts without a note; none when the set is whole."""
    try:
        # Listed rather than looked up: a network file system remembers names it did not find.
        names = set(os.listdir(plan.directory / STATE_FOLDER))
    except FileNotFoundError:
        return []
    return [i for i in range(part.count) if f"{Part(i, part.count).name}.json" not in names]


def _merge(
    plans: Sequence[Plan], part: Part, bad_count: BadCount, base: dict[str, Any] | None
) -> list[SetResult]:
    """Makes whole sets of finished parts; a set that another process made is left as it is.

    Killed anywhere, it goes on from the parts' notes: what is where says what is done.
    """
    with ExitStack() as locks:
        held = [locks.enter_context(_merge_lock(plan.directory)) for plan in plans]
        notes = [
            _joined(plan, part, base) if ours else None
            for plan, ours in zip(plans, held, strict=True)
        ]
        for plan, note in zip(plans, notes, strict=True):
            found = read_bad(plan.directory / BAD_FILE) if note is None else note.bad
            bad_count.add(found, plan.bad_list)
        if bad_count.exceeded():
            listed = [[] if note is None else note.bad for note in notes]
            raise _too_many(bad_count, plans, listed)
        return [
            finished_result(plan.directory) if note is None else _merge_set(plan, note, base)
            for plan, note in zip(plans, notes, strict=True)
        ]


def _joined(plan: Plan, part: Part, base: dict[str, Any] | None) -> _Note:
    """All parts' notes as one: shards by their names in the set, and all bad files."""
    first = 0 if base is None else len(base["shards"])
    joined = _Note([], [], list(plan.bad))
    for i in range(part.count):
        note = _read_note(plan, Part(i, part.count))
        if note is None:
            raise Failure(f"{plan.directory}: part {i} of {part.count} is gone since it was packed")
        for shard in note.shards:
            joined.shards.append(shard._replace(file=shard_file(first + len(joined.shards))))
        joined.paths.extend(note.paths)
        joined.bad.extend(note.bad)
    return joined


def _merge_set(plan: Plan, note: _Note, base: dict[str, Any] | None) -> SetResult:
    directory, bad = plan.directory, note.bad
    noted = [file for shard in note.shards for file in shard.noted]
    with disk_errors(directory):
        _remove_temporary(directory)
        if base is None:
            write_bad(directory / BAD_FILE, bad)
            write_notes(directory / NOTES_FILE, noted)
            require_clips(directory, note.shards, bad)
            index = index_of(plan, note.shards, len(bad))
        else:
            tried = {entry.path for entry in plan.entries} | {file.path for file in plan.bad}
            earlier = read_bad(directory / BAD_FILE)
            bad = [*(file for file in earlier if file.path not in tried), *bad]
            index = appended(base, note.shards, len(bad))
            noted = [*read_notes(directory / NOTES_FILE), *noted]
            write_bad(directory / STATE_FOLDER / BAD_FILE, bad)
            write_notes(directory / STATE_FOLDER / NOTES_FILE, noted)
            (directory / APPEND_BAD_FILE).unlink(missing_ok=True)
        for path, shard in zip(note.paths, note.shards, strict=True):
            if path.exists():
                os.replace(path, directory / shard.file)
            elif not (directory / shard.file).exists():
                raise Failure(f"{path}: this shard is gone since it was packed")
        fsync(directory)
        write_index(directory, index)
        _publish_lists(directory)
        _remove_state(directory)
    return finished_result(plan.directory)


def _publish_lists(directory: Path) -> None:
    """bad.csv and notes.csv of an append follow its dataset.json: until then those there are the
    set's."""
    for name in (BAD_FILE, NOTES_FILE):
        listed = directory / STATE_FOLDER / name
        if listed.exists():
            os.replace(listed, directory / name)
            fsync(directory)


def _remove_temporary(directory: Path) -> None:
    """What a merge left that was killed while it wrote."""
    for name in (BAD_FILE, NOTES_FILE, INDEX_FILE):
        for path in directory.glob(f".{name}.*.tmp"):  # of atomic_path
            path.unlink()


def _remove_state(directory: Path) -> None:
    """Renamed first: a peer finds the state whole or gone."""
    removed = directory / REMOVED_FOLDER
    shutil.rmtree(removed, ignore_errors=True)  # of a killed command
    os.replace(directory / STATE_FOLDER, removed)
    # A network file system keeps files that a peer has open a little longer.
    shutil.rmtree(removed, ignore_errors=True)


@contextmanager
def _merge_lock(directory: Path) -> Iterator[bool]:
    """Holds the folder's lock, waiting for it; False when nothing is packed there any more."""
    fd = _locked(directory / STATE_FOLDER / "merge.lock")
    try:
        yield fd is not None
    finally:
        if fd is not None:
            os.close(fd)


def _locked(path: Path) -> int | None:
    while True:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except FileNotFoundError:
            return None
        fcntl.flock(fd, fcntl.LOCK_EX)
        # Whoever held it may have removed the state, and another command begun.
        if path.exists() and os.path.samestat(os.fstat(fd), path.stat()):
            return fd
        os.close(fd)
