"""CNN+Transformer: size, shapes, layout, gradients, precision, and that it learns."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastat.errors import UserError
from fastat.models import create_model
from fastat.models.cnn_trans import CnnTransformer
from fastat.models.layers import POOLINGS, ConvBlock, EncoderLayer, TalNet, pool_frames


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("num_mels", "num_frames", "embedding", "want"),
    [(64, 400, 1024, 12_097_662), (128, 1024, 1024, 8_562_510), (128, 1024, 2048, 32_061_566)],
)
def test_parameter_counts_of_the_paper(
    num_mels: int, num_frames: int, embedding: int, want: int
) -> None:
    with torch.device("meta"):
        model = create_model(
            "cnn_trans",
            num_mels=num_mels,
            num_frames=num_frames,
            num_classes=527,
            embedding=embedding,
        )
    assert count(model) == want


@pytest.mark.parametrize(("layers", "shared", "want"), [(1, True, 1), (4, True, 1), (4, False, 4)])
def test_encoder_layers(layers: int, shared: bool, want: int) -> None:
    model = small(num_layers=layers, shared=shared)
    assert (model.num_layers, len(model.layers)) == (layers, want)


def small(**options: object) -> CnnTransformer:
    model = create_model(
        "cnn_trans", num_mels=64, num_frames=40, num_classes=5, **({"embedding": 64} | options)
    )
    assert isinstance(model, CnnTransformer)
    return model


@pytest.mark.parametrize("frames", [40, 41, 43, 100])
def test_logits_for_any_length(frames: int) -> None:
    assert small()(torch.randn(3, frames, 64)).shape == (3, 5)


def test_stack_flattens_channel_major() -> None:
    """Token t holds the channels' mel bins one channel after the other: [C, F] flattened."""
    stack = TalNet(64, 16, 64).eval()
    x = torch.randn(2, 24, 64)
    y = x.unsqueeze(1)
    for block in stack.blocks:
        y = block(y)  # [B, C, T', F']
    want = torch.stack([y[:, :, t].flatten(1) for t in range(y.shape[2])], 1)
    torch.testing.assert_close(stack(x), want)
    assert y.shape == (2, 32, 6, 2)


def test_every_map_of_the_stack_is_channels_last() -> None:
    """One copy to the other layout anywhere costs more than the layer it is in."""
    stack = TalNet(64, 16, 64).to(memory_format=torch.channels_last)
    layouts = []
    for block in stack.blocks:
        block.register_forward_hook(
            lambda _m, _i, out: layouts.append(out.is_contiguous(memory_format=torch.channels_last))
        )
    stack(torch.randn(2, 16, 64))
    assert layouts == [True] * 10


def test_pool_before_relu_equals_relu_before_pool() -> None:
    stack = TalNet(64, 16, 64)
    x = torch.randn(2, 16, 64)
    want = x.unsqueeze(1)
    for block in stack.blocks:
        assert isinstance(block, ConvBlock)
        want = F.relu(block.bn(block.conv(want)))
        if block.pool is not None:
            want = F.max_pool2d(want, block.pool)
    want = want.transpose(1, 2).flatten(2)
    torch.testing.assert_close(stack(x), want, rtol=1e-4, atol=1e-4)


