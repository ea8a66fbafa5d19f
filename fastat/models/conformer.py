"""Conformer: twelve blocks of half-FFN, convolution, attention, half-FFN; no positions.

Source: Li et al., "AudioTagging Done Right" (2022), Table 2: 88.1M parameters, mAP 0.335 (A2),
0.308 (A4); the block is Gulati et al.'s (2020) with the convolution before the attention.
88,340,751 parameters at 64 mels and 527 classes.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from fastat.models.base import TaggingModel
from fastat_kernels.attention import attention
from fastat_kernels.depthwise_conv import depthwise_conv
from fastat_kernels.dropout import dropout

STACKED_FRAMES = 4
FIRST_KERNEL, KERNEL = 31, 15
"""Width of the depthwise convolution in the first block and in the others, in stacked frames."""


class FeedForward(nn.Module):
    """LayerNorm, two linear layers with SiLU between."""

    def __init__(self, width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, N, D] -> [B, N, D]."""
        p = self.dropout if self.training else 0.0
        x = dropout(F.silu(self.fc1(self.norm(x))), p)
        return dropout(self.fc2(x), p)


class Convolution(nn.Module):
    """LayerNorm, gated pointwise, depthwise over time, GroupNorm of one group, SiLU, pointwise."""

    def __init__(self, width: int, kernel: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.pointwise1 = nn.Linear(width, 2 * width)
        self.depthwise = nn.Conv1d(width, width, kernel, padding=kernel // 2, groups=width)
        self.group_norm = nn.GroupNorm(1, width)
        self.pointwise2 = nn.Linear(width, width)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, N, D] -> [B, N, D]."""
        bias = self.depthwise.bias
        assert bias is not None
        x = depthwise_conv(
            self.pointwise1(self.norm(x)),
            self.depthwise.weight,
            bias,
            self.group_norm.weight,
            self.group_norm.bias,
            self.group_norm.eps,
        )
        return dropout(self.pointwise2(x), self.dropout if self.training else 0.0)


class SelfAttention(nn.Module):
    """LayerNorm, multi-head self-attention."""

    def __init__(self, width: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.num_heads = num_heads
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, N, D] -> [B, N, D]."""
        B, N, _ = x.shape
        p = self.dropout if self.training else 0.0
        y = attention(self.qkv(self.norm(x)).view(B, N, 3, self.num_heads, -1), p)
        return dropout(self.proj(y), p)


class ConformerBlock(nn.Module):
    """Half a feed-forward, convolution, self-attention, half a feed-forward, LayerNorm."""

    def __init__(
        self, width: int, hidden: int, num_heads: int, kernel: int, dropout: float
    ) -> None:
        super().__init__()
        self.ffn1 = FeedForward(width, hidden, dropout)
        self.conv = Convolution(width, kernel, dropout)
        self.attn = SelfAttention(width, num_heads, dropout)
        self.ffn2 = FeedForward(width, hidden, dropout)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, N, D] -> [B, N, D]."""
        x = x + 0.5 * self.ffn1(x)
        x = x + self.conv(x)
        x = x + self.attn(x)
        out: Tensor = self.norm(x + 0.5 * self.ffn2(x))
        return out


class Conformer(TaggingModel):
    """[B, T, F] normalised features -> [B, K] logits, float32.

    Args:
        num_mels, num_frames, num_classes: the feature map and the classes.
        num_layers: blocks.
        num_heads: attention heads; they divide ``width``.
        width, hidden: of a token, and inside a feed-forward.
        dropout: on attention weights and on every module's output; 0.1 in A2 and A4.
    """

    def __init__(
        self,
        *,
        num_mels: int,
        num_frames: int,
        num_classes: int,
        num_layers: int = 12,
        num_heads: int = 12,
        width: int = 768,
        hidden: int = 1024,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if num_frames < STACKED_FRAMES:
            raise ValueError(
                f"frames are stacked by {STACKED_FRAMES}: num_frames must be at least that, "
                f"got {num_frames}"
            )
        if num_layers < 1 or hidden < 1:
            raise ValueError(
                f"num_layers and hidden must be >= 1, got num_layers={num_layers}, hidden={hidden}"
            )
        if num_heads < 1 or width < 1 or width % num_heads:
            raise ValueError(f"num_heads must divide width {width}, got {num_heads}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        self.stem = nn.Sequential(
            nn.Linear(STACKED_FRAMES * num_mels, 256), nn.LayerNorm(256), nn.Linear(256, width)
        )
        self.layers = nn.ModuleList(
            ConformerBlock(width, hidden, num_heads, KERNEL if i else FIRST_KERNEL, dropout)
            for i in range(num_layers)
        )
        self.embedding_size = width
        self.head = nn.Linear(width, num_classes)

    def embed(self, x: Tensor) -> Tensor:
        """[B, T, F] -> [B, E] float32: the mean over time."""
        B, T, M = x.shape
        if T < STACKED_FRAMES:
            raise ValueError(f"expected at least {STACKED_FRAMES} frames, got {T}")
        num_tokens = T // STACKED_FRAMES
        x = x[:, : num_tokens * STACKED_FRAMES].reshape(B, num_tokens, STACKED_FRAMES * M)
        return self.run(self.layers, self.stem(x)).float().mean(1)

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, T, F] float32 -> [B, K] float32 logits."""
        return self.classify(self.embed(x))
