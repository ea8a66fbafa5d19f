"""The paper's four training procedures (Table 1) as data: what they ask of each model, what the
authors' own runs changed, and the rule for small training sets.
"""

import math
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from fastat.config.fields import check_value
from fastat.system.errors import UserError, nearest


@dataclass(frozen=True, kw_only=True)
class Procedure:
    """One column of Table 1."""

    name: str
    feature: str
    """"logmel64" (64 x 400) or "fbank128" (128 x 1024)."""
    pretrained: bool
    """Start from ImageNet weights."""
    epochs: int
    batch: int
    """Global batch, in clips."""
    lr: float
    """Maximum learning rate."""
    warmup_steps: int
    dropout: bool
    """Whether the model's dropout is on; DROPOUT says how much."""
    balance: bool
    mixup: float
    """Probability that a clip is mixed with another."""
    mixup_alpha: float
    """Both parameters of the Beta distribution that the mixing weight is drawn from."""
    time_mask: int
    """Largest width of the SpecAugment time mask, in frames."""
    freq_mask: int
    """Largest width of the SpecAugment frequency mask, in mel bins."""
    beta1: float = 0.9
    beta2: float = 0.999
    weight_decay: float = 0.0
    statistics: str = "set"
    """Mean and standard deviation from the training "set", or the "authors" values."""
    preset: str = "paper"
    paper_hours: float
    paper_gpus: int
    """V100s in the paper's run."""
    paper_map: float
    """Best mAP of Table 1."""


A1 = Procedure(
    name="A1",
    feature="fbank128",
    pretrained=True,
    epochs=10,
    batch=20,
    lr=1e-5,
    warmup_steps=1000,
    dropout=False,
    balance=True,
    mixup=0.3,
    mixup_alpha=10.0,
    time_mask=192,
    freq_mask=36,
    paper_hours=108.0,
    paper_gpus=4,
    paper_map=0.430,
)
A2 = replace(
    A1,
    name="A2",
    pretrained=False,
    batch=400,
    lr=4e-4,
    dropout=True,
    paper_hours=16.45,
    paper_map=0.437,
)
A3 = replace(
    A1,
    name="A3",
    feature="logmel64",
    batch=80,
    time_mask=75,
    freq_mask=12,
    paper_hours=21.0,
    paper_gpus=2,
    paper_map=0.410,
)
A4 = replace(
    A3,
    name="A4",
    pretrained=False,
    batch=448,
    lr=4e-4,
    dropout=True,
    paper_hours=8.84,
    paper_map=0.411,
)
PROCEDURES = {p.name: p for p in (A1, A2, A3, A4)}


# ------------------------------------------------------------------------------ by model
ATTENTION_MODELS = ("ast", "transformer", "cnn_trans", "conformer")
"""Models whose blocks are Transformer layers."""

DROPOUT: dict[str, dict[str, float]] = {
    "cnn_trans": {"A2": 0.25, "A4": 0.75},
    "conformer": {"A2": 0.1, "A4": 0.1},
    "transformer": {"A2": 0.1, "A4": 0.1},
}
"""Dropout by model and procedure; everywhere else there is none."""

AST_STRIDE = {"A1": 10, "A2": 10, "A3": 8, "A4": 8}
"""Distance of AST's patches along both axes (Table 3)."""


def model_options(model: str, procedure: Procedure) -> dict[str, Any]:
    """What a procedure asks of a model: keyword options of create_model."""
    options: dict[str, Any] = {}
    if procedure.dropout and procedure.name in DROPOUT.get(model, {}):
        options["dropout"] = DROPOUT[model][procedure.name]
    if model == "ast":
        options |= dict.fromkeys(("fstride", "tstride"), AST_STRIDE[procedure.name])
    if procedure.preset == "authors":
        options |= AUTHORS_OPTIONS.get(model, {})
    return options


# ------------------------------------------------------------------------------ presets
Preset = Literal["paper", "authors"]

AUTHORS: dict[str, Any] = {
    "beta1": 0.95,
    "beta2": 0.999,
    "weight_decay": 5e-7,
    "statistics": "authors",
}
"""What the authors' code does in every run, where the paper says otherwise."""

