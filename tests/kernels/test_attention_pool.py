"""attention_pool: Triton against float64, forward and both gradients, softmax and sigmoid form."""

from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import Tensor

from fastat_kernels.attention_pool import (
    _bwd,
    _bwd_triton,
    _configs,
    _fwd,
    _fwd_triton,
    attention_pool,
    attention_pool_ref,
)
from tests.kernels.check import assert_as_good_as_eager
from tests.kernels.mutant import Mutant

# [B, T, K]: blocks that divide, odd everything, one frame, AudioSet's classes, several tiles
SHAPES = [(2, 32, 64), (3, 33, 7), (2, 1, 65), (1, 17, 527), (2, 70, 5)]
MODEL_SHAPES = (
    [(448, 100, 527), (100, 256, 527), (80, 13, 527)] if torch.cuda.is_available() else []
)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def eager(prob: Tensor, att: Tensor, sigmoid: bool) -> Tensor:
    eps = 1e-7
    p = prob.sigmoid().clamp(eps, 1 - eps)
    if sigmoid:
        weights = att.sigmoid().clamp(eps, 1 - eps)
        clip = (p * weights).sum(1) / weights.sum(1)
    else:
        clip = (p * att.softmax(1)).sum(1)
    return clip.clamp(eps, 1 - eps).logit()


def float32_inside(prob: Tensor, att: Tensor, sigmoid: bool) -> Tensor:
    """What the models did before: half precision in, float32 from there on."""
    if prob.dtype == torch.float64:
        return eager(prob, att, sigmoid)
    return eager(prob.float(), att.float(), sigmoid)


