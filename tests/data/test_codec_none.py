"""A set of codec none: everything but the audio, which DALI decodes from the original files."""

import json
import zlib
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from fastat.cli.app import main
from fastat.data.dali import DaliSource
from fastat.data.shards import PackedSet
from fastat.packing.pack import pack
from fastat.system.errors import UserError
from tests.conftest import TINY_MODEL, TinySets, write_tiny_audio

Run = Callable[..., int]


@pytest.fixture(scope="module")
def without_audio(tiny_sets: TinySets, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The training set, packed again from the same files."""
    out = tmp_path_factory.mktemp("none") / "set"
    pack(tiny_sets.audio, out, clip_seconds=1.0, codec="none", workers=1)
    return out


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    """Calls a command in this process; its exit code."""

    def call(*args: object) -> int:
        monkeypatch.setattr("sys.argv", ["fastat", *map(str, args)])
        with pytest.raises(SystemExit) as left:
            main()
        assert isinstance(left.value.code, int)
        return left.value.code

    return call


def train(data: Path, evaluation: Path, out: Path, *more: object) -> tuple[object, ...]:
    sets = ("--data", data, "--eval", evaluation, "--out", out, "--batch", 8)
    return ("train", "--proc", "A4", "--model", "cnn_trans", *TINY_MODEL, *sets, *more)


def row_crcs(directory: Path) -> list[int]:
    crcs: list[int] = []
    for path in sorted(directory.glob("shard-*.h5")):
        with h5py.File(path) as file:
            crcs += file["row_crc"][()].tolist()
    return crcs


def test_everything_but_the_audio_is_kept(tiny_sets: TinySets, without_audio: Path) -> None:
    ours, packed = PackedSet.open(without_audio), PackedSet.open(tiny_sets.train)
    rows = np.arange(packed.num_clips)
    audio = np.empty((len(rows), packed.clip_samples), np.int16)
    packed.read_rows(rows, audio)
    assert row_crcs(without_audio) == [zlib.crc32(row.tobytes()) for row in audio]
    assert np.array_equal(ours.num_samples, packed.num_samples)
    assert np.array_equal(ours.targets(rows), packed.targets(rows))
    assert ours.label_counts.tolist() == packed.label_counts.tolist()
    assert ours.names(rows) == packed.names(rows)
    assert ours.sources(rows) == packed.sources(rows)
    assert (ours.classes, ours.stats) == (packed.classes, packed.stats)
    saved = sum(
        (directory / path.name).stat().st_size * sign
        for directory, sign in ((tiny_sets.train, 1), (without_audio, -1))
        for path in without_audio.glob("shard-*.h5")
    )
    assert saved >= audio.nbytes


def test_dali_trains_and_scores_without_rows(
    tiny_sets: TinySets, without_audio: Path, tmp_path: Path, run: Run
) -> None:
    lines = []
    for data in (without_audio, tiny_sets.train):
        out = tmp_path / data.name
        assert run(*train(data, data, out, "--source", "dali", "--steps", 2)) == 0
        lines.append(json.loads((out / "metrics.jsonl").read_text()))
    for name in ("train_loss", "eval_loss", "mAP"):
        assert lines[0][name] == lines[1][name]


def test_what_needs_the_audio_is_refused_in_one_line(
    tiny_sets: TinySets,
    without_audio: Path,
    tmp_path: Path,
    run: Run,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, trained = tmp_path / "run", tmp_path / "trained"
    assert run(*train(tiny_sets.train, tiny_sets.eval, trained, "--steps", 1)) == 0
    capsys.readouterr()
    for command in (
        train(without_audio, tiny_sets.eval, out),
        train(tiny_sets.train, without_audio, out),
        train(tiny_sets.train, without_audio, out, "--cache", "host"),
        ("eval", trained, "--data", without_audio),
        ("landscape", trained, "--data", without_audio),
        ("profile", "--proc", "A4", "--model", "cnn_trans", "--data", without_audio),
    ):
        assert run(*command) == 2, command
        printed = capsys.readouterr()
        assert "--codec none" in printed.err and str(without_audio) in printed.err
        assert printed.err.count("\n") == 1 and not printed.out, command
        assert not out.exists()


def test_files_that_dali_cannot_take_are_not_to_be_read_from_the_set(tmp_path: Path) -> None:
    audio = write_tiny_audio(tmp_path / "audio", 3, seed=0)
    pack(audio, tmp_path / "set", clip_seconds=1.0, codec="none", workers=1)
    (audio / "buzz" / "buzz-0.wav").unlink()
    with pytest.raises(UserError, match=r"buzz-0\.wav") as error:
        DaliSource(
            PackedSet.open(tmp_path / "set"), None, batch=2, threads=1, device=torch.device("cpu")
        )
    assert "--source packed" not in str(error.value)
