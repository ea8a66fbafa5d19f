"""A training run's configuration: a procedure with the user's options, fitted to the training set.

Imports neither torch nor numpy, so that a mistake on the command line is answered at once.
"""

import json
import logging
import re
import typing
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from fastat.config.fields import (
    Count,
    Limit,
    NonNegative,
    NonNegativeInt,
    Positive,
    Share,
    check_fields,
    check_keys,
    check_value,
    fits,
)
from fastat.config.procedures import (
    ATTENTION_MODELS,
    Preset,
    Procedure,
    changes,
    model_options,
    procedure_of,
    small_set_lr,
    small_set_sizes,
)
from fastat.config.schedule import Schedule, warmup_length
from fastat.system.errors import Failure, UserError, nearest
from fastat.system.files import atomic_write_text
from fastat_kernels.choice import parse_kernels

log = logging.getLogger(__name__)

Precision = Literal["bf16", "fp16", "fp32"]
Source = Literal["packed", "dali"]
Cache = Literal["none", "host", "device"]
OnNan = Literal["stop", "skip"]
Beta = Annotated[float, Limit("a number in [0, 1)", lambda x: 0 <= x < 1)]
Seed = Annotated[int, Limit("an integer from 0 to 2^63 - 1", lambda n: 0 <= n < 2**63)]
LayerDecay = Annotated[float, Limit("a number in (0, 1]", lambda x: 0 < x <= 1)]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that decides a run; ``config.json``.

    Raises:
        UserError: a value is not of its field's type, or options exclude each other.
    """

    proc: str
    preset: Preset = "paper"
    """"paper": Table 1; "authors": the runs behind the paper's numbers."""
    model: str
    feature: Literal["logmel64", "fbank128"]
    data: str
    """The packed training set."""
    eval: str | None = None
    """The packed evaluation set; None trains without scoring."""
    epochs: Count
    batch: Count
    """Global batch, in clips."""
    accumulate: Count = 1
    """Micro-batches that a batch is computed in; one Adam step on their mean gradient."""
    lr: Positive
    """Maximum learning rate."""
    layer_decay: LayerDecay = 1.0
    """Factor on the learning rate from each Transformer layer to the one before it."""
    freeze: list[str] = field(default_factory=list)
    """Shell patterns of the names of parameters that are not trained."""
    pretrained: bool = False
    """Start from ImageNet weights."""
    init: str | None = None
    """Start from this checkpoint's weights."""
    steps: Count | None = None
    """Ends the run after this many optimizer steps; schedule and warm-up stay as they are."""
    warmup_steps: NonNegativeInt
    schedule: Schedule = "step"
    beta1: Beta = 0.9
    beta2: Beta = 0.999
    weight_decay: NonNegative = 0.0
    balance: bool
    """Draw clips by the rarity of their classes instead of all alike."""
    mixup: Share
    """Probability that a clip is mixed with another."""
    mixup_alpha: Positive
    time_mask: NonNegativeInt
    """Largest width in frames, for this set's clip length."""
    freq_mask: NonNegativeInt
    normalize: bool = True
    remove_mean: bool = True
    statistics: Literal["set", "authors"] = "set"
    """Mean and standard deviation from the training "set", or the "authors" values."""
    model_options: dict[str, Any] = field(default_factory=dict)
    """Keyword options of create_model."""
    precision: Precision = "fp32"
    """Of matrix products and convolutions; "auto" is resolved already."""
    compile: bool = False
    cuda_graphs: bool = True
    """On CUDA, replay the training step as one graph, where it can be captured."""
    kernels: str = "auto"
    """Operators that run Triton kernels on CUDA: "auto" (the measured winners), "all", "none", or
    names separated by commas."""
    source: Source = "packed"
    cache: Cache = "none"
    """Keep un-augmented log-mels in the memory of the "host" or the "device"."""
    cache_dtype: Literal["float16", "uint8"] = "float16"
    max_bad: Share = 0.01
    """Share of the clips that may be damaged, or that DALI may be unable to decode."""
    on_nan: OnNan = "stop"
    """What follows a step whose loss or gradient is not finite, and which is never taken."""
    seed: Seed = 0
    eval_batch: Count = 64
    checkpoint_every_steps: Count | None = None
    """Also saves in mid-epoch, each time this many steps are done."""
    checkpoint_every_minutes: Positive | None = None
    """Also saves in mid-epoch, each time this many minutes have passed."""
    sync_batchnorm: bool = False
    """BatchNorm's statistics are those of the batch of all ranks."""
    gradient_dtype: Literal["float32", "bfloat16"] = "float32"
    """In which ranks exchange gradients."""
    rank_timeout: Positive = 600.0
    """Seconds that a rank waits for the others before it gives up."""

    def __post_init__(self) -> None:
        check_fields(self)
        try:
            parse_kernels(self.kernels)
        except ValueError as error:
            raise UserError(str(error)) from error
        if self.cache != "none" and self.source != "packed":
            raise UserError(f"cache {self.cache} takes source packed, got {self.source}")
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
        """Reads ``config.json``.

        Raises:
            Failure: it is damaged, or was written by another version of fastat.
        """
        try:
            document = json.loads(path.read_text())
            if not isinstance(document, dict):
                raise Failure(f"{path} is damaged: expected a JSON object")
            check_keys(path, document, cls)
            return cls(**document)
        except OSError as error:
            raise Failure(f"{path} cannot be read: {error.strerror}") from error
        except (ValueError, TypeError, RecursionError) as error:
            raise Failure(f"{path} is damaged: {error}") from error


