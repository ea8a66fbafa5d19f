"""PackedSet: rows against h5py, and every kind of damage."""

import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from numpy.typing import NDArray

from fastat.data.row_reader import ROWS_PER_JOB
from fastat.data.shards import VERSION, PackedSet, write_index
from fastat.packing.pack import pack
from fastat.packing.verify import verify
from fastat.system.errors import Failure, UserError
from tests.data.audio import reference, write_table

SAMPLES = 8_000


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of 150 half-second clips in 16 shards."""
    folder = tmp_path_factory.mktemp("set")
    pack(write_table(folder, 150), folder / "set", clip_seconds=0.5, workers=2)
    return folder / "set"


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "set"))


def by_h5py(directory: Path) -> dict[str, NDArray[Any]]:
    """Every dataset over all shards, in order, by another reader."""
    parts: dict[str, list[NDArray[Any]]] = {}
    for path in sorted(directory.glob("shard-*.h5")):
        with h5py.File(path) as file:
            for name in file:
                parts.setdefault(name, []).append(file[name][()])
    width = max(a.dtype.itemsize for a in parts["audio_path"])
    for name in ("audio_path", "audio_name"):
        parts[name] = [a.astype(f"S{width}") for a in parts[name]]
    return {name: np.concatenate(arrays) for name, arrays in parts.items()}


def read(packed: PackedSet, rows: NDArray[np.int64]) -> NDArray[np.int16]:
    out = np.full((len(rows), packed.clip_samples), 12345, np.int16)
    packed.read_rows(rows, out)
    return out


def test_rows_equal_h5py(made: Path) -> None:
    packed, whole = PackedSet.open(made), by_h5py(made)
    assert (packed.num_clips, packed.clip_samples, packed.codec) == (150, SAMPLES, "pcm16")
    rng = np.random.default_rng(0)
    for rows in (
        np.arange(150),
        rng.integers(0, 150, 4 * ROWS_PER_JOB),  # repeats, threads
        np.array([149, 0, 66, 67, 65]),
        np.array([], np.int64),
    ):
        assert np.array_equal(read(packed, rows), whole["waveform"][rows])
    rows = rng.permutation(150)[:20]
    bits = np.unpackbits(whole["target"], axis=1, count=3)
    targets = packed.targets(rows)
    assert targets.dtype == np.float32 and np.array_equal(targets, bits[rows])
    assert np.array_equal(packed.num_samples, whole["num_samples"])
    assert np.array_equal(packed.label_counts, bits.sum(0))
    assert packed.names(rows) == [whole["audio_name"][row].decode() for row in rows]
    assert packed.sources(rows) == [(whole["audio_path"][row].decode(), 0.0) for row in rows]
    packed.close()
    assert np.array_equal(read(packed, rows), whole["waveform"][rows])  # opens again
    packed.close()


@pytest.mark.parametrize("codec", ["pcm16", "flac", "none"])
def test_shards_of_no_rows_and_sets_without_audio(tmp_path: Path, codec: str) -> None:
    """No file of the first, the last and two more of eight blocks is good."""
    table = write_table(tmp_path, 32)
    audio = tmp_path / "audio"
    good = [number for number in range(32) if number // 4 not in (0, 3, 4, 7)]
    names = sorted(path.name for path in audio.iterdir())
    for number in set(range(32)) - set(good):
        (audio / names[number]).write_bytes(b"")
    out = tmp_path / "set"
    assert pack(table, out, clip_seconds=0.5, codec=codec, workers=1, max_bad=0.5).shards == 8
    packed, rows = PackedSet.open(out), np.array([15, 0, 4, 3, 8, 7, 12, 11, 5])
    assert (packed.num_clips, packed.codec) == (16, codec)
    wanted = [names[good[row]] for row in rows]
    assert packed.names(rows) == wanted
    assert packed.sources(rows) == [(str(audio / name), 0.0) for name in wanted]
    labels = {line.split(",")[0]: line.split(",")[1] for line in table.read_text().splitlines()}
    for target, name in zip(packed.targets(rows), wanted, strict=True):
        assert [c.id for c, has in zip(packed.classes, target, strict=True) if has] == sorted(
            labels[name].split(";")
        )
    if codec == "none":
        with pytest.raises(UserError, match="--codec none") as caught:
            read(packed, rows)
        assert "\n" not in str(caught.value)
        return
    got = read(packed, rows)
    for clip, row, name in zip(got, rows, wanted, strict=True):
        expected = reference(audio / name, 0.5)
        assert packed.num_samples[row] == len(expected)
        assert np.array_equal(clip[: len(expected)], expected) and not clip[len(expected) :].any()


def test_threads_may_share_a_set(made: Path) -> None:
    packed, whole = PackedSet.open(made), by_h5py(made)
    wrong: list[int] = []

    def work(seed: int) -> None:
        for rows in np.random.default_rng(seed).integers(0, 150, (20, 40)):
            if not np.array_equal(read(packed, rows), whole["waveform"][rows]):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    packed.close()


def test_waveform_is_contiguous(made: Path) -> None:
    for path in made.glob("shard-*.h5"):
        with h5py.File(path) as file:
            assert file["waveform"].chunks is None
            assert file["waveform"].id.get_offset() is not None


def test_arguments(made: Path) -> None:
    packed = PackedSet.open(made)
    wrong: list[tuple[NDArray[Any], NDArray[Any]]] = [
        (np.array([150]), np.empty((1, SAMPLES), np.int16)),
        (np.array([-1]), np.empty((1, SAMPLES), np.int16)),
        (np.array([0]), np.empty((2, SAMPLES), np.int16)),
        (np.array([0]), np.empty((1, SAMPLES), np.float32)),
        (np.array([0, 1]), np.empty((4, SAMPLES), np.int16)[::2]),
    ]
    for rows, out in wrong:
        with pytest.raises(ValueError, match="expected"):
            packed.read_rows(rows, out)


def test_flipped_bit_in_a_row(copy: Path) -> None:
    shard = copy / "shard-00001.h5"
    with h5py.File(shard) as file:
        offset = file["waveform"].id.get_offset()
        name = file["audio_name"][7].decode()
    with h5py.File(copy / "shard-00000.h5") as file:
        first = len(file["row_crc"])
    with shard.open("r+b") as raw:
        raw.seek(offset + 7 * 2 * SAMPLES + 4321)
        byte = raw.read(1)[0]
        raw.seek(-1, os.SEEK_CUR)
        raw.write(bytes([byte ^ 4]))
    packed = PackedSet.open(copy)
    read(packed, np.delete(np.arange(150), first + 7))  # the others are whole
    for rows in (np.array([first + 7]), np.arange(150)):
        with pytest.raises(Failure, match=rf"shard-00001\.h5: row 7 \(clip {name}\) is damaged"):
            read(packed, rows)


def test_cut_short_after_opening(copy: Path) -> None:
    packed = PackedSet.open(copy)
    os.truncate(copy / "shard-00002.h5", 50_000)
    with pytest.raises(Failure, match=r"shard-00002\.h5: row \d+ \(clip .*\) is damaged"):
        read(packed, np.arange(150))


def edit(copy: Path, change: Callable[[h5py.File], None]) -> None:
    path = copy / "shard-00000.h5"
    size = path.stat().st_size
    with h5py.File(path, "r+") as file:
        change(file)
    if path.stat().st_size != size:  # only the size must not give it away
        index = json.loads((copy / "dataset.json").read_text())
        index["shards"][0]["bytes"] = path.stat().st_size
        write_index(copy, index)


def flip_label(file: h5py.File) -> None:
    file["target"][3] ^= 0x80


def change_crc(file: h5py.File) -> None:
    file["row_crc"][0] += 1


def change_block(file: h5py.File) -> None:
    """What packing says of the shard."""
    file["block"][9] ^= 1


def drop_block(file: h5py.File) -> None:
    del file["block"]


def drop_names(file: h5py.File) -> None:
    del file["audio_name"]


def chunk_waveform(file: h5py.File) -> None:
    data = file["waveform"][()]
    del file["waveform"]
    file.create_dataset("waveform", data=data, chunks=(1, SAMPLES))


@pytest.mark.parametrize(
    "change", [flip_label, change_crc, change_block, drop_block, drop_names, chunk_waveform]
)
def test_damage_outside_the_rows_shows_at_opening(
    copy: Path, change: Callable[[h5py.File], None]
) -> None:
    edit(copy, change)
    with pytest.raises(Failure, match=r"shard-00000\.h5: damaged") as caught:
        PackedSet.open(copy)
    assert "\n" not in str(caught.value)


def test_what_may_not_be_read_is_not_called_damaged(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*args: object, **options: object) -> None:
        raise PermissionError(13, "Unable to synchronously open file")

    monkeypatch.setattr(h5py, "File", refused)
    with pytest.raises(Failure, match=r"shard-00000\.h5: cannot be read: Permission denied"):
        PackedSet.open(copy)


def test_broken_files_show_at_opening(copy: Path) -> None:
    shard = copy / "shard-00001.h5"
    data = shard.read_bytes()
    shard.write_bytes(data[:-1])
    with pytest.raises(Failure, match="expected .* bytes, found"):
        PackedSet.open(copy)
    shard.write_bytes(bytes(1000) + data[1000:])
    with pytest.raises(Failure, match="damaged"):
        PackedSet.open(copy)
    shard.unlink()
    with pytest.raises(Failure, match="missing"):
        PackedSet.open(copy)


def test_not_a_packed_set(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="found none"):
        PackedSet.open(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="found no dataset.json"):
        PackedSet.open(tmp_path / "empty")
    (tmp_path / "empty" / "shard-00003.h5").touch()
    with pytest.raises(UserError, match="did not finish"):
        PackedSet.open(tmp_path / "empty")
    for text, message in (
        ("not json", "no JSON"),
        ('{"clips": 3}', "expected the index"),
        ('{"format": "fastat packed set", "version": 99}', f"version {VERSION}, got 99"),
    ):
        (copy / "dataset.json").write_text(text)
        with pytest.raises(UserError, match=message):
            PackedSet.open(copy)
    unsigned = {"format": "fastat packed set", "version": VERSION}
    (copy / "dataset.json").write_text(json.dumps(unsigned))
    with pytest.raises(Failure, match="dataset.json: damaged"):
        PackedSet.open(copy)


@pytest.mark.parametrize("rows", [-50, 10**18])
def test_an_impossible_number_of_rows_is_damage(copy: Path, rows: int) -> None:
    index = json.loads((copy / "dataset.json").read_text())
    index["clips"] += rows - index["shards"][0]["rows"]
    index["shards"][0]["rows"] = rows
    (copy / "dataset.json").write_text(json.dumps(index))
    with pytest.raises(Failure, match="damaged"):
        PackedSet.open(copy)


def test_a_key_of_another_version_is_no_damage(copy: Path) -> None:
    index = json.loads((copy / "dataset.json").read_text())
    index["shards"][1]["warp"] = 9
    write_index(copy, index)
    for opens in (PackedSet.open, verify):
        with pytest.raises(Failure, match=r"dataset\.json.*'warp'.*another version") as raised:
            opens(copy)
        assert "damaged" not in str(raised.value)


def test_fingerprint_is_of_the_content(made: Path, copy: Path, tmp_path: Path) -> None:
    assert PackedSet.open(copy).fingerprint == PackedSet.open(made).fingerprint
    other = write_table(tmp_path / "other", 20)
    pack(other, tmp_path / "other" / "set", clip_seconds=0.5, workers=1)
    assert (
        PackedSet.open(tmp_path / "other" / "set").fingerprint != PackedSet.open(made).fingerprint
    )


def read_as_other_numbers(file: h5py.File) -> None:
    """The same bytes: only their order is another."""
    data = file["num_samples"][()]
    del file["num_samples"]
    file.create_dataset("num_samples", data=data.view(">i4"))


def group_for_names(file: h5py.File) -> None:
    del file["audio_name"]
    file.create_group("audio_name")


def array_larger_than_the_file(file: h5py.File) -> None:
    del file["audio_path"]
    file.create_dataset("audio_path", (file["row_crc"].size, 10**9), dtype="S8", chunks=True)


@pytest.mark.parametrize(
    "change", [read_as_other_numbers, group_for_names, array_larger_than_the_file]
)
def test_headers_of_the_small_arrays_are_not_believed(
    copy: Path, change: Callable[[h5py.File], None]
) -> None:
    edit(copy, change)
    with pytest.raises(Failure, match=r"shard-00000\.h5: damaged"):
        PackedSet.open(copy)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("label_counts", [1, 2, 3]),
        ("label_counts", ["", 2, 3]),
        ("label_counts", [10**400, 2, 3]),
        ("stats", {"logmel64": {"mean": 0.0, "std": 1.0, "clips": 10}}),
        ("clips", 10**18),
        ("clip_samples", 10**18),
        ("shards", [{"file": "x" * 5000, "rows": 1, "bytes": 1, "crc32": 1}]),
        ("shards", [{"file": "shard-00000.h5", "rows": 1, "bytes": "1", "crc32": 1}]),
    ],
)
def test_another_value_in_dataset_json(copy: Path, key: str, value: object) -> None:
    index = json.loads((copy / "dataset.json").read_text())
    (copy / "dataset.json").write_text(json.dumps(index | {key: value}))
    with pytest.raises(Failure, match="damaged"):
        PackedSet.open(copy)


@pytest.mark.parametrize("text", ["[" * 100_000, "9" * 10_000])
def test_json_that_python_does_not_read(copy: Path, text: str) -> None:
    (copy / "dataset.json").write_text(text)
    with pytest.raises(UserError, match="dataset.json: .* got no JSON"):
        PackedSet.open(copy)
