"""Bad files against --max-bad."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence

from fastat.data.manifest import BadFile
from fastat.errors import UserError
from fastat.packing.index import Content
from fastat.packing.plan import Plan


class BadCount:
    """Bad files over all sets of a command, against --max-bad."""

    def __init__(self, num_files: int, max_bad: float) -> None:
        self.num_files, self.max_bad = num_files, max_bad
        self.reasons: Counter[str] = Counter()
        self._example: BadFile | None = None

    def add(self, files: Iterable[BadFile]) -> None:
        """Counts files."""
        for self._example in files:
            self.reasons[self._example.reason] += 1

    def replace(self, files: Iterable[BadFile], others: Iterable[BadFile]) -> None:
        """Counts ``others`` in the place of ``files``, which have been counted."""
        self.reasons -= Counter(file.reason for file in files)
        self.add(others)

    def recount(self, contents: Iterable[Content]) -> None:
        """Counts the files of whole sets, instead of all counted so far."""
        self.reasons.clear()
        for content in contents:
            self.add(content.bad)

    def check(self, plans: Sequence[Plan]) -> None:
        """Raises UserError when there are more than --max-bad; lists those of each set."""
        count = self.reasons.total()
        if count <= self.max_bad * self.num_files:
            return
        example = self._example
        assert example is not None, "no file is bad"
        lists = []
        for plan in plans:
            if bad := plan.bad_files():
                lists.append(str(plan.list_bad(bad)))
        enough = math.ceil(100 * count / self.num_files) / 100
        reasons = ", ".join(f"{n:,} {reason}" for reason, n in self.reasons.most_common())
        detail = f" ({example.detail})" if example.detail else ""
        others = f"--max-bad {enough:g} or more packs the others"
        raise UserError(
            f"{count:,} of {self.num_files:,} files are bad, more than --max-bad {self.max_bad:g}: "
            f"{reasons}, such as {example.path}{detail}; listed in {' and '.join(lists)}; "
            + (others if count < self.num_files else "there are no others")
        )
