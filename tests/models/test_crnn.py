"""CRNN: the GRU written out, its initialisation, its width."""

import torch
from torch import Tensor

from fastat.models import create_model
from fastat.models.crnn import Crnn
from tests.models.written_out import attention_head


def small(**options: object) -> Crnn:
    sizes = {"num_mels": 64, "num_frames": 40, "num_classes": 5, "embedding": 64}
    model = create_model("crnn", **(sizes | options))  # type: ignore[arg-type]
    assert isinstance(model, Crnn)
    return model.eval()


def gru(x: Tensor, state: dict[str, Tensor], suffix: str) -> Tensor:
    """[B, N, D] -> [B, N, H]: a GRU by its formula (Cho et al., 2014; torch's arrangement)."""
    w_ih, w_hh, b_ih, b_hh = (
        state[f"{kind}_l0{suffix}"] for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    )
    h = x.new_zeros(len(x), w_hh.shape[1])
    out = []
    for frame in x.unbind(1):
        r, z, n = (frame @ w_ih.T + b_ih).chunk(3, 1)
        hr, hz, hn = (h @ w_hh.T + b_hh).chunk(3, 1)
        z = (z + hz).sigmoid()
        h = (1 - z) * (n + (r + hr).sigmoid() * hn).tanh() + z * h
        out.append(h)
    return torch.stack(out, 1)


def test_equals_the_paper_written_out() -> None:
    """Convolutions, a GRU in either direction side by side, attention pooling."""
    model = small()
    x = torch.randn(2, 43, 64)
    h = model.talnet(x)
    assert h.shape == (2, 10, 64)
    state = model.gru.state_dict()
    h = torch.cat([gru(h, state, ""), gru(h.flip(1), state, "_reverse").flip(1)], 2)
    torch.testing.assert_close(model.frames(x), h)
    torch.testing.assert_close(model(x).sigmoid(), attention_head(model.head, h))


def test_gru_starts_orthogonal_without_biases() -> None:
    for name, p in small().gru.named_parameters():
        if p.ndim == 1:
            assert (p == 0).all(), name
        else:
            torch.testing.assert_close(p.T @ p, torch.eye(p.shape[1]), rtol=0, atol=1e-5, msg=name)


def test_a_direction_has_half_the_embedding() -> None:
    with torch.device("meta"):
        model = small(embedding=1024)
    assert (model.gru.hidden_size, model.gru.num_layers, model.gru.bidirectional) == (512, 1, True)
