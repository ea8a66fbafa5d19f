"""Training end to end, from packed rows in the page cache: seven steps with a target each.

Rows are read, copied, mixed, turned into features and trained on, at the procedure's batch, as
``fastat train`` does it; the set is of noise. Beside it, over the same loader and front end: the
same model in a plain loop ("eager": in the same precision on a GPU, in float32 on a CPU), and the
model that a user would pick instead, of as many GFLOP: timm's ViT of the same tokens for the AST,
torchvision's ResNet50 (in the same precision, channels_last and fused Adam in a plain loop,
compiled on a GPU). On a CPU the batches are small.

``python -m bench.compare`` prints them beside their targets, which are for one H200.
"""

import gc
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median
from time import perf_counter

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench.results import DEVICE, FULL, ON_GPU, PRECISION, ceilings, sized, write_row
from bench.steps import (
    LR,
    PEERS,
    Step,
    check_loss,
    created,
    gflop_of,
    plain_step,
    size_of,
    trainer_step,
)
from fastat.audio.frontend import Frontend
from fastat.config.paper import NUM_CLASSES, TABLE_3, TRAIN_CLIPS
from fastat.config.procedures import A1, A3, A4, AST_STRIDE, Procedure
from fastat.data.loader import PackedSource, with_features
from fastat.data.sampler import Sampler, balanced_weights
from fastat.data.shards import PackedSet
from fastat.models.costs import PASSES
from fastat.study.profile.noise import noise_set
from fastat.training.readback import DelayedReadback
from fastat.training.step import StepResult


@dataclass(frozen=True)
class Target:
    """What one H200 is to reach in bf16."""

    model: str
    proc: Procedure
    clips_per_s: float
    aim: float | None = None
    """Beyond the target."""
    paper_hours_per_epoch: float | None = None
    small_batch: int = 4
    """On a CPU."""

    @property
    def batch(self) -> int:
        return self.proc.batch if ON_GPU else self.small_batch

    def __str__(self) -> str:
        return f"{self.model}-{self.proc.name}"


def ast_hours(proc: Procedure) -> float | None:
    return TABLE_3[proc.name][AST_STRIDE[proc.name]].hours_per_epoch


TARGETS = (
    Target("cnn_trans", A4, 10_000, paper_hours_per_epoch=A4.paper_hours / A4.epochs),
    Target("crnn", A4, 9_000),
    Target("resnet50", A4, 8_000),
    Target("conformer", A4, 5_000),
    Target("transformer", A4, 4_000),
    Target("ast", A3, 1_700, aim=2_300, paper_hours_per_epoch=ast_hours(A3), small_batch=2),
    Target("ast", A1, 400, aim=550, paper_hours_per_epoch=ast_hours(A1), small_batch=1),
)
CASES = [(target, impl) for impl in ("ours", "eager") for target in TARGETS]
"""Ours of all models first, as a part of bench/gpu.sh may run out of time."""
CASES += [(target, PEERS[target.model][0]) for target in TARGETS if target.model in PEERS]

NUM_CLIPS = 4096 if ON_GPU else 64
WARM_UP = 10 if ON_GPU else 1
ROUNDS = sized(5, 3)
ROUND_SECONDS = 2.0 if ON_GPU else 1.0 if FULL else 0.5
MAX_STEPS_A_ROUND = 100


@pytest.fixture(autouse=True)
def one_stream() -> None:
    """In place of bench/conftest.py's: the trainer works on the default stream."""


@pytest.fixture(autouse=True)
def memory_given_back() -> Iterator[None]:
    yield
    gc.collect()
    if ON_GPU:
        torch.cuda.empty_cache()


