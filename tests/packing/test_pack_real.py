"""fastat pack on real recordings: every source form, against soundfile + soxr."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from fastat.packing.pack import pack
from fastat.system.errors import UserError
from tests.packing.test_pack import check_rows


def test_esc10(recordings: Path, tmp_path: Path) -> None:
    """A CSV with filename and category; takes of one source stay together."""
    table = recordings / "esc10" / "esc10.csv"
    summary = pack(
        table, tmp_path / "set", holdout=0.2, group_by="source", clip_seconds=5.0, workers=2
    )
    assert summary.bad == 0 and summary.clips + summary.eval_clips == 80
    train, held = check_rows(tmp_path / "set", 5.0), check_rows(tmp_path / "set-eval", 5.0)
    with table.open() as file:
        source = {line["filename"]: line["source"] for line in csv.DictReader(file)}
    groups = [{source[n] for n in s.names(np.arange(s.num_clips))} for s in (train, held)]
    assert not groups[0] & groups[1]
    assert len(train.classes) == 10
    assert (train.label_counts > 0).all() and (held.label_counts > 0).all()
    assert train.label_counts.sum() + held.label_counts.sum() == 80


def test_fsdd(recordings: Path, tmp_path: Path) -> None:
    """8 kHz, short, grouped by speaker."""
    audio = recordings / "fsdd" / "audio"
    names = sorted(p.name for p in audio.glob("*_[0-3].wav"))
    lines = [f"{n},digit {n.split('_')[0]},{n.split('_')[1]}" for n in names]
    table = tmp_path / "fsdd.csv"
    table.write_text("\n".join(["path,label,speaker", *lines]) + "\n")
    summary = pack(
        table, tmp_path / "set", audio=audio, holdout=0.15, group_by="speaker", clip_seconds=1.0,
        workers=2,
    )  # fmt: skip
    assert summary.clips + summary.eval_clips == len(names) == 240
    train, held = check_rows(tmp_path / "set", 1.0), check_rows(tmp_path / "set-eval", 1.0)
    speakers = [{n.split("_")[1] for n in s.names(np.arange(s.num_clips))} for s in (train, held)]
    assert len(speakers[0]) == 5 and len(speakers[1]) == 1 and not speakers[0] & speakers[1]
    assert (train.label_counts == 20).all() and (held.label_counts == 4).all()


def test_audioset(recordings: Path, tmp_path: Path) -> None:
    """The real evaluation table and class list, with the one clip that is here."""
    folder = recordings / "audioset"
    table, classes = folder / "eval_segments.csv", folder / "class_labels_indices.csv"
    with pytest.raises(UserError, match=r"20,370 of 20,371 files are bad.*20,370 missing"):
        pack(table, tmp_path / "set", audio=folder, labels=classes)
    summary = pack(table, tmp_path / "set", audio=folder, labels=classes, max_bad=1.0, workers=1)
    assert (summary.clips, len(summary.empty_classes)) == (1, 526)
    packed = check_rows(tmp_path / "set", 10.0)
    assert packed.names(np.array([0])) == ["--BfvyPmVMo.wav"]
    assert len(packed.classes) == 527
    assert packed.classes[int(packed.targets(np.array([0])).argmax())].id == "/m/03l9g"


def test_folder_and_ast_forms_agree(recordings: Path, tmp_path: Path) -> None:
    """ESC-10 as a folder of classes (links) and as an AST data file: the same rows and labels."""
    root = recordings / "esc10"
    data = []
    with (root / "esc10.csv").open() as file:
        for line in list(csv.DictReader(file))[:24]:
            path = root / "audio" / line["filename"]
            link = tmp_path / "classes" / line["category"] / line["filename"]
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path)
            data.append({"wav": str(path), "labels": line["category"]})
    (tmp_path / "train.json").write_text(json.dumps({"data": data}))
    found = []
    for source in ("classes", "train.json"):
        out = tmp_path / f"set-{source}"
        pack(tmp_path / source, out, clip_seconds=5.0, workers=2)
        packed = check_rows(out, 5.0)
        every = np.arange(packed.num_clips)
        targets = packed.targets(every)
        names = [Path(name).name for name in packed.names(every)]
        found.append((packed.classes, dict(zip(names, targets.argmax(1).tolist(), strict=True))))
    assert found[0] == found[1] and len(found[0][1]) == 24
