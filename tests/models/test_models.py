"""What every model promises: sizes, shapes, precision, gradients, DDP, checkpointing, errors."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

from fastat.models import create_model, list_models
from fastat.models.base import FrameModel, TaggingModel
from fastat.models.costs import count_parameters, forward_gflop
from fastat.system.errors import UserError
from tests.conftest import SMALL_MODELS

MODELS = list_models()
WITH_DROPOUT = ("cnn_trans", "conformer", "transformer")


def small(name: str, **options: Any) -> TaggingModel:
    sizes = {"num_mels": 64, "num_frames": 64, "num_classes": 5}
    return create_model(name, **(sizes | SMALL_MODELS[name] | options))


def batch(num_clips: int = 3, num_frames: int = 64) -> tuple[Tensor, Tensor]:
    """[B, T, 64] features and [B, 5] targets."""
    return torch.randn(num_clips, num_frames, 64), (torch.rand(num_clips, 5) < 0.4).float()


def settled(name: str, **options: Any) -> TaggingModel:
    """A model in evaluation mode, as if trained: its BatchNorms have seen features.

    Fresh residual branches as large as their shortcuts make a ResNet50 chaotic: bfloat16 moves its
    logits by 40 %.
    """
    model = small(name, **options)
    for key, p in model.named_parameters():
        if key.startswith("trunk.layer") and key.endswith(("bn2.weight", "bn3.weight")):
            nn.init.constant_(p, 0.1)
    x, _ = batch(16, 128)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    model(x)
    return model.eval()


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(model(x), y)


# ------------------------------------------------------------------------------------------- size
@pytest.mark.parametrize(
    ("name", "num_mels", "num_frames", "options", "params", "gflop"),
    [
        ("cnn_trans", 128, 1024, {"embedding": 2048}, 32_061_566, 59.4),
        ("crnn", 128, 1024, {"embedding": 2048}, 25_761_918, 42.3),
        ("cnn_trans", 64, 400, {"num_layers": 4}, 12_097_662, 11.6),
        ("cnn_trans", 64, 400, {"num_layers": 4, "shared": False}, 31_002_750, 11.6),
        ("resnet34", 64, 400, {}, 21_819_102, 3.70),
    ],
)
def test_sizes_beyond_the_defaults(
    name: str, num_mels: int, num_frames: int, options: dict[str, Any], params: int, gflop: float
) -> None:
    """The defaults' are in test_costs.py."""
    with torch.device("meta"):
        model = create_model(
            name, num_mels=num_mels, num_frames=num_frames, num_classes=527, **options
        )
    assert count_parameters(model) == params
    assert forward_gflop(model, num_frames, num_mels) == pytest.approx(gflop, rel=0.02)


# ------------------------------------------------------------------------------ features to logits
@pytest.mark.parametrize("num_mels", [64, 128])
@pytest.mark.parametrize("name", MODELS)
def test_logits_of_any_length(name: str, num_mels: int) -> None:
    for num_classes in (1, 5, 527):
        model = small(name, num_mels=num_mels, num_classes=num_classes).eval()
        for frames in (64, 65, 40, 131):
            logits = model(torch.randn(2, frames, num_mels))
            assert logits.shape == (2, num_classes)
            assert logits.dtype == torch.float32
            assert torch.isfinite(logits).all()


