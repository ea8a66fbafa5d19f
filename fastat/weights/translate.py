"""Foreign state dicts under our names and back, with every tensor accounted for."""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastat.audio.features import FEATURES
from fastat.data.shards import ClassInfo
from fastat.system.errors import UserError
from fastat.weights.layouts import LAYOUTS, QKV, Layout, Rule, renamed, sum_rgb

WRAPPERS = ("module.", "_orig_mod.")
"""Prefixes that DataParallel, AveragedModel and torch.compile put before every name."""
AVERAGED = "n_averaged"
"""The counter that torch.optim.swa_utils.AveragedModel saves beside its module."""

COUNTER = "num_batches_tracked"
"""The last part of the name of a BatchNorm's counter, the only integer tensor of our models."""


@dataclass(kw_only=True)
class Weights:
    """Weights under our names, and what is known about the model they belong to."""

    source: str
    """Where they come from, for messages."""
    layout: Layout | None = None
    """None for a checkpoint of ours."""
    model: str
    state: dict[str, Tensor]
    num_tensors: int
    """Number of tensors in the source file, including dropped ones."""
    dropped: dict[str, str] = field(default_factory=dict)
    """Name of a tensor in the source file -> why it is dropped."""
    notes: list[str] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    """Options of the model that these weights need."""
    feature: str | None = None
    """None when the weights fit any feature, or were trained on images."""
    clip_seconds: float = 10.0
    grid: tuple[int, int] | None = None
    """AST's number of patches along the mel and the time axis."""
    classes: tuple[ClassInfo, ...] | None = None
    statistics: dict[str, Any] = field(default_factory=dict)
    """The fields of ModelMeta on normalisation, where the source's own files give them."""

    @property
    def trunk(self) -> bool:
        """Whether they are trained on images, without a head for sounds."""
        return self.layout is not None and self.layout.trunk

    @property
    def num_frames(self) -> int:
        """Frames of a clip, once the feature is known."""
        assert self.feature is not None
        spec = FEATURES[self.feature]
        return spec.num_frames(round(self.clip_seconds * spec.sample_rate))

    def theirs(self, name: str) -> str:
        """The source's name for a tensor of ours, for messages."""
        return name if self.layout is None else self.layout.theirs(name)


def translate(state: dict[str, Tensor], source: str) -> Weights:
    """A foreign state dict under our names, in float32.

    Args:
        source: where it comes from, for messages.

    Raises:
        UserError: it fits no layout (names the nearest and what differs), or a tensor does not hold
            finite floating-point numbers.
    """
    num_tensors = len(state)
    state = _unwrapped(state)
    layout = nearest_layout(state, source)
    ours: dict[str, Tensor] = {}
    parts: defaultdict[str, dict[int, Tensor]] = defaultdict(dict)
    dropped = {AVERAGED: "the number of averaged models"} if len(state) < num_tensors else {}
    notes: list[str] = []
    for name, tensor in state.items():
        if (why := layout.reason_to_drop(name)) is not None:
            dropped[name] = why
            continue
        found = layout.find(name)
        assert found is not None  # nearest_layout would have raised
        rule, target = found
        tensor = _checked(tensor, name, source)
        if rule.part is not None:
            parts[target][rule.part] = tensor
        else:
            ours[target] = tensor if rule.change is None else rule.change(tensor)
            if rule.change is sum_rgb and ours[target].shape != tensor.shape:
                notes.append(f"{name}: the kernels of red, green and blue are summed")
    for target, found_parts in parts.items():
        shapes = [tuple(part.shape) for part in found_parts.values()]
        if len(shapes) < QKV or len(set(shapes)) > 1:
            raise UserError(
                f"{source}: expected {layout.theirs(target)}, all of one shape, "
                f"got {len(shapes)} of {QKV}: {shapes}"
            )
        ours[target] = torch.cat([found_parts[i] for i in range(QKV)])
    model = layout.model
    if model == "resnet":
        model = "resnet50" if "trunk.layer1.0.conv3.weight" in ours else "resnet34"
    return Weights(
        source=source,
        layout=layout,
        model=model,
        state=ours,
        num_tensors=num_tensors,
        dropped=dropped,
        notes=notes,
    )


