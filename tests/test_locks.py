"""Files are read and written without locks, and a run folder where there are none.

Some file systems have no locks: Lustre mounted without flock, some FUSE and network mounts.
"""

import errno
import fcntl
import io
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from fastat.audio.hdf5_source import Hdf5Rows, read_rows
from fastat.data.shard_file import ShardRows, load_shard, write_shard
from fastat.data.shards import ClassInfo, PackedSet
from fastat.evaluation.predictions import read_predictions, save_predictions
from fastat.packing.append import append
from fastat.system.errors import Failure, UserError
from fastat.system.files import locks_work
from fastat.training.run_folder import RunFolder
from tests.conftest import TinySets, write_tiny_audio
from tests.data.test_hdf5_source import NUM_CLASSES, write_panns
from tests.test_train import trainer


@contextmanager
def locked(*paths: Path) -> Iterator[None]:
    """Somebody else's locks: who asks for a lock of these files fails."""
    files = [path.open("rb") for path in paths]
    for file in files:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    yield
    for file in files:
        file.close()


def test_predictions_are_read_without_a_lock(tmp_path: Path) -> None:
    path, logit = tmp_path / "p.h5", np.zeros((2, 1), np.float32)
    save_predictions(path, logit, logit > 0, ["a.wav", "b.wav"], [ClassInfo("x", "X")])
    with locked(path):
        assert read_predictions(path).names == ["a.wav", "b.wav"]


def test_a_packed_set_is_read_without_a_lock(tiny_sets: TinySets) -> None:
    with locked(*tiny_sets.eval.glob("*.h5")):
        packed = PackedSet.open(tiny_sets.eval)
        packed.read_rows(np.arange(15), np.empty((15, 16_000), np.int16))
        packed.close()


def test_hdf5_sources_are_read_without_a_lock(tmp_path: Path) -> None:
    path = tmp_path / "panns.h5"
    write_panns(path, 32_000)
    with locked(path):
        assert len(list(read_rows(path, NUM_CLASSES))) == 5
        assert len(Hdf5Rows().decode(f"{path}#0"))


def test_a_shard_is_written_and_read_without_a_lock(tmp_path: Path) -> None:
    path, one = tmp_path / "shard-00000.h5", np.zeros(1)
    rows = ShardRows(
        num_samples=one.astype(np.int32),
        target=np.zeros((1, 1), np.uint8),
        audio_name=np.array([b"a.wav"]),
        audio_path=np.array([b"/a.wav"]),
        start_seconds=one,
        row_crc=one.astype(np.uint32),
    )
    path.touch()
    with locked(path):
        info = write_shard(path, rows, "pcm16", 4, io.BytesIO(bytes(8)))
    with locked(path):
        assert load_shard(path)[0] == info and info.rows == 1


# --------------------------------------------------------------------------- the run folder
@pytest.fixture(params=[errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def no_locks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(file: object, operation: int) -> None:
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(fcntl, "flock", flock)


@pytest.mark.usefixtures("no_locks")
def test_without_locks_the_run_folder_is_taken_with_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.lock()
    with folder:
        assert (tmp_path / "run").is_dir()
    (record,) = caplog.records
    assert str(tmp_path / "run") in record.getMessage() and "locks" in record.getMessage()


@pytest.mark.parametrize("no_locks", [errno.EOPNOTSUPP], indirect=True)
@pytest.mark.usefixtures("no_locks")
def test_without_locks_training_goes_on(
    tiny_sets: TinySets, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer(tiny_sets, tmp_path / "run", steps=1).run_epochs()
    assert sum("no locks" in record.getMessage() for record in caplog.records) == 1
    assert (tmp_path / "run" / "checkpoints" / "last").exists()


def test_another_error_of_the_lock_is_not_the_lack_of_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with RunFolder(tmp_path), pytest.raises(UserError, match="another training"):
        RunFolder(tmp_path).lock()

    def flock(file: object, operation: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(Failure, match="Input/output error"):
        RunFolder(tmp_path).lock()


@pytest.mark.parametrize("no_locks", [errno.EOPNOTSUPP], indirect=True)
@pytest.mark.usefixtures("no_locks")
def test_without_locks_a_set_grows(tiny_sets: TinySets, tmp_path: Path) -> None:
    out = Path(shutil.copytree(tiny_sets.eval, tmp_path / "set"))
    assert append(write_tiny_audio(tmp_path / "audio", 3, 9), out, workers=1).appended_clips == 3
    assert PackedSet.open(out).num_clips == 15 + 3


def test_locks_of_a_folder(tmp_path: Path) -> None:
    assert locks_work(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("no_locks")
def test_no_locks_in_a_folder(tmp_path: Path) -> None:
    assert not locks_work(tmp_path)
    assert not list(tmp_path.iterdir())
