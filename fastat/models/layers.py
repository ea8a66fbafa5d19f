"""Layers that models share: the TALNet stack, positions, the post-norm encoder layer, pooling.

Axis letters: B clips, T frames, F mel bins, C channels, D width, K classes.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastat_kernels.attention import attention
from fastat_kernels.bn_relu_pool import bn_relu_pool
from fastat_kernels.dropout import dropout

POOLINGS = ("att", "max", "ave", "lin", "exp", "sigatt")

PROB_EPS = 1e-7
"""Probabilities are kept in [PROB_EPS, 1 - PROB_EPS] before their logit is taken."""


def one_channel_image(x: Tensor) -> Tensor:
    """[B, H, W] -> [B, 1, H, W] in channels_last."""
    # With one channel both layouts have the same strides up to the size-1 axis, so
    # contiguous(channels_last) would be a no-op; the strides have to be spelled out.
    B, H, W = x.shape
    return torch.as_strided(x.contiguous(), (B, 1, H, W), (H * W, 1, W, 1))


class ConvBlock(nn.Module):
    """3x3 convolution with bias, BatchNorm, ReLU and, where asked, a max-pool."""

    def __init__(self, in_channels: int, out_channels: int, pool: tuple[int, int] | None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.bn = nn.BatchNorm2d(out_channels)
        self.pool = pool
        nn.init.xavier_uniform_(self.conv.weight)
        nn.init.zeros_(self.conv.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, C, T, F] -> [B, C', T', F']."""
        return bn_relu_pool(self.conv(x), self.bn, self.pool)


