"""Parts of the models in torch's own layers, for the tests to compare with."""

import torch
from torch import Tensor, nn

from fastat.models.layers import EncoderLayer, PoolingHead


def positions(num_frames: int, width: int) -> Tensor:
    """[T, D]: sines in the even columns, cosines in the odd ones."""
    angle = torch.arange(num_frames)[:, None] / 10000 ** (torch.arange(0, width, 2) / width)
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(1)


def encoder_layer(layer: EncoderLayer) -> nn.TransformerEncoderLayer:
    """torch's post-norm layer with the weights of ours."""
    width, hidden = layer.fc1.in_features, layer.fc1.out_features
    peer = nn.TransformerEncoderLayer(width, layer.num_heads, hidden, 0.0, batch_first=True)
    copy_attention(peer.self_attn, layer.qkv, layer.proj)
    pairs = (
        (peer.linear1, layer.fc1),
        (peer.linear2, layer.fc2),
        (peer.norm1, layer.norm1),
        (peer.norm2, layer.norm2),
    )
    for theirs, ours in pairs:
        theirs.load_state_dict(ours.state_dict())
    return peer.eval()


def copy_attention(theirs: nn.MultiheadAttention, qkv: nn.Linear, proj: nn.Linear) -> None:
    """Packed projections into torch's attention, which packs them in the same order."""
    theirs.load_state_dict(
        {
            "in_proj_weight": qkv.weight,
            "in_proj_bias": qkv.bias,
            "out_proj.weight": proj.weight,
            "out_proj.bias": proj.bias,
        }
    )


def attention_head(head: PoolingHead, frames: Tensor) -> Tensor:
    """[B, N, E] -> [B, K] probabilities: frames weighted by softmax over time."""
    assert head.fc_att is not None
    prob = head.fc_prob(frames).sigmoid().clamp(1e-7, 1 - 1e-7)
    clip: Tensor = (prob * head.fc_att(frames).softmax(1)).sum(1)
    return clip
