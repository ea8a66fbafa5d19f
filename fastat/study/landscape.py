"""Sharpness of the minimum that a training run ended in: ``fastat landscape``.

Two views of the loss around the trained weights, on a fixed sample of clips without augmentation:

- sharpness: the largest eigenvalue of the Hessian, by power iteration. A Hessian-vector product is
  the gradient of (gradient . v) (Pearlmutter, 1994), so the Hessian is never formed.
- a slice: the loss along one random direction. The direction is scaled to the weights filter by
  filter, so that networks of different weights can be compared (Li et al., "Visualizing the Loss
  Landscape of Neural Nets", 2018). Biases and the weights of normalisation layers stay fixed.

Dropout is off and BatchNorm uses its running statistics. "AudioTagging Done Right" uses such
landscapes to explain why attention models are harder to train than convolutional ones.
"""

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastat.data.loader import PackedSource, evaluation_plans
from fastat.data.shards import PackedSet
from fastat.evaluation.evaluate import match_classes
from fastat.models.base import TaggingModel
from fastat.system.device import autocast, default_device, set_products
from fastat.system.errors import Failure, UserError
from fastat.weights.checkpoint import build_frontend, load_model
from fastat_kernels.backend import kernels

ALPHAS = tuple(round(float(alpha), 6) for alpha in np.linspace(-1.0, 1.0, 41))
"""Points of the slice; 0, the weights themselves, is one of them."""

Vector = list[Tensor]
"""One tensor per parameter, of the parameter's shape."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sharpness:
    """The largest eigenvalue of the Hessian."""

    eigenvalue: float
    residual: float
    """|Hv - lambda v| / |lambda| for the unit vector v that was found. The Hessian has an
    eigenvalue whose relative distance to ``eigenvalue`` is at most this."""
    converged: bool
    """Whether the residual fell below the tolerance, at an eigenvalue that is not negative."""
    estimates: tuple[float, ...]
    """The eigenvalue after each iteration."""


@dataclass(frozen=True)
class Slice:
    """The loss along a direction: ``losses[i]`` at weights + ``alphas[i]`` * direction."""

    alphas: tuple[float, ...]
    losses: tuple[float, ...]


@dataclass(frozen=True)
class Landscape:
    """Sharpness and slice of one run."""

    run: str
    model: str
    parameters: int
    data: str
    clips: int
    classes: int
    precision: str
    """Precision of the model's matrix products. For a trained cnn_trans, bf16 changed the sharpness
    by less than 0.2 % of its fp32 value, and the losses of the slice by less than 0.1 %."""
    loss: float
    """Binary cross-entropy at the weights, mean over clips and classes."""
    sharpness: Sharpness
    slice: Slice


class LossSurface:
    """The loss of a model on fixed clips as a function of its parameters.

    Fused attention, cuDNN's recurrent networks, the Triton kernels and activation checkpointing
    have no second derivative: the model is changed so that it no longer uses them.

    Args:
        model: maps features to logits; put into evaluation mode.
        batches: features [B, T, F] and targets [B, K] on the model's device.
        columns: [K] indices of the model's outputs that the targets belong to; None: all outputs.
        precision: precision of the model's matrix products.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[tuple[Tensor, Tensor]],
        columns: Tensor | None = None,
        precision: str = "fp32",
    ) -> None:
        self.model, self.batches, self.columns = model.eval(), list(batches), columns
        self.precision = precision
        self.parameters = list(model.parameters())
        self.clips = sum(len(target) for _, target in batches)
        if isinstance(model, TaggingModel):
            model.checkpointing = False
        for module in model.modules():
            if isinstance(module, nn.RNNBase):
                without_cudnn = torch.backends.cudnn.flags(enabled=False)
                module.forward = without_cudnn(module.forward)

    def loss(self) -> float:
        """Mean over clips and classes."""
        with torch.no_grad():
            return sum(part.item() for part in self._parts())

    def hessian_product(self, v: Vector) -> Vector:
        """The product H v, accumulated batch by batch."""
        total = [torch.zeros_like(p) for p in self.parameters]
        for part in self._parts():
            gradient = torch.autograd.grad(
                part, self.parameters, create_graph=True, materialize_grads=True
            )
            product = torch.autograd.grad(dot(gradient, v), self.parameters, materialize_grads=True)
            for sum_, new in zip(total, product, strict=True):
                sum_ += new
        return total

    def _parts(self) -> Iterator[Tensor]:
        """Each batch's share of the loss; the shares add up to the loss."""
        for features, target in self.batches:
            no_kernels, plain_attention = kernels(()), sdpa_kernel(SDPBackend.MATH)
            with no_kernels, plain_attention, autocast(features.device, self.precision):
                logits = self.model(features).to(target)
            if self.columns is not None:
                logits = logits[:, self.columns]
            share = len(target) / self.clips
            yield F.binary_cross_entropy_with_logits(logits, target) * share


def dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """The inner product over all parameters."""
    return torch.stack([(x * y).sum() for x, y in zip(a, b, strict=True)]).sum()


def _norm(a: Vector) -> float:
    return math.sqrt(dot(a, a).item())


def _unit(a: Vector) -> Vector:
    factor = 1 / _norm(a)
    return [x * factor for x in a]


