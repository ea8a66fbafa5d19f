"""One shard of a packed set: an HDF5 file of rows, written once and then only read.

    waveform       int16 [N, S]            16 kHz mono, contiguous: a row is one range of the file
    num_samples    int32 [N]               real samples of the row, the rest is zero padding
    target         uint8 [N, ceil(K / 8)]  labels, np.packbits order
    audio_name     bytes [N]               UTF-8, the file's path inside the audio folder
    audio_path     bytes [N]               UTF-8, absolute path of the file it was packed from
    start_seconds  float64 [N]             where in that file the clip starts
    row_crc        uint32 [N]              CRC-32 of the row's waveform bytes
    block          uint8 [n]               JSON, what packing says of the shard (packing/block.py)

A FLAC shard (``flac``) has instead of ``waveform``

    flac_bytes     uint8 [total]           contiguous, a FLAC stream of each row's real samples
    flac_offsets   int64 [N + 1]           where in it a row starts; the next row's start ends it

and its ``row_crc`` is of the stream. A shard without audio (``none``) has neither; its ``row_crc``
is of the waveform that the row was decoded to, with its padding. N may be 0.

Reading a shard checks its size and layout, and the CRC-32 of everything but the audio (``row_crc``
included), without reading the audio.
"""

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

import h5py
import numpy as np
from numpy.typing import NDArray
from zlib_ng import zlib_ng

from fastat.system.errors import H5PY_ERRORS, Failure, first_line
from fastat.system.files import atomic_path

AUDIO_DATASETS = {"pcm16": "waveform", "flac": "flac_bytes"}
COPY_BYTES = 16 << 20
HEAD_BYTES = 64 << 10
"""More than HDF5's own structures in a shard."""


class Damaged(Failure):
    """A file of a packed set is missing, or is not as it was packed."""


class ShardInfo(NamedTuple):
    """A shard's entry in dataset.json."""

    file: str
    rows: int
    bytes: int
    crc32: int
    """Checksum of everything but the audio, ``row_crc`` included."""
    codec: str
    """``pcm16``, ``flac`` or ``none``."""


class ShardRows(NamedTuple):
    """Everything in a shard but the audio, by the datasets' names."""

    num_samples: NDArray[np.int32]  # [N]
    target: NDArray[np.uint8]  # [N, ceil(K / 8)]
    audio_name: NDArray[np.bytes_]  # [N]
    audio_path: NDArray[np.bytes_]  # [N]
    start_seconds: NDArray[np.float64]  # [N]
    row_crc: NDArray[np.uint32]  # [N]
    block: NDArray[np.uint8] = np.zeros(0, np.uint8)  # [n]
    flac_offsets: NDArray[np.int64] | None = None  # [N + 1], only in a FLAC shard

    def datasets(self) -> dict[str, NDArray[Any]]:
        """The arrays that the shard holds, by the datasets' names."""
        return {name: array for name, array in self._asdict().items() if array is not None}

    def offsets(self, clip_samples: int) -> NDArray[np.int64]:
        """Bytes from the first row to the start of each, and to the end of the last: [N + 1]."""
        if self.flac_offsets is not None:
            return self.flac_offsets
        return np.arange(len(self.row_crc) + 1, dtype=np.int64) * 2 * clip_samples

    def crc32(self) -> int:
        """One checksum over all arrays."""
        crc = 0
        for array in self.datasets().values():
            crc = zlib_ng.crc32(array, crc)
        return crc


SMALL_DTYPES = {
    "num_samples": "<i4", "target": "|u1", "audio_name": "|S", "audio_path": "|S",
    "start_seconds": "<f8", "row_crc": "<u4", "block": "|u1", "flac_offsets": "<i8",
}  # fmt: skip
"""The datasets' dtypes, as numpy spells them. Names are as wide as the longest one."""


def write_shard(
    path: Path, rows: ShardRows, codec: str, clip_samples: int, audio: IO[bytes] | None
) -> ShardInfo:
    """Writes a shard whole or not at all, over one that is there.

    ``audio`` is read to its end: the bytes of all rows, one after the other. None leaves a hole in
    their place.

    Raises:
        Failure: the disk refuses.
        FileNotFoundError: somebody removed the temporary file.
    """
    shape: tuple[int, ...] = (len(rows.row_crc), clip_samples)
    dtype = "<i2"
    if rows.flac_offsets is not None:
        shape, dtype = ((int(rows.flac_offsets[-1]),), "u1")
    with _disk_errors(path), atomic_path(path) as temporary:
        # On a full disk HDF5 crashes the process: whether there is room shows before.
        temporary.write_bytes(bytes(sum(a.nbytes for a in rows.datasets().values()) + HEAD_BYTES))
        offset = None
        with h5py.File(temporary, "w", locking=False) as file:
            if codec in AUDIO_DATASETS:
                layout = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
                # The dataset takes its place in the file at once, without being written.
                layout.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
                layout.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
                layout.set_obj_track_times(False)
                place = AUDIO_DATASETS[codec].encode()
                kind = h5py.h5t.py_create(np.dtype(dtype))
                space = h5py.h5s.create_simple(shape)
                offset = h5py.h5d.create(file.id, place, kind, space, dcpl=layout).get_offset()
            for name, array in rows.datasets().items():
                file.create_dataset(name, data=array)
        if audio is not None and offset is not None:
            with temporary.open("r+b") as raw:
                raw.seek(offset)
                shutil.copyfileobj(audio, raw, COPY_BYTES)
        size = temporary.stat().st_size
    return ShardInfo(path.name, len(rows.row_crc), size, rows.crc32(), codec)


