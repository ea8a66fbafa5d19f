"""Files and folders that appear whole or not at all, also after a power cut."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def fsync(path: Path) -> None:
    """Flushes a file's content, or a folder's entries, to the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path to write a file or folder at; renamed to ``path`` when the block ends well.

    ``path`` may be an existing file, which is replaced, but not an existing folder. When the block
    raises, what it wrote is removed and ``path`` stays as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        if temporary.is_dir():
            for child in temporary.iterdir():
                fsync(child)
        fsync(temporary)
        os.replace(temporary, path)
        fsync(path.parent)
    except BaseException:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        else:
            temporary.unlink(missing_ok=True)
        raise


def atomic_write_text(path: Path, text: str) -> None:
    """Replaces ``path`` by ``text``."""
    with atomic_path(path) as temporary:
        temporary.write_text(text)
