"""fastat pack --scheduler: a Dask cluster packs the same set, whatever happens to its workers."""

import csv
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from fastat.packing.append import append
from fastat.packing.pack import pack
from fastat.packing.table_layout import ColumnNames
from fastat.system.errors import UserError
from tests.data.audio import write_table

distributed = pytest.importorskip("distributed")

FAULTY_DECODE = """
import os, signal, time
from pathlib import Path
from fastat.packing import block

decode, reached = block.decode, Path(__file__).with_name("reached")

def faulty_decode(path, *args):
    if path.name == "0030.wav":
        {fault}
    return decode(path, *args)

block.decode = faulty_decode
"""
KILL_ONCE = "reached.exists() or (reached.touch(), os.kill(os.getpid(), signal.SIGKILL))"
CRASH = "os.kill(os.getpid(), signal.SIGSEGV)"
WAIT = "reached.touch(); time.sleep(60)"


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_table(tmp_path_factory.mktemp("table"), 40)


@pytest.fixture(scope="module")
def undisturbed(table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The table, packed by processes of this machine."""
    out = tmp_path_factory.mktemp("undisturbed") / "set"
    assert pack(table, out, columns=ColumnNames(), clip_seconds=0.5, workers=1).clips == 40
    return out


def content(directory: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(directory.iterdir())}


@contextmanager
def cluster(startup: Path, code: str = "") -> Iterator[Any]:
    """Two workers of two threads, which run ``code`` when they start, as does each later Python."""
    (startup / "sitecustomize.py").write_text(code)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(startup), *sys.path]))
        patch.delenv("RANK", raising=False)
        with distributed.LocalCluster(
            n_workers=2,
            threads_per_worker=2,
            memory_limit="1GiB",
            dashboard_address=":0",
            local_directory=startup,
            silence_logs=logging.CRITICAL,
        ) as workers:
            yield workers


def start_pack(table: Path, out: Path, workers: Any) -> subprocess.Popen[str]:
    """The command; its paths are relative to a folder that is not the workers'."""
    options = ["--clip-seconds", "0.5", "--max-bad", "0.1"]
    return subprocess.Popen(
        [sys.executable, "-m", "fastat.cli", "pack", os.path.relpath(table, out.parent)]
        + ["--out", out.name, "--scheduler", workers.scheduler_address, *options],
        cwd=out.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell that starts the tests in its background has them ignore SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def start_and_wait(table: Path, out: Path, workers: Any) -> subprocess.Popen[str]:
    """The command, when a worker is at the file at which it waits."""
    process = start_pack(table, out, workers)
    deadline = time.monotonic() + 60
    while not (out.parent / "reached").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    return process


def test_the_same_set_and_appended_to(table: Path, undisturbed: Path, tmp_path: Path) -> None:
    more = tmp_path / "more.csv"
    more.write_text("path,labels\nmore.wav,a\n")
    (tmp_path / "more.wav").write_bytes((table.parent / "audio" / "0000.wav").read_bytes())
    with cluster(tmp_path) as workers:
        process = start_pack(table, tmp_path / "set", workers)
        _, stderr = process.communicate(timeout=120)
        assert process.returncode == 0, stderr
        assert content(tmp_path / "set") == content(undisturbed)
        address = workers.scheduler_address
        append(more, tmp_path / "set", audio=tmp_path, scheduler=address)
    shutil.copytree(undisturbed, tmp_path / "local")
    append(more, tmp_path / "local", audio=tmp_path)
    assert content(tmp_path / "set") == content(tmp_path / "local")


def test_a_killed_worker(table: Path, undisturbed: Path, tmp_path: Path) -> None:
    with cluster(tmp_path, FAULTY_DECODE.format(fault=KILL_ONCE)) as workers:
        process = start_pack(table, tmp_path / "set", workers)
        _, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    assert (tmp_path / "reached").exists()
    assert content(tmp_path / "set") == content(undisturbed)


def test_a_file_that_kills_every_worker_is_bad(table: Path, tmp_path: Path) -> None:
    with cluster(tmp_path, FAULTY_DECODE.format(fault=CRASH)) as workers:
        process = start_pack(table, tmp_path / "set", workers)
        stdout, stderr = process.communicate(timeout=200)
    assert process.returncode == 0, stderr
    assert stdout.startswith("packed: 39 clips")
    with (tmp_path / "set" / "bad.csv").open(newline="") as file:
        (bad,) = csv.DictReader(file)
    assert bad["path"].endswith("0030.wav") and "SIGSEGV" in bad["detail"]


def test_ctrl_c_cancels_what_is_queued(table: Path, tmp_path: Path) -> None:
    with cluster(tmp_path, FAULTY_DECODE.format(fault=WAIT)) as workers:
        process = start_and_wait(table, tmp_path / "set", workers)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=20)
        assert process.returncode == 130 and "Traceback" not in stderr
        deadline = time.monotonic() + 20
        while workers.scheduler.tasks:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    assert not (tmp_path / "set" / "dataset.json").exists()


def test_a_scheduler_that_goes_away(table: Path, tmp_path: Path) -> None:
    with cluster(tmp_path, FAULTY_DECODE.format(fault=WAIT)) as workers:
        process = start_and_wait(table, tmp_path / "set", workers)
        address = workers.scheduler_address
    _, stderr = process.communicate(timeout=20)
    assert process.returncode == 1
    (line,) = stderr.splitlines()
    assert address in line


def test_workers_without_fastat(table: Path, tmp_path: Path) -> None:
    with cluster(tmp_path, "import sys; sys.modules['fastat'] = None") as workers:
        with pytest.raises(UserError, match="fastat"):
            pack(table, tmp_path / "set", clip_seconds=0.5, scheduler=workers.scheduler_address)
        address = workers.workers[0].worker_address
        with pytest.raises(UserError, match=address):  # of a worker
            pack(table, tmp_path / "set", clip_seconds=0.5, scheduler=address)


@pytest.mark.parametrize("address", ["nonsense", "unknown://host:8786", "tcp://127.0.0.1:1"])
def test_no_scheduler(
    table: Path, tmp_path: Path, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastat.packing.workers.CONNECT_SECONDS", 1)
    with pytest.raises(UserError, match=address):
        pack(table, tmp_path / "set", clip_seconds=0.5, scheduler=address)
    assert not (tmp_path / "set").exists()


def test_without_dask(table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(UserError, match="fastat\\[dask\\]"):
        pack(table, tmp_path / "set", clip_seconds=0.5, scheduler="tcp://127.0.0.1:1")
