"""Foreign state dicts under our names and back, with every tensor accounted for."""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fastat.errors import UserError
from fastat.weights.layouts import LAYOUTS, QKV, Drop, Layout, Rule, renamed, sum_rgb

WRAPPERS = ("module.", "_orig_mod.")
"""What DataParallel, AveragedModel and torch.compile put before every name."""
AVERAGED = "n_averaged"
"""What torch.optim.swa_utils.AveragedModel saves beside its module."""

COUNTER = "num_batches_tracked"
"""The last part of a BatchNorm's name for the batches it has seen, our one whole number."""
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
WHOLE = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)


@dataclass(frozen=True, kw_only=True)
class Translated:
    """A checkpoint of theirs under our names."""

    layout: Layout
    model: str
    state: dict[str, Tensor]
    num_tensors: int
    """Number of tensors in the source, including dropped ones."""
    dropped: dict[str, str]
    """Their name -> why."""
    notes: list[str] = field(default_factory=list)


def translate(state: dict[str, Tensor], source: str) -> Translated:
    """A foreign state dict under our names, in float32.

    Args:
        source: where it comes from, for messages.

    Raises:
        UserError: it fits no layout (says the nearest and what differs), a tensor is not of plain
            finite numbers, or one that is to be dropped is not what it should be.
    """
    num_tensors = len(state)
    state = _unwrapped(state)
    layout = nearest_layout(state, source)
    state = {name: _numbers(tensor, name, source) for name, tensor in state.items()}
    ours: dict[str, Tensor] = {}
    parts: defaultdict[str, dict[int, Tensor]] = defaultdict(dict)
    dropped: dict[str, str] = {}
    if len(state) < num_tensors:
        dropped[AVERAGED] = "the number of averaged models"
    notes: list[str] = []
    for name, tensor in state.items():
        found = layout.place(name)
        assert found is not None  # or nearest_layout had complained
        what, target = found
        if isinstance(what, Drop):
            _check_dropped(what, name, target, state, source)
            dropped[name] = what.why
        elif target in ours or what.part in parts.get(target, {}):
            raise UserError(f"{source}: it is there under two names: {layout.theirs(target)}")
        elif what.part is not None:
            parts[target][what.part] = tensor
        else:
            ours[target] = tensor if what.change is None else what.change(tensor)
            if what.change is sum_rgb and ours[target].shape != tensor.shape:
                notes.append(f"{name}: the kernels of red, green and blue are summed")
    for target, found_parts in parts.items():
        shapes = [tuple(part.shape) for part in found_parts.values()]
        if len(shapes) < QKV or len(set(shapes)) > 1 or () in shapes:
            raise UserError(
                f"{source}: expected {layout.theirs(target)}, all of one shape, "
                f"got {len(shapes)} of {QKV}: {shapes}"
            )
        ours[target] = torch.cat([found_parts[i] for i in range(QKV)])
    model = layout.model
    if model == "resnet":
        model = "resnet50" if "trunk.layer1.0.conv3.weight" in ours else "resnet34"
    return Translated(
        layout=layout,
        model=model,
        state=ours,
        num_tensors=num_tensors,
        dropped=dropped,
        notes=notes,
    )


def _unwrapped(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the prefixes of wrappers that every name begins with, in any order and number, and
    without ``AVERAGED`` beside them."""
    while True:
        names = [name for name in state if name != AVERAGED]
        shared = [w for w in WRAPPERS if names and all(name.startswith(w) for name in names)]
        if not shared:
            return state
        state = {name.removeprefix(shared[0]): state[name] for name in names}


def _numbers(tensor: Tensor, name: str, source: str) -> Tensor:
    """In float32, or int64 for a counter."""
    if tensor.layout != torch.strided or tensor.is_nested or tensor.is_meta:
        kind = "nested" if tensor.is_nested else "meta" if tensor.is_meta else tensor.layout
        raise UserError(f"{source}: expected {name} as a plain dense tensor, got a {kind} one")
    expected = WHOLE if name.endswith(COUNTER) else FLOATS
    if tensor.dtype not in expected:
        kinds = ", ".join(str(kind).removeprefix("torch.") for kind in expected)
        raise UserError(
            f"{source}: expected {name} in one of {kinds}, "
            f"got {str(tensor.dtype).removeprefix('torch.')}"
        )
    tensor = tensor.detach().to(torch.int64 if expected is WHOLE else torch.float32)
    if not tensor.isfinite().all():
        raise UserError(f"{source}: expected finite numbers in {name}, got NaN or infinite ones")
    return tensor


def nearest_layout(state: dict[str, Tensor], source: str) -> Layout:
    """The layout of a state dict, told from its names.

    Raises:
        UserError: none fits; says which is nearest, what it would have and what it would not.
    """
    known = {layout.title: {n for n in state if layout.place(n)} for layout in LAYOUTS}
    layout = max(LAYOUTS, key=lambda layout: len(known[layout.title]))
    if not known[layout.title]:
        raise UserError(
            f"{source} fits no known layout ({len(state)} tensors, {_few(list(state))}); "
            f"known: {', '.join(known)}"
        )
    foreign = [name for name in state if name not in known[layout.title]]
    lacking = [name for name in layout.marks if name not in state]
    if foreign or lacking:
        has = f"has {_few(foreign)}, which it does not know" if foreign else ""
        lacks = f"lacks {_few(lacking)}" if lacking else ""
        raise UserError(
            f"{source} fits no known layout: the nearest is {layout.title}, but this "
            f"{' and '.join(filter(None, (lacks, has)))}"
        )
    return layout


def _few(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _check_dropped(drop: Drop, name: str, twin: str, state: dict[str, Tensor], source: str) -> None:
    if drop.copy_of is not None:
        if twin not in state:
            raise UserError(f"{source}: tensor {name} is there, but not {twin}, of which it copies")
        if not torch.equal(state[name], state[twin]):
            raise UserError(f"{source}: {name} should equal {twin}, but differs")
    if drop.check is not None and (wrong := drop.check(state[name])):
        raise UserError(f"{source}: {name} {wrong}")


def to_theirs(state: dict[str, Tensor], rules: tuple[Rule, ...]) -> dict[str, Tensor]:
    """Our tensors under their names; those without one are left out."""
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
    """``state``, complete and in the model's order; a BatchNorm's batches may be uncounted.

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
