"""fastat models: what each model costs, counted, beside the paper's own numbers."""

import json

import pytest
import torch
from torch import nn

from fastat.costs import count_parameters, forward_gflop
from fastat.models import list_models
from tests.conftest import QUIET, fastat

GFLOP = {
    "ast": (63.1, 261),
    "transformer": (26.8, 84.4),
    "cnn_trans": (8.96, 15.4),
    "conformer": (17.9, 47.4),
    "resnet50": (4.18, 21.1),
    "crnn": (7.31, 10.9),
}
"""Of a clip, at 64 x 400 and at 128 x 1024; AST with strides 8 and 10."""

PARAMS = {
    "ast": (85_926_671, 86_594_063),
    "transformer": (29_234_974, 29_284_126),
    "cnn_trans": (12_097_662, 8_562_510),
    "conformer": (88_340_751, 88_406_287),
    "resnet50": (25_661_406, 25_661_406),
    "crnn": (10_520_702, 6_985_550),
}


def test_models_as_json() -> None:
    rows = {row["name"]: row for row in json.loads(fastat("models", "--json").stdout)}
    assert list(rows) == list_models()
    for name, want in PARAMS.items():
        costs = rows[name]["costs"]
        assert [c["feature"] for c in costs] == ["logmel64", "fbank128"]
        assert tuple(c["params"] for c in costs) == want
        assert [c["gflop"] for c in costs] == pytest.approx(GFLOP[name], rel=0.02)
    assert rows["ast"]["paper"]["mAP"] == {"A1": 0.43, "A2": 0.274, "A3": 0.41, "A4": 0.268}
    assert set(rows["crnn"]["paper"]["mAP"]) == {"A2", "A4"}, "a dash is no number"


def test_models_as_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(QUIET, "COLUMNS", "50")
    text = fastat("models").stdout
    for want in ("12,097,662", "12.1 M", "8.96", "0.411 A4", "transformer"):
        assert want in text
    assert "…" not in text


def test_counts_of_a_layer() -> None:
    with torch.device("meta"):
        layer = nn.Linear(64, 10)
    assert count_parameters(layer) == 650
    assert forward_gflop(layer, 400, 64) == 2 * 400 * 64 * 10 / 1e9
