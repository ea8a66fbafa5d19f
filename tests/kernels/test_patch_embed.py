"""patch_embed: Triton against Conv2d in float64, forward and every gradient, at every stride."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastat_kernels import patch_embed as module
from fastat_kernels.backend import target
from fastat_kernels.patch_embed import (
    BwdConfig,
    FwdConfig,
    _bwd,
    _bwd_configs,
    _bwd_triton,
    _fwd,
    _fwd_configs,
    _fwd_triton,
    _input_gradient,
    _share,
    patch_embed,
    patch_embed_ref,
)
from tests.kernels.check import assert_as_good_as_eager
from tests.kernels.mutant import Mutant

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


class Shape(NamedTuple):
    clips: int
    frames: int
    mels: int
    width: int
    fstride: int
    tstride: int

    @property
    def strides(self) -> tuple[int, int]:
        return self.fstride, self.tstride


class Inputs(NamedTuple):
    x: Tensor
    weight: Tensor
    bias: Tensor
    pos: Tensor
    cls_token: Tensor
    dist_token: Tensor

    def leaves(self) -> "Inputs":
        return Inputs(*(tensor.detach().requires_grad_() for tensor in self))


SHAPES = [
    Shape(1, 16, 16, 8, 1, 1),  # one patch
    Shape(2, 40, 33, 40, 5, 7),  # edges of the map in no patch
    Shape(3, 101, 64, 64, 8, 6),  # several tiles of tokens
    Shape(2, 47, 30, 300, 10, 4),  # several tiles of the width, the last one ragged
    Shape(2, 35, 20, 256, 4, 3),  # two halves of the width
    Shape(5, 62, 17, 16, 1, 1),  # more patches in time than a block of frames
]
MODEL_SHAPES = (
    [
        Shape(80, 400, 64, 768, 8, 8),
        Shape(80, 400, 64, 384, 12, 12),
        Shape(80, 400, 64, 192, 16, 16),
        Shape(20, 1024, 128, 768, 10, 10),
        Shape(20, 1024, 128, 768, 4, 4),
    ]
    if torch.cuda.is_available()
    else []
)


def name(value: object) -> str:
    if isinstance(value, tuple):
        return "x".join(map(str, value))
    return str(value).removeprefix("torch.")


def make(shape: Shape, device: torch.device | str, dtype: torch.dtype) -> Inputs:
    """x and the parameters, all of which matter to the result."""
    B, T, M, D, fstride, tstride = shape
    tokens = 2 + len(range(0, M - 15, fstride)) * len(range(0, T - 15, tstride))
    sizes = [(B, T, M), (D, 1, 16, 16), (D,), (1, tokens, D), (1, 1, D), (1, 1, D)]
    made = [torch.randn(size, device=device) for size in sizes]
    made[1] /= 16
    return Inputs(*(tensor.to(dtype) for tensor in made))


def eager(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    pos: Tensor,
    cls_token: Tensor,
    dist_token: Tensor,
    strides: tuple[int, int],
    autocast: torch.dtype | None = None,
) -> Tensor:
    """Conv2d, flatten, cat, add; under ``autocast`` unless it is the float64 reference."""
    enabled = autocast is not None and x.dtype != torch.float64
    with torch.autocast(x.device.type, autocast, enabled=enabled):
        patches = F.conv2d(x.mT.unsqueeze(1), weight, bias, strides).flatten(2).mT
        special = torch.cat([cls_token, dist_token], 1).expand(len(x), -1, -1)
        return torch.cat([special, patches], 1) + pos


def check(
    inputs: Inputs,
    strides: tuple[int, int],
    dtype: torch.dtype,
    fwd: FwdConfig | None = None,
    bwd: BwdConfig | None = None,
) -> None:
    """Both launchers and the input's gradient, in compute dtype ``dtype``."""
    out, columns = _fwd_triton(*inputs, *strides, dtype, config=fwd)
    dout = torch.randn(out.shape, device=out.device).to(inputs.x.dtype)
    dx = _input_gradient(dout, inputs.weight, inputs.x.shape, strides, dtype)
    gradients = dx, *_bwd_triton(dout, columns, strides[1], config=bwd)
    got = {"out": out} | dict(zip(Inputs._fields, gradients, strict=True))
    got = {key: value.to(inputs.x.dtype) for key, value in got.items()}
    autocast = dtype if dtype != inputs.x.dtype else None
    fn = partial(eager, strides=strides, autocast=autocast)
    assert_as_good_as_eager(fn, inputs, dout, got)


