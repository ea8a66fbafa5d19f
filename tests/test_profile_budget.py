"""fastat profile within a budget: what is ranked, what is kept, and the command for the best."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fastat.cli.app import app
from fastat.config.paper import TRAIN_CLIPS
from fastat.config.run import resolve
from fastat.study.profile.budget import rank, train_command
from fastat.study.profile.cases import Choice, at_paper_strides, choices
from fastat.study.profile.kept import kept_file, read_kept, write_kept
from fastat.study.profile.measure import PARTS, Measured, Spread
from fastat.study.profile.rows import Document
from fastat.study.profile.table import print_tables
from fastat.system.errors import Failure
from fastat.training import launch
from tests.conftest import QUIET, TinySets, fastat

STEP = Measured(dict.fromkeys(("data", *PARTS, "step"), Spread(3.0, 2.0, 4.0)), 5 << 30, 200.0)


def row(name: str, **values: Any) -> dict[str, Any]:
    """A row named as ``MODEL PROC``, that takes 3 h and 2 GiB."""
    model, proc = name.split()
    common: dict[str, Any] = {
        "model": model, "proc": proc, "fstride": None, "tstride": None, "batch": 448,
        "precision": "bf16", "compiled": False, "activation_checkpointing": False,
        "out_of_memory": False, "hours": 3.0, "hours_per_epoch": 0.3, "clips_per_s": 1.5,
        "peak_memory_gib": 2.0, "paper_map": 0.4, "ms": None,
    }  # fmt: skip
    return common | values


def document(*rows: dict[str, Any], **values: Any) -> Document:
    common: dict[str, Any] = {
        "device": "A device", "device_type": "cpu", "torch": "2.15.0", "ceiling_tflops": 0.4,
        "clips": TRAIN_CLIPS, "rows": list(rows),
    }  # fmt: skip
    return common | values


ROWS = (
    row("resnet50 A4", paper_map=0.37, hours=1.0, peak_memory_gib=1.0),
    row("crnn A4", paper_map=0.406, hours=5.0, peak_memory_gib=3.0),
    row("crnn A2", paper_map=0.406, hours=4.0, peak_memory_gib=3.0),
    row("cnn_trans A4", paper_map=0.411, hours=9.0, peak_memory_gib=2.0),
    row("resnet34 A2", paper_map=None, hours=2.0, peak_memory_gib=0.5),
    row("resnet34 A4", paper_map=None, hours=1.0, peak_memory_gib=0.5),
    row("conformer A4", paper_map=0.308, hours=None, peak_memory_gib=None, out_of_memory=True),
)


@pytest.mark.parametrize(
    ("hours", "gib", "ranking", "unranked"),
    [
        (100.0, None, [3, 2, 1, 0], [5, 4]),
        (None, 100.0, [3, 2, 1, 0], [5, 4]),
        (9.0, None, [3, 2, 1, 0], [5, 4]),
        (8.9, None, [2, 1, 0], [5, 4]),
        (None, 2.0, [3, 0], [5, 4]),
        (4.5, 2.5, [0], [5, 4]),
        (1.5, 0.6, [], [5]),
        (0.5, None, [], []),
    ],
)
def test_what_fits_is_ranked_by_map_then_hours(
    hours: float | None, gib: float | None, ranking: list[int], unranked: list[int]
) -> None:
    found = rank(document(*ROWS), hours, gib, None)
    assert (found["ranking"], found["unranked"]) == (ranking, unranked)
    assert (found["hours"], found["memory_gib"]) == (hours, gib)
    if ranking:
        assert f"--model {ROWS[ranking[0]]['model']}" in found["command"]
    else:
        assert found["command"] is None


def test_the_ast_at_the_strides_that_have_an_map() -> None:
    def strides(proc: str, *settings: str) -> list[int | None]:
        [choice] = choices([proc], ["ast"], None, settings)
        return [c.options.get("fstride") for c in at_paper_strides(choice)]

    assert strides("A1") == [10, 12, 16] and strides("A2") == [10] and strides("A4") == [8]
    assert strides("A3") == [4, 6, 8, 10, 12, 16]
    assert strides("A3", "model.size=tiny224") == [None]
    [checkpointed] = at_paper_strides(Choice("ast", "A4", {"activation_checkpointing": True}))
    assert checkpointed.options["activation_checkpointing"]
    assert at_paper_strides(Choice("crnn", "A4")) == [Choice("crnn", "A4")]


# ---------------------------------------------------------------------------- the command
@pytest.mark.parametrize(
    ("device", "changed", "want"),
    [
        ("cpu", {}, "--precision bf16"),
        ("cpu", {"batch": 4}, "--batch 4 --precision bf16"),
        ("cuda", {"compiled": True}, "--precision bf16"),
        ("cuda", {}, "--precision bf16 --no-compile"),
        ("cpu", {"compiled": True, "precision": "fp32"}, "--precision fp32 --compile"),
        (
            "cpu",
            {"activation_checkpointing": True},
            "--precision bf16 --set model.activation_checkpointing=true",
        ),
        ("cpu", {"fstride": 6, "tstride": 10}, "--stride 6x10 --precision bf16"),
    ],
)
def test_the_command_trains_what_was_measured(
    device: str, changed: dict[str, Any], want: str
) -> None:
    shown = document(device_type=device)
    found = train_command(row("crnn A4", **changed), shown, None)
    rest = "--data packed/train --eval packed/eval"
    assert found == f"fastat train --proc A4 --model crnn {want} {rest}"
    found = train_command(row("crnn A4", **changed), shown, Path("my set"))
    assert shlex.split(found)[-2:] == ["--data", "my set"]


def test_a_small_set_needs_no_batch() -> None:
    """``fastat train`` takes the small batch by itself."""
    assert "--batch" not in train_command(row("crnn A4", batch=4), document(clips=1280), None)
    assert "--batch 448" in train_command(row("crnn A4"), document(clips=1280), None)


@pytest.mark.parametrize("clips", [1280, TRAIN_CLIPS])
def test_fastat_train_takes_every_command(clips: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """And makes the row's step of it."""
    given: list[Any] = []

    def run_training(*args: Any, **options: Any) -> int:
        given.append(args)
        return 0

    monkeypatch.setattr(launch, "run_training", run_training)
    cases = [c for choice in choices([], [], None, []) for c in at_paper_strides(choice)]
    for choice in cases:
        f, t = (choice.options.get(name) for name in ("fstride", "tstride"))
        made = row(f"{choice.model} {choice.proc}", fstride=f, tstride=t, batch=4)
        command = train_command(made, document(clips=clips), None)
        done = CliRunner().invoke(app, shlex.split(command)[1:])
        assert done.exit_code == 0, done.output
        proc, model, overrides, _ = given.pop()
        overrides |= {name: str(overrides[name]) for name in ("data", "eval")}
        config = resolve(proc, model, overrides, num_clips=clips, clip_seconds=10.0)
        assert (config.proc, config.model, config.batch) == (choice.proc, choice.model, 4)
        assert config.model_options.get("fstride") == f
        assert config.precision == "bf16" and not config.compile


