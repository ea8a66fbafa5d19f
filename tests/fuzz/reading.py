"""What a damaged audio file must become, by readers other than ours.

WAV and MP3 carry no checksum of their samples: whatever libsndfile makes of a file is what any
reader gets. FLAC and Ogg have checksums: what differs from the undamaged file must be rejected,
unless every Ogg page is in place with the right CRC (a case that made its own).
"""

from pathlib import Path

import numpy as np
import soundfile as sf
import soxr
from numpy.typing import NDArray

from fastat.data.decode import to_int16
from tests.data.audio_bytes import OGG_LAST, ogg_pages
from tests.fuzz.audio import Base, Case

Samples = NDArray[np.int16]


def original(base: Base, folder: Path) -> Samples:
    """[S] of the undamaged file."""
    path = folder / f"original{base.suffix}"
    path.write_bytes(base.data)
    found = by_soundfile(path)
    return by_ffmpeg(path) if found is None else found


def acceptable(case: Case, path: Path, got: Samples, undamaged: Samples) -> bool:
    """Whether ``got`` is what the case's file may become."""
    if np.array_equal(got, undamaged):
        return True
    if case.base.suffix == ".flac":
        return False
    if case.base.suffix == ".ogg" and not _whole_ogg(case.mutant.data):
        return False
    readings = [by_soundfile(path)]
    if readings[0] is None:
        readings.append(by_ffmpeg(path))
    return any(x is not None and np.array_equal(got, x) for x in readings)


def _whole_ogg(data: bytes) -> bool:
    pages = ogg_pages(data)
    if not pages:
        return False
    last = {page.serial: page for page in pages}
    numbers = {serial: [p.number for p in pages if p.serial == serial] for serial in last}
    return all(page.flags & OGG_LAST for page in last.values()) and all(
        found == list(range(found[0], found[0] + len(found))) for found in numbers.values()
    )


def by_soundfile(path: Path) -> Samples | None:
    """In one read; None for a file that libsndfile does not open."""
    try:
        with sf.SoundFile(path) as sound:
            x, rate = sound.read(dtype="float32", always_2d=True), sound.samplerate
    except sf.LibsndfileError:
        return None
    return _at_16_khz(x, rate)


def by_ffmpeg(path: Path) -> Samples:
    """All frames of the first audio stream, errors not passed over."""
    import av

    strict = {"err_detect": "crccheck+explode"}
    with av.open(str(path), metadata_errors="ignore", options=strict) as container:
        stream = container.streams.audio[0]
        planar = av.AudioResampler(format="fltp", layout=stream.layout, rate=stream.rate)
        frames = [f.to_ndarray() for d in container.decode(stream) for f in planar.resample(d)]
        return _at_16_khz(np.concatenate(frames, axis=1).T, stream.rate)


def _at_16_khz(
    x: NDArray[np.float32],  # [n, C]
    rate: int,
) -> Samples:
    mono = x[:, 0].copy()
    for channel in range(1, x.shape[1]):
        mono += x[:, channel]
    mono /= np.float32(x.shape[1])
    return to_int16(mono if rate == 16_000 else soxr.resample(mono, rate, 16_000, quality="HQ"))
