"""A training step as the device takes it fastest: on CUDA one graph, launched at once.

A step has hundreds of kernels, each of which the host launches; captured in a CUDA graph, they take
one launch. What changes between steps lies where the graph reads it: features and targets in
buffers of its own, learning rates in tensors; dropout advances torch's generator as a step that is
not captured does.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastat.distributed import ALONE, Ranks
from fastat.errors import Failure, first_line
from fastat.loss_scale import LossScale
from fastat.nonfinite import BufferGuard
from fastat.optim import set_lr, train_step
from fastat.system.device import autocast, set_products

WARM_UP = 3
"""Steps taken before one is captured, on the stream of the capture: they compile what is compiled
at first use, choose algorithms, and make Adam's moments."""


class Taken(NamedTuple):
    """What came of a step: scalars on the device, valid until the next one."""

    loss: Tensor
    norm: Tensor
    """2-norm of the gradient."""
    found_inf: Tensor
    """1 where loss or gradient is not finite, and the step was not taken; else 0."""
    overflow: Tensor
    """1 where that is no fault, but fp16's loss scale being too large; else 0."""


def why_not_captured(device: torch.device, ranks: Ranks, *, checkpointing: bool) -> str | None:
    """What keeps a step out of a CUDA graph; None: nothing does."""
    if device.type != "cuda":
        return "there is no CUDA device"
    if ranks.size > 1 or ranks.device_group is not None:  # a torchrun of one has DDP too
        return "the ranks exchange gradients inside a step"
    if checkpointing:
        # The state that dropout is to find again is read on the host.
        return "activation checkpointing reads the random state on the host"
    return None


class TrainingStep:
    """Forward, loss, backward, finite flag, guarded Adam. The host never waits for the device.

    The graph takes no step that is not a training step: the first ``WARM_UP`` are taken as they
    come, then one is captured, which computes nothing, and it and all others are replays.

    Args:
        model: compiled or not, under DDP or not; in training mode when called.
        params: those that are trained.
        optimizer: ``create_adam``'s, with ``lr_scale`` in its groups.
        precision: "bf16", "fp16", whose loss is scaled, or "fp32".
        guard: takes a step that is not taken back out of BatchNorm's statistics.
        accumulate, ranks: as in ``train_step``.
        graph: capture; only where ``why_not_captured`` has nothing to say.
    """

    def __init__(
        self,
        model: nn.Module,
        params: list[nn.Parameter],
        optimizer: torch.optim.Optimizer,
        *,
        precision: str,
        device: torch.device,
        guard: BufferGuard | None = None,
        accumulate: int = 1,
        ranks: Ranks = ALONE,
        graph: bool = False,
    ) -> None:
        set_products(precision)
        self.model, self.params, self.optimizer = model, params, optimizer
        self.precision, self.device, self.guard = precision, device, guard
        self.accumulate, self.ranks = accumulate, ranks
        self.loss_scale = LossScale(device) if precision == "fp16" else None
        self.graph = graph
        self.forget()

    def __call__(self, features: Tensor, target: Tensor, lr: float) -> Taken:
        """Takes one step.

        Args:
            features: [B, T, F] float32.
            target: [B, K] float32, in 0..1.
            lr: learning rate of the groups whose ``lr_scale`` is 1.

        Raises:
            Failure: the step cannot be captured.
        """
        set_lr(self.optimizer, lr)
        if not self.graph:
            return self._take(features, target)
        if self._captured is None and self._warm < WARM_UP:
            self._warm += 1
            return self._aside(features, target)
        if self._captured is None:
            self._capture(features, target)
        assert self._captured is not None and self._inputs is not None and self._taken is not None
        for buffer, given in zip(self._inputs, (features, target), strict=True):
            if buffer.shape != given.shape:
                raise ValueError(f"expected {list(buffer.shape)}, got {list(given.shape)}")
            buffer.copy_(given, non_blocking=True)
        self._captured.replay()
        return self._taken

    def forget(self) -> None:
        """Drops the graph: after the optimizer or the model got other tensors."""
        self._captured: torch.cuda.CUDAGraph | None = None
        self._inputs: tuple[Tensor, Tensor] | None = None
        self._taken: Taken | None = None
        self._warm = 0
        self._stream = torch.cuda.Stream(self.device) if self.graph else None

    def _take(self, features: Tensor, target: Tensor) -> Taken:
        if self.guard is not None:
            self.guard.remember()
        scale = self.loss_scale
        loss, norm, found_inf = train_step(
            self.model,
            self.params,
            self.optimizer,
            features,
            target,
            autocast(self.device, self.precision),
            self.accumulate,
            self.ranks,
            None if scale is None else scale.scale,
        )
        if self.guard is not None:
            self.guard.undo_if(found_inf)
        overflow = torch.zeros_like(loss) if scale is None else scale.update(loss, found_inf)
        return Taken(loss, norm, found_inf, overflow)

    def _aside(self, features: Tensor, target: Tensor) -> Taken:
        """A step on the stream of the capture."""
        assert self._stream is not None
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            taken = self._take(features, target)
        current.wait_stream(self._stream)
        for x in (features, target):
            x.record_stream(self._stream)
        for x in taken:
            x.record_stream(current)
        return taken

    def _capture(self, features: Tensor, target: Tensor) -> None:
        self._inputs = torch.empty_like(features), torch.empty_like(target)
        graph = torch.cuda.CUDAGraph()
        try:
            # It empties the allocator's cache before. The loader's thread goes on pinning memory,
            # which a capture that watches all threads would not survive.
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                self._taken = self._take(*self._inputs)
        except RuntimeError as error:
            full = (error, error.__context__)  # ending the capture may fail on top of it
            for e in full:
                if isinstance(e, torch.OutOfMemoryError):
                    raise e from None
            raise Failure(
                "the training step cannot be captured in a CUDA graph: "
                f"{first_line(error)}; --set cuda_graphs=false trains without"
            ) from error
        self._captured = graph
