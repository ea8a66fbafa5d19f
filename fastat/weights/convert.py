"""``fastat convert``: other people's checkpoints into ours, and ours into other people's.

The model is recognised by its weights (``layouts``, ``foreign``); the summary says what was loaded,
dropped and assumed.
"""

import json
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from fastat.audio.features import FEATURES
from fastat.config.fields import check_value
from fastat.config.run import parse_settings
from fastat.data.shards import ClassInfo
from fastat.packing.classes import ClassList
from fastat.system.errors import Failure, UserError
from fastat.system.files import atomic_path
from fastat.weights.checkpoint import (
    ClipSeconds,
    ModelMeta,
    checkpoint_in,
    load_meta,
    read_weights,
    save_tensors,
    save_weights,
)
from fastat.weights.foreign import read_foreign, shape_of
from fastat.weights.hugging_face import AST_FEATURE, AST_STATISTICS, write_hugging_face
from fastat.weights.layouts import AST, HF_AST, RESNET_TRUNK
from fastat.weights.translate import Weights, fit, to_theirs

STATISTICS = ("ast", "authors")
TRUNK_SUFFIX = ".safetensors"


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What a conversion did."""

    source: str
    destination: str
    layout: str
    """Of the source, or of the destination when the source is ours."""
    meta: ModelMeta
    loaded: int
    """Number of tensors that were taken, by the source's own names."""
    dropped: dict[str, str] = field(default_factory=dict)
    """Tensor of the source -> why."""
    missing: list[str] = field(default_factory=list)
    """BatchNorm counters that the source lacks; they become 0."""
    notes: list[str] = field(default_factory=list)

    def document(self) -> dict[str, Any]:
        """All of it in one level, for --json; of the classes only their number."""
        own, model = asdict(self), asdict(self.meta)
        del own["meta"], model["trained"]
        return own | model | {"num_classes": len(model.pop("classes"))}


def convert(
    source: Path,
    destination: Path,
    *,
    labels: Path | None = None,
    feature: str | None = None,
    clip_seconds: float | None = None,
    statistics: str | None = None,
    settings: list[str] | None = None,
) -> Summary:
    """Converts a checkpoint; the destination appears whole or not at all.

    Args:
        source: one of ours (run folder or checkpoint), or anything ``layouts`` knows.
        destination: for a source of ours a Hugging Face folder, or a .safetensors file of the
            trunk under timm's names; else a checkpoint folder of ours.
        labels: the class list, as a CSV or a packed set.
        feature: where the weights do not say it.
        clip_seconds: of the source's clips; ten where its own files do not say it.
        statistics: "ast" or "authors", where the weights of both look alike.
        settings: ``model.KEY=value``, options that the weights do not say.

    Raises:
        UserError: a source that cannot be converted as asked; says what is wrong or lacking.
        Failure: a damaged file, a full disk.
    """
    if destination.exists():
        raise UserError(f"{destination} exists already: expected the name of a new folder or file")
    checkpoint = checkpoint_in(source)
    if checkpoint is None:
        if feature is not None and feature not in FEATURES:
            raise UserError(f"feature must be one of {', '.join(FEATURES)}, got {feature!r}")
        if statistics is not None and statistics not in STATISTICS:
            expected = ", ".join(STATISTICS)
            raise UserError(f"--statistics must be one of {expected}, got {statistics!r}")
        if clip_seconds is not None:
            check_value("--clip-seconds", clip_seconds, ClipSeconds)
        given = parse_settings(settings or [])
        if set(given) - {"model_options"}:
            raise UserError(f"--set takes model.KEY=value here, got {', '.join(settings or [])}")
        options = given.get("model_options", {})
        weights = read_foreign(source, feature, options, clip_seconds)
        return _import(weights, destination, labels, statistics)
    for name, value in (
        ("labels", labels), ("feature", feature), ("clip-seconds", clip_seconds),
        ("statistics", statistics), ("set", settings or None),
    ):  # fmt: skip
        if value is not None:
            raise UserError(f"--{name} is for other projects' checkpoints; {source} is one of ours")
    return _export(source, checkpoint, destination)


def _export(source: Path, checkpoint: Path, destination: Path) -> Summary:
    meta = load_meta(checkpoint)
    trunk = destination.suffix == TRUNK_SUFFIX
    if trunk and not meta.model.startswith("resnet"):
        raise UserError(
            f"only resnet50 and resnet34 have a trunk that timm can load, this is {meta.model}"
        )
    if not trunk and meta.model != "ast":
        raise UserError(
            f"only ast has a Hugging Face layout, this is {meta.model} (resnet50 and resnet34 can "
            f"be written as timm's trunk, to a file with {TRUNK_SUFFIX})"
        )
    with torch.device("meta"):
        model = meta.create()
    state = fit(read_weights(checkpoint), model, str(checkpoint))
    dropped = {name: "a trunk has no head" for name in state if trunk and name.startswith("head.")}
    write = _write_trunk if trunk else write_hugging_face
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(destination) as temporary:
            notes = write(temporary, state, meta)
    except (OSError, SafetensorError) as error:
        raise Failure(f"cannot write {destination}: {error}") from error
    return Summary(
        source=str(source),
        destination=str(destination),
        layout=(RESNET_TRUNK if trunk else HF_AST).title,
        meta=meta,
        loaded=len(state) - len(dropped),
        dropped=dropped,
        notes=notes,
    )


