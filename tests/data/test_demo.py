"""The practice set: its bytes, its formats, its labels, and how hard it is."""

import base64
import csv
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import soxr
import torch
from numpy.random import default_rng
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, roc_auc_score
from sklearn.multiclass import OneVsRestClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from fastat.audio.frontend import Frontend
from fastat.data import practice as demo
from fastat.data.shards import PackedSet
from fastat.data.sounds import SOUNDS, Sound, coloured_noise
from fastat.packing.pack import pack
from fastat.system.errors import UserError

SMALL = (
    demo.Split(name="train", num_clips=40, rarest=2, imbalance=5.0),
    demo.Split(name="eval", num_clips=20, rarest=1, imbalance=3.0),
)
SMALL_CODE = """
import sys
from pathlib import Path
from fastat.data import practice as demo
demo.SPLITS = tuple(demo.Split(**split) for split in {splits!r})
demo.os.cpu_count = lambda: 1
demo.make_demo(Path(sys.argv[1]), 3)
"""

PROBE_CEILING = 0.65


@dataclass(frozen=True)
class Row:
    """A line of a segments CSV, and the file it means."""

    ytid: str
    start: float
    end: float
    labels: list[str]
    path: Path


def read_class_ids(folder: Path) -> list[str]:
    with open(folder / "class_labels_indices.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["index"] for row in rows] == [str(i) for i in range(len(rows))]
    return [row["mid"] for row in rows]


def read_segments(folder: Path, split: str) -> list[Row]:
    """AudioSet's own format: three comment lines, then quoted, comma-separated label ids."""
    text = (folder / f"{split}_segments.csv").read_text()
    lines = text.splitlines()
    assert [line.startswith("#") for line in lines] == [True] * 3 + [False] * (len(lines) - 3)
    assert lines[2] == "# YTID, start_seconds, end_seconds, positive_labels"
    files = {path.stem: path for path in (folder / "audio").iterdir()}
    rows = []
    for ytid, start, end, labels in csv.reader(lines[3:], skipinitialspace=True):
        names = (ytid, f"Y{ytid}", f"{ytid}_{float(start):.0f}", f"{ytid}_{float(start):.0f}000")
        [path] = {files[name] for name in names if name in files}
        rows.append(Row(ytid, float(start), float(end), labels.split(","), path))
    stated = dict(part.strip("# ").split("=") for part in lines[1].split(", "))
    assert int(stated["num_ytids"]) == int(stated["num_segs"]) == len(rows)
    assert int(stated["num_positive_labels"]) == sum(len(row.labels) for row in rows)
    assert int(stated["num_unique_labels"]) == len({mid for row in rows for mid in row.labels})
    return rows


def file_bytes(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The set as users get it, at seed 0."""
    folder = tmp_path_factory.mktemp("demo") / "set"
    demo.make_demo(folder)
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty clips of seed 3, made by another process on one thread."""
    folder = tmp_path_factory.mktemp("small") / "set"
    splits = [vars(split) for split in SMALL]
    subprocess.run(
        [sys.executable, "-c", SMALL_CODE.format(splits=splits), str(folder)],
        check=True,
        env={**os.environ, "PYTHONHASHSEED": "7"},
    )
    return folder


@pytest.fixture
def small_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "SPLITS", SMALL)


# ------------------------------------------------------------------------------- the folder


@pytest.mark.usefixtures("small_splits")
def test_same_seed_same_bytes(small: Path, tmp_path: Path) -> None:
    """Another process, other threads, another hash seed and a later second make no difference."""
    first = min(path.stat().st_mtime for path in (small / "audio").glob("*.wav"))
    while time.time() < first + 1.1:  # or files that hold the second could be the same
        time.sleep(0.1)
    demo.make_demo(tmp_path / "again", seed=3)
    expected, again = file_bytes(small), file_bytes(tmp_path / "again")
    assert sorted(again) == sorted(expected)
    assert [name for name in again if again[name] != expected[name]] == []


@pytest.mark.usefixtures("small_splits")
def test_other_seed_other_bytes(small: Path, tmp_path: Path) -> None:
    demo.make_demo(tmp_path / "other", seed=4)
    seeds = [read_segments(folder, "train") for folder in (small, tmp_path / "other")]
    assert not {row.ytid for row in seeds[0]} & {row.ytid for row in seeds[1]}
    assert [row.labels for row in seeds[0]] != [row.labels for row in seeds[1]]
    contents = [
        set(file_bytes(folder / "audio").values()) for folder in (small, tmp_path / "other")
    ]
    assert not contents[0] & contents[1]


@pytest.mark.usefixtures("small_splits")
def test_finished_set_is_left_as_it_is(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(out: Path, seed: int) -> None:
        raise AssertionError("built again")

    monkeypatch.setattr(demo, "_build", build)
    demo.make_demo(small, seed=3)


@pytest.mark.usefixtures("small_splits")
def test_refuses_what_it_did_not_make(small: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="seed 4"):
        demo.make_demo(small, seed=4)
    with pytest.raises(UserError, match="-1"):
        demo.make_demo(tmp_path / "new", seed=-1)

    (tmp_path / "notes.txt").write_bytes(b"\xff mine")
    with pytest.raises(UserError, match="other files"):
        demo.make_demo(tmp_path, seed=3)
    with pytest.raises(UserError, match="is a file"):
        demo.make_demo(tmp_path / "notes.txt", seed=3)

    damaged = tmp_path / "damaged"
    shutil.copytree(small, damaged)
    next((damaged / "audio").iterdir()).unlink()
    with pytest.raises(UserError, match="expected 60 audio files.*found 59"):
        demo.make_demo(damaged, seed=3)
    assert not (tmp_path / "new").exists()


@pytest.mark.usefixtures("small_splits")
def test_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "_write_float_wav", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        demo.make_demo(tmp_path / "deep" / "set")
    assert list((tmp_path / "deep").iterdir()) == []


@pytest.mark.usefixtures("small_splits")
def test_two_at_once(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that comes second takes the first one's set; a stranger's files stay an error."""

    def overtaken(out: Path, seed: int) -> None:
        shutil.copytree(small, out)
        shutil.copytree(small, tmp_path / "set")

    monkeypatch.setattr(demo, "_build", overtaken)
    demo.make_demo(tmp_path / "set", seed=3)
    assert file_bytes(tmp_path / "set") == file_bytes(small)
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


# ------------------------------------------------------------------------- labels and files


@pytest.mark.parametrize("split", [*demo.SPLITS, *SMALL], ids=lambda split: split.num_clips)
def test_labels_are_dealt_exactly(split: demo.Split) -> None:
    for seed in range(5):
        clips = demo.deal_labels(default_rng(seed), split)
        assert len(clips) == split.num_clips
        assert all(1 <= len(clip) == len(set(clip)) <= 3 for clip in clips)
        counts = Counter(label for clip in clips for label in clip)
        assert [counts[k] for k in range(len(SOUNDS))] == split.counts().tolist()
    assert clips != demo.deal_labels(default_rng(0), split)


def test_full_set_is_what_is_promised(full: Path) -> None:
    ids = read_class_ids(full)
    assert len(ids) == len(set(ids)) >= 16 and ids == [sound.id for sound in SOUNDS]
    train, evaluation = read_segments(full, "train"), read_segments(full, "eval")
    rows = train + evaluation
    assert len(train) >= 250 and len(evaluation) >= 80
    assert len({row.ytid for row in rows}) == len({row.path for row in rows}) == len(rows)
    assert {row.path for row in rows} == set((full / "audio").iterdir())

    counts = [Counter(mid for row in part for mid in row.labels) for part in (train, evaluation)]
    assert set(counts[0]) == set(counts[1]) == set(ids)
    assert min(counts[0].values()) >= 10 and min(counts[1].values()) >= 4
    assert max(counts[0].values()) >= 6 * min(counts[0].values())
    assert {len(row.labels) for row in train} == {1, 2, 3}
    # Classes occur together as chance has it: the number of labels gives no class away.
    alone = [np.mean([len(row.labels) == 1 for row in train if mid in row.labels]) for mid in ids]
    assert max(alone) < 0.6

    infos = [sf.info(row.path) for row in rows]
    assert {info.samplerate for info in infos} == {16000, 22050, 32000, 44100, 48000}
    assert {info.channels for info in infos} == {1, 2}
    assert {(info.format, info.subtype) for info in infos} >= {
        ("WAV", "PCM_16"),
        ("WAV", "FLOAT"),
        ("FLAC", "PCM_16"),
    }
    assert {info.frames / info.samplerate for info in infos} == {4.0}
    assert {row.end - row.start for row in rows} == {4.0}
    forms = set()
    for row in rows:
        names = {"id": row.ytid, "Yid": f"Y{row.ytid}"}
        if row.start:
            names |= {"s": f"{row.ytid}_{row.start:.0f}", "ms": f"{row.ytid}_{row.start:.0f}000"}
        forms |= {form for form, name in names.items() if name == row.path.stem}
    assert forms == {"id", "Yid", "s", "ms"}
    assert all(len(base64.urlsafe_b64decode(row.ytid + "=")) == 8 for row in rows)


def test_samples_are_sound(full: Path) -> None:
    """Finite, unclipped, not silent; stereo files hold two different channels."""
    for row in read_segments(full, "train")[:60]:
        wave, _ = sf.read(row.path, always_2d=True)
        assert np.isfinite(wave).all(), row.path
        assert 0.2 < np.abs(wave).max() < 0.95, row.path
        assert np.sqrt(np.mean(wave**2)) > 1e-3, row.path
        if wave.shape[1] == 2:
            assert np.std(wave[:, 0] - wave[:, 1]) > 1e-5, row.path


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("sound", SOUNDS, ids=lambda sound: sound.id)
def test_each_sound_fills_a_clip(sound: Sound, seed: int) -> None:
    """At any rate: finite, no silence of two seconds, nothing above what 16 kHz can hold."""
    for rate in (16_000, 44_100):
        x = sound.synth(default_rng(seed), rate, 4 * rate)
        assert x.shape == (4 * rate,) and x.dtype == np.float32 and np.isfinite(x).all()
        power = np.square(x).reshape(2, -1).mean(1)
        assert power.min() > 0.02 * power.max()
        if sound.id not in ("/p/white_noise", "/p/pink_noise", "/p/tick"):
            spectrum = np.square(np.abs(np.fft.rfft(x)))
            assert spectrum[32_000:].sum() < 0.01 * spectrum.sum()


def test_noise_has_the_stated_colour() -> None:
    """-3 dB an octave is pink: equal power in every octave; 0 is white: twice as much in each."""
    for db_per_octave in (-6.0, -3.0, 0.0):
        power = np.square(
            np.abs(np.fft.rfft(coloured_noise(default_rng(0), 32_000, 320_000, db_per_octave)))
        )
        octaves = [
            10 * np.log10(power[low : 2 * low].mean()) for low in (5000, 10_000, 20_000, 40_000)
        ]
        assert np.diff(octaves) == pytest.approx(db_per_octave, abs=0.3)


@pytest.mark.usefixtures("small_splits")
def test_goes_through_pack(small: Path, tmp_path: Path) -> None:
    pack(
        small / "train_segments.csv",
        tmp_path / "packed",
        audio=small / "audio",
        labels=small / "class_labels_indices.csv",
        workers=1,
    )
    packed = PackedSet.open(tmp_path / "packed")
    rows = read_segments(small, "train")
    assert packed.num_clips == len(rows) == 40
    assert [info.id for info in packed.classes] == read_class_ids(small)
    assert [info.name for info in packed.classes] == [sound.name for sound in SOUNDS]
    assert packed.label_counts.tolist() == SMALL[0].counts().tolist()
    assert set(packed.num_samples.tolist()) == {64_000}
    packed.close()


# ------------------------------------------------------------------------------ difficulty


class Heard:
    """The full set as the model gets it: log-mels [N, 160, 64] and targets [N, K] of a split."""

    def __init__(self, folder: Path, split: str) -> None:
        ids = read_class_ids(folder)
        rows = read_segments(folder, split)
        waves = np.zeros((len(rows), 64_000), np.float32)
        for wave, row in zip(waves, rows, strict=True):
            samples, rate = sf.read(row.path, dtype="float32", always_2d=True)
            mono = soxr.resample(samples.mean(1), rate, 16_000)[: len(wave)]
            wave[: len(mono)] = mono - mono.mean()
        log_mel = Frontend("logmel64", clip_samples=64_000).log_mel
        # In blocks: clip by clip the front end takes six times as long.
        blocks = [log_mel(block) for block in torch.from_numpy(waves).split(64)]
        self.log_mel: NDArray[np.float32] = torch.cat(blocks).numpy()
        self.target = np.array([[mid in row.labels for mid in ids] for row in rows])
        self.of = {mid: self.target[:, k] for k, mid in enumerate(ids)}


@pytest.fixture(scope="module")
def heard(full: Path) -> dict[str, Heard]:
    return {split: Heard(full, split) for split in ("train", "eval")}


def test_labelled_sounds_can_be_found(heard: dict[str, Heard]) -> None:
    """Simple detectors of what a label means rank the clips that carry it first."""
    clips = heard["train"]
    middle = clips.log_mel[:, 40:120]
    # A sine never stops: the quietest moments of one band stand out of its neighbours'.
    steady = np.percentile(middle, 10, axis=1)
    around = np.lib.stride_tricks.sliding_window_view(
        np.pad(steady, ((0, 0), (3, 3)), "edge"), 7, 1
    )
    line = (steady - np.median(around, axis=2)).max(1)
    # A tick raises the whole treble for one frame, and only now and then.
    rise = np.maximum(np.diff(clips.log_mel[:, :, 40:], axis=1), 0).mean(2)
    tick = np.percentile(rise, 95, axis=1) - np.percentile(rise, 70, axis=1)
    # White noise switches the treble on and off, about half the time each.
    treble = np.sort(middle[:, :, 50:].mean(2), axis=1)
    switched = treble[:, 56] - treble[:, 24]
    for mid, score, least in (
        ("/p/sine_wave", line, 0.9),
        ("/p/tick", tick, 0.9),
        ("/p/white_noise", switched, 0.8),
    ):
        assert roc_auc_score(clips.of[mid], score) > least, mid


def test_average_spectrum_does_not_solve_it(heard: dict[str, Heard]) -> None:
    """A linear probe on time-averaged log-mels learns something, but stays at mAP 0.65 or below."""
    train, evaluation = heard["train"], heard["eval"]
    scores = []
    for strength in (0.01, 0.1, 1.0, 10.0):  # the best by the eval score: in the probe's favour
        probe = make_pipeline(
            StandardScaler(), OneVsRestClassifier(LogisticRegression(C=strength, max_iter=500))
        )
        probe.fit(train.log_mel.mean(1), train.target)
        ranking = probe.decision_function(evaluation.log_mel.mean(1))
        scores.append(average_precision_score(evaluation.target, ranking))
    assert 0.3 < max(scores) <= PROBE_CEILING, scores
