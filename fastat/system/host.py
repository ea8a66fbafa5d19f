"""What one rank may take of the machine it runs on: cores and memory. Imports no torch.

Not what the machine has: a container or a batch job may be given a part of it, and the ranks that
torchrun started here (``LOCAL_WORLD_SIZE``, which it sets) share that.
"""

import os
from pathlib import Path, PurePosixPath

from fastat.system.errors import UserError

PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")
FILE_CACHE = ("inactive_file", "active_file")
"""Lines of memory.stat: what the kernel gives up when memory is short."""


def ranks_here() -> int:
    """Processes of this run on this machine.

    Raises:
        UserError: LOCAL_WORLD_SIZE is no number of processes.
    """
    text = os.environ.get("LOCAL_WORLD_SIZE", "1")
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"expected LOCAL_WORLD_SIZE, set by torchrun, at least 1, got {text!r}")
    return int(text)


def cores_of_rank(num_ranks: int | None = None) -> int:
    """Cores for one of ``num_ranks``, of those this process may run on; None: ``ranks_here``."""
    return max(1, len(os.sched_getaffinity(0)) // (num_ranks or ranks_here()))


def free_memory() -> int:
    """Bytes that the ranks here may take together without swapping or being killed.

    What is free on the machine, and under the limit of each control group (version 2) around this
    process: a container's, a batch job's. Cached files do not count as taken.
    """
    lines = dict(line.split(":") for line in (PROC / "meminfo").read_text().splitlines())
    free = [int(lines["MemAvailable"].split()[0]) * 1024]
    for line in (PROC / "self/cgroup").read_text().splitlines():
        if line.startswith("0::"):
            path = PurePosixPath(line.removeprefix("0::")).relative_to("/")
            free += [_free_under(CGROUPS / group) for group in (path, *path.parents)]
    return max(0, min(free))


def _free_under(group: Path) -> int:
    """Bytes until the group's limit; without end where it has none."""
    limit = group / "memory.max"
    # The root has no limit, nor has a group that this process's view of the tree does not show.
    if not limit.exists() or (text := limit.read_text().strip()) == "max":
        return 1 << 63
    stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    taken = int((group / "memory.current").read_text()) - sum(int(stat[x]) for x in FILE_CACHE)
    return int(text) - taken
