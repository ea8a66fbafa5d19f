"""The originals that foreign checkpoints come from, in plain torch with exactly their names.

Written from the description of their arithmetic, independently of fastat's models.
"""

import math
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
import torchvision  # type: ignore[import-untyped]
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


def randomise(module: M) -> M:
    """Every parameter and every BatchNorm statistic away from its usual start; evaluation mode."""
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(0, 0.2 if p.ndim < 2 else 1.5 / math.sqrt(p[0].numel()))
        for m in module.modules():
            if isinstance(m, nn.LayerNorm | nn.BatchNorm2d):
                m.weight.uniform_(0.3, 0.6)
            if isinstance(m, nn.BatchNorm2d):
                cast(Tensor, m.running_mean).normal_(0, 0.3)
                cast(Tensor, m.running_var).uniform_(0.5, 1.5)
                cast(Tensor, m.num_batches_tracked).fill_(1234)
    return module.eval()


# --------------------------------------------------------------------- TALNet, TransformerEncoder
class ConvBlock(nn.Module):
    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.bn = nn.BatchNorm2d(channels_out)


class TalNetModel(nn.Module):
    """Ten convolutions, registered in a list and again as conv1 .. conv10, and attention."""

    conv: Any

    def __init__(self, mels: int, embedding: int, classes: int) -> None:
        super().__init__()
        self.conv = nn.ModuleList()
        channels = 1
        for i in range(10):
            width = embedding * 2 ** (i // 2 + 1) // mels
            block = ConvBlock(channels, width)
            self.conv.append(block)
            setattr(self, f"conv{i + 1}", block)
            channels = width
        self.fc_prob = nn.Linear(embedding, classes)
        self.fc_att = nn.Linear(embedding, classes)

    def convolve(self, x: Tensor) -> Tensor:
        """[B, T, F] -> [B, T / 4, C * F']."""
        x = x[:, None]
        for i, block in enumerate(self.conv):
            x = torch.relu(block.bn(block.conv(x)))
            if i % 2:
                x = F.max_pool2d(x, (2, 2) if i < 4 else (1, 2))
        B, C, T, M = x.shape
        return x.permute(0, 2, 1, 3).reshape(B, T, C * M)

    def pool(self, x: Tensor) -> Tensor:
        prob = torch.sigmoid(self.fc_prob(x)).clamp(1e-7, 1 - 1e-7)
        weights = torch.softmax(self.fc_att(x), 1)
        return (prob * weights).sum(1).clamp(1e-7, 1 - 1e-7)


class Crnn(TalNetModel):
    def __init__(self, mels: int, embedding: int, classes: int) -> None:
        super().__init__(mels, embedding, classes)
        self.gru = nn.GRU(embedding, embedding // 2, 1, batch_first=True, bidirectional=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.gru(self.convolve(x))[0])


class SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.d_k = heads, width // heads
        self.w_qs = nn.Linear(width, heads * self.d_k)
        self.w_ks = nn.Linear(width, heads * self.d_k)
        self.w_vs = nn.Linear(width, heads * self.d_k)
        self.fc = nn.Linear(heads * self.d_k, width)
        self.layer_norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            w(x).unflatten(-1, (self.heads, self.d_k)).transpose(1, 2)
            for w in (self.w_qs, self.w_ks, self.w_vs)
        )
        weights = torch.softmax(q @ k.transpose(2, 3) / math.sqrt(self.d_k), -1)
        out = self.fc((weights @ v).transpose(1, 2).flatten(2))
        return cast(Tensor, self.layer_norm(out + x))


class FeedForward(nn.Module):
    def __init__(self, width: int, *, convolutions: bool) -> None:
        super().__init__()
        self.convolutions = convolutions
        self.w_1, self.w_2 = (
            nn.Conv1d(width, width, 1) if convolutions else nn.Linear(width, width)
            for _ in range(2)
        )
        self.layer_norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        if self.convolutions:
            out = self.w_2(torch.relu(self.w_1(x.mT))).mT
        else:
            out = self.w_2(torch.relu(self.w_1(x)))
        return cast(Tensor, self.layer_norm(out + x))


class EncoderLayer(nn.Module):
    def __init__(self, width: int, heads: int, *, convolutions: bool) -> None:
        super().__init__()
        self.slf_attn = SelfAttention(width, heads)
        self.pos_ffn = FeedForward(width, convolutions=convolutions)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.pos_ffn(self.slf_attn(x)))


