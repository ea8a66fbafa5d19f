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


@pytest.mark.parametrize("pooling", ["att", "sigatt"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(2, 1, 65), (3, 33, 7), (1, 17, 527)], ids=str)
def test_attention_pooling_and_its_gradients_against_float64(
    shape: tuple[int, int, int], dtype: torch.dtype, pooling: str
) -> None:
    """The inputs may be strided and of half precision; everything inside is float32."""
    B, T, K = shape
    wider = torch.randn(B, T, 2 * K).to(dtype)
    prob = wider[..., :K].detach().requires_grad_()
    att = torch.randn(B, K, T).to(dtype).transpose(1, 2).detach().requires_grad_()
    dout = torch.randn(B, K)
    logit = pool_frames(prob, att, pooling)
    got = torch.autograd.grad(logit, (prob, att), dout)

    exact = prob.detach().double().requires_grad_(), att.detach().double().requires_grad_()
    weights = exact[1].exp() if pooling == "att" else 1 / (1 + (-exact[1]).exp())
    clip = (weights / (1 + (-exact[0]).exp())).sum(1) / weights.sum(1)
    want_logit = (clip / (1 - clip)).log()
    want = torch.autograd.grad(want_logit, exact, dout.double())
    assert logit.dtype == torch.float32 and got[0].dtype == got[1].dtype == dtype
    torch.testing.assert_close(logit.double(), want_logit, rtol=1e-5, atol=1e-5)
    # A gradient is rounded once, to the dtype of its input.
    rtol = 1e-4 + torch.finfo(dtype).eps
    for ours, exactly in zip(got, want, strict=True):
        torch.testing.assert_close(ours.double(), exactly, rtol=rtol, atol=1e-5)


@pytest.mark.parametrize("pooling", ["att", "sigatt"])
def test_certain_frames_stay_finite_and_pass_no_gradient(pooling: str) -> None:
    """Probabilities of 0 and 1 lie beyond the clamps, and all weight lies on one frame."""
    prob = torch.tensor([[-90.0, 90.0, 0.0, 20.0]]).repeat(5, 1)[None].requires_grad_()
    att = torch.linspace(-300, 300, 5)[None, :, None].repeat(1, 1, 4).requires_grad_()
    logit = pool_frames(prob, att, pooling)
    dprob, datt = torch.autograd.grad(logit.sum(), (prob, att))
    assert logit.abs().max() < 17
    assert torch.isfinite(dprob).all() and torch.isfinite(datt).all()
    assert not dprob[..., :2].any() and not dprob[..., 3].any()
    assert dprob[..., 2].any()


@pytest.mark.parametrize("pooling", ["att", "sigatt"])
@pytest.mark.parametrize("which", ["prob", "att"])
def test_not_a_number_is_not_clamped_away(which: str, pooling: str) -> None:
    """A run that diverges has to show."""
    prob, att = torch.zeros(2, 2, 5, 4)
    (prob if which == "prob" else att)[1, 3, 2] = float("nan")
    logit = pool_frames(prob, att, pooling)
    assert logit.isnan().flatten().tolist() == [i == 6 for i in range(8)]


def test_weights_that_sum_to_more_than_one() -> None:
    """In float32 they do for some of these classes; the clip's logit has to stay finite."""
    att = torch.randn(1, 999, 64)
    assert (att.softmax(1).sum(1) > 1).any()
    assert pool_frames(torch.full((1, 999, 64), 90.0), att, "att").max() < 17


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
