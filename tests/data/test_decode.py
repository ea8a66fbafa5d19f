"""decode: equal to soundfile + soxr, and the right reason for every bad file."""

import os
import struct
import tracemalloc
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile as sf
import soxr
from numpy.typing import NDArray

from fastat.audio import decode as decoding
from fastat.audio.bad_audio import BadAudio
from fastat.audio.decode import to_int16
from fastat.audio.reader import BLOCK_SECONDS
from tests.data.audio import noise, reference
from tests.data.audio_bytes import flac_frames, ogg_pages


def decode(source: Path | bytes, seconds: float | None = None) -> NDArray[np.float32]:
    return decoding.decode(source, seconds=seconds).samples


def reason_of(path: Path) -> str:
    with pytest.raises(BadAudio) as caught:
        decode(path)
    return caught.value.reason


@pytest.mark.parametrize("rate", [8_000, 11_025, 16_000, 22_050, 44_100, 48_000, 96_000])
@pytest.mark.parametrize("channels", [1, 2, 3])
def test_equals_soundfile_and_soxr(tmp_path: Path, rate: int, channels: int) -> None:
    path = tmp_path / "x.wav"
    sf.write(path, noise(1.3, rate, rate, channels), rate, subtype="PCM_24")
    got = to_int16(decode(path))
    expected = reference(path)
    assert got.shape == expected.shape
    # A mean of three channels rounds differently from numpy's by one ulp.
    assert np.abs(got.astype(int) - expected).max() <= (1 if channels == 3 else 0)


@pytest.mark.parametrize(
    ("name", "subtype"),
    [("x.flac", "PCM_16"), ("x.ogg", "VORBIS"), ("x.mp3", "MPEG_LAYER_III"), ("x.aiff", "PCM_16"),
     ("x.wav", "FLOAT"), ("x.wav", "ULAW"), ("x.au", "PCM_16"), ("x.w64", "PCM_16")],
)  # fmt: skip
def test_formats(tmp_path: Path, name: str, subtype: str) -> None:
    path = tmp_path / name
    sf.write(path, noise(1.0, 32_000, 1), 32_000, subtype=subtype)
    difference = to_int16(decode(path)).astype(int) - reference(path)
    # FFmpeg's decoder of MP3 rounds in other places than libsndfile's.
    assert np.abs(difference).max() <= (1 if path.suffix == ".mp3" else 0)


def test_blocks_do_not_show(tmp_path: Path) -> None:
    path = tmp_path / "long.flac"
    sf.write(path, noise(2.2 * BLOCK_SECONDS, 22_050, 2), 22_050)
    assert np.array_equal(to_int16(decode(path)), reference(path))


@pytest.mark.parametrize("rate", [8_000, 16_000, 44_100])
def test_cut_equals_the_whole_cut(tmp_path: Path, rate: int) -> None:
    path = tmp_path / "x.wav"
    sf.write(path, noise(9.0, rate, 3), rate)
    whole = decode(path)
    assert np.array_equal(decode(path, seconds=2.5), whole[:40_000])
    assert np.array_equal(decode(path, seconds=12.0), whole)


def test_to_int16() -> None:
    x = np.array([0.5, 1.5, 2.5, -0.5, -1.5, 40_000.0, -40_000.0, 32_767.4], np.float32) / 32768
    expected = [0, 2, 2, 0, -2, 32767, -32768, 32767]  # ties to even, then clipped
    assert to_int16(x.astype(np.float32)).tolist() == expected


def test_missing_empty_unreadable(tmp_path: Path) -> None:
    assert reason_of(tmp_path / "none.wav") == "missing"
    (tmp_path / "zero.wav").touch()
    assert reason_of(tmp_path / "zero.wav") == "empty"
    sf.write(tmp_path / "header.wav", np.empty(0, np.float32), 16_000)
    assert reason_of(tmp_path / "header.wav") == "empty"
    (tmp_path / "text.wav").write_text("not audio at all, " * 100)
    assert reason_of(tmp_path / "text.wav") == "unreadable"
    (tmp_path / "folder.wav").mkdir()
    assert reason_of(tmp_path / "folder.wav") == "unreadable"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("rate", [16_000, 44_100])
def test_non_finite(tmp_path: Path, value: float, rate: int) -> None:
    x = noise(0.5, rate, 4, channels=2)
    x[1000, 1] = value
    sf.write(tmp_path / "x.wav", x, rate, subtype="FLOAT")
    assert reason_of(tmp_path / "x.wav") == "non-finite"


@pytest.mark.parametrize("name", ["x.wav", "x.flac", "x.aiff", "x.mp3", "x.au"])
def test_truncated(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    sf.write(path, noise(3.0, 16_000, 5), 16_000)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    assert reason_of(path) == "truncated"


def test_truncated_beyond_the_cut(tmp_path: Path) -> None:
    """A FLAC file cut short behind what is asked for still gives it."""
    path = tmp_path / "x.flac"
    sf.write(path, noise(20.0, 16_000, 6), 16_000)
    whole = decode(path)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 3 // 4])
    assert np.array_equal(decode(path, seconds=2.0), whole[:32_000])
    assert reason_of(path) == "truncated"


def test_damaged_in_the_middle_is_not_truncated(tmp_path: Path) -> None:
    path = tmp_path / "x.flac"
    sf.write(path, noise(10.0, 16_000, 7), 16_000)
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 200] = np.random.default_rng(0).bytes(200)
    path.write_bytes(bytes(data))
    assert reason_of(path) == "unreadable"


