"""Files and folders that are written whole or not at all, also after a power cut; locks."""

import csv
import errno
import fcntl
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import IO, Any


def fsync(path: Path) -> None:
    """Flushes a file's content, or a folder's entries, to the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def atomic_path(path: Path, *, over_folder: bool = False) -> Iterator[Path]:
    """A temporary path at which to write a file or folder; renamed to ``path`` after the block.

    An existing file is replaced; an existing folder only with ``over_folder``, which takes two
    renames: a process killed between them leaves neither the old nor the new folder. If the block
    raises, what it wrote is removed and ``path`` stays as it was.
    """
    # Not by the process's number: processes on several hosts may write the same path.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        if temporary.is_dir():
            for child in temporary.iterdir():
                fsync(child)
        fsync(temporary)
        old = temporary.with_suffix(".old.tmp")
        if over_folder and path.is_dir():
            os.replace(path, old)
        os.replace(temporary, path)
        fsync(path.parent)
        if old.exists():
            shutil.rmtree(old)
    except BaseException:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        else:
            temporary.unlink(missing_ok=True)
        raise


def new_folder(path: Path) -> Path:
    """Makes the folder ``path``, or if that exists ``path``-2, ``path``-3, and so on.

    No two processes get the same folder.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = path
    for number in count(2):
        try:
            folder.mkdir()
            break
        except FileExistsError:
            folder = path.with_name(f"{path.name}-{number}")
    return folder


def remove_if_unused(run: Path) -> None:
    """Removes a run folder that has at most a lock file in it: the training failed to start.

    Errors are ignored, because one here would hide the one that ended the training.
    """
    if run.is_dir() and {path.name for path in run.iterdir()} <= {".lock"}:
        shutil.rmtree(run, ignore_errors=True)


def atomic_write_text(path: Path, text: str) -> None:
    """Replaces ``path`` by ``text``."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, "utf-8", "surrogateescape")


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Replaces ``path`` by a CSV table in UTF-8; bytes of file names that are no UTF-8 are kept."""
    with (
        atomic_path(path) as temporary,
        temporary.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)


def append(path: Path, data: bytes) -> None:
    """Appends ``data`` to a file; if that fails, the file stays as it was.

    Raises:
        OSError: for example on a full disk.
    """
    with path.open("ab", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        try:
            while data:
                data = data[file.write(data) :]
        except OSError:
            file.truncate(end)
            raise


def remove_temporaries(folder: Path) -> None:
    """Removes what ``atomic_path`` left in ``folder`` when its process was killed.

    No other process may be writing to the folder.
    """
    for path in folder.glob(".*.tmp"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def lock(file: IO[Any], *, wait: bool = False) -> bool:
    """Locks ``file`` for this process alone; False if its file system has no locks, as Lustre
    without the mount option ``flock``.

    Raises:
        BlockingIOError: another process holds the lock, and not ``wait``.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
            return False
        raise
    return True


def locks_work(folder: Path) -> bool:
    """Whether the file system of ``folder`` has locks.

    Raises:
        OSError: no file can be made in it.
    """
    with tempfile.TemporaryFile(dir=folder) as file:
        return lock(file)
