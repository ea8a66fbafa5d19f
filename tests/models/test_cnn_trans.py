"""CNN+Transformer: the paper's network written out, and how often its layer is applied."""

import pytest
import torch

from fastat.models import create_model
from fastat.models.cnn_trans import CnnTransformer
from fastat.models.layers import EncoderLayer
from tests.models.written_out import attention_head, encoder_layer, positions


def small(**options: object) -> CnnTransformer:
    sizes = {"num_mels": 64, "num_frames": 40, "num_classes": 5, "embedding": 64}
    model = create_model("cnn_trans", **(sizes | options))  # type: ignore[arg-type]
    assert isinstance(model, CnnTransformer)
    return model.eval()


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("num_layers", [1, 2, 4])
def test_equals_the_paper_written_out(num_layers: int, shared: bool) -> None:
    """All of it in torch's own layers: x * 8 + PE, convs, post-norm layers, attention pooling."""
    model = small(num_heads=4, num_layers=num_layers, shared=shared)
    assert model.input_scale == 8
    x = torch.randn(2, 40, 64)
    h = model.talnet(x * 8 + positions(40, 64))
    assert len(model.layers) == (1 if shared else num_layers)
    for i in range(num_layers):
        layer = model.layers[0 if shared else i]
        assert isinstance(layer, EncoderLayer)
        h = encoder_layer(layer)(h)
    torch.testing.assert_close(
        model(x).sigmoid(), attention_head(model.head, h), rtol=1e-4, atol=1e-6
    )


def test_input_scale_is_the_root_of_the_mels_or_an_option() -> None:
    assert small(num_mels=128).input_scale == 11
    model = small(num_mels=128, input_scale=8.0)
    assert model.input_scale == 8
    x = torch.randn(1, 40, 128)
    want = model.talnet(x * 8 + positions(40, 128))
    torch.testing.assert_close(model.talnet(model.positions(x * model.input_scale)), want)


@pytest.mark.parametrize(("num_heads", "inner"), [(4, 1024), (8, 1024), (12, 1020)])
def test_heads_are_rounded_down(num_heads: int, inner: int) -> None:
    """A head of twelve is floor(1024 / 12) = 85 wide."""
    with torch.device("meta"):
        model = small(embedding=1024, num_heads=num_heads)
    layer = model.layers[0]
    assert isinstance(layer, EncoderLayer)
    assert layer.qkv.weight.shape == (3 * inner, 1024)
    assert layer.proj.weight.shape == (1024, inner)
    assert model(torch.empty(2, 40, 64, device="meta")).shape == (2, 5)
