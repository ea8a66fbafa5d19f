"""FLAC shards read: the same samples as PCM shards give, damage, training, threads."""

import io
import json
import os
import shutil
import sys
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

from fastat import train as training
from fastat.config import resolve
from fastat.data import flac
from fastat.data.loader import PackedSource
from fastat.data.sampler import Sampler
from fastat.data.shards import PackedSet, ShardInfo, ShardRows, codec_of, write_index
from fastat.errors import Failure, UserError
from fastat.host import cores_of_rank
from fastat.packing.pack import pack
from tests.conftest import TinySets
from tests.data.audio import write_table
from tests.packing.test_pack_real import check_rows

SAMPLES = 8_000
SHARD_BYTES = 250_000
NUM_CLIPS = 46


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
        out = table.parent / codec
        pack(table, out, clip_seconds=0.5, workers=2, shard_bytes=SHARD_BYTES, codec=codec)
    return {codec: table.parent / codec for codec in ("pcm16", "flac")}


@pytest.fixture
def copy(made: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(made["flac"], tmp_path / "set"))


def read(packed: PackedSet, rows: NDArray[np.int64]) -> NDArray[np.int16]:
    out = np.full((len(rows), packed.clip_samples), 12345, np.int16)
    packed.read_rows(rows, out)
    return out


def test_rows_equal_those_of_pcm(made: dict[str, Path]) -> None:
    pcm, packed = (PackedSet.open(made[codec]) for codec in ("pcm16", "flac"))
    assert (packed.codec, packed.num_clips) == ("flac", NUM_CLIPS)
    every = np.arange(NUM_CLIPS)
    want = read(pcm, every)
    assert np.array_equal(read(packed, every), want)
    rng = np.random.default_rng(1)
    batch = flac.ROWS_PER_THREAD * cores_of_rank()
    for count in (0, 1, batch, batch + 1, 5 * batch):  # repeats, several batches of DALI
        rows = rng.integers(0, NUM_CLIPS, count)
        assert np.array_equal(read(packed, rows), want[rows])
    for i, samples in enumerate(hard_cases().values(), NUM_CLIPS - len(hard_cases())):
        assert np.array_equal(read(packed, np.array([i]))[0, : len(samples)], samples)
    assert np.array_equal(packed.num_samples, pcm.num_samples)
    assert np.array_equal(packed.targets(every), pcm.targets(every))
    assert packed.sources(every) == pcm.sources(every)
    assert packed.stats.keys() == pcm.stats.keys()
    for name, stats in packed.stats.items():  # by other blocks, whose transforms round differently
        assert stats == pytest.approx(pcm.stats[name], rel=1e-5)
    packed.close()
    pcm.close()


def test_a_shard_is_as_the_format_says(made: dict[str, Path]) -> None:
    """By other readers: h5py, soundfile, zlib."""
    index = json.loads((made["flac"] / "dataset.json").read_text())
    assert index["codec"] == "flac" and {s["codec"] for s in index["shards"]} == {"flac"}
    assert len(index["shards"]) > 1
    pcm = PackedSet.open(made["pcm16"])
    want = read(pcm, np.arange(NUM_CLIPS))
    row = 0
    for entry in index["shards"]:
        path = made["flac"] / entry["file"]
        assert path.stat().st_size == entry["bytes"] <= SHARD_BYTES
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
    pcm.close()


def test_real_recordings(recordings: Path, tmp_path: Path) -> None:
    table = recordings / "esc10" / "esc10.csv"
    pack(table, tmp_path / "set", clip_seconds=5.0, workers=2, codec="flac")
    packed = check_rows(tmp_path / "set", 5.0)
    assert packed.num_clips == 80
    flac_bytes = sum(path.stat().st_size for path in (tmp_path / "set").glob("*.h5"))
    assert flac_bytes < 0.7 * 80 * 2 * packed.clip_samples
    packed.close()


@pytest.mark.parametrize("num_samples", [1, 16, 4095, 4097, 160_000])
def test_no_row_is_larger_than_the_largest(num_samples: int) -> None:
    rng = np.random.default_rng(num_samples)
    samples = rng.integers(-(1 << 15), 1 << 15, num_samples).astype(np.int16)
    stream = flac.encode(samples, 16_000)
    assert 2 * num_samples < len(stream) <= flac.max_row_bytes("flac", num_samples)
    assert np.array_equal(sf.read(io.BytesIO(stream), dtype="int16")[0], samples)


@pytest.fixture
def mixed(made: dict[str, Path], tmp_path: Path) -> Path:
    """The first shard of the PCM set, then the first of the FLAC set."""
    out = tmp_path / "mixed"
    out.mkdir()
    indexes = [
        json.loads((made[codec] / "dataset.json").read_text()) for codec in ("pcm16", "flac")
    ]
    shards = []
    for i, (codec, index) in enumerate(zip(("pcm16", "flac"), indexes, strict=True)):
        shards.append(ShardInfo(**index["shards"][0] | {"file": f"shard-{i:05d}.h5"}))
        shutil.copy(made[codec] / "shard-00000.h5", out / shards[i].file)
    clips = sum(info.rows for info in shards)
    index = indexes[0] | {"clips": clips, "codec": codec_of(shards)}
    entries = [info._asdict() for info in shards]
    del entries[0]["codec"]  # as before there was another
    write_index(out, index | {"shards": entries})
    return out


