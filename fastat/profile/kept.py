"""Steps measured earlier, in the cache folder: a file each, named by all that it depends on."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastat.errors import Failure
from fastat.outputs import written
from fastat.profile.measure import Case, Measured, Spread


class KeptSteps:
    """The measured steps of one device, set of versions and packed set."""

    def __init__(self, folder: Path, setup: dict[str, Any]) -> None:
        """``setup``: what the duration of every step depends on, for ``json.dumps``."""
        self.folder, self.setup = folder, setup

    def read(self, case: Case) -> Measured | None:
        """What was measured for the step of ``case``; None where nothing was.

        Raises:
            Failure: the file is damaged.
        """
        path, _ = self._of(case)
        if not path.exists():
            return None
        try:
            found = json.loads(path.read_text())["measured"]
            ms = {name: Spread(**spread) for name, spread in found.pop("ms").items()}
            return Measured(ms=ms, **found)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise Failure(
                f"{path} is damaged ({error}): remove it, and the step is measured again"
            ) from error

    def write(self, case: Case, measured: Measured) -> None:
        """Keeps a measured step, in place of an earlier one. Raises Failure where the disk refuses
        it."""
        path, key = self._of(case)
        path.parent.mkdir(parents=True, exist_ok=True)
        with written(path) as temporary:
            temporary.write_text(json.dumps({"key": key, "measured": asdict(measured)}, indent=1))

    def _of(self, case: Case) -> tuple[Path, dict[str, Any]]:
        key = {"step": case.step, **self.setup}
        name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
        return self.folder / f"{name}.json", key
