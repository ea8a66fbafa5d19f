"""dropout: rate, scale, independence, gradient, reproducibility."""

import pytest
import torch

from fastat_kernels.dropout import dropout


@pytest.mark.parametrize("p", [0.1, 0.25, 0.75])
def test_rate_and_scale(p: float, device: torch.device) -> None:
    x = torch.ones(400, 1001, device=device)  # not a multiple of four
    y = dropout(x, p)
    share = (y == 0).double().mean().item()
    assert share == pytest.approx(p, abs=5 * (p * (1 - p) / x.numel()) ** 0.5)
    assert y[y != 0].unique().numel() == 1
    assert y.max().item() == pytest.approx(1 / (1 - p), rel=1e-4)


def test_neighbours_are_independent(device: torch.device) -> None:
    """Four elements share one draw of 64 bits; none may follow from another."""
    y = (dropout(torch.ones(400_000, device=device), 0.5) != 0).double().view(-1, 4)
    assert torch.corrcoef(y.T).fill_diagonal_(0).abs().max().item() < 0.02


def test_gradient_is_the_mask(device: torch.device) -> None:
    x = torch.randn(33, 7, device=device, requires_grad=True)
    y = dropout(x, 0.5)
    y.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(y.detach(), x.detach() * x.grad)


def test_follows_torchs_seed(device: torch.device) -> None:
    x = torch.ones(1000, device=device)
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(dropout(x, 0.5))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_zero_probability_is_the_identity() -> None:
    x = torch.randn(5)
    assert dropout(x, 0.0) is x


@pytest.mark.parametrize("p", [-0.5, 1.0, 2.0])
def test_rejects_bad_probability(p: float) -> None:
    with pytest.raises(ValueError, match=r"\[0, 1\)"):
        dropout(torch.ones(3), p)