def assume_sms(monkeypatch: pytest.MonkeyPatch, num_sms: int) -> None:
    """Few programs: each has several tiles of tokens, or several clips, or both."""
    monkeypatch.setattr(module, "_num_sms", lambda x: num_sms)


# --------------------------------------------------------------------------------------- numerics
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("shape", SHAPES + MODEL_SHAPES, ids=name)
def test_matches_convolution(shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
    check(make(shape, device, dtype), shape.strides, dtype)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=name)
@pytest.mark.parametrize("shape", SHAPES[1:5] + MODEL_SHAPES, ids=name)
def test_matches_autocast(shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
    """float32 features, parameters and tokens around a half-precision product."""
    check(make(shape, device, torch.float32), shape.strides, dtype)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=name)
@pytest.mark.parametrize(
    "shape, num_sms", [(Shape(5, 79, 64, 64, 4, 6), 1), (Shape(8, 79, 64, 16, 4, 6), 4)], ids=name
)
def test_several_tiles_and_clips_a_program(
    shape: Shape,
    num_sms: int,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
    device: torch.device,
) -> None:
    assume_sms(monkeypatch, num_sms)
    check(make(shape, device, torch.float32), shape.strides, dtype)


@pytest.mark.parametrize("fstride", range(1, 17))
def test_every_stride(fstride: int, device: torch.device) -> None:
    tstride = 1 + 7 * fstride % 16
    shape = Shape(2, 45, 38, 8, fstride, tstride)
    check(make(shape, device, torch.float32), shape.strides, torch.float32)


@pytest.mark.parametrize("layout", ["frames last", "every other mel", "a column of a wider one"])
def test_strided_input(layout: str, device: torch.device) -> None:
    shape = Shape(2, 33, 40, 24, 7, 5)
    inputs = make(shape, device, torch.float32)
    x = inputs.x
    match layout:
        case "frames last":
            x = x.mT.contiguous().mT
        case "every other mel":
            x = torch.stack([x, -x], -1).flatten(2)[..., ::2]
        case _:
            x = torch.cat([x, -x], 1)[:, : shape.frames]
    check(inputs._replace(x=x), shape.strides, torch.bfloat16)


CONFIGS = {
    (arch, kind, *config): config
    for arch in (80, 90, 100)
    for dtype in (torch.bfloat16, torch.float32)
    for width in (768, 384, 192)
    for kind, configs in (("fwd", _fwd_configs), ("bwd", _bwd_configs))
    for config in configs(arch, dtype, width)
}


