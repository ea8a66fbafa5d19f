"""fastat pack of PANNs' and PaSST's HDF5 files: the rows that the same audio in files makes."""

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import av
import h5py
import numpy as np
import pytest
import soundfile as sf
import torch
from numpy.typing import NDArray

from fastat.audio import hdf5_source
from fastat.audio.decode import decode, to_int16
from fastat.data.dali import DaliSource
from fastat.data.shards import PackedSet
from fastat.packing.append import append
from fastat.packing.pack import pack
from fastat.system.errors import UserError
from tests.data.audio import noise, reference

NUM_CLASSES = 11  # more than a byte of labels
LABELS: Sequence[tuple[int, ...]] = ((0,), (10,), (3, 7), (8, 9, 10), (0, 1))
Packed = tuple[PackedSet, NDArray[np.int16]]


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("classes") / "labels.csv"
    lines = [f"{k},/m/{k},Class {k}" for k in range(NUM_CLASSES)]
    path.write_text("\n".join(["index,mid,display_name", *lines]) + "\n")
    return path


def targets() -> NDArray[np.bool_]:
    target = np.zeros((len(LABELS), NUM_CLASSES), bool)
    for row, labels in enumerate(LABELS):
        target[row, list(labels)] = True
    return target


def write_panns(path: Path, rate: int | None, seconds: float = 0.6, **options: Any) -> list[Path]:
    """PANNs' layout; returns WAV files with the same samples."""
    waves = [to_int16(noise(seconds, rate or 32_000, row)) for row in range(len(LABELS))]
    files = []
    for row, wave in enumerate(waves):
        files.append(path.with_name(f"{path.stem}-{row}.wav"))
        sf.write(files[-1], wave, rate or 32_000)
    with h5py.File(path, "w") as file:
        file.create_dataset("waveform", data=np.stack(waves), **options)
        file.create_dataset("target", data=targets())
        file.create_dataset(
            "audio_name", data=np.array([b"Yid%d.wav" % i for i in range(5)], "S20")
        )
        if rate is not None:
            file.attrs["sample_rate"] = np.array([rate], np.int32) if rate == 44_100 else rate
    return files


def write_passt(path: Path, packed: bool = True) -> list[Path]:
    """PaSST's layout; returns MP3 files with the same bytes."""
    files = []
    with h5py.File(path, "w") as file:
        mp3 = file.create_dataset("mp3", (len(LABELS),), h5py.vlen_dtype(np.uint8))
        for row in range(len(LABELS)):
            files.append(path.with_name(f"{path.stem}-{row}.mp3"))
            channels = 1 + row % 2
            sf.write(files[-1], noise(0.8, 32_000, row, channels), 32_000, format="MP3")
            mp3[row] = np.frombuffer(files[-1].read_bytes(), np.uint8)
        target = np.packbits(targets(), axis=-1) if packed else targets().astype(np.uint8)
        file.create_dataset("target", data=target)
        names = np.array([f"id{i}.mp3".encode() for i in range(5)], h5py.string_dtype())
        file.create_dataset("audio_name", data=names)
    return files


def read(out: Path) -> Packed:
    packed = PackedSet.open(out)
    rows = np.empty((packed.num_clips, packed.clip_samples), np.int16)
    packed.read_rows(np.arange(packed.num_clips), rows)
    return packed, rows


def check_labels(packed: PackedSet, which: Sequence[int] = range(len(LABELS))) -> None:
    found = packed.targets(np.arange(packed.num_clips)) > 0
    assert np.array_equal(found, targets()[list(which)])
    assert [c.id for c in packed.classes] == [f"/m/{k}" for k in range(NUM_CLASSES)]


@pytest.mark.parametrize("rate", [None, 16_000, 44_100])
def test_panns(classes: Path, tmp_path: Path, rate: int | None) -> None:
    files = write_panns(tmp_path / "waveforms.h5", rate, chunks=(2, 1_000), compression="gzip")
    out = tmp_path / "set"
    pack(tmp_path / "waveforms.h5", out, labels=classes, clip_seconds=0.5, workers=2)
    packed, rows = read(out)
    check_labels(packed)
    every = np.arange(5)
    assert packed.names(every) == [f"Yid{i}.wav" for i in range(5)]
    assert packed.sources(every) == [(f"{tmp_path / 'waveforms.h5'}#{i}", 0.0) for i in range(5)]
    assert packed.num_samples.tolist() == [8_000] * 5
    for row, file in zip(rows, files, strict=True):
        assert np.array_equal(row, reference(file, 0.5))