MAY_CHANGE_ON_RESUME = frozenset(
    {
        "data", "eval", "steps", "checkpoint_every_steps", "checkpoint_every_minutes", "max_bad",
        "on_nan", "eval_batch", "cuda_graphs", "kernels", "rank_timeout",
    }
)  # fmt: skip
"""Options that leave the mathematics of training alone (the data must still be the same set)."""


def procedure_config(
    proc: str, model: str, overrides: dict[str, Any], initial_options: dict[str, Any] | None = None
) -> TrainConfig:
    """A procedure with the user's options, not yet fitted to the training set.

    Args:
        overrides: TrainConfig fields that the user set (data among them).
        initial_options: model options that the weights to start from need. They take precedence
            over the procedure's, and the user's ``model_options`` over both.

    Raises:
        UserError: an unknown procedure or preset, or an impossible value.
    """
    p = procedure_of(proc, model, overrides.get("preset", "paper"))
    shared = {f.name for f in fields(Procedure)} & {f.name for f in fields(TrainConfig)}
    values = {name: getattr(p, name) for name in shared}
    values["pretrained"] = p.pretrained and overrides.get("init") is None
    options = model_options(model, p) | (initial_options or {}) | overrides.get("model_options", {})
    given = {"proc": proc, "model": model, "model_options": options}
    return TrainConfig(**values | overrides | given)


def resolve(
    proc: str,
    model: str,
    overrides: dict[str, Any],
    *,
    num_clips: int,
    clip_seconds: float,
    initial_options: dict[str, Any] | None = None,
    report: bool = True,
) -> TrainConfig:
    """The configuration for a training set of ``num_clips``.

    What differs from Table 1, and why, is logged at level INFO.

    Args:
        overrides, initial_options: as in ``procedure_config``.
        report: False logs it at level DEBUG, for a configuration that is not final.

    Raises:
        UserError: as ``procedure_config``, or the set has no clips.
    """
    note = log.info if report else log.debug
    config = procedure_config(proc, model, overrides, initial_options)
    p = procedure_of(proc, model, config.preset)
    if changed := changes(p):
        values = ", ".join(f"{name} {_short(value)}" for name, value in changed.items())
        note(f"preset {p.preset}: {values}")
    wanted, needed = model_options(model, p), initial_options or {}
    for name in sorted(wanted.keys() - overrides.get("model_options", {}).keys()):
        if needed.get(name, wanted[name]) != wanted[name]:
            note(f"{name} {needed[name]} of the weights to start from, not {proc}'s {wanted[name]}")
    config = _fit_to_set(config, p, overrides, num_clips, note)
    if config.accumulate > 1 and model in ATTENTION_MODELS:
        note("the paper reports that gradient accumulation >= 2 broke attention models")
    scaled_mask = round(p.time_mask * clip_seconds / 10)
    if "time_mask" not in overrides and scaled_mask != p.time_mask:
        config = replace(config, time_mask=scaled_mask)
        note(
            f"clips of {clip_seconds:g} s: time mask at most {scaled_mask} frames "
            f"({proc}: {p.time_mask} for 10 s)"
        )
    total = num_clips // config.batch * config.epochs
    warmup = warmup_length(config.warmup_steps, total)
    if warmup < config.warmup_steps:
        note(
            f"warm-up over {warmup} steps, a tenth of the run's {total}, "
            f"instead of {config.warmup_steps}"
        )
        config = replace(config, warmup_steps=warmup)
    return config


