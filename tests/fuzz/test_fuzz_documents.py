"""Damaged JSON documents and tables: a line that names the file, or what another reader finds."""

import csv
import io
import json
import os
import shutil
import types
import typing
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastat.config.run import TrainConfig, resolve
from fastat.data.shards import INDEX_FILE, PackedSet
from fastat.packing.classes import ClassList
from fastat.packing.manifest import read_manifest
from fastat.packing.pack import pack
from fastat.training.run_folder import RunFolder
from tests.data.audio import write_table
from tests.fuzz.child import SPARE_BYTES, error_of, run_cases
from tests.fuzz.documents import JSON, TABLE
from tests.fuzz.mutations import SHARE, Mutant, Mutation, keep, mutate, rng_of

NUM_CASES = 500

Use = Callable[[Path], str | None]
"""Opens the damaged document; says what is wrong with how that goes."""


def check_document(
    path: Path, own: tuple[Mutation, ...], use: Use, numbers: range, family: str | None = None
) -> None:
    """Damages the document at ``path`` once a case; ``use`` must find an error or no difference."""
    data, family = path.read_bytes(), family or path.name

    def mutant(number: int) -> Mutant:
        return mutate(data, rng_of(family, number), own)

    def check(number: int) -> str | None:
        path.write_bytes(mutant(number).data)
        return use(path)

    def undamaged(_: int) -> str | None:
        path.write_bytes(data)
        return use(path)

    usual = run_cases(undamaged, [0])[0]
    assert usual.complaint is None, usual.complaint
    bad = []
    for number, (complaint, peak_bytes) in run_cases(check, numbers).items():
        made = mutant(number)
        # A document may be longer than it was, and is read as text and as objects.
        limit = 2 * usual.peak_bytes + SPARE_BYTES + 100 * len(made.data)
        if complaint is None and peak_bytes > limit:
            complaint = f"{peak_bytes:,} bytes of memory, usual are {usual.peak_bytes:,}"
        if complaint is not None:
            kept = keep(family, number, made.what, complaint, made.data, path.suffix)
            bad.append(f"{kept} ({made.what}): {complaint}")
    path.write_bytes(data)
    assert not bad, "\n".join(bad)


SOME = range(NUM_CASES // SHARE)
ALL = pytest.param(range(NUM_CASES), marks=pytest.mark.full, id="all")
numbers_of_cases = pytest.mark.parametrize("numbers", [pytest.param(SOME, id="some"), ALL])


# ------------------------------------------------------------------------------------ packed set
@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("documents")
    pack(write_table(folder, 8, seconds=0.1), folder / "set", clip_seconds=0.1, workers=1)
    return folder / "set"


@numbers_of_cases
def test_dataset_json(packed: Path, tmp_path: Path, numbers: range) -> None:
    copy = Path(shutil.copytree(packed, tmp_path / "set"))

    def contents(path: Path) -> list[Any]:
        opened = PackedSet.open(path.parent)
        rows = np.arange(opened.num_clips)
        names = [opened.names(rows), opened.classes, opened.stats, opened.fingerprint]
        return [*names, opened.label_counts.tolist(), opened.targets(rows).tolist()]

    original = contents(copy / INDEX_FILE)

    def use(path: Path) -> str | None:
        found: list[Any] = []
        complaint = error_of(lambda: found.extend(contents(path)), names=str(path.parent))
        return "another set, and no error" if found and found != original else complaint

    check_document(copy / INDEX_FILE, JSON, use, numbers)


# ---------------------------------------------------------------------------------------- tables
@pytest.fixture
def audio(tmp_path: Path) -> Path:
    """A folder of files that are there; none is decoded here."""
    folder = tmp_path / "audio"
    folder.mkdir()
    for i in range(12):
        (folder / f"clip{i:07d}.wav").write_bytes(b"x")
    return folder


def check_manifest(path: Path, audio: Path, num_clips: Callable[[str], int]) -> str | None:
    """An error, or every clip of the table that another reader counts, each with its file."""
    found: list[Any] = []
    complaint = error_of(lambda: found.append(read_manifest(path, audio=audio)), names=str(path))
    if complaint is not None or not found:
        return complaint
    manifest, want = found[0], num_clips(path.read_bytes().decode("utf-8-sig"))
    if len(manifest.good) + len(manifest.bad) != want:
        return f"{len(manifest.good)} clips and {len(manifest.bad)} bad ones of {want}"
    if not all(Path(entry.path).is_file() for entry in manifest.good):
        return "an entry without a file"
    labels = [k for entry in manifest.good for k in entry.labels]
    return None if all(0 <= k < len(manifest.classes) for k in labels) else "an unknown class"


def rows_of(text: str) -> list[list[str]]:
    """Rows of a CSV with a cell that is not blank."""
    lines = io.StringIO(text, newline="")
    first = next((line for line in lines if line.strip() and not line.startswith("#")), "")
    delimiter = next((c for c in "\t,;" if c in first), ",")
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True)
    rows = [[cell.strip() for cell in row] for row in reader]
    return [row for row in rows if any(row)]


def count_files(text: str, audio: Path) -> int:
    """Files that the column path names, with or without their extension."""
    header, *rows = rows_of(text)
    names = [row[[cell.lower() for cell in header].index("path")] for row in rows]
    paths = [audio / os.path.normpath(name) for name in names]
    whole = [path.with_name(path.name + ".wav") for path in paths]
    return len(
        {w if not p.exists() and w.exists() else p for p, w in zip(paths, whole, strict=True)}
    )