def test_streamed_wav_promises_nothing(tmp_path: Path) -> None:
    """FFmpeg writing WAV to a pipe leaves 0xFFFFFFFF as the sizes in the header."""
    path = tmp_path / "x.wav"
    x = (noise(0.5, 16_000, 8) * 32767).astype("<i2")
    unknown = struct.pack("<I", 0xFFFFFFFF)
    head = (
        b"RIFF" + unknown + b"WAVEfmt " + struct.pack("<IHHIIHH", 16, 1, 1, 16_000, 32_000, 2, 16)
    )
    path.write_bytes(head + b"data" + unknown + x.tobytes())
    assert np.array_equal(to_int16(decode(path)), x)


def test_impossible_rate(tmp_path: Path) -> None:
    path = tmp_path / "x.wav"
    sf.write(path, noise(0.5, 16_000, 9), 16_000)
    data = bytearray(path.read_bytes())
    data[24:28] = struct.pack("<I", 7)
    path.write_bytes(bytes(data))
    assert reason_of(path) == "unreadable"


def write_with_ffmpeg(path: Path, x: NDArray[np.float32], rate: int, codec: str) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, layout="stereo")
        stream.codec_context.time_base = Fraction(1, rate)
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(x.T), "fltp", "stereo")
        frame.rate = rate
        resampler = av.AudioResampler(stream.codec_context.format, "stereo", rate, 1024)
        for part in (*resampler.resample(frame), *resampler.resample(None)):
            container.mux(stream.encode(part))
        container.mux(stream.encode(None))


@pytest.mark.parametrize(("name", "codec"), [("x.m4a", "aac"), ("x.webm", "libopus")])
def test_ffmpeg_reads_the_rest(tmp_path: Path, name: str, codec: str) -> None:
    path = tmp_path / name
    rate = 48_000
    tone = np.sin(2 * np.pi * 440 * np.arange(3 * rate) / rate).astype(np.float32)
    write_with_ffmpeg(path, np.stack([0.5 * tone, 0.1 * tone], 1), rate, codec)
    got = decode(path)
    assert abs(len(got) - 48_000) < 2_000  # encoders pad
    # Lossy: the tone is there at the average of both channels, whatever the delay.
    expected = soxr.resample(0.3 * tone, rate, 16_000, quality="HQ")
    spectrum = np.abs(np.fft.rfft(got[8_000:40_000])) / 16_000
    assert spectrum.argmax() == 880  # 440 Hz in two seconds
    assert spectrum.max() == pytest.approx(np.abs(expected).max(), rel=0.02)
    assert np.array_equal(decode(path, seconds=1.5), got[:24_000])


def test_ffmpeg_truncated(tmp_path: Path) -> None:
    path = tmp_path / "x.mp4"
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("aac", rate=48_000, layout="mono")
        for i in range(200):
            frame = av.AudioFrame.from_ndarray(
                noise(1024 / 48_000, 48_000, i)[None, :], "fltp", "mono"
            )
            frame.rate, frame.pts = 48_000, 1024 * i
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    assert reason_of(path) in ("truncated", "unreadable")
    path.write_bytes(data)
    assert len(decode(path)) > 60_000


def flac(tmp_path: Path) -> tuple[Path, list[int]]:
    """A FLAC file of a second, and where its frames start; the last entry is its end."""
    path = tmp_path / "x.flac"
    sf.write(path, noise(1.0, 16_000, 10), 16_000)
    data = path.read_bytes()
    return path, [*flac_frames(data), len(data)]


def test_a_lost_or_doubled_flac_frame_is_no_silence(tmp_path: Path) -> None:
    path, starts = flac(tmp_path)
    data = path.read_bytes()
    path.write_bytes(data[: starts[1]] + data[starts[2] :])
    assert np.count_nonzero(sf.read(path)[0] == 0.0) > 4000, "libsndfile fills the gap"
    assert reason_of(path) == "unreadable"
    path.write_bytes(data[: starts[2]] + data[starts[1] :])
    assert reason_of(path) == "unreadable"


def test_a_flac_header_that_promises_less_than_there_is(tmp_path: Path) -> None:
    path, _ = flac(tmp_path)
    data = bytearray(path.read_bytes())
    data[22:26] = struct.pack(">I", 5000)  # the low bits of the number of samples
    path.write_bytes(bytes(data))
    assert len(sf.read(path)[0]) == 5000
    assert reason_of(path) == "unreadable"


def test_flac_without_md5_is_read(tmp_path: Path) -> None:
    """As FFmpeg writes it to a pipe."""
    path, _ = flac(tmp_path)
    whole = decode(path)
    data = bytearray(path.read_bytes())
    data[26:42] = bytes(16)
    path.write_bytes(bytes(data))
    assert np.array_equal(decode(path), whole)


