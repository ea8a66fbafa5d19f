"""Steps measured earlier, in the cache folder: a file each, named by all that it depends on."""

import hashlib
import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastat.study.profile.measure import Measured, Spread
from fastat.system.errors import Failure, UserError
from fastat.system.outputs import written
from fastat.training.launch import cache_folder

log = logging.getLogger(__name__)


def kept_file(step: str, setup: dict[str, Any]) -> Path:
    """The file of a measured step.

    Args:
        step: of ``step_key``.
        setup: what the duration of every step depends on, for ``json.dumps``.
    """
    key = json.dumps([step, setup], sort_keys=True)
    return cache_folder() / "profile" / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"


def read_kept(path: Path) -> Measured | None:
    """What was measured for a step; None where nothing was.

    Raises:
        Failure: the file is damaged.
    """
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text())
        ms = {name: Spread(**spread) for name, spread in found.pop("ms").items()}
        return Measured(ms=ms, **found)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise Failure(
            f"{path} is damaged ({error}): remove it, and the step is measured again"
        ) from error


def write_kept(step: str, setup: dict[str, Any], measured: Measured) -> None:
    """Keeps a measured step, in place of an earlier one; warns if it cannot be written.

    Args:
        step, setup: as for ``kept_file``.
    """
    try:
        path = kept_file(step, setup)
        path.parent.mkdir(parents=True, exist_ok=True)
        with written(path) as temporary:
            temporary.write_text(json.dumps(asdict(measured), indent=1))
    except (OSError, UserError, Failure) as error:
        log.warning(f"this step is not kept for --budget-hours and --memory-gib: {error}")
