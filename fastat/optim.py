"""Fused Adam, NVIDIA apex's where it is importable on CUDA, torch's otherwise; and one step."""

import importlib
import importlib.machinery
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastat.distributed import ALONE, Ranks


def create_adam(
    params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
    *,
    lr: float,
    betas: tuple[float, float],
    weight_decay: float,
    device: torch.device,
) -> tuple[torch.optim.Optimizer, str]:
    """Adam (L2 weight decay, as in the paper's code), and a line that says whose it is.

    ``params`` may be parameters or groups of them.
    """
    if device.type == "cuda":
        fused_adam, why = _apex_fused_adam()
        if fused_adam is not None:
            apex_adam = fused_adam(
                list(params), lr=lr, betas=betas, weight_decay=weight_decay, adam_w_mode=False
            )
            return apex_adam, "NVIDIA apex FusedAdam"
    else:
        why = "apex needs CUDA"
    optimizer = torch.optim.Adam(params, lr=lr, betas=betas, weight_decay=weight_decay, fused=True)
    return optimizer, f"torch fused Adam ({why})"


def _apex_fused_adam() -> tuple[Callable[..., torch.optim.Optimizer] | None, str]:
    """apex.optimizers.FusedAdam, or None and the reason it cannot be had."""
    try:
        fused_adam = importlib.import_module("apex.optimizers").FusedAdam
    except (ImportError, AttributeError) as error:
        # PyPI's apex fails in its own imports: that it is there must be asked without running it.
        spec = importlib.machinery.PathFinder.find_spec("apex")
        if spec is None:
            return None, "NVIDIA apex is not installed"
        where = spec.origin or "an unknown place"
        return None, (
            f"the package 'apex' at {where} is not NVIDIA's, or is broken: "
            f"it has no apex.optimizers.FusedAdam ({error}); PyPI's 'apex' is something else"
        )
    try:
        importlib.import_module("amp_C")
    except ImportError:
        return None, "NVIDIA apex was built without its CUDA extensions"
    return fused_adam, ""


def finite_flag(loss: Tensor, params: Iterable[nn.Parameter]) -> tuple[Tensor, Tensor]:
    """Whether a step may be taken, and the gradient's norm; both stay on the device.

    Returns:
        found_inf: scalar float32, 1 when the loss or a gradient is not finite, else 0.
        norm: scalar float32, the 2-norm of all gradients.
    """
    grads = [p.grad for p in params if p.grad is not None]
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
    found_inf = (~(torch.isfinite(loss) & torch.isfinite(norm))).float()
    return found_inf, norm


def guarded_step(optimizer: torch.optim.Optimizer, found_inf: Tensor) -> None:
    """One optimizer step that leaves weights and state alone where ``found_inf`` is 1.

    torch's fused Adam reads the flag on the device. apex's has no such argument outside a gradient
    scaler, so there the host looks at it first, which waits for the device.
    """
    if isinstance(optimizer, torch.optim.Adam):
        optimizer.found_inf = found_inf  # type: ignore[attr-defined]
        optimizer.step()
    elif not found_inf.item():
        optimizer.step()


def train_step(
    model: nn.Module,
    params: list[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    features: Tensor,
    target: Tensor,
    precision: AbstractContextManager[object],
    accumulate: int = 1,
    ranks: Ranks = ALONE,
) -> tuple[Tensor, Tensor, Tensor]:
    """Forward, backward and Adam, without waiting for the device.

    Args:
        features: [B, T, F] float32.
        target: [B, K] float32, in 0..1.
        precision: the context that the model runs in.
        accumulate: micro-batches, of equal size, that the batch is computed in; the gradient is
            that of the whole batch, but BatchNorm sees one micro-batch at a time.
        ranks: the features are the part of one of them; gradients and loss are means over all.

    Returns:
        loss, gradient norm, and 1 where either is not finite and the step was not taken: scalars
        on the device, the same on every rank.
    """
    size = len(features) // accumulate
    loss = torch.zeros((), device=features.device)
    no_sync: Callable[[], AbstractContextManager[object]] = getattr(model, "no_sync", nullcontext)
    for i, (x, y) in enumerate(zip(features.split(size), target.split(size), strict=True), 1):
        # Ranks exchange their gradients in the last backward pass alone.
        with no_sync() if i < accumulate else nullcontext():
            with precision:
                logits = model(x)
            part = F.binary_cross_entropy_with_logits(logits.float(), y) / accumulate
            part.backward()
        loss += part.detach()
    loss = ranks.mean(loss)
    found_inf, norm = finite_flag(loss, params)
    guarded_step(optimizer, found_inf)
    optimizer.zero_grad(set_to_none=True)
    return loss, norm, found_inf
