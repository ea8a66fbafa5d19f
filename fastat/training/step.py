"""A training step, on CUDA captured as one graph.

A step has hundreds of kernels, each of which the host launches; captured in a CUDA graph, they take
one launch. The graph reads features and targets from buffers of its own and learning rates from
tensors; dropout advances torch's generator as in a step that is not captured.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastat.system.device import autocast, set_products
from fastat.system.distributed import ALONE, Ranks
from fastat.system.errors import Failure, first_line
from fastat.training.loss_scale import LossScale
from fastat.training.nonfinite import BufferGuard
from fastat.training.optim import set_lr, train_step

WARM_UP = 3
"""Steps before the captured one, on the stream of the capture: they compile what is compiled at
first use, choose algorithms, and create Adam's moments."""


class StepResult(NamedTuple):
    """Results of a step: scalars on the device, valid until the next step."""

    loss: Tensor
    norm: Tensor
    """2-norm of the gradient."""
    found_inf: Tensor
    """1 where loss or gradient is not finite, and the step was not taken; else 0."""
    overflow: Tensor
    """1 where only fp16's loss scale was too large, which is no fault; else 0."""


def why_not_captured(device: torch.device, ranks: Ranks, *, checkpointing: bool) -> str | None:
    """Why a step cannot be captured in a CUDA graph, or None if it can."""
    if device.type != "cuda":
        return "there is no CUDA device"
    if ranks.size > 1 or ranks.device_group is not None:  # a torchrun of one has DDP too
        return "the ranks exchange gradients inside a step"
    if checkpointing:
        # The state that dropout is to find again is read on the host.
        return "activation checkpointing reads the random state on the host"
    return None


class TrainingStep:
    """Forward, loss, backward, finite flag, guarded Adam, without host-device synchronisation.

    The first ``WARM_UP`` steps run eagerly; the next is captured, and it and all later ones are
    replays of the graph.

    Args:
        model: compiled or not, under DDP or not; in training mode when called.
        params: the parameters that are trained.
        optimizer: ``create_adam``'s, with ``lr_scale`` in its groups.
        precision: "bf16", "fp16", whose loss is scaled, or "fp32".
        guard: undoes what a step that is not taken did to BatchNorm's statistics.
        accumulate, ranks: as in ``train_step``.
        graph: capture the step; only where ``why_not_captured`` returns None.
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

    def __call__(self, features: Tensor, target: Tensor, lr: float) -> StepResult:
        """Runs one step.

        Args:
            features: [B, T, F] float32.
            target: [B, K] float32, in 0..1.
            lr: learning rate of the groups whose ``lr_scale`` is 1.

        Raises:
            Failure: the step cannot be captured.
        """
        set_lr(self.optimizer, lr)
        if not self.graph:
            return self._run(features, target)
        if self._captured is None and self._num_warm_up < WARM_UP:
            self._num_warm_up += 1
            return self._warm_up_step(features, target)
        if self._captured is None:
            self._capture(features, target)
        assert self._captured is not None and self._inputs is not None and self._result is not None
        for buffer, given in zip(self._inputs, (features, target), strict=True):
            if buffer.shape != given.shape:
                raise ValueError(f"expected {list(buffer.shape)}, got {list(given.shape)}")
            buffer.copy_(given, non_blocking=True)
        self._captured.replay()
        return self._result

    def forget(self) -> None:
        """Drops the graph, after the optimizer or the model got other tensors."""
        self._captured: torch.cuda.CUDAGraph | None = None
        self._inputs: tuple[Tensor, Tensor] | None = None
        self._result: StepResult | None = None
        self._num_warm_up = 0
        self._stream = torch.cuda.Stream(self.device) if self.graph else None

    def _run(self, features: Tensor, target: Tensor) -> StepResult:
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
        return StepResult(loss, norm, found_inf, overflow)

    def _warm_up_step(self, features: Tensor, target: Tensor) -> StepResult:
        """Runs a step on the stream of the capture."""
        assert self._stream is not None
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            result = self._run(features, target)
        current.wait_stream(self._stream)
        for x in (features, target):
            x.record_stream(self._stream)
        for x in result:
            x.record_stream(current)
        return result

    def _capture(self, features: Tensor, target: Tensor) -> None:
        self._inputs = torch.empty_like(features), torch.empty_like(target)
        graph = torch.cuda.CUDAGraph()
        try:
            # It empties the allocator's cache before. The loader's thread goes on pinning memory,
            # which a capture that watches all threads would not survive.
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                self._result = self._run(*self._inputs)
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
