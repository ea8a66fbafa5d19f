"""The cached source against the packed one, its ranks, its memory, and what is damaged."""

import json
import shutil
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import soundfile as sf
import torch
from torch import Tensor

from fastat.audio.features import FEATURES
from fastat.audio.frontend import Augment, Frontend
from fastat.config.run import resolve
from fastat.data import cache
from fastat.data.cache import CachedSource, TooLittleMemory
from fastat.data.codes import decode, encode, log_floor, mix
from fastat.data.loader import Batch, PackedSource, evaluation_plans
from fastat.data.sampler import Sampler, StepPlan
from fastat.data.shards import PackedSet
from fastat.packing.pack import pack
from fastat.system.display import StatusDisplay
from fastat.system.distributed import ALONE, Ranks
from fastat.system.errors import Failure, RankZeroFailed, UserError
from fastat.training.trainer import Trainer
from tests.conftest import TinySets
from tests.data.audio import noise
from tests.ranks import run_ranks

CPU = torch.device("cpu")
CLIP = 16_000  # one second
SECONDS = (1.0, 0.7, 0.31, 1.0, 0.03, 1.0, 0.99)
NUM_CLIPS = 21
SLACK = 1e-4
"""What float32 and the company in a batch may add to an error of rounding."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of clips of several lengths and levels; one is silent, one has silence inside."""
    root = tmp_path_factory.mktemp("ragged")
    for i in range(NUM_CLIPS):
        x = noise(SECONDS[i % len(SECONDS)], 16_000, i) * 10 ** -(i % 4)
        if i == 3:
            x[4_000:9_000] = 0
        if i == 5:
            x[:] = 0
        path = root / "audio" / "abc"[i % 3] / f"{i}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        sf.write(path, x, 16_000, "PCM_16")
    pack(root / "audio", root / "set", clip_seconds=CLIP / 16_000, workers=1)
    return root / "set"


def cached(packed: PackedSet, feature: str, **options: Any) -> CachedSource:
    return CachedSource(packed, feature, CPU, **({"place": "host", "dtype": "float16"} | options))


def training_plans(packed: PackedSet, mixup: float, num_steps: int = 4) -> list[StepPlan]:
    sampler = Sampler(
        packed.num_clips,
        10,
        seed=1,
        num_frames=40,
        num_mels=64,
        mixup=mixup,
        time_mask=8,
        freq_mask=9,
    )
    return [sampler.plan(*divmod(i, sampler.steps_per_epoch)) for i in range(num_steps)]


def log_mels(packed: PackedSet, feature: str) -> Tensor:
    """[N, T, F]: every clip of the packed source, un-augmented; padding at the floor."""
    frontend = Frontend(feature, clip_samples=packed.clip_samples, normalize=False)
    (batch,) = PackedSource(packed, CPU).batches(
        evaluation_plans(np.arange(packed.num_clips), packed.num_clips)
    )
    x = batch.features(frontend)
    real = frontend.feature.real_frames(batch.num_samples, packed.clip_samples)
    padding = torch.arange(x.shape[1]) >= real[:, None]
    return x.masked_fill(padding[:, :, None], log_floor(frontend.feature))


def rounding_bound(log_mel: Tensor, dtype: str, floor: float) -> Tensor:
    """How far each value may be from what is kept of it: half a step."""
    if dtype == "float16":
        return log_mel.abs() * 2.0**-11 + SLACK
    bounds = []
    for clip in log_mel:
        sound = clip[clip > floor + 2e-3]
        span = (sound.max() - sound.min()).item() if len(sound) else 0.0
        bounds.append(torch.full_like(clip, span / 254 / 2 + SLACK + 2e-3))
    return torch.stack(bounds)


@pytest.mark.parametrize("dtype", ["float16", "uint8"])
@pytest.mark.parametrize("feature", ["logmel64", "fbank128"])
def test_unmixed_features_are_the_packed_sources(folder: Path, feature: str, dtype: str) -> None:
    """Padding, masks, normalisation, order, targets; steps of training and a ragged evaluation."""
    packed = PackedSet.open(folder)
    frontend = Frontend(feature, clip_samples=CLIP, mean=-30.0, std=7.0)
    bound = rounding_bound(log_mels(packed, feature), dtype, log_floor(FEATURES[feature]))
    plans = [*training_plans(packed, 0.0), *evaluation_plans(np.arange(NUM_CLIPS), 8)]
    for place in ("host", "device"):
        got = cached(packed, feature, place=place, dtype=dtype).batches(plans)
        for batch, want in zip(got, PackedSource(packed, CPU).batches(plans), strict=True):
            assert_same_but_features(batch, want)
            error = (batch.features(frontend) - want.features(frontend)).abs()
            assert (error <= bound[torch.from_numpy(batch.rows)] / (2 * 7.0)).all()


