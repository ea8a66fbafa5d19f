"""One shard being built: ``shard-00000.h5.<token>.part`` until it is whole.

The file starts with its waveform dataset at full size, so that any process may write rows at their
final offsets with pwrite; the small datasets follow when the rows are known. A shard that ends
with fewer rows than it was made for (bad files at the end of a set) is copied into one of the
exact size.
"""

import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np

from fastat.atomic import fsync
from fastat.data.shards import ShardInfo, ShardRows, shard_file
from fastat.errors import Failure

PART_SUFFIX = ".part"


class ShardPart:
    """A shard of up to ``capacity`` rows in ``directory``; its rows go to ``path`` at
    ``row_offset``."""

    def __init__(self, directory: Path, index: int, capacity: int, clip_samples: int) -> None:
        """Creates the file. Here and below, OSError or Failure when the disk refuses."""
        self.directory = directory
        self.file = shard_file(index)
        # A name of its own for every run: a worker that outlives a killed run by a moment must not
        # write into the file of the next.
        self.path = directory / f"{self.file}.{secrets.token_hex(4)}{PART_SUFFIX}"
        self.capacity = capacity
        self.clip_samples = clip_samples
        self.offset = _create(self.path, capacity, clip_samples)

    def row_offset(self, row: int) -> int:
        """Where the row's samples go in the file, in bytes."""
        return self.offset + row * 2 * self.clip_samples

    def seal(self, rows: ShardRows) -> ShardInfo:
        """Writes everything but the waveform, which is in the file, and flushes it all to the
        disk."""
        num_rows = len(rows.num_samples)
        if num_rows < self.capacity:
            self._shrink(num_rows)
        with _hdf5_errors(self.path), h5py.File(self.path, "r+") as file:
            for name, array in zip(ShardRows._fields, rows, strict=True):
                file.create_dataset(name, data=array)
        fsync(self.path)
        return ShardInfo(self.file, num_rows, self.path.stat().st_size, rows.crc32())

    def publish(self) -> None:
        """Gives the sealed shard its name: from here on it is finished."""
        os.replace(self.path, self.directory / self.file)
        fsync(self.directory)

    def _shrink(self, num_rows: int) -> None:
        small = self.path.with_name(self.path.name + ".exact")
        offset = _create(small, num_rows, self.clip_samples)
        left = num_rows * 2 * self.clip_samples
        source, target = os.open(self.path, os.O_RDONLY), os.open(small, os.O_WRONLY)
        try:
            start = self.offset
            os.lseek(target, offset, os.SEEK_SET)
            while left:
                count = os.sendfile(target, source, start, min(left, 1 << 26))
                assert count > 0, f"{self.path} ends before its last row"
                start, left = start + count, left - count
        finally:
            os.close(source)
            os.close(target)
        os.replace(small, self.path)
        self.offset, self.capacity = offset, num_rows


def _create(path: Path, rows: int, clip_samples: int) -> int:
    """An HDF5 file with an unwritten waveform dataset; the dataset's offset in the file."""
    with _hdf5_errors(path), h5py.File(path, "w", libver=("earliest", "v110")) as file:
        layout = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        layout.set_layout(h5py.h5d.CONTIGUOUS)
        layout.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        layout.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
        layout.set_obj_track_times(False)
        space = h5py.h5s.create_simple((rows, clip_samples))
        waveform = h5py.h5d.create(
            file.id, b"waveform", h5py.h5t.py_create(np.dtype("<i2")), space, dcpl=layout
        )
        offset: int = waveform.get_offset()
    return offset


@contextmanager
def _hdf5_errors(path: Path) -> Iterator[None]:
    """HDF5 reports a full disk as RuntimeError or OSError, the system's words inside its own."""
    try:
        yield
    except (RuntimeError, OSError) as error:
        words = re.search(r"error message = '([^']*)'", str(error))
        reason = words.group(1) if words else str(error).splitlines()[0]
        raise Failure(f"cannot write {path}: {reason}") from error
