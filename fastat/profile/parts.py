"""Where a model's operations are: GFLOP of a clip's forward pass, by part."""

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

PARTS = ("embedding", "attention", "mlp", "convolution", "recurrent", "head")
"""embedding: of patches, or the projection of the input."""

OF_MODEL = {
    "": "embedding",  # AST's patches, which are projected outside any layer
    "stem": "embedding",
    "proj": "embedding",
    "talnet": "convolution",
    "trunk": "convolution",
    "Sequential": "convolution",  # the stem of the ResNets, put together as it runs
    "gru": "recurrent",
    "head": "head",
}
"""Part of what a model calls by this name."""

OF_LAYER = {
    "": "attention",  # the scores and the weighted sum
    "attn": "attention",
    "qkv": "attention",
    "proj": "attention",
    "mlp": "mlp",
    "fc1": "mlp",
    "fc2": "mlp",
    "ffn1": "mlp",
    "ffn2": "mlp",
    "conv": "convolution",
}
"""The same for what one of a model's ``layers`` calls."""


def part_of(name: str) -> str:
    """The part that the operations of a module count for; ``name`` as in ``named_modules``."""
    first, *rest = name.split(".")
    if first == "layers":
        return OF_LAYER[rest[1] if len(rest) > 1 else ""]
    return OF_MODEL[first]


@torch.no_grad()
def gflop_parts(model: nn.Module, num_frames: int, num_mels: int) -> dict[str, float]:
    """GFLOP of one clip's forward pass by part, 2 x MAC; they sum to ``costs.forward_gflop``.

    Args:
        model: one of ``fastat.models``, on any device; on "meta" nothing is computed. Left in
            evaluation mode.
        num_frames, num_mels: of the clip.
    """
    device = next(model.parameters()).device
    with FlopCounterMode(display=False) as counter:
        model.eval()(torch.empty(1, num_frames, num_mels, device=device))
    counts = {name: sum(by_op.values()) for name, by_op in counter.get_flop_counts().items()}
    total = counts.pop("Global", 0)
    root = type(model).__name__
    flop = {name.removeprefix(root).removeprefix("."): n for name, n in counts.items()}
    flop[""] = total
    own = dict(flop)  # without what a module calls, which is counted for its callers as well
    for name in flop:
        if name:
            own[_caller(name, flop)] -= flop[name]
    parts = dict.fromkeys(PARTS, 0.0)
    for name, n in own.items():
        parts[part_of(name)] += n / 1e9
    return parts


def _caller(name: str, known: dict[str, int]) -> str:
    """The nearest module around ``name`` that was called; lists of modules are not."""
    while name:
        name = name.rpartition(".")[0]
        if name in known:
            return name
    return ""
