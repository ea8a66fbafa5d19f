"""Procedures, the rule for small sets, overrides and what may change on resume."""

import json
import logging
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from fastat.config.procedures import (
    MIN_BATCH,
    MIN_STEPS,
    PROCEDURES,
    SMALL_SET_STEPS,
    Sizes,
    changes,
    model_options,
    procedure_of,
    small_set_sizes,
)
from fastat.config.run import (
    MAY_CHANGE_ON_RESUME,
    TrainConfig,
    parse_field,
    parse_settings,
    parse_stride,
    resolve,
    resumed,
)
from fastat.system.errors import Failure, UserError
from tests.conftest import fastat, one_line

AUDIOSET = 1_998_999


MODELS = ("ast", "transformer", "cnn_trans", "conformer", "resnet50", "resnet34", "crnn")


def resolved(
    proc: str = "A4",
    overrides: dict[str, Any] | None = None,
    *,
    clips: int = AUDIOSET,
    seconds: float = 10.0,
    model: str = "cnn_trans",
    initial: dict[str, Any] | None = None,
) -> TrainConfig:
    given = {"data": "packed/train"} | (overrides or {})
    return resolve(
        proc, model, given, num_clips=clips, clip_seconds=seconds, initial_options=initial
    )


Noted = Callable[..., tuple[TrainConfig, list[str]]]


@pytest.fixture
def noted(caplog: pytest.LogCaptureFixture) -> Noted:
    """``resolved``, with what it logs."""

    def call(*args: Any, **options: Any) -> tuple[TrainConfig, list[str]]:
        caplog.clear()
        with caplog.at_level(logging.INFO, "fastat"):
            config = resolved(*args, **options)
        return config, caplog.messages

    return call


# ----------------------------------------------------------------------------------- procedures
@pytest.mark.parametrize(
    ("proc", "feature", "pretrained", "batch", "lr", "dropout", "masks", "hours", "gpus", "best"),
    [
        ("A1", "fbank128", True, 20, 1e-5, False, (192, 36), 108.0, 4, 0.430),
        ("A2", "fbank128", False, 400, 4e-4, True, (192, 36), 16.45, 4, 0.437),
        ("A3", "logmel64", True, 80, 1e-5, False, (75, 12), 21.0, 2, 0.410),
        ("A4", "logmel64", False, 448, 4e-4, True, (75, 12), 8.84, 2, 0.411),
    ],
)
def test_table_1(
    proc: str,
    feature: str,
    pretrained: bool,
    batch: int,
    lr: float,
    dropout: bool,
    masks: tuple[int, int],
    hours: float,
    gpus: int,
    best: float,
) -> None:
    p = PROCEDURES[proc]
    assert (p.name, p.feature, p.pretrained, p.batch) == (proc, feature, pretrained, batch)
    assert (p.lr, p.dropout, (p.time_mask, p.freq_mask)) == (lr, dropout, masks)
    assert (p.paper_hours, p.paper_gpus, p.paper_map) == (hours, gpus, best)
    assert (p.epochs, p.warmup_steps, p.balance, p.mixup, p.mixup_alpha) == (
        10,
        1000,
        True,
        0.3,
        10,
    )


@pytest.mark.parametrize("proc", PROCEDURES)
def test_on_audioset_a_procedure_is_taken_as_it_is(proc: str, noted: Noted) -> None:
    config, notes = noted(proc)
    p = PROCEDURES[proc]
    assert notes == []
    for name in ("feature", "epochs", "batch", "lr", "warmup_steps", "balance"):
        assert getattr(config, name) == getattr(p, name)
    for name in ("mixup", "mixup_alpha", "time_mask", "freq_mask"):
        assert getattr(config, name) == getattr(p, name)
    assert (config.beta1, config.beta2, config.weight_decay) == (0.9, 0.999, 0.0)
    assert config.schedule == "step"


def test_what_a_procedure_asks_of_a_model() -> None:
    nothing: dict[str, dict[str, Any]] = {proc: {} for proc in PROCEDURES}
    tenth = {"A1": {}, "A2": {"dropout": 0.1}, "A3": {}, "A4": {"dropout": 0.1}}
    ten, eight = {"fstride": 10, "tstride": 10}, {"fstride": 8, "tstride": 8}
    want = dict.fromkeys(MODELS, nothing) | {
        "cnn_trans": {"A1": {}, "A2": {"dropout": 0.25}, "A3": {}, "A4": {"dropout": 0.75}},
        "conformer": tenth,
        "transformer": tenth,
        "ast": {"A1": ten, "A2": ten, "A3": eight, "A4": eight},
    }
    for model in MODELS:
        assert {n: model_options(model, p) for n, p in PROCEDURES.items()} == want[model]
        assert {n: resolved(n, model=model).model_options for n in PROCEDURES} == want[model]