def _fit_to_set(
    config: TrainConfig,
    p: Procedure,
    overrides: dict[str, Any],
    num_clips: int,
    note: Callable[[str], None],
) -> TrainConfig:
    """``config`` with the batch, epochs and learning rate that suit the size of the set, where the
    user did not set them."""
    small = small_set_sizes(p, num_clips)
    if small is None:
        if config.batch == p.batch or "lr" in overrides:
            return config
        lr = p.lr * config.batch / p.batch
        note(f"LR {lr:g}: {p.lr:g} scaled with the batch ({p.batch} -> {config.batch})")
        return replace(config, lr=lr)
    fitted = asdict(small) | {
        "lr": small_set_lr(
            p,
            config.model,
            overrides.get("batch", small.batch),
            from_scratch=config.init is None and not config.pretrained,
        )
    }
    fitted = {name: value for name, value in fitted.items() if name not in overrides}
    changed = [
        f"{'LR' if name == 'lr' else name} {_short(value)} instead of {_short(getattr(p, name))}"
        for name, value in fitted.items()
        if value != getattr(p, name)
    ]
    if changed:
        kept = f"; LR stays {p.lr:g}" if fitted.get("lr") == p.lr else ""
        note(f"a small set ({num_clips:,} clips): {', '.join(changed)}{kept}")
    return replace(config, **fitted)


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


AUTO = "auto"
MAY_BE_AUTO = ("batch", "precision")
"""Fields for which the command line also takes AUTO; ``launch.configure`` finds the value."""


def parse_stride(text: str, *, option: str = "--stride") -> dict[str, int]:
    """``FxT``, or one number for both axes, as AST's options.

    Raises:
        UserError: not of that form.
    """
    if not re.fullmatch(r"[1-9][0-9]*(x[1-9][0-9]*)?", text):
        raise UserError(
            f"{option} takes FxT, the distance of patches in mel bins and frames, as 10x10, "
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
    known = [field.name for field in fields(TrainConfig) if field.name != "model_options"]
    overrides: dict[str, Any] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals:
            raise UserError(f"--set takes key=value, got {setting!r}")
        if key in SIZES_OF_THE_DATA:
            raise UserError(f"--set takes no {key}: the feature and the classes decide it")
        if key.startswith("model."):
            overrides.setdefault("model_options", {})[key.removeprefix("model.")] = _parsed(text)
        elif key in ("proc", "model", "freeze"):
            raise UserError(f"--set takes no {key}: say --{key} {text}")
        elif key in known:
            overrides[key] = parse_field(key, text, option=f"--set {key}")
        else:
            raise UserError(f"unknown --set key {key!r}{nearest(key, [*known, 'model.<option>'])}")
    return overrides


def parse_field(name: str, text: str, *, option: str) -> Any:
    """The value that ``text`` gives to the field ``name`` of TrainConfig; "null" gives None.

    Raises:
        UserError: it names ``option``, what was expected and ``text``.
    """
    hint = typing.get_type_hints(TrainConfig, include_extras=True)[name]
    if name in MAY_BE_AUTO:
        hint = hint | Literal["auto"]
    parsed = _parsed(text)
    number = float(parsed) if fits(parsed, int) else parsed
    candidates = (None if text == "null" else text, number, parsed)
    value = next((value for value in candidates if fits(value, hint)), text)
    check_value(option, value, hint)
    return value


def _parsed(text: str) -> Any:
    """A number, true, false or null as JSON or Python reads it; any other text as it is."""
    for read in (json.loads, int, float) if text.isascii() else (json.loads,):
        try:
            return read(text)
        except (ValueError, RecursionError):
            continue
    return text


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
