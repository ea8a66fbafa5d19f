"""fastat profile: what is chosen, what a row says, and the real command on a small set."""

import csv
import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from fastat.audio.features import FEATURES
from fastat.config.paper import TABLE_2, TABLE_3, TRAIN_CLIPS
from fastat.config.run import TrainConfig, resolve
from fastat.data.shards import ClassInfo
from fastat.study.profile import run
from fastat.study.profile.cases import choices, parse_strides
from fastat.study.profile.device import OutOfMemory
from fastat.study.profile.measure import Measured, Spread, step_key
from fastat.study.profile.plot import draw
from fastat.study.profile.rows import (
    MS,
    Document,
    add_measured,
    as_csv,
    best_value,
    describe,
    document,
)
from fastat.study.profile.table import print_tables
from fastat.system.device import default_device
from fastat.system.errors import UserError
from fastat.weights.checkpoint import ModelMeta
from tests.conftest import QUIET, TINY_MODEL, TinySets, fastat, one_line

KEYS = (
    "model proc feature num_mels num_frames fstride tstride grid patches paper_patches tokens "
    "params gflop gflop_by_module precision compiled batch activation_checkpointing out_of_memory "
    "peak_memory_gib ms clips_per_s tflops percent_of_ceiling hours_per_epoch hours "
    "watts kwh paper_hours_per_epoch paper_hours paper_gpus paper_map"
).split()
"""Of a row: the schema is a promise."""


def measured(step_ms: float, watts: float | None = 300.0) -> Measured:
    parts = {name: Spread(step_ms / 4, step_ms / 5, step_ms / 3) for name in MS}
    step = Spread(step_ms, 0.95 * step_ms, 1.05 * step_ms)
    return Measured(parts | {"step": step}, 3 << 30, watts)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No step that another test measured is there."""
    monkeypatch.setenv("FASTAT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(QUIET, "FASTAT_CACHE", str(tmp_path / "cache"))


ROWS: dict[str, dict[str, Any]] = {}


def config_of(
    model: str, proc: str, batch: int = 4, options: Any = None, clips: int = TRAIN_CLIPS
) -> TrainConfig:
    given = {"data": "", "batch": batch, "model_options": options or {}}
    return resolve(proc, model, given, num_clips=clips, clip_seconds=10.0)


def row(config: TrainConfig, found: Measured | None, clips: int = TRAIN_CLIPS) -> dict[str, Any]:
    """A row of clips of ten seconds with AudioSet's classes; each model is counted once."""
    key = f"{config.proc} {step_key(config)}"
    if key not in ROWS:
        feature = FEATURES[config.feature]
        meta = ModelMeta(
            model=config.model,
            feature=feature.name,
            clip_seconds=10.0,
            num_mels=feature.num_mels,
            num_frames=feature.num_frames(160_000),
            mean=feature.mean,
            std=feature.std,
            classes=tuple(ClassInfo(str(k), str(k)) for k in range(527)),
            options=config.model_options,
        )
        ROWS[key] = describe(config, meta)
    made = dict(ROWS[key])
    add_measured(made, found, batch=config.batch, clips=clips, epochs=config.epochs, ceiling=600e12)
    return made


def made(procs: list[str], models: list[str], strides: str | None, ms: float) -> Document:
    """A document as if every clip's GFLOP took ``ms``; the last case is out of memory."""
    configs = [
        config_of(c.model, c.proc, 40, c.options) for c in choices(procs, models, strides, [])
    ]
    rows = [row(config, measured(40 * ms * row(config, None)["gflop"])) for config in configs[:-1]]
    rows.append(row(configs[-1], None))
    return document(rows, torch.device("cpu"), clips=TRAIN_CLIPS, ceiling=600e12)