@pytest.fixture(scope="session")
def packed(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[PackedSet]:
    """Clips of noise, in the page cache; a batch where nothing is timed."""
    num_clips = NUM_CLIPS
    if request.config.getoption("benchmark_disable"):
        num_clips = max(target.batch for target in TARGETS)
    directory = tmp_path_factory.mktemp("noise")
    opened = noise_set(directory, num_clips=num_clips)
    yield opened
    opened.close()
    shutil.rmtree(directory)


class Training:
    """Steps one after the other; what it waited for, and how long the front end took."""

    def __init__(self, packed: PackedSet, proc: Procedure, batch: int, step: Step) -> None:
        num_frames, num_mels = size_of(proc)
        self.step = step
        sampler = Sampler(
            packed.num_clips, batch, seed=0, num_frames=num_frames, num_mels=num_mels,
            weights=balanced_weights(packed.target_bits, packed.label_counts), mixup=proc.mixup,
            mixup_alpha=proc.mixup_alpha, time_mask=proc.time_mask, freq_mask=proc.freq_mask,
        )  # fmt: skip
        steps = sampler.steps_per_epoch
        plans = (sampler.plan(i // steps, i % steps) for i in range(10**9))
        self.stream = PackedSource(packed, DEVICE, sampler=sampler).batches(plans)
        frontend = Frontend(proc.feature).to(DEVICE)
        self.batches = with_features(self.stream, frontend, DEVICE)
        self.readback = DelayedReadback(DEVICE)  # keeps the host two steps ahead, as in training
        self.nothing = torch.zeros((), device=DEVICE)
        self.waited, self.in_frontend = 0.0, 0.0

    def run(self, num_steps: int) -> float:
        """The mean loss; on a GPU everything is over when it returns."""
        losses = []
        for step in range(num_steps):
            started = perf_counter()
            batch, features, waited = next(self.batches)
            self.waited += waited
            self.in_frontend += perf_counter() - started - waited
            loss = self.step(features, batch.target)
            taken = StepResult(loss, loss, self.nothing, self.nothing)
            self.readback.put(step, LR, taken, self.nothing)
            losses += [seen.loss for seen in self.readback.due()]
        losses += [seen.loss for seen in self.readback.due(wait=True)]
        return sum(losses) / num_steps

    def close(self) -> None:
        self.stream.close()


def prepared(target: Target, impl: str) -> Step:
    """The step of a model that was shown to be right."""
    torch.manual_seed(0)
    proc = target.proc
    if impl in ("ours", "eager"):
        model = created(target.model, proc).to(DEVICE).train()
    else:
        make = PEERS[target.model][1]
        model = make(proc).to(DEVICE).train()
        ours = gflop_of(lambda: created(target.model, proc), proc)
        assert gflop_of(lambda: make(proc), proc) == pytest.approx(ours, rel=0.03)
    if impl == "eager":
        return plain_step(model, PRECISION if ON_GPU else "fp32")
    model.to(memory_format=torch.channels_last)
    features = torch.randn(min(target.batch, 16), *size_of(proc), device=DEVICE)
    labels = torch.rand(len(features), NUM_CLASSES, device=DEVICE) < 0.01
    check_loss(model, features, labels.float())
    if ON_GPU:
        model.compile()
    return trainer_step(model) if impl == "ours" else plain_step(model, PRECISION, fused=True)


@pytest.mark.parametrize("target, impl", CASES, ids=lambda value: str(value).replace(" ", "-"))
def test_target(
    benchmark: BenchmarkFixture,
    packed: PackedSet,
    target: Target,
    impl: str,
) -> None:
    shape = f"{target.proc.name} batch {target.batch}"
    benchmark.group = f"steps: {target.model} {shape}"
    training = Training(packed, target.proc, target.batch, prepared(target, impl))
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()  # here: a captured step takes its memory once
    for _ in range(WARM_UP):  # compiled, captured
        started = perf_counter()
        assert math.isfinite(training.run(1))
        last = perf_counter() - started
    if benchmark.disabled:
        training.close()
        return
    num_steps = int(ROUND_SECONDS / last)
    num_steps = max(1, min(MAX_STEPS_A_ROUND, num_steps))
    training.waited = training.in_frontend = 0.0
    loss = benchmark.pedantic(training.run, (num_steps,), rounds=ROUNDS)
    training.close()
    assert math.isfinite(loss)

    times = benchmark.stats.stats.data
    seconds = median(times) / num_steps
    gflop = PASSES * gflop_of(lambda: created(target.model, target.proc), target.proc)
    clips_per_s = target.batch / seconds
    more: dict[str, float | None] = {
        "clips_per_s": clips_per_s,
        "percent_of_ceiling": 100 * clips_per_s * gflop * 1e9 / ceilings()["flop_per_s"],
        "hours_per_epoch": TRAIN_CLIPS / clips_per_s / 3600,
        "paper_hours_per_epoch": target.paper_hours_per_epoch,
        "data_wait_percent": 100 * training.waited / sum(times),
        "target_clips_per_s": target.clips_per_s,
        "aim_clips_per_s": target.aim,
    }
    if ON_GPU:
        more["peak_mib"] = torch.cuda.max_memory_allocated() / 2**20
    else:  # elsewhere the host only launches it
        more["frontend_percent"] = 100 * training.in_frontend / sum(times)
    row = write_row(
        area="steps", op=f"{target.model} {target.proc.name}", impl=impl, shape=shape,
        passes="train", ms=1e3 * seconds, ms_min=1e3 * min(times) / num_steps, **more,
    )  # fmt: skip
    benchmark.extra_info.update(row)
