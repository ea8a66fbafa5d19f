"""``fastat convert``: other people's checkpoints into ours, and ours into other people's.

Everything but class list and statistics is told from the weights (``layouts``, ``foreign``); what
was loaded, dropped and assumed is in the summary.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from fastat.checkpoint import ModelMeta, checkpoint_in, load_meta, read_weights, save_weights
from fastat.config import parse_settings
from fastat.data.classes import ClassList
from fastat.data.shards import ClassInfo
from fastat.errors import UserError
from fastat.features import FEATURES
from fastat.weights.describe import Described, describe, shape_of
from fastat.weights.export import TRUNK_SUFFIX, save_hugging_face, save_trunk
from fastat.weights.foreign import (
    CONFIG,
    PREPROCESSOR,
    Foreign,
    classes_of,
    flag,
    label_names,
    number,
    own_entry,
    read_foreign,
)
from fastat.weights.layouts import AST, HF_AST, RESNET_TRUNK
from fastat.weights.translate import fit

STATISTICS = ("ast", "authors")
AST_FEATURE, AST_MEAN, AST_STD = "fbank128", -4.2677393, 4.5689974
"""AudioSet's statistics in AST's code and in transformers, which remove no clip's mean."""


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What a conversion did."""

    source: str
    destination: str
    layout: str
    """Of the source, or of the destination when the source is ours."""
    meta: ModelMeta
    loaded: int
    """Tensors of the source, counted in its own names."""
    dropped: dict[str, str] = field(default_factory=dict)
    """Tensor of the source -> why."""
    missing: list[str] = field(default_factory=list)
    """Tensors that the source may lack, and did."""
    notes: list[str] = field(default_factory=list)

    def document(self) -> dict[str, Any]:
        """Flat, for --json: the model's fields too, of its classes the number."""
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
        given = parse_settings(settings or [])
        if set(given) - {"model_options"}:
            raise UserError(f"--set takes model.KEY=value here, got {', '.join(settings or [])}")
        options = given.get("model_options", {})
        foreign = read_foreign(source)
        described = describe(foreign, feature, options, clip_seconds)
        return _import(foreign, described, destination, labels, statistics)
    for name, value in (
        ("labels", labels), ("feature", feature), ("clip-seconds", clip_seconds),
        ("statistics", statistics), ("set", settings or None),
    ):  # fmt: skip
        if value is not None:
            raise UserError(f"--{name} is for other projects' checkpoints; {source} is one of ours")
    return _export(source, checkpoint, destination)


def _export(source: Path, checkpoint: Path, destination: Path) -> Summary:
    meta = load_meta(checkpoint)
    with torch.device("meta"):
        model = meta.create()
    state = fit(read_weights(checkpoint), model, str(checkpoint))
    dropped: dict[str, str] = {}
    if destination.suffix == TRUNK_SUFFIX:
        layout = RESNET_TRUNK
        notes = save_trunk(destination, state, meta)
        dropped = {name: "a trunk has no head" for name in state if name.startswith("head.")}
    else:
        layout = HF_AST
        notes = save_hugging_face(destination, state, meta)
    return Summary(
        source=str(source),
        destination=str(destination),
        layout=layout.title,
        meta=meta,
        loaded=len(state) - len(dropped),
        dropped=dropped,
        notes=notes,
    )


# ------------------------------------------------------------------------------------------- import
def _import(
    foreign: Foreign,
    described: Described,
    destination: Path,
    labels: Path | None,
    statistics: str | None,
) -> Summary:
    translated, source = foreign.translated, foreign.source
    layout = translated.layout
    if layout.trunk:
        raise UserError(
            f"{source} is a trunk ({layout.title}) without a head for any sounds: start a run from "
            f"it with fastat train --model {translated.model} --init {source}"
        )
    if described.feature is None:
        raise UserError(
            f"{source} ({layout.title}) fits any feature: say which it was trained on with "
            f"--feature {' or '.join(FEATURES)}"
        )
    assert described.num_frames is not None
    head = "head.weight" if translated.model == "ast" else "head.fc_prob.weight"
    num_classes = shape_of(foreign, head, 2)[0]
    meta = ModelMeta(
        model=translated.model,
        feature=described.feature,
        clip_seconds=described.clip_seconds,
        num_mels=FEATURES[described.feature].num_mels,
        num_frames=described.num_frames,
        classes=_classes(foreign, labels, num_classes),
        options=described.options,
        trained={"converted_from": Path(source).name, "layout": layout.title},
        **_statistics(foreign, described.feature, statistics),
    )
    with torch.device("meta"):
        model = meta.create()
    state = fit(translated.state, model, source, layout.theirs)
    save_weights(destination, state, meta)
    return Summary(
        source=source,
        destination=str(destination),
        layout=layout.title,
        meta=meta,
        loaded=translated.num_tensors - len(translated.dropped),
        dropped=translated.dropped,
        missing=[layout.theirs(name) for name in state if name not in translated.state],
        notes=translated.notes + described.notes,
    )


