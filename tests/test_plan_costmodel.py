"""The cost model of fastat profile --plan: what it counts, and how well it predicts."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytest
import torch

from fastat.costs import count_parameters, forward_gflop
from fastat.features import CLIP_SAMPLES
from fastat.models import create_model
from fastat.paper import NUM_CLASSES
from fastat.profile.costmodel import (
    BAR,
    CostModel,
    Point,
    Trust,
    Work,
    count_work,
    left_out_errors,
)
from fastat.profile.measure import Case, measure
from fastat.profile.noise import noise_set
from fastat.profile.plan_points import Setup, Works, cases_to_measure
from fastat.system.device import auto_precision
from tests.conftest import SMALL_MODELS

CPU = torch.device("cpu")
SETUP = Setup(CPU, "bf16", False, CLIP_SAMPLES, NUM_CLASSES)
PAIRS = [
    (model, feature)
    for model in ("ast", "cnn_trans", "conformer", "crnn", "resnet50", "transformer")
    for feature in ("logmel64", "fbank128")
]
WORKS = Works(CLIP_SAMPLES, NUM_CLASSES)


def stride(distance: int) -> dict[str, Any]:
    return {"fstride": distance, "tstride": distance}


# ------------------------------------------------------------------------------ counting
@pytest.mark.parametrize("name", SMALL_MODELS)
def test_all_operations_are_counted_once(name: str) -> None:
    with torch.device("meta"):
        model = create_model(name, num_mels=64, num_frames=40, num_classes=5, **SMALL_MODELS[name])
    work = count_work(model, 40, 64)
    assert work.product + work.attention == pytest.approx(forward_gflop(model, 40, 64))
    assert work.params == count_parameters(model)
    assert work.sequence == (10 if name == "crnn" else 0), "TALNet leaves a frame of four"
    has_attention = name in ("ast", "transformer", "cnn_trans", "conformer")
    assert (work.attention > 0) == has_attention
    assert work.traffic > 0


def test_attention_grows_with_the_square_of_the_tokens() -> None:
    found = []
    for distance in (16, 8):
        with torch.device("meta"):
            model: Any = create_model(
                "ast", num_mels=64, num_frames=400, num_classes=5, size="tiny224", num_layers=2,
                **stride(distance),
            )  # fmt: skip
        found.append((model.pos_embed.shape[1], count_work(model, 400, 64)))
    for tokens, work in found:
        # Scores and weighted sums: 2 x 2 N^2 D a layer, D = 192.
        assert work.attention == pytest.approx(2 * 4 * tokens**2 * 192 / 1e9)
    (few, short), (many, long) = found
    assert long.traffic / short.traffic == pytest.approx(many / few, rel=0.05), "no N^2 in it"


# ------------------------------------------------------------------------------ a known device
def true_seconds(rates: dict[str, Any], case: Case) -> float:
    """Of a device of which all is known."""
    w, r = WORKS(case), rates[case.model]
    per_clip = w.product / r[3] + w.attention / r[4] + w.traffic / r[5]
    return float(r[0] + w.params / r[1] + w.sequence / r[2] + case.batch * per_clip)


@pytest.fixture(scope="module")
def rates() -> dict[str, Any]:
    """Launches (s), parameters and time steps a second, GFLOP/s twice, GB/s: each model's own."""
    rng = np.random.default_rng(1)
    device = np.array([2e-3, 4e8, 1e3, 110.0, 40.0, 6.0])
    return {m: device * rng.uniform(0.7, 1.4, 6) for m in dict(PAIRS)}


def points_of(rates: dict[str, Any], cases: list[Case], noise: float = 0.0) -> list[Point]:
    rng = np.random.default_rng(0)
    return [
        Point(c.model, WORKS(c), c.batch, true_seconds(rates, c) * math.exp(noise * z))
        for c, z in zip(cases, rng.standard_normal(len(cases)), strict=True)
    ]


LEFT_OUT = [
    SETUP.case(model, proc, options, batch)
    for model, proc, options, batch in (
        ("cnn_trans", "A4", {}, 448),
        ("cnn_trans", "A2", {}, 100),
        ("crnn", "A2", {}, 64),
        ("resnet50", "A3", {}, 80),
        ("resnet50", "A1", {}, 20),
        ("conformer", "A4", {}, 32),
        ("transformer", "A2", {}, 16),
        ("ast", "A3", stride(4), 16),
        ("ast", "A3", stride(6), 80),
        ("ast", "A3", stride(12), 80),
        ("ast", "A1", stride(12), 20),
    )
]
"""Other batches, strides and procedures than are measured; none as small."""


def prediction_errors(fitted: list[Point], asked: list[Case], rates: dict[str, Any]) -> list[float]:
    model = CostModel.fit(fitted)
    return [
        abs(model.predict(c.model, WORKS(c), c.batch) / true_seconds(rates, c) - 1) for c in asked
    ]


def test_a_known_device_is_predicted_from_noisy_points(rates: dict[str, Any]) -> None:
    fitted = points_of(rates, cases_to_measure(PAIRS, SETUP), noise=0.02)
    errors = prediction_errors(fitted, LEFT_OUT, rates)
    assert max(errors) < BAR, errors
    assert Trust.of(left_out_errors(fitted)).median < BAR / 2


