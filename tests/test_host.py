"""What a rank may take: its share of the cores, and memory under the limits around it."""

import os
from pathlib import Path

import pytest

from fastat.system import host
from fastat.system.errors import UserError
from fastat.system.host import cores_of_rank, free_memory

MIB = 1 << 20


def test_cores_are_shared_with_the_other_ranks_of_a_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert cores_of_rank() == 8 and cores_of_rank(3) == 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert cores_of_rank() == 2 and cores_of_rank(1) == 8
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")
    assert cores_of_rank() == 1


@pytest.mark.parametrize("text", ["0", "-1", "four", ""])
def test_no_number_of_ranks(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", text)
    with pytest.raises(UserError, match=f"at least 1, got '{text}'"):
        cores_of_rank()


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """900 MiB available, and this process in the control group job/step."""
    (tmp_path / "self").mkdir()
    (tmp_path / "meminfo").write_text(f"MemTotal: 1 kB\nMemAvailable:  {900 * 1024} kB\n")
    (tmp_path / "self" / "cgroup").write_text("4:memory:/old\n0::/job/step\n")
    (tmp_path / "groups" / "job" / "step").mkdir(parents=True)
    monkeypatch.setattr(host, "PROC", tmp_path)
    monkeypatch.setattr(host, "CGROUPS", tmp_path / "groups")
    return tmp_path


def limit(group: Path, largest: str, taken: int = 0, cached: int = 0) -> None:
    """The group's limit, and MiB taken, of which ``cached`` in files."""
    (group / "memory.max").write_text(f"{largest}\n")
    (group / "memory.current").write_text(f"{taken * MIB}\n")
    stat = f"anon 5\ninactive_file {cached * MIB - MIB}\nactive_file {MIB}\n"
    (group / "memory.stat").write_text(stat)


@pytest.mark.parametrize("group", ["job/step", "job", "."])
def test_memory_under_a_limit(machine: Path, group: str) -> None:
    """Of the process's own group, of one around it, or of a container, whose root has one."""
    assert free_memory() == 900 * MIB
    for name in ("job/step", "job"):
        limit(machine / "groups" / name, "max")
    assert free_memory() == 900 * MIB
    limit(machine / "groups" / group, str(600 * MIB), taken=500, cached=300)
    assert free_memory() == 400 * MIB
    limit(machine / "groups" / group, str(600 * MIB), taken=700, cached=1)
    assert free_memory() == 0
    limit(machine / "groups" / group, str(2000 * MIB), taken=10)
    assert free_memory() == 900 * MIB


def test_a_process_in_the_root_group(machine: Path) -> None:
    (machine / "self" / "cgroup").write_text("0::/\n")
    limit(machine / "groups", str(100 * MIB))
    assert free_memory() == 100 * MIB
