"""All that a file holds is decoded, whatever its header states; and nothing is clipped in silence.

Files are written here, or made of files that soundfile or FFmpeg wrote.
"""

import io
import struct
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile as sf
from numpy.typing import NDArray

from fastat.audio.bad_audio import BadAudio
from fastat.audio.containers import find_samples
from fastat.audio.decode import Audio, decode
from tests.data.audio import noise
from tests.data.audio_bytes import flac_file, flac_frames, mp3_frames, ogg_pages
from tests.data.test_containers import by_ffmpeg

RATE = 16_000
Samples = NDArray[np.float32]


def encoded(form: str, subtype: str | None = None, rate: int = RATE, seed: int = 0) -> bytes:
    """A second of noise."""
    file = io.BytesIO()
    sf.write(file, noise(1.0, rate, seed), rate, format=form, subtype=subtype)
    return file.getvalue()


def samples_of(data: bytes) -> Samples:
    return decode(data).samples


def reason_of(data: bytes) -> str:
    with pytest.raises(BadAudio) as caught:
        decode(data)
    return caught.value.reason


def remarks(audio: Audio) -> list[str]:
    return [note.remark for note in audio.notes]


def put(data: bytes, place: int, code: str, value: int) -> bytes:
    """``data`` with another number at ``place``."""
    return data[:place] + struct.pack(code, value) + data[place + struct.calcsize(code) :]


# --------------------------------------------------------------------- PCM and the sizes it states
FIELDS = {
    "WAV": (b"data", 4, "<I"),
    "WAVEX": (b"data", 4, "<I"),
    "RF64": (b"ds64", 16, "<Q"),
    "W64": (b"data", 16, "<Q"),
    "AIFF": (b"SSND", 4, ">I"),
    "AU": (b".snd", 8, ">I"),
    "CAF": (b"data", 4, ">q"),
}
"""Where each format states the size of its samples: a mark, bytes behind it, and how."""


def stated(form: str, data: bytes) -> tuple[int, str, int]:
    """Place and code of the size in ``data``, and what it is."""
    mark, behind, code = FIELDS[form]
    place = data.find(mark) + behind
    return place, code, struct.unpack_from(code, data, place)[0]