def test_the_users_model_options_come_before_the_weights_and_those_before_the_procedures() -> None:
    own = resolved("A4", {"model_options": {"dropout": 0.1, "embedding": 64}})
    assert own.model_options == {"dropout": 0.1, "embedding": 64}
    weights = {"fstride": 10, "tstride": 10, "size": "tiny224"}
    given = {"init": "/weights", "model_options": {"tstride": 6}}
    config = resolved("A4", given, model="ast", initial=weights)
    assert config.model_options == {"fstride": 10, "tstride": 6, "size": "tiny224"}


# -------------------------------------------------------------------------------------- presets
AUTHORS_ADAM = {"beta1": 0.95, "weight_decay": 5e-7, "statistics": "authors"}
RESNET_128 = {"freq_mask": 48, "mixup": 0.5}  # a time mask of 192 is Table 1's


@pytest.mark.parametrize(
    ("model", "proc", "run"),
    [
        ("crnn", "A2", {"batch": 100}),
        ("crnn", "A4", {"batch": 400, "lr": 1.6e-3}),
        ("resnet50", "A1", {"batch": 188, "lr": 1.6e-4} | RESNET_128),
        ("resnet50", "A2", {"batch": 128, "lr": 1e-4} | RESNET_128),
        ("resnet50", "A3", {"batch": 188, "lr": 1.6e-4}),
        ("ast", "A3", {"mixup": 0.5}),
        ("ast", "A1", {}),
        ("cnn_trans", "A4", {"time_mask": 60}),
        ("cnn_trans", "A2", {}),
        ("conformer", "A4", {}),
    ],
)
def test_the_authors_runs(model: str, proc: str, run: dict[str, Any], noted: Noted) -> None:
    assert changes(procedure_of(proc, model, "authors")) == AUTHORS_ADAM | run
    config, notes = noted(proc, {"preset": "authors"}, model=model)
    assert config.preset == "authors"
    assert {name: getattr(config, name) for name in AUTHORS_ADAM | run} == AUTHORS_ADAM | run
    assert config.beta2 == 0.999
    if not run:
        assert (config.lr, config.batch) == (PROCEDURES[proc].lr, PROCEDURES[proc].batch)
    (note,) = notes  # and none on an LR scaled with the batch
    assert note.startswith("preset authors: ") and "beta1 0.95" in note
    assert config.model_options.get("input_scale") == (8.0 if model == "cnn_trans" else None)


def test_a_preset_is_where_overrides_start_from(noted: Noted) -> None:
    given = {"preset": "authors", "batch": 200, "beta1": 0.9}
    config, notes = noted("A4", given, model="crnn")
    assert (config.batch, config.lr, config.beta1) == (200, 8e-4, 0.9)
    assert "LR 0.0008: 0.0016 scaled with the batch (400 -> 200)" in notes
    assert resolved("A4", {"preset": "paper"}) == resolved("A4")
    with pytest.raises(UserError, match="preset must be one of paper, authors, got 'theirs'"):
        resolved("A4", {"preset": "theirs"})


def test_the_authors_runs_are_shown() -> None:
    document = json.loads(fastat("procs", "--preset", "authors", "--json").stdout)
    assert document.keys() == {*PROCEDURES, "authors"}
    assert document["authors"]["runs"]["crnn"]["A4"] == {"batch": 400, "lr": 1.6e-3}
    table = fastat("procs", "--preset", "authors").stdout
    assert all(text in table for text in ("batch 400, lr 0.0016", "time mask 60", "input scale 8"))
    assert "'mine' is not one of" in one_line(fastat("procs", "--preset", "mine", code=2))


# ------------------------------------------------------------------------- weights to start from
def test_imagenet_weights_are_the_procedures_unless_told() -> None:
    for proc, p in PROCEDURES.items():
        assert resolved(proc, model="ast").pretrained == p.pretrained
        for said in (True, False):
            assert resolved(proc, {"pretrained": said}, model="ast").pretrained == said
        config = resolved(proc, {"init": "/weights"}, model="ast")
        assert (config.pretrained, config.init) == (False, "/weights")
    assert not resolved("A1", {"init": "/weights", "pretrained": False}).pretrained
    with pytest.raises(UserError, match="pretrained and init exclude each other"):
        resolved("A4", {"init": "/weights", "pretrained": True}, model="ast")