@pytest.mark.parametrize("packed_bits", [True, False])
def test_passt(classes: Path, tmp_path: Path, packed_bits: bool) -> None:
    """Mono and stereo MP3; targets as bits and as bytes; clips longer than the audio."""
    files = write_passt(tmp_path / "mp3.hdf5", packed_bits)
    pack(tmp_path / "mp3.hdf5", tmp_path / "set", labels=classes, clip_seconds=1.0, workers=1)
    packed, rows = read(tmp_path / "set")
    check_labels(packed)
    assert packed.names(np.arange(5)) == [f"id{i}.mp3" for i in range(5)]
    for row, count, file in zip(rows, packed.num_samples.tolist(), files, strict=True):
        expected = reference(file, 1.0)
        assert count == len(expected) < 16_000
        # FFmpeg's decoder of MP3 rounds in other places than libsndfile's.
        assert np.abs(row[:count].astype(int) - expected).max() <= 1 and not row[count:].any()


def test_segments_and_append(classes: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "a.h5", tmp_path / "b.h5"
    wavs = write_panns(first, 32_000, seconds=1.3)
    mp3s = write_passt(second)
    out = tmp_path / "set"
    pack(first, out, labels=classes, clip_seconds=0.5, segments=True, workers=1)
    assert append(second, out, workers=1).appended_clips == 5  # a rest under 0.5 s is dropped
    assert append(second, out, workers=1).already_there == 5
    packed, rows = read(out)
    check_labels(packed, [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 0, 1, 2, 3, 4])
    for row, (path, start) in zip(rows, packed.sources(np.arange(15)), strict=True):
        source, _, number = path.partition("#")
        file = (wavs if source == str(first) else mp3s)[int(number)]
        expected = reference(file)[round(start * 16_000) :][:8_000]
        assert np.abs(row[: len(expected)].astype(int) - expected).max() <= 1


def test_bad_rows(classes: Path, tmp_path: Path) -> None:
    """Empty, undecodable and cut MP3; a row without a label; a chunk that cannot be read."""
    write_passt(tmp_path / "mp3.h5", packed=False)
    with h5py.File(tmp_path / "mp3.h5", "r+") as file:
        file["mp3"][0] = np.empty(0, np.uint8)
        file["mp3"][1] = np.frombuffer(b"not an MP3 file" * 40, np.uint8)
        file["target"][3] = 0
    summary = pack(
        tmp_path / "mp3.h5", tmp_path / "set", labels=classes, clip_seconds=0.5, max_bad=0.7,
        workers=1,
    )  # fmt: skip
    assert summary.clips == 2
    with (tmp_path / "set" / "bad.csv").open(newline="") as table:
        bad = [(b["path"].rpartition("/")[2], b["reason"]) for b in csv.DictReader(table)]
    assert bad == [
        ("mp3.h5#0", "empty"),
        ("mp3.h5#1", "unreadable"),
        ("mp3.h5#3", "label unknown"),
    ]
    check_labels(PackedSet.open(tmp_path / "set"), [2, 4])

    write_panns(tmp_path / "w.h5", 16_000, chunks=(1, 9_600), compression="gzip")
    with h5py.File(tmp_path / "w.h5") as file:
        chunk = file["waveform"].id.get_chunk_info(2)
    with (tmp_path / "w.h5").open("r+b") as raw:
        raw.seek(chunk.byte_offset)
        raw.write(b"\xff" * chunk.size)
    summary = pack(
        tmp_path / "w.h5", tmp_path / "w", labels=classes, clip_seconds=0.5, max_bad=0.2, workers=1
    )
    assert (summary.clips, summary.bad_reasons) == (4, {"unreadable": 1})


def test_wrong_files(classes: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.h5"
    names = np.array([b"a", b"b"])
    audio = np.zeros((2, 100), np.int16)
    target = np.zeros((2, NUM_CLASSES), bool)
    good = {"waveform": audio, "target": target, "audio_name": names}
    cases: list[tuple[dict[str, Any], str]] = [
        ({}, "expected datasets waveform .* got none"),
        ({"waveform": audio, "target": target}, "got target, waveform"),
        (good | {"mp3": audio}, "expected datasets waveform"),
        (good | {"waveform": audio[0]}, r"expected waveform int16 \[clips, samples\], got int16"),
        (good | {"waveform": audio.astype(np.float32)}, "got float32"),
        (good | {"target": target[:, :3]}, r"as the class list has 11 classes, got bool \[2, 3\]"),
        (good | {"target": target[:, :2]}, "got bool"),
        (good | {"target": target.astype(np.float32)}, "got float32"),
        (good | {"audio_name": names[:1]}, "2 clips, 2 targets, 1 names"),
        ({"mp3": audio, "target": target, "audio_name": names}, "expected mp3 of variable-length"),
        (good | {"audio_name": np.arange(2)}, r"audio_name of bytes \[clips\], got int64 \[2\]"),
        (
            good | {"audio_name": names[:, None]},
            r"audio_name of bytes \[clips\], got \|S1 \[2, 1\]",
        ),
        (good | {"audio_name": np.bytes_(b"a")}, r"audio_name of bytes \[clips\], got \|S1 \[\]"),
        (good | {"target": np.uint8(1)}, r"target \[clips, classes\], got uint8 \[\]"),
        (good | {"target": h5py.Empty("u1")}, r"target \[clips, classes\], got uint8 \[\]"),
        (good | {"waveform": h5py.Empty("i2")}, r"waveform int16 \[clips, samples\], got int16"),
        ({k: v[:0] for k, v in good.items()}, "no clips in it"),
    ]
    for datasets, message in cases:
        with h5py.File(path, "w") as file:
            for name, data in datasets.items():
                file[name] = data
        with pytest.raises(UserError, match=message) as caught:
            pack(path, tmp_path / "set", labels=classes)
        assert "\n" not in str(caught.value)
    with h5py.File(path, "w") as file:
        for name, data in good.items():
            file[name] = data
    for rate in (0, "32k", math.nan, math.inf, 32_000.5, [16_000, 16_000], h5py.Empty("i4")):
        with h5py.File(path, "r+") as file:
            file.attrs["sample_rate"] = rate
        with pytest.raises(UserError, match="expected sample_rate in Hz, got ") as caught:
            pack(path, tmp_path / "set", labels=classes)
        assert "\n" not in str(caught.value)
    for options, message in (
        ({}, "--labels CSV or --classes-from SET names them"),
        ({"labels": classes, "audio": tmp_path}, "holds its audio"),
        ({"labels": classes, "group_by": "x", "holdout": 0.5}, "without columns"),
    ):
        with pytest.raises(UserError, match=message):
            pack(path, tmp_path / "set", **options)
    path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100))
    with pytest.raises(UserError, match="not a readable HDF5 file"):
        pack(path, tmp_path / "set", labels=classes)
    assert not (tmp_path / "set").exists()


