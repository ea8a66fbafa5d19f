"""The report's page: its numbers, damaged inputs, mistakes, and names that could be markup."""

import json
import math
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from plotly.offline import get_plotlyjs
from sklearn.metrics import average_precision_score, roc_auc_score

from fastat.config.paper import TABLE_2, TABLE_3, TABLE_4, TRAIN_CLIPS
from fastat.config.procedures import PROCEDURES
from fastat.evaluation.predictions import Predictions
from fastat.study.report.curves import class_curves, precision_recall
from fastat.study.report.page import write_report
from tests.conftest import TINY_MODEL, TinySets, fastat, one_line
from tests.report_samples import (
    EVIL,
    NAMES,
    NUM_TRAIN,
    scores,
    write_ablation,
    write_predictions,
    write_profile,
    write_quality,
    write_run,
)


class Page(HTMLParser):
    """Tables by id, as rows of cells' texts; the JSON of the scripts by id; all tags seen."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.notes: list[str] = []
        self.data: dict[str, Any] = {}
        self.tags: set[str] = set()
        self.text = ""
        self._rows: list[list[str]] = []
        self._open: list[str] = []
        self._script = ""
        self.feed(path.read_text("utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        given = dict(attrs)
        match tag:
            case "table":
                self._rows = self.tables.setdefault(given.get("id") or "", [])
            case "tr":
                self._rows.append([])
            case "th" | "td":
                self._rows[-1].append("")
                self._open.append(tag)
            case "li":
                self.notes.append("")
                self._open.append(tag)
            case "script":
                self._script = given.get("id") or "code"

    def handle_endtag(self, tag: str) -> None:
        if tag in ("th", "td", "li"):
            self._open.pop()
        elif tag == "script":
            self._script = ""

    def handle_data(self, data: str) -> None:
        if self._script:
            if self._script != "code":
                self.data[self._script] = json.loads(data)
            return
        self.text += data
        if self._open and self._open[-1] in ("th", "td"):
            self._rows[-1][-1] += data
        elif self._open:
            self.notes[-1] += data

    def table(self, start: str) -> list[dict[str, str]]:
        """The rows of the one table whose id begins so, by the last heading of each column."""
        (rows,) = (rows for name, rows in self.tables.items() if name.startswith(start))
        head = next(i for i, row in enumerate(rows) if len(row) == len(rows[-1]))
        return [
            dict(zip(rows[head], (c.strip() for c in row), strict=True)) for row in rows[head + 1 :]
        ]

    def cells(self, start: str) -> list[list[str]]:
        """The same rows as lists, with their heading first."""
        (rows,) = (rows for name, rows in self.tables.items() if name.startswith(start))
        return [[c.strip() for c in row] for row in rows if len(row) == len(rows[-1])]

    def chart(self, name: str) -> dict[str, Any]:
        (found,) = (c for c in self.data["data-charts"] if c["id"] == name)
        return dict(found)


def report(out: Path, *paths: Path, quality: Path | None = None) -> Page:
    write_report(paths, out, quality)
    return Page(out)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "report.html"


# ------------------------------------------------------------------------------ numbers
@pytest.mark.parametrize("digits", [1, 2, 7])
def test_a_curve_counts_what_each_threshold_selects(digits: int) -> None:
    """Also where many clips have the same score."""
    rng = np.random.default_rng(digits)
    target = rng.random(400) < 0.15
    score = np.round(rng.random(400) + 0.5 * target, digits).astype(np.float32)
    curve = precision_recall(score, target, max_points=1000)
    points = list(zip(curve.thresholds, curve.hits, curve.selected, strict=True))
    scores_of_positives = np.unique(score[target])[::-1]  # recall rises at these alone
    assert [threshold for threshold, _, _ in points] == scores_of_positives.tolist()
    for threshold, hits, selected in points:
        assert (hits, selected) == (target[score >= threshold].sum(), (score >= threshold).sum())
    assert curve.hits[-1] == target.sum()


def test_a_long_curve_is_thinned_and_keeps_its_ends() -> None:
    rng = np.random.default_rng(0)
    target = rng.random(20_000) < 0.3
    score = (rng.random(20_000) + 0.3 * target).astype(np.float32)
    whole, thin = (precision_recall(score, target, max_points=n) for n in (10**6, 200))
    assert len(whole.hits) > 5000 and len(thin.hits) == 200
    assert (thin.hits[0], thin.hits[-1]) == (whole.hits[0], whole.hits[-1])
    assert set(zip(thin.hits, thin.selected, strict=True)) <= set(
        zip(whole.hits, whole.selected, strict=True)
    )


def test_classes_have_scikit_learns_scores() -> None:
    """A class without a positive has none; one without a negative has no AUC."""
    logit, target = scores(0)
    target[:, 0] = True
    names = [str(k) for k in range(len(NAMES))]
    clips = [str(i) for i in range(len(target))]
    found = class_curves(Predictions(Path("x"), logit, target, clips, names, names))
    for k in (1, 2, 3):
        assert found.average_precision[k] == average_precision_score(target[:, k], logit[:, k])
        assert found.auc[k] == roc_auc_score(target[:, k], logit[:, k])
    assert found.average_precision[0] == 1 and math.isnan(found.auc[0])
    assert math.isnan(found.average_precision[-1]) and not len(found.curves[-1].hits)
    assert found.positives.tolist() == target.sum(0).tolist()


def test_a_trained_run(tiny_sets: TinySets, tmp_path: Path, out: Path) -> None:
    """The real command on what the real command trained."""
    run = tmp_path / "runs" / "mine"
    sets = ("--data", tiny_sets.train, "--eval", tiny_sets.eval)
    fastat("train", "--proc", "A4", "--model", "cnn_trans", *sets, *TINY_MODEL,
           "--epochs", 2, "--out", run)  # fmt: skip
    done = fastat("report", tmp_path / "runs", "--out", out)
    assert done.stdout.startswith(f"{out}: 1 run, ") and done.stderr == ""
    page = Page(out)
    lines = [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()]
    best = max(lines, key=lambda x: x["mAP"])
    (row,) = page.table("all-runs")
    assert row["run"] == "mine" and row["epochs"] == "2 of 2"
    assert row["best mAP"] == f"{best['mAP']:.3f}" and row["AUC"] == f"{best['AUC']:.3f}"
    with h5py.File(run / "predictions.h5") as file:
        logit, target = file["logit"][:], file["target"][:]
    classes = page.data["data-classes-0"]
    want = [average_precision_score(target[:, k], logit[:, k]) for k in range(3)]
    assert classes["ap"] == pytest.approx(want, abs=6e-5)
    assert np.mean(classes["ap"]) == pytest.approx(best["mAP"], abs=1e-4)
    assert classes["positives"] == target.sum(0).tolist() and classes["clips"] == 15
    (loss_eval, loss_train) = page.chart("loss")["traces"]
    assert loss_eval["y"] == [x["eval_loss"] for x in lines]
    assert loss_train["y"] == [x["train_loss"] for x in lines]
    (noise,) = page.table("noise-scale")
    batch, lr = int(noise["batch B"]), float(noise["maximum LR"])
    assert noise["N from"] == "its index" and noise["training clips N"] == "36"
    assert float(noise["g"]) == pytest.approx(lr * (36 / batch - 1), rel=1e-2)


def test_tables_1_and_2(tmp_path: Path, out: Path) -> None:
    write_run(tmp_path / "runs" / "worse", maps=(0.1, 0.2))
    write_run(tmp_path / "runs" / "better", maps=(0.3, 0.612, 0.4), batch=16)
    write_run(tmp_path / "runs" / "crnn", model="crnn", maps=(0.25,))
    page = report(out, tmp_path / "runs")
    rows = page.cells("table-1")
    assert rows[0] == ["", "paper", "paper", "paper", "paper", "better"]
    by_name = {row[0]: row[1:] for row in rows[1:]}
    assert by_name["batch"] == ["20", "400", "80", "448", "16"]
    assert by_name["best mAP"][-2:] == [f"{PROCEDURES['A4'].paper_map:.3f}", "0.612"]
    assert by_name["hours"][-1] == "3.00"
    table = {row[0]: row[2:] for row in page.cells("table-2")[1:]}
    assert table[TABLE_2["cnn_trans"].title] == ["–", "–", "0.437", "–", "–", "–", "0.411", "0.612"]
    assert table[TABLE_2["crnn"].title][-2:] == ["0.406", "0.250"]
    assert any("batch 16 instead of 448" in note for note in page.notes)
    assert "ResNet34" not in page.text  # neither the paper nor a run has it


def test_it_says_which_set_the_numbers_are_of(tmp_path: Path, out: Path) -> None:
    write_run(tmp_path / "a")
    page = report(out, tmp_path / "a")
    told = [n for n in page.notes if "20,126 clips and 527 classes" in n]
    assert told and all("tiny/eval, 60 clips, 5 classes" in n for n in told)
    assert all("do not compare" in n for n in told)


def test_runs_on_other_sets_stand_in_tables_of_their_own(tmp_path: Path, out: Path) -> None:
    write_run(tmp_path / "a", maps=(0.9,))
    other = write_run(tmp_path / "b", maps=(0.2,), eval_set="/sets/other/eval")
    write_predictions(other / "predictions.h5", *scores(1, clips=30))
    page = report(out, tmp_path / "a", tmp_path / "b")
    tables = [name for name in page.tables if name.startswith("table-2")]
    assert len(tables) == 2
    best = [
        {row[0]: row[-1].strip() for row in page.tables[t]}[TABLE_2["cnn_trans"].title]
        for t in tables
    ]
    assert best == ["0.900", "0.200"]


def test_the_same_set_under_another_path_is_the_same(tmp_path: Path, out: Path) -> None:
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", eval_set="elsewhere/eval", seed=1)
    page = report(out, tmp_path / "a", tmp_path / "b")
    assert len([name for name in page.tables if name.startswith("table-2")]) == 1


def test_table_3(tmp_path: Path, out: Path) -> None:
    run = write_run(tmp_path / "ast", model="ast", proc="A3", maps=(0.321,))
    page = report(out, run, write_profile(tmp_path / "profile.json"))
    rows = {row["stride"]: row for row in page.table("table-3")}
    cells = {row[0]: row for row in page.cells("table-3")[1:]}
    assert list(rows) == ["4×4", "6×6", "8×8", "10×10", "12×12", "16×16"]
    true = {"4×4": "1,261", "6×6": "585", "8×8": "343", "10×10": "195", "12×12": "165"}
    for stride, count in true.items():
        grid, counted, printed, hours = cells[stride][2:6]
        assert counted == count and math.prod(map(int, grid.split("×"))) == int(
            count.replace(",", "")
        )
        side = int(stride.split("×")[0])
        assert printed == f"{TABLE_3['A3'][side].patches:,}"
        assert float(hours) == pytest.approx(1 / side, rel=1e-2)
        assert cells[stride][6] == f"{TABLE_3['A3'][side].hours_per_epoch:g}"
    assert cells["8×8"][-2:] == ["0.321", "0.410"] and cells["6×6"][-2:] == ["–", "0.408"]


def test_table_4(tmp_path: Path, out: Path) -> None:
    runs = tmp_path / "runs"
    lost = {"balancing": -5.0, "mixup": 5.0, "SpecAugment": 10.0, "normalisation": 25.0}
    write_ablation(runs / "first", lost)
    write_ablation(runs / "second", {part: x + 2 for part, x in lost.items()}, seed=1)
    write_ablation(runs / "other", lost, proc="A2")
    write_run(runs / "first" / "baseline")
    damaged = write_ablation(runs / "damaged", lost)
    damaged.write_text(damaged.read_text()[:300])
    page = report(out, runs)
    assert len([name for name in page.tables if name.startswith("table-4")]) == 2
    assert any("damaged/ablate.json is damaged" in note for note in page.notes)
    first, *rows = page.cells("table-4-0")
    assert first == ["without", "mAP", "lost", "mAP", "lost", "ours, mean ± spread", "paper"]
    assert rows[0][:2] == ["nothing", "0.400"]
    for (name, *cells), (part, x) in zip(rows[1:], lost.items(), strict=True):
        paper, spread = TABLE_4[part]
        want = [
            f"{0.4 * (1 - x / 100):.3f}", f"{x:.1f} %",
            f"{0.4 * (1 - (x + 2) / 100):.3f}", f"{x + 2:.1f} %",
            f"{x + 1:.1f} ± 1.0 %", f"{paper} ± {spread} %",
        ]  # fmt: skip
        assert (name, cells) == (part, [text.replace("-", "−") for text in want])
    assert page.cells("table-4-1")[2][-2] == "−5.0 %"  # one ablation has no spread


def test_figure_2(tmp_path: Path, out: Path) -> None:
    write_run(tmp_path / "a")
    page = report(out, tmp_path / "a", quality=write_quality(tmp_path / "qa.csv"))
    (trace,) = page.chart("figure-2")["traces"]
    logit, target = scores(0)
    ap = [average_precision_score(target[:, k], logit[:, k]) for k in range(4)]
    quality = [1.0, 0.8, 0.5, 0.25]
    for threshold, value in zip(trace["x"], trace["y"], strict=True):
        assert value == pytest.approx(
            np.mean([a for a, q in zip(ap, quality, strict=True) if q >= threshold])
        )
    assert trace["x"][0] == 0.25 and trace["x"][-1] == 1.0
    assert trace["text"][0] == "4 classes"


def test_a_quality_table_of_other_classes_leaves_figure_2_out(tmp_path: Path, out: Path) -> None:
    write_run(tmp_path / "a")
    table = tmp_path / "qa.csv"
    table.write_text("id,quality\n/m/other,1.0\n")
    page = report(out, tmp_path / "a", quality=table)
    assert all(chart["id"] != "figure-2" for chart in page.data["data-charts"])
    assert "--label-quality with a CSV that has their classes" in page.text


def test_noise_scale(tmp_path: Path, out: Path) -> None:
    write_run(tmp_path / "a", batch=16, lr=2e-4)
    page = report(out, tmp_path / "a")
    (row,) = page.table("noise-scale")
    assert row["N from"] == "steps × batch" and row["training clips N"] == f"{NUM_TRAIN:,}"
    assert float(row["g"]) == pytest.approx(2e-4 * (NUM_TRAIN / 16 - 1), rel=5e-3)
    a4 = PROCEDURES["A4"]
    assert float(row["g in the paper"]) == pytest.approx(
        a4.lr * (TRAIN_CLIPS / a4.batch - 1), rel=5e-3
    )
    (trace,) = page.chart("noise-chart")["traces"]
    assert trace["y"] == pytest.approx([2e-4 / e * (NUM_TRAIN / 16 - 1) for e in (1, 2, 3)])


def test_profiles(tmp_path: Path, out: Path) -> None:
    page = report(out, write_profile(tmp_path / "p.json"))
    row = page.table("cost-0")[0]
    assert row["model"] == "cnn_trans A4" and row["clips/s"] == "10,000"
    assert row["parameters"] == "12.1 M" and row["paper's hours"] == "8.84 (2 × V100)"
    hours = {row["model"]: row["paper's hours"] for row in page.table("cost-0")}
    assert hours["ast A3 8×8"] == "8.84 (2 × V100)", "Table 1 has this stride"
    assert hours["ast A3 4×4"] == "–"
    assert "needs run folders of fastat train" in page.text


def test_a_row_that_does_not_fit_the_memory_is_shown_without_its_times(
    tmp_path: Path, out: Path
) -> None:
    profile = write_profile(tmp_path / "p.json")
    document = json.loads(profile.read_text())
    times = ("ms", "clips_per_s", "tflops", "hours_per_epoch", "hours", "peak_memory_gib")
    document["rows"][1] |= dict.fromkeys(times) | {"out_of_memory": True}
    profile.write_text(json.dumps(document))
    page = report(out, profile)
    row = page.table("cost-0")[1]
    assert row["model"] == "ast A3 4×4" and row["GiB"] == "full" and row["clips/s"] == "–"
    assert page.cells("table-3")[1][5] == "–"


def test_two_profiles_of_a_device_are_told_apart(tmp_path: Path, out: Path) -> None:
    page = report(out, write_profile(tmp_path / "p.json"), write_profile(tmp_path / "q.json"))
    assert "A device (p.json)" in page.text and "A device (q.json)" in page.text


def test_empty_sections_say_what_would_fill_them(tmp_path: Path, out: Path) -> None:
    page = report(out, write_run(tmp_path / "a"))
    for needed in ("--label-quality", "fastat ablate", "--strides 4,6"):
        assert needed in page.text


# ------------------------------------------------------------------------------ what others wrote
def test_names_are_not_markup(tmp_path: Path, out: Path) -> None:
    run = write_run(tmp_path / "<b>run<%2Fscript><i>")
    profile = write_profile(tmp_path / "p.json")
    document = json.loads(profile.read_text())
    document["device"] = document["rows"][0]["model"] = EVIL
    profile.write_text(json.dumps(document))
    page = report(out, run, profile)
    assert not {"b", "i", "img"} & page.tags
    assert page.data["data-classes-0"]["names"] == NAMES
    assert page.data["data-runs"] == [run.name]
    assert EVIL in page.text


def test_a_name_that_is_no_utf8(tmp_path: Path, out: Path) -> None:
    write_run(tmp_path / "run-\udcff")
    page = report(out, tmp_path / "run-\udcff")
    assert page.table("all-runs")[0]["run"] == "run-?"


def test_nothing_is_taken_from_the_network(tmp_path: Path, out: Path) -> None:
    report(out, write_run(tmp_path / "a"))
    ours = out.read_text("utf-8").replace(get_plotlyjs(), "")
    assert len(ours) < 100_000
    assert "http:" not in ours and "https:" not in ours and "@import" not in ours
    assert "default-src 'none'" in ours


# ------------------------------------------------------------------------------ damage and mistakes
def _cut(name: str, length: int) -> Callable[[Path], object]:
    """Truncates a file of a run."""

    def cut(run: Path) -> None:
        (run / name).write_bytes((run / name).read_bytes()[:length])

    return cut


def _other_sizes(run: Path) -> None:
    with h5py.File(run / "predictions.h5", "a") as file:
        del file["target"]
        file["target"] = np.zeros((3, 5), bool)


def _not_finite(run: Path) -> None:
    with h5py.File(run / "predictions.h5", "a") as file:
        file["logit"][0, 0] = np.nan


def _metrics(text: str) -> Callable[[Path], object]:
    return lambda run: (run / "metrics.jsonl").write_text(text)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a cut line": (_cut("metrics.jsonl", 400), "metrics.jsonl"),
    "a line of something else": (_metrics("[1]\n"), "metrics.jsonl"),
    "text for a number": (_metrics('{"epoch": 1, "step": 5, "mAP": "high"}\n'), "mAP, got 'high'"),
    "a line without its epoch": (_metrics('{"mAP": 0.5}\n'), "'epoch'"),
    "a number too large": (
        _metrics(f'{{"epoch": 1, "step": 5, "mAP": {10**400}}}\n'),
        "metrics.jsonl",
    ),
    "cut predictions": (_cut("predictions.h5", 700), "predictions.h5"),
    "predictions of two sizes": (_other_sizes, "expected [clips, classes]"),
    "predictions not finite": (_not_finite, "not finite"),
    "no env.json": (lambda run: (run / "env.json").unlink(), "env.json"),
    "another env.json": (lambda run: (run / "env.json").write_text("[1]"), "env.json"),
    "a cut config": (_cut("config.json", 300), "config.json is damaged"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_run_is_a_line_of_the_page(damage: str, tmp_path: Path, out: Path) -> None:
    run = write_run(tmp_path / "runs" / "broken")
    write_run(tmp_path / "runs" / "whole")
    spoil, message = DAMAGES[damage]
    spoil(run)
    page = report(out, tmp_path / "runs")
    [note] = [note for note in page.notes if note.startswith("left out: ")]
    assert "broken" in note and message in note
    assert [row["run"] for row in page.table("all-runs")] == ["whole"]


@pytest.mark.parametrize("missing", ["metrics.jsonl", "predictions.h5", "both"])
def test_an_unfinished_run_is_shown(missing: str, tmp_path: Path, out: Path) -> None:
    """The first epoch has not ended, or the predictions were deleted."""
    run = write_run(tmp_path / "runs" / "new")
    for name in ("metrics.jsonl", "predictions.h5"):
        if missing in (name, "both"):
            (run / name).unlink()
    write_run(tmp_path / "runs" / "whole")
    page = report(out, tmp_path / "runs")
    rows = {row["run"]: row for row in page.table("all-runs")}
    done, score = ("0 of 3", "–") if missing != "predictions.h5" else ("3 of 3", "0.500")
    assert (rows["new"]["epochs"], rows["new"]["best mAP"]) == (done, score)
    assert ("data-classes-0" in page.data) == (missing == "metrics.jsonl")


def test_a_run_without_scores(tmp_path: Path, out: Path) -> None:
    page = report(out, write_run(tmp_path / "a", eval_set=None, seed=None))
    assert page.chart("loss") and "data-classes-0" not in page.data


def test_what_is_left_out_is_said_on_the_terminal_too(tmp_path: Path, out: Path) -> None:
    write_run(tmp_path / "runs" / "a")
    (write_run(tmp_path / "runs" / "b") / "config.json").write_text("{")
    done = fastat("report", tmp_path / "runs", tmp_path / "runs" / "a", "--out", out)
    assert "left out" in done.stderr and "b/config.json is damaged" in done.stderr
    assert [row["run"] for row in Page(out).table("all-runs")] == ["a"]


def test_runs_of_the_same_name_are_told_apart(tmp_path: Path, out: Path) -> None:
    for parent in ("x", "y"):
        write_run(tmp_path / parent / "same")
    page = report(out, tmp_path / "x", tmp_path / "y")
    assert page.data["data-runs"] == ["x/same", "y/same"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("x", "the JSON of fastat profile"),
        ("[]", "the JSON of fastat profile"),
        ('{"schema": "fastat.profile/9"}', "fastat.profile/9"),
        ('{"epoch": 1}', "'schema'"),
        ('{"schema": "fastat.profile/1", "device": "d", "rows": [{}]}', "'ms'"),
        (
            '{"schema": "fastat.profile/1", "rows": [{"model": "a", "proc": "b", "ms": null, '
            '"precision": "fp32", "grid": null, "out_of_memory": false, "params": "many"}]}',
            "a number as params",
        ),
    ],
)
def test_json_of_something_else(content: str, message: str, tmp_path: Path, out: Path) -> None:
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(ValueError) as raised:
        report(out, tmp_path / "x.json")
    assert message in str(raised.value) and "x.json" in str(raised.value)
    assert not out.exists()


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (("nowhere", "--out", "r.html"), 2, "nowhere does not exist"),
        (("empty", "--out", "r.html"), 2, "found no config.json"),
        (("run", "--out", "r.pdf"), 2, "ends in .html"),
        (("run", "--out", "nowhere/r.html"), 2, "there is no folder"),
        (("run", "--out", "folder.html"), 2, "is a folder"),
        (("run", "--out", "r.html", "--label-quality", "x.csv"), 2, "label quality x.csv"),
        (("broken", "--out", "r.html"), 1, "broken/config.json"),
        (("--out", "r.html"), 2, "'paths'"),
    ],
)
def test_mistakes_are_one_line(
    args: tuple[str, ...],
    code: int,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("empty", "folder.html"):
        Path(name).mkdir()
    write_run(Path("run"))
    (write_run(Path("broken")) / "config.json").write_text('{"proc": 1}')
    Path("r.html").write_text("before")
    assert message in one_line(fastat("report", *args, code=code))
    assert Path("r.html").read_text() == "before"


@pytest.mark.full
def test_a_page_of_audiosets_size_stays_small(tmp_path: Path, out: Path) -> None:
    """20,126 clips, 527 classes, in two runs."""
    for i in range(2):
        run = write_run(tmp_path / f"{i}", seed=None)
        rng = np.random.default_rng(i)
        target = rng.random((20_126, 527)) < rng.uniform(0.001, 0.2, 527)
        score = (rng.random(target.shape) + 0.3 * target).astype(np.float32)
        write_predictions(run / "predictions.h5", score, target)
    report(out, tmp_path / "0", tmp_path / "1")
    assert out.stat().st_size - len(get_plotlyjs()) < 8_000_000
