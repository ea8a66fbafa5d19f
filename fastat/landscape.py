"""How sharp the minimum is that a training ended in: ``fastat landscape``.

Two views of the loss around trained weights, on a fixed sample of un-augmented clips:

- sharpness, the largest eigenvalue of the Hessian, by power iteration. A product with the Hessian
  is the gradient of (gradient . v) (Pearlmutter, 1994): the Hessian is never formed.
- a slice, the loss along one random direction that is scaled to the weights filter by filter, so
  that networks of other weights can be compared (Li et al., "Visualizing the Loss Landscape of
  Neural Nets", 2018). Biases and the weights of norms stay.

Without dropout, with BatchNorm's running statistics. "AudioTagging Done Right"
explains with such landscapes why attention models are harder to train than convolutional ones.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastat.checkpoint import build_frontend, load_model
from fastat.config import TrainConfig
from fastat.data.loader import PackedSource, evaluation_plans
from fastat.data.shards import PackedSet
from fastat.errors import Failure, UserError
from fastat.evaluate import match_classes
from fastat.models.base import TaggingModel
from fastat.progress import progress
from fastat.system.device import autocast, default_device
from fastat_kernels.backend import kernels

Vector = list[Tensor]
"""A tensor for each parameter, of its shape."""


@dataclass(frozen=True)
class Sharpness:
    """The largest eigenvalue of the Hessian."""

    eigenvalue: float
    residual: float
    """|Hv - lambda v| / |lambda| for the unit vector v found: an eigenvalue is at most so far off,
    relatively."""
    converged: bool
    """Whether the residual came below the tolerance, at an eigenvalue that is not negative."""
    estimates: tuple[float, ...]
    """The eigenvalue after each iteration."""


@dataclass(frozen=True)
class Trace:
    """The sum of the Hessian's eigenvalues (Hutchinson's estimate)."""

    value: float
    standard_error: float
    samples: int


@dataclass(frozen=True)
class Slice:
    """The loss along a direction: ``losses[i]`` at weights + ``alphas[i]`` * direction."""

    alphas: tuple[float, ...]
    losses: tuple[float, ...]


@dataclass(frozen=True)
class Landscape:
    """What is found about one run."""

    run: str
    model: str
    parameters: int
    data: str
    clips: int
    classes: int
    precision: str
    """Of the model's products. Sharpness of a trained cnn_trans in bf16 was within 0.2 % of that in
    fp32, the trace within 3 %, the slice's losses within 0.1 %."""
    loss: float
    """Binary cross-entropy at the weights, mean over clips and classes."""
    sharpness: Sharpness
    trace: Trace | None
    slice: Slice


class LossSurface:
    """The loss of a model on fixed clips as a function of its parameters.

    Args:
        model: maps features to logits; put into evaluation mode. Use within
            ``twice_differentiable``.
        batches: features [B, T, F] and targets [B, K] on the model's device.
        columns: [K], those of the model's outputs that the targets are of; None: all.
        parameters: those that the loss is a function of; None: all of the model's.
        precision: of the model's products.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[tuple[Tensor, Tensor]],
        columns: Tensor | None = None,
        parameters: Sequence[nn.Parameter] | None = None,
        precision: str = "fp32",
    ) -> None:
        self.precision = precision
        self.model, self.batches, self.columns = model.eval(), list(batches), columns
        self.parameters = list(model.parameters() if parameters is None else parameters)
        self.clips = sum(len(target) for _, target in batches)

    def loss(self) -> float:
        """Mean over clips and classes."""
        with torch.no_grad():
            return sum(part.item() for part in self._parts())

    def hessian_product(self, v: Vector) -> Vector:
        """H v, batch by batch."""
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
        """Each batch's share of the loss; they sum to it."""
        for features, target in self.batches:
            with autocast(features.device, self.precision):
                logits = self.model(features)
            logits = logits.to(target)
            if self.columns is not None:
                logits = logits[:, self.columns]
            share = len(target) / self.clips
            yield F.binary_cross_entropy_with_logits(logits, target) * share


@contextmanager
def twice_differentiable(model: nn.Module) -> Iterator[None]:
    """Within it, ``model`` computes by operations that have a second derivative.

    The fused attentions, cuDNN's recurrent networks and the Triton kernels have none.
    """
    with ExitStack() as stack:
        stack.enter_context(kernels(()))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        for module in model.modules():
            if isinstance(module, nn.RNNBase):
                hooks = (
                    module.register_forward_pre_hook(lambda *_: _use_cudnn(False)),
                    module.register_forward_hook(lambda *_: _use_cudnn(True), always_call=True),
                )
                for hook in hooks:
                    stack.callback(hook.remove)
        for products in (torch.backends.cuda.matmul, torch.backends.cudnn.conv):  # type: ignore[attr-defined]
            stack.callback(setattr, products, "fp32_precision", products.fp32_precision)
            products.fp32_precision = "ieee"  # no tf32
        if isinstance(model, TaggingModel):
            stack.callback(setattr, model, "checkpointing", model.checkpointing)
            model.checkpointing = False
        yield


