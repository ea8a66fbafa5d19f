"""Multi-head self-attention from packed projections: softmax(q k^T / sqrt(Dh)) v.

Source: Vaswani et al. (2017), section 3.2. Non-causal, any length, dropout on the weights.
Shapes: qkv [B, N, 3, H, Dh] -> [B, N, H * Dh].
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastat_kernels.dropout import dropout


def attention_ref(qkv: Tensor) -> Tensor:
    """qkv [B, N, 3, H, Dh] -> [B, N, H * Dh]. The specification without dropout; float32 inside."""
    q, k, v = qkv.float().permute(2, 0, 3, 1, 4)
    weights = (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(-1)
    out: Tensor = (weights @ v).transpose(1, 2).flatten(2)
    return out.to(qkv.dtype)


def attention(qkv: Tensor, dropout_p: float = 0.0) -> Tensor:
    """Self-attention of every token with every other.

    Args:
        qkv: [B, N, 3, H, Dh], queries, keys and values side by side.
        dropout_p: probability of dropping an attention weight.

    Returns:
        [B, N, H * Dh], dtype of ``qkv``.

    Raises:
        ValueError: ``qkv`` is not of that shape, or ``dropout_p`` is outside [0, 1).
    """
    if qkv.ndim != 5 or qkv.shape[2] != 3:
        raise ValueError(f"qkv must be [B, N, 3, H, Dh], got {tuple(qkv.shape)}")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}")
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # [B, H, N, Dh] each
    if dropout_p and qkv.device.type == "cpu":
        # torch's fused CPU kernel takes no dropout, and its fallback draws a Bernoulli a weight.
        scores = (q * (1 / math.sqrt(q.shape[-1]))) @ k.transpose(-2, -1)
        out: Tensor = dropout(scores.softmax(-1, dtype=torch.float32).to(v.dtype), dropout_p) @ v
    else:
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p)
    return out.transpose(1, 2).flatten(2)
