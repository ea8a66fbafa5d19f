"""fastat profile --plan: what is ranked, what misses, what is kept, and the real command."""

import json
import math
import shlex
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from fastat import launch
from fastat.cli import app
from fastat.config import resolve
from fastat.data.shards import PackedSet
from fastat.errors import Failure, UserError
from fastat.paper import TABLE_2, TABLE_3, TRAIN_CLIPS
from fastat.procedures import PROCEDURES
from fastat.profile import plan_points
from fastat.profile.cases import Choice, choices
from fastat.profile.costmodel import CostModel, Work
from fastat.profile.measure import Case, Measured, OutOfMemory, Spread
from fastat.profile.plan import (
    FITS,
    OVER_BUDGET,
    OVER_MEMORY,
    Candidate,
    Limits,
    Predictor,
    answer,
    batches,
    candidates,
    nearest_miss,
    train_command,
)
from fastat.profile.plan_choices import parse_limits, planned
from fastat.profile.plan_points import Known, Setup, Works, cases_to_measure, points
from fastat.profile.plan_table import print_plan
from fastat.profile.run import Settings
from fastat.profile.table import WIDTH
from tests.conftest import QUIET, TinySets, fastat, one_line

CPU = torch.device("cpu")
SETTINGS = Settings(clips=TRAIN_CLIPS)
CELLS = sum(len(row.mAP) for row in TABLE_2.values())
STRIDES = sum(column.mAP is not None for table in TABLE_3.values() for column in table.values())


# ------------------------------------------------------------------------------ what is ranked
def test_every_filled_cell_and_every_stride_with_an_map() -> None:
    found = planned(choices([], [], None, []))
    assert len(found) == CELLS + STRIDES - 2, "10x10 of A1 and 8x8 of A3 are in both tables"
    of_a3 = [c.options["fstride"] for c in found if (c.model, c.proc) == ("ast", "A3")]
    assert of_a3 == [4, 6, 8, 10, 12, 16]
    assert [c.options["fstride"] for c in found if (c.model, c.proc) == ("ast", "A1")] == [
        10, 12, 16
    ]  # fmt: skip


def test_a_model_without_an_map() -> None:
    with pytest.raises(UserError, match="resnet34 has none"):
        planned(choices(["A4"], ["resnet34"], None, []))


@pytest.mark.parametrize(
    ("model", "usual", "most", "small", "want"),
    [
        ("cnn_trans", 448, 448, False, [(448, 1)]),
        ("cnn_trans", 448, 1000, False, [(448, 1), (896, 1)]),
        ("cnn_trans", 4, 1000, True, [(4, 1)]),
        ("cnn_trans", 448, 447, False, [(224, 1)]),
        ("ast", 20, 3, False, [(2, 1)]),
        ("crnn", 448, 447, False, [(448, 2)]),
        ("resnet50", 20, 6, False, [(20, 4)]),
        ("resnet50", 20, 1, False, [(20, 20)]),
        ("crnn", 448, 0, False, [(1, 1)]),
    ],
)
def test_batches(
    model: str, usual: int, most: int, small: bool, want: list[tuple[int, int]]
) -> None:
    assert batches(model, usual, most, small=small) == want


SECONDS_A_STEP, SECONDS_A_CLIP = 0.5, 0.001
GIB, GIB_A_CLIP = 1.0, 0.01


def flat(*, step: float = SECONDS_A_STEP) -> Predictor:
    """A device on which every clip of every model costs the same; the AST's more, by stride."""
    rates = np.array([step, 0, 0, SECONDS_A_CLIP, 0, 0])
    memory = np.array([GIB, 0, 0, 0, 0, GIB_A_CLIP]) * 2**30

    def work(choice: Choice) -> Work:
        size = (16 / choice.options.get("fstride", 16)) ** 2
        return Work(params=1, sequence=0, product=size, attention=0.0, traffic=1.0)

    return Predictor(CostModel(rates, {}), CostModel(memory, {}), work)


