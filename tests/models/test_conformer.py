"""Conformer: the network written out in torch's own layers, and the paper's sizes."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastat.models import create_model
from fastat.models.conformer import Conformer, ConformerBlock
from tests.models.written_out import copy_attention


def small(**options: object) -> Conformer:
    sizes = {"num_mels": 64, "num_frames": 40, "num_classes": 5}
    model = create_model("conformer", **(sizes | options))  # type: ignore[arg-type]
    assert isinstance(model, Conformer)
    return model.eval()


class PlainBlock(nn.Module):
    """Half-FFN, convolution, attention, half-FFN, each behind its LayerNorm; LayerNorm."""

    def __init__(self, width: int, hidden: int, num_heads: int, kernel: int) -> None:
        super().__init__()
        self.ffn1, self.ffn2 = (
            nn.Sequential(
                nn.LayerNorm(width),
                nn.Linear(width, hidden),
                nn.SiLU(),
                nn.Linear(hidden, width),
            )
            for _ in range(2)
        )
        self.conv_norm = nn.LayerNorm(width)
        self.conv = nn.Sequential(
            nn.Conv1d(width, 2 * width, 1),
            nn.GLU(1),
            nn.Conv1d(width, width, kernel, padding="same", groups=width),
            nn.GroupNorm(1, width),
            nn.SiLU(),
            nn.Conv1d(width, width, 1),
        )
        self.attn_norm = nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, num_heads, batch_first=True)
        self.norm = nn.LayerNorm(width)

    def copy_from(self, ours: ConformerBlock) -> None:
        for theirs, ffn in ((self.ffn1, ours.ffn1), (self.ffn2, ours.ffn2)):
            for i, layer in ((0, ffn.norm), (1, ffn.fc1), (3, ffn.fc2)):
                theirs[i].load_state_dict(layer.state_dict())
        pointwise = ((0, ours.conv.pointwise1), (5, ours.conv.pointwise2))
        for i, linear in pointwise:
            weight = linear.weight.unsqueeze(-1)
            self.conv[i].load_state_dict({"weight": weight, "bias": linear.bias})
        self.conv[2].load_state_dict(ours.conv.depthwise.state_dict())
        self.conv[3].load_state_dict(ours.conv.group_norm.state_dict())
        self.conv_norm.load_state_dict(ours.conv.norm.state_dict())
        self.attn_norm.load_state_dict(ours.attn.norm.state_dict())
        copy_attention(self.attn, ours.attn.qkv, ours.attn.proj)
        self.norm.load_state_dict(ours.norm.state_dict())

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ffn1(x) / 2
        x = x + self.conv(self.conv_norm(x).mT).mT
        y = self.attn_norm(x)
        x = x + self.attn(y, y, y)[0]
        out: Tensor = self.norm(x + self.ffn2(x) / 2)
        return out


def test_equals_the_paper_written_out() -> None:
    """Four frames stacked, blocks of kernel 31 and 15, the mean over time."""
    model = small(num_layers=3, num_heads=4, width=32, hidden=48)
    for p in model.parameters():  # norms and biases that are not 1 and 0
        nn.init.normal_(p, 1.0 if p.ndim == 1 else 0.0, 0.2)
    x = torch.randn(2, 43, 64)
    h = torch.stack([x[:, t : t + 4].flatten(1) for t in range(0, 40, 4)], 1)
    first, norm, second = model.stem
    assert isinstance(norm, nn.LayerNorm)
    h = second(F.layer_norm(first(h), (256,), norm.weight, norm.bias))
    for block, kernel in zip(model.layers, (31, 15, 15), strict=True):
        assert isinstance(block, ConformerBlock)
        plain = PlainBlock(32, 48, 4, kernel)
        plain.copy_from(block)
        h = plain(h)
    torch.testing.assert_close(model(x), model.head(h.mean(1)), rtol=1e-4, atol=1e-5)


def test_the_paper_sizes() -> None:
    with torch.device("meta"):
        model = small()
    kernels = []
    for block in model.layers:
        assert isinstance(block, ConformerBlock)
        kernels.append(block.conv.depthwise.kernel_size[0])
        assert (block.attn.num_heads, block.ffn1.fc1.out_features) == (12, 1024)
        assert block.conv.pointwise1.out_features == 1536
    assert kernels == [31] + 11 * [15]
    assert model.embedding_size == 768
