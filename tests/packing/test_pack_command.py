"""The command line of fastat pack: parts, appending and verifying; mistakes in one line."""

import csv
import json
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import soundfile as sf

from fastat.cli.app import main
from fastat.cli.pack_report import duration
from fastat.data.shards import PackedSet
from tests.data.audio import noise, write_table


class Done(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


Command = Callable[..., Done]


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Twelve files; one is empty."""
    path = write_table(tmp_path, 12)
    (path.parent / "audio" / "0004.wav").write_bytes(b"")
    return path


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever started the tests."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def fastat_pack(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """``fastat pack`` in this process."""

    def command(*args: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["fastat", "pack", *map(str, args)])
        with pytest.raises(SystemExit) as caught:
            main()
        assert isinstance(caught.value.code, int)
        return Done(caught.value.code, *capsys.readouterr())

    return command


def test_parts(
    table: Path, tmp_path: Path, fastat_pack: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = (table, "--out", tmp_path / "set", "--clip-seconds", 0.5, "--max-bad", 0.1)
    done = fastat_pack(*options, "--shard", "1/3")
    assert done.code == 0
    assert done.out == (
        "part 1/3 (--shard, or RANK and WORLD_SIZE) is packed, 3 clips; waiting for 2 others: "
        "0, 2\n"
        "bad files: 1 (1 empty)\n"
    )
    done = fastat_pack(*options, "--shard", "0/3", "--json")
    summary = json.loads(done.out)
    assert (summary["part"], summary["waiting_for"], summary["clips"]) == ("0/3", [2], 4)
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "3")
    done = fastat_pack(*options)
    assert done.code == 0 and done.out.startswith("packed: 11 clips in 3 shards")
    assert f"listed in {tmp_path / 'set' / 'bad.csv'}" in done.out
    assert fastat_pack(*options).out.startswith("already packed: 11 clips")


def test_append_and_verify(table: Path, tmp_path: Path, fastat_pack: Command) -> None:
    lines = table.read_text().splitlines(keepends=True)
    table.write_text("".join(lines[:9]))
    out = tmp_path / "set"
    assert fastat_pack(table, "--out", out, "--clip-seconds", 0.5, "--max-bad", 0.2).code == 0
    table.write_text("".join(lines))
    done = fastat_pack(table, "--out", out, "--append")
    first, holds, *others = done.out.splitlines()
    assert first.startswith(f"appended: 4 clips, {out} now has 11 in 3 shards")
    assert holds == "audio: 4.5 s, 3 classes, the rarest is b with 4 clips"
    assert others == ["already in the set: 7 files", "bad before and unchanged: 1 files of bad.csv"]
    done = fastat_pack(table, "--out", out, "--append")
    assert done.code == 0 and done.out.startswith(f"nothing new: {out} still has 11 clips\n")

    done = fastat_pack(out, "--verify")
    assert done.code == 0 and done.out.startswith("verified: 11 clips")
    path = out / "shard-00001.h5"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    done = fastat_pack(out, "--verify")
    assert done.code == 1 and done.out.startswith("shard-00001.h5, row ")
    assert done.err.splitlines()[-1].startswith(f"fastat: {out}: damaged: 1 row, 1 file")
    done = fastat_pack(out, "--verify", "--json")
    assert done.code == 1 and json.loads(done.out)["damaged"][0]["file"] == "shard-00001.h5"


def test_a_repaired_file_is_noticed(table: Path, tmp_path: Path, fastat_pack: Command) -> None:
    options = (table, "--out", tmp_path / "set", "--clip-seconds", 0.5, "--max-bad", 0.1)
    fastat_pack(*options)
    assert "changed since" not in fastat_pack(*options).out
    audio = table.parent / "audio"
    (audio / "0004.wav").write_bytes((audio / "0002.wav").read_bytes())
    assert "changed since: 1 of the bad files; --append" in fastat_pack(*options).out


def test_the_last_lines_say_what_the_set_holds(tmp_path: Path, fastat_pack: Command) -> None:
    """Seconds are those of the audio, not of the rows; both lists of bad files are named."""
    audio = tmp_path / "audio"
    audio.mkdir()
    lines = ["filename\tscene_label\tfold"]
    for i in range(9):
        label = ("tram", "park, large", "tram")[i % 3]
        lines.append(f"{i}.wav\t{label}\t{1 + i // 6}")
        sf.write(audio / f"{i}.wav", noise(0.25 * (1 + i % 2), 16_000, i), 16_000)
    (audio / "3.wav").write_bytes(b"")
    (audio / "8.wav").unlink()
    table = tmp_path / "meta.tsv"
    table.write_text("\n".join(lines) + "\n")
    out, held = tmp_path / "set", tmp_path / "set-eval"
    options = (table, "--out", out, "--clip-seconds", 1, "--max-bad", 0.5, "--holdout", "fold=2")
    for _ in range(2):  # the second time it is packed already
        done = fastat_pack(*options)
        assert done.code == 0
        assert "packed: 5 clips" in done.out
        assert "1.8 s, 2 classes" in done.out  # 1.75
        assert "park, large with 2 clips" in done.out
        assert f"held out: 2 clips, 0.8 s, {held}" in done.out
        assert f"{out / 'bad.csv'} and {held / 'bad.csv'}" in done.out
        summary = json.loads(fastat_pack(*options, "--json").out)
        assert (summary["audio_seconds"], summary["eval_audio_seconds"]) == (1.75, 0.75)
        assert (summary["clips"], summary["eval_clips"], summary["num_classes"]) == (5, 2, 2)
        assert summary["rarest"] == {"id": "park, large", "name": "park, large", "clips": 2}
        assert summary["bad_lists"] == [str(out / "bad.csv"), str(held / "bad.csv")]
    assert json.loads((out / "dataset.json").read_text())["seconds"] == 1.75
    assert json.loads((held / "dataset.json").read_text())["seconds"] == 0.75
    assert PackedSet.open(held).names(np.arange(2)) == ["6.wav", "7.wav"]


def test_too_many_bad_files_in_both_parts(tmp_path: Path, fastat_pack: Command) -> None:
    """What is known before decoding fails at once, and both lists are named."""
    table = tmp_path / "t.csv"
    table.write_text("path,label,fold\n" + "".join(f"{i}.wav,a,{i % 2}\n" for i in range(40)))
    for i in range(6, 40):
        sf.write(tmp_path / f"{i}.wav", noise(0.25, 16_000, i), 16_000)
    out, held = tmp_path / "set", tmp_path / "set-eval"
    options = (table, "--out", out, "--clip-seconds", 0.5, "--holdout", "fold=1")
    done = fastat_pack(*options, "--max-bad", 0.1)
    assert done.code == 2
    assert str(out / "bad.csv") in done.err and str(held / "bad.csv") in done.err
    for directory in (out, held):
        assert len((directory / "bad.csv").read_text().splitlines()) == 4
        assert not list(directory.glob("shard-*"))
    done = fastat_pack(*options, "--max-bad", 0.2)
    assert done.code == 0 and "packed: 17 clips" in done.out and "held out: 17 clips" in done.out


def test_columns_by_name(tmp_path: Path, fastat_pack: Command) -> None:
    table = write_table(tmp_path, 6)
    table.write_text(table.read_text().replace("path,labels", "clip,genres").replace(";", "|"))
    columns = ("--path-column", "clip", "--label-column", "genres", "--label-separator", "|")
    out = ("--out", tmp_path / "set", "--clip-seconds", 0.5)
    done = fastat_pack(table, *out, *columns, "--json")
    assert done.code == 0 and json.loads(done.out)["num_classes"] == 3
    done = fastat_pack(table, *out[:2], *columns, "--append")
    assert done.code == 0 and "already in the set: 6 files" in done.out
    done = fastat_pack(table, *out, "--path-column", "wav")
    assert done.code == 2 and "clip, genres, source" in done.err


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"), (59.94, "59.9 s"), (59.96, "1 min 0 s"), (245, "4 min 5 s"),
        (3599.6, "1 h 0 min"), (20_835_720, "5,787 h 42 min"),
    ],
)  # fmt: skip
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_mistakes_are_one_line(table: Path, tmp_path: Path, fastat_pack: Command) -> None:
    out = ("--out", tmp_path / "set")
    for args, message in (
        ((table,), "pack needs --out DIR"),
        ((table, *out, "--shard", "3/3"), "--shard: expected i/n, from 0/n to (n-1)/n, got 3/3"),
        ((table, *out, "--verify"), "--verify: expected the packed set alone, got --out too"),
        (
            (tmp_path, "--verify", "--shard", "0/2", "--json", "--append", "--max-bad", 0.01),
            "--verify: expected the packed set alone, got --append, --max-bad, --shard too",
        ),
        ((tmp_path, "--verify"), "found no dataset.json"),
        ((table, *out, "--append"), "expected the folder of a packed set, found none"),
        ((table, *out, "--append", "--holdout", 0.2), "--append adds to one set"),
        ((table, *out, "--holdout", "x=1", "--group-by", "source"), "--group-by"),
        ((table, *out, "--holdout", "half"), "--holdout: expected a fraction"),
        ((table, *out, "--label-separator", ""), "--label-separator"),
        ((table, *out, "--append", "--seed", 3), "--append draws nothing at random"),
    ):
        done = fastat_pack(*args)
        assert done.code == 2 and message in done.err and done.out == ""
        assert len(done.err.splitlines()) == 1
    assert not (tmp_path / "set").exists()


def test_noted_files_are_counted_and_listed(tmp_path: Path, fastat_pack: Command) -> None:
    """Stale headers, floats that clip, and files without a header, in both sets and an append."""

    def write(folder: Path) -> None:
        folder.mkdir(parents=True)
        for i in range(4):
            sf.write(folder / f"{i}.wav", noise(0.5, 16_000, i), 16_000)
        clipped = noise(0.5, 16_000, 9)
        clipped[10:14] = 2.0
        sf.write(folder / "clipped.wav", clipped, 16_000, subtype="FLOAT")
        data = (folder / "0.wav").read_bytes()
        (folder / "stale.wav").write_bytes(data[:40] + struct.pack("<I", 4000) + data[44:])
        (folder / "pcm.raw").write_bytes(bytes(2000))

    sounds, out = tmp_path / "sounds", tmp_path / "set"
    for label in ("a", "b", "c", "d"):
        write(sounds / label)
    args = (sounds, "--out", out, "--clip-seconds", 1, "--max-bad", 0.2, "--holdout", 0.4)
    done = fastat_pack(*args)
    assert done.code == 0, done.err
    assert "noted files: 8 (" in done.out and "4 wrong length" in done.out
    assert "4 clipped" in done.out and "bad files: 4 (4 unreadable)" in done.out
    lists = [tmp_path / name / "notes.csv" for name in ("set", "set-eval")]
    listed = [line for path in lists for line in csv.DictReader(path.open())]
    assert sorted((Path(line["path"]).name, line["note"]) for line in listed) == [
        *[("clipped.wav", "clipped")] * 4,
        *[("stale.wav", "wrong length")] * 4,
    ]
    for path in lists:
        assert str(path) in done.out
    whole = PackedSet.open(out)
    assert (whole.num_samples == 8000).all()
    whole.close()
    assert json.loads(fastat_pack(*args, "--json").out)["notes"] == {
        "clipped": 4,
        "wrong length": 4,
    }

    write(tmp_path / "more" / "a")
    before = len(list(csv.DictReader(lists[0].open())))
    more = fastat_pack(tmp_path / "more", "--out", out, "--append", "--max-bad", 0.2, "--json")
    assert more.code == 0 and sum(json.loads(more.out)["notes"].values()) == 2
    assert len(list(csv.DictReader(lists[0].open()))) == before + 2
