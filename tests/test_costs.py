"""What each model costs, counted: fastat models, and GFLOP by module."""

import json
from typing import Any

import pytest
import torch
from torch import nn

from fastat.models import create_model, list_models
from fastat.models.costs import count_parameters, forward_gflop, gflop_by_module
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


# ---------------------------------------------------------------------------- by module
HAS = {
    "ast": {"model", "layers.attn", "layers.mlp", "head"},
    "transformer": {"proj", "layers", "layers.qkv", "layers.proj", "layers.fc1", "layers.fc2"},
    "cnn_trans": {"talnet.blocks", "layers", "layers.qkv", "layers.proj", "layers.fc1"},
    "conformer": {"stem", "layers.ffn1", "layers.attn", "layers.conv", "layers.ffn2", "head"},
    "resnet50": {"model", "trunk.layer1", "trunk.layer4"},
    "resnet34": {"model", "trunk.layer1", "trunk.layer4"},
    "crnn": {"talnet.blocks", "gru", "head.fc_att", "head.fc_prob"},
}


def by_module(name: str, **options: Any) -> dict[str, float]:
    with torch.device("meta"):
        model = create_model(name, num_mels=64, num_frames=400, num_classes=527, **options)
    found = gflop_by_module(model, 400, 64)
    assert sum(found.values()) == pytest.approx(forward_gflop(model, 400, 64), rel=1e-9)
    return found


@pytest.mark.parametrize("name", list_models())
def test_modules_sum_to_the_whole(name: str) -> None:
    found = by_module(name)
    assert set(found) >= HAS[name] and min(found.values()) > 0


def test_modules_of_the_ast() -> None:
    found = by_module("ast", fstride=8, tstride=8, num_layers=3)
    patches, width, layers = 7 * 49, 768, 3
    tokens = patches + 2
    assert found["model"] * 1e9 == 2 * patches * 16 * 16 * width
    projections = 2 * tokens * width * 4 * width
    scores_and_sum = 2 * 2 * tokens * tokens * width
    assert found["layers.attn"] * 1e9 == pytest.approx(layers * (projections + scores_and_sum))
    assert found["layers.mlp"] * 1e9 == pytest.approx(layers * 2 * tokens * width * 8 * width)
    assert found["head"] * 1e9 == pytest.approx(2 * width * 527)


def test_modules_of_the_conformer() -> None:
    found = by_module("conformer")
    tokens, width, layers = 100, 768, 12
    for half in ("layers.ffn1", "layers.ffn2"):
        assert found[half] * 1e9 == pytest.approx(layers * 2 * tokens * width * 2 * 1024)
    pointwise = layers * 2 * tokens * 3 * width * width
    depthwise = 2 * tokens * width * (31 + 11 * 15)
    assert found["layers.conv"] * 1e9 == pytest.approx(pointwise + depthwise)


def test_modules_of_the_gru() -> None:
    found = by_module("crnn")
    frames, width, hidden = 100, 1024, 512
    assert found["gru"] * 1e9 == pytest.approx(2 * frames * 2 * 3 * hidden * (width + hidden))
