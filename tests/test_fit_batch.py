"""--batch auto: what the memory decides, what the set does, and what a run keeps of it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fastat import fit_batch as fitting
from fastat.config import TrainConfig, resolve
from fastat.data.shards import PackedSet
from fastat.distributed import Ranks
from fastat.errors import Failure, UserError
from fastat.features import FEATURES
from fastat.fit_batch import fit_batch
from fastat.launch import configure_ranks
from fastat.memory import Workload, estimated_bytes
from fastat.models import MODELS
from fastat.procedures import PROCEDURES
from fastat.train import train
from tests.conftest import TINY_MODEL, TinySets, fastat, one_line
from tests.ranks import run_ranks

LARGE = 1_000_000
"""Clips of a set that is not small."""


def config_of(sets: TinySets, num_clips: int = LARGE, **overrides: Any) -> TrainConfig:
    given = {
        "data": str(sets.train),
        "model_options": {"embedding": 64, "num_heads": 4},
    } | overrides
    return resolve("A4", "cnn_trans", given, num_clips=num_clips, clip_seconds=1.0)[0]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets the memory that is free, and the clips that the set is said to have."""

    def make(limit: int, num_clips: int = LARGE) -> None:
        monkeypatch.setattr(fitting, "memory_limit", lambda _: limit)
        monkeypatch.setattr(fitting, "sizes_of", lambda _: (num_clips, 16_000))

    return make


def test_a_large_set_fills_the_memory(tiny_sets: TinySets, machine: Any) -> None:
    config = config_of(tiny_sets)
    work = fitting.workload(config, 16_000, 3)
    limit = estimated_bytes(work, 600)
    machine(limit)
    fitted = fit_batch(config)
    batch = fitted.overrides["batch"]
    assert 580 <= batch <= 600 and batch % 8 == 0
    assert set(fitted.overrides) == {"batch"}
    assert f"{batch:,} clips fit in" in fitted.note
    # in parts: activations of one at a time, waveforms and features of all of them
    parts = fit_batch(replace(config, accumulate=4)).overrides["batch"]
    in_parts = replace(work, accumulate=4)
    assert parts % (4 * 8) == 0
    assert estimated_bytes(in_parts, parts) <= limit < estimated_bytes(in_parts, parts + 2 * 32)


def test_no_batch_is_larger_than_the_set_or_its_rule(tiny_sets: TinySets, machine: Any) -> None:
    machine(16 << 30, num_clips=90_001)  # not small: 2,009 steps
    config = config_of(tiny_sets, num_clips=90_001)
    assert config.batch == 448
    most = fit_batch(config).overrides["batch"]
    assert 448 < most <= 90_001
    machine(16 << 30, num_clips=36)
    small = config_of(tiny_sets, num_clips=36)
    fitted = fit_batch(small)
    assert fitted.overrides["batch"] == small.batch == 4
    assert "no more are taken for a small set (36 clips)" in fitted.note


def test_more_ranks_than_clips_is_the_users_mistake(tiny_sets: TinySets, machine: Any) -> None:
    machine(16 << 30, num_clips=36)
    with pytest.raises(UserError, match="a batch of at most 4, expected one clip or more for each"):
        fit_batch(config_of(tiny_sets, num_clips=36), Ranks(rank=0, size=8))


