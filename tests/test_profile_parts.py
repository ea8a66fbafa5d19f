"""GFLOP by part: they sum to the whole, and every model's lie where they belong."""

import pytest
import torch

from fastat.costs import forward_gflop
from fastat.models import create_model, list_models
from fastat.profile.parts import PARTS, gflop_parts

HAS = {
    "ast": {"embedding", "attention", "mlp", "head"},
    "transformer": {"embedding", "attention", "mlp", "head"},
    "cnn_trans": {"convolution", "attention", "mlp", "head"},
    "conformer": {"embedding", "attention", "mlp", "convolution", "head"},
    "resnet50": {"convolution", "head"},
    "resnet34": {"convolution", "head"},
    "crnn": {"convolution", "recurrent", "head"},
}


@pytest.mark.parametrize("name", list_models())
def test_parts_sum_to_the_whole(name: str) -> None:
    with torch.device("meta"):
        model = create_model(name, num_mels=64, num_frames=400, num_classes=527)
    parts = gflop_parts(model, 400, 64)
    assert tuple(parts) == PARTS
    assert sum(parts.values()) == pytest.approx(forward_gflop(model, 400, 64), rel=1e-9)
    assert {part for part, gflop in parts.items() if gflop} == HAS[name]


def test_parts_of_the_ast() -> None:
    with torch.device("meta"):
        model = create_model(
            "ast", num_mels=64, num_frames=400, num_classes=527, fstride=8, tstride=8, num_layers=3
        )
    parts = gflop_parts(model, 400, 64)
    patches, width, layers = 7 * 49, 768, 3
    tokens = patches + 2
    assert parts["embedding"] * 1e9 == 2 * patches * 16 * 16 * width
    projections = 2 * tokens * width * 4 * width
    scores_and_sum = 2 * 2 * tokens * tokens * width
    assert parts["attention"] * 1e9 == pytest.approx(layers * (projections + scores_and_sum))
    assert parts["mlp"] * 1e9 == pytest.approx(layers * 2 * tokens * width * 8 * width)
    assert parts["head"] * 1e9 == pytest.approx(2 * width * 527)


def test_parts_of_the_conformer() -> None:
    with torch.device("meta"):
        model = create_model("conformer", num_mels=64, num_frames=400, num_classes=527)
    parts = gflop_parts(model, 400, 64)
    tokens, width, layers = 100, 768, 12
    assert parts["mlp"] * 1e9 == pytest.approx(layers * 2 * 2 * tokens * width * 2 * 1024)
    pointwise = layers * 2 * tokens * 3 * width * width
    depthwise = 2 * tokens * width * (31 + 11 * 15)
    assert parts["convolution"] * 1e9 == pytest.approx(pointwise + depthwise)


def test_parts_of_the_gru() -> None:
    with torch.device("meta"):
        model = create_model("crnn", num_mels=64, num_frames=400, num_classes=527)
    parts = gflop_parts(model, 400, 64)
    frames, width, hidden = 100, 1024, 512
    assert parts["recurrent"] * 1e9 == pytest.approx(2 * frames * 2 * 3 * hidden * (width + hidden))