def _write_trunk(path: Path, state: dict[str, Tensor], meta: ModelMeta) -> list[str]:
    """Writes a ResNet's trunk under timm's and torchvision's names; returns notes."""
    save_tensors(to_theirs(state, RESNET_TRUNK.rules), path)
    return ["the stem has one channel: timm.create_model(..., in_chans=1, num_classes=0)"]


def _import(
    weights: Weights, destination: Path, labels: Path | None, statistics: str | None
) -> Summary:
    source, layout, feature = weights.source, weights.layout, weights.feature
    assert layout is not None
    if layout.trunk:
        raise UserError(
            f"{source} is a trunk ({layout.title}) without a head for any sounds: start a run from "
            f"it with fastat train --model {weights.model} --init {source}"
        )
    if feature is None:
        raise UserError(
            f"{source} ({layout.title}) fits any feature: say which it was trained on with "
            f"--feature {' or '.join(FEATURES)}"
        )
    classes = _classes(weights, labels)
    normalisation = _statistics(weights, feature, statistics)
    try:
        meta = ModelMeta(
            model=weights.model,
            feature=feature,
            clip_seconds=weights.clip_seconds,
            num_mels=FEATURES[feature].num_mels,
            num_frames=weights.num_frames,
            classes=classes,
            options=weights.options,
            trained={"converted_from": Path(source).name, "layout": layout.title},
            **normalisation,
        )
    except (TypeError, ValueError) as error:
        raise UserError(f"{source}: {error}") from error
    with torch.device("meta"):
        model = meta.create()
    state = fit(weights.state, model, source, layout.theirs)
    save_weights(destination, state, meta)
    return Summary(
        source=source,
        destination=str(destination),
        layout=layout.title,
        meta=meta,
        loaded=weights.num_tensors - len(weights.dropped),
        dropped=weights.dropped,
        missing=[layout.theirs(name) for name in state if name not in weights.state],
        notes=weights.notes,
    )


def _classes(weights: Weights, labels: Path | None) -> tuple[ClassInfo, ...]:
    """The classes from --labels, checked against the checkpoint's own list, or that list."""
    source, own = weights.source, weights.classes
    head = "head.weight" if weights.model == "ast" else "head.fc_prob.weight"
    num_classes = shape_of(weights, head, 2)[0]
    if labels is None:
        if own is None:
            raise UserError(
                f"{source} has no class list: expected --labels with its {num_classes} "
                "classes, for AudioSet class_labels_indices.csv"
            )
        if len({c.id for c in own}) < len(own):
            raise UserError(f"{source}: two classes of id2label share a name: --labels gives ids")
        return own
    listed = (ClassList.from_packed if labels.is_dir() else ClassList.from_csv)(labels).classes
    if len(listed) != num_classes:
        raise UserError(
            f"--labels {labels} has {len(listed)} classes, the head of {source} {num_classes}"
        )
    for i, (theirs, ours) in enumerate(zip(own or (), listed, strict=False)):
        if not {theirs.id, theirs.name} & {ours.id, ours.name}:
            raise UserError(
                f"--labels {labels}: class {i} is {ours.name!r} there, {theirs.name!r} in {source}"
            )
    return listed


def _statistics(weights: Weights, feature: str, choice: str | None) -> dict[str, Any]:
    """ModelMeta's mean, std, remove_mean and perhaps normalize."""
    if choice == "ast" and feature != AST_FEATURE:
        raise UserError(f"--statistics ast is for {AST_FEATURE}, {weights.source} takes {feature}")
    if choice is None and weights.statistics:
        return weights.statistics
    like_ast = weights.layout in (AST, HF_AST) and feature == AST_FEATURE
    if choice == "ast" or (choice is None and like_ast):
        return AST_STATISTICS
    spec = FEATURES[feature]
    return {"mean": spec.mean, "std": spec.std, "remove_mean": True}


# ------------------------------------------------------------------------------------------ summary
def print_summary(summary: Summary, *, as_json: bool) -> None:
    """The summary on standard output."""
    s, m = summary, summary.meta
    if as_json:
        print(json.dumps(s.document()))
        return
    options = ", ".join(f"{k} {v}" for k, v in m.options.items())
    removed = "each clip's mean removed first" if m.remove_mean else "no clip's mean removed"
    print(f"{s.source} -> {s.destination}")
    print(f"layout      {s.layout}")
    print(f"model       {m.model}{f' ({options})' if options else ''}, {len(m.classes)} classes")
    print(f"feature     {m.feature}, {m.num_mels} x {m.num_frames}, clips of {m.clip_seconds:g} s")
    print(f"statistics  mean {m.mean:.8g}, std {m.std:.8g}, {removed}")
    print(f"loaded      {s.loaded} tensors")
    reasons: defaultdict[str, list[str]] = defaultdict(list)
    for name, why in s.dropped.items():
        reasons[why].append(name)
    for why, names in reasons.items():
        print(f"dropped     {len(names)}, {why}: {_ends(names)}")
    if s.missing:
        print(f"missing     {len(s.missing)} counters of batches, set to 0: {_ends(s.missing)}")
    for note in s.notes:
        print(f"note        {note}")


def _ends(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= 4 else f"{names[0]} ... {names[-1]}"
