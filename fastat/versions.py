"""Documents that another version of fastat wrote.

Imports no torch, so that a mistake on the command line is answered at once.
"""

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastat.errors import Failure

ANOTHER_VERSION = "another version of fastat"


def check_keys(
    path: Path,
    document: Any,
    kind: Callable[..., object],
    written_by: Callable[[], str] = lambda: ANOTHER_VERSION,
) -> None:
    """Raises Failure that names the keys of ``document`` which are no fields of ``kind``."""
    known = inspect.signature(kind).parameters
    unknown = [key for key in document if key not in known] if isinstance(document, dict) else []
    if unknown:
        keys = ", ".join(repr(key) for key in unknown)
        raise Failure(
            f"{path} has the unknown key{'s' * (len(unknown) > 1)} {keys}: it was written by "
            f"{written_by()}, which can read it"
        )


def writer_of(run: Path) -> str:
    """The version of fastat that wrote the run folder ``run``, by its ``env.json``, in words."""
    try:
        version = json.loads((run / "env.json").read_text("utf-8"))["versions"]["fastat"]
    except OSError as error:
        return f"{ANOTHER_VERSION} (env.json, which says which, cannot be read: {error.strerror})"
    except (ValueError, KeyError, TypeError, RecursionError):
        version = None
    if not isinstance(version, str):
        return f"{ANOTHER_VERSION} (env.json does not say which)"
    return f"fastat {version}"
