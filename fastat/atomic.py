"""Files and folders that appear whole or not at all, also after a power cut."""

import csv
import io
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path


def fsync(path: Path) -> None:
    """Flushes a file's content, or a folder's entries, to the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def atomic_path(path: Path, *, over_folder: bool = False) -> Iterator[Path]:
    """A temporary path to write a file or folder at; renamed to ``path`` when the block ends well.

    ``path`` may be an existing file, which is replaced, but not an existing folder, unless
    ``over_folder`` says so: that takes two steps, and killed between them there is neither. When
    the block raises, what it wrote is removed and ``path`` stays as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        if temporary.is_dir():
            for child in temporary.iterdir():
                fsync(child)
        fsync(temporary)
        old = path.with_name(f".{path.name}.{os.getpid()}.old.tmp")
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
    """Makes the folder ``path``, or where that exists already ``path``-2, ``path``-3, and so on.

    No two processes get the same one.
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
    """Removes a run folder that holds at most a lock: its training ended before it began.

    What cannot be removed stays, since an error here would hide the one that ended the training.
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


def append(file: io.FileIO, data: bytes) -> None:
    """Writes ``data`` at the end of an unbuffered file, whole or, when it raises, not at all.

    Raises:
        OSError: the disk is full, or the like.
    """
    end = file.seek(0, os.SEEK_END)
    try:
        while data:
            data = data[file.write(data) :]
    except OSError:
        file.truncate(end)
        raise


def drop_temporaries(folder: Path) -> None:
    """Removes what ``atomic_path`` left in ``folder`` when its process was killed.

    Only for a folder that nobody else writes to.
    """
    for path in folder.glob(".*.tmp"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
