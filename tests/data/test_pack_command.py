"""The command line of fastat pack: parts, appending and verifying; mistakes in one line."""

import json
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from fastat.cli import main
from tests.data.audio import write_table


class Done(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


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
def fastat_pack(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> "Command":
    return Command(monkeypatch, capsys)


class Command:
    """``fastat pack`` in this process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch, self.capsys = monkeypatch, capsys

    def __call__(self, *args: object) -> Done:
        self.monkeypatch.setattr(sys, "argv", ["fastat", "pack", *map(str, args)])
        with pytest.raises(SystemExit) as caught:
            main()
        assert isinstance(caught.value.code, int)
        out, err = self.capsys.readouterr()
        return Done(caught.value.code, out, err)


def test_parts(table: Path, tmp_path: Path, fastat_pack: Command) -> None:
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
    fastat_pack.monkeypatch.setenv("RANK", "2")
    fastat_pack.monkeypatch.setenv("WORLD_SIZE", "3")
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
    assert done.out == (
        f"appended: 4 clips, {out} now has 11 in 2 shards; its statistics stay as they were\n"
        "already in the set: 7 files\n"
        "bad before and unchanged: 1 files of bad.csv\n"
    )
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
    assert done.err.splitlines()[-1].startswith(f"fastat: {out}: damaged: 1 of its files")
    done = fastat_pack(out, "--verify", "--json")
    assert done.code == 1 and json.loads(done.out)["damaged"][0]["file"] == "shard-00001.h5"


def test_a_repaired_file_is_noticed(table: Path, tmp_path: Path, fastat_pack: Command) -> None:
    options = (table, "--out", tmp_path / "set", "--clip-seconds", 0.5, "--max-bad", 0.1)
    fastat_pack(*options)
    assert "changed since" not in fastat_pack(*options).out
    audio = table.parent / "audio"
    (audio / "0004.wav").write_bytes((audio / "0002.wav").read_bytes())
    assert "changed since: 1 of the bad files; --append" in fastat_pack(*options).out


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
        ((table, *out, "--append", "--seed", 3), "--append draws nothing at random"),
    ):
        done = fastat_pack(*args)
        assert done.code == 2 and message in done.err and done.out == ""
        assert len(done.err.splitlines()) == 1
    assert not (tmp_path / "set").exists()
