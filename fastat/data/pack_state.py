"""The folder of a set while it is packed: whose it is, what of it is finished, what must go on
failure."""

import fcntl
import json
import os
import shutil
from collections.abc import Iterable
from enum import Enum
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from fastat.atomic import atomic_write_text
from fastat.data.manifest import BadFile
from fastat.data.shard_writer import PART_SUFFIX
from fastat.data.shards import (
    INDEX_FILE,
    STATE_FOLDER,
    ShardInfo,
    read_index,
    shard_file,
    write_index,
)
from fastat.errors import UserError
from fastat.fields import check_keys
from fastat.packing.bad_files import BAD_FILE, NotedFile

STATE_FILE = "state.json"

NOTE_ERRORS = (ValueError, KeyError, TypeError, AttributeError, RecursionError)
"""What a damaged note of finished shards raises."""


class Claim(NamedTuple):
    """Whose an unfinished set is: ``state.json``."""

    inputs: str
    """Fingerprint of the command and what it reads."""
    parts: int = 0
    """Processes that pack a part each; 0 for a command that packs the set alone."""
    base: str | None = None
    """Fingerprint of the finished set in the same folder that is appended to."""


class Standing(Enum):
    """What a command finds in its output folder."""

    NEW = "new"
    UNFINISHED = "unfinished, by the same command"
    FINISHED = "finished, by the same command"


class FinishedShard(NamedTuple):
    """What a finished shard adds to the set; kept beside the shard until the set is whole."""

    file: str
    rows: int
    bytes: int
    crc32: int
    codec: str
    next_entry: int
    """The entry to go on with, and which of its clips."""
    next_clip: int
    num_samples: int
    """Real samples of its rows, without their padding."""
    label_counts: list[int]
    bad: list[BadFile]
    """Bad files found since the previous shard."""
    noted: list[NotedFile]
    """Remarks on files read since the previous shard."""
    moments: dict[str, tuple[int, int, float, float]]
    """Of each feature: clips, bins, sum, sum of squares."""

    @property
    def info(self) -> ShardInfo:
        """What dataset.json says of it."""
        return ShardInfo(self.file, self.rows, self.bytes, self.crc32, self.codec)

    @classmethod
    def from_json(cls, fields: dict[str, Any], path: Path) -> Self:
        """From ``_asdict`` after a way through the JSON file ``path``.

        Raises:
            Failure: another version of fastat wrote it.
        """
        check_keys(path, fields, cls)
        bad = [BadFile(*file) for file in fields["bad"]]
        moments = {name: tuple(m) for name, m in fields["moments"].items()}
        noted = [NotedFile(*file) for file in fields["noted"]]
        return cls(**fields | {"bad": bad, "noted": noted, "moments": moments})


def standing(directory: Path, claim: Claim) -> Standing:
    """What is in ``directory`` for the command of ``claim``; for one that appends, of its own.

    Raises:
        UserError: something else is.
    """
    if not directory.exists():
        return Standing.NEW
    if not directory.is_dir():
        raise UserError(f"--out {directory}: expected a folder, this is a file")
    if claim.base is None and (directory / INDEX_FILE).exists():
        if read_index(directory).get("inputs") == claim.inputs:
            return Standing.FINISHED
        raise UserError(
            f"--out {directory}: holds a packed set of another command, or of a table or files "
            "that have changed since; --append adds to it what is new, or give another --out"
        )
    found = read_claim(directory)
    if found == claim:
        return Standing.UNFINISHED
    if found is not None and found.inputs == claim.inputs:
        form = f"in {found.parts} parts (--shard 0/{found.parts}, ...)" if found.parts else "alone"
        raise UserError(
            f"--out {directory}: the same command is packing it {form}; let that go on, or give "
            "another --out or delete it"
        )
    if found is not None:
        what = "set" if found.base is None else "--append"
        raise UserError(
            f"--out {directory}: holds an unfinished {what} of another command, or of a table or "
            "files that have changed since; "
            + (
                "give another --out or delete it"
                if found.base is None
                else f"finish that, or delete {directory / STATE_FOLDER} to give it up"
            )
        )
    if claim.base is not None:
        return Standing.NEW
    strangers = sorted({p.name for p in directory.iterdir()} - {STATE_FOLDER, BAD_FILE})
    if strangers:
        raise UserError(f"--out {directory}: expected a new or empty folder, found {strangers[0]}")
    return Standing.NEW


def read_claim(directory: Path) -> Claim | None:
    """Who packs into the folder; None for nobody."""
    path = directory / STATE_FOLDER / STATE_FILE
    try:
        document = json.loads(path.read_text("utf-8"))
        check_keys(path, document, Claim)
        return Claim(**document)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: damaged ({error!r}); delete {directory}") from error


class PackState:
    """The lock on an output folder, and what earlier runs finished there.

    Used as a context manager. Left by an exception, it removes what is not finished; what is
    stays, for the same command to go on with.
    """

    def __init__(self, directory: Path, inputs: str) -> None:
        """Claims the folder.

        Raises:
            UserError: it cannot be written, another process is packing into it, or as
            ``standing``.
        """
        self.directory = directory
        self.state = directory / STATE_FOLDER
        try:
            self._made = not directory.exists()
            self.state.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.state / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(self._lock)
                raise UserError(
                    f"--out {directory}: another fastat pack is writing to it"
                ) from None
            claim = Claim(inputs)
            found = standing(directory, claim)
            if found is Standing.FINISHED:  # since this command looked
                shutil.rmtree(self.state)
                os.close(self._lock)
                raise UserError(f"--out {directory}: another fastat pack has just finished it")
            if found is Standing.NEW:
                atomic_write_text(self.state / STATE_FILE, json.dumps(claim._asdict()))
            self.finished = list(self._read_finished())
            self._remove_unfinished()
        except OSError as error:
            raise UserError(f"--out {directory}: cannot write there: {error.strerror}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            self._remove_unfinished()
            if not any(self.directory.glob("shard-*.h5")):
                shutil.rmtree(self.state)
                if self._made and not any(self.directory.iterdir()):
                    self.directory.rmdir()
        os.close(self._lock)

    def record(self, shard: FinishedShard) -> None:
        """Says that a shard is sealed; publishing it makes it count."""
        path = self.state / (shard.file + ".json")
        atomic_write_text(path, json.dumps(shard._asdict()))

    def finish(self, index: dict[str, Any]) -> None:
        """Writes dataset.json: the set is whole. Then removes the state."""
        write_index(self.directory, index)
        shutil.rmtree(self.state)

    def _read_finished(self) -> Iterable[FinishedShard]:
        index = 0
        while True:
            shard = self.directory / shard_file(index)
            note = self.state / (shard.name + ".json")
            if not (shard.is_file() and note.is_file()):
                return
            try:
                finished = FinishedShard.from_json(json.loads(note.read_text("utf-8")), note)
            except NOTE_ERRORS as error:
                raise UserError(f"{note}: damaged ({error!r}); delete {self.directory}") from error
            if shard.stat().st_size != finished.bytes:
                return
            yield finished
            index += 1

    def _remove_unfinished(self) -> None:
        parts = self.directory.glob(f"shard-*{PART_SUFFIX}*")
        temporary = self.directory.glob(".*.tmp")  # of atomic_path
        for path in (*parts, *temporary, *self._orphans()):
            path.unlink()

    def _orphans(self) -> Iterable[Path]:
        """Shards behind the first that is not finished."""
        known = {shard_file(i) for i in range(len(list(self._read_finished())))}
        return [p for p in self.directory.glob("shard-*.h5") if p.name not in known]
