"""fastat pack --codec flac: any number of workers, killed and resumed, shards' sizes, the disk."""

import json
import os
import signal
from pathlib import Path

import h5py
import numpy as np
import pytest
import soundfile as sf
from numpy.typing import NDArray

from fastat.data.pack_parts import Part
from fastat.data.shards import PackedSet
from fastat.errors import Failure, UserError
from fastat.packing.append import append
from fastat.packing.pack import pack
from fastat.packing.verify import verify
from tests.data.audio import noise, reference, run_python, write_table
from tests.packing.test_pack import KILL_AT, content

SHARD_BYTES = 250_000
OPTIONS = {"clip_seconds": 0.5, "max_bad": 0.1, "shard_bytes": SHARD_BYTES, "codec": "flac"}
KILL_FLAC = KILL_AT.replace("clip_seconds=0.5", 'clip_seconds=0.5, codec="flac"')
assert KILL_FLAC != KILL_AT


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 files of 0.25 to 0.75 seconds; three of them bad."""
    path = write_table(tmp_path_factory.mktemp("table"), 60)
    audio = path.parent / "audio"
    (audio / "0010.wav").write_bytes(b"")
    (audio / "0025.flac").write_bytes(b"fLaC" + bytes(500))
    sf.write(audio / "0048.wav", np.full(8000, np.nan), 16_000, subtype="FLOAT")
    return path


@pytest.fixture(scope="module")
def undisturbed(table: Path) -> Path:
    """The table, packed by one worker at one go."""
    out = table.parent / "undisturbed"
    summary = pack(table, out, workers=1, **OPTIONS)  # type: ignore[arg-type]
    assert (summary.clips, summary.bad) == (57, 3)
    return out


def rows_of(packed: PackedSet) -> NDArray[np.int16]:
    out = np.empty((packed.num_clips, packed.clip_samples), np.int16)
    packed.read_rows(np.arange(packed.num_clips), out)
    packed.close()
    return out


def num_shards(directory: Path) -> int:
    return len(json.loads((directory / "dataset.json").read_text())["shards"])


def num_steps(directory: Path) -> int:
    """Durable steps of a pack: state.json 3; each shard 6; bad.csv 3; dataset.json 3."""
    return 3 + 6 * num_shards(directory) + 3 + 3


def test_shards_are_filled(undisturbed: Path) -> None:
    """Every shard but the last is as large as it may be: no further row is sure to fit."""
    assert num_shards(undisturbed) > 2
    sizes = [path.stat().st_size for path in sorted(undisturbed.glob("*.h5"))]
    assert all(SHARD_BYTES - 64_000 - 2 * 21_000 < size <= SHARD_BYTES for size in sizes[:-1])


@pytest.mark.parametrize("workers", [2, 3])
def test_the_same_for_any_number_of_workers(
    table: Path, undisturbed: Path, tmp_path: Path, workers: int
) -> None:
    pack(table, tmp_path / "set", workers=workers, **OPTIONS)  # type: ignore[arg-type]
    assert content(tmp_path / "set") == content(undisturbed)


def kill_and_resume(table: Path, out: Path, step: int, undisturbed: Path) -> int:
    """Kills a run at a step, finishes it; how many clips were kept."""
    done = run_python(KILL_FLAC, table, out, step)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (out / "dataset.json").exists()
    summary = pack(table, out, workers=2, **OPTIONS)  # type: ignore[arg-type]
    assert content(out) == content(undisturbed)
    return summary.resumed_clips


def test_killed_and_resumed(table: Path, undisturbed: Path, tmp_path: Path) -> None:
    """In the second shard, whose HDF5 is whole and not yet on the disk."""
    first = PackedSet.open(undisturbed)._shards[0].rows
    assert kill_and_resume(table, tmp_path / "set", 3 + 6 + 1, undisturbed) == first


@pytest.mark.full
def test_killed_at_every_second_step(table: Path, undisturbed: Path, tmp_path: Path) -> None:
    for step in range(1, num_steps(undisturbed), 2):
        kill_and_resume(table, tmp_path / str(step), step, undisturbed)


def test_another_codec_is_another_command(table: Path, undisturbed: Path) -> None:
    with pytest.raises(UserError, match="another command"):
        pack(table, undisturbed, **OPTIONS | {"codec": "pcm16"})  # type: ignore[arg-type]


def test_segments(tmp_path: Path) -> None:
    (tmp_path / "audio" / "x").mkdir(parents=True)
    path = tmp_path / "audio" / "x" / "a.wav"
    sf.write(path, noise(5.3, 22_050, 0), 22_050)
    pack(
        tmp_path / "audio", tmp_path / "set", clip_seconds=1.0, segments=True, workers=1,
        shard_bytes=150_000, codec="flac",
    )  # fmt: skip
    packed = PackedSet.open(tmp_path / "set")
    assert num_shards(tmp_path / "set") > 1
    assert packed.num_samples.tolist() == [16_000] * 5  # 0.3 s are dropped
    out = np.empty((5, 16_000), np.int16)
    packed.read_rows(np.arange(5), out)
    assert np.array_equal(out.ravel(), reference(path)[:80_000])
    packed.close()


def test_parts_make_the_same_rows(table: Path, undisturbed: Path, tmp_path: Path) -> None:
    for i in range(2):
        summary = pack(table, tmp_path / "set", part=Part(i, 2), workers=1, **OPTIONS)  # type: ignore[arg-type]
    assert summary.clips == 57
    whole, parts = PackedSet.open(undisturbed), PackedSet.open(tmp_path / "set")
    assert parts.codec == "flac"
    assert np.array_equal(rows_of(parts), rows_of(whole))


def test_appended_to_pcm_and_verified(table: Path, undisturbed: Path, tmp_path: Path) -> None:
    """Half of the table as PCM, then all of it as FLAC: a mixed set with the rows of one pack."""
    lines = table.read_text().splitlines()
    half = table.parent / "half.csv"
    half.write_text("\n".join(lines[:31]) + "\n")
    out = tmp_path / "set"
    pack(half, out, workers=1, **OPTIONS | {"codec": "pcm16"})  # type: ignore[arg-type]
    added = {name: OPTIONS[name] for name in ("max_bad", "shard_bytes")}
    summary = append(table, out, codec="flac", workers=1, **added)  # type: ignore[arg-type]
    assert (summary.clips, summary.appended_clips) == (57, 57 - 28)
    whole, mixed = PackedSet.open(undisturbed), PackedSet.open(out)
    assert mixed.codec == "mixed"
    assert [info.codec for info in mixed._shards] == sorted(
        (info.codec for info in mixed._shards), reverse=True
    )
    assert np.array_equal(rows_of(mixed), rows_of(whole))
    assert mixed.names(np.arange(57)) == whole.names(np.arange(57))
    found = verify(out)
    assert (found.clips, found.damaged) == (57, ())

    last = out / mixed._shards[-1].file
    with h5py.File(last) as file:
        offset = file["flac_bytes"].id.get_offset() + int(file["flac_offsets"][2])
        name = file["audio_name"][2].decode()
    with last.open("r+b") as raw:
        raw.seek(offset)
        raw.write(b"\0")
    assert [(d.file, d.row, d.clip) for d in verify(out).damaged] == [(last.name, 2, name)]


def test_the_disk_may_have_less_than_pcm_needs(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FLAC rows may be of any size; PCM's are known, for the files that --max-bad leaves sure."""
    sure = 60 - 0.1 * 60
    needed = sure * 2 * 8_000
    free = 0

    class Disk:
        f_frsize = 1

        @property
        def f_bavail(self) -> int:
            return free

    monkeypatch.setattr(os, "statvfs", lambda path: Disk())
    pack(table, tmp_path / "flac", workers=1, **OPTIONS)  # type: ignore[arg-type]
    free = int(needed) - 1
    with pytest.raises(Failure, match="GiB needed for 60 clips"):
        pack(table, tmp_path / "pcm", workers=1, **OPTIONS | {"codec": "pcm16"})  # type: ignore[arg-type]


def test_a_clip_that_might_not_fit(table: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--clip-seconds: a clip of .* is larger than a shard"):
        pack(table, tmp_path / "set", **OPTIONS | {"shard_bytes": 80_000})  # type: ignore[arg-type]
    assert not (tmp_path / "set").exists()