def _normal_like(parameters: Sequence[Tensor], seed: int) -> Vector:
    """Drawn on the CPU, so that a seed gives the same direction on any device."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(p.shape, generator=generator).to(p) for p in parameters]


def sharpness(
    surface: LossSurface, *, seed: int = 0, tolerance: float = 0.02, max_iterations: int = 100
) -> Sharpness:
    """The largest eigenvalue of the Hessian, by power iteration from a random vector.

    The iteration is on H + c I, with c above half of the largest magnitude of an eigenvalue.
    Without the shift, a negative eigenvalue of similar magnitude would stall the iteration, and one
    of larger magnitude would win it. |Hv| bounds that magnitude from below; c is raised in strides
    of ten percent, because an estimate that creeps up with |Hv| would never become large enough.

    Args:
        tolerance: the relative residual at which the iteration has converged.

    Raises:
        Failure: a product is not finite.
    """
    v = _unit(_normal_like(surface.parameters, seed))
    magnitude = 0.0
    estimates: list[float] = []
    while True:
        product = surface.hessian_product(v)
        eigenvalue = dot(v, product).item()
        if not math.isfinite(eigenvalue):
            raise Failure("a product with the Hessian is not finite: the weights have diverged")
        length = _norm(product)
        error = _norm([h - eigenvalue * x for h, x in zip(product, v, strict=True)])
        residual = error / abs(eigenvalue) if eigenvalue else math.inf
        if length == 0:  # the loss is flat: every vector is an eigenvector of eigenvalue 0
            residual = 0.0
        estimates.append(eigenvalue)
        log.info(
            f"iteration {len(estimates)}, eigenvalue {eigenvalue:.4g}, residual {residual:.2g}"
        )
        # The largest eigenvalue of a classifier is positive, since its biases alone have positive
        # curvature: a negative eigenvalue that was found on the way is a different one.
        converged = residual <= tolerance and eigenvalue >= 0
        if converged or len(estimates) >= max_iterations:
            return Sharpness(eigenvalue, residual, converged, tuple(estimates))
        if length > 1.1 * magnitude:
            magnitude = length
        v = _unit([h + 0.55 * magnitude * x for h, x in zip(product, v, strict=True)])


def filter_normalised(parameters: Sequence[Tensor], seed: int = 0) -> Vector:
    """A random direction whose every filter is as long as the same filter of the weights.

    A filter computes one output: a row of a matrix, or a kernel of a convolution. Parameters with
    one axis (biases, weights of BatchNorm and LayerNorm) get zero.

    Source: Li et al. (2018), section 4.
    """
    out = []
    for d, p in zip(_normal_like(parameters, seed), parameters, strict=True):
        if p.ndim < 2:
            out.append(torch.zeros_like(p))
            continue
        axes = tuple(range(1, p.ndim))
        of_weights = torch.linalg.vector_norm(p.detach(), dim=axes, keepdim=True)
        of_direction = torch.linalg.vector_norm(d, dim=axes, keepdim=True)
        out.append(d * (of_weights / of_direction.clamp(min=1e-12)))
    return out


def loss_slice(surface: LossSurface, direction: Vector, alphas: Sequence[float] = ALPHAS) -> Slice:
    """The loss at weights + alpha * direction. The weights are restored bit for bit."""
    before = [p.detach().clone() for p in surface.parameters]
    losses = []
    with torch.no_grad():
        for alpha in alphas:
            for p, start, d in zip(surface.parameters, before, direction, strict=True):
                p.copy_(start + alpha * d)
            losses.append(surface.loss())
        for p, start in zip(surface.parameters, before, strict=True):
            p.copy_(start)
    return Slice(tuple(alphas), tuple(losses))


def landscape(
    run: Path,
    data: Path,
    *,
    clips: int,
    batch: int,
    seed: int,
    max_iterations: int,
    precision: str,
) -> Landscape:
    """Sharpness and slice of a run's best weights on ``clips`` random clips of a set.

    The same seed takes the same clips of a set. Features stay in memory: 0.1 MB per clip of
    64 x 400, 0.5 MB per clip of 128 x 1024.

    Raises:
        UserError: there is no checkpoint or packed set, or they do not fit together.
        Failure: one of them is damaged, or the loss is not finite.
    """
    device = default_device()
    set_products("fp32")
    model, meta = load_model(run, device)
    packed = PackedSet.open(data)
    if packed.clip_samples != meta.clip_samples:
        raise UserError(
            f"the model of {run} reads clips of {meta.clip_samples} samples, "
            f"those of {data} have {packed.clip_samples}"
        )
    match = match_classes(meta.classes, packed)
    model_columns, set_columns = (
        torch.from_numpy(columns).to(device) for columns in (match.model_columns, match.set_columns)
    )
    rows = np.sort(np.random.default_rng(seed).permutation(packed.num_clips)[:clips])
    frontend = build_frontend(meta).to(device)
    source = PackedSource(packed, device)
    with torch.no_grad():
        batches = [
            (item.features(frontend).clone(), item.target[:, set_columns])
            for item in source.batches(evaluation_plans(rows, batch))
        ]
    packed.close()
    surface = LossSurface(model, batches, model_columns, precision)
    loss = surface.loss()
    if not math.isfinite(loss):
        raise Failure(f"the loss of {run} is not finite: its weights have diverged")
    log.info(f"{run}: sharpness on {surface.clips} clips")
    found = sharpness(surface, seed=seed, max_iterations=max_iterations)
    if not found.converged:
        log.warning(
            f"{run}: the sharpness has not converged after {len(found.estimates)} iterations "
            f"(residual {found.residual:.2g}): increase --max-iterations"
        )
    log.info(f"{run}: slice of {len(ALPHAS)} points")
    return Landscape(
        run=str(run),
        model=meta.model,
        parameters=sum(p.numel() for p in surface.parameters),
        data=str(data),
        clips=surface.clips,
        classes=len(set_columns),
        precision=precision,
        loss=loss,
        sharpness=found,
        slice=loss_slice(surface, filter_normalised(surface.parameters, seed)),
    )