def ranked(
    hours: float = math.inf, gib: float = 100.0, clips: int = TRAIN_CLIPS, *, step: float = 0.5
) -> list[Candidate]:
    return candidates(
        planned(choices([], [], None, [])),
        flat(step=step),
        Limits(hours=hours, bytes=gib * 2**30, given=True),
        clips=clips,
        clip_seconds=10.0,
        command=lambda c: train_command(c, SETTINGS, CPU),
    )


def test_hours_and_memory_of_a_candidate() -> None:
    c = next(c for c in ranked(gib=7.0) if (c.model, c.proc) == ("cnn_trans", "A4"))
    steps = TRAIN_CLIPS // 448
    assert c.hours_per_epoch == pytest.approx(steps * (0.5 + 0.001 * 448) / 3600)
    assert c.hours == pytest.approx(10 * c.hours_per_epoch)
    assert c.clips_per_s == pytest.approx(448 / (0.5 + 0.448))
    assert c.memory_gib == pytest.approx(1 + 0.01 * 448)
    assert (c.batch, c.accumulate, c.verdict) == (448, 1, FITS)


def test_no_batch_is_larger_than_the_set() -> None:
    """However large the memory: an epoch would have no step, and cost nothing."""
    found = ranked(gib=1e6, clips=100_000)
    assert all(c.batch <= 100_000 and c.hours > 0 for c in found)
    assert any(c.batch > 50_000 for c in found)


def test_a_batch_that_does_not_fit() -> None:
    found = {(c.model, c.proc): c for c in ranked(gib=4.0)}
    attention, recurrent = found["cnn_trans", "A4"], found["crnn", "A4"]
    assert (attention.batch, attention.accumulate) == (224, 1)
    assert (recurrent.batch, recurrent.accumulate) == (448, 2)
    assert recurrent.memory_gib == attention.memory_gib <= 4.0
    # Two parts of 224 with a step's fixed cost each.
    want = TRAIN_CLIPS // 448 * 2 * (0.5 + 0.001 * 224) * 10 / 3600
    assert recurrent.hours == pytest.approx(want)