def _use_cudnn(use: bool) -> None:
    torch.backends.cudnn.enabled = use


# --------------------------------------------------------------------------------- vectors
def dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """The inner product over all parameters."""
    return torch.stack([(x * y).sum() for x, y in zip(a, b, strict=True)]).sum()


def _norm(a: Vector) -> float:
    return math.sqrt(dot(a, a).item())


def _scaled(a: Vector, factor: float) -> Vector:
    return [x * factor for x in a]


def _normal_like(parameters: Sequence[Tensor], generator: torch.Generator) -> Vector:
    """Drawn on the CPU, so that a seed is the same direction on any device."""
    return [torch.randn(p.shape, generator=generator).to(p) for p in parameters]


# -------------------------------------------------------------------------------- sharpness
def sharpness(
    surface: LossSurface,
    *,
    seed: int = 0,
    tolerance: float = 0.01,
    max_iterations: int = 100,
    on_iteration: Callable[[int, float, float], object] = lambda *_: None,
) -> Sharpness:
    """The largest eigenvalue of the Hessian, by power iteration from a random vector.

    Iterated is H + c I with c above half of the largest magnitude: a negative eigenvalue of a
    magnitude like the largest one's, or of a greater one, would otherwise stall it or win. That
    magnitude is known from below, by |Hv|. It is raised in strides: creeping up to what is needed,
    it would never pass it.

    Args:
        tolerance: of ``Sharpness.residual``; converged to it, or ended by ``max_iterations``.
        on_iteration: hears of its number from 1, eigenvalue and residual.

    Raises:
        Failure: a product is not finite.
    """
    generator = torch.Generator().manual_seed(seed)
    v = _normal_like(surface.parameters, generator)
    v = _scaled(v, 1 / _norm(v))
    magnitude = 0.0
    estimates: list[float] = []
    while True:
        product = surface.hessian_product(v)
        eigenvalue = dot(v, product).item()
        if not math.isfinite(eigenvalue):
            raise Failure("a product with the Hessian is not finite: the weights have diverged")
        length = _norm(product)
        apart = _norm([h - eigenvalue * x for h, x in zip(product, v, strict=True)])
        residual = apart / abs(eigenvalue) if eigenvalue else math.inf
        if length == 0:  # the loss is flat, and every vector belongs to eigenvalue 0
            residual = 0.0
        estimates.append(eigenvalue)
        on_iteration(len(estimates), eigenvalue, residual)
        # A classifier's largest is positive, as its biases' own curvature is: a negative one met on
        # the way is another.
        converged = residual <= tolerance and eigenvalue >= 0
        if converged or len(estimates) >= max_iterations:
            return Sharpness(eigenvalue, residual, converged, tuple(estimates))
        if length > 1.1 * magnitude:
            magnitude = length
        v = [h + 0.55 * magnitude * x for h, x in zip(product, v, strict=True)]
        v = _scaled(v, 1 / _norm(v))


def trace(surface: LossSurface, samples: int, seed: int = 0) -> Trace:
    """The Hessian's trace, the mean of v . Hv over random vectors of +-1 (Hutchinson, 1990)."""
    generator = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(samples):
        signs = [
            (torch.randint(0, 2, p.shape, generator=generator) * 2 - 1).to(p)
            for p in surface.parameters
        ]
        values.append(dot(signs, surface.hessian_product(signs)).item())
    spread = float(np.std(values, ddof=1)) if samples > 1 else math.nan
    return Trace(float(np.mean(values)), spread / math.sqrt(samples), samples)


# ------------------------------------------------------------------------------------ slice
def filter_normalised(parameters: Sequence[Tensor], seed: int = 0) -> Vector:
    """A random direction in which every filter is as long as that of the weights.

    A filter is what makes one output: a row of a matrix, a kernel of a convolution. Zero for
    parameters of one axis: biases, and the weights of BatchNorm and LayerNorm.

    Source: Li et al. (2018), section 4.
    """
    generator = torch.Generator().manual_seed(seed)
    direction = _normal_like(parameters, generator)
    out = []
    for d, p in zip(direction, parameters, strict=True):
        if p.ndim < 2:
            out.append(torch.zeros_like(p))
            continue
        axes = tuple(range(1, p.ndim))
        lengths = (torch.linalg.vector_norm(x.detach(), dim=axes, keepdim=True) for x in (p, d))
        of_weights, of_direction = lengths
        out.append(d * (of_weights / of_direction.clamp(min=1e-12)))
    return out