def _classes(foreign: Foreign, labels: Path | None, num_classes: int) -> tuple[ClassInfo, ...]:
    """From --labels, checked against the checkpoint's own list, or that list."""
    own = label_names(foreign)
    if own is not None and len(own) != num_classes:
        raise UserError(
            f"{foreign.source}/{CONFIG}: expected id2label of the head's {num_classes} classes, "
            f"got {len(own)}"
        )
    if labels is None:
        classes = classes_of(foreign)
        if classes is None:
            raise UserError(
                f"{foreign.source} has no class list: expected --labels with its {num_classes} "
                "classes, for AudioSet class_labels_indices.csv"
            )
        return classes
    listed = (ClassList.from_packed if labels.is_dir() else ClassList.from_csv)(labels).classes
    if len(listed) != num_classes:
        raise UserError(
            f"--labels {labels} has {len(listed)} classes, the head of {foreign.source} "
            f"{num_classes}"
        )
    for i, (name, listed_class) in enumerate(zip(own or (), listed, strict=False)):
        if name not in listed_class:
            raise UserError(
                f"--labels {labels}: class {i} is {listed_class.name!r} there, {name!r} in "
                f"{foreign.source}"
            )
    return listed


def _statistics(foreign: Foreign, feature: str, choice: str | None) -> dict[str, Any]:
    """ModelMeta's mean, std, remove_mean and normalize."""
    if choice is not None and choice not in STATISTICS:
        raise UserError(f"--statistics must be one of {', '.join(STATISTICS)}, got {choice!r}")
    if choice == "ast" and feature != AST_FEATURE:
        raise UserError(f"--statistics ast is for {AST_FEATURE}, {foreign.source} takes {feature}")
    spec = FEATURES[feature]
    values: dict[str, Any] = {"mean": spec.mean, "std": spec.std, "remove_mean": True}
    like_ast = foreign.translated.layout in (AST, HF_AST) and feature == AST_FEATURE
    if choice is None and (kept := own_entry(foreign.config)):
        where = f"{foreign.source}/{CONFIG}"
        values = {name: number(kept, name, where) for name in ("mean", "std")}
        values |= {name: flag(kept, name, where, True) for name in ("remove_mean", "normalize")}
    elif choice == "ast" or (choice is None and like_ast):
        values = {"mean": AST_MEAN, "std": AST_STD, "remove_mean": False}
    if choice is None and foreign.preprocessor is not None:
        where = f"{foreign.source}/{PREPROCESSOR}"
        # Where it leaves one out, transformers' default: AST's values.
        for name, default in (("mean", AST_MEAN), ("std", AST_STD)):
            values[name] = number(foreign.preprocessor, name, where, default)
        values["normalize"] = flag(foreign.preprocessor, "do_normalize", where, True)
    if not values["std"] > 0:
        raise UserError(f"{foreign.source}: std must be > 0, got {values['std']:g}")
    return values


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
    for what, names in _grouped(s.dropped).items():
        print(f"dropped     {len(names)}, {what}: {_ends(names)}")
    if s.missing:
        print(f"missing     {len(s.missing)} counters of batches, set to 0: {_ends(s.missing)}")
    for note in s.notes:
        print(f"note        {note}")


def _grouped(dropped: dict[str, str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for name, why in dropped.items():
        groups.setdefault(why, []).append(name)
    return groups


def _ends(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= 4 else f"{names[0]} ... {names[-1]}"