def test_bytes_decode_as_files_do(tmp_path: Path) -> None:
    """Also what only FFmpeg reads, and a file cut short."""
    x = noise(0.5, 22_050, 1, channels=2)
    for name in ("a.wav", "b.flac", "c.mp3", "d.ogg"):
        sf.write(tmp_path / name, x, 22_050)
        content = (tmp_path / name).read_bytes()
        assert np.array_equal(decode(content).samples, decode(tmp_path / name).samples)
    (tmp_path / "cut.flac").write_bytes((tmp_path / "b.flac").read_bytes()[:-3000])
    messages = []
    for source in (tmp_path / "cut.flac", (tmp_path / "cut.flac").read_bytes()):
        with pytest.raises(ValueError, match="truncated|unreadable") as caught:
            decode(source)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    with av.open(str(tmp_path / "e.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=16_000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16_000), np.float32), "fltp", "mono")
        frame.rate = 16_000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    content = (tmp_path / "e.mp4").read_bytes()
    assert np.array_equal(decode(content).samples, decode(tmp_path / "e.mp4").samples)


def test_dali_says_that_it_cannot(classes: Path, tmp_path: Path) -> None:
    write_panns(tmp_path / "waveforms.h5", None)
    out = tmp_path / "set"
    pack(tmp_path / "waveforms.h5", out, clip_seconds=0.5, labels=classes, workers=1)
    with pytest.raises(UserError, match=r"unreadable: a row of an HDF5 file, DALI reads audio"):
        DaliSource(PackedSet.open(out), None, batch=2, threads=1, device=torch.device("cpu"))


def test_which_paths_are_rows() -> None:
    assert hdf5_source.is_row("a/b.h5#3") and hdf5_source.file_of("a/b.h5#3") == "a/b.h5"
    for name in ("a.wav", "a.h5", "a#3", "a.wav#3", "a.h5#", "a.h5#x", ".h5#1"):
        assert not hdf5_source.is_row(name) and hdf5_source.file_of(name) == name