class TalNet(nn.Module):
    """The convolutional stack of TALNet (Wang, 2019), shared by CRNN and CNN+Transformer.

    Ten convolutions; pools of (time, mel) 2x2, 2x2, 1x2, 1x2, 1x2 after every second one. A pair
    that leaves M mel bins has ``embedding / M`` channels, so the flattened width is constant.

    Shapes: [B, T, F] -> [B, T // 4, embedding], channel-major.
    """

    POOLS = ((2, 2), (2, 2), (1, 2), (1, 2), (1, 2))

    def __init__(self, num_mels: int, num_frames: int, embedding: int) -> None:
        super().__init__()
        if num_frames < 4:
            raise ValueError(f"TALNet pools time by 4: num_frames must be >= 4, got {num_frames}")
        if num_mels % 32 or embedding < 1 or embedding % (num_mels // 2):
            raise ValueError(
                "TALNet halves the mel axis five times: num_mels must be a multiple of 32 and "
                f"embedding of num_mels / 2, got num_mels={num_mels}, embedding={embedding}"
            )
        blocks: list[nn.Module] = []
        channels, mels = 1, num_mels
        for pool in self.POOLS:
            mels //= 2
            width = embedding // mels
            blocks += [ConvBlock(channels, width, None), ConvBlock(width, width, pool)]
            channels = width
        self.blocks = nn.Sequential(*blocks)

    def flatten(self, x: Tensor) -> Tensor:
        """What ``blocks`` give, [B, C, T', F'] -> [B, T', C * F']."""
        return x.transpose(1, 2).flatten(2)

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, T, F] -> [B, T // 4, embedding]."""
        return self.flatten(self.blocks(one_channel_image(x)))


def sinusoids(length: int, width: int) -> Tensor:
    """[T, D]: sine in even columns, cosine in odd ones, wavelengths from 2 pi to 10000 * 2 pi."""
    position = torch.arange(length).unsqueeze(1)  # [T, 1]
    rate = torch.exp(torch.arange(0, width, 2) * (-math.log(10000.0) / width))
    table = torch.zeros(length, width)
    table[:, 0::2] = torch.sin(position * rate)
    table[:, 1::2] = torch.cos(position * rate)[:, : width // 2]
    return table


class SinusoidalPositions(nn.Module):
    """Adds fixed sine and cosine positions (Vaswani et al., 2017), for any number of frames."""

    def __init__(self, width: int, max_len: int) -> None:
        super().__init__()
        self.register_buffer("table", sinusoids(max_len, width), persistent=False)
        self.table: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, T, D] -> x + positions, same shape."""
        _, T, D = x.shape
        table = self.table if T <= len(self.table) else sinusoids(T, D).to(x.device)
        return x + table[:T]


class EncoderLayer(nn.Module):
    """Post-norm Transformer layer: multi-head self-attention, then a two-layer ReLU network.

    A head is ``floor(width / num_heads)`` wide, as in the authors' code. Dropout acts on the
    attention weights and on the outputs of both halves.
    """

    def __init__(self, width: int, hidden: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        if not 1 <= num_heads <= width:
            raise ValueError(f"num_heads must be in 1..{width}, got {num_heads}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        self.num_heads = num_heads
        self.dropout = dropout
        inner = width // num_heads * num_heads
        self.qkv = nn.Linear(width, 3 * inner)
        self.proj = nn.Linear(inner, width)
        self.norm1 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.norm2 = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, N, D] -> [B, N, D]."""
        B, N, _ = x.shape
        p = self.dropout if self.training else 0.0
        y = attention(self.qkv(x).view(B, N, 3, self.num_heads, -1), p)
        x = self.norm1(x + dropout(self.proj(y), p))
        y = self.fc2(F.relu(self.fc1(x)))
        out: Tensor = self.norm2(x + dropout(y, p))
        return out


def pool_frames(prob: Tensor, att: Tensor | None, pooling: str) -> Tensor:
    """Logits of the clip probabilities, pooled over time from the scores of the frames.

    All of it is computed in float32. torch.compile fuses it into one pass over the frames.

    Args:
        prob: [B, T, K] logits of the frame probabilities.
        att: [B, T, K] logits of the attention over time; only "att" and "sigatt" read it.
        pooling: "att" weights frames by softmax over time of ``att`` (Wang et al., 2019,
            https://arxiv.org/abs/1810.09050); "max", "ave"; "lin" weights a frame by its own
            probability, "exp" by the exponential of it (the same paper); "sigatt" weights frames
            by the sigmoid of ``att`` over its sum (Gong et al., PSLA, 2021,
            https://arxiv.org/abs/2102.01243, section III-D).

    Returns:
        [B, K] float32 logits. They are finite where the inputs are, since probabilities are
        clamped before and after pooling: float32 weights can sum to 1.0000007.
    """
    p = _clamped_sigmoid(prob)  # [B, T, K]
    match pooling:
        case "att":
            assert att is not None
            clip = (p * att.float().softmax(1)).sum(1)
        case "max":
            clip = p.amax(1)
        case "ave":
            clip = p.mean(1)
        case "lin":
            clip = (p * p).sum(1) / p.sum(1)
        case "exp":
            clip = (p * p.softmax(1)).sum(1)
        case "sigatt":
            assert att is not None
            weights = _clamped_sigmoid(att)
            clip = (p * weights).sum(1) / weights.sum(1)
        case _:
            raise ValueError(f"pooling must be one of {', '.join(POOLINGS)}, got {pooling!r}")
    return clip.clamp(PROB_EPS, 1 - PROB_EPS).logit()


def _clamped_sigmoid(x: Tensor) -> Tensor:
    return x.float().sigmoid().clamp(PROB_EPS, 1 - PROB_EPS)


class PoolingHead(nn.Module):
    """Frame embeddings [B, T, D] -> clip logits [B, K]; pooling in float32, also under autocast."""

    def __init__(self, width: int, num_classes: int, pooling: str) -> None:
        super().__init__()
        if pooling not in POOLINGS:
            raise ValueError(f"pooling must be one of {', '.join(POOLINGS)}, got {pooling!r}")
        self.pooling = pooling
        self.fc_prob = nn.Linear(width, num_classes)
        self.fc_att = nn.Linear(width, num_classes) if pooling in ("att", "sigatt") else None
        for fc in filter(None, (self.fc_prob, self.fc_att)):
            nn.init.xavier_uniform_(fc.weight)
            nn.init.zeros_(fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        prob = self.fc_prob(x)
        att = None if self.fc_att is None else self.fc_att(x)
        return pool_frames(prob, att, self.pooling)
