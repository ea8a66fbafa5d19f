"""A training run's configuration: procedure, size of the data and the user's overrides, resolved.

Imports no torch, so that a mistake on the command line is answered at once.
"""

import json
import re
import types
import typing
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from fastat.atomic import atomic_write_text
from fastat.errors import Failure, UserError, nearest
from fastat.features import FEATURES
from fastat.procedures import (
    ATTENTION_MODELS,
    Procedure,
    changes,
    model_options,
    procedure_of,
    small_set_lr,
    small_set_sizes,
)
from fastat.schedule import SCHEDULES, warmup_length
from fastat.versions import check_keys, writer_of
from fastat_kernels.choice import parse_kernels

PRECISIONS = ("bf16", "fp16", "fp32")
SOURCES = ("packed", "dali")
STATISTICS = ("set", "authors")
CACHES = ("none", "host", "device")
CACHE_DTYPES = ("float16", "uint8")
ON_NAN = ("stop", "skip")
GRADIENT_DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that decides a run; ``config.json``."""

    proc: str
    preset: str = "paper"
    """"paper": Table 1; "authors": the runs behind the paper's numbers."""
    model: str
    feature: str
    data: str
    """The packed training set."""
    eval: str | None = None
    """The packed evaluation set; None trains without scoring."""
    epochs: int
    batch: int
    """Global batch, in clips."""
    accumulate: int = 1
    """Micro-batches that a batch is computed in; one Adam step on their mean gradient."""
    lr: float
    """Maximum learning rate."""
    layer_decay: float = 1.0
    """Factor on the learning rate from each Transformer layer to the one before it."""
    freeze: list[str] = field(default_factory=list)
    """Shell patterns of the names of parameters that are not trained."""
    pretrained: bool = False
    """Start from ImageNet weights."""
    init: str | None = None
    """Start from this checkpoint's weights."""
    steps: int | None = None
    """Ends the run after so many optimizer steps; schedule and warm-up stay as they are."""
    warmup_steps: int
    schedule: str = "step"
    beta1: float = 0.9
    beta2: float = 0.999
    weight_decay: float = 0.0
    balance: bool
    mixup: float
    mixup_alpha: float
    time_mask: int
    """Largest width in frames, for this set's clip length."""
    freq_mask: int
    normalize: bool = True
    remove_mean: bool = True
    statistics: str = "set"
    """Mean and standard deviation from the training "set", or the "authors" values."""
    model_options: dict[str, Any] = field(default_factory=dict)
    precision: str = "fp32"
    """Of matrix products and convolutions; "auto" is resolved already."""
    compile: bool = False
    cuda_graphs: bool = True
    """On CUDA, replay the training step as one graph, where it can be captured."""
    kernels: str = "auto"
    """Operators that run Triton kernels on CUDA: "auto" (the measured winners), "all", "none", or
    names with commas between."""
    source: str = "packed"
    cache: str = "none"
    """Keep un-augmented log-mels in the memory of the "host" or the "device"."""
    cache_dtype: str = "float16"
    max_bad: float = 0.01
    """Share of the clips that may be damaged, or that --source dali may be unable to take."""
    on_nan: str = "stop"
    """What follows a step whose loss or gradient is not finite, and which is never taken."""
    seed: int = 0
    eval_batch: int = 64
    checkpoint_every_steps: int | None = None
    """Also saves in mid-epoch, every so many steps."""
    checkpoint_every_minutes: float | None = None
    """Also saves in mid-epoch, every so many minutes."""
    sync_batchnorm: bool = False
    """BatchNorm sees the batch of all ranks."""
    gradient_dtype: str = "float32"
    """In which ranks exchange gradients."""
    rank_timeout: float = 600.0
    """Seconds that a rank waits for the others before it gives up."""

    def __post_init__(self) -> None:
        _one_of("feature", self.feature, tuple(FEATURES))
        _one_of("schedule", self.schedule, SCHEDULES)
        _one_of("precision", self.precision, PRECISIONS)
        _one_of("source", self.source, SOURCES)
        _one_of("statistics", self.statistics, STATISTICS)
        _one_of("cache", self.cache, CACHES)
        _one_of("cache_dtype", self.cache_dtype, CACHE_DTYPES)
        _one_of("on_nan", self.on_nan, ON_NAN)
        _one_of("gradient_dtype", self.gradient_dtype, GRADIENT_DTYPES)
        for name in (
            "epochs", "batch", "accumulate", "eval_batch", "steps", "checkpoint_every_steps"
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} must be at least 1, got {value}")
        for name in ("warmup_steps", "time_mask", "freq_mask", "seed"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} must not be negative, got {getattr(self, name)}")
        try:
            parse_kernels(self.kernels)
        except ValueError as error:
            raise UserError(str(error)) from error
        if self.seed >= 2**63:
            raise UserError(f"seed must be less than 2^63, got {self.seed}")
        for name in ("mixup", "max_bad"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} must be in 0..1, got {getattr(self, name)}")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if not 0 <= self.weight_decay < float("inf"):
            raise UserError(f"weight_decay must not be negative, got {self.weight_decay}")
        for name in ("lr", "mixup_alpha", "rank_timeout", "checkpoint_every_minutes"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise UserError(f"{name} must be a positive number, got {value}")
        if self.cache != "none" and self.source != "packed":
            raise UserError(f"cache {self.cache} takes source packed, got {self.source}")
        if not 0 < self.layer_decay <= 1:
            raise UserError(f"layer_decay must be in (0, 1], got {self.layer_decay}")
        if self.layer_decay < 1 and self.model not in ATTENTION_MODELS:
            raise UserError(
                f"layer_decay is for models of Transformer layers ({', '.join(ATTENTION_MODELS)}), "
                f"got {self.model}"
            )
        if self.pretrained and self.init is not None:
            raise UserError(
                "pretrained and init exclude each other: start from ImageNet weights, or from "
                f"{self.init}"
            )

    def save(self, path: Path) -> None:
        """Writes ``config.json``."""
        atomic_write_text(path, json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> "TrainConfig":
        """Reads ``config.json``. Raises Failure when it is damaged, or of another version."""
        try:
            document = json.loads(path.read_text())
            _check_types(document)
            check_keys(path, document, cls, lambda: writer_of(path.parent))
            return cls(**document)
        except OSError as error:
            raise Failure(f"{path} cannot be read: {error.strerror}") from error
        except (ValueError, TypeError, RecursionError) as error:
            raise Failure(f"{path} is damaged: {error}") from error


def _check_types(document: Any) -> None:
    """Raises TypeError unless every value of config.json has its field's type."""
    if not isinstance(document, dict):
        raise TypeError("expected an object")
    for name, hint in typing.get_type_hints(TrainConfig).items():
        if name in document and not _is_a(document[name], hint):
            raise TypeError(f"{name} must be of type {getattr(hint, '__name__', hint)}")


def _is_a(value: Any, hint: Any) -> bool:
    if isinstance(hint, types.UnionType):
        return any(_is_a(value, kind) for kind in typing.get_args(hint))
    kind = typing.get_origin(hint) or hint
    if kind is list:
        return type(value) is list and all(type(item) is str for item in value)
    if type(value) is int and kind in (int, float):
        return abs(value) < 2**63
    return type(value) is kind


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UserError(f"{name} must be one of {', '.join(known)}, got {value!r}")


MAY_CHANGE_ON_RESUME = frozenset(
    {
        "data", "eval", "steps", "checkpoint_every_steps", "checkpoint_every_minutes", "max_bad",
        "on_nan", "eval_batch", "cuda_graphs", "kernels", "rank_timeout",
    }
)  # fmt: skip
"""Options that leave the mathematics of training alone (the data must still be the same set)."""


def resolve(
    proc: str,
    model: str,
    overrides: dict[str, Any],
    *,
    num_clips: int,
    clip_seconds: float,
    initial_options: dict[str, Any] | None = None,
) -> tuple[TrainConfig, list[str]]:
    """The configuration for a training set of ``num_clips``, and what there is to say about it.

    Args:
        overrides: TrainConfig fields that the user set (data among them).
        initial_options: model options that the weights to start from need. They take precedence
            over the procedure's, and the user's ``model_options`` over both.

    Raises:
        UserError: an unknown procedure or preset, or an impossible value.
    """
    overrides = dict(overrides)
    p = procedure_of(proc, model, overrides.get("preset", "paper"))
    notes: list[str] = []
    if changed := changes(p):
        values = ", ".join(f"{name} {_short(value)}" for name, value in changed.items())
        notes.append(f"preset {p.preset}: {values}")
    own_options = overrides.pop("model_options", {})
    proc_options = model_options(model, p)
    proc_or_initial = proc_options | (initial_options or {})
    for name in sorted(proc_options.keys() - own_options.keys()):
        if proc_or_initial[name] != proc_options[name]:
            notes.append(
                f"{name} {proc_or_initial[name]} of the weights to start from, "
                f"not {proc}'s {proc_options[name]}"
            )
    config = TrainConfig(
        proc=proc,
        model=model,
        model_options=proc_or_initial | own_options,
        **(_sized(p, model, overrides, num_clips, notes) | overrides),
    )
    if config.accumulate > 1 and model in ATTENTION_MODELS:
        notes.append("the paper reports that gradient accumulation >= 2 broke attention models")
    scaled_mask = round(p.time_mask * clip_seconds / 10)
    if "time_mask" not in overrides and scaled_mask != p.time_mask:
        config = replace(config, time_mask=scaled_mask)
        notes.append(
            f"clips of {clip_seconds:g} s: time mask at most {scaled_mask} frames "
            f"({proc}: {p.time_mask} for 10 s)"
        )
    total = num_clips // config.batch * config.epochs
    warmup = warmup_length(config.warmup_steps, total)
    if warmup < config.warmup_steps:
        notes.append(
            f"warm-up over {warmup} steps, a tenth of the run's {total}, "
            f"instead of {config.warmup_steps}"
        )
        config = replace(config, warmup_steps=warmup)
    return config, notes


def _sized(
    p: Procedure, model: str, overrides: dict[str, Any], num_clips: int, notes: list[str]
) -> dict[str, Any]:
    """The procedure's fields, with batch, epochs and LR as the set's size wants them."""
    values: dict[str, Any] = {
        name: getattr(p, name)
        for name in (
            "feature", "epochs", "batch", "lr", "warmup_steps", "balance", "mixup", "mixup_alpha",
            "time_mask", "freq_mask", "beta1", "beta2", "weight_decay", "statistics",
        )
    }  # fmt: skip
    values["pretrained"] = p.pretrained and overrides.get("init") is None
    small = small_set_sizes(p, num_clips)
    if small is not None:
        values |= asdict(small)
        from_scratch = overrides.get("init") is None and not overrides.get(
            "pretrained", p.pretrained
        )
        batch = overrides.get("batch", small.batch)
        values["lr"] = small_set_lr(p, model, batch, from_scratch=from_scratch)
        kept = {name: values[name] for name in ("batch", "epochs", "lr") if name not in overrides}
        changed = [
            f"{'LR' if k == 'lr' else k} {_short(v)} instead of {_short(getattr(p, k))}"
            for k, v in kept.items()
            if v != getattr(p, k)
        ]
        if changed:
            stays = f"; LR stays {p.lr:g}" if values["lr"] == p.lr and "lr" in kept else ""
            notes.append(f"a small set ({num_clips:,} clips): {', '.join(changed)}{stays}")
    elif overrides.get("batch", p.batch) != p.batch and "lr" not in overrides:
        batch = overrides["batch"]
        values["lr"] = p.lr * batch / p.batch
        notes.append(f"LR {values['lr']:g}: {p.lr:g} scaled with the batch ({p.batch} -> {batch})")
    return values


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


AUTO = "auto"


def check_precision(text: str) -> str:
    """``--precision``: AUTO, or one of PRECISIONS.

    Raises:
        UserError: neither.
    """
    if text not in (AUTO, *PRECISIONS):
        known = ", ".join((AUTO, *PRECISIONS))
        raise UserError(f"--precision must be one of {known}, got {text!r}")
    return text


def parse_batch(text: str) -> int | str:
    """A number of clips, or AUTO.

    Raises:
        UserError: neither.
    """
    if text == AUTO:
        return AUTO
    if not re.fullmatch(r"-?[0-9]{1,18}", text):
        raise UserError(f"--batch takes a number of clips or auto, got {text!r}")
    return int(text)


def parse_stride(text: str) -> dict[str, int]:
    """``FxT``, or one number for both axes, as AST's options.

    Raises:
        UserError: not of that form.
    """
    if not re.fullmatch(r"[1-9][0-9]*(x[1-9][0-9]*)?", text):
        raise UserError(
            f"--stride takes FxT, the distance of patches in mel bins and frames, as 10x10, "
            f"got {text!r}"
        )
    f, _, t = text.partition("x")
    return {"fstride": int(f), "tstride": int(t or f)}


# ---------------------------------------------------------------------------------- --set key=value
SIZES_OF_THE_DATA = ("model.name", "model.num_mels", "model.num_frames", "model.num_classes")


def parse_settings(settings: list[str]) -> dict[str, Any]:
    """``--set key=value`` arguments as overrides; ``model.KEY=value`` is an option of the model.

    Raises:
        UserError: not of that form, an unknown key (with the nearest), or a value of another type.
    """
    hints = typing.get_type_hints(TrainConfig)
    known = [f.name for f in fields(TrainConfig) if f.name != "model_options"]
    overrides: dict[str, Any] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals:
            raise UserError(f"--set takes key=value, got {setting!r}")
        if key in SIZES_OF_THE_DATA:
            raise UserError(f"--set takes no {key}: the feature and the classes decide it")
        if key.startswith("model."):
            overrides.setdefault("model_options", {})[key.removeprefix("model.")] = _plain(text)
        elif key in ("proc", "model", "freeze"):
            raise UserError(f"--set takes no {key}: say --{key} {text}")
        elif key in known:
            overrides[key] = _typed(key, text, hints[key])
        else:
            raise UserError(f"unknown --set key {key!r}{nearest(key, [*known, 'model.<option>'])}")
    return overrides


def _plain(text: str) -> Any:
    """A number, true, false or null as JSON reads it; any other text as it is."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _typed(key: str, text: str, hint: Any) -> Any:
    allowed = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    value: Any = _plain(text)
    if str in allowed and value is not None:
        value = text
    if float in allowed and type(value) is int:
        value = float(value)
    if type(value) not in allowed:
        names = " or ".join("null" if t is types.NoneType else t.__name__ for t in allowed)
        raise UserError(f"--set {key} takes {names}, got {text!r}")
    return value


def resumed(
    stored: TrainConfig, proc: str | None, model: str | None, overrides: dict[str, Any]
) -> TrainConfig:
    """The stored configuration of a run, with what may change on resume changed.

    Raises:
        UserError: an option that changes the mathematics differs from the stored one.
    """
    named = {k: v for k, v in {"proc": proc, "model": model}.items() if v is not None}
    given = named | overrides
    if "model_options" in given:
        given["model_options"] = stored.model_options | given["model_options"]
    for key, value in given.items():
        before = getattr(stored, key)
        if key not in MAY_CHANGE_ON_RESUME and value != before:
            raise UserError(
                f"{key} may not change on --resume: the run has {before!r}, got {value!r}"
            )
    return replace(stored, **given)
