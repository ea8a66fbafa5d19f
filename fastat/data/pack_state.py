"""The folder of a set while it is packed: whose it is, what of it is finished, what must go on
failure."""

import csv
import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Sequence
from enum import Enum
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from fastat.atomic import atomic_path, atomic_write_text
from fastat.data.manifest import BadFile
from fastat.data.shard_writer import PART_SUFFIX
from fastat.data.shards import INDEX_FILE, STATE_FOLDER, index_crc32, read_index, shard_file
from fastat.errors import UserError

BAD_FILE = "bad.csv"


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
    next_entry: int
    """The entry to go on with, and which of its clips."""
    next_clip: int
    label_counts: list[int]
    bad: list[BadFile]
    """Found since the shard before."""
    moments: dict[str, tuple[int, int, float, float]]
    """Of each feature: clips, bins, sum, sum of squares."""


def standing(directory: Path, inputs: str) -> Standing:
    """What is in ``directory`` for a command with the fingerprint ``inputs``.

    Raises:
        UserError: something else is.
    """
    if not directory.exists():
        return Standing.NEW
    if not directory.is_dir():
        raise UserError(f"--out {directory}: expected a folder, this is a file")
    if (directory / INDEX_FILE).exists():
        if read_index(directory).get("inputs") == inputs:
            return Standing.FINISHED
        raise UserError(
            f"--out {directory}: holds a packed set of another command, or of a table or files "
            "that have changed since; give another --out or delete it"
        )
    state = directory / STATE_FOLDER / "state.json"
    if state.exists():
        try:
            inputs_of_state = json.loads(state.read_text("utf-8"))["inputs"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f"{state}: damaged ({error!r}); delete {directory}") from error
        if inputs_of_state == inputs:
            return Standing.UNFINISHED
        raise UserError(
            f"--out {directory}: holds an unfinished set of another command, or of a table or "
            "files that have changed since; give another --out or delete it"
        )
    strangers = sorted({p.name for p in directory.iterdir()} - {STATE_FOLDER, BAD_FILE})
    if strangers:
        raise UserError(f"--out {directory}: expected a new or empty folder, found {strangers[0]}")
    return Standing.NEW


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
            if standing(directory, inputs) is Standing.NEW:
                atomic_write_text(self.state / "state.json", json.dumps({"inputs": inputs}))
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

    def write_bad(self, bad: Sequence[BadFile]) -> None:
        """bad.csv, in the order of the table."""
        with (
            atomic_path(self.directory / BAD_FILE) as path,
            path.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file,
        ):
            writer = csv.writer(file)
            writer.writerow(BadFile._fields)
            in_order: list[BadFile] = sorted(bad, key=lambda b: (b.line, b.path))
            writer.writerows(in_order)

    def finish(self, index: dict[str, Any]) -> None:
        """Writes dataset.json: the set is whole. Then removes the state."""
        index = index | {"crc32": index_crc32(index)}
        atomic_write_text(self.directory / INDEX_FILE, json.dumps(index, indent=1) + "\n")
        shutil.rmtree(self.state)

    def _read_finished(self) -> Iterable[FinishedShard]:
        index = 0
        while True:
            shard = self.directory / shard_file(index)
            note = self.state / (shard.name + ".json")
            if not (shard.is_file() and note.is_file()):
                return
            fields = json.loads(note.read_text("utf-8"))
            if shard.stat().st_size != fields["bytes"]:
                return
            fields["bad"] = [BadFile(*bad) for bad in fields["bad"]]
            fields["moments"] = {name: tuple(m) for name, m in fields["moments"].items()}
            yield FinishedShard(**fields)
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
