"""fastat pack --verify: one flipped bit anywhere in a set is found and named."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from numpy.typing import NDArray

from fastat.commands.pack_report import MAX_DAMAGES, print_verified
from fastat.data import verify as verify_module
from fastat.data.shards import ShardRows, write_index
from fastat.errors import Failure, UserError
from fastat.packing.pack import pack
from fastat.packing.verify import verify
from tests.data.audio import write_table


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 clips in four shards."""
    root = tmp_path_factory.mktemp("whole")
    pack(write_table(root, 40), root / "set", clip_seconds=0.5, workers=1, shard_bytes=250_000)
    return root / "set"


@pytest.fixture
def damaged(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "set"))


def flip(path: Path, offset: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1 << bit
    path.write_bytes(content)


def place(path: Path, dataset: str) -> tuple[int, int]:
    """Where a contiguous dataset lies in its file, and its bytes."""
    with h5py.File(path) as file:
        return file[dataset].id.get_offset(), file[dataset].nbytes


def test_a_whole_set(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = verify(whole)
    assert (summary.clips, summary.bytes, summary.damaged) == (40, 40 * 16_000, ())
    print_verified(summary, as_json=False)
    assert capsys.readouterr().out.startswith("verified: 40 clips")
    print_verified(summary, as_json=True)
    assert json.loads(capsys.readouterr().out)["clips"] == 40


@pytest.mark.parametrize("block_bytes", [1, 50_000, 8 << 20])
def test_flipped_bits_of_waveforms(
    damaged: Path, monkeypatch: pytest.MonkeyPatch, block_bytes: int
) -> None:
    """First and last byte of a row, first and last row, several shards."""
    monkeypatch.setattr(verify_module, "BLOCK_BYTES", block_bytes)
    last = len(h5py.File(damaged / "shard-00003.h5")["row_crc"]) - 1
    wanted = [(0, 0, 0), (0, 7, 15_999), (1, 3, 8_000), (3, last, 15_999)]
    for shard, row, byte in wanted:
        path = damaged / f"shard-{shard:05d}.h5"
        flip(path, place(path, "waveform")[0] + row * 16_000 + byte, bit=row % 8)
    summary = verify(damaged)
    assert [(d.file, d.row) for d in summary.damaged] == [
        (f"shard-{shard:05d}.h5", row) for shard, row, _ in wanted
    ]
    assert summary.clips == 40
    with h5py.File(damaged / "shard-00001.h5") as file:
        assert summary.damaged[2].clip == file["audio_name"][3].decode()


@pytest.mark.parametrize("dataset", ShardRows._fields[:-1])
def test_flipped_bits_of_the_rest(damaged: Path, dataset: str) -> None:
    path = damaged / "shard-00002.h5"
    start, size = place(path, dataset)
    flip(path, start + size // 2, bit=3)
    summary = verify(damaged)
    assert [(d.file, d.row) for d in summary.damaged] == [("shard-00002.h5", None)]
    assert "checksum of its labels and names differs" in summary.damaged[0].reason
    assert summary.clips == 40 - 11  # whose checksums may be what is damaged


@pytest.mark.parametrize(
    "word", ['"label_counts"', '"std": ', '"rows": ', '"crc32": ', '"id": "', '"clips": ', '"inp']
)
def test_flipped_bits_of_the_index(damaged: Path, word: str) -> None:
    text = (damaged / "dataset.json").read_bytes()
    for offset in (text.index(word.encode()) + 2, text.index(word.encode()) + len(word)):
        flip(damaged / "dataset.json", offset)
        summary = verify(damaged)
        assert [d.file for d in summary.damaged] == ["dataset.json"] and summary.clips == 0
        flip(damaged / "dataset.json", offset)
    assert verify(damaged).damaged == ()


def test_wrong_but_signed(damaged: Path) -> None:
    """What a program changed, checksum and all, still has to agree with the rows."""
    index = json.loads((damaged / "dataset.json").read_text())
    for change, reason in (
        ({"label_counts": [1, 2, 3]}, "label counts are not those of the rows"),
        ({"clips": 41}, "counts 41 clips, its shards 40"),
    ):
        write_index(damaged, index | change)
        assert [d.file for d in verify(damaged).damaged] == ["dataset.json"]
        assert reason in verify(damaged).damaged[0].reason


def test_lost_and_cut_shards_and_all_that_is_printed(
    damaged: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (damaged / "shard-00000.h5").unlink()
    with (damaged / "shard-00001.h5").open("r+b") as file:
        file.truncate(100_000)
    path = damaged / "shard-00002.h5"
    start, size = place(path, "waveform")
    with path.open("r+b") as file:
        file.seek(start)
        file.write(bytes(size))
    path = damaged / "shard-00003.h5"
    start, size = place(path, "waveform")
    with path.open("r+b") as file:
        file.seek(start)
        file.write(bytes(size))
    summary = verify(damaged)
    assert ["missing" in summary.damaged[0].reason, "expected" in summary.damaged[1].reason] == [
        True,
        True,
    ]
    count = len(summary.damaged) - 2
    assert count == summary.clips and not any(d.row is None for d in summary.damaged[2:])
    with pytest.raises(Failure, match=f"4 of its files, {count} rows"):
        print_verified(summary, as_json=True)
    found = json.loads(capsys.readouterr().out)["damaged"]
    assert len(found) == 2 + count and found[2]["row"] == 0 and found[2]["clip"].endswith(".wav")
    with pytest.raises(Failure):
        print_verified(summary, as_json=False)
    assert len(capsys.readouterr().out.splitlines()) == min(MAX_DAMAGES + 1, 2 + count)


def test_a_disk_that_does_not_give_a_row_back(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start, _ = place(whole / "shard-00001.h5", "waveform")
    bad = start + 5 * 16_000 + 4_096
    preadv: Callable[..., int] = os.preadv

    def sector(fd: int, buffers: list[memoryview], offset: int) -> int:
        name = Path(f"/proc/self/fd/{fd}").readlink().name
        if name == "shard-00001.h5" and offset <= bad < offset + len(buffers[0]):
            raise OSError(5, "Input/output error")
        return preadv(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", sector)
    assert [(d.file, d.row) for d in verify(whole).damaged] == [("shard-00001.h5", 5)]


def test_no_set(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected the folder of a packed set"):
        verify(tmp_path / "nowhere")
    with pytest.raises(UserError, match="found no dataset"):
        verify(tmp_path)
    (tmp_path / "dataset.json").write_text("{")
    (damage,) = verify(tmp_path).damaged
    assert damage.file == "dataset.json" and str(tmp_path) not in damage.reason


def test_rows_of_different_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    """FLAC rows have lengths of their own; a block may hold one or several."""
    monkeypatch.setattr(verify_module, "BLOCK_BYTES", 60)
    lengths = np.array([3, 0, 50, 7, 7, 1, 400, 2])
    starts: NDArray[np.int64] = np.concatenate([[100], 100 + np.cumsum(lengths)])
    blocks = list(verify_module._blocks(starts))
    assert np.concatenate(blocks).tolist() == list(range(8)) and len(blocks) > 2
