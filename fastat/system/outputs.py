"""What commands write: files and folders that their options name, and JSON.

Imports no torch, so that a mistake on the command line is reported at once.
"""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastat.system.errors import Failure, UserError
from fastat.system.files import atomic_path


def check_output(option: str, path: Path | None) -> None:
    """Raises UserError if the file ``path`` cannot be written, before any work is done."""
    if path is None:
        return
    folder = path.absolute().parent
    if path.is_dir():
        raise UserError(f"{option} takes a file to write, {path} is a folder")
    if not folder.is_dir():
        raise UserError(f"{option} {path}: there is no folder {folder}")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"{option} {path}: {folder} is read-only")


def check_writable(run: Path) -> None:
    """Checks that the folder ``run`` can be written or made, before anything else costs time.

    Raises:
        UserError: it, or a folder it is to be made in, is a file.
        Failure: it is read-only.
    """
    there = next(path for path in (run, *run.absolute().parents) if path.exists())
    if not there.is_dir():
        raise UserError(f"--out takes a folder for the run, and {there} is a file")
    if not os.access(there, os.W_OK | os.X_OK):
        raise Failure(f"cannot write the run folder {run}: {there} is read-only")


@contextmanager
def written(path: Path) -> Iterator[Path]:
    """``atomic_path`` for a command's output. Raises Failure if it cannot be written."""
    try:
        with atomic_path(path) as temporary:
            yield temporary
    except OSError as error:
        raise Failure(f"cannot write {path}: {error.strerror}") from error


def finite(value: Any) -> Any:
    """``value`` with None for NaN and infinities, which JSON does not have: the AUC without any
    class, d' of an AUC of 1."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