@pytest.mark.parametrize(
    ("text", "strides"), [("10x12", (10, 12)), ("8", (8, 8)), ("16x1", (16, 1))]
)
def test_stride(text: str, strides: tuple[int, int]) -> None:
    assert parse_stride(text) == {"fstride": strides[0], "tstride": strides[1]}


@pytest.mark.parametrize("text", ["", "x", "10x", "x10", "0", "10x0", "-8", "8X8", "8x8x8", "8.0"])
def test_stride_that_is_wrong(text: str) -> None:
    with pytest.raises(UserError, match="--stride takes FxT.*10x10"):
        parse_stride(text)


@pytest.mark.parametrize("text", ["0", "-1", "2.5", "many", "1" * 30, "", "\u0663"])
def test_batch_that_is_wrong(text: str) -> None:
    with pytest.raises(UserError, match="--batch must be an integer from 1 on or auto, got"):
        parse_field("batch", text, option="--batch")


# --------------------------------------------------------------------------------- accumulation
def test_accumulation_warns_where_the_paper_does(noted: Noted) -> None:
    for model in MODELS:
        config, notes = noted(overrides={"accumulate": 2}, model=model)
        assert config.accumulate == 2 and config.batch == 448
        warned = any("gradient accumulation >= 2 broke attention models" in n for n in notes)
        assert warned == (model in ("ast", "transformer", "cnn_trans", "conformer"))
        assert not noted(overrides={"accumulate": 1}, model=model)[1]


# ----------------------------------------------------------------------------------- small sets
@pytest.mark.parametrize(
    ("proc", "clips", "sizes"),
    [
        ("A4", 1, Sizes(1, 640)),
        ("A4", 5, Sizes(4, 640)),
        ("A4", 80, Sizes(4, 32)),
        ("A4", 256, Sizes(4, 10)),
        ("A4", 600, Sizes(4, 10)),
        ("A4", 800, Sizes(4, 10)),
        ("A4", 5_000, Sizes(16, 10)),
        ("A4", 20_000, Sizes(64, 10)),
        ("A4", 89_599, Sizes(256, 10)),
        ("A4", 89_600, None),
        ("A1", 600, Sizes(4, 10)),
        ("A1", 3_999, Sizes(16, 10)),
        ("A1", 4_000, None),
        ("A3", 15_999, Sizes(64, 10)),
    ],
)
def test_small_set_values(proc: str, clips: int, sizes: Sizes | None) -> None:
    assert small_set_sizes(PROCEDURES[proc], clips) == sizes


@pytest.mark.parametrize("proc", PROCEDURES)
def test_small_set_rule(proc: str) -> None:
    """Bounds, monotone in the number of clips, and near the wanted number of steps."""
    p = PROCEDURES[proc]
    before = Sizes(0, 10**9)
    for clips in [*range(1, 4000), *range(4000, 100_000, 37)]:
        sizes = small_set_sizes(p, clips)
        enough = clips // p.batch * p.epochs >= SMALL_SET_STEPS
        assert (sizes is None) == enough
        if sizes is None:
            continue
        assert min(MIN_BATCH, clips) <= sizes.batch <= min(p.batch, clips)
        assert sizes.epochs >= p.epochs
        assert sizes.batch >= before.batch and sizes.epochs <= before.epochs
        steps = clips // sizes.batch * sizes.epochs
        assert steps >= (SMALL_SET_STEPS if sizes.batch > MIN_BATCH else MIN_STEPS)
        assert sizes.batch <= MIN_BATCH or clips // (2 * sizes.batch) * p.epochs < SMALL_SET_STEPS
        before = sizes


def test_a_set_without_clips() -> None:
    with pytest.raises(UserError, match="no clips"):
        small_set_sizes(PROCEDURES["A4"], 0)


def test_a_small_set_says_what_changed_and_keeps_the_rate(noted: Noted) -> None:
    config, notes = noted(clips=600)
    assert (config.batch, config.epochs, config.lr) == (4, 10, 4e-4)
    assert notes[0] == "a small set (600 clips): batch 4 instead of 448; LR stays 0.0004"
    assert "warm-up over 150 steps, a tenth of the run's 1500, instead of 1000" in notes
    assert config.warmup_steps == 150

    config, notes = noted(clips=100)
    assert "batch 4 instead of 448, epochs 26 instead of 10" in notes[0]
    assert config.epochs == 26


