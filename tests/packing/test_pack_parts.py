"""fastat pack --shard: parts make the set that one command makes, wherever they are killed."""

import json
import os
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile as sf

from fastat.data import pack_parts
from fastat.data.pack_parts import Part
from fastat.data.shards import PackedSet
from fastat.errors import Failure, UserError
from fastat.features import FEATURES
from fastat.packing.pack import PackSummary, pack
from tests.data.audio import noise, run_python, write_table
from tests.data.kills import killed_at

SHARD_BYTES = 250_000  # 11 clips of half a second
OPTIONS: dict[str, Any] = {
    "clip_seconds": 0.5,
    "workers": 1,
    "max_bad": 0.1,
    "shard_bytes": SHARD_BYTES,
}


def same_rows(one: Path, other: Path) -> None:
    """The same clips in the same order, whatever shards they are in."""
    a, b = PackedSet.open(one), PackedSet.open(other)
    assert (a.num_clips, a.classes) == (b.num_clips, b.classes)
    every = np.arange(a.num_clips)
    rows = np.empty((2, a.num_clips, a.clip_samples), np.int16)
    a.read_rows(every, rows[0])
    b.read_rows(every, rows[1])
    assert np.array_equal(rows[0], rows[1])
    assert a.sources(every) == b.sources(every) and a.names(every) == b.names(every)
    assert np.array_equal(a.target_bits, b.target_bits)
    assert np.array_equal(a.num_samples, b.num_samples)
    assert np.array_equal(a.label_counts, b.label_counts)
    for name in FEATURES:
        assert a.stats[name] == pytest.approx(b.stats[name], rel=1e-12)


def files(directory: Path) -> dict[str, bytes]:
    """Every file of a set; no folder is left in it."""
    return {p.name: p.read_bytes() for p in sorted(directory.iterdir())}


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """50 files of 0.25 to 0.75 seconds, two of them bad and one missing."""
    path = write_table(tmp_path_factory.mktemp("table"), 50)
    audio = path.parent / "audio"
    (audio / "0010.wav").write_bytes(b"")
    (audio / "0033.flac").write_bytes(b"fLaC" + bytes(500))
    (audio / "0040.wav").unlink()
    return path


