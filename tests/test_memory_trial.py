"""The search for the largest batch, and the trial that takes steps for it."""

import json
from contextlib import closing
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastat.config.run import TrainConfig, resolve
from fastat.data.shards import PackedSet
from fastat.models.cnn_trans import CnnTransformer
from fastat.system.errors import Failure
from fastat.training import fit_batch, memory_trial
from fastat.training.data import model_meta
from fastat.training.fit_batch import largest_batch
from fastat.training.memory_trial import search
from tests.conftest import TinySets

CPU = torch.device("cpu")


def config_of(sets: TinySets, **overrides: Any) -> TrainConfig:
    given = {"data": str(sets.train), "precision": "bf16"} | overrides
    return resolve("A4", "cnn_trans", given, num_clips=36, clip_seconds=1.0)


# ------------------------------------------------------------------------------ the search
@pytest.mark.parametrize("limit", [100, 101, 999, 5_000, 123_456])
@pytest.mark.parametrize("multiple", [1, 3, 8])
def test_the_search_finds_the_largest_within_two_percent(limit: int, multiple: int) -> None:
    """Of peaks that are the fuller of two moments, as a step's are."""

    def peak(batch: int) -> int:
        return max(90 + batch, 20 + 3 * batch)

    def measure(batch: int) -> int | None:
        return peak(batch) if peak(batch) <= limit else None

    found = search(measure, limit, multiple=multiple)
    best = max((b for b in range(multiple, 50_000, multiple) if peak(b) <= limit), default=None)
    if best is None:
        assert found is None
    else:
        assert found is not None and peak(found) <= limit and found % multiple == 0
        assert best - found <= max(multiple, 0.02 * best)


def test_the_search_takes_few_trials_and_never_more_than_it_may() -> None:
    tried: list[int] = []

    def measure(batch: int) -> int | None:
        tried.append(batch)
        return 1000 + 10 * batch if 1000 + 10 * batch <= 100_000 else None

    assert search(measure, 100_000, at_most=500, multiple=8) == 496
    assert max(tried) <= 500
    tried.clear()
    found = search(measure, 100_000)
    assert found is not None and 9700 < found <= 9900
    assert len(tried) <= 8
    assert search(measure, 100_000, multiple=16_384) is None
    assert search(measure, 100_000, at_most=3, multiple=8) is None


def test_out_of_memory_below_the_line_is_stepped_down_from() -> None:
    """Torn memory: what the line promises does not fit."""

    def measure(batch: int) -> int | None:
        return 10 * batch if batch <= 700 else None

    found = search(measure, 10_000)
    assert found is not None and 686 <= found <= 700


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: the trial works")
def test_a_trial_that_fails_is_one_line(tiny_sets: TinySets) -> None:
    """The process of its own has no GPU either: what it says last."""
    with pytest.raises(
        Failure, match="^the trial of the memory that a step takes failed: .*NVIDIA"
    ):
        largest_batch(config_of(tiny_sets), torch.device("cuda:0"), 1 << 30)


def test_a_trial_is_told_which_gpu(tiny_sets: TinySets, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the caller means the current one: a limit of memory needs its number."""
    asked: list[str] = []

    def answered(*args: Any, input: str, **more: Any) -> SimpleNamespace:
        asked.append(json.loads(input)["device"])
        return SimpleNamespace(returncode=0, stdout="7\n", stderr="")

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(fit_batch, "subprocess", SimpleNamespace(run=answered))
    for name in ("cuda", "cuda:1"):
        assert largest_batch(config_of(tiny_sets), torch.device(name), 1 << 30) == 7
    assert asked == ["cuda:3", "cuda:1"]


@pytest.mark.parametrize("cache", ["none", "device"])
def test_a_trial_trains_and_scores(
    cache: str, tiny_sets: TinySets, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the CPU, what it does on CUDA: the front end, steps in parts, a batch to score."""
    seen: list[tuple[bool, int]] = []
    forward = CnnTransformer.forward

    def look(self: CnnTransformer, x: torch.Tensor) -> torch.Tensor:
        seen.append((self.training, len(x)))
        return forward(self, x)

    monkeypatch.setattr(CnnTransformer, "forward", look)
    options = {"embedding": 32, "num_heads": 2}
    config = config_of(
        tiny_sets, model_options=options, cache=cache, accumulate=2,
        eval=str(tiny_sets.eval), eval_batch=3,
    )  # fmt: skip
    with closing(PackedSet.open(tiny_sets.train)) as packed:
        meta = model_meta(config, packed)
    trained = [(True, 3)] * 2 * memory_trial.STEPS
    memory_trial.take_steps(config, meta, 6, CPU)
    assert seen == [*trained, (False, 3)]
    seen.clear()
    memory_trial.take_steps(replace(config, eval=None), meta, 6, CPU)
    assert seen == trained


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compiled", [False, True])
def test_the_largest_batch_on_a_gpu_fits(compiled: bool, tiny_sets: TinySets) -> None:
    """Found under a small limit; four times as many clips take more than it. Without the limit the
    allocator keeps some memory that it gave back under it."""
    device, limit = torch.device("cuda"), 4 << 30
    small = config_of(tiny_sets, compile=compiled)
    batch = largest_batch(small, device, limit, multiple=8)
    assert batch is not None and batch >= 8
    with closing(PackedSet.open(tiny_sets.train)) as packed:
        meta = model_meta(small, packed)
    taken, more = (memory_trial.measure(small, meta, n, device) for n in (batch, 4 * batch))
    assert taken is not None and taken <= 1.1 * limit
    assert more is None or more > limit
