"""What a training step takes, from the work in it: fitted to a few steps that were measured.

    y = c1 + c2 params + c3 sequence + batch (c4 product + c5 attention + c6 traffic)

y is the seconds of a step, or its peak bytes. The first three are there whatever the batch: what is
launched, the parameters that Adam and the copies in the arithmetic's precision pass over, and the
time steps of a recurrent layer, one after the other. A clip brings its operations, those of
attention that grow with the square of the tokens apart from the others, and what passes through
memory. The work is counted on the model; the rates c, none negative, are the device's.

A model's rates are its own, since its shapes decide how near it comes to the device's peak, and
serve all its features, strides and batches. Its few points leave some open: those fall back to the
rates that suit all models together.
"""

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from statistics import median
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import nnls
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from fastat.costs import count_parameters

PULL = 0.03
"""Weight of a rate's relative distance from that of all models, squared, beside the squared
relative errors at the points. Measured on a CPU: from 0.01 to 0.1 points left out err alike; with
a tenth of that, models with few points err more."""

BAR = 0.15
"""Relative error up to which a prediction is worth planning with."""


@dataclass(frozen=True)
class Work:
    """What a step computes and moves, the device left aside."""

    params: int
    sequence: int
    """Time steps of recurrent layers."""
    product: float
    """GFLOP of a clip's forward pass, attention's scores and weighted sums left out."""
    attention: float
    """GFLOP of those."""
    traffic: float
    """GB that a clip's forward pass writes in float32, attention left out."""

    def columns(self, batch: int) -> NDArray[np.float64]:
        """[6]: what the rates of the model's equation are multiplied by."""
        params, sequence, *clip = astuple(self)
        return np.array([1.0, params, sequence, *(batch * x for x in clip)])


@torch.no_grad()
def count_work(model: nn.Module, num_frames: int, num_mels: int) -> Work:
    """Counts a model's work on one clip's forward pass.

    Args:
        model: one of ``fastat.models``; on "meta" nothing is computed. Left in evaluation mode.
        num_frames, num_mels: of the clip.
    """
    steps: list[int] = []
    hooks = [
        m.register_forward_pre_hook(lambda _, args: steps.append(args[0].shape[1]))
        for m in model.modules()
        if isinstance(m, nn.RNNBase)
    ]
    clip = torch.empty(1, num_frames, num_mels, device=next(model.parameters()).device)
    with FlopCounterMode(display=False) as counter, _Written() as written:
        model.eval()(clip)
    for hook in hooks:
        hook.remove()
    by_operator = {str(op): n / 1e9 for op, n in counter.get_flop_counts()["Global"].items()}
    attention = sum(n for op, n in by_operator.items() if op.startswith(ATTENTION))
    return Work(
        params=count_parameters(model),
        sequence=sum(steps),
        product=sum(by_operator.values()) - attention,
        attention=attention,
        traffic=written.bytes / 1e9,
    )


ATTENTION = ("aten.bmm", "aten.baddbmm", "aten._scaled_dot_product")
"""Operators of attention's scores and weighted sums; no model has another use for them."""

NOT_TRAFFIC = (*ATTENTION, "aten._safe_softmax", "aten._softmax", "aten._unsafe_view", "aten.empty")
"""The same, what they have between them, and what writes nothing."""


class _Written(TorchDispatchMode):
    """Adds up the bytes of what operators return, but for views and attention."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view and not str(func).startswith(NOT_TRAFFIC):
            self.bytes += sum(x.nbytes for x in tree_leaves(out) if isinstance(x, Tensor))
        return out


@dataclass(frozen=True)
class Point:
    """A step whose y is known."""

    model: str
    work: Work
    batch: int
    y: float
    """Seconds, or bytes; positive."""


@dataclass(frozen=True)
class CostModel:
    """The rates of the equation above."""

    shared: NDArray[np.float64]
    """[6], of all models together."""
    own: dict[str, NDArray[np.float64]]
    """[6], by model."""

    @classmethod
    def fit(cls, points: Sequence[Point]) -> "CostModel":
        """Least squares on relative errors.

        Raises:
            ValueError: there is no point.
        """
        if not points:
            raise ValueError("a cost model needs points to be fitted to")
        shared = _solve(_relative(points))
        own = {}
        for model in {p.model for p in points}:
            rows = _relative([p for p in points if p.model == model])
            pull = rows.mean(0) * PULL**0.5
            targets = np.concatenate([np.ones(len(rows)), pull * shared])
            own[model] = _solve(np.vstack([rows, np.diag(pull)]), targets)
        return cls(shared, own)

    def predict(self, model: str, work: Work, batch: int) -> float:
        """y of a step. A model without a point has the rates of all."""
        return float(work.columns(batch) @ self.own.get(model, self.shared))

    def largest_batch(self, model: str, work: Work, y: float) -> int:
        """The largest batch whose step takes at most ``y``; 0 where not one clip does."""
        fixed = self.predict(model, work, 0)
        clip = self.predict(model, work, 1) - fixed
        if clip <= 0:
            raise ValueError(f"no point tells what a clip of {model} takes")
        return max(0, int((y - fixed) / clip))


def left_out_errors(points: Sequence[Point]) -> list[float]:
    """Relative error at each point, predicted by a model fitted to all the others.

    At least two points.
    """
    errors = []
    for i, p in enumerate(points):
        others = [*points[:i], *points[i + 1 :]]
        errors.append(CostModel.fit(others).predict(p.model, p.work, p.batch) / p.y - 1)
    return errors


@dataclass(frozen=True)
class Trust:
    """How far predictions were off at points that the fit had not seen."""

    median: float
    """Of the relative errors' sizes."""
    worst: float
    worst_point: int

    @classmethod
    def of(cls, errors: Sequence[float]) -> "Trust":
        sizes = [abs(e) for e in errors]
        worst = int(np.argmax(sizes))
        return cls(median(sizes), sizes[worst], worst)


def _relative(points: Sequence[Point]) -> NDArray[np.float64]:
    """[P, 6] columns over y: a rate vector's product with a row is 1 where it predicts the point"""
    return np.array([p.work.columns(p.batch) / p.y for p in points])


def _solve(
    rows: NDArray[np.float64], targets: NDArray[np.float64] | None = None
) -> NDArray[np.float64]:
    """The rates, none negative, with the least squared error; ``targets`` None: all 1."""
    size = np.linalg.norm(rows, axis=0)
    size[size == 0] = 1.0  # a column that no point has
    rates, _ = nnls(rows / size, np.ones(len(rows)) if targets is None else targets)
    out: NDArray[np.float64] = rates / size
    return out
