"""Frozen parameters, BatchNorm statistics under them, and learning rates by layer."""

from typing import Any

import pytest
import torch
from torch import nn

from fastat.models import create_model
from fastat.system.errors import UserError
from fastat.training.finetune import freeze, parameter_groups, train_mode
from tests.conftest import SMALL_MODELS


def model_of(name: str = "cnn_trans", **options: Any) -> nn.Module:
    options = SMALL_MODELS[name] | options
    return create_model(name, num_mels=64, num_frames=40, num_classes=3, **options)


# --------------------------------------------------------------------------------------- freeze
def test_patterns_freeze_what_they_match_and_nothing_else(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    model = model_of()
    freeze(model, ["talnet.*", "layers.0.norm?.bias"])
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    want = {name for name, _ in model.named_parameters() if name.startswith("talnet.")}
    assert want and frozen == want | {"layers.0.norm1.bias", "layers.0.norm2.bias"}
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert f"{trained:,} of {total:,} parameters are trained" in caplog.text


def test_no_pattern_freezes_nothing() -> None:
    model = model_of()
    freeze(model, [])
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("pattern", ["trunk.*", "talnet", "TALNET.*", ""])
def test_a_pattern_that_matches_nothing(pattern: str) -> None:
    with pytest.raises(UserError, match=r"none of .*talnet\.blocks\.0\.conv\.weight") as error:
        freeze(model_of(), ["head.*", pattern])
    assert f"--freeze {pattern!r} " in str(error.value) and ", head." in str(error.value)


@pytest.mark.parametrize("patterns", [["*"], ["talnet.*", "layers.*", "head.*"]])
def test_something_must_be_trained(patterns: list[str]) -> None:
    with pytest.raises(UserError, match="leaves no parameter to train"):
        freeze(model_of(), patterns)


def test_only_a_wholly_frozen_batch_norm_keeps_its_statistics() -> None:
    model = model_of(dropout=0.5)
    freeze(model, ["talnet.blocks.[0-4].*", "talnet.blocks.5.bn.weight"])
    model.eval()
    train_mode(model)
    norms = {n: m for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert len(norms) == 10
    for name, norm in norms.items():
        assert norm.training == (int(name.split(".")[2]) > 4), name
    assert all(m.training for m in model.modules() if not isinstance(m, nn.BatchNorm2d))
    before = {n: m.running_mean.clone() for n, m in norms.items() if m.running_mean is not None}
    model(torch.randn(4, 40, 64))
    for name, norm in norms.items():
        assert norm.running_mean is not None
        assert torch.equal(norm.running_mean, before[name]) != norm.training, name


# ---------------------------------------------------------------------------------- layer decay
def scales(model: nn.Module, decay: float) -> dict[str, float]:
    names = {id(p): name for name, p in model.named_parameters()}
    groups = parameter_groups(model, decay)
    return {names[id(p)]: g["lr_scale"] for g in groups for p in g["params"]}


@pytest.mark.parametrize(
    ("name", "num_layers", "below", "above"),
    [
        ("ast", 1, "patch_embed. cls_token dist_token pos_embed", "norm. head_norm. head."),
        ("transformer", 2, "proj. proj_norm.", "head."),
        ("conformer", 2, "stem.", "head."),
        ("cnn_trans", 1, "talnet.", "head."),
    ],
)
def test_the_rate_decays_from_the_head_down(
    name: str, num_layers: int, below: str, above: str
) -> None:
    model = model_of(name)
    got = scales(model, 0.5)
    assert got.keys() == {n for n, _ in model.named_parameters()}
    starts = dict.fromkeys(below.split(), 0.5 ** (num_layers + 1)) | dict.fromkeys(above.split(), 1)
    for i in range(num_layers):
        starts[f"layers.{i}."] = 0.5 ** (num_layers - i)
    for parameter, scale in got.items():
        (start,) = (s for s in starts if parameter.startswith(s))
        assert scale == starts[start], parameter
    assert len(parameter_groups(model, 0.5)) == num_layers + 2


def test_without_decay_there_is_one_group() -> None:
    for name in ("cnn_trans", "crnn"):
        model = model_of(name)
        (group,) = parameter_groups(model, 1.0)
        assert group["lr_scale"] == 1 and len(group["params"]) == len(list(model.parameters()))


def test_frozen_parameters_are_in_no_group() -> None:
    model = model_of("transformer")
    freeze(model, ["layers.0.*", "proj*"])
    names = scales(model, 0.5)
    assert {name.split(".")[0] for name in names} == {"layers", "head"}
    assert {name.split(".")[1] for name in names if name.startswith("layers")} == {"1"}