def assert_same_but_features(batch: Batch, want: Batch) -> None:
    assert np.array_equal(batch.rows, want.rows)
    assert torch.equal(batch.target, want.target)
    assert torch.equal(batch.num_samples, want.num_samples[: len(want.rows)])
    assert batch.augment is not None and want.augment is not None
    assert all(torch.equal(a, b) for a, b in zip(batch.augment, want.augment, strict=True))


@pytest.mark.parametrize("feature", ["logmel64", "fbank128"])
def test_mixing_adds_mel_powers(folder: Path, feature: str) -> None:
    """Short clips into long ones and the reverse, silence, and a clip into itself."""
    packed = PackedSet.open(folder)
    per_neper = 10 / np.log(10) if feature == "logmel64" else 1.0
    power = np.exp(log_mels(packed, feature).double().numpy() / per_neper)
    plans = training_plans(packed, 0.6)
    assert sum(len(plan.partners) for plan in plans) > 15
    wanted = PackedSource(packed, CPU).batches(plans)
    for plan, batch, want in zip(
        plans, cached(packed, feature).batches(plans), wanted, strict=True
    ):
        assert_same_but_features(batch, want)
        expected = power[plan.rows]
        for partner, i, lam in zip(plan.partners, plan.mix_into, plan.lam.tolist(), strict=True):
            expected[i] = lam**2 * expected[i] + (1 - lam) ** 2 * power[partner]
        expected = per_neper * np.log(np.maximum(expected, FEATURES[feature].floor))
        assert batch.log_mel is not None
        error = np.abs(batch.log_mel.numpy() - expected)
        assert error.max() <= (2.0**-5 if feature == "logmel64" else 2.0**-8) + 1e-3


def test_mixing_ends_with_either_clip() -> None:
    feature = FEATURES["logmel64"]
    log_mel = torch.tensor([-100.0, -20.0, 30.0]).repeat(4, 5, 1) + torch.arange(4.0)[:, None, None]
    into, none = torch.tensor([1, 0]), torch.zeros(2, 2, dtype=torch.int64)
    got = mix(log_mel, Augment(into, torch.tensor([1.0, 0.0]), none, none), feature)
    torch.testing.assert_close(got, log_mel[[3, 1]])


def test_eight_bits_keep_silence_apart() -> None:
    floor = -100.0
    clip = torch.linspace(-40.0, 11.0, 60).view(1, 6, 10)
    with_silence = clip.clone()
    with_silence[:, :2] = floor
    for log_mel in (clip, with_silence, torch.full((1, 6, 10), floor), torch.full((1, 6, 10), 3.0)):
        codes, scales = encode(log_mel, torch.uint8, floor)
        error = (decode(codes, scales, floor) - log_mel).abs()
        assert error.max() <= 51.0 / 254 / 2 + 1e-4
        assert torch.equal(codes == 0, log_mel == floor)


def test_nothing_is_read_once_it_is_full(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "set"
    shutil.copytree(folder, copy)
    packed = PackedSet.open(copy)
    source, plans = cached(packed, "logmel64", dtype="uint8"), training_plans(packed, 0.5)
    want = [batch.log_mel for batch in source.batches(plans)]
    shutil.rmtree(copy)
    got = [batch.log_mel for batch in source.batches(plans)]
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))  # type: ignore[arg-type]


def test_only_the_rows_asked_for(folder: Path) -> None:
    packed = PackedSet.open(folder)
    rows = np.array([7, 2, 20, 11, 3])
    source = cached(packed, "logmel64", rows=rows)
    assert len(source.codes) == 5 and np.flatnonzero(source.usable).tolist() == sorted(rows)
    plans = list(evaluation_plans(rows, 2))
    want = torch.cat([b.log_mel for b in cached(packed, "logmel64").batches(plans)])  # type: ignore[misc]
    got = torch.cat([b.log_mel for b in source.batches(plans)])  # type: ignore[misc]
    torch.testing.assert_close(got, want, rtol=2.0**-10, atol=1e-3)
    with pytest.raises(ValueError, match=r"usable ones, got \[8\]"):
        list(source.batches(evaluation_plans(np.array([7, 8]), 2)))


def damage(folder: Path, copy: Path, rows: list[int]) -> PackedSet:
    """A copy of a set with one sample of each of ``rows`` changed."""
    shutil.copytree(folder, copy)
    first = 0
    for path in sorted(copy.glob("shard-*.h5")):
        with h5py.File(path, "r+") as file:
            end = first + len(file["waveform"])
            for row in rows:
                if first <= row < end:
                    file["waveform"][row - first, 100] ^= 1
            first = end
    return PackedSet.open(copy)