def test_mixed_set(made: dict[str, Path], mixed: Path) -> None:
    pcm, packed = PackedSet.open(made["pcm16"]), PackedSet.open(mixed)
    assert packed.codec == "mixed"
    num_pcm, num_flac = (info.rows for info in packed._shards)
    want = read(pcm, np.concatenate([np.arange(num_pcm), np.arange(num_flac)]))
    rows = np.random.default_rng(0).integers(0, packed.num_clips, 100)
    assert np.array_equal(read(packed, rows), want[rows])
    assert np.array_equal(read(packed, np.arange(num_pcm)), want[:num_pcm])

    for shard, at in (("shard-00000.h5", 2_048 + 2 * 2 * SAMPLES), ("shard-00001.h5", 2_048 + 60)):
        flip(mixed / shard, at)  # row 2 of PCM, row 0 of FLAC
    out = np.empty((100, SAMPLES), np.int16)
    bad = packed.read(rows, out)
    assert set(bad) == set(np.flatnonzero((rows == 2) | (rows == num_pcm)).tolist())
    assert set(bad.values()) == {"its checksum differs"}
    whole = [i for i in range(100) if i not in bad]
    assert np.array_equal(out[whole], want[rows[whole]])
    packed.close()
    pcm.close()


# ------------------------------------------------------------------------------------- damage
def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as raw:
        raw.seek(offset)
        byte = raw.read(1)[0]
        raw.seek(-1, os.SEEK_CUR)
        raw.write(bytes([byte ^ 4]))


def test_flipped_bit_in_a_row(made: dict[str, Path], copy: Path) -> None:
    with h5py.File(copy / "shard-00001.h5") as file:
        where = file["flac_bytes"].id.get_offset() + int(file["flac_offsets"][8]) - 10
        name = file["audio_name"][7].decode()
    flip(copy / "shard-00001.h5", where)
    packed = PackedSet.open(copy)
    row = packed._shards[0].rows + 7
    others = np.delete(np.arange(NUM_CLIPS), row)
    pcm = PackedSet.open(made["pcm16"])
    assert np.array_equal(read(packed, others), read(pcm, others))
    message = rf"shard-00001\.h5: row 7 \(clip {name}\) is damaged: its checksum differs"
    for rows in (np.array([row]), np.arange(NUM_CLIPS)):
        with pytest.raises(Failure, match=message):
            read(packed, rows)
    out = np.empty((NUM_CLIPS, SAMPLES), np.int16)
    assert packed.read(np.arange(NUM_CLIPS), out) == {row: "its checksum differs"}
    assert np.array_equal(out[others], read(pcm, others))
    packed.close()
    pcm.close()


def test_cut_short_after_opening(copy: Path) -> None:
    packed = PackedSet.open(copy)
    with h5py.File(copy / "shard-00001.h5") as file:
        cut = file["flac_bytes"].id.get_offset() + int(file["flac_offsets"][3]) + 20
    os.truncate(copy / "shard-00001.h5", cut)
    first, second = packed._shards[0].rows, packed._shards[1].rows
    rows = np.arange(NUM_CLIPS)
    bad = packed.read(rows, np.empty((NUM_CLIPS, SAMPLES), np.int16))
    assert sorted(bad) == list(range(first + 3, first + second))
    assert bad[first + 3].startswith("the file has 20 of its ")
    with pytest.raises(Failure, match=r"shard-00001\.h5: row 3 \(clip .*\) is damaged: the file"):
        read(packed, rows)
    packed.close()


def test_damaged_rows_are_replaced_while_training(made: dict[str, Path], copy: Path) -> None:
    """Some are damaged on the disk, one has another length than it should."""
    packed, pcm = PackedSet.open(copy), PackedSet.open(made["pcm16"])
    assert packed.reader.spans is not None
    damaged = {1, 2, 30, 40}
    for row in damaged - {40}:
        path, _ = packed.place(row)
        flip(path, int(packed.reader.spans.offset[row]) + 50)
    packed.num_samples[40] += 1
    sampler = Sampler(NUM_CLIPS, 16, seed=0, num_frames=20, num_mels=64, mixup=0.5)
    source = PackedSource(packed, torch.device("cpu"), sampler=sampler, max_bad=0.2)
    steps = [sampler.plan(epoch, i) for epoch in range(3) for i in range(sampler.steps_per_epoch)]
    for plan, batch in zip(steps, source.batches(steps), strict=True):
        good = ~np.isin(plan.rows, list(damaged))
        assert np.array_equal(batch.rows[good], plan.rows[good])
        assert not damaged & set(batch.rows.tolist()) and batch.waveform is not None
        assert np.array_equal(batch.waveform.numpy()[: len(batch.rows)], read(pcm, batch.rows))
    assert set(source.bad) == damaged
    source.close()
    pcm.close()