@pytest.mark.parametrize("config", {tuple(c): c for c in CONFIGS.values()}.values(), ids=name)
def test_every_configuration(
    config: FwdConfig | BwdConfig, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    """On a width that no tile divides, so that the last one is ragged or empty."""
    assume_sms(monkeypatch, 3)
    shape = Shape(3, 70, 26, 130, 5, 4)
    inputs = make(shape, device, torch.float32)
    if torch.cuda.is_available() and config not in _on_this_chip(inputs.x):
        pytest.skip("a configuration of another chip")
    fwd = config if isinstance(config, FwdConfig) else None
    bwd = config if isinstance(config, BwdConfig) else None
    dtype = torch.float32 if config in F32_CONFIGS else torch.bfloat16
    check(inputs, shape.strides, dtype, fwd, bwd)


F32_CONFIGS = [
    configs(arch, torch.float32, 768)[0]
    for arch in (80, 90, 100)
    for configs in (_fwd_configs, _bwd_configs)
]


def _on_this_chip(x: Tensor) -> list[FwdConfig | BwdConfig]:
    return [config for (arch, *_), config in CONFIGS.items() if arch == target(x)]


def test_reference_is_the_convolution(device: torch.device) -> None:
    shape = SHAPES[1]
    inputs = make(shape, device, torch.float32)
    want = eager(*inputs, shape.strides)
    torch.testing.assert_close(patch_embed_ref(*inputs, shape.strides), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_operators_default_agrees_with_their_kernels(
    dtype: torch.dtype, device: torch.device
) -> None:
    """The plain body and the Triton launcher are two implementations of one operator."""
    shape = Shape(2, 50, 35, 20, 9, 3)
    inputs = make(shape, device, torch.float32)
    out, columns = _fwd_triton(*inputs, *shape.strides, dtype)
    want, want_columns = module._fwd_plain(*inputs, *shape.strides, dtype)
    assert torch.equal(columns, want_columns)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(out, want, rtol=tolerance, atol=tolerance)
    dout = torch.randn_like(out)
    got, plain = (f(dout, columns, shape.tstride) for f in (_bwd_triton, module._bwd_plain))
    torch.testing.assert_close(got, plain, rtol=1e-4, atol=1e-4)


def test_same_bits_twice(device: torch.device) -> None:
    shape = SHAPES[2]
    inputs = make(shape, device, torch.float32)
    runs = []
    for _ in range(2):
        out, columns = _fwd_triton(*inputs, *shape.strides, torch.bfloat16)
        dx = _input_gradient(out, inputs.weight, inputs.x.shape, shape.strides, torch.bfloat16)
        runs.append((out, columns, dx, *_bwd_triton(out, columns, shape.tstride)))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


# --------------------------------------------------------------------------------- division of work
@pytest.mark.parametrize("programs", [1, 3, 22, 44, 132])
@pytest.mark.parametrize("tiles, clips", [(1, 1), (2, 80), (6, 80), (19, 20), (115, 20), (7, 3)])
def test_programs_share_all_work_once(tiles: int, clips: int, programs: int) -> None:
    work = _share(tiles, clips, programs)
    assert work.tile_groups * work.clip_groups <= programs
    for total, each, groups in (
        (tiles, work.tiles, work.tile_groups),
        (clips, work.clips, work.clip_groups),
    ):
        assert (groups - 1) * each < total <= groups * each


# ------------------------------------------------------------------------------- public function
@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=name)
def test_public_function_through_the_kernel(
    autocast: torch.dtype | None, triton_everywhere: None, device: torch.device
) -> None:
    shape = Shape(2, 50, 35, 20, 9, 3)
    inputs = make(shape, device, torch.float32)
    leaves = inputs.leaves()
    with torch.autocast(device.type, autocast, enabled=autocast is not None):
        out = patch_embed(*leaves, shape.strides)
    want = eager(*leaves, shape.strides, autocast)
    assert out.dtype == want.dtype == torch.float32
    dout = torch.randn_like(out)
    got = torch.autograd.grad(out, leaves, dout)
    fn = partial(eager, strides=shape.strides, autocast=autocast)
    named = {"out": out.detach()} | dict(zip(Inputs._fields, got, strict=True))
    assert_as_good_as_eager(fn, inputs, dout, named)
    for leaf, gradient in zip(leaves[1:], got[1:], strict=True):
        assert gradient.stride() == leaf.stride()  # what DDP's buckets want


def test_only_the_asked_gradients(triton_everywhere: None, device: torch.device) -> None:
    """Saliency asks for the input's alone, training for all but the input's."""
    shape = SHAPES[1]
    inputs = make(shape, device, torch.float32)
    for wanted in ([0], [1, 2, 3, 4, 5], [3]):
        leaves = Inputs(*(t.detach().requires_grad_(i in wanted) for i, t in enumerate(inputs)))
        chosen = [leaves[i] for i in wanted]
        got = torch.autograd.grad(patch_embed(*leaves, shape.strides).square().sum(), chosen)
        want = torch.autograd.grad(eager(*leaves, shape.strides).square().sum(), chosen)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_half_precision_parameters(triton_everywhere: None, device: torch.device) -> None:
    """Everything in bfloat16 gives tokens in bfloat16, and gradients too."""
    shape = SHAPES[1]
    leaves = make(shape, device, torch.bfloat16).leaves()
    out = patch_embed(*leaves, shape.strides)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert {leaf.grad.dtype for leaf in leaves if leaf.grad is not None} == {torch.bfloat16}


def test_plain_path_is_bitwise_the_composite(device: torch.device) -> None:
    shape = SHAPES[2]
    inputs = make(shape, device, torch.float32)
    conv = torch.nn.Conv2d(1, shape.width, 16, stride=shape.strides).to(device)
    conv.load_state_dict({"weight": inputs.weight, "bias": inputs.bias})
    B, T, M = inputs.x.shape
    image = torch.as_strided(inputs.x.mT.contiguous(), (B, 1, M, T), (M * T, 1, T, 1))
    for enabled in (False, True):
        with torch.autocast(device.type, torch.bfloat16, enabled=enabled):
            patches = conv(image).flatten(2).transpose(1, 2)
            special = torch.cat([inputs.cls_token, inputs.dist_token], 1).expand(B, -1, -1)
            want = torch.cat([special, patches], 1) + inputs.pos
            assert torch.equal(patch_embed(*inputs, shape.strides), want)


def test_leaves_float64_to_the_library(
    triton_everywhere: None, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    monkeypatch.setattr(module, "_fwd", None)
    shape = SHAPES[1]
    inputs = make(shape, device, torch.float64)
    want = eager(*inputs, shape.strides)
    torch.testing.assert_close(patch_embed(*inputs, shape.strides), want)


def test_second_derivatives_raise(triton_everywhere: None, device: torch.device) -> None:
    leaves = make(SHAPES[0], device, torch.float32).leaves()
    out = patch_embed(*leaves, SHAPES[0].strides)
    (dweight,) = torch.autograd.grad(out.square().sum(), leaves.weight, create_graph=True)
    with pytest.raises(RuntimeError, match="patch_embed_bwd"):
        dweight.sum().backward()


def test_no_clips(triton_everywhere: None, device: torch.device) -> None:
    inputs = make(Shape(0, 40, 33, 8, 5, 7), device, torch.float32)
    assert patch_embed(*inputs, (5, 7)).shape == (0, 2 + 4 * 4, 8)


@pytest.mark.parametrize("autocast", [False, True])
def test_compiles_whole(autocast: bool, triton_everywhere: None, device: torch.device) -> None:
    compiled = torch.compile(patch_embed, fullgraph=True, backend="aot_eager")
    shape = Shape(2, 40, 33, 16, 5, 7)
    leaves = make(shape, device, torch.float32).leaves()
    with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
        outs = [f(*leaves, shape.strides) for f in (compiled, patch_embed)]
    assert torch.equal(*outs)
    got, want = (torch.autograd.grad(out.square().sum(), leaves) for out in outs)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name)
def test_opcheck(dtype: torch.dtype, device: torch.device) -> None:
    shape = Shape(2, 33, 20, 8, 3, 9)
    leaves = make(shape, device, torch.float32).leaves()
    torch.library.opcheck(_fwd, (*leaves, *shape.strides, dtype))
    out, columns = _fwd(*leaves, *shape.strides, dtype)
    torch.library.opcheck(_bwd, (out.detach(), columns, shape.tstride))


# --------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    "field, bad, message",
    [
        ("x", torch.zeros(2, 15, 20), r"T and F >= 16.* got \(2, 15, 20\)"),
        ("x", torch.zeros(33, 20), r"\[B, T, F\]"),
        (
            "weight",
            torch.zeros(8, 1, 16, 15),
            r"weight must be \(8, 1, 16, 16\), got \(8, 1, 16, 15\)",
        ),
        ("bias", torch.zeros(7), r"bias must be \(8,\), got \(7,\)"),
        ("pos", torch.zeros(1, 7, 8), r"pos must be \(1, 6, 8\), got \(1, 7, 8\)"),
        ("cls_token", torch.zeros(8), r"cls_token must be \(1, 1, 8\)"),
        ("dist_token", torch.zeros(1, 1, 8, device="meta"), "x is on cpu, dist_token on meta"),
        ("weight", torch.zeros(8, 1, 16, 16).half(), "one dtype outside autocast.*float16"),
    ],
)
def test_rejects_bad_tensors(field: str, bad: Tensor, message: str) -> None:
    inputs = make(Shape(2, 33, 20, 8, 3, 9), "cpu", torch.float32)
    inputs = inputs._replace(**{field: bad})
    with pytest.raises(ValueError, match=message):
        patch_embed(*inputs, (3, 9))