@pytest.mark.parametrize("name", MODELS)
def test_a_clip_does_not_see_its_neighbours(name: str) -> None:
    model = settled(name)
    x, _ = batch()
    alone = torch.cat([model(clip[None]) for clip in x])
    torch.testing.assert_close(model(x), alone, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(alone[0], alone[1], atol=1e-4), "the clips have to differ"


@pytest.mark.parametrize("name", MODELS)
def test_autocast_stays_close_and_gives_float32(name: str) -> None:
    """Measured: 0.2 to 4 % of the logits; eight bits of significand are 0.4 % each time."""
    model = settled(name, num_classes=50)
    x, _ = batch()
    exact, exact_embedding = model(x), model.embed(x)
    with torch.autocast("cpu", torch.bfloat16):
        logits, embedding = model(x), model.embed(x)
    for got, want in ((logits, exact), (embedding, exact_embedding)):
        assert got.dtype == torch.float32
        assert not torch.equal(got, want), "autocast did not reach the model"
        assert (got - want).norm() < 0.08 * want.norm()


@pytest.mark.parametrize("name", MODELS)
def test_embedding_is_the_vector_before_the_classifier(name: str) -> None:
    model = small(name).eval()
    x, _ = batch()
    embedding = model.embed(x)
    assert embedding.shape == (3, model.embedding_size)
    assert embedding.dtype == torch.float32
    if isinstance(model, FrameModel):  # every class pools the frames its own way
        frames = model.frames(x)
        torch.testing.assert_close(embedding, frames.mean(1))
        torch.testing.assert_close(model.head(frames), model(x))
    else:
        torch.testing.assert_close(model.head(embedding), model(x))


@pytest.mark.parametrize("name", WITH_DROPOUT)
def test_dropout_only_in_training(name: str) -> None:
    model = small(name, dropout=0.5)
    x, _ = batch()
    model.eval()
    assert torch.equal(model(x), model(x))
    model.train()
    assert not torch.equal(model(x), model(x))


# -------------------------------------------------------------------------------------- gradients
def has_no_gradient(name: str, model: TaggingModel) -> bool:
    """Whether a parameter's gradient is zero but for rounding, whatever the loss.

    A convolution's bias goes with the mean that BatchNorm subtracts; softmax over time does not
    see the bias that all frames' scores share.
    """
    before_batch_norm = name.startswith("talnet.") and name.endswith("conv.bias")
    return before_batch_norm or (name == "head.fc_att.bias" and model.head.pooling == "att")


@pytest.mark.parametrize("name", MODELS)
def test_gradients_reach_every_parameter(name: str) -> None:
    model = small(name)
    loss_of(model, *batch()).backward()
    for key, p in model.named_parameters():
        assert p.grad is not None and torch.isfinite(p.grad).all(), key
        if has_no_gradient(key, model):
            assert p.grad.abs().max() < 1e-5, key
        elif "qkv.weight" in key:  # queries, keys and values each
            assert all(g.abs().max() > 0 for g in p.grad.chunk(3)), key
        else:
            assert p.grad.abs().max() > 0, key


# -------------------------------------------------------------------------------------------- DDP
@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_ddp_finds_no_unused_parameter(name: str, checkpointing: bool, one_rank: None) -> None:
    """DDP would wait for a parameter without a gradient, and the second step raise."""
    model = small(name, activation_checkpointing=checkpointing)
    parallel = DistributedDataParallel(model, find_unused_parameters=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = [p.detach().clone() for p in model.parameters()]
    for _ in range(2):
        optimizer.zero_grad()
        loss_of(parallel, *batch()).backward()
        assert all(p.grad is not None for p in model.parameters())
        optimizer.step()
    for old, (key, p) in zip(before, model.named_parameters(), strict=True):
        assert has_no_gradient(key, model) or not torch.equal(old, p), key


def half_a_batch(rank: int, store: str, out: str) -> None:
    """One of two ranks: its half of the batch through DDP; rank 0 saves the gradients."""
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = small("transformer")
    x, y = batch(4)
    half = slice(2 * rank, 2 * rank + 2)
    parallel = DistributedDataParallel(model)
    loss_of(parallel, x[half], y[half]).backward()
    if rank == 0:
        torch.save([p.grad for p in model.parameters()], out)
    dist.destroy_process_group()


@pytest.mark.full
def test_two_ranks_average_the_gradient_of_one(tmp_path: Path) -> None:
    spawn(half_a_batch, (f"{tmp_path}/store", f"{tmp_path}/grads"), nprocs=2)
    torch.manual_seed(0)
    model = small("transformer")
    x, y = batch(4)
    loss_of(model, x, y).backward()
    averaged = torch.load(tmp_path / "grads")
    for p, grad in zip(model.parameters(), averaged, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=1e-4, atol=1e-6)


# ------------------------------------------------------------------------ activation checkpointing
class Step:
    """One step's forward and backward pass: what it leaves, what it kept, what it computed."""

    def __init__(self, name: str, checkpointing: bool, autocast: bool, **options: Any) -> None:
        torch.manual_seed(0)
        model = small(name, activation_checkpointing=checkpointing, **options)
        assert model.checkpointing == checkpointing
        self.kept: dict[int, int] = {}
        """Bytes that wait for the backward pass, by address; weights not counted."""
        calls = []
        weights = {p.data_ptr() for p in model.parameters()}
        for module in model.modules():
            if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d)):
                module.register_forward_pre_hook(lambda *_: calls.append(1))

        def keep(x: Tensor) -> Tensor:
            storage = x.untyped_storage()
            if x.data_ptr() not in weights:
                self.kept[storage.data_ptr()] = storage.nbytes()
            return x

        x, y = batch(8)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = loss_of(model, x, y)
        loss.backward()
        grads = {key: p.grad for key, p in model.named_parameters()}
        buffers = {key: b.clone() for key, b in model.named_buffers()}
        self.left = {"loss": loss.detach(), **grads, **buffers}
        self.calls = len(calls)
        """Products and convolutions, forward and again."""
        # Hooks switch autograd's check for modified tensors off: after the step, not around it.
        with saved_tensors_hooks(keep, lambda x: x):
            loss_of(model, x, y)


