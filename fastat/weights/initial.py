"""The weights that a run starts from: a checkpoint of ours or another project's, or ImageNet's."""

import inspect
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastat.data.shards import ClassInfo
from fastat.models import MODELS
from fastat.models.ast import Ast, adapt_positions
from fastat.system.errors import UserError
from fastat.weights.checkpoint import ModelMeta, checkpoint_in, load_meta, read_weights
from fastat.weights.foreign import describe, read_foreign
from fastat.weights.imagenet import imagenet_state, trunk_name
from fastat.weights.translate import Weights, fit, translate

OWN_CHOICE = ("dropout", "activation_checkpointing")
"""Options that the run chooses, whatever the weights were trained with."""


def initial_options(path: Path, model: str) -> dict[str, Any]:
    """The model options that a checkpoint's weights need; for an ImageNet trunk at most its size.

    Raises:
        UserError: no checkpoint there, in no known layout, or of another model.
        Failure: a damaged one.
    """
    return _open(path, model).options


def load_initial(model: nn.Module, meta: ModelMeta, path: Path) -> list[str]:
    """Loads a checkpoint's weights into a fresh model; returns what there is to say about it.

    The head is taken with the same set of classes, its rows in the order of the run's; else it
    keeps its fresh weights. AST's positions are adapted to another grid. Features are normalised
    with the run's own statistics, not the source's.

    Args:
        model: the model that ``meta`` describes.

    Raises:
        UserError: no checkpoint there, in no known layout, of another model, or of other shapes.
        Failure: a damaged one.
    """
    return _load(model, meta, _open(path, meta.model))


def load_imagenet(model: nn.Module, meta: ModelMeta) -> list[str]:
    """Loads ImageNet's weights in the same way, from timm's cache or from the hub.

    Raises:
        UserError: there are none for this model.
        Failure: they are in neither place.
    """
    source = f"timm's {trunk_name(meta.model, meta.options)}"
    weights = translate(imagenet_state(meta.model, meta.options), source)
    describe(weights)
    return _load(model, meta, weights)


def _open(path: Path, model: str) -> Weights:
    checkpoint = checkpoint_in(path)
    weights = read_foreign(path) if checkpoint is None else _read_ours(checkpoint)
    if weights.model != model:
        raise UserError(f"{weights.source} is of model {weights.model}, the run is of {model}")
    return weights


def _read_ours(checkpoint: Path) -> Weights:
    meta = load_meta(checkpoint)
    with torch.device("meta"):
        model = meta.create()
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(MODELS[meta.model]).parameters.items()
        if parameter.default is not parameter.empty
    }
    options = {k: v for k, v in (defaults | meta.options).items() if k not in OWN_CHOICE}
    if "input_scale" in options:  # its default depends on the feature
        options["input_scale"] = model.input_scale
    state = fit(read_weights(checkpoint), model, str(checkpoint))
    return Weights(
        source=str(checkpoint),
        model=meta.model,
        options=options,
        state=state,
        num_tensors=len(state),
        feature=meta.feature,
        classes=meta.classes,
        grid=model.grid if isinstance(model, Ast) else None,
    )


def _load(model: nn.Module, meta: ModelMeta, start: Weights) -> list[str]:
    own = model.state_dict()
    state, dropped, notes = dict(start.state), dict(start.dropped), list(start.notes)
    anew: list[str] = []
    if start.trunk:
        depth = len(model.layers) if isinstance(model, Ast) else 0
        for name in [n for n in state if n.startswith("layers.")]:
            if int(name.split(".")[1]) >= depth:
                del state[name]
                dropped[start.theirs(name)] = "layers beyond the model's"
        anew = [n for n in own if n.startswith("head")]
    elif (rows := _rows(start.classes or (), meta.classes)) is not None:
        if rows != sorted(rows):
            state |= {n: t[rows] for n, t in state.items() if n.startswith("head.")}
            notes.append("the head's rows are put into the order of this set's classes")
    else:
        for name in [n for n in state if n.startswith("head.")]:
            del state[name]
            dropped[start.theirs(name)] = "of other classes"
        anew = [n for n in own if n.startswith("head.")]
        theirs = "no class list"
        if start.classes is not None:
            shared = len(_matches(start.classes, meta.classes))
            theirs = f"{len(start.classes)} classes, {shared} of this set's {len(meta.classes)}"
        notes.append(f"the head is made anew: {start.source} has {theirs}")
    if start.feature not in (None, meta.feature):
        notes.append(f"trained on {start.feature}, this run takes {meta.feature}")
    state |= {name: own[name] for name in anew}
    if isinstance(model, Ast) and start.grid is not None and start.grid != model.grid:
        state["pos_embed"] = adapt_positions(state["pos_embed"], start.grid, model.grid)
        notes.append(f"positions of {_by(start.grid)} patches adapted to {_by(model.grid)}")
    model.load_state_dict(fit(state, model, start.source, start.theirs))
    reasons = Counter(dropped.values())
    account = [
        f"{start.num_tensors - len(dropped)} tensors loaded",
        *(f"{count} dropped ({why})" for why, count in reasons.items()),
        *([f"{len(anew)} made anew ({', '.join(anew)})"] if anew else []),
    ]
    layout = "checkpoint" if start.layout is None else start.layout.title
    return [*notes, f"{start.source} ({layout}): {', '.join(account)}"]


def _by(grid: tuple[int, int]) -> str:
    return f"{grid[0]} x {grid[1]}"


def _matches(theirs: Sequence[ClassInfo], ours: Sequence[ClassInfo]) -> dict[int, int]:
    """The index of each shared class in ours -> its index in theirs, by id.

    The classes of Hugging Face have names as ids, so those are compared with our names too.
    """
    by_id = {c.id: i for i, c in enumerate(theirs)}
    by_name = {c.name: i for i, c in enumerate(theirs) if c.id == c.name}
    found = ((i, by_id.get(c.id, by_name.get(c.name))) for i, c in enumerate(ours))
    return {i: row for i, row in found if row is not None}


def _rows(theirs: Sequence[ClassInfo], ours: Sequence[ClassInfo]) -> list[int] | None:
    """For each class of ours its row in their head; None unless both have the same classes."""
    rows = list(_matches(theirs, ours).values())
    return rows if sorted(rows) == list(range(len(theirs))) and len(rows) == len(ours) else None