def test_a_larger_batch_is_offered_where_it_saves_hours() -> None:
    of = [c for c in ranked(gib=100.0) if (c.model, c.proc) == ("crnn", "A4")]
    assert {c.batch for c in of} == {448, 448 * int(99 / 0.01 // 448)}
    assert min(of, key=lambda c: c.hours).batch > 448
    none = [c for c in ranked(gib=100.0, step=0.0) if (c.model, c.proc) == ("crnn", "A4")]
    assert [c.batch for c in none] == [448]


def test_ranking_and_misses() -> None:
    found = ranked(hours=11.0, gib=7.0)
    fits = [c for c in found if c.verdict == FITS]
    assert found[: len(fits)] == fits
    order = [(-c.paper_map, c.hours) for c in fits]
    assert order == sorted(order) and fits[-1].paper_map < fits[0].paper_map
    assert all((c.hours <= 11.0) == (c.verdict == FITS) for c in found)
    assert all(c.hours_over == max(0.0, c.hours - 11.0) for c in found)
    missed = nearest_miss(found, OVER_BUDGET)
    assert missed is not None and missed.paper_map > fits[0].paper_map, "what a longer run buys"
    better = [c for c in found if c.verdict == OVER_BUDGET and c.paper_map > fits[0].paper_map]
    assert missed.hours_over == min(c.hours_over for c in better)
    assert nearest_miss(found, OVER_MEMORY) is None


def test_a_small_set_keeps_its_rule() -> None:
    found = ranked(clips=1280)
    assert {c.batch for c in found} == {c.procedure_batch for c in found} == {4}
    assert all("--batch" not in c.command for c in found)


@pytest.mark.parametrize(
    ("change", "want"),
    [
        ({}, "--stride 6x6 --precision fp32 --data packed/train --eval packed/eval"),
        ({"fstride": 8, "tstride": 8}, "--proc A3 --model ast --precision"),
        ({"batch": 40}, "--stride 6x6 --batch 40 --precision"),
        ({"accumulate": 4}, "--stride 6x6 --accumulate 4 --precision"),
    ],
)
def test_the_command_line(change: dict[str, Any], want: str) -> None:
    c = next(c for c in ranked(gib=2.0) if c.proc == "A3" and c.fstride == 6)
    assert c.batch == c.procedure_batch
    assert f"{want} " in train_command(Candidate(**(asdict(c) | change)), SETTINGS, CPU) + " "


def test_the_command_line_of_other_settings() -> None:
    settings = Settings(clips=1, precision="fp32", compile=True, data=Path("my set"))
    words = shlex.split(train_command(ranked()[0], settings, CPU))
    assert words[-5:] == ["--precision", "fp32", "--compile", "--data", "my set"]


def test_fastat_train_takes_every_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """And makes the candidate of it."""
    given: list[Any] = []

    def run_training(*args: Any, **options: Any) -> int:
        given.append(args)
        return 0

    monkeypatch.setattr(launch, "run_training", run_training)
    found = ranked(gib=2.5)
    assert {c.accumulate for c in found} != {1} and any(c.batch != c.procedure_batch for c in found)
    for c in found:
        done = CliRunner().invoke(app, shlex.split(c.command)[1:])
        assert done.exit_code == 0, done.output
        proc, model, overrides, _ = given.pop()
        config = resolve(proc, model, overrides, num_clips=TRAIN_CLIPS, clip_seconds=10.0)
        made = config.proc, config.model, config.batch, config.accumulate, config.epochs
        assert made == (c.proc, c.model, c.batch, c.accumulate, c.epochs)
        assert config.model_options.get("fstride") == c.fstride


# ------------------------------------------------------------------------------ the table
def document(found: list[Candidate], hours: float | None, gib: float) -> dict[str, Any]:
    error = {"points": 9, "median": 0.03, "worst": 0.2, "bar": 0.15}
    point = asdict(Known("ast", "A3", {"fstride": 16, "tstride": 16}, 4, 4, 1.0))
    return {
        "device": "A processor of some length, with a name to match, 2 threads", "torch": "2.15.0",
        "precision": "bf16", "compiled": False, "budget_hours": hours, "memory_gib": gib,
        "memory_given": True, "clips": TRAIN_CLIPS,
        "prediction_error": error | {"worst_point": point},
        "memory_error": None,
        **answer(found),
    }  # fmt: skip


def printed(capsys: pytest.CaptureFixture[str], shown: dict[str, Any]) -> str:
    print_plan(shown)
    return capsys.readouterr().out


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    found = ranked(hours=40.0, gib=4.0)
    text = printed(capsys, document(found, 40.0, 4.0))
    fits = [c for c in found if c.verdict == FITS]
    assert max(map(len, text.splitlines())) <= WIDTH
    assert found[0].command in text and "in 2 parts" in text and "LR in proportion" in text
    assert f"over the hours: {len(found) - len(fits)}; the nearest: " in text
    assert "worst 20.0% (ast A3 16x16, batch 4)" in text and "the worst is over 15%" in text
    assert "h over" in text and "…" not in text


def test_nothing_fits_the_hours(capsys: pytest.CaptureFixture[str]) -> None:
    found = ranked(hours=0.5, gib=4.0)
    quickest = min(c.hours for c in found)
    shown = document(found, 0.5, 4.0)
    assert shown["best"] is None and shown["smallest_budget"]["hours"] == quickest
    text = printed(capsys, shown)
    assert f"Nothing fits 0.5 h: the smallest budget that would do is {quickest:.1f} h" in text


def test_nothing_fits_the_memory(capsys: pytest.CaptureFixture[str]) -> None:
    found = ranked(gib=0.5)
    assert {c.verdict for c in found} == {OVER_MEMORY} and found[0].gib_over > 0
    text = printed(capsys, document(found, None, 0.5))
    assert "Nothing fits 0.5 GiB: the least that would do is 1.01 GiB" in text


# ------------------------------------------------------------------------------ the points
class FakeDevice:
    """Stands for ``measure``: a second a step and a tenth a clip, and memory for so many clips."""

    def __init__(self, most: int = 1000, stop_after: int = 1000) -> None:
        self.most, self.stop_after = most, stop_after
        self.asked: list[Case] = []

    def __call__(self, case: Case, *args: object, **options: object) -> Measured:
        if len(self.asked) == self.stop_after:
            raise KeyboardInterrupt
        self.asked.append(case)
        if case.batch > self.most:
            raise OutOfMemory("full")
        ms = 1e3 * (1 + case.batch / 10)
        return Measured({"step": Spread(ms, ms, ms)}, 3, case.batch << 20, None)


SETUP = Setup(CPU, "bf16", False, 16_000, 3)
WORKS = Works(16_000, 3)
CASES = cases_to_measure([("crnn", "logmel64"), ("cnn_trans", "logmel64")], SETUP)


def taken(
    folder: Path,
    device: FakeDevice,
    monkeypatch: pytest.MonkeyPatch,
    *,
    again: int = 0,
    afresh: bool = False,
) -> Any:
    monkeypatch.setattr(plan_points, "measure", device)
    monkeypatch.setattr(plan_points, "MEASURED_AGAIN", again)

    def no_set(stack: ExitStack) -> Any:
        return None

    known: Any = {"seconds": None, "again": afresh, "note": lambda text: None}
    return points(CASES, SETUP, WORKS, folder, no_set, **known)


def test_points_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, third = FakeDevice(), FakeDevice(), FakeDevice()
    found = taken(tmp_path, first, monkeypatch)
    assert len(first.asked) == len(CASES) == found.measured == len(found.seconds) == 4
    assert [k.value for k in found.bytes] == [k.batch << 20 for k in found.seconds]
    again = taken(tmp_path, second, monkeypatch)
    assert second.asked == [] and again.measured == 0 and again.seconds == found.seconds
    taken(tmp_path, third, monkeypatch, afresh=True)
    assert len(third.asked) == 4


def test_a_plan_that_was_stopped_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KeyboardInterrupt):
        taken(tmp_path, FakeDevice(stop_after=3), monkeypatch)
    rest = FakeDevice()
    assert taken(tmp_path, rest, monkeypatch).measured == 1
    assert rest.asked == CASES[3:]


def test_a_point_that_does_not_fit_is_halved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = taken(tmp_path, FakeDevice(most=5), monkeypatch)
    assert [(k.asked, k.batch) for k in found.seconds] == [(4, 4), (12, 3)] * 2
    assert taken(tmp_path, FakeDevice(most=5), monkeypatch).measured == 0
    with pytest.raises(Failure):
        taken(tmp_path, FakeDevice(most=0), monkeypatch, afresh=True)


def test_damaged_points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = taken(tmp_path, FakeDevice(), monkeypatch).path
    text = path.read_text()
    for damaged in (text[:-50], "[]", text.replace("asked", "aske"), ""):
        path.write_text(damaged)
        with pytest.raises(Failure, match="damaged.*--measure-again"):
            taken(tmp_path, FakeDevice(), monkeypatch)
    assert taken(tmp_path, FakeDevice(), monkeypatch, afresh=True).measured == 4


def test_a_disturbed_point_is_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Disturbed(FakeDevice):
        def __call__(self, case: Case, *args: object, **options: object) -> Measured:
            found = super().__call__(case)
            if len(self.asked) != 2:
                return found
            ms = 10 * found.ms["step"].median
            return Measured({"step": Spread(ms, ms, ms)}, 3, found.peak_bytes, None)

    device = Disturbed()
    found = taken(tmp_path, device, monkeypatch, again=2)
    assert CASES[1] in device.asked[4:], "the second, which took ten times as long"
    assert [k.value for k in found.seconds] == [1 + c.batch / 10 for c in CASES]
    assert taken(tmp_path, FakeDevice(), monkeypatch).seconds == found.seconds


def test_other_settings_keep_points_of_their_own() -> None:
    keys = [
        Setup(CPU, *rest).key()
        for rest in (
            ("bf16", False, 16_000, 3),
            ("fp32", False, 16_000, 3),
            ("bf16", True, 16_000, 3),
            ("bf16", False, 16_001, 3),
        )
    ]
    assert len({json.dumps(key) for key in keys}) == len(keys)


def test_the_ast_is_measured_for_both_features_where_it_is_cheap() -> None:
    both = cases_to_measure([("ast", "logmel64"), ("ast", "fbank128")], SETUP)
    short = cases_to_measure([("ast", "logmel64")], SETUP)
    assert {c.proc for c in short} == {"A3"} and {c.proc for c in both} == {"A1", "A3"}
    assert cases_to_measure([("ast", "fbank128")], SETUP) == both


# ------------------------------------------------------------------------------ the command
def test_the_command(tiny_sets: TinySets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(QUIET, "FASTAT_CACHE", str(tmp_path))
    asked = (
        "profile", "--plan", "--proc", "A4", "--model", "cnn_trans", "--model", "crnn",
        "--data", tiny_sets.train, "--seconds", 0.2, "--memory-gib", 4,
    )  # fmt: skip
    done = fastat(*asked, "--json")
    assert "measuring 4 steps of 2 models" in done.stderr
    found = json.loads(done.stdout)
    assert found["schema"] == "fastat.plan/1" and found["budget_hours"] is None
    assert found["clips"] == 36, "the set's, which the command trains on"
    assert found["points"]["measured_now"] == found["prediction_error"]["points"] == 4
    assert [c["model"] for c in found["candidates"]] == ["cnn_trans", "crnn"]
    best = found["best"]
    assert best == found["candidates"][0] and best["paper_map"] == PROCEDURES["A4"].paper_map
    assert 0 < best["memory_gib"] < 4

    again = fastat(*asked, "--budget-hours", 1e-9)
    assert "measuring" not in again.stderr
    assert "Nothing fits 1e-09 h: the smallest budget" in again.stdout


@pytest.mark.parametrize(
    ("options", "want"),
    [
        (("--budget-hours", "0"), "--budget-hours takes a positive number, got 0"),
        (("--budget-hours", "nan"), "got nan"),
        (("--budget-hours", "tonight"), "--budget-hours"),
        (("--memory-gib", "-1"), "--memory-gib takes a positive number, got -1"),
        (("--memory-gib", "inf"), "got inf"),
        (("--clips", "0"), "--clips must be at least 1"),
        (("--strides", "8"), "--strides goes without --plan"),
        (("--model", "resnet34"), "resnet34 has none"),
    ],
)
def test_mistakes(options: tuple[str, ...], want: str) -> None:
    assert want in one_line(fastat("profile", "--plan", *options, code=2))


def test_a_budget_without_a_plan() -> None:
    done = fastat("profile", "--budget-hours", 8, code=2)
    assert one_line(done) == "fastat: --budget-hours goes with --plan"


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_limits_are_positive_numbers(value: float) -> None:
    for hours, gib in ((value, None), (None, value)):
        with pytest.raises(UserError, match="positive"):
            parse_limits(hours, gib)
    assert parse_limits(None, None) == (math.inf, None)
    assert parse_limits(2.0, 0.5) == (2.0, 2**29)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu(tiny_sets: TinySets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Peaks are the allocator's, of the very steps that were timed."""
    monkeypatch.setitem(QUIET, "FASTAT_CACHE", str(tmp_path))
    done = fastat(
        "profile", "--plan", "--proc", "A4", "--model", "cnn_trans", "--model", "crnn",
        "--no-compile", "--data", tiny_sets.train, "--json",
    )  # fmt: skip
    found = json.loads(done.stdout)
    assert found["memory_error"]["points"] == found["prediction_error"]["points"] == 4
    assert found["best"]["memory_gib"] < found["memory_gib"]
    assert PackedSet.open(tiny_sets.train).clip_samples == 16_000
