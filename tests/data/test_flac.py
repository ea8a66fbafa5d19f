"""FLAC shards: the same samples as PCM shards give, damage, threads, training."""

import io
import json
import os
import shutil
import threading
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import soundfile as sf
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

from fastat.config.run import resolve
from fastat.data.flac import decode, encode
from fastat.data.loader import PackedSource
from fastat.data.sampler import Sampler
from fastat.data.shard_file import load_shard
from fastat.data.shards import PackedSet, write_index
from fastat.packing.pack import pack
from fastat.system.errors import Failure
from fastat.training import trainer as training
from tests.conftest import TinySets
from tests.data.audio import write_table
from tests.packing.test_pack import check_rows

SAMPLES = 8_000
NUM_CLIPS = 46
EVERY = np.arange(NUM_CLIPS)


def hard_cases() -> dict[str, NDArray[np.int16]]:
    """What FLAC might stumble over, int16 at 16 kHz."""
    rng = np.random.default_rng(0)
    return {
        "silence": np.zeros(SAMPLES, np.int16),
        "one_sample": np.array([-3], np.int16),
        "fifteen_samples": np.arange(15, dtype=np.int16),
        "full_scale": rng.integers(-(1 << 15), 1 << 15, SAMPLES).astype(np.int16),
        "square": np.where(np.arange(SAMPLES) % 100 < 50, 32767, -32768).astype(np.int16),
        "constant": np.full(SAMPLES, 1234, np.int16),
    }


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """WAV and FLAC files of several rates and lengths, and the hard cases."""
    path = write_table(tmp_path_factory.mktemp("flac"), NUM_CLIPS - len(hard_cases()))
    with path.open("a") as lines:
        for name, samples in hard_cases().items():
            sf.write(path.parent / "audio" / f"{name}.wav", samples, 16_000, subtype="PCM_16")
            lines.write(f"{name}.wav,a,s\n")
    return path


@pytest.fixture(scope="module")
def made(table: Path) -> dict[str, Path]:
    """The table packed with both codecs."""
    for codec in ("pcm16", "flac"):
        pack(table, table.parent / codec, clip_seconds=0.5, workers=2, codec=codec)
    return {codec: table.parent / codec for codec in ("pcm16", "flac")}


@pytest.fixture(scope="module")
def want(made: dict[str, Path]) -> NDArray[np.int16]:
    """All rows, as the PCM set has them."""
    packed = PackedSet.open(made["pcm16"])
    rows = read(packed, EVERY)
    packed.close()
    return rows


@pytest.fixture
def copy(made: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(made["flac"], tmp_path / "set"))


def read(packed: PackedSet, rows: NDArray[np.int64]) -> NDArray[np.int16]:
    out = np.full((len(rows), packed.clip_samples), 12345, np.int16)
    packed.read_rows(rows, out)
    return out


def span(packed: PackedSet, row: int) -> tuple[Path, int, int]:
    """A row's shard, and where in that file its stream starts and ends."""
    path, place = packed.place(row)
    with h5py.File(path) as file:
        start, end = file["flac_offsets"][place : place + 2] + file["flac_bytes"].id.get_offset()
    return path, int(start), int(end)


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as raw:
        raw.seek(offset)
        byte = raw.read(1)[0]
        raw.seek(offset)
        raw.write(bytes([byte ^ 4]))


# ------------------------------------------------------------------------------------- streams
@pytest.mark.parametrize("num_samples", [1, 15, 16, 4095, 4096, 4097, 160_000])
def test_a_stream_decodes_to_its_samples(num_samples: int) -> None:
    rng = np.random.default_rng(num_samples)
    samples = rng.integers(-(1 << 15), 1 << 15, num_samples).astype(np.int16)
    stream = encode(samples, 16_000)
    assert np.array_equal(sf.read(io.BytesIO(stream), dtype="int16")[0], samples)
    out = np.zeros(num_samples, np.int16)
    assert decode(memoryview(stream), out) is None
    assert np.array_equal(out, samples)


