"""CRNN: the GRU written out, its initialisation, its width."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

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


class Notes(nn.Module):
    """In place of the GRU: notes in which dtype it is called, and under which autocast."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[torch.dtype, bool]] = []

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        self.seen.append((x.dtype, torch.is_autocast_enabled("cuda")))
        return x, None


@pytest.mark.parametrize(
    "dtype, want",
    [(torch.bfloat16, (torch.float32, False)), (torch.float16, (torch.float16, True))],
)
def test_autocast_on_a_gpu_is_the_grus_where_it_is_float16(
    dtype: torch.dtype, want: tuple[torch.dtype, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch casts cuDNN's GRU to float16 whatever it was asked for."""
    model = small()
    notes = Notes()
    monkeypatch.setattr(model, "gru", notes)
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)  # torch.autocast does not without a GPU
    torch.set_autocast_dtype("cuda", dtype)
    try:
        with FakeTensorMode():
            model._recurrent(torch.empty(2, 10, 64, dtype=dtype, device="cuda"))
        assert torch.is_autocast_enabled("cuda")
    finally:
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])
    assert notes.seen == [want]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_small_gradients_pass_the_gru_in_bfloat16() -> None:
    """Those of a batch of 448: float16, which torch would compute the GRU in, makes 0 of them."""
    model = small(num_classes=527).cuda()
    model.gru.train()  # cuDNN's has no backward pass otherwise
    x, y = torch.randn(4, 40, 64, device="cuda"), torch.zeros(4, 527, device="cuda")
    grads = []
    for enabled in (False, True):
        model.zero_grad()
        with torch.autocast("cuda", torch.bfloat16, enabled=enabled):
            logits = model(x)
        (F.binary_cross_entropy_with_logits(logits, y) * 4 / 448).backward()
        grad = next(model.parameters()).grad  # of the first convolution
        assert isinstance(grad, Tensor)
        grads.append(grad)
    want, got = grads
    assert (got - want).norm() < 0.2 * want.norm()