@pytest.mark.parametrize("strides", [(0, 4), (4, 17)])
def test_rejects_bad_strides(strides: tuple[int, int]) -> None:
    inputs = make(Shape(2, 33, 20, 8, 3, 9), "cpu", torch.float32)
    with pytest.raises(ValueError, match="two numbers in 1..16"):
        patch_embed(*inputs, strides)


# ------------------------------------------------------------------- compilation ahead of time
MODELS = [  # A3 and A1; 768 wide, and the small and the tiny trunk; strides of all alignments
    (Shape(80, 400, 64, 768, 8, 8), torch.bfloat16),
    (Shape(20, 1024, 128, 768, 10, 10), torch.bfloat16),
    (Shape(80, 400, 64, 768, 16, 16), torch.float16),
    (Shape(80, 400, 64, 384, 12, 12), torch.bfloat16),
    (Shape(80, 400, 64, 192, 7, 7), torch.bfloat16),
    (Shape(80, 400, 64, 768, 8, 8), torch.float32),
]


def _calls(
    shape: Shape, dtype: torch.dtype, fwd: FwdConfig | None, bwd: BwdConfig | None
) -> Iterator[Callable[[], object]]:
    inputs = make(shape, "meta", torch.float32)
    out, columns = module._fwd_fake(*inputs, *shape.strides, dtype)
    if fwd or not bwd:
        yield partial(_fwd_triton, *inputs, *shape.strides, dtype, config=fwd)
    if bwd or not fwd:
        yield partial(_bwd_triton, out, columns, shape.tstride, config=bwd)


