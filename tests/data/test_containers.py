"""Every container and encoding in the tables of docs/data.md is read, and by the library named
there."""

import io
import re
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import Mock

import av
import numpy as np
import pytest
import soundfile as sf

from fastat.audio.decode import decode
from fastat.audio.ffmpeg import FFmpegFile
from fastat.audio.mpeg import MpegFile

PAGE = Path(__file__).parents[2] / "docs" / "data.md"
RATE = 16_000
TONE = (0.3 * np.sin(2 * np.pi * 440 * np.arange(2 * RATE) / RATE)).astype(np.float32)


def rows() -> Iterator[tuple[str, str, str]]:
    """Container, encoding and library of the two tables."""
    tables = PAGE.read_text().split("| Container | Encodings | Read by |\n|---|---|---|\n")[1:]
    for table in tables:
        for line in re.findall(r"^\|(.*)\|$", table.split("\n\n")[0], re.MULTILINE):
            container, encodings, library = (cell.strip() for cell in line.split("|"))
            for encoding in encodings.split(", "):
                yield container, encoding, library


def by_ffmpeg(muxer: str, encoder: str) -> bytes:
    rate = 48_000 if encoder in ("libopus", "ac3", "eac3") else RATE
    file = io.BytesIO()
    with av.open(file, "w", format=muxer) as container:
        stream = container.add_stream(encoder, rate=rate, layout="mono")
        stream.codec_context.open()
        size = stream.codec_context.frame_size or 1024
        form = stream.codec_context.format
        frame = av.AudioFrame.from_ndarray(np.repeat(TONE, rate // RATE)[None], "fltp", "mono")
        frame.rate = rate
        parts = av.AudioResampler(form, "mono", rate, size)
        for part in (*parts.resample(frame), *parts.resample(None)):
            container.mux(stream.encode(part))
        container.mux(stream.encode(None))
    return file.getvalue()


@pytest.mark.parametrize(("container", "encoding", "library"), list(rows()))
def test_is_read_as_documented(
    container: str, encoding: str, library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / f"x.{container.lower()}"
    if container.isupper():
        sf.write(path, TONE, RATE, format=container, subtype=encoding)
    else:
        path.write_bytes(by_ffmpeg(container, encoding))

    ffmpeg, mpeg = Mock(wraps=FFmpegFile), Mock(wraps=MpegFile)
    monkeypatch.setattr("fastat.audio.reader.FFmpegFile", ffmpeg)
    monkeypatch.setattr("fastat.audio.reader.MpegFile", mpeg)
    audio = decode(path)
    assert mpeg.called == (library == "MPEG frames")
    assert ffmpeg.called == (library == "FFmpeg")
    # Lossy encoders add up to a tenth of a second; VOC's rates are coarse.
    assert 0.98 < len(audio.samples) / len(TONE) < 1.08
    assert not audio.notes
    spectrum = np.abs(np.fft.rfft(audio.samples[: 2 * RATE], 2 * RATE)) / RATE
    assert abs(spectrum.argmax() / 2 - 440) < 5
    assert spectrum.max() == pytest.approx(0.3, rel=0.1)
