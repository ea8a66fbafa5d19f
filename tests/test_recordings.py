"""The whole way on real recordings: pack from their own tables, train a little, score, predict."""

import csv
import json
from pathlib import Path

import pytest

from fastat.data.shards import PackedSet
from tests.conftest import TINY_MODEL, fastat

A4 = ("train", "--proc", "A4", "--model", "cnn_trans", *TINY_MODEL, "--steps", 6, "--batch", 4)


def train_score_predict(train: Path, evaluation: Path, clips: list[Path], run: Path) -> None:
    """Six steps, an evaluation and predictions; every number must be there and finite."""
    fastat(*A4, "--data", train, "--eval", evaluation, "--out", run)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert 0 < lines[-1]["mAP"] <= 1
    scored = json.loads(fastat("eval", run, "--data", evaluation, "--json").stdout)
    assert scored["mAP"] == pytest.approx(max(x["mAP"] for x in lines), abs=1e-9)
    plot = run / "plot.png"
    done = fastat("predict", run, clips[0], "--plot", plot, "--json", "--top", 3)
    (file,) = json.loads(done.stdout)
    known = {c.id for c in PackedSet.open(train).classes}
    tags = file["tags"]
    assert len(tags) == 3 and all(t["id"] in known and 0 <= t["probability"] <= 1 for t in tags)
    assert plot.stat().st_size > 10_000
    table = fastat("predict", run, *clips[:3]).stdout
    assert all(clip.name in table for clip in clips[:3])


def test_esc10_from_its_table(recordings: Path, tmp_path: Path) -> None:
    """44.1 kHz FLAC, five seconds, held out by source."""
    folder = recordings / "esc10"
    args = ("--audio", folder / "audio", "--holdout", 0.25, "--group-by", "source")
    fastat("pack", folder / "esc10.csv", "--out", tmp_path / "esc10", *args)
    train, held_out = PackedSet.open(tmp_path / "esc10"), PackedSet.open(tmp_path / "esc10-eval")
    assert train.num_clips + held_out.num_clips == 80 and len(train.classes) == 10
    assert set(train.num_samples) == {80_000}
    clips = sorted((folder / "audio").glob("*.flac"))
    train_score_predict(tmp_path / "esc10", tmp_path / "esc10-eval", clips, tmp_path / "run")


def test_spoken_digits_from_folders(recordings: Path, tmp_path: Path) -> None:
    """8 kHz WAV, half a second; five speakers to train on, the sixth to test."""
    for path in sorted((recordings / "fsdd" / "audio").glob("*.wav")):
        digit, speaker, _ = path.stem.split("_")
        split = "eval" if speaker == "theo" else "train"
        link = tmp_path / split / digit / path.name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path)
    seconds = ("--clip-seconds", 1)
    fastat("pack", tmp_path / "train", "--out", tmp_path / "packed", *seconds)
    other = ("--classes-from", tmp_path / "packed", *seconds)
    fastat("pack", tmp_path / "eval", "--out", tmp_path / "packed-eval", *other)
    assert PackedSet.open(tmp_path / "packed").num_clips == 600
    assert PackedSet.open(tmp_path / "packed-eval").num_clips == 120
    clips = sorted((recordings / "fsdd" / "audio").glob("*_theo_*.wav"))
    train_score_predict(tmp_path / "packed", tmp_path / "packed-eval", clips, tmp_path / "run")


def test_audioset_clip_from_its_segments(recordings: Path, tmp_path: Path) -> None:
    """The one clip there is of AudioSet's evaluation table, under all 527 classes."""
    folder = recordings / "audioset"
    lines = (folder / "eval_segments.csv").read_text().splitlines()
    wanted = [x for x in lines if x.startswith("#") or x.startswith("--BfvyPmVMo,")]
    table = tmp_path / "segments.csv"
    table.write_text("\n".join(wanted) + "\n")
    labels = ("--labels", folder / "class_labels_indices.csv")
    fastat("pack", table, "--audio", folder, "--out", tmp_path / "clip", *labels)
    packed = PackedSet.open(tmp_path / "clip")
    assert packed.num_clips == 1 and len(packed.classes) == 527
    with (folder / "class_labels_indices.csv").open() as file:
        mids = [row["mid"] for row in csv.DictReader(file)]
    (targets,) = packed.targets([0])  # type: ignore[arg-type]
    assert [mids[k] for k in targets.nonzero()[0]] == ["/m/03l9g"]

    run = tmp_path / "run"
    more = ("--data", tmp_path / "clip", "--eval", tmp_path / "clip", "--out", run, "--batch", 1)
    done = fastat(*A4, *more)
    assert "(1 of 527 classes scored)" in done.stderr
    fastat("predict", run, folder / "--BfvyPmVMo.wav")