@pytest.mark.parametrize("name", MODELS)
def test_logits_do_not_tie_under_autocast(name: str) -> None:
    """Clips are ranked by their logits: float32 has more of them than bfloat16."""
    model = small(name).eval()
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        logits = model(torch.randn(4, 64, 64))
    assert logits.dtype == torch.float32
    assert (logits != logits.bfloat16().float()).float().mean() > 0.9


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", MODELS)
def test_checkpointing_changes_nothing_but_memory(name: str, autocast: bool) -> None:
    """Same loss, gradients, BatchNorm statistics and counts of batches, with dropout too."""
    options = {"dropout": 0.3} if name in WITH_DROPOUT else {}
    kept = Step(name, False, autocast, **options)
    again = Step(name, True, autocast, **options)
    torch.testing.assert_close(again.left, kept.left, rtol=0, atol=0)
    assert sum(again.kept.values()) < sum(kept.kept.values()) / 2
    assert again.calls > 1.5 * kept.calls


# ------------------------------------------------------------------------------------- bad options
@pytest.mark.parametrize("name", ["transformer", "conformer", "ast"])
def test_a_clip_of_too_few_frames(name: str) -> None:
    with pytest.raises(ValueError, match="frames"):
        small(name).eval()(torch.randn(1, 3, 64))