def launches() -> Iterator[tuple[str, Callable[[], object]]]:
    """Every launch that the models make, on meta tensors: label, call."""
    for shape, dtype in MODELS:
        for direction, call in zip(("fwd", "bwd"), _calls(shape, dtype, None, None), strict=True):
            yield f"{direction} {name(shape)} {name(dtype)}", call


def candidates() -> Iterator[tuple[str, Callable[[], object]]]:
    """The same for the configurations that are only timed."""
    for shape, dtype in (MODELS[0], MODELS[3], MODELS[4]):
        arch = target(torch.empty(0, device="meta"))
        for fwd in _fwd_configs(arch, dtype, shape.width)[1:]:
            for call in _calls(shape, dtype, fwd, None):
                yield f"fwd {name(shape)} {name(dtype)} @ {name(fwd)}", call
        for bwd in _bwd_configs(arch, dtype, shape.width)[1:]:
            for call in _calls(shape, dtype, None, bwd):
                yield f"bwd {name(shape)} {name(dtype)} @ {name(bwd)}", call


MUTANTS = [
    Mutant(
        "the distillation token is the class token",
        "other = tl.where((r == 1)[:, None], dist, bias)",
        "other = tl.where((r == 1)[:, None], cls, bias)",
        "test_matches_convolution[1x16x16x8x1x1-float32]",
    ),
    Mutant(
        "a row of patches is as long as its patches are many",
        "patch = ((n // gt) * T + (n % gt) * tstride) * SIDE       # [ROWS]",
        "patch = ((n // gt) * gt + (n % gt) * tstride) * SIDE",
        "test_matches_convolution[2x40x33x40x5x7-float32]",
    ),
    Mutant(
        "the second half of the width has the first one's positions",
        "addend2 = _addend(bias_ptr, pos_ptr, cls_ptr, dist_ptr, r, e, R, D)",
        "addend2 = _addend(bias_ptr, pos_ptr, cls_ptr, dist_ptr, r, d, R, D)",
        "test_matches_convolution[2x35x20x256x4x3-bfloat16]",
    ),
    Mutant(
        "special tokens in the bias's gradient",
        "dbias += tl.sum(tl.where((n >= 0)[:, None], dpos, 0.0), 0)",
        "dbias += tl.sum(dpos, 0)",
        "test_matches_convolution[2x40x33x40x5x7-float32]",
    ),
    Mutant(
        "every group of clips writes the first one's sum of positions",
        "dpos_tile = dpos_ptr + clip_group * clip_step",
        "dpos_tile = dpos_ptr",
        "test_matches_convolution[2x40x33x40x5x7-float32]",
    ),
    Mutant(
        "the weight's gradient keeps the order of the columns",
        "row = k % SIDE * SIDE + k // SIDE ",
        "row = k ",
        "test_matches_convolution[2x40x33x40x5x7-float32]",
    ),
    Mutant(
        "groups of tiles overlap by one tile in the sum of the weight's gradient",
        "first_tile = group % tile_groups * tiles\n    clip_group",
        "first_tile = group % tile_groups * (tiles - 1)\n    clip_group",
        "test_several_tiles_and_clips_a_program[8x79x64x16x4x6-4-bfloat16]",
    ),
    Mutant(
        "x is read as if it were contiguous",
        "x, columns, frames, gf, *x.stride(), stride[0]",
        "x, columns, frames, gf, *x.mT.stride(), stride[0]",
        "test_strided_input[frames last]",
    ),
]