@pytest.mark.parametrize("model", ["ast", "transformer", "conformer"])
def test_transformers_from_scratch_take_a_small_set_slowly(model: str, noted: Noted) -> None:
    config, notes = noted("A4", clips=600, model=model)
    assert config.lr == pytest.approx(4e-4 * math.sqrt(4 / 448))
    assert "batch 4 instead of 448, LR 3.77964e-05 instead of 0.0004" in notes[0]
    assert resolved("A4", {"batch": 16}, clips=600, model=model).lr == pytest.approx(
        4e-4 * math.sqrt(16 / 448)
    )
    assert resolved("A4", {"lr": 1e-3}, clips=600, model=model).lr == 1e-3
    assert resolved("A4", clips=AUDIOSET, model=model).lr == 4e-4


def test_fine_tuning_a_small_set_keeps_the_rate() -> None:
    assert resolved("A3", clips=600, model="ast").lr == 1e-5
    assert resolved("A4", {"init": "/run"}, clips=600, model="ast").lr == 4e-4
    assert resolved("A4", {"pretrained": True}, clips=600, model="ast").lr == 4e-4
    scratch = resolved("A3", {"pretrained": False}, clips=600, model="ast")
    assert scratch.lr == pytest.approx(1e-5 * math.sqrt(4 / 80))


def test_small_set_sizes_can_be_overridden(noted: Noted) -> None:
    config, notes = noted(overrides={"batch": 16, "epochs": 3, "lr": 1e-3}, clips=100)
    assert (config.batch, config.epochs, config.lr) == (16, 3, 1e-3)
    assert not any("small set" in note for note in notes)
    config, notes = noted(overrides={"batch": 16}, clips=100)
    assert (config.batch, config.epochs, config.lr) == (16, 26, 4e-4)
    assert notes[0] == "a small set (100 clips): epochs 26 instead of 10; LR stays 0.0004"


# ------------------------------------------------------------------------------------ large sets
def test_the_rate_follows_the_batch_on_a_large_set(noted: Noted) -> None:
    config, notes = noted(overrides={"batch": 224})
    assert config.lr == pytest.approx(2e-4)
    assert notes == ["LR 0.0002: 0.0004 scaled with the batch (448 -> 224)"]
    config, notes = noted(overrides={"batch": 224, "lr": 3e-4})
    assert config.lr == 3e-4 and notes == []
    config, notes = noted(overrides={"batch": 448})
    assert config.lr == 4e-4 and notes == []


def test_warm_up_is_at_most_a_tenth_and_says_so(noted: Noted) -> None:
    config, notes = noted(clips=100_000)  # 223 steps an epoch
    assert config.warmup_steps == 223
    assert notes == ["warm-up over 223 steps, a tenth of the run's 2230, instead of 1000"]
    config, notes = noted(clips=448_000)
    assert config.warmup_steps == 1000 and notes == []


def test_the_time_mask_follows_the_clips_length(noted: Noted) -> None:
    config, notes = noted(seconds=5.0)
    assert config.time_mask == 38
    assert notes == ["clips of 5 s: time mask at most 38 frames (A4: 75 for 10 s)"]
    config, notes = noted(overrides={"time_mask": 20}, seconds=5.0)
    assert config.time_mask == 20 and notes == []


