"""What models share: the TALNet stack, sinusoidal positions, pooling over frames."""

import pytest
import torch
import torch.nn.functional as F

from fastat.models.layers import (
    POOLINGS,
    ConvBlock,
    PoolingHead,
    SinusoidalPositions,
    TalNet,
    pool_frames,
)
from tests.models.written_out import positions


# ----------------------------------------------------------------------------------------- TALNet
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


def test_channels_of_the_paper() -> None:
    with torch.device("meta"):
        stack = TalNet(64, 400, 1024)
    blocks = [block for block in stack.blocks if isinstance(block, ConvBlock)]
    channels = [block.conv.out_channels for block in blocks]
    assert channels == [32, 32, 64, 64, 128, 128, 256, 256, 512, 512]
    pools = [block.pool for block in blocks]
    assert pools[1::2] == [(2, 2), (2, 2), (1, 2), (1, 2), (1, 2)]
    assert pools[::2] == [None] * 5


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


# -------------------------------------------------------------------------------------- positions
@pytest.mark.parametrize("width", [64, 128, 768])
def test_positions_are_sines_and_cosines(width: int) -> None:
    x = torch.randn(2, 400, width)
    want = x + positions(400, width)
    torch.testing.assert_close(SinusoidalPositions(width, 500)(x), want, rtol=0, atol=1e-4)


def test_positions_go_on_beyond_the_table() -> None:
    positions = SinusoidalPositions(6, 10)
    x = torch.zeros(1, 25, 6)
    torch.testing.assert_close(positions(x), SinusoidalPositions(6, 25)(x))


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


def test_frames_that_no_one_attends_to_count_alike() -> None:
    """Sigmoids of -60 are clamped to 1e-7 each: their mean, not 0 / 0."""
    prob = torch.randn(2, 9, 4)
    pooled = pool_frames(prob, torch.full_like(prob, -60), "sigatt")
    torch.testing.assert_close(pooled.sigmoid(), prob.sigmoid().mean(1))


@pytest.mark.parametrize("pooling", POOLINGS)
def test_head_pools_in_float32_under_autocast(pooling: str) -> None:
    head = PoolingHead(16, 5, pooling)
    x = torch.randn(3, 7, 16)
    with torch.autocast("cpu", torch.bfloat16):
        prob = head.fc_prob(x)
        att = None if head.fc_att is None else head.fc_att(x)
        logits = head(x)
    assert prob.dtype == torch.bfloat16 and logits.dtype == torch.float32
    want = pool_frames(prob.float(), None if att is None else att.float(), pooling)
    torch.testing.assert_close(logits, want)
