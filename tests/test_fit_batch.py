"""--batch auto: what the memory decides, what the set does, and what a run keeps of it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastat.config.run import TrainConfig, resolve
from fastat.system.distributed import Ranks
from fastat.system.errors import Failure, UserError
from fastat.training import fit_batch as fitting
from fastat.training.fit_batch import fit_batch
from fastat.training.launch import configure_ranks
from tests.conftest import TINY_MODEL, TinySets, fastat, one_line
from tests.ranks import run_ranks

LARGE = 1_000_000
"""Clips of a set that is not small."""
CLIP_BYTES = 1 << 20
"""What a clip takes on the GPU that these tests pretend to have."""


def config_of(sets: TinySets, num_clips: int = LARGE, **overrides: Any) -> TrainConfig:
    given = {
        "data": str(sets.train),
        "model_options": {"embedding": 64, "num_heads": 4},
    } | overrides
    return resolve("A4", "cnn_trans", given, num_clips=num_clips, clip_seconds=1.0)


def largest(
    config: TrainConfig, device: torch.device, limit: int, *, multiple: int, at_most: int
) -> int | None:
    """Takes the place of the trial on a GPU: every clip needs CLIP_BYTES."""
    batch = min(limit // CLIP_BYTES, at_most) // multiple * multiple
    return batch or None


def pretend_gpu(clips: int, num_clips: int = LARGE) -> dict[str, Any]:
    """What ``fit_batch`` sees of a GPU with room for ``clips``, and a set of ``num_clips``."""
    return {
        "default_device": lambda: torch.device("cuda"),
        "device_name": lambda device: "a GPU",
        "memory_limit": lambda device: clips * CLIP_BYTES,
        "largest_batch": largest,
        "sizes_of": lambda path: (num_clips, 16_000),
    }


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets the room on the GPU, and the clips that the set is said to have."""

    def make(clips: int, num_clips: int = LARGE) -> None:
        for name, value in pretend_gpu(clips, num_clips).items():
            monkeypatch.setattr(fitting, name, value)

    return make


def test_a_large_set_fills_the_memory(
    tiny_sets: TinySets, gpu: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    config = config_of(tiny_sets)
    gpu(601)
    assert fit_batch(config) == 600
    assert "600 clips fit in 0.6 GiB on a GPU" in caplog.text
    assert fit_batch(replace(config, accumulate=4)) == 576, "whole parts of 8 clips"


def test_no_batch_is_larger_than_the_set_or_its_rule(
    tiny_sets: TinySets, gpu: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    gpu(LARGE, num_clips=90_001)  # not small: 2,009 steps
    assert fit_batch(config_of(tiny_sets, num_clips=90_001)) == 90_000
    gpu(LARGE, num_clips=36)
    small = config_of(tiny_sets, num_clips=36)
    assert fit_batch(small) == small.batch == 4
    assert "a small set (36 clips) gets no more" in caplog.text


def test_more_ranks_than_clips_is_the_users_mistake(tiny_sets: TinySets, gpu: Any) -> None:
    gpu(LARGE, num_clips=36)
    with pytest.raises(UserError, match="a batch of at most 4, expected one clip or more for each"):
        fit_batch(config_of(tiny_sets, num_clips=36), Ranks(rank=0, size=8))


def test_nothing_fits(tiny_sets: TinySets, gpu: Any) -> None:
    gpu(0)
    with pytest.raises(Failure, match="not even 1 clip fits in 0.0 GiB on a GPU: a smaller model"):
        fit_batch(config_of(tiny_sets))


def test_a_cache_on_the_device_takes_its_part(tiny_sets: TinySets, gpu: Any) -> None:
    gpu(1024, num_clips=100_000)
    config = config_of(tiny_sets)
    cached = 100_000 * 40 * 64 // CLIP_BYTES  # a byte for every value
    with_cache = replace(config, cache="device", cache_dtype="uint8")
    assert fit_batch(config) == 1024
    assert fit_batch(with_cache) == (1024 - cached - 1) // 8 * 8


def smallest_of_two(ranks: Ranks, config: TrainConfig, _: Path) -> int:
    """Rank 1 has less room."""
    vars(fitting).update(pretend_gpu(304 if ranks.rank else 600))
    return fit_batch(config, ranks)


def test_the_rank_with_the_least_room_decides(tiny_sets: TinySets, tmp_path: Path) -> None:
    assert run_ranks(2, smallest_of_two, config_of(tiny_sets), tmp_path) == [608, 608]


def test_the_rate_goes_with_the_batch_and_a_resume_keeps_both(
    tiny_sets: TinySets,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """And what the procedure's batch would have meant is not logged."""
    caplog.set_level("INFO", "fastat")
    given = {"data": tiny_sets.train, "batch": "auto", "model_options": {"embedding": 64}}
    monkeypatch.setattr(fitting, "check_auto_batch", lambda: None)
    monkeypatch.setattr(fitting, "fit_batch", lambda config, ranks: 12)
    out = tmp_path / "run"
    config = configure_ranks("A4", "cnn_trans", given, out, resume=False)
    assert config.batch == 12
    assert config.model_options["embedding"] == 64
    assert "batch 4" not in caplog.text and "warm-up over 21 steps" in caplog.text
    by_hand = configure_ranks("A4", "cnn_trans", given | {"batch": 12}, out, resume=False)
    assert config.lr == by_hand.lr
    out.mkdir()
    config.save(out / "config.json")
    monkeypatch.setattr(fitting, "fit_batch", lambda *_: pytest.fail("measured again"))
    again = configure_ranks(None, None, {"batch": "auto"}, out, resume=True)
    assert again == config


def test_the_procedures_batch_need_not_be_a_multiple_of_accumulate(
    tiny_sets: TinySets, tmp_path: Path, gpu: Any
) -> None:
    """4 clips a step, for a set of 36; in 3 parts, 3 of them."""
    gpu(LARGE, num_clips=36)
    given = {"data": tiny_sets.train, "batch": "auto", "accumulate": 3}
    config = configure_ranks("A4", "cnn_trans", given, tmp_path / "run", resume=False)
    assert config.batch == 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_auto_on_a_cpu_is_the_users_mistake(tiny_sets: TinySets, tmp_path: Path) -> None:
    args = ("train", "--proc", "A4", "--model", "cnn_trans", *TINY_MODEL, "--data", tiny_sets.train)
    done = fastat(*args, "--out", tmp_path / "run", "--batch", "auto", code=2)
    assert "--batch auto" in one_line(done) and "GPU" in one_line(done)
    assert not (tmp_path / "run").exists()
    done = fastat(*args, "--out", tmp_path / "run", "--batch", "all", code=2)
    assert "--batch must be an integer from 1 on or auto, got 'all'" in one_line(done)
