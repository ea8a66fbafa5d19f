"""fastat pack: rows as an independent reader has them, bad files, holdout, what goes wrong."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import torch
from numpy.typing import NDArray

from fastat.data.pack_state import PackState
from fastat.data.shards import PackedSet, Stats
from fastat.errors import Failure, UserError
from fastat.features import FEATURES
from fastat.frontend import Frontend
from fastat.packing import pack as pack_module
from fastat.packing.pack import pack
from tests.data.audio import noise, reference, run_python, write_table

SHARD_BYTES = 250_000  # 11 clips of half a second


def all_rows(packed: PackedSet) -> NDArray[np.int16]:
    out = np.empty((packed.num_clips, packed.clip_samples), np.int16)
    packed.read_rows(np.arange(packed.num_clips), out)
    return out


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
    summary = pack(table, out, clip_seconds=0.5, workers=1, max_bad=0.1, shard_bytes=SHARD_BYTES)
    assert (summary.clips, summary.bad, summary.shards) == (86, 4, 8)
    assert not summary.already_packed and summary.resumed_clips == 0
    return out


def test_rows_equal_soundfile_and_soxr(table: Path, undisturbed: Path) -> None:
    packed = PackedSet.open(undisturbed)
    rows = all_rows(packed)
    good = [i for i in range(90) if i not in (10, 44, 45, 88)]
    assert packed.names(np.arange(86)) == [f"{i:04d}.{'flac' if i % 2 else 'wav'}" for i in good]
    labels = {r["path"]: r["labels"] for r in csv.DictReader(table.open())}
    for row, (name, start) in enumerate(packed.sources(np.arange(86))):
        path = Path(name)
        expected = reference(path, seconds=0.5)
        assert start == 0.0 and path.is_absolute()
        assert packed.num_samples[row] == len(expected)
        assert np.array_equal(rows[row, : len(expected)], expected)
        assert not rows[row, len(expected) :].any()
        ids = [
            c.id
            for c, t in zip(packed.classes, packed.targets(np.array([row]))[0], strict=True)
            if t
        ]
        assert ids == sorted(labels[path.name].split(";"))
    packed.close()


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
    monkeypatch.setattr(pack_module, "STATS_CLIPS", 20)
    found: list[dict[str, Stats]] = []
    for seed in (0, 0, 1):
        out = tmp_path / f"{len(found)}"
        pack(table, out, clip_seconds=0.5, workers=2, max_bad=0.1, seed=seed)
        found.append(PackedSet.open(out).stats)
    assert found[0] == found[1] != found[2]
    assert 16 <= found[0]["logmel64"].num_clips <= 20  # bad files in the sample are not replaced


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_the_same_for_any_number_of_workers(
    table: Path, undisturbed: Path, tmp_path: Path, workers: int
) -> None:
    out = tmp_path / "set"
    pack(table, out, clip_seconds=0.5, workers=workers, max_bad=0.1, shard_bytes=SHARD_BYTES)
    assert content(out) == content(undisturbed)


def test_again_is_done_at_once_and_another_command_is_refused(
    table: Path, undisturbed: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(undisturbed, tmp_path / "set"))
    again = pack(table, out, clip_seconds=0.5, workers=2, max_bad=0.2, shard_bytes=SHARD_BYTES)
    first = replace(again, already_packed=False)
    assert again.already_packed and first.clips == 86 and first.bad == 4
    before = content(out)
    with pytest.raises(UserError, match="another command"):
        pack(table, out, clip_seconds=0.4, max_bad=0.1, shard_bytes=SHARD_BYTES)
    with pytest.raises(UserError, match="another command"):
        pack(table, out, clip_seconds=0.5, seed=1, max_bad=0.1, shard_bytes=SHARD_BYTES)
    assert content(out) == before


# The child kills itself with SIGKILL at the n-th durable step (fsync or rename): between any two of
# them a power cut finds the same files.
KILL_AT = """
import os, signal, sys
from pathlib import Path
left = int(sys.argv[3])
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
options = dict(clip_seconds=0.5, workers=2, max_bad=0.1, shard_bytes=250_000)
pack(Path(sys.argv[1]), Path(sys.argv[2]), **options)
"""
# Steps: state.json 3; each shard 6 (fsync, note 3, rename, fsync); bad.csv 3; dataset.json 3.
NUM_STEPS = 3 + 8 * 6 + 3 + 3


def kill_and_resume(table: Path, out: Path, step: int, undisturbed: Path) -> int:
    """Kills a run at a step, finishes it; how many clips were kept."""
    done = run_python(KILL_AT, table, out, step)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (out / "dataset.json").exists()
    summary = pack(table, out, clip_seconds=0.5, workers=2, max_bad=0.1, shard_bytes=SHARD_BYTES)
    assert content(out) == content(undisturbed)
    return summary.resumed_clips


@pytest.mark.parametrize(
    ("step", "kept"),
    # The note of the second shard is there, its rename is not; all shards, but no dataset.json.
    [(2, 0), (3 + 6 + 5, 10), (NUM_STEPS - 1, 86)],
)
def test_killed_and_resumed(
    table: Path, undisturbed: Path, tmp_path: Path, step: int, kept: int
) -> None:
    rows = PackedSet.open(undisturbed)._shards[0].rows
    resumed = kill_and_resume(table, tmp_path / "set", step, undisturbed)
    assert resumed == (rows if kept == 10 else kept)


@pytest.mark.full
@pytest.mark.parametrize("step", range(1, NUM_STEPS, 3))
def test_killed_at_every_third_step(
    table: Path, undisturbed: Path, tmp_path: Path, step: int
) -> None:
    kill_and_resume(table, tmp_path / "set", step, undisturbed)


def test_a_bad_file_behind_the_last_clip_counts_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped when all shards are finished, but the set is not."""
    table = write_table(tmp_path, 6)
    (tmp_path / "audio" / "0005.flac").write_bytes(b"")

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(PackState, "finish", stop)
        pack(table, tmp_path / "set", clip_seconds=0.5, workers=1, max_bad=0.5)
    summary = pack(table, tmp_path / "set", clip_seconds=0.5, workers=1, max_bad=0.5)
    assert (summary.resumed_clips, summary.clips, summary.bad) == (5, 5, 1)
    assert len(bad_lines(tmp_path / "set")) == 1