@pytest.mark.parametrize("subtype", ["PCM_S8", "PCM_16", "PCM_24"])
def test_flac_of_every_width_has_its_md5(tmp_path: Path, subtype: str) -> None:
    path = tmp_path / "x.flac"
    sf.write(path, noise(0.7, 44_100, 11, channels=2), 44_100, subtype=subtype)
    assert np.array_equal(to_int16(decode(path)), reference(path))
    assert np.array_equal(decode(path, seconds=0.5), decode(path)[:8_000])


def test_a_flac_header_of_another_rate_than_its_frames(tmp_path: Path) -> None:
    path, _ = flac(tmp_path)
    data = bytearray(path.read_bytes())
    rate = int.from_bytes(data[18:21], "big")
    assert rate >> 4 == 16_000
    data[18:21] = (8_000 << 4 | rate & 0xF).to_bytes(3, "big")
    path.write_bytes(bytes(data))
    assert reason_of(path) == "unreadable"


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
def test_ogg_pages(tmp_path: Path, subtype: str) -> None:
    path = tmp_path / "x.ogg"
    sf.write(path, noise(6.0, 48_000, 12), 48_000, format="OGG", subtype=subtype)
    data, whole = path.read_bytes(), decode(path)
    pages = ogg_pages(data)
    assert pages is not None and len(pages) > 8
    third, last = pages[-3], pages[-1]

    def becomes(mutant: bytes) -> str:
        path.write_bytes(mutant)
        return reason_of(path)

    damaged = bytearray(data)
    damaged[third.end - 100] ^= 1
    assert becomes(bytes(damaged)) == "unreadable"
    assert np.array_equal(decode(path, seconds=1.0), whole[:16_000]), "damage behind the cut"
    assert becomes(data[: third.start] + data[third.end :]) == "unreadable"
    assert becomes(data[: third.start] + bytes(50) + data[third.start :]) == "unreadable"
    assert becomes(data[: last.start]) == "truncated"
    assert becomes(data[: last.start + 20]) == "truncated"
    assert becomes(data[: last.end - 1]) == "truncated"
    path.write_bytes(data + b"TAG" + bytes(125))  # an ID3v1 tag behind it
    assert np.array_equal(decode(path), whole)


@pytest.mark.timeout(20)
def test_what_is_no_file_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.wav")
    (tmp_path / "link.wav").symlink_to("pipe.wav")
    for path in (tmp_path / "pipe.wav", tmp_path / "link.wav", Path("/dev/zero"), tmp_path):
        assert reason_of(path) == "unreadable"
    (tmp_path / "a.wav").symlink_to("b.wav")
    (tmp_path / "b.wav").symlink_to("a.wav")
    assert reason_of(tmp_path / "a.wav") == "unreadable"


def test_a_header_that_promises_hours_of_many_channels_takes_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "x.flac"
    sf.write(path, noise(0.1, 192_000, 13, channels=8), 192_000)
    data = bytearray(path.read_bytes())
    data[21] |= 0xF  # the high bits of the number of samples
    path.write_bytes(bytes(data))
    tracemalloc.start()
    assert reason_of(path) == "truncated"
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 60e6  # bytes; 30 s would be 92 MB of int16


def test_ffmpeg_is_not_asked_about_damage(tmp_path: Path) -> None:
    """It would leave out what is damaged, and say nothing."""
    path = tmp_path / "x.ogg"
    sf.write(path, noise(0.9, 48_000, 14), 48_000, format="OGG", subtype="OPUS")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(sf.LibsndfileError):
        sf.SoundFile(path)
    assert reason_of(path) == "unreadable"


@pytest.mark.parametrize("content", [b"only words\n" * 50, bytes(5000)])
def test_what_ffmpeg_takes_for_flac(tmp_path: Path, content: bytes) -> None:
    """By its name alone, and with a rate of 0."""
    (tmp_path / "x.flac").write_bytes(content)
    assert reason_of(tmp_path / "x.flac") == "unreadable"


def test_what_ffmpeg_has_no_decoder_for(tmp_path: Path) -> None:
    path = tmp_path / "x.wav"
    sf.write(path, noise(0.5, 16_000, 15), 16_000)
    data = bytearray(path.read_bytes())
    data[20:22] = struct.pack("<H", 0x7FFF)  # the format
    path.write_bytes(bytes(data))
    assert reason_of(path) == "unreadable"


def test_ffmpeg_truncated_webm(tmp_path: Path) -> None:
    path = tmp_path / "x.webm"
    write_with_ffmpeg(path, noise(3.0, 48_000, 16, channels=2), 48_000, "libopus")
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    assert reason_of(path) == "truncated"


@pytest.mark.filterwarnings("error")
def test_float_samples_beyond_full_scale_are_clipped() -> None:
    x = np.array([3e38, -3e38, 1.0, -1.0, 0.99999], np.float32)
    assert to_int16(x).tolist() == [32767, -32768, 32767, -32768, 32767]