def _unwrapped(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the prefixes of wrappers that all names share, and without ``AVERAGED``."""
    while True:
        names = [name for name in state if name != AVERAGED]
        shared = [w for w in WRAPPERS if names and all(name.startswith(w) for name in names)]
        if not shared:
            return state
        state = {name.removeprefix(shared[0]): state[name] for name in names}


def _checked(tensor: Tensor, name: str, source: str) -> Tensor:
    """A tensor of the source file in float32, or in int64 for a counter."""
    counter = name.endswith(COUNTER)
    if tensor.is_floating_point() == counter:
        kind = "integers" if counter else "floating-point numbers"
        raise UserError(f"{source}: expected {kind} in {name}, got {tensor.dtype}")
    tensor = tensor.detach().to(torch.int64 if counter else torch.float32)
    if not tensor.isfinite().all():
        raise UserError(f"{source}: expected finite numbers in {name}, got NaN or infinite ones")
    return tensor


def nearest_layout(state: dict[str, Tensor], source: str) -> Layout:
    """The layout of a state dict, recognised by its names.

    Raises:
        UserError: no layout fits; names the nearest, what it lacks and what it does not know.
    """

    def known(layout: Layout) -> set[str]:
        return {n for n in state if layout.find(n) or layout.reason_to_drop(n) is not None}

    layout = max(LAYOUTS, key=lambda layout: len(known(layout)))
    if not known(layout):
        raise UserError(
            f"{source} fits no known layout ({len(state)} tensors, {_few(list(state))}); "
            f"known: {', '.join(layout.title for layout in LAYOUTS)}"
        )
    differences = []
    if lacking := [name for name in layout.marks if name not in state]:
        differences.append(f"lacks {_few(lacking)}")
    if unknown := [name for name in state if name not in known(layout)]:
        differences.append(f"has {_few(unknown)}, which it does not know")
    if differences:
        raise UserError(
            f"{source} fits no known layout: the nearest is {layout.title}, but this "
            f"{' and '.join(differences)}"
        )
    return layout


def _few(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def to_theirs(state: dict[str, Tensor], rules: tuple[Rule, ...]) -> dict[str, Tensor]:
    """Our tensors under their names; those for which they have no name are left out."""
    theirs: dict[str, Tensor] = {}
    for name, tensor in state.items():
        for rule in rules:
            target = renamed(name, rule.ours, rule.theirs)
            if target is not None:
                piece = tensor if rule.part is None else tensor.chunk(QKV)[rule.part]
                theirs[target] = piece.contiguous()
    return theirs


def fit(
    state: dict[str, Tensor],
    model: nn.Module,
    source: str,
    theirs: Callable[[str], str] = str,
) -> dict[str, Tensor]:
    """``state``, complete and in the model's order; missing BatchNorm counters become 0.

    Args:
        model: may be on the meta device.
        theirs: our name -> the source's, for messages.

    Raises:
        UserError: a tensor is missing, has no place in the model or another shape; names it.
    """
    own = model.state_dict()
    if foreign := [theirs(name) for name in state if name not in own]:
        raise UserError(f"{source}: the model has no place for {_few(foreign)}")
    fitting: dict[str, Tensor] = {}
    missing = []
    for name, fresh in own.items():
        if name in state:
            if state[name].shape != fresh.shape:
                raise UserError(
                    f"{source}: expected {theirs(name)} of shape {tuple(fresh.shape)}, "
                    f"got {tuple(state[name].shape)}"
                )
            fitting[name] = state[name]
        elif name.endswith(COUNTER):
            fitting[name] = torch.zeros_like(fresh, device="cpu")
        else:
            missing.append(theirs(name))
    if missing:
        raise UserError(f"{source}: lacks {_few(missing)}")
    return fitting
