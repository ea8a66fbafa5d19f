"""One shard being built: ``shard-00000.h5.<token>.part`` until it is whole.

The rows lie one behind the other from ``HEAD_BYTES`` on, where HDF5 puts a file's first dataset, so
that any process may write them at their final offsets with pwrite while nobody knows yet how many
there will be. Sealing writes HDF5's head of exactly their size before them, and the small datasets
behind.
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
from fastat.data.flac import max_row_bytes
from fastat.data.shards import ShardInfo, ShardRows, shard_file
from fastat.errors import Failure, first_line

PART_SUFFIX = ".part"
HEAD_BYTES = 2048
"""What HDF5 writes before the first dataset of a file."""


class ShardPart:
    """A shard in ``directory`` that is being filled; its rows go to ``path``.

    ``room`` is what its rows may take, bytes, each with ``label_bytes`` for everything else about
    it. How many there are depends on their sizes alone.
    """

    def __init__(
        self,
        directory: Path,
        index: int,
        codec: str,
        clip_samples: int,
        label_bytes: int,
        room: int,
    ) -> None:
        """Creates the file. Here and below, OSError or Failure when the disk refuses."""
        self.directory = directory
        self.file = shard_file(index)
        # A name of its own for every run: a worker that outlives a killed run by a moment must not
        # write into the file of the next.
        self.path = directory / f"{self.file}.{secrets.token_hex(4)}{PART_SUFFIX}"
        self.codec, self.clip_samples = codec, clip_samples
        self.label_bytes, self.room = label_bytes, room
        self.num_rows, self.end = 0, HEAD_BYTES
        self.path.touch()

    @property
    def full(self) -> bool:
        """Whether the largest row there can be would not fit any more."""
        used = self.end - HEAD_BYTES + self.num_rows * self.label_bytes
        return used + max_row_bytes(self.codec, self.clip_samples) + self.label_bytes > self.room

    def add_row(self, num_bytes: int) -> int:
        """Where the next row, of ``num_bytes``, goes in the file: its offset in bytes."""
        offset, self.end = self.end, self.end + num_bytes
        self.num_rows += 1
        return offset

    def seal(self, rows: ShardRows) -> ShardInfo:
        """Writes everything but the rows' bytes, which are in the file, and flushes it all to the
        disk."""
        assert len(rows.num_samples) == self.num_rows and self.path.stat().st_size == self.end
        head = self._head()
        with self.path.open("r+b") as raw:
            raw.write(head)
        with _hdf5_errors(self.path), h5py.File(self.path, "r+", locking=False) as file:
            for name, array in rows.datasets().items():
                file.create_dataset(name, data=array)
        fsync(self.path)
        return ShardInfo(
            self.file, self.num_rows, self.path.stat().st_size, rows.crc32(), self.codec
        )

    def publish(self) -> None:
        """Gives the sealed shard its name: from here on it is finished."""
        os.replace(self.path, self.directory / self.file)
        fsync(self.directory)

    def _head(self) -> bytes:
        """The first ``HEAD_BYTES`` of an HDF5 file whose one dataset are the rows."""
        path = self.path.with_name(self.path.name + ".head")
        total = self.end - HEAD_BYTES
        name, dtype, shape = (
            (b"flac_bytes", "u1", (total,))
            if self.codec == "flac"
            else (b"waveform", "<i2", (self.num_rows, self.clip_samples))
        )
        with (
            _hdf5_errors(path),
            h5py.File(path, "w", libver=("earliest", "v110"), locking=False) as file,
        ):
            layout = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
            layout.set_layout(h5py.h5d.CONTIGUOUS)
            # The dataset takes its place in the file at once, without being written.
            layout.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
            layout.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
            layout.set_obj_track_times(False)
            space, kind = h5py.h5s.create_simple(shape), h5py.h5t.py_create(np.dtype(dtype))
            dataset = h5py.h5d.create(file.id, name, kind, space, dcpl=layout)
            assert dataset.get_offset() == HEAD_BYTES, "HDF5 put the rows elsewhere"
        assert path.stat().st_size == self.end, "HDF5 put something behind the rows"
        with path.open("rb") as raw:
            head = raw.read(HEAD_BYTES)
        path.unlink()
        return head


@contextmanager
def _hdf5_errors(path: Path) -> Iterator[None]:
    """HDF5 reports a full disk as RuntimeError or OSError, the system's words inside its own."""
    try:
        yield
    except (RuntimeError, OSError) as error:
        words = re.search(r"error message = '([^']*)'", str(error))
        reason = words.group(1) if words else first_line(error)
        raise Failure(f"cannot write {path}: {reason}") from error
