"""What a damaged audio file must become, by readers other than ours.

WAV and MP3 carry no checksum of their samples: whatever another reader makes of a file is what ours
may give. FLAC and Ogg have checksums: what differs from the undamaged file must be rejected, unless
every Ogg page is in place with the right CRC (a case that made its own), or another file was joined
to it.
"""

import io
from pathlib import Path

import numpy as np
import soundfile as sf
import soxr
from numpy.typing import NDArray

from fastat.audio.decode import to_int16
from tests.data.audio_bytes import OGG_LAST, ogg_pages
from tests.fuzz.audio import Base, Case

Samples = NDArray[np.int16]


def original(base: Base, folder: Path) -> Samples:
    """[S] of the undamaged file."""
    path = folder / f"original{base.suffix}"
    path.write_bytes(base.data)
    found = by_soundfile(path)
    return by_ffmpeg(path) if found is None else found


def acceptable(case: Case, path: Path, got: Samples, undamaged: dict[str, Samples]) -> bool:
    """Whether ``got`` is what the case's file may become; ``undamaged`` has all bases' samples."""
    whole, base = undamaged[case.base.name], case.base
    if _equal(got, whole) or _is_joined(got, whole, list(undamaged.values())):
        return True
    if base.suffix == ".flac" or base.suffix == ".ogg" and not _whole_ogg(case.mutant.data):
        return False
    readings = [by_soundfile(path)]
    if base.suffix == ".wav":  # all that lies behind the header, whatever the header states
        data = case.mutant.data
        place = data.find(b"data") + 4
        rest = (len(data) - place - 4).to_bytes(4, "little")
        readings.append(by_soundfile(data[:place] + rest + data[place + 4 :]))
    if readings[0] is None or base.suffix == ".mp3":
        readings.append(by_ffmpeg(path))
    return any(x is not None and _equal(got, x) for x in readings)


def _equal(got: Samples, expected: Samples) -> bool:
    """But for what two decoders of MP3 round differently."""
    return len(got) == len(expected) and bool((np.abs(got - expected.astype(np.int32)) <= 1).all())


def _is_joined(got: Samples, first: Samples, others: list[Samples]) -> bool:
    """Whether ``got`` is ``first`` and behind it one of the others.

    Resamplers reach over the joint. Where the first does not end on a sample at 16 kHz, the other
    lies between samples, and only its length is compared.
    """
    near = 200
    for other in others:
        length = len(first) + len(other)
        if abs(len(got) - length) <= 1 and _equal(got[: len(first) - near], first[:-near]):
            if len(got) != length or _equal(got[len(first) + near :], other[near:]):
                return True
    return False


def _whole_ogg(data: bytes) -> bool:
    pages = ogg_pages(data)
    if not pages:
        return False
    last = {page.serial: page for page in pages}
    numbers = {serial: [p.number for p in pages if p.serial == serial] for serial in last}
    return all(page.flags & OGG_LAST for page in last.values()) and all(
        found == list(range(found[0], found[0] + len(found))) for found in numbers.values()
    )


def by_soundfile(source: Path | bytes) -> Samples | None:
    """In one read; None for a file that libsndfile does not open."""
    try:
        with sf.SoundFile(io.BytesIO(source) if isinstance(source, bytes) else source) as sound:
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
