"""The loss scale of float16 training: on the device, as ``torch.amp.GradScaler`` moves it.

Half precision ends at 65,504 and loses what is below 6e-8, where most gradients lie. The loss is
multiplied before the backward pass, and the gradients divided before Adam sees them (Micikevicius
et al. 2018, Mixed Precision Training, section 3.2). A gradient that overflows asks for a smaller
scale: the step is not taken, and the scale is halved. After many good steps it is doubled.

torch's own scaler reads its flag on the host, at every step; this one never does, and a CUDA graph
may hold it.
"""

import torch
from torch import Tensor

FIRST_SCALE = 65536.0
GROWTH = 2.0
BACKOFF = 0.5
GROWTH_INTERVAL = 2000
"""Steps without an overflow after which the scale grows. These four are GradScaler's."""
LARGEST = 2.0**127
"""The largest power of two that float32 holds."""


class LossScale:
    """The scale, and the steps since it last changed.

    A *gradient* that is not finite while the loss is has overflowed: that is no fault as long as a
    smaller scale can help, down to 1. At 1 float16 itself does not hold it, and it is the fault
    that it is in any other precision. A *loss* that is not finite is a fault at once, at any scale:
    it comes of the forward pass, which knows no scale, so that halving mends nothing, whether the
    clip is to blame or float16, which overflowed on its way; and the step that could name the clip
    would be 17 steps past. It moves neither scale nor count.

    Attributes:
        scale: scalar float32 on the device, a power of two, so that it rounds nothing; at least 1.
        good: scalar int32 on the device.
    """

    def __init__(self, device: torch.device) -> None:
        self.scale = torch.full((), FIRST_SCALE, device=device)
        self.good = torch.zeros((), dtype=torch.int32, device=device)

    def update(self, loss: Tensor, found_inf: Tensor) -> Tensor:
        """After a step, in place and without waiting for the device.

        Args:
            loss: scalar, not scaled.
            found_inf: scalar, 1 where the step was not taken.

        Returns:
            scalar float32: 1 where that was an overflow that a smaller scale may mend, else 0.
        """
        bad = (found_inf > 0) & torch.isfinite(loss)
        overflow = (bad & (self.scale > 1)).float()
        self.good.add_(found_inf == 0).mul_(~bad)
        grown = self.good >= GROWTH_INTERVAL
        self.good.mul_(~grown)
        factor = torch.where(bad, BACKOFF, torch.where(grown, GROWTH, 1.0))
        self.scale.mul_(factor).clamp_(1.0, LARGEST)
        return overflow

    def state(self) -> dict[str, Tensor]:
        """For a checkpoint."""
        return {"scale": self.scale, "good": self.good}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Puts ``state`` back, from any device; what captured the tensors stays valid."""
        self.scale.copy_(state["scale"])
        self.good.copy_(state["good"])