def load_shard(path: Path) -> tuple[ShardInfo, ShardRows]:
    """What is in a shard that has just been packed, for the entry that dataset.json is to have.

    Raises:
        Damaged: it is no shard.
    """
    try:
        with h5py.File(path, locking=False) as file:
            codec = next((c for c, name in AUDIO_DATASETS.items() if name in file), "none")
            rows = ShardRows(**{name: file[name][()] for name in SMALL_DTYPES if name in file})
        info = ShardInfo(path.name, len(rows.row_crc), path.stat().st_size, rows.crc32(), codec)
    except H5PY_ERRORS as error:
        raise Damaged(f"{path}: damaged: {first_line(error)}") from error
    return info, rows


def read_shard(
    directory: Path, info: ShardInfo, clip_samples: int, num_classes: int
) -> tuple[int, ShardRows]:
    """The audio's offset in the file and everything else of a shard, checked against ``info``.

    The offset is 0 where there is no audio.

    Raises:
        Damaged: it is missing, of another size or layout, or damaged outside the audio.
        Failure: it cannot be read.
    """
    path = directory / info.file
    if not path.is_file():
        raise Damaged(f"{path}: this shard of the set is missing")
    size = path.stat().st_size
    if size != info.bytes:
        raise Damaged(f"{path}: damaged: expected {info.bytes:,} bytes, found {size:,}")
    try:
        offset = None
        with h5py.File(path, locking=False) as file:
            audio = file[AUDIO_DATASETS[info.codec]] if info.codec in AUDIO_DATASETS else None
            names = ShardRows._fields if info.codec == "flac" else ShardRows._fields[:-1]
            rows = ShardRows(*(_read_small(file[name], info) for name in names))
            if audio is not None:
                layout = (audio.shape, audio.dtype, audio.chunks)
                offset = audio.id.get_offset()
    except PermissionError as error:
        raise Failure(f"{path}: cannot be read: Permission denied") from error
    except H5PY_ERRORS as error:
        raise Damaged(f"{path}: damaged: {first_line(error)}") from error
    if audio is not None:
        expected: tuple[Any, ...] = ((info.rows, clip_samples), np.dtype(np.int16), None)
        if rows.flac_offsets is not None:
            expected = ((int(rows.flac_offsets[-1]),), np.dtype(np.uint8), None)
        if layout != expected or (offset is None and info.rows):
            raise Damaged(f"{path}: damaged: expected audio {expected}, found {layout}")
    if rows.target.shape != (info.rows, -(-num_classes // 8)) or rows.crc32() != info.crc32:
        raise Damaged(f"{path}: damaged: the checksum of its labels and names differs")
    return offset or 0, rows


def _read_small(dataset: Any, info: ShardInfo) -> NDArray[Any]:
    """Reads a dataset other than the audio.

    Its header is checked first: the checksum is one of bytes, which mean something else in another
    dtype, and a damaged header may promise an array that is larger than its file.
    """
    kind = SMALL_DTYPES[dataset.name.removeprefix("/")]
    length = info.rows + 1 if dataset.name == "/flac_offsets" else info.rows
    is_rows = dataset.name != "/block"
    if not dataset.dtype.str.startswith(kind) or (is_rows and dataset.shape[:1] != (length,)):
        raise ValueError(f"{dataset.name}: {dataset.dtype} {dataset.shape}")
    if dataset.nbytes > info.bytes:
        raise ValueError(f"{dataset.name}: {dataset.nbytes:,} bytes")
    array: NDArray[Any] = dataset[()]
    return array


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    """HDF5 reports a full disk as RuntimeError or OSError, the system's words inside its own."""
    try:
        yield
    except FileNotFoundError:
        raise
    except (RuntimeError, OSError) as error:
        words = re.search(r"error message = '([^']*)'", str(error))
        reason = words.group(1) if words else getattr(error, "strerror", None) or first_line(error)
        raise Failure(f"cannot write {path}: {reason}") from error
