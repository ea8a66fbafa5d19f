"""Clips inside one HDF5 file, as PANNs and PaSST prepare AudioSet, as a source of ``fastat pack``.

    PANNs   waveform     int16 [N, S]         at attribute sample_rate, else 32 kHz
    PaSST   mp3          uint8, variable [N]  the bytes of an MP3 file a row
    both    target       bool or uint8 [N, K], or packed bits uint8 [N, ceil(K / 8)]
            audio_name   bytes [N]

An entry's path is ``file.h5#row``. Samples take the same way as those of files: the decoder for
MP3, the resampler, the rounding.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np

from fastat.audio.bad_audio import BadAudio
from fastat.audio.decode import Audio, decode, resample_clip
from fastat.audio.reader import SAMPLE_RATES
from fastat.system.errors import H5PY_ERRORS, UserError, first_line

SUFFIXES = (".h5", ".hdf5", ".hdf")
DEFAULT_RATE = 32_000
"""Rate of PANNs' waveforms without the attribute, Hz."""
BLOCK_ROWS = 16_384
"""Number of rows whose targets are read at once."""
CACHE_BYTES = 64 << 20
"""Cache for decompressed chunks: HDF5's default is smaller than one chunk of many files."""
_ROW = re.compile(r"(.+\.(?:h5|hdf5|hdf))#(\d+)", re.IGNORECASE | re.DOTALL)


class Row(NamedTuple):
    """A clip: its name, and its classes by number."""

    name: str
    labels: tuple[int, ...]


def is_row(path: str) -> bool:
    """Whether ``path`` names a row of an HDF5 file."""
    return _ROW.fullmatch(path) is not None


def file_of(path: str) -> str:
    """The file of an entry's path; for a row, the HDF5 file that holds it."""
    match = _ROW.fullmatch(path)
    return match[1] if match else path


def read_rows(source: Path, num_classes: int) -> Iterator[Row]:
    """The rows of ``source``, in order.

    Raises:
        UserError: not an HDF5 file of one of the two layouts, or of another number of classes.
    """
    try:
        with h5py.File(source, locking=False) as file:
            audio, target, names = _datasets(source, file)
            packed = _is_packed(source, target, num_classes)
            for start in range(0, len(audio), BLOCK_ROWS):
                block = slice(start, start + BLOCK_ROWS)
                bits = target[block]
                if packed:
                    bits = np.unpackbits(bits, axis=1, count=num_classes)
                for name, row in zip(names[block], bits, strict=True):
                    text = name if isinstance(name, str) else os.fsdecode(name)
                    yield Row(text, tuple(np.flatnonzero(row).tolist()))
    except UserError:
        raise
    except H5PY_ERRORS as error:
        raise UserError(f"{source}: not a readable HDF5 file: {first_line(error)}") from error


class Hdf5Rows:
    """Decodes rows of HDF5 files and keeps the last file open. Not thread-safe."""

    def __init__(self) -> None:
        self._path = ""
        self._file: Any = None

    def decode(self, path: str, sample_rate: int = 16_000, seconds: float | None = None) -> Audio:
        """Decodes the row ``path`` (``file.h5#row``), like ``decode`` a file.

        Raises:
            BadAudio: no such file or row, or no audio in it.
        """
        match = _ROW.fullmatch(path)
        assert match is not None, f"{path} is no row of an HDF5 file"
        row = int(match[2])
        with _bad_audio():
            file = self._open(match[1])
            encoded = "mp3" in file
            content = file["mp3" if encoded else "waveform"][row]
            rate = rate_of(file)
        if encoded:
            return decode(content.tobytes(), sample_rate, seconds)
        return Audio(resample_clip(content, rate, sample_rate, seconds), ())

    def _open(self, path: str) -> Any:
        if path != self._path:
            if self._file is not None:
                self._file.close()
            self._path, self._file = "", None
            self._file = h5py.File(path, locking=False, rdcc_nbytes=CACHE_BYTES)
            self._path = path
        return self._file


def rate_of(file: Any) -> int:
    """Rate of the waveforms in Hz: one whole number, also as an array; else ValueError."""
    given = file.attrs.get("sample_rate", DEFAULT_RATE)
    rate = np.asarray(given).reshape(-1)
    if len(rate) == 1 and rate.dtype.kind in "iuf" and float(rate[0]).is_integer():
        hertz = int(rate[0])
        if hertz in SAMPLE_RATES:
            return hertz
    raise ValueError(f"expected sample_rate in Hz, got {given}")


@contextmanager
def _bad_audio() -> Iterator[None]:
    """Turns what h5py raises for a damaged file into BadAudio."""
    try:
        yield
    except FileNotFoundError:
        raise BadAudio("missing") from None
    except (*H5PY_ERRORS, IndexError) as error:
        raise BadAudio("unreadable", f"HDF5: {first_line(error)}") from error


def _datasets(source: Path, file: Any) -> tuple[Any, Any, Any]:
    """The datasets of audio, targets and names, checked against each other."""
    found = [name for name in ("waveform", "mp3") if isinstance(file.get(name), h5py.Dataset)]
    missing = [n for n in ("target", "audio_name") if not isinstance(file.get(n), h5py.Dataset)]
    if len(found) != 1 or missing:
        raise UserError(
            f"{source}: expected datasets waveform (PANNs) or mp3 (PaSST), target and audio_name, "
            f"got {', '.join(sorted(file)) or 'none'}"
        )
    audio, target, names = file[found[0]], file["target"], file["audio_name"]
    if found[0] == "waveform":
        if audio.dtype != np.int16 or audio.ndim != 2:
            raise UserError(
                f"{source}: expected waveform int16 [clips, samples], got {_form(audio)}"
            )
        try:
            rate_of(file)
        except ValueError as error:
            raise UserError(f"{source}: {error}") from None
    elif h5py.check_vlen_dtype(audio.dtype) != np.uint8 or audio.ndim != 1:
        raise UserError(
            f"{source}: expected mp3 of variable-length uint8, one a clip, got {_form(audio)}"
        )
    if target.ndim != 2:
        raise UserError(f"{source}: expected target [clips, classes], got {_form(target)}")
    if names.ndim != 1 or h5py.check_string_dtype(names.dtype) is None:
        raise UserError(f"{source}: expected audio_name of bytes [clips], got {_form(names)}")
    if len({len(audio), len(target), len(names)}) != 1:
        raise UserError(
            f"{source}: expected as many targets and names as clips, got {len(audio)} clips, "
            f"{len(target)} targets, {len(names)} names"
        )
    return audio, target, names


def _is_packed(source: Path, target: Any, num_classes: int) -> bool:
    """Whether the targets are packed bits; UserError if they are not of ``num_classes``."""
    if target.dtype in (np.bool_, np.uint8):
        if target.shape[1] == num_classes:
            return False
        if target.dtype == np.uint8 and target.shape[1] == -(-num_classes // 8):
            return True
    raise UserError(
        f"{source}: expected target bool [clips, {num_classes}] or packed bits uint8 "
        f"[clips, {-(-num_classes // 8)}], as the class list has {num_classes} classes, "
        f"got {_form(target)}"
    )


def _form(dataset: Any) -> str:
    """A dataset's dtype and shape for a message; one without data has no shape."""
    return f"{dataset.dtype} {list(dataset.shape or ())}"