ONE_OF_THE_POOLINGS = "pooling must be one of att, max, ave, lin, exp, sigatt, got 'median'"


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("ast", {"fstride": 0}, "fstride must be in 1..16, got 0"),
        ("ast", {"tstride": 17}, "tstride must be in 1..16, got 17"),
        ("ast", {"fstride": "ten"}, "fstride must be an integer, got 'ten'"),
        ("ast", {"tstride": 10.5}, "tstride must be an integer, got 10.5"),
        ("ast", {"fstride": True}, "fstride must be an integer, got True"),
        ("ast", {"num_mels": 8}, "smaller, 8 mels x 64 frames"),
        ("ast", {"num_frames": 8}, "smaller, 64 mels x 8 frames"),
        ("ast", {"size": "huge"}, "size must be one of tiny224, .* got 'huge'"),
        ("ast", {"num_layers": 0}, "num_layers must be in 1..12, got 0"),
        ("ast", {"num_layers": 13}, "num_layers must be in 1..12, got 13"),
        ("ast", {"stride": 10}, "no option 'stride'; did you mean '[ft]stride'"),
        ("transformer", {"num_heads": 5}, "num_heads must divide width 64, got 5"),
        ("transformer", {"num_heads": 0}, "num_heads must divide width 64, got 0"),
        ("transformer", {"num_layers": 0}, "num_layers must be >= 1, got 0"),
        ("transformer", {"width": 0}, "num_heads must divide width 0"),
        ("transformer", {"dropout": 1}, r"dropout must be in \[0, 1\), got 1"),
        ("transformer", {"dropout": "half"}, "dropout must be a number, got 'half'"),
        ("transformer", {"pooling": "median"}, ONE_OF_THE_POOLINGS),
        ("transformer", {"num_frames": 3}, "num_frames must be at least that, got 3"),
        ("transformer", {"num_head": 4}, "no option 'num_head'; did you mean 'num_heads'"),
        ("cnn_trans", {"embeding": 64}, "no option 'embeding'; did you mean 'embedding'"),
        ("cnn_trans", {"embedding": 100}, "embedding of num_mels / 2, got .*embedding=100"),
        ("cnn_trans", {"embedding": 0}, "got num_mels=64, embedding=0"),
        ("cnn_trans", {"dropout": 1}, r"dropout must be in \[0, 1\), got 1"),
        ("cnn_trans", {"input_scale": float("nan")}, "input_scale must be finite, got nan"),
        ("cnn_trans", {"input_scale": "x"}, "input_scale must be a number or null, got 'x'"),
        ("cnn_trans", {"num_heads": 0}, "num_heads must be in 1..64, got 0"),
        ("cnn_trans", {"num_heads": "many"}, "num_heads must be an integer, got 'many'"),
        ("cnn_trans", {"num_layers": 0}, "num_layers must be >= 1, got 0"),
        ("cnn_trans", {"shared": "yes"}, "shared must be true or false, got 'yes'"),
        ("cnn_trans", {"pooling": "median"}, ONE_OF_THE_POOLINGS),
        ("cnn_trans", {"num_mels": 40}, "num_mels must be a multiple of 32 .*num_mels=40"),
        ("cnn_trans", {"num_frames": 2}, "num_frames must be >= 4, got 2"),
        ("cnn_trans", {"num_classes": 0}, "num_classes must be >= 1, got 64, 64 and 0"),
        ("conformer", {"num_heads": 5}, "num_heads must divide width 64, got 5"),
        ("conformer", {"num_layers": 0}, "must be >= 1, got num_layers=0"),
        ("conformer", {"hidden": 0}, "must be >= 1, got num_layers=2, hidden=0"),
        ("conformer", {"dropout": 1}, r"dropout must be in \[0, 1\), got 1"),
        ("conformer", {"num_frames": 3}, "num_frames must be at least that, got 3"),
        ("resnet50", {"pooling": "median"}, ONE_OF_THE_POOLINGS),
        ("resnet50", {"num_frames": 0}, "num_frames and num_classes must be >= 1, got 64, 0 and 5"),
        ("resnet34", {"dropout": 0.1}, "model resnet34 has no option 'dropout'; known: num_mels"),
        ("crnn", {"pooling": "median"}, ONE_OF_THE_POOLINGS),
        ("crnn", {"embedding": 100}, "embedding of num_mels / 2, got .*embedding=100"),
        ("crnn", {"num_frames": 3}, "num_frames must be >= 4, got 3"),
    ],
)
def test_rejects_impossible_options(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        small(name, **options)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cnn_tran", "unknown model 'cnn_tran'; did you mean 'cnn_trans'"),
        ("Ast", "did you mean 'ast'"),
        ("wavenet", "unknown model 'wavenet'; known: ast, transformer,"),
    ],
)
def test_unknown_model_names_the_nearest(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        create_model(name, num_mels=64, num_frames=64, num_classes=5)


def test_sizes_that_no_tensor_has_are_one_line() -> None:
    with torch.device("meta"), pytest.raises(UserError, match="cnn_trans is too large"):
        create_model("cnn_trans", num_mels=64, num_frames=400, num_classes=5, embedding=10**12)
