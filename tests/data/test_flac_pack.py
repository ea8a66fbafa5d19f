"""fastat pack --codec flac: any number of workers, other commands, segments, append, verify."""

from pathlib import Path

import h5py
import numpy as np
import pytest
import soundfile as sf
from numpy.typing import NDArray

from fastat.data.shards import PackedSet
from fastat.packing.append import append
from fastat.packing.pack import pack
from fastat.packing.verify import verify
from fastat.system.errors import UserError
from tests.data.audio import noise, reference, write_table
from tests.data.test_flac import flip


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
def packed_set(table: Path) -> Path:
    """The table, packed by one worker."""
    out = table.parent / "set"
    summary = pack(table, out, codec="flac", clip_seconds=0.5, max_bad=0.1, workers=1)
    assert (summary.clips, summary.bad) == (57, 3)
    return out


def rows_of(directory: Path) -> NDArray[np.int16]:
    packed = PackedSet.open(directory)
    out = np.empty((packed.num_clips, packed.clip_samples), np.int16)
    packed.read_rows(np.arange(packed.num_clips), out)
    packed.close()
    return out


def test_the_same_for_any_number_of_workers(table: Path, packed_set: Path, tmp_path: Path) -> None:
    pack(table, tmp_path / "set", codec="flac", clip_seconds=0.5, max_bad=0.1, workers=3)
    for path in packed_set.iterdir():
        assert (tmp_path / "set" / path.name).read_bytes() == path.read_bytes(), path.name


def test_another_codec_is_another_command(table: Path, packed_set: Path) -> None:
    with pytest.raises(UserError, match="another command"):
        pack(table, packed_set, codec="pcm16", clip_seconds=0.5, max_bad=0.1, workers=1)


def test_segments(tmp_path: Path) -> None:
    (tmp_path / "audio" / "x").mkdir(parents=True)
    path = tmp_path / "audio" / "x" / "a.wav"
    sf.write(path, noise(5.3, 22_050, 0), 22_050)
    out = tmp_path / "set"
    pack(tmp_path / "audio", out, clip_seconds=1.0, segments=True, workers=1, codec="flac")
    rows = rows_of(out)
    assert rows.shape == (5, 16_000)  # 0.3 s are dropped
    assert np.array_equal(rows.ravel(), reference(path)[:80_000])


def test_appended_to_pcm(table: Path, packed_set: Path, tmp_path: Path) -> None:
    """Half of the table as PCM, then all of it as FLAC: a mixed set with the rows of one pack."""
    half = table.parent / "half.csv"
    half.write_text("".join(table.read_text().splitlines(keepends=True)[:31]))
    out = tmp_path / "set"
    pack(half, out, codec="pcm16", clip_seconds=0.5, max_bad=0.1, workers=1)
    summary = append(table, out, codec="flac", max_bad=0.1, workers=1)
    assert (summary.clips, summary.appended_clips) == (57, 57 - 28)
    want = rows_of(packed_set)
    assert np.array_equal(rows_of(out), want)
    packed, whole = PackedSet.open(out), PackedSet.open(packed_set)
    assert packed.codec == "mixed"
    assert packed.names(np.arange(57)) == whole.names(np.arange(57))
    assert (verify(out).clips, verify(out).damaged) == (57, ())

    damaged = {5: "waveform", 50: "flac_bytes"}
    for row, dataset in damaged.items():
        path, place = packed.place(row)
        with h5py.File(path) as file:
            start = file["flac_offsets"][place] if dataset == "flac_bytes" else 16_000 * place
            offset = file[dataset].id.get_offset() + int(start)
        flip(path, offset + 60)
    rows = np.random.default_rng(0).integers(0, 57, 100)
    out_rows = np.empty((100, packed.clip_samples), np.int16)
    bad = packed.read(rows, out_rows)
    assert set(bad) == set(np.flatnonzero(np.isin(rows, list(damaged))).tolist())
    good = [place for place in range(100) if place not in bad]
    assert np.array_equal(out_rows[good], want[rows[good]])
    names = packed.names(np.array(list(damaged)))
    assert [damage.clip for damage in verify(out).damaged] == names
    packed.close()
    whole.close()
