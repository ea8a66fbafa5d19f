"""AST: a plain ViT written out, the paper's patch counts, positions of another grid."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastat.models import create_model
from fastat.models.ast import Ast, adapt_positions
from tests.models.written_out import copy_attention

STRIDES = (4, 6, 8, 10, 12, 16)
PATCHES = {
    (128, 1024): [(29, 253), (19, 169), (15, 127), (12, 101), (10, 85), (8, 64)],
    (64, 400): [(13, 97), (9, 65), (7, 49), (5, 39), (5, 33), (4, 25)],
}
"""Patches along both axes at each stride: Table 3, with its eight mistaken counts put right."""


def small(**options: object) -> Ast:
    sizes = {"num_mels": 64, "num_frames": 100, "num_classes": 5}
    trunk = {"size": "tiny224", "num_layers": 2}
    model = create_model("ast", **(sizes | trunk | options))  # type: ignore[arg-type]
    assert isinstance(model, Ast)
    return model.eval()


# ------------------------------------------------------------------------------------------ grid
@pytest.mark.parametrize(("frames", "mels"), [(15, 64), (100, 15), (0, 64)])
def test_an_input_smaller_than_a_patch_is_told(frames: int, mels: int) -> None:
    with pytest.raises(ValueError, match=f"patch is 16 x 16.* {mels} mels x {frames} frames"):
        small(num_layers=1)(torch.zeros(1, frames, mels))


@pytest.mark.parametrize(("num_mels", "num_frames"), PATCHES)
def test_true_patch_counts_of_table_3(num_mels: int, num_frames: int) -> None:
    for stride, grid in zip(STRIDES, PATCHES[num_mels, num_frames], strict=True):
        with torch.device("meta"):
            model = small(num_mels=num_mels, num_frames=num_frames, fstride=stride, tstride=stride)
        assert model.grid == grid
        assert model.pos_embed.shape == (1, 2 + grid[0] * grid[1], 192)


@pytest.mark.parametrize("fstride", range(4, 17))
def test_strides_of_either_axis_apart(fstride: int) -> None:
    tstride = 20 - fstride
    with torch.device("meta"):
        model = small(fstride=fstride, tstride=tstride, num_layers=1)
    rows, columns = (len(range(0, n - 15, s)) for n, s in ((64, fstride), (100, tstride)))
    assert model.grid == (rows, columns)
    image = torch.empty(1, 1, 64, 100, device="meta")
    assert model.patch_embed(image).shape == (1, 192, rows, columns)
    assert model(torch.empty(2, 100, 64, device="meta")).shape == (2, 5)


# --------------------------------------------------------------------------------- the whole model
def plain_vit(model: Ast, x: Tensor, heads: int) -> Tensor:
    """[B, T, F] -> [B, K] logits: patches cut by hand, torch's pre-norm encoder layers."""
    (rows, columns), (f, t), width = model.grid, model.strides, model.embedding_size
    patches = [
        x[:, j * t : j * t + 16, i * f : i * f + 16].mT.flatten(1)  # mel bins x frames
        for i in range(rows)
        for j in range(columns)
    ]
    weight = model.patch_embed.weight.flatten(1)
    h = F.linear(torch.stack(patches, 1), weight, model.patch_embed.bias)
    special = [token.expand(len(x), 1, -1) for token in (model.cls_token, model.dist_token)]
    h = torch.cat([*special, h], 1) + model.pos_embed
    for block in model.layers:
        ours = dict(block.named_modules())
        peer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, 0.0, F.gelu, 1e-6, batch_first=True, norm_first=True
        ).eval()
        qkv, proj = ours["attn.qkv"], ours["attn.proj"]
        assert isinstance(qkv, nn.Linear) and isinstance(proj, nn.Linear)
        copy_attention(peer.self_attn, qkv, proj)
        peer.norm1.load_state_dict(ours["norm1"].state_dict())
        peer.norm2.load_state_dict(ours["norm2"].state_dict())
        peer.linear1.load_state_dict(ours["mlp.fc1"].state_dict())
        peer.linear2.load_state_dict(ours["mlp.fc2"].state_dict())
        h = peer(h)
    norm = model.norm
    h = F.layer_norm(h, (width,), norm.weight, norm.bias, 1e-6)  # type: ignore[arg-type]
    clip = (h[:, 0] + h[:, 1]) / 2
    clip = F.layer_norm(clip, (width,), model.head_norm.weight, model.head_norm.bias)
    return F.linear(clip, model.head.weight, model.head.bias)  # type: ignore[arg-type]