AUTHORS_OPTIONS: dict[str, dict[str, Any]] = {"cnn_trans": {"input_scale": 8.0}}
"""The same for a model's options: 8 at any number of mel bins."""

AUTHORS_RUNS: dict[str, dict[str, dict[str, Any]]] = {
    "ast": {"A3": {"mixup": 0.5}},
    "cnn_trans": {"A4": {"time_mask": 60}},
    "resnet50": {
        "A1": {"batch": 188, "lr": 1.6e-4, "time_mask": 192, "freq_mask": 48, "mixup": 0.5},
        "A2": {"batch": 128, "lr": 1e-4, "time_mask": 192, "freq_mask": 48, "mixup": 0.5},
        "A3": {"batch": 188, "lr": 1.6e-4},
        "A4": {"batch": 512, "lr": 4.8e-4},
    },
    "crnn": {"A2": {"batch": 100}, "A4": {"batch": 400, "lr": 1.6e-3}},
}
"""What the runs behind the paper's numbers changed, from the authors' experiment folders."""


def procedure_of(name: str, model: str, preset: str = "paper") -> Procedure:
    """The procedure that a model is trained under.

    "paper" is Table 1. "authors" is what the runs behind the paper's numbers did: AUTHORS and
    AUTHORS_RUNS. Not reproduced: their warm-up moves only every 50 steps, starting at 0; ours is
    linear per step.

    Raises:
        UserError: an unknown procedure or preset.
    """
    if name not in PROCEDURES:
        raise UserError(f"unknown procedure {name!r}{nearest(name, PROCEDURES)}")
    check_value("preset", preset, Preset)
    procedure = PROCEDURES[name]
    if preset == "paper":
        return procedure
    run = AUTHORS_RUNS.get(model, {}).get(name, {})
    return replace(procedure, **(AUTHORS | run), preset=preset)


def changes(procedure: Procedure) -> dict[str, Any]:
    """The fields in which a derived procedure differs from Table 1's."""
    table = PROCEDURES[procedure.name]
    names = [f.name for f in fields(Procedure) if f.name != "preset"]
    return {n: getattr(procedure, n) for n in names if getattr(procedure, n) != getattr(table, n)}


# ------------------------------------------------------------------------------ small training sets
SMALL_SET_STEPS = 2000
"""A training set is small when the procedure's batch and epochs give it fewer steps than this."""

MIN_BATCH = 4
MIN_STEPS = 640

NORMALISED_BY_LAYER = ("ast", "transformer", "conformer")
"""Models without BatchNorm, which small batches at a full learning rate do not train."""


@dataclass(frozen=True)
class Sizes:
    """Batch and epochs for a training set."""

    batch: int
    epochs: int


def small_set_sizes(procedure: Procedure, num_clips: int) -> Sizes | None:
    """Batch and epochs for a set that the procedure would train too briefly; None for a larger one.

    The batch becomes the largest power of two that gives SMALL_SET_STEPS steps in the procedure's
    epochs, but at least MIN_BATCH; the epochs grow until there are MIN_STEPS steps.

    Raises:
        UserError: the set has no clip.
    """
    if num_clips < 1:
        raise UserError("the training set has no clips")
    if num_clips // procedure.batch * procedure.epochs >= SMALL_SET_STEPS:
        return None
    largest = max(num_clips * procedure.epochs // SMALL_SET_STEPS, MIN_BATCH)
    batch = min(1 << (largest.bit_length() - 1), num_clips)
    epochs = math.ceil(MIN_STEPS / (num_clips // batch))
    return Sizes(batch, max(procedure.epochs, epochs))


def small_set_lr(procedure: Procedure, model: str, batch: int, *, from_scratch: bool) -> float:
    """The maximum learning rate for a small set.

    It stays the procedure's: scaled down linearly with the batch, a small set would hardly be
    trained at all. Models without BatchNorm that start from scratch diverge or stand still at it;
    theirs falls with the root of the batch, which keeps the noise of Adam's steps alike.
    """
    if from_scratch and model in NORMALISED_BY_LAYER and batch < procedure.batch:
        return procedure.lr * math.sqrt(batch / procedure.batch)
    return procedure.lr