# --------------------------------------------------------------------------------------- values
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"schedule": "cosine"},
            "schedule must be one of step, step2, constant, cyclic, got 'cosine'",
        ),
        ({"balance": 1}, "balance must be true or false, got 1"),
        ({"epochs": True}, "epochs must be an integer .*, got True"),
        ({"epochs": 2.0}, "epochs must be an integer .*, got 2.0"),
        ({"seed": 2**63}, "seed must be an integer"),
        ({"lr": 10**400}, "lr must be a positive number"),
        ({"freeze": "head.*"}, "freeze must be a list of text, got 'head"),
        ({"eval": 3}, "eval must be text or null, got 3"),
        ({"freeze": [1]}, "freeze must be a list of text"),
        ({"accumulate": 0}, "accumulate must be an integer from 1 on, got 0"),
        ({"layer_decay": 0.0}, r"layer_decay must be a number in \(0, 1\], got 0"),
        ({"layer_decay": 1.1}, r"layer_decay must be a number in \(0, 1\]"),
        ({"layer_decay": math.nan}, r"layer_decay must be a number in \(0, 1\]"),
        ({"precision": "fp8"}, "precision must be one of"),
        ({"kernels": "flash"}, "kernels must be auto, all, none or some of attention"),
        ({"source": "mp3"}, "source must be one of"),
        ({"cache": "host", "source": "dali"}, "cache host takes source packed, got dali"),
        ({"statistics": "mine"}, "statistics must be one of"),
        ({"epochs": 0}, "epochs must be an integer from 1 on, got 0"),
        ({"batch": -4}, "batch must be an integer from 1 on, got -4"),
        ({"steps": 0}, "steps must be an integer from 1 on"),
        ({"checkpoint_every_steps": 0}, "checkpoint_every_steps must be an integer from 1 on"),
        ({"warmup_steps": -1}, "warmup_steps must be an integer from 0 on"),
        ({"seed": -1}, "seed must be an integer from 0 to"),
        ({"mixup": 1.5}, "mixup must be a number from 0 to 1, got 1.5"),
        ({"mixup": math.nan}, "mixup must be a number from 0 to 1"),
        ({"max_bad": -0.1}, "max_bad must be a number from 0 to 1"),
        ({"beta1": 1.0}, r"beta1 must be a number in \[0, 1\)"),
        ({"lr": 0.0}, "lr must be a positive number"),
        ({"lr": math.inf}, "lr must be a positive number"),
        ({"lr": math.nan}, "lr must be a positive number"),
        ({"mixup_alpha": 0.0}, "mixup_alpha must be a positive number"),
        ({"weight_decay": math.nan}, "weight_decay must"),
        ({"feature": "logmel46"}, "logmel64"),
    ],
)
def test_impossible_values(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        resolved(overrides=overrides)


@pytest.mark.parametrize("model", ["crnn", "resnet50", "resnet34"])
def test_layer_decay_is_for_transformers(model: str) -> None:
    with pytest.raises(UserError, match=f"ast, transformer, cnn_trans, conformer.*got {model}"):
        resolved(overrides={"layer_decay": 0.9}, model=model)
    assert resolved(overrides={"layer_decay": 1.0}, model=model).layer_decay == 1


def test_unknown_procedure() -> None:
    with pytest.raises(UserError, match="unknown procedure 'A5'"):
        resolved("A5")


def test_config_round_trip_and_damage(tmp_path: Path) -> None:
    config = resolved(overrides={"steps": 7, "model_options": {"embedding": 64}})
    path = tmp_path / "config.json"
    config.save(path)
    assert TrainConfig.load(path) == config
    text = path.read_text()
    for damaged in ("", text[:40], text.replace('"epochs"', '"epoch"'), "[1, 2]"):
        path.write_text(damaged)
        with pytest.raises(Failure, match="config.json"):
            TrainConfig.load(path)


@pytest.mark.parametrize("change", [{"warp": 9}, {"epochs": None}])
def test_a_configuration_of_another_version(tmp_path: Path, change: dict[str, Any]) -> None:
    """With a key that is not known, or without one that is needed."""
    path = tmp_path / "config.json"
    document = asdict(resolved()) | change
    path.write_text(json.dumps({k: v for k, v in document.items() if k != "epochs" or v}))
    (key,) = change
    with pytest.raises(Failure, match=rf"config\.json .*'{key}'.* by another version") as raised:
        TrainConfig.load(path)
    assert "damaged" not in str(raised.value)


def test_no_torch_is_imported() -> None:
    """A mistake on the command line is answered at once."""
    code = "import sys, fastat.cli.app, fastat.training.launch; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    code = "import sys, fastat.cli.app; sys.exit('numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ------------------------------------------------------------------------------ --set key=value
def test_settings_are_typed() -> None:
    got = parse_settings(
        [
            "lr=1e-3",
            "mixup=1",
            "epochs=3",
            "steps=null",
            "balance=false",
            "schedule=constant",
            "data=a=b",
            "precision=auto",
            "batch=auto",
            "model.embedding=64",
            "model.pooling=max",
            "model.shared=false",
        ]
    )
    assert got == {
        "lr": 1e-3,
        "mixup": 1.0,
        "epochs": 3,
        "steps": None,
        "balance": False,
        "schedule": "constant",
        "data": "a=b",
        "precision": "auto",
        "batch": "auto",
        "model_options": {"embedding": 64, "pooling": "max", "shared": False},
    }
    assert isinstance(got["mixup"], float)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("lr", "key=value, got 'lr'"),
        ("epoch=3", "unknown --set key 'epoch'; did you mean 'epochs'?"),
        ("time_maks=3", "did you mean 'time_mask'"),
        ("zzzz=3", "known: .*epochs.*model.<option>"),
        ("model_options={}", "unknown --set key 'model_options'"),
        ("epochs=3.5", "--set epochs must be an integer .*, got '3.5'"),
        ("epochs=true", "--set epochs must be an integer .*, got 'true'"),
        ("epochs=" + "9" * 5000, "--set epochs must be an integer"),
        ("steps=many", "--set steps must be an integer .* or null, got 'many'"),
        ("lr=fast", "--set lr must be a positive number, got 'fast'"),
        ("lr=" + "[" * 100_000, "--set lr must be a positive number"),
        ("lr=NaN", "--set lr must be a positive number, got 'NaN'"),
        ("balance=0", "--set balance must be true or false, got '0'"),
        ("precision=fp8", "--set precision must be one of bf16, fp16, fp32 or auto, got 'fp8'"),
        ("cache=ram", "--set cache must be one of none, host, device, got 'ram'"),
        ("proc=A2", "--proc"),
        ("model=crnn", "--model"),
        ("freeze=head.*", "say --freeze head"),
    ],
)
def test_settings_that_are_wrong(setting: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_settings([setting])


# --------------------------------------------------------------------------------------- resume
def test_what_may_change_on_resume() -> None:
    stored = resolved(overrides={"steps": 5, "seed": 3, "model_options": {"embedding": 64}})
    changed = resumed(
        stored,
        None,
        None,
        {"steps": 9, "checkpoint_every_steps": 2, "data": "moved", "eval": "e", "eval_batch": 8},
    )
    assert (changed.steps, changed.checkpoint_every_steps) == (9, 2)
    assert (changed.data, changed.eval, changed.eval_batch) == ("moved", "e", 8)
    assert resumed(stored, None, None, {"steps": None}).steps is None
    # Said again, unchanged: fine.
    same = {"lr": 4e-4, "batch": 448, "seed": 3, "model_options": {"dropout": 0.75}}
    assert resumed(stored, "A4", "cnn_trans", same) == stored
    assert resumed(stored, None, None, {}) == stored


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("lr", 1e-3),
        ("batch", 8),
        ("epochs", 20),
        ("seed", 4),
        ("mixup", 0.0),
        ("balance", False),
        ("time_mask", 0),
        ("schedule", "constant"),
        ("precision", "bf16"),
        ("warmup_steps", 5),
        ("model_options", {"embedding": 128}),
        ("accumulate", 2),
        ("freeze", ["head.*"]),
        ("layer_decay", 0.5),
        ("init", "/other"),
        ("pretrained", True),
        ("preset", "authors"),
    ],
)
def test_what_may_not_change_on_resume(key: str, value: object) -> None:
    assert key not in MAY_CHANGE_ON_RESUME
    stored = resolved()
    with pytest.raises(UserError, match=f"{key} may not change on --resume"):
        resumed(stored, None, None, {key: value})


