"""Damaged audio files through ``fastat pack`` and ``fastat predict``: tags, rows as another reader
gives them, or a line that says why not."""

import csv
import json
import os
import subprocess
import sys
import threading
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from fastat.audio.bad_audio import BadAudio, Reason
from fastat.audio.features import FEATURES
from fastat.data.shards import ClassInfo, PackedSet
from fastat.evaluation.extract import read_waveform
from fastat.evaluation.predict import Tagger, as_document
from fastat.training.checkpoints import write_checkpoint
from fastat.weights.checkpoint import ModelMeta
from tests.fuzz.audio import Base, Case, base_files, cases
from tests.fuzz.child import SPARE_BYTES, Outcome, run_cases
from tests.fuzz.mutations import SHARE, keep
from tests.fuzz.reading import Samples, acceptable, original

FAMILY = "audio"
NUM_CASES = 2_000
BATCH = 250
CLIP_SECONDS = 1.0
PACK_SECONDS = 120
"""For a batch, on a busy machine."""


class Undamaged(NamedTuple):
    """What cases are made of, and what it becomes."""

    bases: list[Base]
    samples: dict[str, Samples]
    """By the name of the base."""


@pytest.fixture(scope="module")
def undamaged(tmp_path_factory: pytest.TempPathFactory) -> Undamaged:
    bases, folder = base_files(), tmp_path_factory.mktemp("undamaged")
    return Undamaged(bases, {base.name: original(base, folder) for base in bases})


def complain(found: Iterable[tuple[Case, str]]) -> None:
    """Keeps the failing cases and fails with their names."""
    bad = [
        f"{keep(FAMILY, c.number, c.mutant.what, why, c.mutant.data, c.base.suffix)}: {why}"
        for c, why in found
    ]
    assert not bad, "\n".join(bad)


# ------------------------------------------------------------------------------------------ pack
class Packed(NamedTuple):
    """What a run of ``fastat pack`` left."""

    rows: dict[str, Samples]
    """By the file's name, without the padding."""
    bad: dict[str, dict[str, str]]
    """Lines of bad.csv by the file's name."""
    peak_bytes: int
    """Of memory, over all its processes."""


def pack(audio: Path, out: Path) -> Packed:
    command = [
        sys.executable, "-m", "fastat.cli", "pack", str(audio), "--out", str(out), "--max-bad", "1",
        "--clip-seconds", str(CLIP_SECONDS), "--workers", "2", "--json",
    ]  # fmt: skip
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    peaks: dict[int, int] = {}
    ended = threading.Event()
    watcher = threading.Thread(target=_watch, args=(process.pid, peaks, ended))
    watcher.start()
    try:
        stdout, stderr = process.communicate(timeout=PACK_SECONDS)
    finally:
        process.kill()
        ended.set()
        watcher.join()
    assert process.returncode == 0, stderr
    assert "Traceback" not in stderr, stderr
    with (out / "bad.csv").open(newline="", encoding="utf-8") as file:
        bad = {Path(line["path"]).name: line for line in csv.DictReader(file)}
    packed = PackedSet.open(out)
    numbers = np.arange(packed.num_clips)
    waveform = np.empty((len(numbers), packed.clip_samples), np.int16)
    packed.read_rows(numbers, waveform)
    packed.close()
    rows = {}
    for name, row, length in zip(packed.names(numbers), waveform, packed.num_samples, strict=True):
        assert not row[length:].any(), f"{name}: padding that is not silent"
        rows[Path(name).name] = row[:length]
    assert json.loads(stdout)["clips"] == len(rows)
    assert json.loads(stdout)["bad"] == len(bad)
    return Packed(rows, bad, sum(peaks.values()))


def _watch(session: int, peaks: dict[int, int], ended: threading.Event) -> None:
    """Notes the largest memory of every process of the session, by its number."""
    while not ended.wait(0.05):
        for number in filter(str.isdigit, os.listdir("/proc")):
            try:
                if os.getsid(int(number)) != session:
                    continue
                status = Path("/proc", number, "status").read_text()
            except (ProcessLookupError, FileNotFoundError):  # it has just ended
                continue
            for line in status.splitlines():
                if line.startswith("VmHWM:"):
                    peaks[int(number)] = 1024 * int(line.split()[1])