# ---------------------------------------------------------------------------- the command
def test_the_command(tiny_sets: TinySets, tmp_path: Path) -> None:
    table, picture, trace = (tmp_path / name for name in ("t.csv", "p.png", "trace.json"))
    done = fastat(
        "profile", "--proc", "A4", "--model", "cnn_trans", "--data", tiny_sets.train, *TINY_MODEL,
        "--batch", 3, "--seconds", 0.2, "--clips", 7200, "--csv", table, "--plot", picture,
        "--trace", trace, "--json",
    )  # fmt: skip
    found = json.loads(done.stdout)
    assert found["schema"] == "fastat.profile/1" and found["clips"] == 7200
    [line] = found["rows"]
    assert list(line) == KEYS
    assert (line["batch"], line["num_frames"], line["tokens"]) == (3, 40, 10)
    assert not line["compiled"] or torch.cuda.is_available()
    assert sum(line["gflop_by_module"].values()) == pytest.approx(line["gflop"])
    ms = {name: line["ms"][name]["median"] for name in MS}
    assert list(line["ms"]) == list(MS) and min(ms.values()) > 0
    for spread in line["ms"].values():
        assert spread["low"] <= spread["median"] <= spread["high"]
    if default_device().type == "cpu":  # where nothing overlaps
        parts = sum(ms[name] for name in MS if name not in ("data", "step"))
        assert 0.5 * ms["step"] < parts < 1.5 * ms["step"]
    assert line["clips_per_s"] == pytest.approx(3 / ms["step"] * 1e3)
    assert line["hours_per_epoch"] == pytest.approx(2 / line["clips_per_s"])
    assert line["hours"] == pytest.approx(10 * line["hours_per_epoch"])
    flop_per_s = 3 * line["gflop"] * 1e9 * line["clips_per_s"]
    assert line["tflops"] * 1e12 == pytest.approx(flop_per_s)
    ceiling = 100 * flop_per_s / found["ceiling_tflops"] / 1e12
    assert line["percent_of_ceiling"] == pytest.approx(ceiling)
    assert line["peak_memory_gib"] > 0

    [flat] = csv.DictReader(table.open())
    assert float(flat["ms_step_low"]) == line["ms"]["step"]["low"]
    assert float(flat["gflop_by_module_head.fc_att"]) == line["gflop_by_module"]["head.fc_att"]
    assert flat["device"] == found["device"] and flat["fstride"] == ""
    assert picture.read_bytes().startswith(b"\x89PNG")

    events = json.loads(trace.read_text())["traceEvents"]
    assert any(event.get("name") == "aten::convolution_backward" for event in events)
    assert found["trace"]["file"] == str(trace) and "aten::" in found["trace"]["table"]


@pytest.mark.parametrize(
    "args, words",
    [
        (("--proc", "A5"), "--proc: unknown 'A5'; known: A1"),
        (("--model", "cnntrans"), "did you mean 'cnn_trans'?"),
        (("--data", "nowhere", "--model", "crnn"), "nowhere"),
        (("--model", "crnn", "--set", "model.embeding=64"), "did you mean 'embedding'?"),
        (("--csv", "nowhere/t.csv"), "there is no folder"),
        (("--trace", "t.json"), "one case"),
        (("--clips", "0"), "--clips must be at least 1"),
        (("--budget-hours", "0"), "--budget-hours must be a positive number, got 0"),
        (("--budget-hours", "-3"), "--budget-hours must be a positive number, got -3"),
        (("--budget-hours", "nan"), "got nan"),
        (("--budget-hours", "tonight"), "--budget-hours"),
        (("--memory-gib", "inf"), "--memory-gib must be a positive number, got inf"),
    ],
)
def test_mistakes_on_the_command_line(args: tuple[str, ...], words: str) -> None:
    assert words in one_line(fastat("profile", *args, code=2))


# ---------------------------------------------------------------------------- what is chosen
def test_all_are_the_filled_cells_of_table_2() -> None:
    found = {(c.model, c.proc) for c in choices([], [], None, [])}
    assert found == {(name, proc) for name, paper in TABLE_2.items() for proc in paper.mAP}
    assert len(found) == 16
    assert {c.proc for c in choices([], ["resnet34"], None, [])} == {"A1", "A2", "A3", "A4"}
    assert [c.proc for c in choices([], ["crnn"], None, [])] == ["A2", "A4"]


def test_strides_are_those_of_table_3() -> None:
    found = choices([], [], "8,10x12", ["model.size=tiny224"])
    pairs = [(8, 8), (10, 12)]
    assert [(c.proc, c.options["fstride"], c.options["tstride"]) for c in found] == [
        (proc, *pair) for proc in ("A1", "A3") for pair in pairs
    ]
    assert all(c.model == "ast" and c.options["size"] == "tiny224" for c in found)


