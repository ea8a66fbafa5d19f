"""Label quality: the table as AudioSet has it, mAP over the classes that reach a quality."""

import math
from pathlib import Path

import numpy as np
import pytest

from fastat.cli import trained
from fastat.data.shards import PackedSet
from fastat.evaluation.evaluate import evaluate_checkpoint
from fastat.evaluation.label_quality import map_above, quantile_thresholds, read_quality
from fastat.system.errors import UserError
from tests.conftest import TinySets
from tests.test_cli import save


def test_audioset_s_table(tmp_path: Path) -> None:
    path = tmp_path / "qa_true_counts.csv"
    path.write_text("\ufefflabel_id,num_rated,num_true\n/m/09x0r,10,9\n/m/05zppz,0,0\n/m/02,4,4\n")
    assert read_quality(path) == {"/m/09x0r": 0.9, "/m/02": 1.0}


@pytest.mark.parametrize("column", ["id", "label_id", "mid"])
def test_a_table_of_shares(tmp_path: Path, column: str) -> None:
    path = tmp_path / "q.csv"
    path.write_text(f"name,quality,{column}\nDog,0.25,/m/dog\nCat,1,/m/cat\n")
    assert read_quality(path) == {"/m/dog": 0.25, "/m/cat": 1.0}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "got an empty file"),
        ("label_id,num_rated\na,3\n", "expected columns label_id, num_rated, num_true"),
        ("label_id,num_rated,num_true\na,3\n", "line 2: expected 3 cells, got 2"),
        ("label_id,num_rated,num_true\na,3,4\n", "num_true at most num_rated"),
        ("label_id,num_rated,num_true\na,3,2\na,3,2\n", "line 3: class 'a'"),
        ("label_id,num_rated,num_true\na,0,0\n", "no class was rated"),
        ("id,quality\na,1.5\n", "expected a quality in 0..1, got '1.5'"),
        ("id,quality\na,nan\n", "expected a quality in 0..1, got 'nan'"),
        ('id,quality\n"a,1\n', "not CSV"),
    ],
)
def test_mistakes_name_the_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "q.csv"
    path.write_text(text)
    with pytest.raises(UserError, match="label quality .*q.csv") as error:
        read_quality(path)
    assert message in str(error.value)


def test_what_is_no_table(tmp_path: Path) -> None:
    binary = tmp_path / "b.csv"
    binary.write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path, tmp_path / "nowhere.csv", binary):
        with pytest.raises(UserError, match="label quality"):
            read_quality(path)


def test_means_over_the_classes_that_reach_a_quality() -> None:
    """Class d has no AP, class e no quality: neither counts."""
    ap = np.array([0.2, 0.4, 0.9, math.nan, 0.7])
    quality = {"a": 0.0, "b": 0.5, "c": 1.0, "d": 1.0, "unknown": 0.3}
    points = map_above(ap, list("abcde"), quality, [0.0, 0.5, 0.6, 1.0])
    assert [p.classes for p in points] == [3, 2, 1, 1]
    assert [p.mAP for p in points] == pytest.approx([0.5, 0.65, 0.9, 0.9])
    nothing = map_above(ap, list("vwxyz"), quality, [0.0])[0]
    assert nothing.classes == 0 and math.isnan(nothing.mAP)


def test_thresholds_are_qualities_of_scored_classes() -> None:
    ap = np.array([0.2, 0.4, 0.9, math.nan])
    quality = {"a": 0.1, "b": 0.5, "c": 1.0, "d": 0.2}
    assert quantile_thresholds(ap, list("abcd"), quality) == [0.1, 0.5, 1.0]
    assert quantile_thresholds(ap, list("wxyz"), quality) == []


def test_eval_prints_them(
    tiny_sets: TinySets, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    packed = PackedSet.open(tiny_sets.train)
    save(tmp_path / "run", packed.classes, -30.0, 20.0)
    table, per_class = tmp_path / "q.csv", tmp_path / "ap.csv"
    table.write_text("label_id,num_rated,num_true\nbuzz,10,10\nclick,10,5\n")
    done = evaluate_checkpoint(
        tmp_path / "run", tiny_sets.eval, batch=64, precision="auto", predictions=None,
        per_class=per_class, label_quality=table,
    )["label_quality"]  # fmt: skip
    ap = [float(x.split(",")[3]) for x in per_class.read_text().splitlines()[1:]]
    assert done["classes_without_quality"] == 1  # hiss
    assert [(p["threshold"], p["classes"]) for p in done["points"]] == [(0.5, 2), (1.0, 1)]
    assert [p["mAP"] for p in done["points"]] == pytest.approx([sum(ap[:2]) / 2, ap[0]], abs=1e-5)
    trained.evaluate(tmp_path / "run", tiny_sets.eval, label_quality=table)
    shown = capsys.readouterr().out
    assert "50%" in shown and "100%" in shown and "1 scored classes have no label" in shown
    table.write_text("label_id,num_rated,num_true\nother,10,10\n")
    with pytest.raises(UserError, match="has none of the scored classes"):
        evaluate_checkpoint(
            tmp_path / "run", tiny_sets.eval, batch=64, precision="auto", predictions=None,
            per_class=None, label_quality=table,
        )  # fmt: skip