def test_damaged_rows_are_left_out_and_named(folder: Path, tmp_path: Path) -> None:
    packed = damage(folder, tmp_path / "set", [4, 13])
    source = cached(packed, "logmel64", max_bad=0.1)
    assert np.flatnonzero(~source.usable).tolist() == [4, 13] == sorted(source.bad)
    assert set(source.bad.values()) == {"its checksum differs"}
    clip = packed.names(np.array([4]))[0]
    assert "2 damaged clips are left out, the first: " in source.summary()
    assert f"shard-00001.h5: row 1 (clip {clip}) is damaged" in source.summary()
    good = np.flatnonzero(source.usable)
    for batch in source.batches(evaluation_plans(good, 8)):
        assert batch.log_mel is not None
        want = log_mels(PackedSet.open(folder), "logmel64")[torch.from_numpy(batch.rows)]
        torch.testing.assert_close(batch.log_mel, want, rtol=2.0**-10, atol=1e-3)
    with pytest.raises(ValueError, match=r"usable ones, got \[13\]"):
        list(source.batches(evaluation_plans(np.array([1, 13]), 2)))


def test_too_many_damaged_rows_are_a_failure(folder: Path, tmp_path: Path) -> None:
    packed = damage(folder, tmp_path / "set", [4, 13])
    of_a_row = r"shard-0000\d\.h5: row \d+ \(clip .*\.wav\)"
    with pytest.raises(Failure, match=f"2 of 21 clips .* --max-bad 0.09; the last: .*{of_a_row}"):
        cached(packed, "logmel64", max_bad=0.09)
    with pytest.raises(Failure, match=f"^[^ ]*{of_a_row}"):
        cached(packed, "logmel64")


def test_what_does_not_fit_is_refused_before_it_is_computed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = PackedSet.open(folder)
    monkeypatch.setattr(packed, "read_rows", None)
    needed = NUM_CLIPS * (40 * 64 * 2 + 8)
    monkeypatch.setattr(cache, "free_bytes", lambda *_: needed - 1)
    with pytest.raises(UserError) as error:
        cached(packed, "logmel64")
    message = str(error.value)
    assert "0.1 MiB of host memory for 21 clips" in message and "\n" not in message
    assert "what fits: --set cache_dtype=uint8" in message
    with pytest.raises(TooLittleMemory, match="what fits: no cache"):
        monkeypatch.setattr(cache, "free_bytes", lambda *_: 5)
        cached(packed, "logmel64")


def test_ranks_of_a_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = cache.free_bytes("host", CPU)
    assert whole > 0
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert 0.5 < 4 * cache.free_bytes("host", CPU) / whole < 2


# ------------------------------------------------------------------------------------ two ranks
def of_rank(ranks: Ranks, folder: str, damaged: str) -> dict[str, Any]:
    """What one of two ranks gets: its batches, the damaged rows, and a refusal."""
    found: dict[str, Any] = {}
    for feature, dtype in (("logmel64", "float16"), ("fbank128", "uint8")):
        packed = PackedSet.open(folder)
        source = cached(packed, feature, dtype=dtype, ranks=ranks)
        batches = list(source.batches(training_plans(packed, 0.6)))
        found[feature] = {
            "kept": len(source.codes),
            "rows": [batch.rows for batch in batches],
            "target": [batch.target.numpy() for batch in batches],
            "log_mel": [batch.log_mel.numpy() for batch in batches if batch.log_mel is not None],
            "time_mask": [batch.augment.time_mask.numpy() for batch in batches if batch.augment],
        }
    source = cached(PackedSet.open(damaged), "logmel64", max_bad=0.1, ranks=ranks)
    found["unusable"] = np.flatnonzero(~source.usable).tolist()
    if ranks.rank == 1:
        cache.free_bytes = lambda place, device: 0
    with pytest.raises(TooLittleMemory if ranks.first else RankZeroFailed):
        cached(PackedSet.open(folder), "logmel64", ranks=ranks)
    return found