def packed_wrongly(case: Case, path: Path, packed: Packed, undamaged: Undamaged) -> str | None:
    """What is wrong with what became of a file."""
    row, bad = packed.rows.get(path.name), packed.bad.get(path.name)
    if (row is None) == (bad is None):
        return f"in the set: {row is not None}, in bad.csv: {bad is not None}"
    if bad is not None:
        reasons = set(typing.get_args(Reason)) - {"missing", "label unknown"}
        wrong = bad["reason"] not in reasons or not bad["detail"] or "\n" in bad["detail"]
        return f"in bad.csv as {bad['reason']!r}: {bad['detail']!r}" if wrong else None
    assert row is not None
    clip = round(CLIP_SECONDS * 16_000)
    if len(row) == clip:  # perhaps cut: whole, it is what predict reads
        row = read_waveform(path)
    if not acceptable(case, path, row, undamaged.samples):
        return f"{len(row)} samples that no other reader gives, or that a checksum refutes"
    return None


def check_pack(numbers: range, undamaged: Undamaged, folder: Path) -> None:
    (folder / "whole" / "a").mkdir(parents=True)
    for number in numbers:
        base = undamaged.bases[number % len(undamaged.bases)]
        (folder / "whole" / "a" / f"{number}{base.suffix}").write_bytes(base.data)
    whole = pack(folder / "whole", folder / "whole-set")
    assert not whole.bad and len(whole.rows) == len(numbers)

    audio = folder / "damaged" / "a"
    audio.mkdir(parents=True)
    todo = list(cases(undamaged.bases, numbers))
    for case in todo:
        (audio / case.name).write_bytes(case.mutant.data)
    packed = pack(audio.parent, folder / "set")
    found = [(c, packed_wrongly(c, audio / c.name, packed, undamaged)) for c in todo]
    complain((case, why) for case, why in found if why is not None)
    assert packed.peak_bytes <= 2 * whole.peak_bytes


def test_pack_some(undamaged: Undamaged, tmp_path: Path) -> None:
    check_pack(range(NUM_CASES // SHARE), undamaged, tmp_path)


@pytest.mark.full
@pytest.mark.parametrize("first", range(0, NUM_CASES, BATCH))
def test_pack_all(first: int, undamaged: Undamaged, tmp_path: Path) -> None:
    check_pack(range(first, first + BATCH), undamaged, tmp_path)


# --------------------------------------------------------------------------------------- predict
@pytest.fixture(scope="module")
def tagger(tmp_path_factory: pytest.TempPathFactory) -> Tagger:
    """A small model of random weights for clips of a second."""
    run, spec = tmp_path_factory.mktemp("run"), FEATURES["logmel64"]
    meta = ModelMeta(
        model="crnn",
        feature=spec.name,
        clip_seconds=CLIP_SECONDS,
        num_mels=spec.num_mels,
        num_frames=spec.num_frames(round(CLIP_SECONDS * spec.sample_rate)),
        mean=spec.mean,
        std=spec.std,
        classes=(ClassInfo("a", "a"), ClassInfo("b", "b")),
        options={"embedding": 64},
    )
    write_checkpoint(run / "checkpoints", 1, meta.create().state_dict(), meta, {}, best=True)
    return Tagger(run)


def check_predict(numbers: range, undamaged: Undamaged, tagger: Tagger, folder: Path) -> None:
    by_number = {case.number: case for case in cases(undamaged.bases, numbers)}

    def check(number: int) -> str | None:
        case = by_number[number]
        path = folder / case.name
        path.write_bytes(case.mutant.data)
        try:
            waveform = read_waveform(path)
        except BadAudio as bad:
            return None if bad.detail and "\n" not in str(bad) else f"no reason: {bad}"
        if not acceptable(case, path, waveform, undamaged.samples):
            return f"{len(waveform)} samples that no other reader gives, or a checksum refutes"
        document = as_document(tagger.tag(path, waveform), tagger.meta, top=2)
        probabilities = [tag["probability"] for tag in document["tags"]]
        return None if np.isfinite(probabilities).all() else f"probabilities {probabilities}"

    def read_base(number: int) -> str | None:
        base = undamaged.bases[number]
        path = folder / f"base{base.suffix}"
        path.write_bytes(base.data)
        tagger.tag(path, read_waveform(path))
        return None

    found = run_cases(check, list(by_number))
    usual = memory_of(run_cases(read_base, range(len(undamaged.bases))).values())
    complain((by_number[n], why) for n, (why, _) in found.items() if why is not None)
    assert memory_of(found.values()) <= 2 * usual + SPARE_BYTES


def memory_of(outcomes: Iterable[Outcome]) -> int:
    """The largest case's, bytes."""
    return max(outcome.peak_bytes for outcome in outcomes)


def test_predict_some(undamaged: Undamaged, tagger: Tagger, tmp_path: Path) -> None:
    check_predict(range(NUM_CASES // SHARE), undamaged, tagger, tmp_path)


@pytest.mark.full
def test_predict_all(undamaged: Undamaged, tagger: Tagger, tmp_path: Path) -> None:
    check_predict(range(NUM_CASES), undamaged, tagger, tmp_path)
