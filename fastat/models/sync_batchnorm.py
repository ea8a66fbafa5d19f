"""BatchNorm over the batch of all ranks on a CPU, where torch's SyncBatchNorm does not run."""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class _SumOfRanks(torch.autograd.Function):
    """The sum of the ranks' tensors; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        out = x.clone()
        dist.all_reduce(out, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None]:
        dx = dout.clone()
        dist.all_reduce(dx, group=ctx.group)
        return dx, None


class CpuSyncBatchNorm(_BatchNorm):
    """torch.nn.SyncBatchNorm for a CPU: the ranks' batches are normalised as one.

    Its statistics are float32 (float64 for such input), and its output has the input's dtype.
    """

    def __init__(self, module: _BatchNorm, group: dist.ProcessGroup) -> None:
        """Takes the place of ``module``, with its weights and running statistics."""
        options = (module.eps, module.momentum, module.affine, module.track_running_stats)
        super().__init__(module.num_features, *options)
        self.group = group
        self.to(module.weight)
        self.load_state_dict(module.state_dict())
        for ours, theirs in zip(self.parameters(), module.parameters(), strict=True):
            ours.requires_grad_(theirs.requires_grad)
        self.train(module.training)

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, C, ...], B of this rank."""
        if not self.training:
            stats = self.running_mean, self.running_var
            return F.batch_norm(x, *stats, self.weight, self.bias, eps=self.eps)
        axes = [axis for axis in range(x.ndim) if axis != 1]
        shape = [-1 if axis == 1 else 1 for axis in range(x.ndim)]
        wide = x if x.dtype == torch.float64 else x.float()
        count = torch.tensor(float(x.numel() // x.shape[1]))
        dist.all_reduce(count, group=self.group)
        mean = _SumOfRanks.apply(wide.sum(axes), self.group) / count
        centred = wide - mean.view(shape)
        var = _SumOfRanks.apply(centred.square().sum(axes), self.group) / count
        if self.running_mean is not None and self.running_var is not None:
            factor = self._momentum()
            self.running_mean.lerp_(mean.detach(), factor)
            self.running_var.lerp_(var.detach() * count / (count - 1), factor)
        out: Tensor = centred * torch.rsqrt(var + self.eps).view(shape)
        if self.affine:
            out = out * self.weight.view(shape) + self.bias.view(shape)
        return out.to(x.dtype)

    def _momentum(self) -> float:
        """How much this batch moves the running statistics; counts it."""
        if self.num_batches_tracked is None:  # a checkpointed block, computed again
            return self.momentum or 0.0
        self.num_batches_tracked.add_(1)
        return 1.0 / self.num_batches_tracked.item() if self.momentum is None else self.momentum


def synchronise_batchnorm(model: nn.Module, group: dist.ProcessGroup) -> None:
    """Replaces every BatchNorm below ``model`` by one over all ranks of ``group``."""
    if any(p.is_cuda for p in model.parameters()):
        nn.SyncBatchNorm.convert_sync_batchnorm(model, group)
        return
    for parent in list(model.modules()):
        for name, module in parent.named_children():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                setattr(parent, name, CpuSyncBatchNorm(module, group))
