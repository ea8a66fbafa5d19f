"""Fused Adam, NVIDIA apex's where it is importable on CUDA, torch's otherwise; and one step."""

import importlib
import importlib.machinery
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastat.system.distributed import ALONE, Ranks


def create_adam(
    params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
    *,
    lr: float,
    betas: tuple[float, float],
    weight_decay: float,
    device: torch.device,
) -> tuple[torch.optim.Optimizer, str]:
    """Adam (L2 weight decay, as in the paper's code), and a line that says whose it is.

    ``params`` may be parameters or groups of them. On CUDA its step can be captured in a graph: the
    learning rate of each group is a tensor on the device, see ``set_lr``.
    """
    on_cuda = device.type == "cuda"
    fused_adam, name = choose_adam(device)
    optimizer: torch.optim.Optimizer
    if fused_adam is not None:
        optimizer = fused_adam(
            list(params),
            lr=lr,
            betas=betas,
            weight_decay=weight_decay,
            adam_w_mode=False,
            capturable=True,
        )
        for group in optimizer.param_groups:
            # Not there until the first step, which would count even if it is not taken.
            group["step"] = torch.zeros(1, dtype=torch.int, device=group["params"][0].device)
    else:
        optimizer = torch.optim.Adam(
            params, lr=lr, betas=betas, weight_decay=weight_decay, fused=True, capturable=on_cuda
        )
    if on_cuda:
        for group in optimizer.param_groups:  # one each: they would share the default
            group["lr"] = torch.tensor(float(lr), device=group["params"][0].device)
    return optimizer, name


def choose_adam(
    device: torch.device,
) -> tuple[Callable[..., torch.optim.Optimizer] | None, str]:
    """apex's FusedAdam, or None for torch's; and the name of what is taken, with the reason."""
    fused_adam, why = _apex_fused_adam() if device.type == "cuda" else (None, "apex needs CUDA")
    return fused_adam, "NVIDIA apex FusedAdam" if fused_adam else f"torch fused Adam ({why})"


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Gives each group ``lr`` times its ``lr_scale``, without waiting for the device."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr * group["lr_scale"])
        else:
            group["lr"] = lr * group["lr_scale"]


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


class _FoundInf:
    """What apex's FusedAdam asks a gradient scaler: the flag, and the scale of the gradients.

    The two methods are all that it calls (``apex/optimizers/fused_adam.py``, capturable).
    """

    def __init__(self, found_inf: Tensor, grad_scale: Tensor | None) -> None:
        self.found_inf, self.grad_scale = found_inf, grad_scale

    def _check_inf_per_device(self, optimizer: object) -> dict[torch.device, Tensor]:
        return {self.found_inf.device: self.found_inf}

    def _get_scale_async(self) -> Tensor:
        if self.grad_scale is None:
            return torch.ones(1, device=self.found_inf.device)
        return self.grad_scale


def guarded_step(
    optimizer: torch.optim.Optimizer, found_inf: Tensor, grad_scale: Tensor | None = None
) -> None:
    """One optimizer step that leaves weights and state alone where ``found_inf`` is 1.

    Both Adams read the flag on the device, and what the gradients were multiplied by and are to be
    divided by, if anything; the host does not wait.
    """
    if isinstance(optimizer, torch.optim.Adam):
        optimizer.found_inf = found_inf  # type: ignore[attr-defined]
        optimizer.grad_scale = grad_scale  # type: ignore[attr-defined]
        optimizer.step()
        return
    apex: Any = optimizer
    # By this one apex counts a step, before it asks for the flag: at the next step the count would
    # be right all the same, but not in a checkpoint between them.
    apex._dummy_overflow_buf.copy_(found_inf)
    apex.step(grad_scaler=_FoundInf(found_inf, grad_scale))


def train_step(
    model: nn.Module,
    params: list[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    features: Tensor,
    target: Tensor,
    precision: AbstractContextManager[object],
    accumulate: int = 1,
    ranks: Ranks = ALONE,
    grad_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Forward, backward and Adam, without waiting for the device.

    On a CPU the gradients stay until the next step's are due: the heap then keeps their pages,
    where it would give them back and fault them in anew, a tenth of a step's time (measured,
    ResNet50 and AST).

    Args:
        features: [B, T, F] float32.
        target: [B, K] float32, in 0..1.
        precision: the context that the model runs in.
        accumulate: micro-batches, of equal size, that the batch is computed in; the gradient is
            that of the whole batch, but BatchNorm sees one micro-batch at a time.
        ranks: the features are the part of one of them; gradients and loss are means over all.
        grad_scale: scalar float32 on the device, which multiplies the loss for the backward pass
            alone; None: 1.

    Returns:
        loss, gradient norm, neither scaled, and 1 where either is not finite and the step was not
        taken: scalars on the device, the same on every rank.
    """
    size = len(features) // accumulate
    on_cpu = features.device.type == "cpu"
    loss = torch.zeros((), device=features.device)
    no_sync: Callable[[], AbstractContextManager[object]] = getattr(model, "no_sync", nullcontext)
    for i, (x, y) in enumerate(zip(features.split(size), target.split(size), strict=True), 1):
        # Ranks exchange their gradients in the last backward pass alone.
        with no_sync() if i < accumulate else nullcontext():
            with precision:
                logits = model(x)
            if on_cpu and i == 1:
                optimizer.zero_grad()
            part = F.binary_cross_entropy_with_logits(logits.float(), y) / accumulate
            (part if grad_scale is None else part * grad_scale).backward()
        loss += part.detach()
    loss = ranks.mean(loss)
    found_inf, norm = finite_flag(loss, params)
    if grad_scale is not None:
        norm = norm / grad_scale
    guarded_step(optimizer, found_inf, grad_scale)
    if not on_cpu:
        optimizer.zero_grad()  # to None; apex's takes no argument that says so
    return loss, norm, found_inf
