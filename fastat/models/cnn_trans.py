"""CNN+Transformer: the TALNet stack, then one post-norm encoder layer applied twice.

Source: Li et al., "AudioTagging Done Right" (2022), section 3 and Table 2: 12.1M parameters,
mAP 0.437 (A2), 0.411 (A4). 12,097,662 parameters at 64 mels, embedding 1024 and 527 classes.
"""

import math

from torch import Tensor, nn

from fastat.models.base import FrameModel
from fastat.models.layers import (
    EncoderLayer,
    PoolingHead,
    SinusoidalPositions,
    TalNet,
    one_channel_image,
)


class CnnTransformer(FrameModel):
    """[B, T, F] normalised features -> [B, K] logits, float32.

    Args:
        num_mels, num_frames, num_classes: the feature map and the classes.
        embedding: width of a frame after the convolutions, and of the encoder layer.
        num_layers: how often the encoder layer is applied.
        shared: one layer's weights for all applications (the paper), or a layer for each.
        num_heads: attention heads, each ``floor(embedding / num_heads)`` wide.
        dropout: on attention weights and on both halves' outputs; 0.75 in A4, 0.25 in A2.
        pooling: "att", "max", "ave", "lin", "exp" or "sigatt".
        input_scale: factor on the spectrogram before positions are added;
            ``round(sqrt(num_mels))`` by the paper's text, 8 in the authors' code at any width.
    """

    def __init__(
        self,
        *,
        num_mels: int,
        num_frames: int,
        num_classes: int,
        embedding: int = 1024,
        num_layers: int = 2,
        shared: bool = True,
        num_heads: int = 8,
        dropout: float = 0.0,
        pooling: str = "att",
        input_scale: float | None = None,
    ) -> None:
        super().__init__()
        if num_layers < 1:
            raise ValueError(f"num_layers must be >= 1, got {num_layers}")
        self.input_scale = round(math.sqrt(num_mels)) if input_scale is None else input_scale
        if not math.isfinite(self.input_scale):
            raise ValueError(f"input_scale must be finite, got {input_scale}")
        self.positions = SinusoidalPositions(num_mels, max(num_frames, 2048))
        self.talnet = TalNet(num_mels, num_frames, embedding)
        self.num_layers = num_layers
        self.layers = nn.ModuleList(
            EncoderLayer(embedding, embedding, num_heads, dropout)
            for _ in range(1 if shared else num_layers)
        )
        self.embedding_size = embedding
        self.head = PoolingHead(embedding, num_classes, pooling)

    def frames(self, x: Tensor) -> Tensor:
        """x: [B, T, F] float32 -> [B, T // 4, D]."""
        x = one_channel_image(self.positions(x * self.input_scale))
        x = self.talnet.flatten(self.run(self.talnet.blocks, x))
        return self.run((self.layers[i % len(self.layers)] for i in range(self.num_layers)), x)
