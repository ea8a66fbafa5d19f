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

from fastat.cli.pack_report import MAX_DAMAGES, print_verified
from fastat.data.shard_file import ShardRows
from fastat.data.shards import write_index
from fastat.packing import verify as verify_module
from fastat.packing.pack import pack
from fastat.packing.verify import verify
from fastat.system.errors import Failure, UserError
from tests.data.audio import write_table


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """32 clips in eight shards, and shards without a row at the start and the end."""
    return pack_codec(tmp_path_factory.mktemp("whole"), "pcm16")


def pack_codec(root: Path, codec: str) -> Path:
    table = write_table(root, 40)
    for path in [*root.glob("audio/000[0-3].*"), *root.glob("audio/003[6-9].*")]:
        path.write_bytes(b"")
    pack(table, root / "set", clip_seconds=0.5, codec=codec, workers=1, max_bad=0.2)
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
    assert (summary.clips, summary.bytes, summary.damaged) == (32, 32 * 16_000, ())
    print_verified(summary, as_json=False)
    assert capsys.readouterr().out.startswith("verified: 32 clips")
    print_verified(summary, as_json=True)
    assert json.loads(capsys.readouterr().out)["clips"] == 32


@pytest.mark.parametrize("block_bytes", [1, 50_000, 8 << 20])
def test_flipped_bits_of_waveforms(
    damaged: Path, monkeypatch: pytest.MonkeyPatch, block_bytes: int
) -> None:
    """First and last byte of a row, first and last row, several shards."""
    monkeypatch.setattr(verify_module, "BLOCK_BYTES", block_bytes)
    wanted = [(1, 0, 0), (1, 2, 15_999), (2, 1, 8_000), (8, 3, 15_999)]
    for shard, row, byte in wanted:
        path = damaged / f"shard-{shard:05d}.h5"
        flip(path, place(path, "waveform")[0] + row * 16_000 + byte, bit=row % 8)
    summary = verify(damaged)
    assert [(d.file, d.row) for d in summary.damaged] == [
        (f"shard-{shard:05d}.h5", row) for shard, row, _ in wanted
    ]
    assert summary.clips == 32
    with h5py.File(damaged / "shard-00002.h5") as file:
        assert summary.damaged[2].clip == file["audio_name"][1].decode()


@pytest.mark.parametrize("dataset", ShardRows._fields[:-1])
def test_flipped_bits_of_the_rest(damaged: Path, dataset: str) -> None:
    check_flipped(damaged, "shard-00002.h5", dataset, 32 - 4)


def check_flipped(directory: Path, shard: str, dataset: str, num_clips: int) -> None:
    """A flipped bit of ``dataset`` is damage of its shard, whose rows do not count as checked."""
    start, size = place(directory / shard, dataset)
    flip(directory / shard, start + size // 2, bit=3)
    summary = verify(directory)
    assert [(d.file, d.row, summary.clips) for d in summary.damaged] == [(shard, None, num_clips)]


def test_what_packing_says_of_a_shard_of_no_rows(damaged: Path) -> None:
    check_flipped(damaged, "shard-00000.h5", "block", 32)


def test_flac(tmp_path: Path) -> None:
    out = pack_codec(tmp_path, "flac")
    assert (verify(out).clips, verify(out).damaged) == (32, ())
    start, size = place(out / "shard-00008.h5", "flac_bytes")
    flip(out / "shard-00008.h5", start + size - 1)
    assert [(d.file, d.row) for d in verify(out).damaged] == [("shard-00008.h5", 3)]
    flip(out / "shard-00008.h5", start + size - 1)
    check_flipped(out, "shard-00003.h5", "flac_offsets", 32 - 4)


def test_a_set_without_audio(tmp_path: Path) -> None:
    out = pack_codec(tmp_path, "none")
    summary = verify(out)
    assert (summary.clips, summary.bytes, summary.damaged) == (32, 0, ())
    check_flipped(out, "shard-00003.h5", "row_crc", 32 - 4)
    (out / "shard-00009.h5").unlink()  # one of no rows
    assert [d.file for d in verify(out).damaged] == ["shard-00003.h5", "shard-00009.h5"]


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
        ({"clips": 33}, "counts 33 clips, its shards 32"),
    ):
        write_index(damaged, index | change)
        assert [d.file for d in verify(damaged).damaged] == ["dataset.json"]
        assert reason in verify(damaged).damaged[0].reason


def test_lost_and_cut_shards_and_all_that_is_printed(
    damaged: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (damaged / "shard-00001.h5").unlink()
    os.truncate(damaged / "shard-00002.h5", 50_000)
    for number in range(3, 9):
        path = damaged / f"shard-{number:05d}.h5"
        start, size = place(path, "waveform")
        with path.open("r+b") as file:
            file.seek(start)
            file.write(bytes(size))
    summary = verify(damaged)
    missing, short, *rows = summary.damaged
    assert "missing" in missing.reason and "expected" in short.reason
    count = len(rows)
    assert count == summary.clips == 24 and not any(d.row is None for d in rows)
    with pytest.raises(Failure, match=f"{count} rows, 8 files"):
        print_verified(summary, as_json=True)
    found = json.loads(capsys.readouterr().out)["damaged"]
    assert len(found) == 2 + count and found[2]["row"] == 0 and found[2]["clip"].endswith(".wav")
    with pytest.raises(Failure):
        print_verified(summary, as_json=False)
    assert len(capsys.readouterr().out.splitlines()) == min(MAX_DAMAGES + 1, 2 + count)


def test_a_disk_that_does_not_give_a_row_back(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start, _ = place(whole / "shard-00001.h5", "waveform")
    bad = start + 2 * 16_000 + 4_096
    preadv: Callable[..., int] = os.preadv

    def sector(fd: int, buffers: list[memoryview], offset: int) -> int:
        name = Path(f"/proc/self/fd/{fd}").readlink().name
        if name == "shard-00001.h5" and offset <= bad < offset + len(buffers[0]):
            raise OSError(5, "Input/output error")
        return preadv(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", sector)
    assert [(d.file, d.row) for d in verify(whole).damaged] == [("shard-00001.h5", 2)]


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