@pytest.mark.parametrize(("fstride", "tstride"), [(10, 10), (8, 13)])
def test_equals_a_plain_vit(fstride: int, tstride: int) -> None:
    model = small(fstride=fstride, tstride=tstride)
    for p in model.parameters():  # tokens and biases that are not 0, norms that are not 1
        nn.init.normal_(p, 1.0 if p.ndim == 1 else 0.0, 0.1)
    x = torch.randn(2, 100, 64)
    torch.testing.assert_close(model(x), plain_vit(model, x, heads=3), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("norm_eps", [0.01, 0, None])
def test_norm_eps_is_every_layer_norms(norm_eps: float | None) -> None:
    model = small(norm_eps=norm_eps)
    norms = {name: m.eps for name, m in model.named_modules() if isinstance(m, nn.LayerNorm)}
    assert len(norms) == 6
    head = 1e-5 if norm_eps is None else norm_eps
    assert norms.pop("head_norm") == head
    assert set(norms.values()) == {1e-6 if norm_eps is None else norm_eps}
    one, other = small(norm_eps=norm_eps), small(norm_eps=0.5)
    other.load_state_dict(one.state_dict())
    x = torch.randn(2, 100, 64)
    assert (one(x) - other(x)).abs().max() > 1e-3


@pytest.mark.parametrize("norm_eps", [-1e-6, math.nan, math.inf])
def test_norm_eps_has_to_be_finite(norm_eps: float) -> None:
    with pytest.raises(ValueError, match="norm_eps must be finite and >= 0"):
        small(norm_eps=norm_eps)


def test_holds_only_what_it_uses() -> None:
    """DeiT's two ImageNet classifiers and its own patch projection are not in the model."""
    parts = {key.split(".")[0] for key in small().state_dict()}
    tokens = {"cls_token", "dist_token", "pos_embed"}
    assert parts == tokens | {"patch_embed", "layers", "norm", "head_norm", "head"}


# -------------------------------------------------------------------------------------- positions
def numbered(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Positions [1, 2 + f * t, 2] that hold their own row and column, and the special tokens."""
    grid = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).float()
    special = torch.tensor([[-1.0, -2.0], [-3.0, -4.0]])
    return torch.cat([special, grid])[None], special


def linear(old: int, new: int) -> Tensor:
    """Where each of ``new`` cells lies among ``old`` ones: bilinear along one axis, edges held."""
    return torch.from_numpy(((np.arange(new) + 0.5) * old / new - 0.5).clip(0, old - 1)).float()


@pytest.mark.parametrize(
    ("old", "new", "rows", "columns"),
    [
        ((24, 24), (24, 24), torch.arange(24.0), torch.arange(24.0)),
        ((24, 24), (12, 23), torch.arange(6.0, 18), torch.arange(1.0, 24)),
        ((24, 24), (5, 7), torch.arange(10.0, 15), torch.arange(9.0, 16)),
        ((25, 25), (4, 5), torch.arange(10.0, 14), torch.arange(10.0, 15)),
        ((24, 24), (30, 101), linear(24, 30), linear(24, 101)),
        ((24, 24), (12, 101), torch.arange(6.0, 18), linear(24, 101)),
        ((24, 24), (5, 39), torch.arange(10.0, 15), linear(24, 39)),
        ((24, 24), (24, 49), torch.arange(24.0), linear(24, 49)),
        ((5, 39), (12, 20), linear(5, 12), torch.arange(9.0, 29)),
    ],
)
def test_positions_of_another_grid(
    old: tuple[int, int], new: tuple[int, int], rows: Tensor, columns: Tensor
) -> None:
    """An axis that gets no longer is cut from the middle, a longer one interpolated."""
    pos, special = numbered(*old)
    got = adapt_positions(pos, old, new)
    assert torch.equal(got[0, :2], special)
    torch.testing.assert_close(got[0, 2:], torch.cartesian_prod(rows, columns))


@pytest.mark.parametrize("frames", [60, 99, 100, 160])
def test_another_length_takes_adapted_positions(frames: int) -> None:
    model = small()
    there = small(num_frames=frames)
    weights = model.state_dict()
    weights["pos_embed"] = adapt_positions(model.pos_embed.detach(), model.grid, there.grid)
    there.load_state_dict(weights)
    x = torch.randn(2, frames, 64)
    torch.testing.assert_close(model(x), there(x))