def slice_points(num: int) -> list[float]:
    """``num`` alphas from -1 to 1; an odd number has 0, the weights themselves."""
    return [round(float(a), 6) for a in np.linspace(-1.0, 1.0, num)]


def loss_slice(
    surface: LossSurface,
    direction: Vector,
    alphas: Sequence[float],
    advance: Callable[[int], object] = lambda points: None,
) -> Slice:
    """The loss at weights + alpha * direction. The weights are put back bit for bit."""
    before = [p.detach().clone() for p in surface.parameters]
    losses = []
    try:
        for alpha in alphas:
            with torch.no_grad():
                for p, start, d in zip(surface.parameters, before, direction, strict=True):
                    p.copy_(start + alpha * d if alpha else start)
            losses.append(surface.loss())
            advance(1)
    finally:
        with torch.no_grad():
            for p, start in zip(surface.parameters, before, strict=True):
                p.copy_(start)
    return Slice(tuple(float(a) for a in alphas), tuple(losses))


# ------------------------------------------------------------------------------- of a run
def evaluation_set_of(run: Path) -> Path:
    """The evaluation set that a run was scored on.

    Raises:
        UserError: there is no run, or it was not scored.
    """
    config = run / "config.json"
    if not config.is_file():
        raise UserError(f"{run} is no run folder (no config.json in it): --data says on which set")
    evaluation = TrainConfig.load(config).eval
    if evaluation is None:
        raise UserError(f"{run} was trained without an evaluation set: --data says on which set")
    return Path(evaluation)


def surface_of(
    run: Path, data: Path, *, clips: int, batch: int, seed: int, precision: str = "fp32"
) -> tuple[LossSurface, str]:
    """The loss of a run's best weights on ``clips`` random ones of a set, and its model's name.

    Equal seeds take the same clips of a set. Features stay in memory: 0.1 MB a clip of 64 x 400,
    0.5 MB of 128 x 1024.

    Raises:
        UserError: no checkpoint, no packed set, or they do not fit together.
        Failure: one is damaged.
    """
    device = default_device()
    model, meta = load_model(run, device)
    packed = PackedSet.open(data)
    if packed.clip_samples != meta.clip_samples:
        raise UserError(
            f"the model of {run} reads clips of {meta.clip_samples} samples, "
            f"those of {data} have {packed.clip_samples}"
        )
    match = match_classes(meta.classes, packed)
    chosen = np.random.default_rng(seed).permutation(packed.num_clips)[:clips]
    rows = np.sort(chosen).astype(np.int64)
    frontend = build_frontend(meta).to(device)
    batches = []
    with torch.no_grad():
        for item in PackedSource(packed, device).batches(evaluation_plans(rows, batch)):
            target = item.target[:, torch.from_numpy(match.set_columns).to(device)]
            batches.append((item.features(frontend).clone(), target.clone()))
    packed.close()
    columns = torch.from_numpy(match.model_columns).to(device)
    return LossSurface(model, batches, columns, precision=precision), meta.model


def landscape(
    run: Path,
    data: Path,
    *,
    clips: int,
    batch: int,
    seed: int,
    tolerance: float,
    max_iterations: int,
    trace_samples: int,
    alphas: Sequence[float],
    precision: str = "fp32",
    on_iteration: Callable[[int, float, float], object] = lambda *_: None,
) -> Landscape:
    """Sharpness and slice of a run on clips of ``data``.

    Args:
        trace_samples: random vectors for the trace; 0: it is left out.
        on_iteration: as ``sharpness`` has it.

    Raises:
        UserError, Failure: as ``surface_of``; the loss is not finite, or memory is full.
    """
    try:
        surface, name = surface_of(
            run, data, clips=clips, batch=batch, seed=seed, precision=precision
        )
        with twice_differentiable(surface.model):
            loss = surface.loss()
            if not math.isfinite(loss):
                raise Failure(f"the loss of {run} is not finite: its weights have diverged")
            found = sharpness(
                surface,
                seed=seed,
                tolerance=tolerance,
                max_iterations=max_iterations,
                on_iteration=on_iteration,
            )
            sums = trace(surface, trace_samples, seed) if trace_samples else None
            direction = filter_normalised(surface.parameters, seed)
            with progress(f"{run}: slice", len(alphas), unit="points") as advance:
                points = loss_slice(surface, direction, alphas, advance)
    except torch.OutOfMemoryError as error:
        raise Failure(
            f"the GPU's memory is full: a smaller --batch needs less ({error})"
        ) from error
    return Landscape(
        run=str(run),
        model=name,
        parameters=sum(p.numel() for p in surface.parameters),
        data=str(data),
        clips=surface.clips,
        classes=surface.batches[0][1].shape[1],
        precision=precision,
        loss=loss,
        sharpness=found,
        trace=sums,
        slice=points,
    )