def test_killed_in_the_middle_leaves_no_process(
    table: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """A kill at no particular moment; the workers end by themselves."""
    out = tmp_path / "set"
    # fsync of the third shard takes for ever: the kill finds the run at work.
    code = KILL_AT.replace("os.kill(os.getpid(), signal.SIGKILL)", "signal.pause()")
    process = subprocess.Popen(
        [sys.executable, "-c", code, table, out, str(3 + 2 * 6 + 1)],
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 60
    while not (out / "shard-00001.h5").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.wait()
    while True:
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            break
        assert time.monotonic() < deadline, "workers outlive the command"
        time.sleep(0.05)
    with pytest.raises(UserError, match="did not finish"):
        PackedSet.open(out)
    with pytest.raises(UserError, match="unfinished set of another command"):
        pack(table, out, clip_seconds=0.4, max_bad=0.1)
    pack(table, out, clip_seconds=0.5, workers=2, max_bad=0.1, shard_bytes=SHARD_BYTES)
    assert content(out) == content(undisturbed)


def test_interrupted_leaves_nothing_half_written(
    table: Path, undisturbed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "set"
    # A shell that starts the tests in its background has them ignore SIGINT.
    heeded = "import signal\nsignal.signal(2, signal.default_int_handler)\n"
    code = heeded + KILL_AT.replace(
        "os.kill(os.getpid(), signal.SIGKILL)", "signal.raise_signal(2)"
    )
    done = run_python(code, table, out, 3 + 2 * 6 + 1)
    assert done.returncode != 0 and "KeyboardInterrupt" in done.stderr
    names = {p.name for p in out.iterdir()}
    assert names >= {".pack", "shard-00000.h5", "shard-00001.h5"}
    assert not [name for name in names if "part" in name or "tmp" in name]
    summary = pack(table, out, clip_seconds=0.5, workers=2, max_bad=0.1, shard_bytes=SHARD_BYTES)
    assert summary.resumed_clips >= 20
    assert content(out) == content(undisturbed)


def test_two_commands_at_once(table: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    code = """
import sys
from pathlib import Path
from fastat.data import pack_set
from fastat.packing.pack import pack
from fastat.errors import UserError
def again(*args):
    pack_set._run = None
    try:
        pack(Path(sys.argv[1]), Path(sys.argv[2]), clip_seconds=0.5)
    except UserError as error:
        sys.exit(str(error))
pack_set._run = again
pack(Path(sys.argv[1]), Path(sys.argv[2]), clip_seconds=0.5)
"""
    done = run_python(code, table, out)
    assert "another fastat pack is writing to it" in done.stderr
    assert not out.exists()


# A limit on the size of files fails writes as a full disk does: in the parent, which makes files,
# or in the workers, which write the rows.
FULL_DISK = """
import resource, sys
from pathlib import Path
from fastat.data import pack_pool
from fastat.packing.pack import pack
from fastat.errors import Failure
LIMIT = (20_000, 20_000)
start = pack_pool.Pool.__enter__
def limit_workers(self):
    for process in self._processes:
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, LIMIT)
    return start(self)
if sys.argv[3] == "workers":
    pack_pool.Pool.__enter__ = limit_workers
else:
    resource.setrlimit(resource.RLIMIT_FSIZE, LIMIT)
try:
    pack(Path(sys.argv[1]), Path(sys.argv[2]), clip_seconds=0.5, workers=2, max_bad=0.1)
except Failure as failure:
    print("Failure:", failure)
"""


@pytest.mark.parametrize("who", ["parent", "workers"])
def test_full_disk(table: Path, tmp_path: Path, who: str) -> None:
    out = tmp_path / "set"
    done = run_python(FULL_DISK, table, out, who)
    message = done.stdout.strip()
    assert message.startswith("Failure: cannot write "), done.stderr
    assert message.endswith(": File too large") and "\n" not in message
    assert not out.exists()


def test_disk_too_small_is_known_before(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.statvfs(tmp_path)

    class Small:
        f_bavail, f_frsize = 10, real.f_frsize

    monkeypatch.setattr(os, "statvfs", lambda path: Small)
    with pytest.raises(Failure, match=r"0\.0 GiB needed for 90 clips, the disk has"):
        pack(table, tmp_path / "set", clip_seconds=0.5)
    assert not (tmp_path / "set").exists()


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


def test_too_many_bad_files(table: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    with pytest.raises(
        UserError, match=r"3 of 90 files are bad, more than --max-bad 0\.03"
    ) as caught:
        pack(table, out, clip_seconds=0.5, workers=2, max_bad=0.03)
    assert "--max-bad 0.04 or more" in str(caught.value)
    assert os.listdir(out) == ["bad.csv"]
    assert len(bad_lines(out)) == 3
    summary = pack(table, out, clip_seconds=0.5, workers=2, max_bad=0.05)
    assert (summary.clips, summary.bad) == (86, 4)
    assert summary.bad_reasons == {"empty": 1, "truncated": 1, "unreadable": 1, "non-finite": 1}


def test_missing_files_are_one_clear_line(tmp_path: Path) -> None:
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
    summary = pack(table, tmp_path / "set", labels=classes, clip_seconds=0.5, max_bad=0.3)
    assert (summary.clips, summary.bad_reasons) == (14, {"missing": 6})
    assert summary.empty_classes == ("/m/8",)
    packed = PackedSet.open(tmp_path / "set")
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


def test_segments(tmp_path: Path) -> None:
    """Long files in consecutive clips; a remainder under a second is dropped, unless it is all."""
    folder = tmp_path / "set" / "x"
    folder.mkdir(parents=True)
    lengths = {"a": 7.0, "b": 4.5, "c": 0.3, "d": 5.2}
    for i, (name, seconds) in enumerate(lengths.items()):
        sf.write(folder / f"{name}.wav", noise(seconds, 22_050, i), 22_050)
    sets = []
    for shard_bytes in (1 << 30, 300_000):  # files across shards
        out = tmp_path / f"out{shard_bytes}"
        pack(
            tmp_path / "set", out, clip_seconds=2.0, segments=True, workers=2,
            shard_bytes=shard_bytes,
        )  # fmt: skip
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


def test_segments_killed_within_a_file(tmp_path: Path) -> None:
    folder = tmp_path / "set" / "x"
    folder.mkdir(parents=True)
    for i in range(3):
        sf.write(folder / f"{i}.wav", noise(8.0, 16_000, i), 16_000)
    options = "clip_seconds=1.0, segments=True, workers=2"
    code = KILL_AT.replace("clip_seconds=0.5, workers=2, max_bad=0.1", options)
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    done = run_python(code, tmp_path / "set", killed, 3 + 3 * 6 + 2)
    assert done.returncode == -signal.SIGKILL, done.stderr
    for out in (killed, whole):
        summary = pack(
            tmp_path / "set", out, clip_seconds=1.0, segments=True, workers=2, shard_bytes=250_000
        )
        assert summary.resumed_clips == (0 if out is whole else 3 * 5)
    assert PackedSet.open(whole).num_clips == 24
    assert content(killed) == content(whole)


def test_holdout(table: Path, tmp_path: Path) -> None:
    summaries = [
        pack(
            table, tmp_path / name, clip_seconds=0.5, workers=2, max_bad=0.1, holdout=0.2,
            group_by="source",
        )
        for name in ("one", "two")
    ]  # fmt: skip
    assert summaries[0].eval_directory == tmp_path / "one-eval"
    assert summaries[0].clips + summaries[0].eval_clips == 86
    assert summaries[0].bad == 4
    source = {r["path"]: r["source"] for r in csv.DictReader(table.open())}
    train, held = PackedSet.open(tmp_path / "one"), PackedSet.open(tmp_path / "one-eval")
    groups = [
        {source[name] for name in packed.names(np.arange(packed.num_clips))}
        for packed in (train, held)
    ]
    assert not groups[0] & groups[1]
    assert 12 <= held.num_clips <= 30
    assert train.classes == held.classes and (held.label_counts > 0).all()
    for part in ("", "-eval"):
        assert content(tmp_path / f"one{part}") == content(tmp_path / f"two{part}")
    again = pack(
        table, tmp_path / "one", clip_seconds=0.5, max_bad=0.1, holdout=0.2, group_by="source"
    )
    assert again.already_packed and again.eval_clips == held.num_clips and again.bad == 4
    shutil.rmtree(tmp_path / "one-eval")  # as if killed between the two sets
    again = pack(
        table, tmp_path / "one", clip_seconds=0.5, max_bad=0.1, holdout=0.2, group_by="source"
    )
    assert not again.already_packed
    assert content(tmp_path / "one-eval") == content(tmp_path / "two-eval")


def test_holdout_looks_at_both_folders_first(table: Path, tmp_path: Path) -> None:
    (tmp_path / "set-eval").mkdir()
    (tmp_path / "set-eval" / "mine").write_text("")
    with pytest.raises(UserError, match="set-eval: expected a new or empty folder"):
        pack(table, tmp_path / "set", holdout=0.2, max_bad=0.1)
    assert not (tmp_path / "set").exists()


def test_wrong_options(table: Path, tmp_path: Path) -> None:
    for options, message in (
        ({"codec": "mp3"}, "--codec: expected pcm16 or flac, got mp3"),
        ({"clip_seconds": 0.0}, "--clip-seconds: expected 0.1 to"),
        ({"clip_seconds": float("nan")}, "--clip-seconds: expected 0.1 to"),
        ({"clip_seconds": 1e6}, "--clip-seconds: expected 0.1 to"),
        ({"shard_bytes": 100_000}, "larger than a shard"),
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


def test_a_worker_that_dies(table: Path, tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from fastat.data import pack_pool
from fastat.packing.pack import pack
from fastat.errors import Failure
decode = pack_pool.Pool.decode
def kill(self, worker, message):
    self._processes[worker].kill()
    self._processes[worker].join()
    decode(self, worker, message)
pack_pool.Pool.decode = kill
try:
    pack(Path(sys.argv[1]), Path(sys.argv[2]), clip_seconds=0.5, workers=2)
except Failure as failure:
    print("Failure:", failure)
"""
    done = run_python(code, table, tmp_path / "set")
    assert "Failure: a worker process ended with exit code -9" in done.stdout, done.stderr
    assert "0000.wav" in done.stdout, "the files that it had to decode are named"
    assert not (tmp_path / "set").exists()


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


def test_a_state_of_another_version_is_no_damage(tmp_path: Path) -> None:
    table = write_table(tmp_path, 3)
    state = tmp_path / "set" / ".pack" / "state.json"
    state.parent.mkdir(parents=True)
    for document, key in (({"inputs": "x", "warp": 9}, "warp"), ({}, "inputs")):
        state.write_text(json.dumps(document))
        with pytest.raises(Failure, match=rf"state\.json.*'{key}'.*another version"):
            pack(table, tmp_path / "set", workers=1)


def test_a_damaged_state_is_one_line(tmp_path: Path) -> None:
    table = write_table(tmp_path, 2)
    for text in ("not json", "[]", "[" * 100_000):
        state = tmp_path / "set" / ".pack"
        state.mkdir(parents=True, exist_ok=True)
        (state / "state.json").write_text(text)
        with pytest.raises(UserError, match=r"state\.json: damaged"):
            pack(table, tmp_path / "set", clip_seconds=0.5, workers=1)