# ---------------------------------------------------------------------------- how it is shown
def printed(capsys: pytest.CaptureFixture[str], hours: float | None, gib: float | None) -> str:
    shown = document(*ROWS)
    shown["budget"] = rank(shown, hours, gib, None)
    print_tables(shown, strides=False)
    return capsys.readouterr().out


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, 4.5, 3.5)
    order = ["1. crnn A2", "2. resnet50 A4", "resnet34 A4", "resnet34 A2"]
    places = [text.index(name) for name in order]
    assert places == sorted(places)
    assert "cnn_trans A4" not in text.split("more than")[0]
    assert "more than 4.5 h: 2 of 7" in text and "5.00 h, crnn A4" in text
    assert "more than this device's memory: 1" in text
    assert text.rstrip().endswith("--data packed/train --eval packed/eval")
    table = text.split("fastat train")[0]
    assert max(map(len, table.splitlines())) <= 120


def test_nothing_fits(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, 0.5, 0.1)
    assert "Nothing fits" in text and "fastat train" not in text
    assert "the least is 1.00 h, resnet50 A4" in text
    assert "the least is 0.50 GiB, resnet34 A2" in text


# ---------------------------------------------------------------------------- what is kept
@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FASTAT_CACHE", str(tmp_path))
    return tmp_path


def test_a_kept_step_comes_back(cache: Path) -> None:
    path = kept_file("a step", {"device": "a"})
    assert cache in path.parents
    assert read_kept(path) is None
    write_kept("a step", {"device": "a"}, STEP)
    assert read_kept(kept_file("a step", {"device": "a"})) == STEP
    write_kept("a step", {"device": "a"}, Measured(STEP.ms, 1, None))
    assert read_kept(path) == Measured(STEP.ms, 1, None)


def test_a_step_that_cannot_be_kept_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("FASTAT_CACHE", "/proc/nowhere")
    write_kept("a step", {}, STEP)
    assert "not kept" in caplog.text


def test_other_steps_and_devices_have_files_of_their_own(cache: Path) -> None:
    path = kept_file("a step", {"device": "a"})
    assert path != kept_file("another step", {"device": "a"})
    assert path != kept_file("a step", {"device": "b"})


@pytest.mark.parametrize("text", ["", "[]", '{"ms": {}}', '{"ms": 3}', "{"])
def test_a_damaged_step(cache: Path, text: str) -> None:
    path = kept_file("a step", {})
    write_kept("a step", {}, STEP)
    path.write_text(text)
    with pytest.raises(Failure, match=f"{path.name}.*damaged"):
        read_kept(path)


def test_the_command(tiny_sets: TinySets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(QUIET, "FASTAT_CACHE", str(tmp_path))
    asked = (
        "profile", "--proc", "A4", "--model", "cnn_trans", "--model", "crnn",
        "--data", tiny_sets.train, "--seconds", 0.1,
    )  # fmt: skip
    first = fastat(*asked, "--memory-gib", 100, "--json")
    assert "2 steps" in first.stderr
    found = json.loads(first.stdout)
    assert found["clips"] == 36, "the set's, which the command trains on"
    assert found["budget"]["ranking"] == [0, 1] and found["budget"]["hours"] is None
    assert str(tiny_sets.train) in found["budget"]["command"]

    again = fastat(*asked, "--memory-gib", 100, "--json")
    assert again.stderr == "", "nothing is measured again"
    assert [r["ms"] for r in json.loads(again.stdout)["rows"]] == [r["ms"] for r in found["rows"]]
    none = fastat(*asked, "--budget-hours", 1e-9)
    assert none.stderr == "" and "Nothing fits" in none.stdout