def test_two_ranks_get_the_halves_of_one_ranks_batches(folder: Path, tmp_path: Path) -> None:
    damage(folder, tmp_path / "set", [4, 13])
    first, second = run_ranks(2, of_rank, str(folder), str(tmp_path / "set"))
    packed = PackedSet.open(folder)
    for feature, dtype in (("logmel64", "float16"), ("fbank128", "uint8")):
        assert (first[feature]["kept"], second[feature]["kept"]) == (11, 10)
        batches = cached(packed, feature, dtype=dtype).batches(training_plans(packed, 0.6))
        for i, want in enumerate(batches):
            got = {
                name: np.concatenate([first[feature][name][i], second[feature][name][i]])
                for name in ("rows", "target", "log_mel", "time_mask")
            }
            assert want.augment is not None and want.log_mel is not None
            assert np.array_equal(got["rows"], want.rows)
            assert np.array_equal(got["target"], want.target)
            assert np.array_equal(got["time_mask"], want.augment.time_mask)
            # Log-mels computed in another batch may round to the neighbouring code.
            step = 2.0**-4 if dtype == "float16" else 0.1
            np.testing.assert_allclose(got["log_mel"], want.log_mel, rtol=0, atol=step)
    assert first["unusable"] == second["unusable"] == [4, 13]


# ------------------------------------------------------------------------------------- training
def trainer(
    sets: TinySets, run: Path, ranks: Ranks = ALONE, *, resume: bool = False, **overrides: Any
) -> Trainer:
    """A tiny run of two epochs of four steps, not yet started."""
    given = {
        "data": str(sets.train),
        "eval": str(sets.eval),
        "epochs": 2,
        "batch": 8,
        "rank_timeout": 100.0,
        "model_options": {"embedding": 64, "num_heads": 4, "dropout": 0.0},
    }
    config = resolve("A4", "cnn_trans", given | overrides, num_clips=36, clip_seconds=1.0)
    return Trainer(config, run, StatusDisplay(shown=ranks.first), resume=resume, ranks=ranks)


def learned(run: Path) -> list[tuple[float, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["train_loss"], line["eval_loss"]) for line in lines]


def test_training_from_the_cache(
    tiny_sets: TinySets, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Close to the packed rows without mixup; resumed in mid-epoch, the same run."""
    caplog.set_level("INFO")
    trainer(tiny_sets, tmp_path / "packed", mixup=0.0).run_epochs()
    trainer(tiny_sets, tmp_path / "cached", mixup=0.0, cache="device").run_epochs()
    want, got = learned(tmp_path / "packed"), learned(tmp_path / "cached")
    np.testing.assert_allclose(got, want, rtol=0.01)
    assert got != want

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options: dict[str, Any] = {"cache": "host", "cache_dtype": "uint8"}
    run = trainer(tiny_sets, whole, **options)
    assert "approximation of mixing waveforms" in caplog.text
    assert "log-mels of 36 of 36 clips as uint8" in caplog.text
    run.run_epochs()
    trainer(tiny_sets, parts, steps=6, **options).run_epochs()
    trainer(tiny_sets, parts, resume=True, **options).run_epochs()
    assert learned(parts)[0] == learned(whole)[0] and learned(parts)[-1] == learned(whole)[-1]


OF_MANY: dict[str, Any] = {
    "cache": "host", "precision": "fp32", "sync_batchnorm": True, "steps": 3,
}  # fmt: skip


def train_on_ranks(ranks: Ranks, sets: TinySets, run: Path) -> None:
    trainer(sets, run, ranks, **OF_MANY).run_epochs()


def test_two_ranks_train_as_one(tiny_sets: TinySets, tmp_path: Path) -> None:
    """The evaluation set's 15 clips are cached in stretches of 8 and 7."""
    trainer(tiny_sets, tmp_path / "one", **OF_MANY).run_epochs()
    run_ranks(2, train_on_ranks, tiny_sets, tmp_path / "two")
    (want,), (got,) = learned(tmp_path / "one"), learned(tmp_path / "two")
    # Adam makes whole steps of biases whose gradient is only rounding; BatchNorm undoes them but
    # for its running statistics, which scoring uses.
    assert got[0] == pytest.approx(want[0], rel=1e-4)
    assert got[1] == pytest.approx(want[1], rel=0.02)


def test_an_evaluation_set_that_does_not_fit_is_read_from_disk(
    tiny_sets: TinySets,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    free = iter([2**40, 0, 0])
    monkeypatch.setattr(cache, "free_bytes", lambda *_: next(free))
    run = trainer(tiny_sets, tmp_path / "run", cache="host", mixup=0.0)
    assert isinstance(run.data.source, CachedSource) and isinstance(
        run.data.eval_source, PackedSource
    )
    assert "evaluation set is read from disk: --cache host needs" in caplog.text
    assert "approximation" not in caplog.text
    with pytest.raises(TooLittleMemory):
        trainer(tiny_sets, tmp_path / "other", cache="host")
    assert not (tmp_path / "other").exists()
