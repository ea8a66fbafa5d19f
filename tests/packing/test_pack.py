"""fastat pack: rows as an independent reader has them, bad files, holdout, what goes wrong."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile as sf
import torch
from numpy.typing import NDArray

from fastat.audio.features import FEATURES
from fastat.audio.frontend import Frontend
from fastat.data.shards import PackedSet, Stats
from fastat.packing import options as pack_options
from fastat.packing import plan
from fastat.packing.pack import pack
from fastat.packing.summary import PackSummary
from fastat.packing.verify import verify
from fastat.system.errors import Failure, UserError
from tests.data.audio import noise, reference, write_table


def all_rows(packed: PackedSet) -> NDArray[np.int16]:
    out = np.empty((packed.num_clips, packed.clip_samples), np.int16)
    packed.read_rows(np.arange(packed.num_clips), out)
    return out


def check_rows(directory: Path, seconds: float) -> PackedSet:
    """Every row is its file's audio; returns the open set."""
    packed = PackedSet.open(directory)
    sources = packed.sources(np.arange(packed.num_clips))
    for row, (path, start), count in zip(
        all_rows(packed), sources, packed.num_samples, strict=True
    ):
        expected = reference(Path(path), seconds)
        assert start == 0.0 and Path(path).is_absolute() and count == len(expected)
        assert np.array_equal(row[:count], expected), path
        assert not row[count:].any()
    return packed