def test_checkpointing_is_the_last_resort_and_said(tiny_sets: TinySets, machine: Any) -> None:
    config = config_of(tiny_sets, model_options={"embedding": 256, "num_heads": 4})
    work = fitting.workload(config, 16_000, 3)
    machine((estimated_bytes(work, 440) + estimated_bytes(work, 400)) // 2)
    fitted = fit_batch(config)
    assert fitted.overrides["model_options"] == {"activation_checkpointing": True}
    assert fitted.overrides["batch"] == config.batch == 448  # no more than the procedure asks for
    assert "448 with activation checkpointing, which is on" in fitted.note
    machine(1 << 20)
    with pytest.raises(Failure, match="not even 1 clip fits in 0.0 GiB on .*: a smaller model"):
        fit_batch(config)


def test_a_cache_takes_its_part(tiny_sets: TinySets, machine: Any) -> None:
    config = config_of(tiny_sets)
    machine(1 << 30, num_clips=100_000)
    alone = fit_batch(config).overrides["batch"]
    with_cache = replace(config, cache="host", cache_dtype="uint8")  # 244 MiB
    assert fit_batch(with_cache).overrides["batch"] < 0.9 * alone


def smallest_of_two(ranks: Ranks, config: TrainConfig, _: Path) -> int:
    """Rank 1 has less room."""
    work = fitting.workload(config, 16_000, 3)
    room = estimated_bytes(work, 300 if ranks.rank else 600)
    vars(fitting).update(memory_limit=lambda _: room, sizes_of=lambda _: (LARGE, 16_000))
    batch: int = fit_batch(config, ranks).overrides["batch"]
    return batch


@pytest.mark.full
def test_the_rank_with_the_least_room_decides(tiny_sets: TinySets, tmp_path: Path) -> None:
    one, other = run_ranks(2, smallest_of_two, config_of(tiny_sets), tmp_path)
    assert one == other and 2 * 290 <= one <= 2 * 300


def test_the_rate_goes_with_the_batch_and_a_resume_keeps_both(
    tiny_sets: TinySets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"data": tiny_sets.train, "batch": "auto", "model_options": {"embedding": 64}}
    found = fitting.Fitted({"batch": 12, "model_options": {"activation_checkpointing": True}}, "!")
    monkeypatch.setattr(fitting, "fit_batch", lambda config, ranks: found)
    out = tmp_path / "run"
    config, notes = configure_ranks("A4", "cnn_trans", given, out, resume=False)
    assert config.batch == 12 and notes[0] == "!"
    assert config.model_options["activation_checkpointing"] is True
    assert config.model_options["embedding"] == 64
    by_hand, _ = configure_ranks(
        "A4", "cnn_trans", given | {"batch": 12}, tmp_path / "run", resume=False
    )
    assert config.lr == by_hand.lr
    out.mkdir()
    config.save(out / "config.json")
    monkeypatch.setattr(fitting, "fit_batch", lambda *_: pytest.fail("measured again"))
    again, _ = configure_ranks(None, None, {"batch": "auto"}, out, resume=True)
    assert again == config


def test_the_procedures_batch_need_not_be_a_multiple_of_accumulate(
    tiny_sets: TinySets, tmp_path: Path
) -> None:
    """4 clips a step, for a set of 36; in 3 parts, 3 of them."""
    given = {"data": tiny_sets.train, "batch": "auto", "accumulate": 3}
    config, notes = configure_ranks("A4", "cnn_trans", given, tmp_path / "run", resume=False)
    assert config.batch == 3 and notes[0].startswith("batch auto: 3 clips fit in")


def test_auto_on_the_command_line(tiny_sets: TinySets, tmp_path: Path) -> None:
    args = ("train", "--proc", "A4", "--model", "cnn_trans", *TINY_MODEL, "--data", tiny_sets.train)
    done = fastat(*args, "--out", tmp_path / "run", "--batch", "auto", "--steps", 1)
    assert "batch auto: 4 clips fit in" in done.stderr
    assert json.loads((tmp_path / "run" / "config.json").read_text())["batch"] == 4
    done = fastat(*args, "--out", tmp_path / "other", "--batch", "all", code=2)
    assert "--batch takes a number of clips or auto, got 'all'" in one_line(done)


# ------------------------------------------------------------------------------ a warning
def test_a_step_that_does_not_fit_is_warned_of(
    tiny_sets: TinySets, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU, where the system would kill the training."""
    config = config_of(tiny_sets, batch=256)
    needed = estimated_bytes(fitting.workload(config, 16_000, 3), 256)
    packed = PackedSet.open(tiny_sets.train)
    monkeypatch.setattr(fitting, "free_memory", lambda: int(0.9 * needed))
    warning = fitting.memory_warning(config, packed, num_ranks=1)
    assert warning is not None
    assert "256 clips" in warning and f"{needed / 2**30:.1f} GiB" in warning
    assert fitting.memory_warning(config, packed, num_ranks=2) is None
    monkeypatch.setattr(fitting, "free_memory", lambda: int(1.1 * needed))
    assert fitting.memory_warning(config, packed, num_ranks=1) is None


def test_a_run_says_that_it_will_not_fit(
    tiny_sets: TinySets,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = replace(config_of(tiny_sets, num_clips=36), steps=1)
    monkeypatch.setattr(fitting, "free_memory", lambda: 1 << 20)
    train(config, tmp_path / "run", [], resume=False)
    assert "the system may kill this training" in " ".join(capsys.readouterr().err.split())


@pytest.mark.full
@pytest.mark.parametrize("proc", ["A2", "A4"])
@pytest.mark.parametrize("model", [*MODELS, "ast at stride 4"])
def test_what_is_not_estimated_would_fit(model: str, proc: str) -> None:
    """The quick bound is above every estimate."""
    options = {"fstride": 4, "tstride": 4} if "stride" in model else {}
    feature = FEATURES[PROCEDURES[proc].feature]
    work = Workload(
        model=model.split()[0], num_mels=feature.num_mels, num_frames=feature.num_frames(160_000),
        num_classes=527, options=options, clip_samples=160_000,
    )  # fmt: skip
    for batch in (1, 8):
        values = batch * work.num_frames * work.num_mels
        assert estimated_bytes(work, batch) < values * fitting.MOST_BYTES + fitting.WEIGHTS_BYTES
