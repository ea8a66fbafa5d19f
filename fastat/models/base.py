"""What the models share: features to logits, the vector before the classifier, checkpointing."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from fastat.models.layers import PoolingHead


class TaggingModel(nn.Module, ABC):
    """[B, T, F] normalised features -> [B, K] float32 logits.

    Everything that depends on the classes is in ``head``. The blocks of a Transformer are in
    ``layers``, from input to output.
    """

    head: nn.Module
    embedding_size: int
    """E, the width of ``embed``."""
    checkpointing = False
    """Activations of a block are computed again in the backward pass instead of kept."""

    @abstractmethod
    def embed(self, x: Tensor) -> Tensor:
        """[B, T, F] -> [B, E] float32, the vector before the classifier."""

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """[B, T, F] float32 -> [B, K] float32 logits."""

    def classify(self, embedding: Tensor) -> Tensor:
        """[B, E] -> [B, K] float32, by ``head`` outside autocast: logits that are rounded to
        bfloat16 tie, and clips are ranked by them."""
        if embedding.is_meta:  # which has no autocast
            return cast(Tensor, self.head(embedding))
        with torch.autocast(embedding.device.type, enabled=False):
            return cast(Tensor, self.head(embedding.float()))

    def run(self, blocks: Iterable[nn.Module], x: Tensor) -> Tensor:
        """``blocks`` one after the other."""
        for block in blocks:
            if not (self.checkpointing and torch.is_grad_enabled()):
                x = block(x)
            elif torch.compiler.is_compiling():  # which updates buffers once by itself
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = _checkpointed(block, x)
        return x


class FrameModel(TaggingModel):
    """A model that gives every frame an embedding and pools the frames' probabilities."""

    head: PoolingHead

    @abstractmethod
    def frames(self, x: Tensor) -> Tensor:
        """[B, T, F] -> [B, N, E], one embedding for each of N frames."""

    def embed(self, x: Tensor) -> Tensor:
        """[B, T, F] -> [B, E] float32: the mean over the frames, since each class pools its own."""
        return self.frames(x).float().mean(1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, F] float32 -> [B, K] float32 logits."""
        logits: Tensor = self.head(self.frames(x))
        return logits


def _checkpointed(block: nn.Module, x: Tensor) -> Tensor:
    out: Tensor = checkpoint(
        block,
        x,
        use_reentrant=False,
        context_fn=lambda: (nullcontext(), _running_statistics_kept(block)),
    )
    return out


@contextmanager
def _running_statistics_kept(block: nn.Module) -> Iterator[None]:
    """Computing a block again must not count its batch twice in BatchNorm's running statistics."""
    norms = [m for m in block.modules() if isinstance(m, _BatchNorm)]
    before = [(m.momentum, m.num_batches_tracked) for m in norms]
    for m in norms:
        m.momentum = 0.0
        m.num_batches_tracked = None
    try:
        yield
    finally:
        for m, (momentum, batches) in zip(norms, before, strict=True):
            m.momentum = momentum
            m.num_batches_tracked = batches