class Positions(nn.Module):
    pe: Tensor

    def __init__(self, width: int, length: int = 2000) -> None:
        super().__init__()
        pe = torch.empty(1, length, width, dtype=torch.float64)
        for i in range(0, width, 2):
            angle = torch.arange(length, dtype=torch.float64) / 10000 ** (i / width)
            pe[0, :, i], pe[0, :, i + 1] = angle.sin(), angle.cos()
        self.register_buffer("pe", pe.float())


class TransformerEncoder(TalNetModel):
    """x * 8 + positions, the convolutions, one shared layer twice."""

    def __init__(
        self, mels: int, embedding: int, classes: int, *, heads: int = 8, convolutions: bool = False
    ) -> None:
        super().__init__(mels, embedding, classes)
        self.positional_encoding = Positions(mels)
        self.enc_layer = EncoderLayer(embedding, heads, convolutions=convolutions)

    def forward(self, x: Tensor) -> Tensor:
        x = x * 8 + self.positional_encoding.pe[:, : x.shape[1]]
        x = self.convolve(x)
        return self.pool(self.enc_layer(self.enc_layer(x)))


# ------------------------------------------------------------------------------- ResNetAttention
class Attention(nn.Module):
    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.att = nn.Conv2d(width, classes, 1)
        self.cla = nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, T, 1] -> [B, K]."""
        att = torch.sigmoid(self.att(x))[..., 0].clamp(1e-7, 1 - 1e-7)
        cla = torch.sigmoid(self.cla(x))[..., 0]
        return (att / att.sum(2, keepdim=True) * cla).sum(2)


class ResNetAttention(nn.Module):
    """torchvision's ResNet up to its last map, the mean over mel bins, attention over time."""

    model: Any

    def __init__(self, name: str, classes: int, *, channels: int = 1) -> None:
        super().__init__()
        self.model = getattr(torchvision.models, name)()
        width = self.model.fc.in_features
        self.model.conv1 = nn.Conv2d(channels, 64, 7, stride=2, padding=3, bias=False)
        self.attention = Attention(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        m = self.model
        x = x.mT[:, None].expand(-1, m.conv1.in_channels, -1, -1)  # [B, C, F, T]
        x = m.maxpool(torch.relu(m.bn1(m.conv1(x))))
        x = m.layer4(m.layer3(m.layer2(m.layer1(x))))
        return cast(Tensor, self.attention(x.mean(2)[..., None]))


# ---------------------------------------------------------------------------------------- AST
class VitAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        B, N, D = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        weights = torch.softmax(q @ k.transpose(2, 3) * (D // self.heads) ** -0.5, -1)
        return cast(Tensor, self.proj((weights @ v).transpose(1, 2).reshape(B, N, D)))


class VitMlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.fc2(F.gelu(self.fc1(x))))


class VitBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = VitAttention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = VitMlp(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return cast(Tensor, x + self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    def __init__(self, width: int, stride: int, channels: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, 16, stride=stride)


class Vit(nn.Module):
    """DeiT's distilled vision Transformer, with both ImageNet heads."""

    def __init__(self, width: int, layers: int, tokens: int, stride: int, channels: int) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(width, stride, channels)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.dist_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, width))
        self.blocks = nn.Sequential(*(VitBlock(width, width // 64) for _ in range(layers)))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, 1000)
        self.head_dist = nn.Linear(width, 1000)


class AstModel(nn.Module):
    def __init__(self, mels: int, frames: int, stride: int, classes: int, layers: int = 2) -> None:
        super().__init__()
        grid = ((mels - 16) // stride + 1) * ((frames - 16) // stride + 1)
        self.v = Vit(192, layers, grid + 2, stride, 1)
        self.mlp_head = nn.Sequential(nn.LayerNorm(192), nn.Linear(192, classes))

    def forward(self, x: Tensor) -> Tensor:
        v = self.v
        x = v.patch_embed.proj(x[:, None].transpose(2, 3)).flatten(2).transpose(1, 2)
        special = torch.cat([v.cls_token, v.dist_token], 1).expand(len(x), -1, -1)
        x = v.norm(v.blocks(torch.cat([special, x], 1) + v.pos_embed))
        return torch.sigmoid(self.mlp_head((x[:, 0] + x[:, 1]) / 2))