def test_other_streams_are_refused() -> None:
    samples = np.random.default_rng(0).integers(-3_000, 3_000, 20_000).astype(np.int16)
    stream = encode(samples, 16_000)
    streams = [b"", stream[:20], stream[: len(stream) // 2], bytes(len(stream)), b"fLaC" * 100]
    for channels, subtype in ((2, "PCM_16"), (1, "PCM_24")):
        file = io.BytesIO()
        wave = np.stack([samples] * channels, axis=1)
        sf.write(file, wave, 16_000, format="FLAC", subtype=subtype)
        streams.append(file.getvalue())
    for other in streams:
        assert decode(memoryview(other), np.zeros(20_000, np.int16)), other[:20]
    for num_samples in (19_999, 20_001):
        assert "20000 samples" in str(decode(memoryview(stream), np.zeros(num_samples, np.int16)))


def test_damaged_streams_end_in_a_reason_or_in_samples() -> None:
    samples = np.random.default_rng(0).integers(-3_000, 3_000, 10_000).astype(np.int16)
    stream = encode(samples, 16_000)
    rng = np.random.default_rng(1)
    for _ in range(500):
        damaged = bytearray(stream)
        for _ in range(rng.integers(1, 20)):
            damaged[rng.integers(len(damaged) if rng.random() < 0.5 else 60)] = rng.integers(256)
        decode(memoryview(damaged)[: rng.integers(1, 2 * len(stream))], np.zeros_like(samples))


# ---------------------------------------------------------------------------------------- rows
def test_rows_equal_those_of_pcm(made: dict[str, Path], want: NDArray[np.int16]) -> None:
    pcm, packed = (PackedSet.open(made[codec]) for codec in ("pcm16", "flac"))
    assert (packed.codec, packed.num_clips) == ("flac", NUM_CLIPS)
    rng = np.random.default_rng(1)
    for count in (0, 1, 7, 8, 9, 200):  # with repeats
        rows = rng.integers(0, NUM_CLIPS, count)
        assert np.array_equal(read(packed, rows), want[rows])
    for i, samples in enumerate(hard_cases().values(), NUM_CLIPS - len(hard_cases())):
        assert np.array_equal(read(packed, np.array([i]))[0, : len(samples)], samples)
    assert np.array_equal(packed.num_samples, pcm.num_samples)
    assert np.array_equal(packed.targets(EVERY), pcm.targets(EVERY))
    assert packed.sources(EVERY) == pcm.sources(EVERY)
    assert packed.stats.keys() == pcm.stats.keys()
    for name, stats in packed.stats.items():  # transforms of other batches round differently
        assert stats == pytest.approx(pcm.stats[name], rel=1e-5)
    packed.close()
    pcm.close()


def test_a_shard_is_as_the_format_says(made: dict[str, Path], want: NDArray[np.int16]) -> None:
    """By other readers: h5py, soundfile, zlib."""
    index = json.loads((made["flac"] / "dataset.json").read_text())
    assert index["codec"] == "flac" and {s["codec"] for s in index["shards"]} == {"flac"}
    row = 0
    for entry in index["shards"]:
        path = made["flac"] / entry["file"]
        assert path.stat().st_size == entry["bytes"]
        with h5py.File(path) as file:
            assert "waveform" not in file and file["flac_bytes"].chunks is None
            data, offsets = file["flac_bytes"][()], file["flac_offsets"][()]
            row_crc, num_samples = file["row_crc"][()], file["num_samples"][()]
        assert (data.dtype, offsets.dtype) == (np.uint8, np.int64)
        assert len(offsets) == entry["rows"] + 1 and offsets[0] == 0 and offsets[-1] == len(data)
        for i in range(entry["rows"]):
            stream = data[offsets[i] : offsets[i + 1]].tobytes()
            assert zlib.crc32(stream) == row_crc[i]
            samples, rate = sf.read(io.BytesIO(stream), dtype="int16")
            assert rate == 16_000 and len(samples) == num_samples[i]
            assert np.array_equal(samples, want[row, : num_samples[i]])
            row += 1
    assert row == NUM_CLIPS


def test_real_recordings(recordings: Path, tmp_path: Path) -> None:
    table = recordings / "esc10" / "esc10.csv"
    pack(table, tmp_path / "set", clip_seconds=5.0, workers=2, codec="flac")
    packed = check_rows(tmp_path / "set", 5.0)
    assert packed.num_clips == 80
    flac_bytes = sum(path.stat().st_size for path in (tmp_path / "set").glob("*.h5"))
    assert flac_bytes < 0.7 * 80 * 2 * packed.clip_samples
    packed.close()


# ------------------------------------------------------------------------------------- damage
def test_damaged_rows_are_told_by_their_place(copy: Path, want: NDArray[np.int16]) -> None:
    """A flipped bit, a shard that is cut short, a shard that is gone."""
    packed = PackedSet.open(copy)
    shard = [packed.place(row)[0] for row in range(NUM_CLIPS)]
    flipped, gone = 7, shard.index(shard[-1])
    cut = next(row for row in range(20, gone) if shard[row] == shard[row - 1])
    path, _, end = span(packed, flipped)
    flip(path, end - 10)
    (name,) = packed.names(np.array([flipped]))
    message = rf"{path.name}: row {packed.place(flipped)[1]} \(clip {name}\) is damaged"
    with pytest.raises(Failure, match=message):
        read(packed, EVERY)

    path, start, _ = span(packed, cut)
    os.truncate(path, start + 20)
    shard[-1].unlink()
    packed.reader.close()
    rows = np.random.default_rng(0).permutation(np.tile(EVERY, 2))
    out = np.empty((len(rows), SAMPLES), np.int16)
    reasons = {
        "its checksum differs": {flipped},
        "the file has ": {row for row in range(cut, gone) if shard[row] == path},
        "cannot open its file: ": set(range(gone, NUM_CLIPS)),
    }
    bad = packed.read(rows, out)
    for reason, damaged in reasons.items():
        places = {place for place, said in bad.items() if said.startswith(reason)}
        assert places == set(np.flatnonzero(np.isin(rows, list(damaged))).tolist()), reason
    good = np.isin(rows, list(set.union(*reasons.values())), invert=True)
    assert len(bad) == np.count_nonzero(~good)
    assert np.array_equal(out[good], want[rows[good]])
    packed.close()


def test_damaged_rows_are_replaced_while_training(copy: Path, want: NDArray[np.int16]) -> None:
    """Some are damaged on the disk, one has another length than it should."""
    packed = PackedSet.open(copy)
    damaged = {1, 2, 30, 40}
    for row in damaged - {40}:
        path, start, _ = span(packed, row)
        flip(path, start + 50)
    packed.num_samples[40] -= 1
    sampler = Sampler(NUM_CLIPS, 16, seed=0, num_frames=20, num_mels=64, mixup=0.5)
    source = PackedSource(packed, torch.device("cpu"), sampler=sampler, max_bad=0.2)
    steps = [sampler.plan(epoch, i) for epoch in range(3) for i in range(sampler.steps_per_epoch)]
    for plan, batch in zip(steps, source.batches(steps), strict=True):
        good = ~np.isin(plan.rows, list(damaged))
        assert np.array_equal(batch.rows[good], plan.rows[good])
        assert not damaged & set(batch.rows.tolist()) and batch.waveform is not None
        assert np.array_equal(batch.waveform.numpy()[: len(batch.rows)], want[batch.rows])
    assert set(source.bad) == damaged
    source.close()


def rewrite(copy: Path, change: Callable[[h5py.File], None]) -> None:
    """Changes the first shard, and makes its checksum right again."""
    path = copy / "shard-00000.h5"
    with h5py.File(path, "r+") as file:
        change(file)
    index = json.loads((copy / "dataset.json").read_text())
    index["shards"][0] = load_shard(path)[0]._asdict()
    write_index(copy, index)


def shorten(file: h5py.File) -> None:
    file["num_samples"][1] -= 1


def no_flac(file: h5py.File) -> None:
    here = slice(*file["flac_offsets"][1:3].tolist())
    file["flac_bytes"][here] = 7
    file["row_crc"][1] = zlib.crc32(file["flac_bytes"][here])


@pytest.mark.parametrize("change, reason", [(shorten, "samples, not "), (no_flac, "cannot decode")])
def test_a_row_that_was_written_wrong(
    copy: Path, want: NDArray[np.int16], change: Callable[[h5py.File], None], reason: str
) -> None:
    """Its checksum is right: it is reported like any damaged row, and the others are read."""
    rewrite(copy, change)
    packed = PackedSet.open(copy)
    out = np.empty_like(want)
    bad = packed.read(EVERY, out)
    assert list(bad) == [1] and reason in bad[1] and "\n" not in bad[1]
    assert np.array_equal(np.delete(out, 1, axis=0), np.delete(want, 1, axis=0))
    packed.close()


def move_a_row(file: h5py.File) -> None:
    file["flac_offsets"][3] += 1


def name_it_pcm(file: h5py.File) -> None:
    file.move("flac_bytes", "waveform")


@pytest.mark.parametrize("change", [move_a_row, name_it_pcm])
def test_damage_outside_the_rows_shows_at_opening(
    copy: Path, change: Callable[[h5py.File], None]
) -> None:
    path = copy / "shard-00000.h5"
    with h5py.File(path, "r+") as file:
        change(file)
    index = json.loads((copy / "dataset.json").read_text())
    index["shards"][0]["bytes"] = path.stat().st_size
    write_index(copy, index)
    with pytest.raises(Failure, match=r"shard-00000\.h5: damaged") as caught:
        PackedSet.open(copy)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------- threads
def num_tasks() -> int:
    return len(os.listdir("/proc/self/task"))


def test_close_ends_the_threads(made: dict[str, Path], want: NDArray[np.int16]) -> None:
    before = num_tasks()
    packed = PackedSet.open(made["flac"])
    for _ in range(2):  # it opens again
        assert np.array_equal(read(packed, EVERY), want)
        assert num_tasks() > before
        packed.close()
        deadline = time.monotonic() + 5
        while num_tasks() > before:  # a thread that has ended is listed for a moment longer
            assert time.monotonic() < deadline, "threads outlive the set"
            time.sleep(0.01)


def test_threads_may_share_a_set(made: dict[str, Path], want: NDArray[np.int16]) -> None:
    packed = PackedSet.open(made["flac"])
    wrong: list[int] = []

    def work(seed: int) -> None:
        for rows in np.random.default_rng(seed).integers(0, NUM_CLIPS, (5, 40)):
            if not np.array_equal(read(packed, rows), want[rows]):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    packed.close()


# ------------------------------------------------------------------------------------ training
def test_training_is_the_same_bit_for_bit(tiny_sets: TinySets, tmp_path: Path) -> None:
    """Two steps of A4 and the evaluation after them."""
    pack(tiny_sets.audio, tmp_path / "set", clip_seconds=1.0, workers=1, codec="flac")
    lines: list[dict[str, Any]] = []
    for name, data in (("pcm", tiny_sets.train), ("flac", tmp_path / "set")):
        given = {
            "data": str(data),
            "eval": str(data),
            "epochs": 1,
            "batch": 8,
            "steps": 2,
            "model_options": {"embedding": 64, "num_heads": 4},
        }
        config = resolve("A4", "cnn_trans", given, num_clips=36, clip_seconds=1.0)
        training.train(config, tmp_path / name, resume=False)
        lines.append(json.loads((tmp_path / name / "metrics.jsonl").read_text()))
    for key in ("step", "train_loss", "eval_loss", "mAP"):
        assert lines[0][key] == lines[1][key]
    a, b = (
        load_file(tmp_path / name / "checkpoints" / "last" / "model.safetensors")
        for name in ("pcm", "flac")
    )
    assert a.keys() == b.keys() and all(bool((a[k] == b[k]).all()) for k in a)
