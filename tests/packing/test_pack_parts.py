"""fastat pack --shard: parts make the set that one command makes, wherever they are killed."""

import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import soundfile as sf

from fastat.data.shards import PackedSet
from fastat.packing.pack import pack
from fastat.packing.plan import Part
from fastat.system.errors import Failure, UserError
from tests.data.audio import noise, write_table
from tests.data.kills import (
    at_step,
    files,
    in_the_middle,
    kill_between_blocks,
    killed_at,
)

OPTIONS: dict[str, Any] = {"clip_seconds": 0.5, "workers": 1, "max_bad": 0.1}


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """50 files, 13 blocks; 0010 (block 2) and 0033 (block 8) are bad, 0040 (block 10) missing."""
    path = write_table(tmp_path_factory.mktemp("table"), 50)
    audio = path.parent / "audio"
    (audio / "0010.wav").write_bytes(b"")
    (audio / "0033.flac").write_bytes(b"fLaC" + bytes(500))
    (audio / "0040.wav").unlink()
    return path


@pytest.fixture(scope="module")
def plain(table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("plain") / "set"
    assert pack(table, out, **OPTIONS).clips == 47
    return out


@pytest.fixture
def shards(plain: Path, tmp_path: Path) -> Path:
    """All shards, and no dataset.json: two hosts that missed each other's last shard leave it."""
    ignored = shutil.ignore_patterns("dataset.json", "bad.csv")
    return Path(shutil.copytree(plain, tmp_path / "shards", ignore=ignored))


def test_parts_in_any_order_make_the_plain_set(table: Path, plain: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"

    def run(index: int, count: int = 3) -> Any:
        return pack(table, out, part=Part(index, count), **OPTIONS)

    summary = run(2)
    assert (summary.part, summary.waiting_for, summary.shards) == ("2/3", (0, 1), 4)
    other, again = run(0), run(2)
    assert other.waiting_for == again.waiting_for == (1,)
    assert again.resumed_clips == again.clips == summary.clips
    with pytest.raises(UserError, match="packing did not finish"):
        PackedSet.open(out)
    assert run(3, 4).waiting_for == (0, 1, 2)  # 3, 7, 11 of 13
    last = run(1)
    assert (last.clips, last.bad, last.waiting_for, last.already_packed) == (47, 3, (), False)
    assert files(out) == files(plain)
    assert run(0).already_packed and run(5, 7).already_packed and run(1).clips == 47
    assert pack(table, out, **OPTIONS).already_packed
    assert files(out) == files(plain)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_holdout_and_segments(tmp_path: Path, order: tuple[int, int]) -> None:
    """Both sets in parts; also when the training set is whole before the eval set is."""
    source = tmp_path / "audio"
    for i in range(24):
        folder = source / "xyz"[i % 3]
        folder.mkdir(parents=True, exist_ok=True)
        sf.write(folder / f"{i}.wav", noise(1.3 + i / 20, 16_000, i), 16_000)
    options = OPTIONS | {"segments": True, "holdout": 0.3}
    pack(source, tmp_path / "plain", **options)
    for _ in range(2):
        for index in order:
            summary = pack(source, tmp_path / "set", part=Part(index, 2), **options)
        assert summary.waiting_for == () and summary.eval_directory == tmp_path / "set-eval"
        assert not summary.already_packed
        for name in ("", "-eval"):
            assert files(tmp_path / f"set{name}") == files(tmp_path / f"plain{name}")
        shutil.rmtree(tmp_path / "set-eval")


def test_more_parts_than_blocks_and_a_part_without_a_good_file(tmp_path: Path) -> None:
    (tmp_path / "audio" / "x").mkdir(parents=True)
    for i in range(8):
        sf.write(tmp_path / "audio" / "x" / f"{i}.wav", noise(0.5, 16_000, i), 16_000)
    for i in range(4):
        (tmp_path / "audio" / "x" / f"{i}.wav").write_text("no audio")
    options = OPTIONS | {"max_bad": 0.5}
    for index in range(5):
        summary = pack(tmp_path / "audio", tmp_path / "set", part=Part(index, 5), **options)
    assert (summary.clips, summary.shards, summary.bad) == (4, 2, 4)
    pack(tmp_path / "audio", tmp_path / "plain", **options)
    assert files(tmp_path / "set") == files(tmp_path / "plain")


def test_killed_at_every_step_behind_the_last_shard(
    table: Path, plain: Path, shards: Path, tmp_path: Path
) -> None:
    """Whichever part is run again ends it."""
    step, killed = 0, True
    while killed:
        step += 1
        out = Path(shutil.copytree(shards, tmp_path / str(step)))
        killed = killed_at(step, partial(pack, table, out, part=Part(0, 3), **OPTIONS))
        summary = pack(table, out, part=Part(step % 3, 3), **OPTIONS)
        assert (summary.clips, summary.resumed_clips) == (47, 47)
        assert files(out) == files(plain), step
    assert step > 6  # bad.csv 3, dataset.json 3


def test_a_part_that_was_killed_keeps_its_blocks(table: Path, plain: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    options = OPTIONS | {"workers": 2}
    kill_between_blocks(f"pack.pack(source, out, part=plan.Part(1, 3), **{options})", table, out)
    (out / ".shard-00001.h5.0123abcd.tmp").write_bytes(b"half a shard")
    summaries = [pack(table, out, part=Part(index, 3), **OPTIONS) for index in (1, 0, 2)]
    assert 0 < summaries[0].resumed_clips < summaries[0].clips
    assert files(out) == files(plain)


@pytest.mark.full
def test_parts_at_once(table: Path, tmp_path: Path) -> None:
    """In the environment of torchrun; however the processes end, one of them makes the set."""
    options = ("--clip-seconds", "0.5", "--max-bad", "0.1")
    run_ranks(1, "pack", str(table), "--out", str(tmp_path / "plain"), *options)
    for attempt in range(3):
        out = tmp_path / str(attempt)
        printed = run_ranks(3, "pack", str(table), "--out", str(out), *options)
        assert any(text.startswith("packed: 47 clips") for text in printed)
        assert files(out) == files(tmp_path / "plain")


def run_ranks(count: int, *arguments: str) -> list[str]:
    """What the processes of ``count`` ranks print, which run at once."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "fastat.cli", *arguments],
            env=os.environ | {"RANK": str(rank), "WORLD_SIZE": str(count)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    ended = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0] * count, ended
    return [out for out, _ in ended]


@pytest.mark.parametrize("step", range(1, 7))
def test_another_part_is_faster_behind_the_last_shard(
    table: Path, plain: Path, shards: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """Wherever this one is, the other makes the set and removes what is left over."""
    ran = []
    other = partial(pack, table, shards, part=Part(1, 2), **OPTIONS)
    at_step(step, lambda: ran.append(other()), monkeypatch.setattr)
    assert pack(table, shards, part=Part(0, 2), **OPTIONS).clips == 47
    assert ran[0].clips == 47 and files(shards) == files(plain)


def test_too_many_bad_files_are_judged_over_the_whole(
    table: Path, plain: Path, tmp_path: Path
) -> None:
    """Two of 50 may be bad. 0010 is of part 2 of 3, 0033 too, and the missing 0040 of part 1."""
    options = OPTIONS | {"max_bad": 0.05}
    out = tmp_path / "set"
    parts = [partial(pack, table, out, part=Part(index, 3), **options) for index in range(3)]
    assert (parts[0]().bad, parts[1]().bad) == (0, 1)
    with pytest.raises(UserError, match=r"3 of 50 files are bad.*--max-bad 0\.06") as caught:
        parts[2]()
    assert str(out / "bad.csv") in str(caught.value)
    assert (out / "bad.csv").read_bytes() == (plain / "bad.csv").read_bytes()
    assert not (out / "dataset.json").exists()
    assert pack(table, out, part=Part(1, 3), **OPTIONS).waiting_for in ((), (2,))

    with pytest.raises(UserError, match="1 of 50 files are bad"):  # by the table alone
        pack(table, tmp_path / "missing", part=Part(1, 3), **OPTIONS | {"max_bad": 0.0})
    assert os.listdir(tmp_path / "missing") == ["bad.csv"]


def test_too_many_bad_files_in_parts_at_once(table: Path, plain: Path, tmp_path: Path) -> None:
    """Parts of 13 see two bad files each, the missing one among them, and together three."""
    out = tmp_path / "set"
    options = OPTIONS | {"max_bad": 0.05}

    def others() -> None:
        for index in range(13):
            if index != 2:
                pack(table, out, part=Part(index, 13), **options)

    with in_the_middle(others), pytest.raises(UserError, match="3 of 50 files are bad"):
        pack(table, out, part=Part(2, 13), **options)
    assert (out / "bad.csv").read_bytes() == (plain / "bad.csv").read_bytes()
    assert not (out / "dataset.json").exists()
    assert pack(table, out, part=Part(5, 7), **OPTIONS).resumed_clips == 47
    assert files(out) == files(plain)


def test_disk_too_small_for_all_parts_is_known_before(
    table: Path, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A part alone would fit; what others have written needs no room any more."""
    free, real = 40 * 16_000, os.statvfs(tmp_path)

    class Small:
        f_bavail, f_frsize, f_blocks = free, 1, 1

    out = tmp_path / "set"
    monkeypatch.setattr(os, "statvfs", lambda path: Small)
    with pytest.raises(Failure, match="GiB needed for 50 clips, the disk has"):
        pack(table, out, part=Part(0, 3), **OPTIONS)
    monkeypatch.setattr(os, "statvfs", lambda path: real)
    pack(table, out, part=Part(0, 3), **OPTIONS)
    monkeypatch.setattr(os, "statvfs", lambda path: Small)
    for index in (1, 2):
        pack(table, out, part=Part(index, 3), **OPTIONS)
    assert files(out) == files(plain)


def test_other_commands_are_refused(table: Path, shards: Path) -> None:
    before = files(shards)
    for other in ({"clip_seconds": 0.4}, {"seed": 1}, {"codec": "flac"}):
        with pytest.raises(UserError, match="unfinished set of another command"):
            pack(table, shards, part=Part(1, 3), **OPTIONS | other)
    assert files(shards) == before


def test_which_part() -> None:
    assert Part.parse("0/8") == Part(0, 8) and str(Part(7, 8)) == "7/8"
    for text in ("8/8", "-1/8", "1", "1/", "a/b", "1/8/2", "0/0", "1/10001", " 1/8", "1\u0663/20"):
        with pytest.raises(UserError, match=r"--shard: expected i/n"):
            Part.parse(text)
    assert Part.from_environment({}) is None
    assert Part.from_environment({"RANK": "0", "WORLD_SIZE": "1"}) is None
    assert Part.from_environment({"SLURM_PROCID": "3", "RANK": "0"}) is None
    torchrun = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", "TORCHELASTIC_RUN_ID": "x"}
    assert Part.from_environment(torchrun) == Part(3, 8)
    with pytest.raises(UserError, match="expected RANK below WORLD_SIZE, got RANK=8"):
        Part.from_environment({"RANK": "8", "WORLD_SIZE": "8"})
