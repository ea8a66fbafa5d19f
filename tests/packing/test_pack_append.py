"""fastat pack --append: a set grows by what it does not have; what it has stays byte for byte."""

import csv
import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile as sf

from fastat.cli.pack_report import print_appended
from fastat.data.shards import PackedSet
from fastat.packing.append import append
from fastat.packing.pack import pack
from fastat.packing.plan import Part
from fastat.packing.verify import verify
from fastat.system.errors import UserError
from tests.data.audio import noise, write_table
from tests.data.kills import files, in_the_middle, kill_between_blocks, killed_at
from tests.packing.test_pack_parts import run_ranks

OPTIONS: dict[str, Any] = {"workers": 1, "max_bad": 0.1}
NUM_OLD, NUM_ALL = 30, 50


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """30 files, and those and 20 more; one bad in the old part, and one bad, one noted in the
    new."""
    grown = write_table(tmp_path_factory.mktemp("tables"), NUM_ALL)
    for name in ("0010.wav", "0040.wav"):
        (grown.parent / "audio" / name).write_bytes(b"")
    write_clipped(grown.parent / "audio" / "0044.wav")
    return lines_of(grown, 0, NUM_OLD), grown


@pytest.fixture(scope="module")
def base(tables: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("base") / "set"
    pack(tables[0], out, clip_seconds=0.5, **OPTIONS)
    return out


@pytest.fixture(scope="module")
def grown(tables: tuple[Path, Path], base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``base`` with the 20 new files, by one undisturbed command."""
    out = Path(shutil.copytree(base, tmp_path_factory.mktemp("grown") / "set"))
    append(tables[1], out, **OPTIONS)
    return out


@pytest.fixture
def out(base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(base, tmp_path / "set"))


def lines_of(table: Path, first: int, end: int) -> Path:
    """A table beside ``table`` of some of its lines, without the header counted."""
    head, *lines = table.read_text().splitlines(keepends=True)
    path = table.with_name(f"lines{first}-{end}.csv")
    path.write_text(head + "".join(lines[first:end]))
    return path


def before_the_index(grown: Path, base: Path, out: Path) -> Path:
    """Makes ``out`` what a kill leaves between the last new shard and the lists."""
    shutil.copytree(grown, out)
    for name in ("dataset.json", "bad.csv", "notes.csv"):
        (out / name).unlink(missing_ok=True)
        if (base / name).exists():
            shutil.copy(base / name, out)
    return out


def rows(directory: Path) -> tuple[np.ndarray[Any, np.dtype[np.int16]], list[tuple[str, float]]]:
    packed = PackedSet.open(directory)
    out = np.empty((packed.num_clips, packed.clip_samples), np.int16)
    packed.read_rows(np.arange(packed.num_clips), out)
    return out, packed.sources(np.arange(packed.num_clips))


def listed(out: Path, name: str = "bad.csv") -> list[str]:
    """Names of the files in a list of ``out``, in its order."""
    with (out / name).open(newline="") as file:
        return [Path(line["path"]).name for line in csv.DictReader(file)]


def test_a_grown_table(
    tables: tuple[Path, Path], base: Path, grown: Path, out: Path, tmp_path: Path
) -> None:
    """``base`` and, behind it, what a plain pack makes of the 20 new files."""
    summary = append(tables[1], out, **OPTIONS)
    assert (summary.clips, summary.appended_clips, summary.shards) == (48, 19, 8 + 5)
    assert (summary.already_there, summary.known_bad) == (29, 1)
    assert (summary.bad, summary.bad_reasons, summary.waiting_for) == (1, {"empty": 1}, ())
    old, new = files(base), files(out)
    assert new == files(grown)
    assert all(new[name] == old[name] for name in old if name.endswith(".h5"))
    assert listed(out) == ["0010.wav", "0040.wav"] and listed(out, "notes.csv") == ["0044.wav"]
    index = json.loads(new["dataset.json"])
    first = json.loads(old["dataset.json"])
    assert index["bad_files"] == 2 and index["options"] == first["options"]

    only_new = lines_of(tables[1], NUM_OLD, NUM_ALL)
    pack(only_new, tmp_path / "new", clip_seconds=0.5, classes_from=base, **OPTIONS)
    (was, was_from), (added, added_from), (now, now_from) = map(rows, (base, tmp_path / "new", out))
    assert len(was) == NUM_OLD - 1 and len(added) == NUM_ALL - NUM_OLD - 1
    assert np.array_equal(now, np.concatenate([was, added]))
    assert now_from == was_from + added_from
    a, b, c = (PackedSet.open(directory) for directory in (base, tmp_path / "new", out))
    assert np.array_equal(c.label_counts, a.label_counts + b.label_counts)
    assert np.array_equal(c.target_bits, np.concatenate([a.target_bits, b.target_bits]))
    assert c.stats == a.stats and c.fingerprint != a.fingerprint

    again = append(tables[1], out, **OPTIONS)
    assert (again.appended_clips, again.clips, again.bad) == (0, 48, 0)
    assert (again.already_there, again.known_bad) == (48, 2)
    packed = pack(tables[0], out, clip_seconds=0.5, **OPTIONS)
    assert packed.already_packed and (packed.clips, packed.bad, packed.changed_bad) == (48, 2, 0)
    with pytest.raises(UserError, match="--append adds to it what is new"):
        pack(tables[1], out, clip_seconds=0.5, **OPTIONS)
    assert files(out) == new


def test_in_parts(tables: tuple[Path, Path], grown: Path, out: Path) -> None:
    """The set is the old one until all are done."""
    before = PackedSet.open(out).fingerprint
    summary = append(tables[1], out, part=Part(1, 2), **OPTIONS)
    assert (summary.waiting_for, summary.part, summary.appended_clips) == ((0,), "1/2", 8)
    assert PackedSet.open(out).fingerprint == before
    assert pack(tables[0], out, clip_seconds=0.5, **OPTIONS).already_packed
    last = append(tables[1], out, part=Part(0, 2), **OPTIONS)
    assert (last.appended_clips, last.clips, last.bad) == (19, 48, 1)
    assert files(out) == files(grown)
    assert append(tables[1], out, part=Part(1, 2), **OPTIONS).appended_clips == 0


def test_in_parts_at_once(tables: tuple[Path, Path], grown: Path, out: Path) -> None:
    arguments = ("pack", tables[1], "--append", "--out", out, "--max-bad", "0.1")
    printed = run_ranks(2, *map(str, arguments))
    assert any(text.startswith("appended: 19 clips") for text in printed)
    assert files(out) == files(grown)


def test_the_same_command_twice_at_once(tables: tuple[Path, Path], grown: Path, out: Path) -> None:
    with in_the_middle(lambda: append(tables[1], out, **OPTIONS)):
        assert append(tables[1], out, **OPTIONS).clips == 48
    assert files(out) == files(grown)


def test_killed_between_blocks(tables: tuple[Path, Path], grown: Path, out: Path) -> None:
    before = PackedSet.open(out).fingerprint
    options = OPTIONS | {"workers": 2}
    kill_between_blocks(f"append.append(source, out, **{options})", tables[1], out)
    assert PackedSet.open(out).fingerprint == before and verify(out).damaged == ()
    last = json.loads((grown / "dataset.json").read_text())["shards"][-1]["file"]
    (out / f".{last}.0123abcd.tmp").write_bytes(b"half a shard")
    assert 0 < append(tables[1], out, **OPTIONS).resumed_clips < 19
    assert files(out) == files(grown)


def test_killed_at_every_step_behind_the_last_shard(
    tables: tuple[Path, Path], base: Path, grown: Path, tmp_path: Path
) -> None:
    """The old set, or the new one, is there at any moment; the same command goes on."""
    fingerprints = set()
    step, killed = 0, True
    while killed:
        step += 1
        out = before_the_index(grown, base, tmp_path / str(step))
        killed = killed_at(step, partial(append, tables[1], out, **OPTIONS))
        fingerprints.add(PackedSet.open(out).fingerprint)
        assert append(tables[1], out, **OPTIONS).clips == 48
        assert files(out) == files(grown), step
    assert fingerprints == {PackedSet.open(directory).fingerprint for directory in (base, grown)}
    assert step > 9  # bad.csv, notes.csv and dataset.json, 3 each


def test_two_tables_at_once(tables: tuple[Path, Path], base: Path, out: Path) -> None:
    """The later command ends in one line; run again, it packs nothing twice."""
    one, other = lines_of(tables[1], 30, 40), lines_of(tables[1], 41, NUM_ALL)
    third = out / ".shard-0123456789ab.h5.0123abcd.tmp"
    third.write_bytes(b"of an append that goes on")
    with (
        in_the_middle(lambda: append(one, out, **OPTIONS)),
        pytest.raises(UserError, match="another --append.*run the same command again") as caught,
    ):
        append(other, out, **OPTIONS)
    assert "\n" not in str(caught.value)
    assert PackedSet.open(out).num_clips == 29 + 10 and verify(out).damaged == ()
    summary = append(other, out, **OPTIONS)
    assert (summary.clips, summary.appended_clips, summary.resumed_clips) == (29 + 10 + 9, 9, 9)
    wanted = [f"{i:04d}" for i in range(NUM_ALL) if i not in (10, 40)]
    assert [Path(path).stem for path, _ in rows(out)[1]] == wanted
    assert verify(out).damaged == () and third.exists()


def mended(tmp_path: Path) -> tuple[Path, Path, Callable[[], int]]:
    """A table of eight files with two bad ones, its set, and how many the first command sees
    changed."""
    table, out = write_table(tmp_path, 8), tmp_path / "set"
    (tmp_path / "whole").mkdir()
    for name in ("0002.wav", "0003.flac"):
        (tmp_path / "audio" / name).rename(tmp_path / "whole" / name)
        (tmp_path / "audio" / name).write_bytes(b"")

    def num_changed() -> int:
        summary = pack(table, out, clip_seconds=0.5, workers=1, max_bad=0.5)
        assert not summary.resumed_clips or summary.already_packed
        return summary.changed_bad

    assert num_changed() == 0
    return table, out, num_changed


def test_mended_files_are_packed(tmp_path: Path) -> None:
    table, out, num_changed = mended(tmp_path)
    shutil.copy(tmp_path / "whole" / "0002.wav", tmp_path / "audio")
    assert num_changed() == 1
    summary = append(table, out, **OPTIONS)
    assert (summary.appended_clips, summary.known_bad) == (1, 1)
    assert listed(out) == ["0003.flac"] and num_changed() == 0
    before = files(out)
    assert append(table, out, **OPTIONS).known_bad == 1
    assert files(out) == before


def test_a_file_is_bad_again_and_mended_later(tmp_path: Path) -> None:
    """Each append has the same lines of the table, and must leave the shards that the set has."""
    table, out, num_changed = mended(tmp_path)
    file = tmp_path / "audio" / "0003.flac"
    for content in (b"fLaC", b"fLaC, but longer"):
        file.write_bytes(content)
        assert num_changed() == 1
        summary = append(table, out, workers=1, max_bad=1.0)
        assert (summary.appended_clips, summary.bad_reasons) == (0, {"unreadable": 1})
        assert listed(out) == ["0002.wav", "0003.flac"] and num_changed() == 0
        assert append(table, out, **OPTIONS).known_bad == 2
        assert verify(out).damaged == ()
    shutil.copy(tmp_path / "whole" / "0003.flac", file)
    before = files(out)
    summary = append(table, out, **OPTIONS)
    assert (summary.appended_clips, summary.clips) == (1, 7) and listed(out) == ["0002.wav"]
    assert [Path(path).name for path, _ in rows(out)[1]].count("0003.flac") == 1
    assert verify(out).damaged == ()
    now = files(out)
    assert all(now[name] == before[name] for name in before if name.endswith(".h5"))


@pytest.mark.parametrize("part", [None, Part(0, 2)])
def test_too_many_are_bad(
    tables: tuple[Path, Path], grown: Path, out: Path, tmp_path: Path, part: Part | None
) -> None:
    """They are listed beside the set, which stays; a corrected table may follow."""
    wrong = tmp_path / "wrong.csv"
    head, *lines = tables[1].read_text().splitlines()
    junk = [tmp_path / f"junk{i}.wav" for i in range(4)]
    for path in junk:
        path.write_bytes(b"junk")
    wrong.write_text("\n".join([head, *(f"{path},a,s" for path in junk), *lines]) + "\n")
    before = files(out)
    with pytest.raises(UserError, match="files are bad, more than --max-bad 0.1") as caught:
        append(wrong, out, audio=tables[1].parent / "audio", part=part, **OPTIONS)
    assert str(out / "bad-append.csv") in str(caught.value)
    assert "junk2.wav" in listed(out, "bad-append.csv")
    assert {name: files(out)[name] for name in before} == before
    assert append(tables[1], out, **OPTIONS).appended_clips == 19
    assert {name: files(out)[name] for name in files(grown)} == files(grown)
    assert not (out / "bad-append.csv").exists()


def test_too_many_are_bad_in_parts_at_once(tmp_path: Path) -> None:
    """One of four a part, and together two of eight; with one mended the same command goes on."""
    _, out, _ = mended(tmp_path)
    more = write_table(tmp_path / "more", 8)
    first = more.parent / "audio" / "0000.wav"
    whole = first.read_bytes()
    for path in (first, first.with_name("0004.wav")):
        path.write_bytes(b"")
    parts = [partial(append, more, out, part=Part(i, 2), workers=1, max_bad=0.2) for i in range(2)]
    before = files(out)
    with in_the_middle(parts[1]), pytest.raises(UserError, match="2 of 8 files are bad"):
        parts[0]()
    assert listed(out, "bad-append.csv") == ["0000.wav", "0004.wav"]
    assert {name: files(out)[name] for name in before} == before
    first.write_bytes(whole)
    summary = append(more, out, workers=1, max_bad=0.2)
    assert (summary.appended_clips, summary.resumed_clips, summary.bad) == (7, 3, 1)
    assert listed(out) == ["0002.wav", "0003.flac", "0004.wav"]


def write_clipped(path: Path) -> None:
    """A float file with a sample beyond full scale, which is packed and noted."""
    x = noise(0.5, 16_000, 1)
    x[100] = 1.5
    sf.write(path, x, 16_000, subtype="FLOAT")


def write_noted(folder: Path, *names: str) -> Path:
    """A table of clipped files."""
    folder.mkdir(exist_ok=True)
    for name in names:
        write_clipped(folder / name)
    table = folder / f"{names[-1]}.csv"
    table.write_text("path,label\n" + "".join(f"{name},a\n" for name in names))
    return table


def test_noted_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """notes.csv has those of the whole set, the summary those that were appended."""
    audio, out = tmp_path / "audio", tmp_path / "set"
    pack(write_noted(audio, "a.wav", "b.wav"), out, clip_seconds=0.5, workers=1)
    table = write_noted(audio, "a.wav", "c.wav")
    summary = append(table, out, workers=1)
    assert (summary.appended_clips, summary.notes) == (1, {"clipped": 1})
    print_appended(summary, as_json=False)
    assert "noted files: 1 (1 clipped)" in capsys.readouterr().out
    summary = append(table, out, workers=1)
    assert (summary.appended_clips, summary.notes) == (0, {})
    print_appended(summary, as_json=False)
    assert "noted files" not in capsys.readouterr().out
    assert listed(out, "notes.csv") == ["a.wav", "b.wav", "c.wav"]


def test_segments_and_labels_are_the_sets(tmp_path: Path) -> None:
    for name, seconds in (("one", 1.7), ("two", 2.6)):
        (tmp_path / name / "x").mkdir(parents=True)
        sf.write(tmp_path / name / "x" / f"{name}.wav", noise(seconds, 16_000, 3), 16_000)
    (tmp_path / "two" / "y").mkdir()
    sf.write(tmp_path / "two" / "y" / "y.wav", noise(1.0, 16_000, 4), 16_000)
    out = tmp_path / "set"
    pack(tmp_path / "one", out, clip_seconds=0.5, segments=True, workers=1)
    with pytest.raises(UserError, match="1 of 2 files are bad.*1 label unknown"):
        append(tmp_path / "two", out, workers=1)
    assert listed(out, "bad-append.csv") == ["y.wav"]
    summary = append(tmp_path / "two", out, workers=1, max_bad=0.5)
    assert (summary.appended_clips, summary.bad) == (5, 1)
    starts = [start for _, start in rows(out)[1]]
    assert starts == [0, 0.5, 1.0, 0, 0.5, 1.0, 1.5, 2.0]


def test_codecs_of_further_shards(tables: tuple[Path, Path], grown: Path, out: Path) -> None:
    """Given, it is that; else that of the shards before."""
    append(lines_of(tables[1], 30, 40), out, codec="flac", **OPTIONS)
    append(tables[1], out, **OPTIONS)
    index = json.loads((out / "dataset.json").read_text())
    assert index["codec"] == "mixed"
    assert [shard["codec"] for shard in index["shards"]] == ["pcm16"] * 8 + ["flac"] * (3 + 3)
    assert np.array_equal(rows(out)[0], rows(grown)[0]) and verify(out).damaged == ()


def test_a_set_without_audio(tables: tuple[Path, Path], grown: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    pack(tables[0], out, clip_seconds=0.5, codec="none", **OPTIONS)
    with pytest.raises(UserError, match="was packed with --codec none"):
        append(tables[1], out, codec="pcm16", **OPTIONS)
    assert append(tables[1], out, **OPTIONS).clips == 48
    packed, other = PackedSet.open(out), PackedSet.open(grown)
    assert (packed.codec, packed.stats) == ("none", other.stats)
    assert packed.sources(np.arange(48)) == other.sources(np.arange(48))


def test_what_does_not_fit_is_refused(tables: tuple[Path, Path], out: Path, tmp_path: Path) -> None:
    labels = tmp_path / "labels.csv"
    labels.write_text("index,mid,display_name\n0,b,B\n1,a,A\n2,c,C\n")
    before = files(out)
    for options, message in (
        ({"clip_seconds": 1.0}, "--clip-seconds: expected 0.5 as in .*, got 1"),
        ({"clip_seconds": float("nan")}, "--clip-seconds: expected 0.1 to 1000.0, got nan"),
        ({"segments": True}, "--segments: .* was packed without"),
        ({"codec": "mp3"}, "--codec: expected pcm16, flac or none, got mp3"),
        ({"codec": "none"}, "--codec none: .* was packed with --codec pcm16"),
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
    assert append(tables[0], out, labels=labels, clip_seconds=0.5).appended_clips == 0
    assert files(out) == before and not (tmp_path / "nowhere").exists()