@pytest.fixture(scope="module")
def plain(table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("plain") / "set"
    pack(table, out, **OPTIONS)
    return out


@pytest.fixture(scope="module")
def unmerged(table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All three parts packed, the last killed before it made the set of them."""
    out = tmp_path_factory.mktemp("unmerged") / "set"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pack_parts, "_merge", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        for index in range(2):
            pack(table, out, part=Part(index, 3), **OPTIONS)
        with pytest.raises(KeyboardInterrupt):
            pack(table, out, part=Part(2, 3), **OPTIONS)
    return out


def test_parts_in_any_order_make_the_plain_set(table: Path, plain: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"

    def run(index: int) -> PackSummary:
        return pack(table, out, part=Part(index, 3), **OPTIONS)

    summary = run(2)
    assert (summary.part, summary.waiting_for, summary.clips) == ("2/3", (0, 1), 16)
    assert run(0).waiting_for == (1,)
    again = run(2)
    assert (again.waiting_for, again.resumed_clips) == ((1,), 16)
    with pytest.raises(UserError, match="packing did not finish"):
        PackedSet.open(out)
    last = run(1)
    assert (last.clips, last.bad, last.waiting_for, last.already_packed) == (47, 3, (), False)
    same_rows(out, plain)
    assert (out / "bad.csv").read_bytes() == (plain / "bad.csv").read_bytes()
    names = {"bad.csv", "dataset.json", *(f"shard-{i:05d}.h5" for i in range(6))}
    assert set(files(out)) == names
    one, other = (json.loads((d / "dataset.json").read_text()) for d in (out, plain))
    for key in ("inputs", "bad_files", "options"):
        assert one[key] == other[key]
    before = files(out)
    assert run(0).already_packed and run(1).clips == 47
    assert pack(table, out, **OPTIONS).already_packed
    assert pack(table, plain, part=Part(5, 7), **OPTIONS).already_packed
    assert files(out) == before


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_holdout_and_segments(tmp_path: Path, order: tuple[int, int]) -> None:
    """Both sets in parts; a train set that is whole before the eval set is."""
    source = tmp_path / "audio"
    for i in range(12):
        folder = source / "xyz"[i % 3]
        folder.mkdir(parents=True, exist_ok=True)
        sf.write(folder / f"{i}.wav", noise(1.3 + i / 10, 16_000, i), 16_000)
    options = OPTIONS | {"segments": True, "holdout": 0.3}
    pack(source, tmp_path / "plain", **options)
    for index in order:
        summary = pack(source, tmp_path / "set", part=Part(index, 2), **options)
    assert summary.waiting_for == () and summary.eval_directory == tmp_path / "set-eval"
    for name in ("", "-eval"):
        same_rows(tmp_path / f"set{name}", tmp_path / f"plain{name}")
    shutil.rmtree(tmp_path / "set-eval")
    for index in order:
        summary = pack(source, tmp_path / "set", part=Part(index, 2), **options)
    assert summary.waiting_for == () and not summary.already_packed
    same_rows(tmp_path / "set-eval", tmp_path / "plain-eval")


def test_more_parts_than_files_and_a_part_without_a_good_one(tmp_path: Path) -> None:
    (tmp_path / "audio" / "x").mkdir(parents=True)
    for i in range(3):
        sf.write(tmp_path / "audio" / "x" / f"{i}.wav", noise(0.5, 16_000, i), 16_000)
    (tmp_path / "audio" / "x" / "1.wav").write_text("no audio")
    options = OPTIONS | {"max_bad": 0.5}
    for index in range(5):
        summary = pack(tmp_path / "audio", tmp_path / "set", part=Part(index, 5), **options)
    assert (summary.clips, summary.shards, summary.bad) == (2, 2, 1)
    pack(tmp_path / "audio", tmp_path / "plain", **options)
    same_rows(tmp_path / "set", tmp_path / "plain")


def test_merge_killed_at_every_step(
    table: Path, plain: Path, unmerged: Path, tmp_path: Path
) -> None:
    whole: dict[str, bytes] | None = None
    step = 0
    while True:
        step += 1
        out = Path(shutil.copytree(unmerged, tmp_path / str(step)))
        killed = killed_at(step, partial(pack, table, out, part=Part(0, 3), **OPTIONS))
        pack(table, out, part=Part(step % 3, 3), **OPTIONS)
        whole = whole or files(out)
        assert files(out) == whole, step
        if not killed:
            break
    same_rows(out, plain)
    assert step > 10  # bad.csv 3, six shards, the folder, dataset.json 3, the state


PART = """
import os, signal, sys
from pathlib import Path
left = int(sys.argv[4])
def counted(call):
    def wrapper(*args, **kwargs):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*args, **kwargs)
    return wrapper
os.replace, os.fsync = counted(os.replace), counted(os.fsync)
from fastat.packing.pack import pack
from fastat.data.pack_parts import Part
options = dict(clip_seconds=0.5, workers=2, max_bad=0.1, shard_bytes=250_000)
pack(Path(sys.argv[1]), Path(sys.argv[2]), part=Part.parse(sys.argv[3]), **options)
"""
# Steps of a part: the set's state 3, its own 3; each of two shards 6; its note 3.
PART_STEPS = 3 + 3 + 2 * 6 + 3


def kill_a_part(table: Path, out: Path, step: int) -> int:
    """Kills part 1 of 3 at a step; the set of all parts in ``out``; how many clips were kept."""
    done = run_python(PART, table, out, "1/3", step)
    assert done.returncode == -signal.SIGKILL, done.stderr
    summaries = [pack(table, out, part=Part(index, 3), **OPTIONS) for index in (0, 1, 2)]
    assert summaries[-1].waiting_for == ()
    return summaries[1].resumed_clips


def test_a_part_killed_goes_on(table: Path, plain: Path, unmerged: Path, tmp_path: Path) -> None:
    kept = kill_a_part(table, tmp_path / "set", 3 + 3 + 6 + 4)
    assert 0 < kept < 15
    same_rows(tmp_path / "set", plain)


@pytest.mark.full
@pytest.mark.parametrize("step", range(1, PART_STEPS + 1))
def test_a_part_killed_at_every_step(table: Path, plain: Path, tmp_path: Path, step: int) -> None:
    kill_a_part(table, tmp_path / "set", step)
    same_rows(tmp_path / "set", plain)


@pytest.mark.full
def test_parts_at_once(table: Path, plain: Path, tmp_path: Path) -> None:
    """Three processes of torchrun's environment; however they end, one of them makes the set."""
    for attempt in range(3):
        out = tmp_path / str(attempt)
        arguments = ("pack", table, "--out", out, "--clip-seconds", "0.5", "--max-bad", "0.1")
        command = [sys.executable, "-m", "fastat.cli", *map(str, arguments)]
        processes = [
            subprocess.Popen(
                command,
                env=os.environ | {"RANK": str(rank), "WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "3"},
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
            for rank in range(3)
        ]
        printed = [process.communicate(timeout=120)[0] for process in processes]
        assert [process.returncode for process in processes] == [0, 0, 0]
        assert any(text.startswith("packed: 47 clips") for text in printed)
        same_rows(out, plain)


def test_too_many_bad_files_are_judged_over_the_whole(table: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    options = OPTIONS | {"max_bad": 0.05}  # 2.5 of 50 files; 0010 and the missing 0040, then 0033
    assert pack(table, out, part=Part(0, 3), **options).bad == 2
    # The part alone has one and knows of the missing one.
    assert pack(table, out, part=Part(1, 3), **options).bad == 2 - 1
    with pytest.raises(
        UserError, match=r"3 of 50 files are bad.*--max-bad 0\.06 or more"
    ) as caught:
        pack(table, out, part=Part(2, 3), **options)
    assert str(out / "bad.csv") in str(caught.value)
    assert len((out / "bad.csv").read_text().splitlines()) == 1 + 3
    assert pack(table, out, part=Part(1, 3), **OPTIONS).clips == 47

    # Nothing is claimed when the table alone says enough, and a part stops at its own share.
    with pytest.raises(UserError, match="1 of 50 files are bad"):
        pack(table, tmp_path / "missing", part=Part(1, 3), **OPTIONS | {"max_bad": 0.0})
    assert os.listdir(tmp_path / "missing") == ["bad.csv"]
    with pytest.raises(UserError, match="2 of 50 files are bad"):
        pack(table, tmp_path / "own", part=Part(0, 3), **OPTIONS | {"max_bad": 0.03})


def test_disk_too_small_for_all_parts_is_known_before(
    table: Path, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A part alone would fit; what peers have written needs no room any more."""
    clip_bytes, free, real = 2 * 8_000, 40 * 16_000, os.statvfs(tmp_path)
    assert 17 * clip_bytes < free < (49 - 0.1 * 50) * clip_bytes

    class Small:
        f_bavail, f_frsize = free, 1

    out = tmp_path / "set"
    monkeypatch.setattr(os, "statvfs", lambda path: Small)
    with pytest.raises(Failure, match=r"GiB needed for 49 clips, the disk has"):
        pack(table, out, part=Part(0, 3), **OPTIONS)
    monkeypatch.setattr(os, "statvfs", lambda path: real)
    pack(table, out, part=Part(0, 3), **OPTIONS)
    monkeypatch.setattr(os, "statvfs", lambda path: Small)
    for index in (1, 2):
        pack(table, out, part=Part(index, 3), **OPTIONS)
    same_rows(out, plain)


def test_other_commands_are_refused(table: Path, unmerged: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(unmerged, tmp_path / "set"))
    for options, part, message in (
        ({}, Part(1, 4), r"in 3 parts \(--shard 0/3, \.\.\.\)"),
        ({}, None, "in 3 parts"),
        ({"clip_seconds": 0.4}, Part(1, 3), "unfinished set of another command"),
        ({"seed": 1}, Part(1, 3), "unfinished set of another command"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            pack(table, out, part=part, **OPTIONS | options)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="another fastat pack is writing"):
        _pack_twice(table, tmp_path / "other")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    with pytest.raises(UserError, match=r"found thesis\.tex"):
        pack(table, tmp_path / "mine", part=Part(0, 3), **OPTIONS)
    assert os.listdir(tmp_path / "mine") == ["thesis.tex"]


def _pack_twice(table: Path, out: Path) -> None:
    """The same part, while it is packed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            pack_parts,
            "pack_rows",
            lambda *args: pack(table, out, part=Part(0, 3), **OPTIONS),
        )
        pack(table, out, part=Part(0, 3), **OPTIONS)


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