def test_a_shard_that_cannot_be_opened(made: dict[str, Path], copy: Path) -> None:
    packed, pcm = PackedSet.open(copy), PackedSet.open(made["pcm16"])
    (copy / "shard-00000.h5").unlink()
    rows = np.random.default_rng(0).permutation(NUM_CLIPS)
    out = np.empty((NUM_CLIPS, SAMPLES), np.int16)
    bad = packed.read(rows, out)
    first = packed._shards[0].rows
    assert set(bad) == set(np.flatnonzero(rows < first).tolist())
    assert set(bad.values()) == {"cannot open its file: No such file or directory"}
    assert np.array_equal(out[rows >= first], read(pcm, rows[rows >= first]))
    packed.close()
    pcm.close()


def rewrite(copy: Path, change: Callable[[h5py.File], None]) -> None:
    """Changes the first shard, and makes every checksum but those of the rows right again."""
    path = copy / "shard-00000.h5"
    with h5py.File(path, "r+") as file:
        change(file)
        rows = ShardRows(*(file[name][()] for name in ShardRows._fields))
    index = json.loads((copy / "dataset.json").read_text())
    index["shards"][0] |= {"crc32": rows.crc32(), "bytes": path.stat().st_size}
    write_index(copy, index)


def test_a_row_of_another_length(copy: Path) -> None:
    def shorten(file: h5py.File) -> None:
        file["num_samples"][1] -= 1

    rewrite(copy, shorten)
    packed = PackedSet.open(copy)
    count = packed.num_samples[1]
    bad = packed.read(np.arange(40), np.empty((40, SAMPLES), np.int16))
    assert bad == {1: f"it decodes to {count + 1} x 1 samples, not {count} x 1"}
    packed.close()


def spoil(copy: Path, row: int, damage: Callable[[NDArray[np.uint8]], None]) -> None:
    """Changes a row of the first shard, under a right checksum."""

    def change(file: h5py.File) -> None:
        here = slice(*file["flac_offsets"][row : row + 2].tolist())
        stream = file["flac_bytes"][here]
        damage(stream)
        file["flac_bytes"][here] = stream
        file["row_crc"][row] = zlib.crc32(stream)

    rewrite(copy, change)


def no_flac(stream: NDArray[np.uint8]) -> None:
    stream[:] = 7


def test_a_row_that_dali_cannot_decode(made: dict[str, Path], copy: Path) -> None:
    """A row is written wrong, checksum and all: one line, and the reader goes on with others."""
    spoil(copy, 2, no_flac)
    packed, pcm = PackedSet.open(copy), PackedSet.open(made["pcm16"])
    with pytest.raises(Failure, match="DALI cannot decode FLAC rows: .+") as caught:
        read(packed, np.array([2]))
    assert "\n" not in str(caught.value)
    others = np.delete(np.arange(NUM_CLIPS), 2)
    assert np.array_equal(read(packed, others), read(pcm, others))
    packed.close()
    pcm.close()


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


# ------------------------------------------------------------------------------ threads and DALI
def num_tasks() -> int:
    return len(os.listdir("/proc/self/task"))


def test_close_ends_the_threads(made: dict[str, Path]) -> None:
    idle = None
    for _ in range(4):
        packed = PackedSet.open(made["flac"])
        read(packed, np.arange(NUM_CLIPS))
        assert idle is None or num_tasks() > idle
        packed.close()
        # DALI keeps some threads of its own from the first pipeline on; a thread that has ended is
        # listed for a moment longer.
        idle = idle or num_tasks()
        deadline = time.monotonic() + 5
        while num_tasks() > idle:
            assert time.monotonic() < deadline, "threads outlive the set"
            time.sleep(0.01)
    pcm = PackedSet.open(made["pcm16"])
    assert np.array_equal(read(packed, np.array([3])), read(pcm, np.array([3])))  # opens again
    packed.close()
    pcm.close()


def test_threads_may_share_a_set(made: dict[str, Path]) -> None:
    packed = PackedSet.open(made["flac"])
    want = read(packed, np.arange(NUM_CLIPS))
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


def test_the_kernel_is_told_of_the_bytes(
    made: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neighbouring rows as one range, from the first one's start to the last one's end."""
    packed = PackedSet.open(made["flac"])
    told: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, *span: told.append(span[:2]))
    packed.reader.advise(np.array([7, 2, 1, 3, 7]))
    with h5py.File(made["flac"] / "shard-00000.h5") as file:
        offsets = file["flac_bytes"].id.get_offset() + file["flac_offsets"][()]
    assert told == [(offsets[a], offsets[b] - offsets[a]) for a, b in ((1, 4), (7, 8))]
    packed.close()


def test_without_dali(made: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "fastat.data.dali_graph", raising=False)
    monkeypatch.delattr("fastat.data.dali_graph", raising=False)
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    packed = PackedSet.open(made["flac"])
    with pytest.raises(UserError, match="FLAC shards need NVIDIA DALI .*--codec pcm16"):
        read(packed, np.array([0]))
    pcm = PackedSet.open(made["pcm16"])
    assert read(pcm, np.array([0])).any()  # needs none
    packed.close()
    pcm.close()


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