def count_segments(text: str, audio: Path) -> int:
    """Videos with a file, which has no start in its name, and different segments of the others."""
    rows = [row for row in rows_of(text) if not row[0].startswith("#")]
    segments = {(row[0], float(row[1]), float(row[2])) for row in rows}
    there = {path.stem for path in audio.iterdir()}
    return len({segment[:1] if segment[0] in there else segment for segment in segments})


@numbers_of_cases
def test_csv_of_paths(audio: Path, numbers: range) -> None:
    table = audio.parent / "table.csv"
    names = sorted(path.name for path in audio.iterdir())
    lines = ["path,labels,source"] + [f"{n},{'abc'[i % 3]},s{i % 4}" for i, n in enumerate(names)]
    table.write_text("\n".join(lines) + "\n")
    check_document(
        table,
        TABLE,
        lambda path: check_manifest(path, audio, lambda t: count_files(t, audio)),
        numbers,
    )


@numbers_of_cases
def test_segments_csv(audio: Path, numbers: range) -> None:
    table = audio.parent / "segments.csv"
    head = "# YTID, start_seconds, end_seconds, positive_labels\n"
    lines = [f'clip{i:07d}, {10 * i}.000, {10 * i + 10}.000, "/m/a,/m/b"\n' for i in range(12)]
    table.write_text(head + "".join(lines))

    def use(path: Path) -> str | None:
        return check_manifest(path, audio, lambda text: count_segments(text, audio))

    check_document(table, TABLE, use, numbers)


@numbers_of_cases
def test_ast_data_file(audio: Path, numbers: range) -> None:
    table = audio.parent / "ast.json"
    names = sorted(path.name for path in audio.iterdir())
    clips = [{"wav": name, "labels": "/m/a,/m/b"} for name in names]
    table.write_text(json.dumps({"data": clips}))

    def use(path: Path) -> str | None:
        return check_manifest(path, audio, lambda text: len(json.loads(text)["data"]))

    check_document(table, JSON, use, numbers)


@numbers_of_cases
def test_class_list(tmp_path: Path, numbers: range) -> None:
    table = tmp_path / "classes.csv"
    table.write_text(
        "index,mid,display_name\n" + "".join(f'{i},/m/{i},"Class, {i}"\n' for i in range(9))
    )

    def use(path: Path) -> str | None:
        found: list[ClassList] = []
        complaint = error_of(lambda: found.append(ClassList.from_csv(path)), names=str(path))
        if complaint is not None or not found:
            return complaint
        text = path.read_bytes().decode("utf-8-sig")
        rows = list(csv.reader(io.StringIO(text, newline=""), skipinitialspace=True))
        want = sum(any(row) for row in rows)
        return (
            None if want - len(found[0]) in (0, 1) else f"{len(found[0])} classes of {want} lines"
        )

    check_document(table, TABLE, use, numbers)


# ------------------------------------------------------------------------------------------ runs
def a_config() -> TrainConfig:
    overrides = {"data": "set", "steps": 3, "checkpoint_every_minutes": 5.0}
    return resolve("A4", "cnn_trans", overrides, num_clips=1000, clip_seconds=10.0)


@numbers_of_cases
def test_config_json(tmp_path: Path, numbers: range) -> None:
    hints = typing.get_type_hints(TrainConfig)

    def use(path: Path) -> str | None:
        found: list[TrainConfig] = []
        complaint = error_of(lambda: found.append(TrainConfig.load(path)), names=str(path))
        if complaint is not None or not found:
            return complaint
        for name, value in asdict(found[0]).items():
            if not fits(value, hints[name]):
                return f"{name} is {value!r}"
        return None

    a_config().save(tmp_path / "config.json")
    check_document(tmp_path / "config.json", JSON, use, numbers)


def fits(value: object, hint: Any) -> bool:
    """Whether a value is what a field's annotation says; a float may be whole."""
    kind = typing.get_origin(hint) or hint
    if kind in (types.UnionType, typing.Union):
        return any(fits(value, choice) for choice in typing.get_args(hint))
    if kind is typing.Literal:
        return value in typing.get_args(hint)
    if kind is list:
        return isinstance(value, list) and all(isinstance(item, str) for item in value)
    return type(value) is kind or (kind is float and type(value) is int)


@numbers_of_cases
def test_metrics_jsonl(tmp_path: Path, numbers: range) -> None:
    """What --resume keeps of it: whole lines up to the epoch that it goes on from."""
    config = a_config()
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"epoch": i, "step": 10 * i, "mAP": 0.1}) + "\n" for i in range(1, 6)]
    path.write_text("".join(lines))

    def use(path: Path) -> str | None:
        def resume() -> None:
            RunFolder(tmp_path).prepare(config, torch.device("cpu"), keep_epochs=3)

        before = path.read_text("utf-8", "replace").splitlines(keepends=True)
        if (complaint := error_of(resume, names=str(path))) is not None:
            return complaint
        after = path.read_text("utf-8", "replace").splitlines(keepends=True)
        lost = [line for line in lines[:3] if line in before and line not in after]
        return f"gone: {lost}" if lost else None

    check_document(path, (), use, numbers)