@pytest.mark.parametrize("sigmoid", [False, True], ids=["softmax", "sigmoid"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("shape", SHAPES + MODEL_SHAPES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("layout", ["contiguous", "strided"])
def test_matches_reference(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    sigmoid: bool,
    layout: str,
    device: torch.device,
) -> None:
    B, T, K = shape
    prob, att = torch.randn(2, B, T, K, device=device).to(dtype)
    if layout == "strided":  # half of a wider product, and classes before frames
        prob = torch.cat([prob, att], -1)[..., :K]
        att = att.transpose(1, 2).contiguous().transpose(1, 2)
    dout = torch.randn(B, K, device=device)

    out, clip, norm = _fwd_triton(prob, att, sigmoid)
    dprob, datt = _bwd_triton(dout, prob, att, clip, norm, sigmoid)

    fn = partial(float32_inside, sigmoid=sigmoid)
    got = {"out": out, "prob": dprob, "att": datt}
    assert_as_good_as_eager(fn, (prob, att), dout, got)


@pytest.mark.parametrize("sigmoid", [False, True], ids=["softmax", "sigmoid"])
def test_certain_frames_stay_finite_and_pass_no_gradient(
    sigmoid: bool, device: torch.device
) -> None:
    """Beyond the clamps: probabilities of 0 and 1, weights that lie on one frame."""
    prob = torch.tensor([[-90.0, 90.0, 0.0, 20.0]], device=device).repeat(5, 1)[None]
    att = torch.linspace(-300, 300, 5, device=device)[None, :, None].repeat(1, 1, 4)
    dout = torch.ones(1, 4, device=device)
    out, clip, norm = _fwd_triton(prob, att, sigmoid)
    dprob, datt = _bwd_triton(dout, prob, att, clip, norm, sigmoid)
    fn = partial(eager, sigmoid=sigmoid)
    assert_as_good_as_eager(fn, (prob, att), dout, {"out": out, "prob": dprob, "att": datt})
    assert out.abs().max() < 17 and not dprob[..., :2].any()


@pytest.mark.parametrize("sigmoid", [False, True], ids=["softmax", "sigmoid"])
@pytest.mark.parametrize("which", ["prob", "att"])
def test_not_a_number_is_not_clamped_away(which: str, sigmoid: bool, device: torch.device) -> None:
    """A run that diverges has to be seen to."""
    prob, att = torch.zeros(2, 2, 5, 4, device=device)
    (prob if which == "prob" else att)[1, 3, 2] = float("nan")
    out, _, _ = _fwd_triton(prob, att, sigmoid)
    assert out.isnan().flatten().tolist() == [i == 6 for i in range(8)]
    assert torch.equal(out.isnan(), attention_pool_ref(prob, att, sigmoid).isnan())


def test_weights_that_sum_to_more_than_one(device: torch.device) -> None:
    """In float32 they do for some classes here; the clip's logit has to stay finite."""
    prob, att = (
        torch.full((1, 999, 64), 90.0, device=device),
        torch.randn(1, 999, 64, device=device),
    )
    out, clip, _ = _fwd_triton(prob, att, False)
    assert (clip >= 1).any() and out.max() < 17


@pytest.mark.parametrize("sigmoid", [False, True], ids=["softmax", "sigmoid"])
def test_operator_default_agrees_with_its_kernel(sigmoid: bool, device: torch.device) -> None:
    """The CPU default and the Triton launcher are two implementations of one operator."""
    prob, att = torch.randn(2, 3, 35, 7, device=device)
    dout = torch.randn(3, 7, device=device)
    ours, plain = _fwd_triton(prob, att, sigmoid), _fwd._init_fn(prob, att, sigmoid)
    for got, want in zip(ours, plain, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    saved = (dout, prob, att, *plain[1:], sigmoid)
    for got, want in zip(_bwd_triton(*saved), _bwd._init_fn(*saved), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_public_function_through_the_kernel(triton_everywhere: None, device: torch.device) -> None:
    prob, att = torch.randn(2, 2, 20, 9, device=device, dtype=torch.float64).float()
    leaves = prob.requires_grad_(), att.requires_grad_()
    got = torch.autograd.grad(attention_pool(prob, att).square().sum(), leaves)
    want = torch.autograd.grad(attention_pool_ref(prob, att).square().sum(), leaves)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_compiles_whole(triton_everywhere: None, device: torch.device) -> None:
    compiled = torch.compile(attention_pool, fullgraph=True, backend="aot_eager")
    prob, att = (torch.randn(2, 6, 5, device=device, requires_grad=True) for _ in range(2))
    got = torch.autograd.grad(compiled(prob, att).sum(), (prob, att))
    want = torch.autograd.grad(attention_pool_ref(prob, att).sum(), (prob, att))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sigmoid", [False, True], ids=["softmax", "sigmoid"])
def test_opcheck(sigmoid: bool, device: torch.device) -> None:
    prob, att = (torch.randn(2, 5, 3, device=device, requires_grad=True) for _ in range(2))
    torch.library.opcheck(_fwd, (prob, att, sigmoid))


def test_same_bits_twice(device: torch.device) -> None:
    prob, att = torch.randn(2, 2, 40, 66, device=device)
    first, again = _fwd_triton(prob, att, False), _fwd_triton(prob, att, False)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("bad", [(2, 5), (2, 5, 4), (2, 0, 3)])
def test_rejects_bad_shapes(bad: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"\[B, T, K\]"):
        attention_pool(torch.rand(bad), torch.rand(bad if 0 in bad else (2, 5, 3)))


def test_rejects_mixed_dtypes() -> None:
    with pytest.raises(ValueError, match="float16"):
        attention_pool(torch.rand(2, 5, 3), torch.rand(2, 5, 3).half())


def launches(num_config: int = 0) -> Iterator[tuple[str, Callable[[], object]]]:
    """Every launch that the models make, on meta tensors: label, call."""
    for dtype in (torch.bfloat16, torch.float32):
        prob = torch.empty(448, 100, 527, dtype=dtype, device="meta")
        stats = torch.empty(448, 527, device="meta")
        config = _configs(90)[num_config]
        for form, sigmoid in (("softmax", False), ("sigmoid", True)):
            label = f"{form} {str(dtype).removeprefix('torch.')} @ {tuple(config)}"
            yield f"fwd {label}", partial(_fwd_triton, prob, prob, sigmoid, config=config)
            backward = partial(_bwd_triton, stats, prob, prob, stats, stats, sigmoid, config=config)
            yield f"bwd {label}", backward


def candidates() -> Iterator[tuple[str, Callable[[], object]]]:
    """The same for the configurations that are only timed."""
    for i in range(1, len(_configs(90))):
        yield from launches(i)


MUTANTS = [
    Mutant(
        "the last frames of a ragged tile count",
        "new = tl.exp(top - shift), tl.where(m, tl.exp(a - shift), 0.0)",
        "new = tl.exp(top - shift), tl.exp(a - shift)",
        "test_matches_reference[contiguous-3x33x7-float32-softmax]",
    ),
    Mutant(
        "a tile's sums are not scaled to the new maximum",
        "num = num * old + new * p",
        "num = num + new * p",
        "test_matches_reference[contiguous-2x70x5-float32-softmax]",
    ),
    Mutant(
        "no second clamp",
        "kept = _clamp(clip)\n    tl.store",
        "kept = clip\n    tl.store",
        "test_weights_that_sum_to_more_than_one",
    ),
    Mutant(
        "the gradient of a clamped probability passes",
        "dprob = tl.where(_inside(s), g * w * s * (1 - s), 0.0)",
        "dprob = g * w * s * (1 - s) + 1e-3 * tl.where(_inside(s), 0.0, 1.0)",
        "test_certain_frames_stay_finite_and_pass_no_gradient[sigmoid]",
    ),
    Mutant(
        "strides of the weights are those of the probabilities",
        "datt, T, K,\n        *prob.stride(), *att.stride(),",
        "datt, T, K,\n        *prob.stride(), *prob.stride(),",
        "test_matches_reference[strided-3x33x7-float32-softmax]",
    ),
]