@pytest.mark.parametrize(
    "wrong",
    [
        lambda w, b: np.array([1.0, w.params, w.sequence, b, 0, 0]),
        lambda w, b: np.array([0, w.params, 0, 0, 0, 0]),
    ],
    ids=["clips counted, not their work", "parameters alone"],
)
def test_other_features_do_not_predict_it(
    rates: dict[str, Any],
    wrong: Callable[[Work, int], Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Work, "columns", wrong)
    fitted = points_of(rates, cases_to_measure(PAIRS, SETUP), noise=0.02)
    assert max(prediction_errors(fitted, LEFT_OUT, rates)) > 2 * BAR
    assert Trust.of(left_out_errors(fitted)).worst > 2 * BAR


def test_a_wrong_measurement_is_found_by_leaving_it_out(rates: dict[str, Any]) -> None:
    fitted = points_of(rates, cases_to_measure(PAIRS, SETUP))
    fitted[5] = replace(fitted[5], y=3 * fitted[5].y)
    trust = Trust.of(left_out_errors(fitted))
    assert trust.worst_point == 5 and trust.worst > BAR


def test_one_model_alone_and_a_model_never_measured(rates: dict[str, Any]) -> None:
    fitted = points_of(rates, cases_to_measure([("crnn", "logmel64")], SETUP))
    assert {(p.model, p.batch) for p in fitted} == {("crnn", 4), ("crnn", 12)}
    case = SETUP.case("crnn", "A4", {}, 100)
    assert prediction_errors(fitted, [case], rates)[0] < BAR
    model = CostModel.fit(fitted)
    other = WORKS(SETUP.case("cnn_trans", "A4", {}, 1))
    assert model.predict("cnn_trans", other, 4) == float(other.columns(4) @ model.shared) > 0
    assert all((r >= 0).all() for r in [model.shared, *model.own.values()])


def test_largest_batch(rates: dict[str, Any]) -> None:
    model = CostModel.fit(points_of(rates, cases_to_measure(PAIRS, SETUP)))
    work = WORKS(SETUP.case("crnn", "A4", {}, 1))
    most = model.largest_batch("crnn", work, 10.0)
    assert model.predict("crnn", work, most) <= 10.0 < model.predict("crnn", work, most + 1)
    assert model.largest_batch("crnn", work, 1e-6) == 0


def test_no_points() -> None:
    with pytest.raises(ValueError, match="points"):
        CostModel.fit([])


# ------------------------------------------------------------------------------ this device
ROUNDS = 3


@pytest.mark.full
@pytest.mark.quiet
def test_real_steps_are_predicted(tmp_path: Path, device: torch.device) -> None:
    """Small models and clips of two and a half seconds, at steps like those that a plan measures:
    others, predicted, against those measured. Every round measures all of them, so that the weather
    is the same for all."""
    packed = noise_set(tmp_path, num_clips=128, clip_samples=40_000, num_classes=50)
    setup = Setup(
        device, auto_precision(device).precision, False, packed.clip_samples, len(packed.classes)
    )
    works = Works(packed.clip_samples, len(packed.classes))
    scale = 1 if device.type == "cpu" else 8

    def case(model: str, proc: str, batch: int, **options: Any) -> Case:
        return setup.case(model, proc, SMALLER[model] | options, scale * batch)

    fitted = [
        *(case(m, p, b) for m in ("cnn_trans", "crnn") for p in ("A4", "A2") for b in (4, 16)),
        case("ast", "A3", 4, **stride(16)),
        case("ast", "A3", 16, **stride(16)),
        case("ast", "A3", 8, **stride(6)),
        case("ast", "A1", 8, **stride(16)),
        case("ast", "A1", 8, **stride(8)),
    ]
    left_out = [
        *(case(m, p, 10) for m in ("cnn_trans", "crnn") for p in ("A4", "A2")),
        case("ast", "A3", 12, **stride(10)),
        case("ast", "A3", 16, **stride(8)),
        case("ast", "A1", 6, **stride(12)),
    ]
    seconds: dict[int, list[float]] = {i: [] for i in range(len(fitted + left_out))}
    for _ in range(ROUNDS):
        for i, c in enumerate(fitted + left_out):
            found = measure(c, device, packed, seconds=0.7)
            seconds[i].append(found.ms["step"].low / 1e3)
    packed.close()
    y = [median(s) for s in seconds.values()]
    model = CostModel.fit(
        [Point(c.model, works(c), c.batch, t) for c, t in zip(fitted, y, strict=False)]
    )
    errors = [
        abs(model.predict(c.model, works(c), c.batch) / t - 1)
        for c, t in zip(left_out, y[len(fitted) :], strict=True)
    ]
    assert median(errors) < BAR / 2 and max(errors) < BAR, list(
        zip([(c.model, c.proc, c.options, c.batch) for c in left_out], errors, strict=True)
    )


SMALLER: dict[str, dict[str, Any]] = {
    "ast": {"size": "tiny224", "num_layers": 6},
    "cnn_trans": {"embedding": 256, "num_heads": 4},
    "crnn": {"embedding": 256},
}
