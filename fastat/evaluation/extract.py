"""Samples and log-mels of whole files of any length: ``fastat extract --feature``."""

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from fastat.audio.bad_audio import BadAudio
from fastat.audio.decode import decode, to_int16
from fastat.audio.features import FEATURES, Feature
from fastat.audio.frontend import INT16_SCALE, Frontend
from fastat.system.errors import Failure, UserError, nearest, one_line
from fastat.system.files import atomic_path
from fastat.system.progress import progress

log = logging.getLogger(__name__)

BLOCK_FRAMES = 1024
"""Number of frames computed at a time: 20 MB of spectrum at 4096 points."""


def read_waveform(path: Path) -> NDArray[np.int16]:
    """All samples of a file, [S], mono at 16 kHz, as packing stores them.

    Remarks about the file go to standard error. Raises BadAudio.
    """
    try:
        audio = decode(path)
    except MemoryError:
        raise BadAudio("unreadable", "the memory does not hold all of it") from None
    for note in audio.notes:
        log.warning(f"{path}: {note.remark}: {note.detail}")
    return to_int16(audio.samples)


class BadFiles:
    """Reports files that a command leaves out: one line each on standard error, then a Failure."""

    def __init__(self, files: list[Path]) -> None:
        if len(files) == 1 and not os.path.isfile(files[0]):
            kind = "is not a file" if os.path.lexists(files[0]) else "does not exist"
            raise UserError(f"{files[0]} {kind}")
        self.num_files = len(files)
        self.lines: list[str] = []

    def add(self, path: Path, reason: object) -> None:
        """Reports ``path``. If it is the only file of the command, ``finish`` does."""
        self.lines.append(one_line(f"{path}: {reason}"))
        if self.num_files > 1:
            log.warning(self.lines[-1])

    def finish(self) -> None:
        """Raises Failure if a file was bad."""
        if self.num_files == 1 and self.lines:
            raise Failure(self.lines[0])
        if self.lines:
            raise Failure(f"{len(self.lines)} of {self.num_files} files could not be used")


def output_names(files: list[Path], prefix: str, suffix: str) -> list[str]:
    """A name for each file's output: its stem between ``prefix`` and ``suffix``.

    Raises:
        UserError: two files would write the same output.
    """
    name, count = Counter(path.stem for path in files).most_common(1)[0]
    if count > 1:
        same = ", ".join(str(path) for path in files if path.stem == name)
        raise UserError(f"{count} files would be written to {prefix}{name}{suffix}: {same}")
    return [f"{prefix}{path.stem}{suffix}" for path in files]


def log_mel_blocks(
    waveform: NDArray[np.int16], feature: Feature, num_frames: int
) -> Iterator[NDArray[np.float32]]:
    """The first ``num_frames`` frames of [S] int16 samples, in blocks [t, F]: little memory.

    The samples' mean is removed first; they are followed by silence. Equal to one ``Frontend`` over
    the whole length, up to float32's last digits.
    """
    # Frames that a clip's edge reaches into are computed in the block before or after.
    margin = 0 if feature.kaldi else -(-feature.window_samples // (2 * feature.hop_samples))
    samples = (BLOCK_FRAMES + 2 * margin) * feature.hop_samples
    if feature.kaldi:
        samples += feature.window_samples - feature.hop_samples
    frontend = Frontend(feature.name, clip_samples=samples)
    mean = float(waveform.mean(dtype=np.float64)) if len(waveform) else 0.0
    for frame in range(0, num_frames, BLOCK_FRAMES):
        start = (frame - margin) * feature.hop_samples
        inside = waveform[max(start, 0) : max(start + samples, 0)]
        block = np.zeros((1, samples), np.float32)
        offset = max(-start, 0)
        block[0, offset : offset + len(inside)] = (inside - mean) * INT16_SCALE
        frames = min(BLOCK_FRAMES, num_frames - frame)
        yield frontend.log_mel(torch.from_numpy(block))[0, margin : margin + frames].numpy()


def extract(waveform: NDArray[np.int16], feature: Feature) -> NDArray[np.float32]:
    """[S] int16 -> [T, F]: what a front end for clips of S samples computes, before normalisation.

    Ten seconds give 400 frames of 64, or 1024 of 128. The mean is removed over the whole file;
    fbank128 ends with frames of zeros, up to a multiple of 128, as in training.

    Raises:
        BadAudio: the samples do not fill one frame.
    """
    num_frames = feature.num_frames(len(waveform))
    if num_frames < 1:
        raise BadAudio("empty", f"{len(waveform)} samples hold no frame of {feature.name}")
    out = np.zeros((num_frames, feature.num_mels), np.float32)
    at = 0
    for block in log_mel_blocks(
        waveform, feature, feature.real_frames(len(waveform), len(waveform))
    ):
        out[at : at + len(block)] = block
        at += len(block)
    return out


def extract_files(files: list[Path], feature: str, out: Path) -> None:
    """``fastat extract``: each file's features to ``out``/<stem>.npy, [T, F] float32.

    Raises:
        UserError: an unknown feature, two files of one stem, or the only file does not exist.
        Failure: some files could not be read (the others are written), or a write failed.
    """
    if feature not in FEATURES:
        raise UserError(f"unknown feature {feature!r}{nearest(feature, FEATURES)}")
    write_arrays(files, out, lambda _path, waveform: extract(waveform, FEATURES[feature]))


def write_arrays(
    files: list[Path],
    out: Path,
    compute: Callable[[Path, NDArray[np.int16]], NDArray[np.float32]],
) -> None:
    """Writes ``compute`` of each file's samples, [S], to ``out``/<stem>.npy.

    Raises:
        UserError: two files of one stem, or the only file does not exist.
        Failure: some files could not be read (the others are written), or a write failed.
    """
    names = output_names(files, "", ".npy")
    bad = BadFiles(files)
    if out.exists() and not out.is_dir():
        raise UserError(f"--out takes a folder, {out} is a file")
    written = []
    many = len(files) > 1
    with progress("extracting", len(files), "files") if many else nullcontext() as advance:
        for path, name in zip(files, names, strict=True):
            try:
                array = compute(path, read_waveform(path))
            except BadAudio as error:
                bad.add(path, error)
            else:
                out.mkdir(parents=True, exist_ok=True)
                with atomic_path(out / name) as temporary, temporary.open("wb") as file:
                    np.save(file, array)
                written.append(one_line(f"{out / name}  {len(array)} x {array.shape[1]}"))
            if advance is not None:
                advance()
    if written:
        print("\n".join(written))
    bad.finish()