def test_procedure_and_model_may_not_change_on_resume() -> None:
    stored = resolved()
    with pytest.raises(UserError, match="the run has 'A4', got 'A3'"):
        resumed(stored, "A3", None, {})
    with pytest.raises(UserError, match="the run has 'cnn_trans', got 'crnn'"):
        resumed(stored, None, "crnn", {})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model", 3),
        ("data", None),
        ("freeze", "x"),
        ("freeze", [1]),
        ("balance", 1),
        ("epochs", True),
        ("epochs", 10**400),
        ("lr", 10**400),
        ("model_options", []),
        ("kernels", []),
    ],
)
def test_a_stored_value_of_another_type(tmp_path: Path, key: str, value: object) -> None:
    config = resolve("A4", "cnn_trans", {"data": "x"}, num_clips=100, clip_seconds=10.0)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(asdict(config) | {key: value}))
    with pytest.raises(Failure, match=f"config.json is damaged: .*{key} must be "):
        TrainConfig.load(path)


def test_what_cannot_be_read_is_not_called_damaged(tmp_path: Path) -> None:
    (tmp_path / "config.json").mkdir()
    with pytest.raises(Failure, match=r"config\.json cannot be read: Is a directory"):
        TrainConfig.load(tmp_path / "config.json")


@pytest.mark.parametrize("text", ["[]", "[" * 100_000, "9" * 10_000])
def test_json_that_is_no_configuration(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(Failure, match="config.json is damaged"):
        TrainConfig.load(tmp_path / "config.json")
