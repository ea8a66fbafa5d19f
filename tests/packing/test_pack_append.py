"""fastat pack --append: a set grows by what it does not have; what it has stays byte for byte."""

import json
import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile as sf

from fastat.commands.pack_report import print_appended
from fastat.data import pack_parts
from fastat.data.pack_parts import Part
from fastat.data.shards import PackedSet
from fastat.errors import UserError
from fastat.packing.append import AppendSummary, append
from fastat.packing.bad_files import read_notes
from fastat.packing.pack import pack
from tests.data.audio import noise, write_table
from tests.data.kills import killed_at

SHARD_BYTES = 250_000  # 11 clips of half a second
OPTIONS: dict[str, Any] = {"workers": 1, "max_bad": 0.1, "shard_bytes": SHARD_BYTES}
NUM_OLD, NUM_ALL = 30, 50


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """30 files, and those and 20 more; one bad in the old part and one in the new."""
    grown = write_table(tmp_path_factory.mktemp("tables"), NUM_ALL)
    for name in ("0010.wav", "0040.wav"):
        (grown.parent / "audio" / name).write_bytes(b"")
    old = grown.with_name("old.csv")
    old.write_text("".join(grown.read_text().splitlines(keepends=True)[: 1 + NUM_OLD]))
    return old, grown