def test_equals_the_paper_written_out() -> None:
    """All of it in torch's own layers: x * 8 + PE, convs, the shared post-norm layer twice."""
    model = small(num_heads=4).eval()
    assert model.input_scale == 8
    x = torch.randn(2, 40, 64)
    position = torch.arange(40.0)[:, None] / 10000 ** (torch.arange(0, 64, 2) / 64)
    pe = torch.stack([position.sin(), position.cos()], -1).flatten(1)
    h = model.talnet(x * 8 + pe)

    layer = model.layers[0]
    assert isinstance(layer, EncoderLayer)
    peer = nn.TransformerEncoderLayer(64, 4, 64, 0.0, batch_first=True).eval()
    peer.self_attn.load_state_dict(
        {
            "in_proj_weight": layer.qkv.weight,
            "in_proj_bias": layer.qkv.bias,
            "out_proj.weight": layer.proj.weight,
            "out_proj.bias": layer.proj.bias,
        }
    )
    pairs = (
        (peer.linear1, layer.fc1),
        (peer.linear2, layer.fc2),
        (peer.norm1, layer.norm1),
        (peer.norm2, layer.norm2),
    )
    for theirs, ours in pairs:
        theirs.load_state_dict(ours.state_dict())
    for _ in range(2):
        h = peer(h)
    assert model.head.fc_att is not None
    prob = torch.sigmoid(model.head.fc_prob(h)).clamp(1e-7, 1 - 1e-7)
    clip = (prob * model.head.fc_att(h).softmax(1)).sum(1)
    torch.testing.assert_close(model(x).sigmoid(), clip, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_pooling_is_finite_and_between_its_frames(pooling: str) -> None:
    prob, att = 60 * torch.randn(2, 3, 7, 11)  # saturates
    att = att if pooling in ("att", "sigatt") else None
    logit = pool_frames(prob, att, pooling)
    assert torch.isfinite(logit).all()
    p = prob.sigmoid()
    clip = logit.sigmoid()
    assert (clip <= p.amax(1) + 1e-6).all()
    assert (clip >= p.amin(1) - 1e-6).all()


@pytest.mark.parametrize("pooling", POOLINGS)
def test_pooling_against_its_definition(pooling: str) -> None:
    prob, att = torch.randn(2, 2, 9, 4, dtype=torch.float64)
    p = 1 / (1 + (-prob).exp())
    weights = {
        "att": att.exp(),
        "max": (p == p.amax(1, keepdim=True)).double(),
        "ave": torch.ones_like(p),
        "lin": p,
        "exp": p.exp(),
        "sigatt": 1 / (1 + (-att).exp()),
    }[pooling]
    want = (weights * p).sum(1) / weights.sum(1)
    torch.testing.assert_close(pool_frames(prob, att, pooling).sigmoid().double(), want)


def test_gradients_reach_every_parameter() -> None:
    model = small()
    model(torch.randn(2, 40, 64)).sum().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and torch.isfinite(p.grad).all(), name
        # BatchNorm subtracts the mean, so the bias before it has no gradient but rounding
        assert name.endswith("conv.bias") or p.grad.abs().max() > 0, name


def test_head_stays_in_float32_under_autocast() -> None:
    model = small().eval()
    x = torch.randn(2, 40, 64)
    seen: list[torch.dtype] = []
    model.head.fc_prob.register_forward_hook(lambda _m, _i, out: seen.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(x)
    assert seen == [torch.bfloat16] and logits.dtype == torch.float32
    torch.testing.assert_close(logits, model(x), rtol=0.05, atol=0.05)


def test_dropout_only_in_training() -> None:
    model = small(dropout=0.75)
    x = torch.randn(2, 40, 64)
    model.eval()
    assert torch.equal(model(x), model(x))
    model.train()
    assert not torch.equal(model(x), model(x))


def test_overfits_eight_clips() -> None:
    torch.manual_seed(0)
    model = small(embedding=128, num_heads=4)
    x, y = torch.randn(8, 40, 64), (torch.rand(8, 5) < 0.4).float()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(80):
        loss: Tensor = F.binary_cross_entropy_with_logits(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.02


def test_compiles_without_a_break() -> None:
    model = small(dropout=0.5)
    x = torch.randn(2, 40, 64)
    explained = torch._dynamo.explain(model)(x)
    assert explained.graph_break_count == 0, explained.break_reasons


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"embeding": 64}, "did you mean 'embedding'"),
        ({"embedding": 100}, "embedding"),
        ({"embedding": 0}, "embedding"),
        ({"dropout": 1}, "dropout must be in"),
        ({"dropout": "half"}, "dropout|supported"),
        ({"input_scale": float("nan")}, "input_scale"),
        ({"num_heads": 0}, "num_heads"),
        ({"num_heads": "many"}, "num_heads|supported"),
        ({"pooling": "median"}, "pooling must be one of"),
        ({"num_layers": 0}, "num_layers"),
        ({"num_mels": 40}, "multiple of 32"),
        ({"num_frames": 2}, "num_frames must be >= 4"),
    ],
)
def test_rejects_impossible_options(options: dict[str, object], message: str) -> None:
    sizes = {"num_mels": 64, "num_frames": 40, "num_classes": 5}
    with pytest.raises(UserError, match=message):
        create_model("cnn_trans", **(sizes | options))  # type: ignore[arg-type]


def test_unknown_model_names_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'cnn_trans'"):
        create_model("cnn_tran", num_mels=64, num_frames=40, num_classes=5)
