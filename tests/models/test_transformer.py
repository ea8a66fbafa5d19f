"""Transformer: the network written out, at the paper's depths and heads."""

import pytest
import torch

from fastat.models import create_model
from fastat.models.layers import EncoderLayer
from fastat.models.transformer import Transformer
from tests.models.written_out import attention_head, encoder_layer, positions


def small(**options: object) -> Transformer:
    sizes = {"num_mels": 64, "num_frames": 40, "num_classes": 5, "width": 96}
    model = create_model("transformer", **(sizes | options))  # type: ignore[arg-type]
    assert isinstance(model, Transformer)
    return model.eval()


@pytest.mark.parametrize("frames", [40, 43])
@pytest.mark.parametrize(("num_layers", "num_heads"), [(2, 4), (8, 8), (12, 12)])
def test_equals_the_paper_written_out(num_layers: int, num_heads: int, frames: int) -> None:
    """Linear, LayerNorm, x * round(sqrt(d)) + PE, post-norm layers, maximum of 4 frames."""
    model = small(num_layers=num_layers, num_heads=num_heads)
    x = torch.randn(2, frames, 64)
    h = model.proj_norm(model.proj(x)) * 10 + positions(frames, 96)
    assert len(model.layers) == num_layers
    for layer in model.layers:
        assert isinstance(layer, EncoderLayer)
        h = encoder_layer(layer)(h)
    h = torch.stack([h[:, i : i + 4].amax(1) for i in range(0, 40, 4)], 1)
    torch.testing.assert_close(model(x).sigmoid(), attention_head(model.head, h))


def test_the_paper_sizes() -> None:
    with torch.device("meta"):
        model = small(width=768)
    assert model.scale == 28
    assert (len(model.layers), model.embedding_size) == (8, 768)
    trunk = sum(p.numel() for n, p in model.named_parameters() if not n.startswith("head."))
    assert trunk == 28_424_448
    for layer in model.layers:
        assert isinstance(layer, EncoderLayer)
        assert (layer.num_heads, layer.fc1.out_features) == (8, 768)