@pytest.fixture(scope="module")
def base(tables: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("base") / "set"
    pack(tables[0], out, clip_seconds=0.5, **OPTIONS)
    return out


@pytest.fixture
def out(base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(base, tmp_path / "set"))


@pytest.fixture(scope="module")
def unmerged(
    tables: tuple[Path, Path], base: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The new files are packed; killed before they were added to the set."""
    out = Path(shutil.copytree(base, tmp_path_factory.mktemp("unmerged") / "set"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pack_parts, "_merge", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            append(tables[1], out, **OPTIONS)
    return out


def files(directory: Path) -> dict[str, bytes]:
    """Every file of a set; no folder is left in it."""
    return {p.name: p.read_bytes() for p in sorted(directory.iterdir())}


def rows(directory: Path) -> tuple[np.ndarray[Any, np.dtype[np.int16]], list[tuple[str, float]]]:
    packed = PackedSet.open(directory)
    out = np.empty((packed.num_clips, packed.clip_samples), np.int16)
    packed.read_rows(np.arange(packed.num_clips), out)
    return out, packed.sources(np.arange(packed.num_clips))


def check_grown(out: Path, base: Path, table: Path, tmp_path: Path) -> None:
    """``out`` is ``base`` and, behind it, what a plain pack makes of the 20 new files."""
    old, new = files(base), files(out)
    assert all(new[name] == old[name] for name in old if name.endswith(".h5"))
    lines = table.read_text().splitlines(keepends=True)
    only_new = table.with_name("only_new.csv")
    only_new.write_text(lines[0] + "".join(lines[1 + NUM_OLD :]))
    if not (tmp_path / "new").exists():
        pack(only_new, tmp_path / "new", clip_seconds=0.5, classes_from=base, **OPTIONS)
    (was, was_from), (added, added_from), (now, now_from) = map(rows, (base, tmp_path / "new", out))
    assert len(was) == NUM_OLD - 1 and len(added) == NUM_ALL - NUM_OLD - 1
    assert np.array_equal(now, np.concatenate([was, added]))
    assert now_from == was_from + added_from
    sets = [PackedSet.open(d) for d in (base, tmp_path / "new", out)]
    assert np.array_equal(sets[2].label_counts, sets[0].label_counts + sets[1].label_counts)
    bits = [s.target_bits for s in sets]
    assert np.array_equal(bits[2], np.concatenate(bits[:2]))
    assert sets[2].stats == sets[0].stats and sets[2].fingerprint != sets[0].fingerprint


def test_a_grown_table(tables: tuple[Path, Path], base: Path, out: Path, tmp_path: Path) -> None:
    summary = append(tables[1], out, **OPTIONS)
    assert (summary.clips, summary.appended_clips, summary.shards) == (48, 19, 5)
    assert (summary.already_there, summary.known_bad) == (29, 1)
    assert (summary.bad, summary.bad_reasons, summary.waiting_for) == (1, {"empty": 1}, ())
    check_grown(out, base, tables[1], tmp_path)
    assert set(files(out)) == {
        "bad.csv", "dataset.json", *(f"shard-{i:05d}.h5" for i in range(5))
    }  # fmt: skip
    listed = (out / "bad.csv").read_text().splitlines()
    assert ["0010.wav" in listed[1], "0040.wav" in listed[2], len(listed)] == [True, True, 3]
    assert json.loads((out / "dataset.json").read_text())["bad_files"] == 2

    before = files(out)
    again = append(tables[1], out, **OPTIONS)
    assert (again.appended_clips, again.clips, again.bad) == (0, 48, 0)
    assert (again.already_there, again.known_bad) == (48, 2)
    first = pack(tables[0], out, clip_seconds=0.5, **OPTIONS)
    assert first.already_packed and (first.clips, first.bad, first.changed_bad) == (48, 2, 0)
    with pytest.raises(UserError, match="--append adds to it what is new"):
        pack(tables[1], out, clip_seconds=0.5, **OPTIONS)
    assert files(out) == before


def test_another_table_in_parts(
    tables: tuple[Path, Path], base: Path, out: Path, tmp_path: Path
) -> None:
    """Two processes append; the set is the old one until both are done."""
    before = PackedSet.open(out).fingerprint
    summary = append(tables[1], out, part=Part(1, 2), **OPTIONS)
    assert (summary.waiting_for, summary.part, summary.appended_clips) == ((0,), "1/2", 9)
    assert PackedSet.open(out).fingerprint == before
    assert pack(tables[0], out, clip_seconds=0.5, **OPTIONS).already_packed
    for part, message in ((None, "in 2 parts"), (Part(0, 3), "in 2 parts")):
        with pytest.raises(UserError, match=message):
            append(tables[1], out, part=part, **OPTIONS)
    with pytest.raises(UserError, match="unfinished --append of another command.*delete"):
        append(tables[1], out, part=Part(0, 2), **OPTIONS | {"shard_bytes": 10**6})
    assert append(tables[1], out, part=Part(0, 2), **OPTIONS).appended_clips == 19
    check_grown(out, base, tables[1], tmp_path)
    assert append(tables[1], out, part=Part(1, 2), **OPTIONS).appended_clips == 0


def test_killed_at_every_step(
    tables: tuple[Path, Path], base: Path, unmerged: Path, tmp_path: Path
) -> None:
    """The old set, or the new one, is there at any moment; the same command goes on."""
    fingerprints = set()
    whole: dict[str, bytes] | None = None
    step = 0
    while True:
        step += 1
        out = Path(shutil.copytree(unmerged, tmp_path / str(step)))
        killed = killed_at(step, partial(append, tables[1], out, **OPTIONS))
        fingerprints.add(PackedSet.open(out).fingerprint)
        append(tables[1], out, **OPTIONS)
        whole = whole or files(out)
        assert files(out) == whole, step
        if not killed:
            break
    check_grown(out, base, tables[1], tmp_path)
    assert fingerprints == {PackedSet.open(out).fingerprint, PackedSet.open(base).fingerprint}
    assert step > 8  # bad.csv 3, two shards, the folder, dataset.json 3, bad.csv, the state


def test_repaired_files_are_packed(tmp_path: Path) -> None:
    table = write_table(tmp_path, 8)
    audio = tmp_path / "audio"
    repaired = (audio / "0002.wav").read_bytes()
    (audio / "0002.wav").write_bytes(b"")
    (audio / "0003.flac").write_bytes(b"")
    options = OPTIONS | {"max_bad": 0.5}
    pack(table, tmp_path / "set", clip_seconds=0.5, **options)

    def again() -> int:
        summary = pack(table, tmp_path / "set", clip_seconds=0.5, **options)
        assert summary.already_packed
        return summary.changed_bad

    assert again() == 0
    (audio / "0002.wav").write_bytes(repaired)
    assert again() == 1
    summary = append(table, tmp_path / "set", **options)
    assert (summary.appended_clips, summary.known_bad) == (1, 1)
    listed = (tmp_path / "set" / "bad.csv").read_text().splitlines()
    assert len(listed) == 2 and "0003.flac" in listed[1]
    # Changed, and still bad: listed once, and not tried again.
    (audio / "0003.flac").write_bytes(b"fLaC")
    assert again() == 1
    summary = append(table, tmp_path / "set", max_bad=1.0, workers=1)
    assert (summary.appended_clips, summary.bad_reasons) == (0, {"unreadable": 1})
    assert again() == 0
    before = files(tmp_path / "set")
    assert append(table, tmp_path / "set", **options).known_bad == 1
    assert files(tmp_path / "set") == before and len(before) == 4


@pytest.mark.parametrize("part", [None, Part(0, 2)])
def test_too_many_are_bad(
    tables: tuple[Path, Path], base: Path, out: Path, tmp_path: Path, part: Part | None
) -> None:
    """They are listed beside the set, which stays; alone, a corrected table may follow."""
    wrong = tmp_path / "wrong.csv"
    head, *lines = tables[1].read_text().splitlines()
    junk = [tmp_path / f"junk{i}.wav" for i in range(4)]
    for path in junk:
        path.write_bytes(b"junk")
    wrong.write_text("\n".join([head, *(f"{path},a,s" for path in junk), *lines]) + "\n")
    known = (out / "bad.csv").read_bytes()
    with pytest.raises(UserError, match="files are bad, more than --max-bad 0.1") as caught:
        append(wrong, out, audio=tables[1].parent / "audio", part=part, **OPTIONS)
    listed = out / "bad-append.csv"
    assert f"listed in {listed};" in str(caught.value)
    assert "junk" in listed.read_text() and (out / "bad.csv").read_bytes() == known
    if part is None:
        assert append(tables[1], out, **OPTIONS).appended_clips == 19
        check_grown(out, base, tables[1], tmp_path)
        assert not listed.exists()


def test_killed_while_a_file_is_bad_once_more(tmp_path: Path) -> None:
    """The set stays the same but for bad.csv; the next append must not find a leftover."""
    table = write_table(tmp_path, 4)
    bad = tmp_path / "audio" / "0002.wav"
    bad.write_bytes(b"")
    pack(table, tmp_path / "set", clip_seconds=0.5, workers=1, max_bad=0.5)
    bad.write_bytes(b"RIF")
    append(table, tmp_path / "set", workers=1, max_bad=1.0)
    bad.write_bytes(b"RIFF")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pack_parts, "_merge", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            append(table, tmp_path / "set", workers=1, max_bad=1.0)
    step, killed = 0, True
    while killed:
        step += 1
        out = Path(shutil.copytree(tmp_path / "set", tmp_path / str(step)))
        killed = killed_at(step, partial(append, table, out, workers=1, max_bad=1.0))
        append(table, out, workers=1, max_bad=1.0)
        assert set(files(out)) == {"bad.csv", "dataset.json", "shard-00000.h5"}, step
        assert "unreadable" in (out / "bad.csv").read_text()
    assert step > 6


def write_noted(folder: Path, *names: str) -> Path:
    """A table of float files with a sample beyond full scale, which are packed and noted."""
    folder.mkdir(exist_ok=True)
    for name in names:
        x = noise(0.5, 16_000, 1)
        x[100] = 1.5
        sf.write(folder / name, x, 16_000, subtype="FLOAT")
    table = folder / f"{names[-1]}.csv"
    table.write_text("path,label\n" + "".join(f"{name},a\n" for name in names))
    return table


def noted_in(out: Path) -> list[str]:
    return [Path(file.path).name for file in read_notes(out / "notes.csv")]


def test_notes_are_those_of_the_set_wherever_it_is_killed(tmp_path: Path) -> None:
    """Killed at any step, notes.csv names no file that the set lacks; run again, it has all."""
    old = write_noted(tmp_path / "audio", "a.wav")
    grown = write_noted(tmp_path / "audio", "a.wav", "b.wav")
    base, step, killed = tmp_path / "set", 0, True
    pack(old, base, clip_seconds=0.5, workers=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pack_parts, "_merge", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            append(grown, base, workers=1)
    while killed:
        step += 1
        out = Path(shutil.copytree(base, tmp_path / str(step)))
        killed = killed_at(step, partial(append, grown, out, workers=1))
        packed = PackedSet.open(out)
        assert set(noted_in(out)) <= set(packed.names(np.arange(packed.num_clips))), step
        append(grown, out, workers=1)
        assert noted_in(out) == ["a.wav", "b.wav"], step
        assert set(files(out)) == {
            "bad.csv", "notes.csv", "dataset.json", "shard-00000.h5", "shard-00001.h5"
        }, step  # fmt: skip
    assert step > 6


def test_files_are_counted_that_an_append_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Noted files as bad ones: those of the set before are not among them."""
    audio = tmp_path / "audio"
    pack(write_noted(audio, "a.wav", "b.wav"), tmp_path / "set", clip_seconds=0.5, workers=1)
    table = write_noted(audio, "a.wav", "c.wav")
    summary = append(table, tmp_path / "set", workers=1)
    assert (summary.appended_clips, summary.notes) == (1, {"clipped": 1})
    print_appended(summary, as_json=False)
    assert "noted files: 1 (1 clipped)" in capsys.readouterr().out
    summary = append(table, tmp_path / "set", workers=1)
    assert (summary.appended_clips, summary.notes) == (0, {})
    print_appended(summary, as_json=False)
    assert "noted" not in capsys.readouterr().out
    assert noted_in(tmp_path / "set") == ["a.wav", "b.wav", "c.wav"]


def test_segments_and_labels_are_the_sets(tmp_path: Path) -> None:
    for name, seconds in (("one", 1.7), ("two", 2.6)):
        (tmp_path / name / "x").mkdir(parents=True)
        sf.write(tmp_path / name / "x" / f"{name}.wav", noise(seconds, 16_000, 3), 16_000)
    (tmp_path / "two" / "y").mkdir()
    sf.write(tmp_path / "two" / "y" / "y.wav", noise(1.0, 16_000, 4), 16_000)
    pack(tmp_path / "one", tmp_path / "set", clip_seconds=0.5, segments=True, workers=1)
    with pytest.raises(UserError, match="1 of 2 files are bad.*1 label unknown") as caught:
        append(tmp_path / "two", tmp_path / "set", workers=1)
    listed = tmp_path / "set" / "bad-append.csv"
    assert str(listed) in str(caught.value) and "y.wav" in listed.read_text()
    summary = append(tmp_path / "two", tmp_path / "set", workers=1, max_bad=0.5)
    assert (summary.appended_clips, summary.bad) == (5, 1) and not listed.exists()
    packed = PackedSet.open(tmp_path / "set")
    starts = [start for _, start in packed.sources(np.arange(packed.num_clips))]
    assert starts == [0, 0.5, 1.0, 0, 0.5, 1.0, 1.5, 2.0]


def test_what_does_not_fit_is_refused(tables: tuple[Path, Path], out: Path, tmp_path: Path) -> None:
    labels = tmp_path / "labels.csv"
    labels.write_text("index,mid,display_name\n0,b,B\n1,a,A\n2,c,C\n")
    before = files(out)
    for options, message in (
        ({"clip_seconds": 1.0}, "--clip-seconds: expected 0.5 as in .*, got 1"),
        ({"clip_seconds": float("nan")}, "--clip-seconds: expected 0.1 to 1000.0, got nan"),
        ({"segments": True}, "--segments: .* was packed without"),
        ({"codec": "mp3"}, "--codec: expected pcm16 or flac, got mp3"),
        ({"labels": labels}, "expected the 3 classes of .* in their order"),
        ({"labels": labels, "classes_from": out}, "got both"),
        ({"workers": 0}, "--workers: expected at least 1"),
        ({"max_bad": 2.0}, "--max-bad: expected a fraction"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            append(tables[1], out, **options)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="expected the folder of a packed set"):
        append(tables[1], tmp_path / "nowhere")
    with pytest.raises(UserError, match="no such file"):
        append(tmp_path / "no.csv", out)
    labels.write_text("index,mid,display_name\n0,a,A\n1,b,B\n2,c,C\n")
    summary: AppendSummary = append(tables[0], out, labels=labels, clip_seconds=0.5)
    assert summary.appended_clips == 0 and files(out) == before
    assert not os.path.exists(tmp_path / "nowhere")