@pytest.mark.parametrize("subtype", ["PCM_16", "FLOAT"])
@pytest.mark.parametrize("form", FIELDS)
def test_a_wrong_size_in_the_header(form: str, subtype: str) -> None:
    data = encoded(form, subtype)
    place, code, size = stated(form, data)
    whole = decode(data)
    assert len(whole.samples) == RATE and not whole.notes

    old = decode(put(data, place, code, size // 2))
    assert np.array_equal(old.samples, whole.samples)
    assert remarks(old) == ["wrong length"]

    longer = decode(put(data, place, code, size + 44))
    assert np.array_equal(longer.samples, whole.samples)
    assert remarks(longer) == ["wrong length"]

    unknown = decode(put(data, place, code, 0))
    assert np.array_equal(unknown.samples, whole.samples) and not unknown.notes
    assert reason_of(put(data, place, code, 2 * size)) == "truncated"


def test_the_end_of_a_wav_may_be_missing_where_it_is_not_asked_for() -> None:
    data = float_wav(noise(4.0, RATE, 0))
    cut = data[: len(data) * 3 // 4]
    assert np.array_equal(decode(cut, seconds=1.0).samples, samples_of(data)[:RATE])
    assert reason_of(cut) == "truncated"


def test_a_chunk_behind_samples_of_an_odd_number_without_padding() -> None:
    file = io.BytesIO()
    sf.write(file, noise(1.0, RATE, 0)[:-1], RATE, format="WAV", subtype="PCM_U8")
    data = file.getvalue()[: 44 + RATE - 1]
    audio = decode(data + b"LIST\x90\x01\0\0" + bytes(400))
    assert len(audio.samples) == RATE - 1 and not audio.notes


def test_aiff_from_a_pipe_of_sox() -> None:
    data = encoded("AIFF")
    place, code, _ = stated("AIFF", data)
    assert np.array_equal(samples_of(put(data, place, code, 0x7F000008)), samples_of(data))


@pytest.mark.parametrize("size", [0x7FFFFFFF, 0x80000000, 0x7FFFF000, 0xFFFFFFFF, 0x7FFFFFDB])
def test_wav_from_a_pipe(size: int) -> None:
    data = encoded("WAV")
    streamed = decode(put(put(data, 4, "<I", size), 40, "<I", size))
    assert np.array_equal(streamed.samples, samples_of(data)) and not streamed.notes


@pytest.mark.parametrize(
    "behind",
    [
        b"LIST\x04\0\0\0INFO",
        b"id3 \x0a\0\0\0ID3\x04" + bytes(6),
        b"TAG" + bytes(125),
        b"\0",
        b"\r\n",
    ],
)
def test_what_follows_the_samples_of_a_wav_is_no_audio(behind: bytes) -> None:
    data = encoded("WAV")
    audio = decode(data + behind)
    assert np.array_equal(audio.samples, samples_of(data)) and not audio.notes


def test_a_wav_without_samples_is_empty() -> None:
    empty = put(encoded("WAV")[:44], 40, "<I", 0)
    assert reason_of(empty) == "empty"
    assert reason_of(empty + b"LIST\x04\0\0\0INFO") == "empty"


def test_a_wav_whose_size_wrapped_at_4_gib(tmp_path: Path) -> None:
    """The file is sparse: only its first second has samples that are not zero."""
    data, size = encoded("WAV"), (5 << 30) + 2
    path = tmp_path / "long.wav"
    with path.open("wb") as file:
        file.write(put(data, 40, "<I", size % (1 << 32)))
        file.truncate(44 + size)
    audio = decode(path, seconds=1.0)
    assert np.array_equal(audio.samples, samples_of(data)) and remarks(audio) == ["wrong length"]
    with path.open("rb") as file:
        head = find_samples(file, 0).head
    # What libsndfile is given. To decode all of it would take minutes.
    short = tmp_path / "head.wav"
    with short.open("wb") as file:
        file.write(head)
        file.truncate(len(head) + size)
    assert sf.info(short).frames == size // 2


@pytest.mark.parametrize("form", ["WAV", "RF64", "AIFF", "AU", "CAF", "FLAC"])
@pytest.mark.parametrize("rate", [RATE, 8_000])
def test_joined_files(form: str, rate: int) -> None:
    first, second = encoded(form), encoded(form, rate=rate, seed=1)
    joined = samples_of(first + second + first)
    parts = [samples_of(data) for data in (first, second, first)]
    assert len(joined) == 3 * RATE
    assert np.abs(joined - np.concatenate(parts)).max() < 1e-6
    assert np.array_equal(decode(first + second, seconds=0.5).samples, parts[0][: RATE // 2])


def test_a_cut_at_a_joint_is_that_of_the_whole() -> None:
    joined = encoded("WAV", rate=44_100) + encoded("WAV", rate=44_100, seed=1)
    whole = samples_of(joined)
    for seconds in (0.9, 1.0, 1.1):
        cut = decode(joined, seconds=seconds).samples
        assert np.array_equal(cut, whole[: round(seconds * RATE)])


def test_joined_mp4() -> None:
    """ALAC gives the samples back as they were."""
    file = io.BytesIO()
    x = (noise(1.0, RATE, 0) * 32767).astype(np.int16)
    with av.open(file, "w", format="ipod") as container:
        stream = container.add_stream("alac", rate=RATE, layout="mono")
        frame = av.AudioFrame.from_ndarray(x[None], "s16p", "mono")
        frame.rate = RATE
        parts = av.AudioResampler("s16p", "mono", RATE, 4096)
        for part in (*parts.resample(frame), *parts.resample(None)):
            container.mux(stream.encode(part))
        container.mux(stream.encode(None))
    data = file.getvalue()
    expected = x / np.float32(32768)
    assert np.array_equal(samples_of(data), expected)
    assert np.array_equal(samples_of(data + data), np.concatenate([expected, expected]))


def test_id3_in_front_of_riff() -> None:
    data = encoded("WAV")
    tagged = b"ID3\x04\0\0\0\0\0\x0a" + bytes(10) + data
    assert np.array_equal(samples_of(tagged), samples_of(data))
    assert np.array_equal(samples_of(put(tagged, 60, "<I", 10_000)), samples_of(data))


# ------------------------------------------------------------------------------------------- FLAC
@pytest.mark.parametrize("bits", [12, 20, 32])
def test_flac_of_widths_that_libsndfile_does_not_read(bits: int) -> None:
    x = np.random.default_rng(bits).integers(-(1 << bits - 2), 1 << bits - 2, RATE)
    data = flac_file(x, bits, RATE)
    with pytest.raises(sf.LibsndfileError):
        sf.info(io.BytesIO(data))
    expected = (x / (1 << bits - 1)).astype(np.float32)
    assert np.abs(samples_of(data) - expected).max() <= 1e-7
    assert len(samples_of(data + data)) == 2 * RATE

    lost = bytearray(data)
    lost[len(data) // 2] ^= 1  # the frame's CRC differs
    assert reason_of(bytes(lost)) == "unreadable"
    checksum = bytearray(data)
    checksum[30] ^= 1
    assert reason_of(bytes(checksum)) == "unreadable"
    assert reason_of(data[: len(data) // 2]) in ("truncated", "unreadable")


def test_flac_from_a_pipe() -> None:
    """Neither length nor MD5 are known to the encoder."""
    data = encoded("FLAC")
    streamed = put(data[:26] + bytes(16) + data[42:], 22, ">I", 0)
    assert np.array_equal(samples_of(streamed), samples_of(data))
    assert len(samples_of(streamed + streamed)) == 2 * RATE


def test_damage_that_only_ffmpeg_sees() -> None:
    """Without an MD5 the CRC of a frame is all there is."""
    data = encoded("FLAC")
    unchecked = bytearray(data[:26] + bytes(16) + data[42:])
    unchecked[len(data) // 2] ^= 1
    assert reason_of(bytes(unchecked)) in ("truncated", "unreadable")
    streamed = bytearray(put(bytes(unchecked), 22, ">I", 0))
    assert reason_of(bytes(streamed)) == "unreadable"
    for muxer, encoder in (("wv", "wavpack"), ("matroska", "ac3")):
        other = bytearray(by_ffmpeg(muxer, encoder))
        other[len(other) // 2] ^= 1
        assert reason_of(bytes(other)) == "unreadable"


@pytest.mark.parametrize("channels", [8, 9, 16])
@pytest.mark.parametrize(("muxer", "encoder"), [("matroska", "pcm_s16le"), ("wv", "wavpack")])
def test_many_channels(muxer: str, encoder: str, channels: int) -> None:
    x = (noise(0.5, RATE, 0, channels) * 32767).astype(np.int16)
    file = io.BytesIO()
    with av.open(file, "w", format=muxer) as container:
        layout = f"{channels} channels" if channels > 8 else "7.1"
        stream = container.add_stream(encoder, rate=RATE, layout=layout)
        stream.codec_context.open()
        frame = av.AudioFrame.from_ndarray(x.reshape(1, -1), "s16", layout)
        frame.rate = RATE
        form = stream.codec_context.format
        for part in av.AudioResampler(form, layout, RATE).resample(frame):
            container.mux(stream.encode(part))
        container.mux(stream.encode(None))
    expected = (x / np.float32(32768)).mean(axis=1)
    assert np.abs(samples_of(file.getvalue()) - expected).max() < 0.01  # of eight bits


def test_flac_files_that_ffmpeg_joined() -> None:
    """The header of the first, and no further one."""
    first, second = encoded("FLAC"), encoded("FLAC", seed=1)
    joined = first + second[flac_frames(second)[0] :]
    audio = decode(joined)
    expected = np.concatenate([samples_of(first), samples_of(second)])
    assert np.array_equal(audio.samples, expected) and remarks(audio) == ["wrong length"]
    assert np.array_equal(decode(joined, seconds=0.3).samples, expected[:4800])


def test_flac_without_md5_that_states_another_length() -> None:
    data = encoded("FLAC")
    unchecked = data[:26] + bytes(16) + data[42:]
    audio = decode(put(unchecked, 22, ">I", 5000))
    assert np.array_equal(audio.samples, samples_of(data)) and remarks(audio) == ["wrong length"]
    assert reason_of(put(unchecked, 22, ">I", 2 * RATE)) == "truncated"


# -------------------------------------------------------------------------------------------- Ogg
def ogg_flac(seed: int = 0) -> bytes:
    """A second of noise as FLAC in Ogg, by FFmpeg."""
    file = io.BytesIO()
    x = (noise(1.0, RATE, seed) * 32767).astype(np.int16)
    with av.open(file, "w", format="ogg") as container:
        stream = container.add_stream("flac", rate=RATE, layout="mono")
        for start in range(0, RATE, 4000):
            frame = av.AudioFrame.from_ndarray(x[None, start : start + 4000], "s16", "mono")
            frame.rate, frame.pts = RATE, start
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return file.getvalue()


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS", "FLAC"])
def test_chained_ogg(subtype: str) -> None:
    first, second = (
        ogg_flac(seed) if subtype == "FLAC" else encoded("OGG", subtype, seed=seed)
        for seed in (0, 1)
    )
    chained = samples_of(first + second)
    assert len(chained) == 2 * RATE
    near = 200 if subtype == "OPUS" else 0  # it decodes to 48 kHz; the resampler reaches further
    assert np.abs(chained[: RATE - near] - samples_of(first)[: RATE - near]).max() < 1e-6
    assert np.abs(chained[RATE + near :] - samples_of(second)[near:]).max() < 1e-6
    pages = ogg_pages(first + second)
    assert pages is not None
    assert reason_of((first + second)[: pages[-1].start]) == "truncated"
    damaged = bytearray(first + second)
    damaged[-10] ^= 1
    assert reason_of(bytes(damaged)) == "unreadable"


def test_chained_ogg_of_two_rates() -> None:
    assert len(samples_of(encoded("OGG") + encoded("OGG", rate=48_000))) == 2 * RATE


def test_ogg_that_ffmpeg_cut_without_encoding() -> None:
    """Its positions do not begin at 0, which libsndfile takes for damage."""
    whole, part = io.BytesIO(encoded("OGG", "OPUS") * 1), io.BytesIO()
    with av.open(whole) as source, av.open(part, "w", format="ogg") as target:
        stream = target.add_stream_from_template(source.streams.audio[0])
        packets = [packet for packet in source.demux(audio=0) if packet.dts is not None]
        for packet in packets[len(packets) // 2 :]:
            packet.stream = stream
            target.mux(packet)
    assert 0.45 * RATE < len(samples_of(part.getvalue())) < 0.6 * RATE


# --------------------------------------------------------------------------- Matroska and MP4
def matroska(start_seconds: float = 0.0, *, video: bool = False) -> bytes:
    """Two seconds of sound, perhaps with pictures."""
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as container:
        sound = container.add_stream("pcm_s16le", rate=RATE, layout="mono")
        pictures = container.add_stream("mpeg4", rate=10) if video else None
        if pictures is not None:
            pictures.width = pictures.height = 32
        for i in range(20):
            x = (noise(0.1, RATE, i) * 32767).astype(np.int16)
            frame = av.AudioFrame.from_ndarray(x[None], "s16", "mono")
            frame.rate, frame.pts = RATE, round(start_seconds * RATE) + 1600 * i
            container.mux(sound.encode(frame))
            if pictures is not None:
                picture = av.VideoFrame(32, 32, "yuv420p")
                picture.pts = i
                container.mux(pictures.encode(picture))
        if pictures is not None:
            container.mux(pictures.encode(None))
    return file.getvalue()


def test_matroska_cut_short() -> None:
    for data in (matroska(), matroska(video=True)):
        assert len(samples_of(data)) == 2 * RATE
        assert reason_of(data[: len(data) // 2]) == "truncated"
        cut = decode(data[: len(data) * 9 // 10], seconds=0.5)
        assert np.array_equal(cut.samples, samples_of(data)[: RATE // 2])


def test_matroska_that_does_not_begin_at_0() -> None:
    assert np.array_equal(samples_of(matroska(100.0)), samples_of(matroska()))


def test_damage_that_makes_ffmpeg_ask_for_much_memory() -> None:
    """FFmpeg's error is Python's MemoryError too."""
    data = bytearray(by_ffmpeg("ipod", "alac"))
    data[data.find(b"stsz") + 16] = 0x3B
    assert reason_of(bytes(data)) in ("unreadable", "truncated")


@pytest.mark.parametrize("name", ["x.m3u8", "x.wav"])
def test_a_playlist_is_no_audio(name: str, tmp_path: Path) -> None:
    (tmp_path / "other.aac").write_bytes(by_ffmpeg("adts", "aac"))
    other = tmp_path / "other.aac"
    (tmp_path / name).write_text(
        f"#EXTM3U\n#EXT-X-VERSION:3\n#EXTINF:2,\n{other}\n#EXT-X-ENDLIST\n"
    )
    with pytest.raises(BadAudio):
        decode(tmp_path / name)


# ------------------------------------------------------------------------------------------- MPEG
def mp3(rate: int = 44_100, seed: int = 0) -> bytes:
    return encoded("MP3", rate=rate, seed=seed)


def cbr(rate: int, channels: int, seconds: float = 2.0) -> bytes:
    """Constant bit rate and no frame with a count, as old encoders and recorders write it."""
    file = io.BytesIO()
    layout = "mono" if channels == 1 else "stereo"
    x = noise(seconds, rate, 0, channels).reshape(-1, channels)
    with av.open(file, "w", format="mp3", options={"write_xing": "0", "id3v2_version": "0"}) as out:
        stream = out.add_stream("libmp3lame", rate=rate, layout=layout)
        stream.bit_rate = 64_000
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(x.T), "fltp", layout)
        frame.rate = rate
        resampler = av.AudioResampler("fltp", layout, rate, stream.frame_size or 1152)
        for part in (*resampler.resample(frame), *resampler.resample(None)):
            out.mux(stream.encode(part))
        out.mux(stream.encode(None))
    return file.getvalue()


@pytest.mark.parametrize("rate", [44_100, 22_050])
@pytest.mark.parametrize("channels", [1, 2])
def test_mp3_of_constant_bit_rate_without_a_count(rate: int, channels: int) -> None:
    data = cbr(rate, channels)
    assert b"Xing" not in data and b"Info" not in data
    got = samples_of(data)
    # The encoder's delay and padding stay: nothing says how long they are.
    assert 2 * RATE <= len(got) <= 2 * RATE + 0.12 * RATE
    assert len(samples_of(data + data)) == pytest.approx(2 * len(got), abs=2)
    assert reason_of(data[:-20]) == "truncated"


def test_mp3_of_variable_bit_rate_without_a_count() -> None:
    """A loud beginning has readers estimate a short file."""
    x = np.concatenate([noise(1.0, 44_100, 0), 0.01 * np.sin(np.arange(4 * 44_100) / 20)])
    file = io.BytesIO()
    sf.write(file, x, 44_100, format="MP3", bitrate_mode="VARIABLE", compression_level=0.1)
    data = file.getvalue()
    frames = mp3_frames(data)
    uncounted = data[frames[1] :]
    assert sf.info(io.BytesIO(uncounted)).duration < 4.0, "an estimate"
    assert len(samples_of(uncounted)) == round((len(frames) - 2) * 1152 / 44_100 * RATE)
    assert len(samples_of(data)) == 5 * RATE


def test_lost_frames_of_mp3_without_a_count() -> None:
    """Of a download into space that was set aside; and something large between frames."""
    data = cbr(44_100, 1, seconds=8.0)
    half = len(data) // 2
    half -= half % 2
    assert reason_of(data[:half] + bytes(len(data) - half)) in ("truncated", "unreadable")
    frames = [place for place in range(len(data)) if data[place : place + 2] == data[:2]]
    assert reason_of(data[: frames[9]] + b"junk" * 400_000 + data[frames[9] :]) == "unreadable"


def test_mp3_of_one_frame() -> None:
    data = cbr(44_100, 1)
    assert len(samples_of(data[:208])) == round(1152 / 44_100 * RATE)


def test_mp3_with_more_frames_than_it_states() -> None:
    data = mp3()
    place = max(data.find(b"Xing"), data.find(b"Info")) + 8
    audio = decode(put(data, place, ">I", 10))
    assert np.array_equal(audio.samples, samples_of(data)) and remarks(audio) == ["wrong length"]


@pytest.mark.parametrize("by", [-1, 1, 3])
def test_mp3_whose_count_is_a_little_off(by: int) -> None:
    data = mp3()
    place = max(data.find(b"Xing"), data.find(b"Info")) + 8
    (count,) = struct.unpack_from(">I", data, place)
    assert np.array_equal(samples_of(put(data, place, ">I", count + by)), samples_of(data))
    assert reason_of(put(data, place, ">I", 2 * count)) == "truncated"


@pytest.mark.parametrize("front", [b"junk" * 300, bytes(500), b"ID3\x04\0\0\0\0\0\x0a" + bytes(10)])
@pytest.mark.parametrize("behind", [b"", b"TAG" + bytes(125), bytes(300), b"and words" * 20])
def test_mp3_with_something_around_it(front: bytes, behind: bytes) -> None:
    data = mp3()
    assert np.array_equal(samples_of(front + data + behind), samples_of(data))


def test_mp3_behind_an_ape_tag() -> None:
    items = b"any items"
    head = b"APETAGEX" + struct.pack("<IIII", 2000, len(items) + 32, 1, 0xA0000000) + bytes(8)
    foot = b"APETAGEX" + struct.pack("<IIII", 2000, len(items) + 32, 1, 0x80000000) + bytes(8)
    data = mp3()
    assert np.array_equal(samples_of(data + head + items + foot), samples_of(data))
    assert len(samples_of(data + head + items + foot + data)) == 2 * RATE


@pytest.mark.parametrize("rate", [44_100, 22_050, 48_000])
@pytest.mark.parametrize("between", [b"", b"TAG" + bytes(125)])
def test_joined_mp3(rate: int, between: bytes) -> None:
    first, second = mp3(), mp3(rate, seed=1)
    joined = samples_of(first + between + second)
    assert len(joined) == 2 * RATE
    near = 200
    assert np.abs(joined[: RATE - near] - samples_of(first)[:-near]).max() < 1e-5
    assert np.abs(joined[RATE + near :] - samples_of(second)[near:]).max() < 1e-5


def test_damaged_mp3() -> None:
    data = mp3()
    frames = mp3_frames(data)
    middle = frames[len(frames) // 2]
    assert reason_of(data[:middle]) == "truncated"
    assert reason_of(data[:-20]) == "truncated"
    assert reason_of(data[:middle] + b"something else" + data[middle:]) == "unreadable"
    assert reason_of(data[: middle + 100] + data[middle + 150 :]) == "unreadable"
    assert reason_of(data[: frames[0] + 50] + data[frames[0] + 60 :]) == "unreadable"
    # Damage behind what is asked for.
    long = b"".join(data[a:b] for a, b in pairwise(frames[1:])) * 4
    start = decode(long[:-20], seconds=0.5).samples
    assert np.array_equal(start, samples_of(long)[: RATE // 2])


@pytest.mark.parametrize("layer", [1, 2])
def test_older_layers(layer: int) -> None:
    """Silence, written by hand where there is no encoder: a frame of zeros is one."""
    length = 4 * (12 * 128_000 // 32_000) if layer == 1 else 144 * 64_000 // 32_000
    bit_rate = 4
    head = bytes([0xFF, 0xF9 | (4 - layer) << 1, bit_rate << 4 | 2 << 2, 0xC0])
    got = samples_of(20 * (head + bytes(length - 4)))
    assert len(got) == 20 * (384 if layer == 1 else 1152) // 2 and not got.any()


# ---------------------------------------------------------------------------------------- clipping
def float_wav(x: Samples, subtype: str = "FLOAT") -> bytes:
    file = io.BytesIO()
    sf.write(file, x, RATE, format="WAV", subtype=subtype)
    return file.getvalue()


@pytest.mark.parametrize("subtype", ["FLOAT", "DOUBLE"])
def test_a_float_file_of_another_scale_is_bad(subtype: str) -> None:
    x = noise(1.0, RATE, 0)
    with pytest.raises(BadAudio) as caught:
        decode(float_wav(x * 32768, subtype))
    assert caught.value.reason == "clipped"
    assert f"{np.abs(x).max() * 32768:.4g}" in caught.value.detail


def test_a_few_clipped_samples_are_noted() -> None:
    x = noise(1.0, RATE, 0)
    assert not decode(float_wav(x)).notes
    x[100:110] = 1.5
    audio = decode(float_wav(x))
    assert remarks(audio) == ["clipped"] and "1.5" in audio.notes[0].detail
    x[:1000] = 1.5
    assert reason_of(float_wav(x)) == "clipped"


def test_clipping_counts_where_it_is_kept() -> None:
    x = noise(3.0, RATE, 0)
    x[RATE:] *= 30
    assert not decode(float_wav(x), seconds=1.0).notes
    assert reason_of(float_wav(x)) == "clipped"


def test_what_a_lossy_codec_overshoots_is_not_bad() -> None:
    """A recording that was clipped before it was encoded."""
    file = io.BytesIO()
    sf.write(file, np.clip(20 * noise(1.0, RATE, 0), -1, 1), RATE, format="MP3")
    audio = decode(file.getvalue())
    assert len(audio.samples) == RATE and remarks(audio) == ["clipped"]


# ------------------------------------------------------------------------------- any file whatever
@pytest.mark.parametrize("content", [bytes(range(256)) * 40, b"RIFF", b"fLaC", b"OggS" * 9, b"ID3"])
@pytest.mark.parametrize("suffix", [".raw", ".wav", ".mp3", ".ogg"])
def test_bytes_that_are_no_audio(tmp_path: Path, content: bytes, suffix: str) -> None:
    path = tmp_path / f"x{suffix}"
    path.write_bytes(content)
    with pytest.raises(BadAudio):
        decode(path)


def test_a_wav_named_raw(tmp_path: Path) -> None:
    data = encoded("WAV")
    for content in (data, put(data, 40, "<I", 0), b"ID3\x04\0\0\0\0\0\x0a" + bytes(10) + data):
        (tmp_path / "x.raw").write_bytes(content)
        assert len(decode(tmp_path / "x.raw").samples) == RATE


def test_whatever_a_library_raises_is_the_files_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("in some library")

    data = encoded("WAV")
    monkeypatch.setattr(sf, "SoundFile", broken)
    with pytest.raises(BadAudio, match="ZeroDivisionError: in some library") as caught:
        decode(data)
    assert caught.value.reason == "unreadable"