@pytest.mark.parametrize("text", ["", "8,", "a", "8x", "0", "17", "8x17", "-1", "8;10"])
def test_impossible_strides(text: str) -> None:
    with pytest.raises(UserError, match="--strides"):
        parse_strides(text)


@pytest.mark.parametrize(
    "given, words",
    [
        ((["A1"], ["crnn"], None, []), "dash in the paper's Table 2"),
        (([], ["crnn"], "8", []), "--strides is for ast"),
        (([], [], "8", ["model.fstride=4"]), "exclude each other"),
        (([], [], None, ["lr=1"]), "takes model.KEY=value"),
    ],
)
def test_what_cannot_be_chosen(given: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        choices(*given)


# ---------------------------------------------------------------------------- rows
def test_a_row_of_table_3() -> None:
    found = row(
        config_of("ast", "A3", 40, {"fstride": 4, "tstride": 4}),
        measured(100.0),
    )
    assert list(found) == KEYS
    assert (found["grid"], found["patches"], found["paper_patches"]) == ([13, 97], 1261, 1485)
    assert (found["tokens"], found["paper_hours_per_epoch"]) == (1263, 12.67)
    assert found["paper_map"] == 0.414
    assert found["clips_per_s"] == 400
    assert found["hours"] == pytest.approx(10 * TRAIN_CLIPS / 400 / 3600)
    assert found["kwh"] == pytest.approx(0.3 * found["hours"])
    assert found["percent_of_ceiling"] == pytest.approx(3 * found["gflop"] * 400 / 600e3 * 100)


def test_other_rows() -> None:
    oblong = {"fstride": 8, "tstride": 10}
    found = row(config_of("ast", "A3", options=oblong), None)
    assert list(found) == KEYS and found["out_of_memory"]
    assert found["patches"] == 7 * 39 and found["paper_patches"] is None
    for key in ("ms", "hours", "kwh", "clips_per_s", "paper_map", "peak_memory_gib"):
        assert found[key] is None
    found = row(config_of("ast", "A4"), measured(1.0, watts=None))
    assert (found["fstride"], found["paper_map"], found["kwh"]) == (8, 0.268, None)
    assert found["paper_hours_per_epoch"] is None, "Table 3 has A1 and A3"
    found = row(config_of("resnet50", "A1"), measured(1.0))
    assert found["grid"] is None and found["tokens"] is None and found["paper_map"] == 0.41
    tokens = {"transformer": 400, "conformer": 100, "cnn_trans": 100, "crnn": None}
    for model, want in tokens.items():
        assert row(config_of(model, "A4"), None)["tokens"] == want


@pytest.mark.parametrize(
    "proc, options, want",
    [
        ("A3", {}, (0.41, 2.1)),
        ("A3", {"fstride": 16, "tstride": 16}, (0.24, 0.8)),
        ("A3", {"activation_checkpointing": True}, (0.41, 2.1)),
        ("A3", {"fstride": 16, "tstride": 16, "size": "tiny224"}, (None, None)),
        ("A4", {"fstride": 16, "tstride": 16}, (None, None)),
        ("A4", {"num_layers": 2}, (None, None)),
    ],
)
def test_the_papers_figures_are_of_the_papers_models(
    proc: str, options: dict[str, Any], want: tuple[float | None, float | None]
) -> None:
    found = row(config_of("ast", proc, options=options), measured(1.0))
    assert (found["paper_map"], found["paper_hours_per_epoch"]) == want


def test_every_stride_of_table_3_has_its_true_count() -> None:
    true = {"A1": [7337, 3211, 1905, 1212, 850, 512], "A3": [1261, 585, 343, 195, 165, 100]}
    for proc, patches in true.items():
        for choice, want in zip(choices([proc], [], "4,6,8,10,12,16", []), patches, strict=True):
            found = row(config_of("ast", proc, options=choice.options), None)
            assert math.prod(found["grid"]) == found["patches"] == want


def test_hours_of_a_small_set_are_those_of_its_epochs() -> None:
    """``fastat train`` gives a set of 100 clips more epochs than the procedure's ten."""
    config = config_of("crnn", "A4", clips=100)
    found = row(config, measured(1000.0), clips=100)
    assert config.epochs > 10
    assert found["hours"] == pytest.approx(config.epochs * found["hours_per_epoch"])


def test_best_value() -> None:
    rows = [
        {"hours": hours, "paper_map": value}
        for hours, value in ((9, 0.43), (3, 0.40), (3, 0.41), (5, 0.41), (1, 0.2), (None, 0.5))
    ]
    rows.append({"hours": 0.1, "paper_map": None})
    assert [(r["hours"], r["paper_map"]) for r in best_value(rows)] == [
        (1, 0.2), (3, 0.41), (9, 0.43)
    ]  # fmt: skip


# ---------------------------------------------------------------------------- measuring them all
def test_a_step_that_procedures_share_is_measured_once(
    tiny_sets: TinySets, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[str] = []

    def measure(config: TrainConfig, *args: object, **kwargs: object) -> Measured:
        taken.append(f"{config.model} {config.proc}")
        if config.model == "crnn":
            raise OutOfMemory("full")
        return measured(10.0 * len(taken))

    monkeypatch.setattr(run, "measure", measure)
    monkeypatch.setattr(run, "matmul_flop_per_s", lambda *args: 1e12)
    settings = run.Settings(batch=2, data=tiny_sets.train, clips=1000)
    wanted = choices(["A3", "A4"], ["resnet50", "cnn_trans", "crnn"], None, [])
    found = run.profile(wanted, torch.device("cpu"), settings)
    assert taken == ["resnet50 A3", "cnn_trans A4", "crnn A4"]
    rows = {(r["model"], r["proc"]): r for r in found["rows"]}
    assert rows["resnet50", "A3"]["ms"] == rows["resnet50", "A4"]["ms"]
    assert rows["resnet50", "A3"]["paper_map"] != rows["resnet50", "A4"]["paper_map"]
    full = rows["crnn", "A4"]
    assert full["out_of_memory"] and full["ms"] is None and full["gflop"] > 0


def on_a_gpu(monkeypatch: pytest.MonkeyPatch, most: int) -> list[int]:
    """Replaces the device by a GPU on which ``most`` clips fit; the batches that are tried."""
    batches: list[int] = []

    def measure(config: TrainConfig, *args: object, **kwargs: object) -> Measured:
        batches.append(config.batch)
        if config.batch > most:
            raise OutOfMemory("full")
        return measured(10.0)

    monkeypatch.setattr(run, "measure", measure)
    monkeypatch.setattr(run, "matmul_flop_per_s", lambda *args: 1e12)
    monkeypatch.setattr(run, "memory_limit", lambda device: 1 << 30)
    monkeypatch.setattr(run, "largest_batch", lambda config, device, limit: most or None)
    monkeypatch.setattr(run, "environment", lambda device: {})
    monkeypatch.setattr(run, "document", lambda rows, *args, **kwargs: {"rows": rows})
    return batches


@pytest.mark.parametrize("most, want", [(77, 77), (0, 1)])
def test_batch_auto_is_the_largest_that_fits(
    most: int, want: int, tiny_sets: TinySets, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = on_a_gpu(monkeypatch, most)
    settings = run.Settings(batch="auto", compile=False, data=tiny_sets.train, clips=1000)
    found = run.profile(choices(["A4"], ["crnn"], None, []), torch.device("cuda"), settings)
    assert batches == [want] and found["rows"][0]["batch"] == want
    assert found["rows"][0]["out_of_memory"] == (most == 0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a CPU")
def test_batch_auto_needs_a_gpu() -> None:
    done = fastat("profile", "--model", "crnn", "--batch", "auto", code=2)
    assert "--batch auto needs a GPU" in one_line(done)


@pytest.mark.parametrize(
    "most, tried, full", [(448, [448], False), (447, [448, 224], False), (9, [448, 224], True)]
)
def test_the_default_batch_of_a_gpu(
    most: int, tried: list[int], full: bool, tiny_sets: TinySets, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The procedure's, or what one of the paper's two GPUs had of it."""
    batches = on_a_gpu(monkeypatch, most)
    settings = run.Settings(compile=False, data=tiny_sets.train, clips=TRAIN_CLIPS)
    found = run.profile(choices(["A4"], ["crnn"], None, []), torch.device("cuda"), settings)
    assert batches == tried
    [line] = found["rows"]
    assert (line["batch"], line["out_of_memory"]) == (tried[-1], full)


def test_a_batch_that_was_asked_for_stays(
    tiny_sets: TinySets, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = on_a_gpu(monkeypatch, 10)
    settings = run.Settings(batch=300, compile=False, data=tiny_sets.train, clips=1000)
    found = run.profile(choices(["A4"], ["crnn"], None, []), torch.device("cuda"), settings)
    assert batches == [300] and found["rows"][0]["out_of_memory"]


def test_the_default_batch_of_a_cpu(tiny_sets: TinySets, monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_gpu(monkeypatch, 1000)
    settings = run.Settings(data=tiny_sets.train, clips=TRAIN_CLIPS)
    found = run.profile(choices([], ["resnet50"], None, []), torch.device("cpu"), settings)
    of = {line["proc"]: line["batch"] for line in found["rows"]}
    assert of == {"A1": 1, "A2": 1, "A3": 4, "A4": 4}


def test_checkpointing_by_a_setting(tiny_sets: TinySets, monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_gpu(monkeypatch, 1000)
    wanted = choices(["A4"], ["crnn"], None, ["model.activation_checkpointing=true"])
    settings = run.Settings(data=tiny_sets.train, clips=TRAIN_CLIPS)
    [line] = run.profile(wanted, torch.device("cpu"), settings)["rows"]
    assert line["activation_checkpointing"]


# ---------------------------------------------------------------------------- how it is shown
@pytest.mark.parametrize("strides", [None, "4,8,16"])
def test_tables(strides: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    found = made([], [], strides, 0.005)
    print_tables(found, strides=strides is not None)
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 120 and "…" not in text
    assert "full" in text, "the case out of memory"
    best = best_value(found["rows"])
    assert text.count("*") == len(best) + 1
    starred = [line for line in text.splitlines() if " * " in line]
    for row in best:
        assert any(f"{row['paper_map']:.3f}" in line for line in starred)
    assert "layers.attn" in text
    if strides:
        assert all(word in text for word in ("1,261", "1,263", "1,485", "12.7"))


def test_unsteady_steps_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    found = made(["A4"], ["crnn", "cnn_trans", "resnet50"], None, 1.0)
    print_tables(found, strides=False)
    assert "unsteady" not in capsys.readouterr().out
    found["rows"][0]["ms"]["step"]["high"] *= 1.2
    print_tables(found, strides=False)
    assert (
        f"unsteady (spread over 20 %): {found['rows'][0]['model']} A4:" in capsys.readouterr().out
    )


def points(line: Any) -> dict[float, float]:
    return dict(zip(line.get_xdata(), line.get_ydata(), strict=True))


def test_plot_shows_what_was_measured() -> None:
    found = made([], [], "4,8,10,16", 0.01)
    left, right = draw(found).axes
    a3 = [r for r in found["rows"] if r["proc"] == "A3" and r["ms"]]
    lines = {line.get_label(): line for line in left.get_lines()}
    assert points(lines["A3, measured"]) == {r["fstride"]: r["hours_per_epoch"] for r in a3}
    assert [r["fstride"] for r in a3] == [4, 8, 10], "16 is out of memory"
    printed = {s: p.hours_per_epoch for s, p in TABLE_3["A1"].items() if p.hours_per_epoch}
    assert points(lines["A1, the paper on 4 V100s"]) == printed
    names = {text.get_text() for text in right.texts}
    assert {"8x8", "10x10"} <= names
    assert len(draw(made([], [], None, 0.01)).axes) == 1, "a stride for each procedure"
    two = draw(made(["A3"], [], "8,10,16", 0.01))
    assert len(two.axes) == 2 and {t.get_text() for t in two.axes[1].texts} == {"8x8", "10x10"}


def test_csv_is_flat() -> None:
    lines = list(csv.DictReader(io.StringIO(as_csv(made(["A3"], [], "8,10", 0.01)))))
    assert [line["grid"] for line in lines] == ["7x49", "5x39"]
    assert {"gflop_by_module_layers.attn", "ms_step", "ms_step_high"} < set(lines[0])
    assert (
        "ms" not in lines[0] and lines[1]["ms_step"] == "" and lines[1]["out_of_memory"] == "True"
    )
