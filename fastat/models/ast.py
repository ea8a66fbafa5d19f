"""AST: a vision Transformer on overlapping 16 x 16 patches of the log-mel.

Source: Gong et al., "AST: Audio Spectrogram Transformer" (2021); Li et al., "AudioTagging Done
Right" (2022), Table 2: mAP 0.430 (A1), 0.274 (A2), 0.410 (A3), 0.268 (A4), and Table 3 on strides.
86,594,063 parameters at 128 x 1024 with strides 10, 85,926,671 at 64 x 400 with strides 8, for 527
classes; the paper's 87.9M count two ImageNet heads that the model does not use.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastat.models.base import TaggingModel
from fastat_kernels.attention import attention
from fastat_kernels.patch_embed import NUM_SPECIAL, PATCH, patch_embed

TRUNKS = {
    "tiny224": "deit_tiny_distilled_patch16_224",
    "small224": "deit_small_distilled_patch16_224",
    "base224": "deit_base_distilled_patch16_224",
    "base384": "deit_base_distilled_patch16_384",
}
"""timm's name of each size's trunk: DeiT and the image size it was trained on."""


class SelfAttention(nn.Module):
    """The self-attention of a timm block, its layers under their names, through our operator."""

    def __init__(self, timm_attention: Any) -> None:
        super().__init__()
        self.num_heads: int = timm_attention.num_heads
        self.qkv: nn.Linear = timm_attention.qkv
        self.proj: nn.Linear = timm_attention.proj

    def forward(self, x: Tensor, **masks: object) -> Tensor:
        """x: [B, N, D] -> [B, N, D]. A timm block also says that there is no mask."""
        B, N, _ = x.shape
        y: Tensor = self.proj(attention(self.qkv(x).view(B, N, 3, self.num_heads, -1)))
        return y


class Ast(TaggingModel):
    """[B, T, F] normalised features -> [B, K] logits, float32.

    Args:
        num_mels, num_frames, num_classes: the feature map and the classes. Maps of another length
            take positions cut or interpolated from this one's.
        fstride, tstride: distance of patches along the mel and the time axis, 1 to 16.
        size: "base384" (the paper), "base224", "small224" or "tiny224".
        num_layers: of the trunk's twelve.
        norm_eps: of every LayerNorm; None: 1e-6 in the trunk, as timm, and 1e-5 in the head, as the
            original AST.
    """

    cls_token: nn.Parameter
    dist_token: nn.Parameter
    pos_embed: nn.Parameter
    layers: nn.Sequential
    norm: nn.Module

    def __init__(
        self,
        *,
        num_mels: int,
        num_frames: int,
        num_classes: int,
        fstride: int = 10,
        tstride: int = 10,
        size: str = "base384",
        num_layers: int = 12,
        norm_eps: float | None = None,
    ) -> None:
        import timm  # takes three seconds, which other models need not wait for

        super().__init__()
        if size not in TRUNKS:
            raise ValueError(f"size must be one of {', '.join(TRUNKS)}, got {size!r}")
        if not 1 <= num_layers <= 12:
            raise ValueError(f"num_layers must be in 1..12, got {num_layers}")
        for name, stride in (("fstride", fstride), ("tstride", tstride)):
            if not 1 <= stride <= PATCH:
                raise ValueError(f"{name} must be in 1..{PATCH}, got {stride}")
        if norm_eps is not None and not 0 <= norm_eps < math.inf:
            raise ValueError(f"norm_eps must be finite and >= 0, got {norm_eps}")
        self.strides = (fstride, tstride)
        self.grid = patch_grid(num_mels, num_frames, fstride, tstride)
        trunk: Any = timm.create_model(TRUNKS[size], num_classes=0, depth=num_layers)
        width: int = trunk.embed_dim
        self.patch_embed = nn.Conv2d(1, width, PATCH, stride=self.strides)
        self.cls_token = trunk.cls_token
        self.dist_token = trunk.dist_token
        num_tokens = NUM_SPECIAL + self.grid[0] * self.grid[1]
        self.pos_embed = nn.Parameter(torch.empty(1, num_tokens, width))
        self.layers = trunk.blocks
        for block in self.layers:
            block.attn = SelfAttention(block.attn)
        self.norm = trunk.norm
        self.embedding_size = width
        self.head_norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_classes)
        for weight in (self.pos_embed, self.patch_embed.weight, self.head.weight):
            nn.init.trunc_normal_(weight, std=0.02)
        nn.init.zeros_(self.head.bias)
        if norm_eps is not None:
            for module in self.modules():
                if isinstance(module, nn.LayerNorm):
                    module.eps = norm_eps

    def embed(self, x: Tensor) -> Tensor:
        """[B, T, F] -> [B, E] float32: the mean of both special tokens, normalised.

        Raises:
            ValueError: the map is smaller than a patch.
        """
        _, T, M = x.shape
        pos: Tensor = self.pos_embed
        if (grid := patch_grid(M, T, *self.strides)) != self.grid:
            pos = adapt_positions(pos, self.grid, grid)
        weight, bias = self.patch_embed.weight, self.patch_embed.bias
        assert bias is not None
        tokens = self.cls_token, self.dist_token
        x = patch_embed(x, weight, bias, pos, *tokens, self.strides)  # [B, 2 + f * t, D]
        x = self.norm(self.run(self.layers, x))
        out: Tensor = self.head_norm((x[:, 0] + x[:, 1]) / 2)
        return out.float()

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, T, F] float32 -> [B, K] float32 logits."""
        return self.classify(self.embed(x))


def patch_grid(num_mels: int, num_frames: int, fstride: int, tstride: int) -> tuple[int, int]:
    """Patches along the mel and the time axis.

    Raises:
        ValueError: the feature map is smaller than a patch.
    """
    if num_mels < PATCH or num_frames < PATCH:
        raise ValueError(
            f"a patch is {PATCH} x {PATCH}: the feature is smaller, "
            f"{num_mels} mels x {num_frames} frames"
        )
    return (num_mels - PATCH) // fstride + 1, (num_frames - PATCH) // tstride + 1


def adapt_positions(pos: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Positional embeddings [1, 2 + f * t, D] of one grid for another (AST, section 2.2).

    An axis that gets no longer is cut from its middle, a longer one is interpolated bilinearly. The
    special tokens keep theirs.
    """
    grid = pos[:, NUM_SPECIAL:].transpose(1, 2).unflatten(2, old)  # [1, D, f, t]
    for axis, (before, after) in enumerate(zip(old, new, strict=True), start=2):
        if after < before:
            grid = grid.narrow(axis, before // 2 - after // 2, after)
    if tuple(grid.shape[2:]) != new:
        grid = F.interpolate(grid, size=new, mode="bilinear")
    return torch.cat([pos[:, :NUM_SPECIAL], grid.flatten(2).transpose(1, 2)], 1)