def bad_lines(directory: Path) -> list[dict[str, str]]:
    with (directory / "bad.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def content(directory: Path) -> dict[str, bytes]:
    """Every file of a set."""
    return {p.name: p.read_bytes() for p in sorted(directory.iterdir())}


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """90 files of 0.25 to 0.75 seconds; four of them bad."""
    path = write_table(tmp_path_factory.mktemp("table"), 90)
    audio = path.parent / "audio"
    (audio / "0010.wav").write_bytes(b"")
    (audio / "0044.wav").write_bytes((audio / "0044.wav").read_bytes()[:3000])
    (audio / "0045.flac").write_bytes(b"fLaC" + bytes(500))
    sf.write(audio / "0088.wav", np.full(8000, np.nan), 16_000, subtype="FLOAT")
    return path


@pytest.fixture(scope="module")
def undisturbed(table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The table, packed by one worker at one go."""
    out = tmp_path_factory.mktemp("undisturbed") / "set"
    summary = pack(table, out, clip_seconds=0.5, workers=1, max_bad=0.1)
    assert (summary.clips, summary.bad, summary.shards) == (86, 4, 16)
    assert not summary.already_packed and summary.resumed_clips == 0
    return out


def test_rows_equal_soundfile_and_soxr(table: Path, undisturbed: Path) -> None:
    packed = check_rows(undisturbed, 0.5)
    good = [i for i in range(90) if i not in (10, 44, 45, 88)]
    assert packed.names(np.arange(86)) == [f"{i:04d}.{'flac' if i % 2 else 'wav'}" for i in good]
    labels = {r["path"]: r["labels"] for r in csv.DictReader(table.open())}
    ids = np.array([c.id for c in packed.classes])
    for i, target in zip(good, packed.targets(np.arange(86)), strict=True):
        name = f"{i:04d}.{'flac' if i % 2 else 'wav'}"
        assert ids[target > 0].tolist() == sorted(labels[name].split(";"))


def test_bad_files_have_reasons(undisturbed: Path) -> None:
    lines = bad_lines(undisturbed)
    assert [(Path(b["path"]).name, b["reason"], b["line"]) for b in lines] == [
        ("0010.wav", "empty", "12"),
        ("0044.wav", "truncated", "46"),
        ("0045.flac", "unreadable", "47"),
        ("0088.wav", "non-finite", "90"),
    ]
    assert lines[0]["labels"] == "b;c"
    assert json.loads((undisturbed / "dataset.json").read_text())["bad_files"] == 4


def test_statistics_are_those_of_the_features(undisturbed: Path) -> None:
    packed = PackedSet.open(undisturbed)
    rows = torch.from_numpy(all_rows(packed))
    for name, feature in FEATURES.items():
        frontend = Frontend(name, clip_samples=8_000, normalize=False)
        values = []
        for row, count in zip(rows, packed.num_samples.tolist(), strict=True):
            wave = row[None].float() / 32768
            wave[:, :count] -= wave[:, :count].mean()
            real = feature.real_frames(count, 8_000)
            values.append(frontend.log_mel(wave)[0, :real].double().flatten())
        every = torch.cat(values)
        stats = packed.stats[name]
        assert stats.num_clips == 86
        assert stats.mean == pytest.approx(float(every.mean()), abs=1e-4)
        assert stats.std == pytest.approx(float(every.std(correction=0)), abs=1e-4)


def test_statistics_of_a_sample(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pack_options, "STATS_CLIPS", 20)
    found: list[dict[str, Stats]] = []
    for seed in (0, 0, 1):
        out = tmp_path / f"{len(found)}"
        pack(table, out, clip_seconds=0.5, workers=2, max_bad=0.1, seed=seed)
        found.append(PackedSet.open(out).stats)
    assert found[0] == found[1] != found[2]
    assert 16 <= found[0]["logmel64"].num_clips <= 20  # bad files in the sample are not replaced


@pytest.mark.parametrize("workers", [2, 3])
def test_the_same_for_any_number_of_workers(
    table: Path, undisturbed: Path, tmp_path: Path, workers: int
) -> None:
    out = tmp_path / "set"
    pack(table, out, clip_seconds=0.5, workers=workers, max_bad=0.1)
    assert content(out) == content(undisturbed)


def test_again_is_done_at_once_and_another_command_is_refused(
    table: Path, undisturbed: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(undisturbed, tmp_path / "set"))
    again = pack(table, out, clip_seconds=0.5, workers=2, max_bad=0.2)
    assert again.already_packed and (again.clips, again.bad, again.resumed_clips) == (86, 4, 86)
    before = content(out)
    with pytest.raises(UserError, match="another command"):
        pack(table, out, clip_seconds=0.4, max_bad=0.1)
    with pytest.raises(UserError, match="another command"):
        pack(table, out, clip_seconds=0.5, seed=1, max_bad=0.1)
    assert content(out) == before


def start_faulty(table: Path, out: Path, point: str, fault: str) -> subprocess.Popen[str]:
    """``pack`` in a process group of its own, with a fault of ``faulty_pack``."""
    return subprocess.Popen(
        [sys.executable, Path(__file__).with_name("faulty_pack.py"), table, out, point, fault],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        start_new_session=True,
    )


def run_faulty(table: Path, out: Path, point: str, fault: str) -> tuple[int, str]:
    """The exit code and what is on standard error."""
    process = start_faulty(table, out, point, fault)
    _, stderr = process.communicate(timeout=120)
    return process.returncode, stderr


def resume(table: Path, out: Path, undisturbed: Path) -> int:
    """Runs the command again; how many clips were kept."""
    with pytest.raises(UserError, match="did not finish"):
        PackedSet.open(out)
    summary = pack(table, out, clip_seconds=0.5, workers=2, max_bad=0.1)
    assert (summary.clips, summary.bad) == (86, 4)
    assert content(out) == content(undisturbed)
    return summary.resumed_clips


@pytest.mark.parametrize(
    ("point", "kept"),
    [
        ("decode 0030.wav", 27),  # in block 5, which begins with file 28
        ("before shard-00005.h5", 27),
        ("after shard-00005.h5", 32),
        ("before dataset.json", 86),
    ],
)
def test_killed_and_resumed(
    table: Path, undisturbed: Path, tmp_path: Path, point: str, kept: int
) -> None:
    """As by a power cut, at once with all its processes."""
    code, stderr = run_faulty(table, tmp_path / "set", point, "kill all")
    assert code == -signal.SIGKILL, stderr
    assert resume(table, tmp_path / "set", undisturbed) == kept


def test_a_killed_command_leaves_no_process(table: Path, undisturbed: Path, tmp_path: Path) -> None:
    """Its processes end when they have finished their blocks."""
    process = start_faulty(table, tmp_path / "set", "decode 0030.wav", "kill command")
    assert process.wait(timeout=120) == -signal.SIGKILL
    deadline = time.monotonic() + 60
    with pytest.raises(ProcessLookupError):
        while time.monotonic() < deadline:
            os.killpg(process.pid, 0)
            time.sleep(0.05)
    assert resume(table, tmp_path / "set", undisturbed) == 32


def test_interrupted_leaves_nothing_half_written(
    table: Path, undisturbed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "set"
    code, stderr = run_faulty(table, out, "before shard-00005.h5", "interrupt")
    assert code != 0 and "KeyboardInterrupt" in stderr
    assert sorted(os.listdir(out)) == [f"shard-{k:05d}.h5" for k in range(5)]
    assert resume(table, out, undisturbed) == 27


def test_a_file_that_ends_its_process_is_bad(table: Path, tmp_path: Path) -> None:
    code, stderr = run_faulty(table, tmp_path / "set", "decode 0030.wav", "crash")
    assert code == 0, stderr
    (bad,) = (b for b in bad_lines(tmp_path / "set") if b["path"].endswith("0030.wav"))
    assert bad["reason"] == "unreadable" and "SIGSEGV" in bad["detail"]
    names = PackedSet.open(tmp_path / "set").names(np.arange(85))
    assert {"0029.flac", "0031.flac"} < set(names) and "0030.wav" not in names


def test_a_process_that_ends_without_such_a_file(
    table: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """As for lack of memory: one line, and what is finished stays."""
    out = tmp_path / "set"
    code, stderr = run_faulty(table, out, "before shard-00005.h5", "crash")
    message = stderr.splitlines()[-1]
    assert code == 1 and message.startswith("Failure: ")
    assert "shard-00005.h5" in message and "SIGSEGV" in message
    assert resume(table, out, undisturbed) == 27


def test_the_same_command_twice_at_once(table: Path, undisturbed: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    processes = [start_faulty(table, out, "never", "none") for _ in range(2)]
    for process in processes:
        _, stderr = process.communicate(timeout=120)
        assert process.returncode == 0, stderr
    assert content(out) == content(undisturbed)


def before_dataset_json(monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> None:
    """Has ``act`` happen once, when all shards are there and dataset.json is written."""
    replace = os.replace

    def acting(source: Path, target: Path) -> None:
        if Path(target).name == "dataset.json":
            monkeypatch.setattr(os, "replace", replace)
            act()
        replace(source, target)

    monkeypatch.setattr(os, "replace", acting)


def stop() -> None:
    raise KeyboardInterrupt


def test_the_same_command_finishes_first(
    table: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def once() -> PackSummary:
        return pack(table, tmp_path / "set", clip_seconds=0.5, workers=2, max_bad=0.1)

    before_dataset_json(monkeypatch, once)
    assert once().clips == 86
    assert content(tmp_path / "set") == content(undisturbed)


def test_another_command_at_once(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It begins and ends between the look into the folder and the first block."""
    out = tmp_path / "set"
    statvfs = os.statvfs

    def meanwhile(path: Path) -> os.statvfs_result:
        monkeypatch.setattr(os, "statvfs", statvfs)
        pack(table, out, clip_seconds=0.4, workers=2, max_bad=0.1)
        return statvfs(path)

    monkeypatch.setattr(os, "statvfs", meanwhile)
    with pytest.raises(UserError, match="another fastat pack is writing to it"):
        pack(table, out, clip_seconds=0.5, workers=2, max_bad=0.1)
    assert not verify(out).damaged and PackedSet.open(out).clip_samples == 6400
    assert pack(table, out, clip_seconds=0.4, max_bad=0.1).already_packed


@pytest.mark.parametrize("fault", ["disk full", "disk full for command"])
def test_full_disk(table: Path, tmp_path: Path, fault: str) -> None:
    """For the processes, which write the rows, or the command, which writes dataset.json."""
    out = tmp_path / "set"
    code, stderr = run_faulty(table, out, "start", fault)
    message = stderr.splitlines()[-1]
    assert code == 1 and message.startswith("Failure: ") and str(out) in message
    assert message.endswith(": File too large")
    assert not list(out.glob(".*")) and not (out / "dataset.json").exists()


def test_disk_too_small_is_known_before(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.statvfs(tmp_path)

    class Small:
        f_bavail, f_frsize, f_blocks = 10, real.f_frsize, 10

    monkeypatch.setattr(os, "statvfs", lambda path: Small)
    with pytest.raises(Failure, match=r"0\.0 GiB needed for 90 clips, the disk has"):
        pack(table, tmp_path / "set", clip_seconds=0.5)
    assert not (tmp_path / "set").exists()
    # A folder that is there may be a disk of its own.
    (tmp_path / "disk").mkdir()
    small = tmp_path / "disk"
    monkeypatch.setattr(os, "statvfs", lambda path: Small if path == small else real)
    with pytest.raises(Failure, match="the disk has"):
        pack(table, small, clip_seconds=0.5)


def test_an_edited_table_redoes_what_changed(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And another command changes nothing of what a stopped one has left."""
    edited, out = tmp_path / "table.csv", tmp_path / "set"
    options: dict[str, Any] = {"audio": table.parent / "audio", "workers": 2, "max_bad": 0.1}
    lines = table.read_text().splitlines(keepends=True)
    changed = [line.replace("0030.wav,a;b", "0030.wav,c") for line in lines]
    for text, kept in ((changed, 81), (lines[:61], 0)):
        edited.write_text("".join(lines))
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            before_dataset_json(patch, stop)
            pack(edited, out, clip_seconds=0.5, **options)
        before = content(out)
        for other in ({"clip_seconds": 0.4}, {"clip_seconds": 0.5, "audio": table.parent}):
            with pytest.raises(UserError, match="unfinished set of another command") as caught:
                pack(edited, out, **options | other)
            assert "\n" not in str(caught.value)
        with pytest.raises(UserError, match="unfinished set of another command"):
            pack(table, out, clip_seconds=0.5, **options)
        assert content(out) == before
        (out / ".shard-00015.h5.0123abcd.tmp").touch()  # of a killed process
        edited.write_text("".join(text))
        assert pack(edited, out, clip_seconds=0.5, **options).resumed_clips == kept
        pack(edited, tmp_path / "whole", clip_seconds=0.5, **options)
        assert content(out) == content(tmp_path / "whole")
        shutil.rmtree(out)
        shutil.rmtree(tmp_path / "whole")


def test_folders_that_cannot_be_written(table: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write there: Not a directory"):
        pack(table, tmp_path / "file" / "set")
    with pytest.raises(UserError, match="this is a file"):
        pack(table, tmp_path / "file")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    with pytest.raises(UserError, match=r"new or empty folder, found thesis\.tex"):
        pack(table, tmp_path / "full")
    assert os.listdir(tmp_path / "full") == ["thesis.tex"]
    with pytest.raises(UserError, match="cannot write there"):
        pack(table, Path("/proc/fastat-set"))


def test_too_many_bad_files(table: Path, undisturbed: Path, tmp_path: Path) -> None:
    """The command stops at the last that is one too many; with more allowed it goes on."""
    out = tmp_path / "set"
    with pytest.raises(
        UserError, match=r"2 of 90 files are bad, more than --max-bad 0\.02"
    ) as caught:
        pack(table, out, clip_seconds=0.5, workers=1, max_bad=0.02)
    assert "--max-bad 0.03 or more" in str(caught.value) and str(out / "bad.csv") in str(
        caught.value
    )
    assert [Path(b["path"]).name for b in bad_lines(out)] == ["0010.wav", "0044.wav"]
    assert not (out / "dataset.json").exists() and not (out / "shard-00009.h5").exists()
    summary = pack(table, out, clip_seconds=0.5, workers=2, max_bad=0.05)
    assert (summary.clips, summary.bad, summary.resumed_clips) == (86, 4, 43)
    assert summary.bad_reasons == {"empty": 1, "truncated": 1, "unreadable": 1, "non-finite": 1}
    assert content(out) == content(undisturbed)


def test_mended_files_are_packed_by_the_same_command(tmp_path: Path) -> None:
    """One that could not be decoded, and one that was missing."""
    table = write_table(tmp_path, 20)
    audio = [tmp_path / "audio" / name for name in ("0001.flac", "0010.wav")]
    sound = [path.read_bytes() for path in audio]
    audio[0].write_bytes(sound[0][:1000])
    audio[1].unlink()

    def once(name: str) -> PackSummary:
        return pack(table, tmp_path / name, clip_seconds=0.5, workers=1, max_bad=0.05)

    with pytest.raises(UserError, match="2 of 20 files are bad"):
        once("set")
    for path, data in zip(audio, sound, strict=True):
        path.write_bytes(data)
    assert once("set").clips == 20
    once("whole")
    assert content(tmp_path / "set") == content(tmp_path / "whole")


def test_a_block_without_a_good_clip(tmp_path: Path) -> None:
    table = write_table(tmp_path, 20)
    for path in sorted((tmp_path / "audio").iterdir())[4:8]:
        path.write_bytes(b"")
    summary = pack(table, tmp_path / "set", clip_seconds=0.5, workers=2, max_bad=0.2)
    assert (summary.clips, summary.shards) == (16, 5)
    assert check_rows(tmp_path / "set", 0.5).num_clips == 16
    assert not verify(tmp_path / "set").damaged


def test_a_block_is_bounded(
    table: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "BLOCK_BYTES", 50_000)  # three clips
    summary = pack(table, tmp_path / "set", clip_seconds=0.5, workers=2, max_bad=0.1)
    sets = [PackedSet.open(out) for out in (tmp_path / "set", undisturbed)]
    assert summary.shards == 30
    assert np.array_equal(all_rows(sets[0]), all_rows(sets[1]))
    for name, stats in sets[0].stats.items():
        assert stats == pytest.approx(sets[1].stats[name])


def test_missing_files_are_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """AudioSet as people have it: a part of the segments, a part of the classes."""
    audio = tmp_path / "audio"
    audio.mkdir()
    lines = [f'-id{i:08d}, {i}.000, {i + 10}.000, "/m/{i % 3},/m/9"' for i in range(20)]
    table = tmp_path / "segments.csv"
    table.write_text("# YTID, start_seconds, end_seconds, positive_labels\n" + "\n".join(lines))
    for i in range(14):
        sf.write(audio / f"Y-id{i:08d}.flac", noise(0.3, 16_000, i), 16_000)
    classes = tmp_path / "classes.csv"
    classes.write_text("index,mid,display_name\n0,/m/0,A\n1,/m/1,B\n2,/m/2,C\n3,/m/9,D\n4,/m/8,E\n")
    with pytest.raises(UserError) as caught:
        pack(table, tmp_path / "set", labels=classes, clip_seconds=0.5)
    message = str(caught.value)
    assert "6 of 20 files are bad" in message and "6 missing" in message
    assert "--max-bad 0.3 or more" in message and "\n" not in message
    assert len(bad_lines(tmp_path / "set")) == 6
    monkeypatch.setattr(pack_options, "STATS_CLIPS", 10)
    summary = pack(table, tmp_path / "set", labels=classes, clip_seconds=0.5, max_bad=0.3)
    assert (summary.clips, summary.bad_reasons) == (14, {"missing": 6})
    assert summary.empty_classes == ("/m/8",)
    packed = PackedSet.open(tmp_path / "set")
    assert packed.stats["logmel64"].num_clips == 10  # none of the missing is in the sample
    assert [c.name for c in packed.classes] == ["A", "B", "C", "D", "E"]
    assert packed.label_counts.tolist() == [5, 5, 4, 14, 0]


def test_classes_from_another_set(table: Path, undisturbed: Path, tmp_path: Path) -> None:
    audio = table.parent / "audio"
    other = tmp_path / "t.csv"
    other.write_text("path,labels\n0001.flac,c\n0002.wav,z\n")
    with pytest.raises(UserError, match=r"1 label unknown, such as .*0002\.wav \(z\)"):
        pack(other, tmp_path / "a", audio=audio, classes_from=undisturbed)
    summary = pack(
        other, tmp_path / "b", audio=audio, classes_from=undisturbed, max_bad=0.5, clip_seconds=0.5
    )
    assert summary.clips == 1 and summary.empty_classes == ("a", "b")
    packed = PackedSet.open(tmp_path / "b")
    assert packed.classes == PackedSet.open(undisturbed).classes
    assert packed.targets(np.array([0])).tolist() == [[0.0, 0.0, 1.0]]
    with pytest.raises(UserError, match="expected a packed set"):
        pack(other, tmp_path / "c", audio=audio, classes_from=tmp_path)


def test_segments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long files in consecutive clips; a remainder under a second is dropped, unless it is all."""
    folder = tmp_path / "set" / "x"
    folder.mkdir(parents=True)
    lengths = {"a": 7.0, "b": 4.5, "c": 0.3, "d": 5.2}
    for i, (name, seconds) in enumerate(lengths.items()):
        sf.write(folder / f"{name}.wav", noise(seconds, 22_050, i), 22_050)
    sets = []
    for block_bytes in (1 << 28, 1):  # one shard for all files, and one for each
        monkeypatch.setattr(plan, "BLOCK_BYTES", block_bytes)
        out = tmp_path / f"out{block_bytes}"
        pack(tmp_path / "set", out, clip_seconds=2.0, segments=True, workers=2)
        sets.append(PackedSet.open(out))
    packed = sets[0]
    assert packed.num_clips == 10
    assert packed.names(np.arange(10)) == [f"x/{name}.wav" for name in "aaaabbcddd"]
    assert [start for _, start in packed.sources(np.arange(10))] == [0, 2, 4, 6, 0, 2, 0, 0, 2, 4]
    rows = all_rows(packed)
    whole = {n: reference(folder / f"{n}.wav") for n in lengths}
    for row, (path, start) in enumerate(packed.sources(np.arange(10))):
        piece = whole[Path(path).stem][round(start * 16_000) :][:32_000]
        assert packed.num_samples[row] == len(piece)
        assert np.array_equal(rows[row, : len(piece)], piece)
    assert np.array_equal(rows, all_rows(sets[1]))
    assert packed.stats["logmel64"].num_clips == 10


def test_holdout(table: Path, tmp_path: Path) -> None:
    def once(name: str) -> PackSummary:
        return pack(
            table, tmp_path / name, clip_seconds=0.5, workers=2, max_bad=0.1, holdout=0.2,
            group_by="source",
        )  # fmt: skip

    summary = once("one")
    assert summary.eval_directory == tmp_path / "one-eval"
    assert (summary.clips + summary.eval_clips, summary.bad) == (86, 4)
    source = {r["path"]: r["source"] for r in csv.DictReader(table.open())}
    train, held = PackedSet.open(tmp_path / "one"), PackedSet.open(tmp_path / "one-eval")
    groups = [{source[n] for n in s.names(np.arange(s.num_clips))} for s in (train, held)]
    assert not groups[0] & groups[1]
    assert 12 <= held.num_clips <= 30
    assert train.classes == held.classes and (held.label_counts > 0).all()
    again = once("one")
    assert again.already_packed and again.eval_clips == held.num_clips and again.bad == 4
    once("two")
    shutil.rmtree(tmp_path / "one-eval")  # as if killed between the two sets
    assert not once("one").already_packed
    for part in ("", "-eval"):
        assert content(tmp_path / f"one{part}") == content(tmp_path / f"two{part}")


def test_holdout_looks_at_both_folders_first(table: Path, tmp_path: Path) -> None:
    (tmp_path / "set-eval").mkdir()
    (tmp_path / "set-eval" / "mine").write_text("")
    with pytest.raises(UserError, match="set-eval: expected a new or empty folder"):
        pack(table, tmp_path / "set", holdout=0.2, max_bad=0.1)
    assert not (tmp_path / "set").exists()


def test_wrong_options(table: Path, tmp_path: Path) -> None:
    for options, message in (
        ({"codec": "mp3"}, "--codec: expected pcm16, flac or none, got mp3"),
        ({"clip_seconds": 0.0}, "--clip-seconds: expected 0.1 to"),
        ({"clip_seconds": float("nan")}, "--clip-seconds: expected 0.1 to"),
        ({"clip_seconds": 1e6}, "--clip-seconds: expected 0.1 to"),
        ({"seed": -1}, "--seed: expected 0 or more"),
        ({"holdout": 1.0}, "--holdout: expected a fraction"),
        ({"group_by": "source"}, "only --holdout groups"),
        ({"holdout": 0.1, "group_by": "take"}, "no such column"),
        ({"workers": 0}, "--workers: expected at least 1"),
        ({"max_bad": 2.0}, "--max-bad: expected a fraction"),
        ({"audio": tmp_path / "none"}, "--audio .*: no such folder"),
        ({"labels": table, "classes_from": tmp_path}, "got both"),
    ):
        with pytest.raises(UserError, match=message):
            pack(table, tmp_path / "set", **options)
    assert not (tmp_path / "set").exists()


def test_nothing_left(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "a.wav").write_text("no audio")
    with pytest.raises(UserError, match="1 of 1 files are bad.*; there are no others"):
        pack(tmp_path, tmp_path / "out")
    with pytest.raises(UserError, match="no clip is left, all 1 files are bad"):
        pack(tmp_path, tmp_path / "out", max_bad=1.0)
    sf.write(tmp_path / "x" / "a.wav", np.zeros(16_000), 16_000)
    with pytest.raises(UserError, match="silent or too short"):
        pack(tmp_path, tmp_path / "out")


def test_what_is_no_shard_is_one_line(table: Path, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    for damage in (b"", b"not HDF5" * 100, b"\x89HDF\r\n\x1a\n" + bytes(500)):
        (tmp_path / "set" / "shard-00000.h5").write_bytes(damage)
        with pytest.raises(Failure, match=r"shard-00000\.h5: damaged") as caught:
            pack(table, tmp_path / "set", clip_seconds=0.5)
        assert "\n" not in str(caught.value)


def test_names_with_any_bytes(tmp_path: Path) -> None:
    """A name may hold a line end, or bytes that are no text; so may a bad file's."""
    folder = tmp_path / "sounds"
    (folder / "a").mkdir(parents=True)
    good = os.fsdecode(b"two\nlines \xff.wav")
    sf.write(os.fsencode(folder / "a" / good), noise(0.5, 16_000, 0), 16_000)
    (folder / "a" / f"bad {good}").write_text("no audio")
    summary = pack(folder, tmp_path / "set", clip_seconds=0.5, workers=1, max_bad=1)
    assert (summary.clips, summary.bad) == (1, 1)
    packed = PackedSet.open(tmp_path / "set")
    assert packed.names(np.array([0])) == [f"a/{good}"]
    packed.close()
    with (tmp_path / "set" / "bad.csv").open(
        newline="", encoding="utf-8", errors="surrogateescape"
    ) as file:
        (line,) = csv.DictReader(file)
    assert line["path"] == str(folder / "a" / f"bad {good}")
