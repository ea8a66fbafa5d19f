"""Transformer: post-norm encoder layers on single frames, then a max-pool by 4 over time.

Source: Li et al., "AudioTagging Done Right" (2022), Table 2: 28.5M parameters, mAP 0.230 (A2),
0.209 (A4). No canonical width gives 28.5M; with d = FFN = 768 the trunk has 28,424,448 parameters
at 64 mels, the whole 29,234,974 at 527 classes.
"""

import math

from torch import Tensor, nn

from fastat.models.base import FrameModel
from fastat.models.layers import EncoderLayer, PoolingHead, SinusoidalPositions

POOLED_FRAMES = 4


class Transformer(FrameModel):
    """[B, T, F] normalised features -> [B, K] logits, float32.

    Args:
        num_mels, num_frames, num_classes: the feature map and the classes.
        num_layers: encoder layers; the paper studies 2 to 12.
        num_heads: attention heads, dividing ``width``; the paper studies 4, 8 and 12.
        width: of a frame in the layers, and of their hidden layer.
        dropout: on attention weights and on both halves' outputs; 0.1 in A2 and A4.
        pooling: "att", "max", "ave", "lin", "exp" or "sigatt".
    """

    def __init__(
        self,
        *,
        num_mels: int,
        num_frames: int,
        num_classes: int,
        num_layers: int = 8,
        num_heads: int = 8,
        width: int = 768,
        dropout: float = 0.0,
        pooling: str = "att",
    ) -> None:
        super().__init__()
        if num_frames < POOLED_FRAMES:
            raise ValueError(
                f"frames are pooled by {POOLED_FRAMES}: num_frames must be at least that, "
                f"got {num_frames}"
            )
        if num_layers < 1:
            raise ValueError(f"num_layers must be >= 1, got {num_layers}")
        if num_heads < 1 or width < 1 or width % num_heads:
            raise ValueError(f"num_heads must divide width {width}, got {num_heads}")
        self.proj = nn.Linear(num_mels, width)
        self.proj_norm = nn.LayerNorm(width)
        self.scale = round(math.sqrt(width))
        self.positions = SinusoidalPositions(width, max(num_frames, 2048))
        self.layers = nn.ModuleList(
            EncoderLayer(width, width, num_heads, dropout) for _ in range(num_layers)
        )
        self.embedding_size = width
        self.head = PoolingHead(width, num_classes, pooling)

    def frames(self, x: Tensor) -> Tensor:
        """x: [B, T, F] float32 -> [B, T // 4, D]."""
        if x.shape[1] < POOLED_FRAMES:
            raise ValueError(f"expected at least {POOLED_FRAMES} frames, got {x.shape[1]}")
        x = self.positions(self.proj_norm(self.proj(x)) * self.scale)
        x = self.run(self.layers, x)  # [B, T, D]
        num_pooled = x.shape[1] // POOLED_FRAMES
        x = x[:, : num_pooled * POOLED_FRAMES]
        out: Tensor = x.unflatten(1, (num_pooled, POOLED_FRAMES)).amax(2)
        return out
