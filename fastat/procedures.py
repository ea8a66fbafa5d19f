"""The paper's four training procedures (Table 1) as data, and the rule for small training sets."""

import math
from dataclasses import dataclass, replace

from fastat.errors import UserError


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

DROPOUT: dict[str, dict[str, float]] = {"cnn_trans": {"A2": 0.25, "A4": 0.75}}
"""Dropout by model and procedure, where the procedure has dropout."""


def dropout_of(model: str, procedure: Procedure) -> float:
    """The model's dropout under a procedure."""
    return DROPOUT.get(model, {}).get(procedure.name, 0.0) if procedure.dropout else 0.0


# ------------------------------------------------------------------------------ small training sets
SMALL_SET_STEPS = 2000
"""A training set is small when the procedure's batch and epochs give it fewer steps than this."""

MIN_BATCH = 4
MIN_STEPS = 640


@dataclass(frozen=True)
class Sizes:
    """Batch and epochs for a training set."""

    batch: int
    epochs: int


def small_set_sizes(procedure: Procedure, num_clips: int) -> Sizes | None:
    """Batch and epochs for a set that the procedure would train too briefly; None for a larger one.

    The batch becomes the largest power of two that gives SMALL_SET_STEPS steps in the procedure's
    epochs, but at least MIN_BATCH; the epochs grow until there are MIN_STEPS steps.
    The learning rate stays the procedure's maximum: scaled down linearly with the batch, a small
    set would hardly be trained at all.

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
