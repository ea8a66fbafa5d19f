"""Names of files and classes that are not UTF-8, that the terminal cannot show, or that would break
a line: every name that gets into a set gets out of it again."""

import csv
import io
import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import soundfile as sf

from fastat.cli import app as cli
from fastat.data.shards import PackedSet
from fastat.evaluation.predictions import read_predictions
from fastat.packing.pack import pack
from fastat.system.errors import UserError, one_line
from fastat.weights.checkpoint import load_meta
from tests.conftest import QUIET, TINY_MODEL

LATIN = os.fsdecode(b"caf\xe9")
CLASSES = (LATIN, "naïve 中文", "two\nlines", "\x1b[31m[red]$x$ <b>&")
CLIPS = (f"{LATIN} ", "新", "nl\n", "cr\r\n", "\x1b[2J", "two  spaces", '$c,o"mma_')
RATE, SECONDS = 16_000, 0.5
LINE_ENDS = re.compile(r"[\n\r]")


@pytest.fixture(autouse=True, scope="module")
def messages_stay_out_of_reports() -> Iterator[None]:
    """What pytest captures of the log goes to another process, which takes UTF-8 alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logging.getLogger("fastat"), "propagate", False)
        yield


class Named(NamedTuple):
    """A set of clips with odd names, packed and trained on, in folders with odd names."""

    audio: Path
    packed: Path
    run: Path

    @property
    def clips(self) -> list[Path]:
        """Those of one class."""
        return sorted((self.audio / CLASSES[0]).iterdir())


def fastat(
    *args: object,
    code: int = 0,
    encoding: str = "utf-8",
    main: Callable[[], object] = cli.main,
) -> tuple[str, str]:
    """Runs the command in this process, as on a terminal of that encoding: its standard output and
    error."""
    streams = [io.TextIOWrapper(io.BytesIO(), encoding, "strict") for _ in range(2)]
    with (
        pytest.MonkeyPatch.context() as patch,
        redirect_stdout(streams[0]),
        redirect_stderr(streams[1]),
    ):
        patch.setattr(sys, "argv", ["fastat", *map(str, args)])
        patch.setenv("COLUMNS", QUIET["COLUMNS"])
        with pytest.raises(SystemExit) as stop:
            main()
    for stream in streams:
        stream.flush()
    out, err = (stream.buffer.getvalue() for stream in streams)
    return checked(int(stop.value.code or 0), out, err, code)


def fastat_in_c_locale(*args: object, code: int = 0) -> tuple[str, str]:
    """Runs the command in a process of its own, where names of files are not UTF-8 either."""
    env = os.environ | QUIET | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-m", "fastat.cli", *map(str, args)]
    done = subprocess.run(command, capture_output=True, env=env, timeout=300)
    return checked(done.returncode, done.stdout, done.stderr, code)


def checked(returned: int, stdout: bytes, stderr: bytes, code: int) -> tuple[str, str]:
    """What a command printed; bytes that are no text are kept in a str."""
    out, err = os.fsdecode(stdout), os.fsdecode(stderr)
    assert returned == code and "Traceback" not in err, f"{returned}\n{out}\n{err}"
    return out, err


def train(named: Named | tuple[Path, Path], out: Path, *more: object, code: int = 0) -> str:
    sizes = ("--epochs", 1, "--batch", 8, "--no-pretrained")
    args = ("--proc", "A4", "--model", "cnn_trans", *TINY_MODEL, *sizes, *more)
    return fastat("train", *args, "--data", named[1], "--out", out, code=code)[1]


@pytest.fixture(scope="module")
def named(tmp_path_factory: pytest.TempPathFactory) -> Named:
    root = tmp_path_factory.mktemp("named") / f"{LATIN} ü"
    rng = np.random.default_rng(0)
    t = np.arange(int(SECONDS * RATE)) / RATE
    for k, name in enumerate(CLASSES):
        (root / "audio" / name).mkdir(parents=True)
        for clip in CLIPS:
            wave = 0.3 * np.sin(2 * np.pi * 300 * (k + 1) * t) + 0.01 * rng.standard_normal(len(t))
            with (root / "audio" / name / f"{clip}{k}.wav").open("wb") as file:
                sf.write(file, wave, RATE, format="WAV")
    pack(root / "audio", root / "set", clip_seconds=SECONDS, workers=1)
    train((root, root / "set"), root / "run", "--eval", root / "set")
    return Named(root / "audio", root / "set", root / "run")


def test_a_run_and_its_scores_keep_every_name(named: Named, tmp_path: Path) -> None:
    out = tmp_path / LATIN
    outputs = ("--predictions", f"{out}.h5", "--per-class", f"{out}.csv")
    fastat("eval", named.run, "--data", named.packed, *outputs)
    packed = PackedSet.open(named.packed)
    assert [c.id for c in packed.classes] == sorted(CLASSES)
    assert load_meta(named.run / "checkpoints" / "best").classes == packed.classes
    names = packed.names(np.arange(packed.num_clips))
    for scores in (read_predictions(named.run), read_predictions(Path(f"{out}.h5"))):
        assert sorted(scores.names) == sorted(names)
        assert scores.ids == scores.class_names == [c.id for c in packed.classes]
    with open(f"{out}.csv", newline="", encoding="utf-8", errors="surrogateescape") as file:
        assert [row["name"] for row in csv.DictReader(file)] == [c.name for c in packed.classes]
    shown, _ = fastat("compare", named.run, f"{out}.h5", "--resamples", 100)
    assert all(one_line(name) in shown for name in CLASSES)
    shown, _ = fastat("compare", named.run, f"{out}.h5", "--resamples", 100, "--json")
    document = json.loads(shown)
    assert {change["name"] for change in document["changes"]} == set(CLASSES)
    fastat("report", named.run, "--out", f"{out}.html")
    page = Path(f"{out}.html").read_text("utf-8")
    assert json.dumps(CLASSES[1]) in page and json.dumps(CLASSES[0]) in page


def test_a_run_goes_on_from_such_a_folder(named: Named, tmp_path: Path) -> None:
    train(named, tmp_path / LATIN, "--init", named.run, "--source", "dali", "--steps", 2)
    fastat("train", "--resume", "--out", tmp_path / LATIN)


def test_a_step_that_is_not_finite_names_its_clips(named: Named, tmp_path: Path) -> None:
    out = tmp_path / LATIN
    err = train(named, out, "--lr", "1e30", "--precision", "fp32", "--no-mixup", code=1)
    message = err.splitlines()[-1]
    assert message.startswith("fastat: ")
    packed = PackedSet.open(named.packed)
    names = packed.names(np.arange(packed.num_clips))
    assert any(one_line(name) in message for name in names)


TERMINALS: dict[str, Callable[..., tuple[str, str]]] = {
    "utf-8": fastat,
    "ascii": partial(fastat, encoding="ascii"),
    "C": fastat_in_c_locale,
}


@pytest.mark.parametrize("terminal", TERMINALS)
def test_every_terminal_takes_every_name(named: Named, terminal: str, tmp_path: Path) -> None:
    fastat = TERMINALS[terminal]
    shown, _ = fastat("predict", named.run, *named.clips, "--top", 4)
    heads = [line for line in shown.split("\n") if line and not line.startswith("  ")]
    assert len(heads) == len(CLIPS) and "\x1b" not in shown
    assert any("two  spaces" in head for head in heads)
    if terminal == "utf-8":
        paths = [one_line(str(path)) for path in named.clips]
        assert [head.partition("  (0:00.5")[0] for head in heads] == paths
    text, err = fastat("predict", named.run, *named.clips, "--plot", tmp_path / "p.png", "--json")
    files = [os.fsencode(item["file"]) for item in json.loads(text)]
    assert files == [os.fsencode(path) for path in named.clips]
    assert "Warning" not in err and len(list(tmp_path.glob("*.png"))) == len(CLIPS)


@pytest.mark.parametrize("terminal", TERMINALS)
def test_a_bad_file_is_one_line_whatever_its_name(
    named: Named, terminal: str, tmp_path: Path
) -> None:
    fastat = TERMINALS[terminal]
    bad = tmp_path / f"{LATIN}\n\x1b[2J.wav"
    bad.write_text("text")
    out, err = fastat("predict", named.run, bad, code=1)
    assert out == "" and err.count("\n") == 1 and "\x1b" not in err and f"/{LATIN} " in err
    _, err = fastat("predict", named.run, f"{bad}2", code=2)
    assert err.count("\n") == 1 and "does not exist" in err


@pytest.mark.parametrize("label", ["a\0b", "\ud83d"])
def test_a_class_that_no_file_can_hold_is_refused(label: str, tmp_path: Path) -> None:
    sf.write(tmp_path / "a.wav", np.zeros(8000), RATE)
    data = [{"wav": str(tmp_path / "a.wav"), "labels": label}]
    (tmp_path / "data.json").write_text(json.dumps({"data": data}))
    with pytest.raises(UserError, match="NUL character or half"):
        pack(tmp_path / "data.json", tmp_path / "set", workers=1)


def test_the_curves_of_a_run_in_such_a_folder(named: Named) -> None:
    assert any(path.stat().st_size for path in (named.run / "tb").iterdir())
