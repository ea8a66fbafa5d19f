"""Damaged shards: an error that names the shard, or the rows that were packed."""

import json
import shutil
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from fastat.data.shards import INDEX_FILE, PackedSet, write_index
from fastat.packing.pack import pack
from tests.data.audio import write_table
from tests.fuzz.child import error_of, run_cases
from tests.fuzz.mutations import SHARE, Mutant, Mutation, keep, mutate, rng_of

FAMILY = "shard"
NUM_CASES = 500
SHARD = "shard-00000.h5"


@pytest.fixture(scope="module", params=["pcm16", "flac", "none"])
def packed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight clips of a tenth of a second: most of the shard is structure, not samples."""
    folder = tmp_path_factory.mktemp("shards")
    table = write_table(folder, 8, seconds=0.1)
    pack(table, folder / "set", clip_seconds=0.1, codec=request.param, workers=1)
    return folder / "set"


def outside_the_waveform(first: int, size: int) -> Mutation:
    """Damages one to four bytes of the structure and the small arrays."""

    def structure(data: bytes, rng: np.random.Generator) -> Mutant:
        out = bytearray(data)
        places = []
        for _ in range(rng.integers(1, 5)):
            place = int(rng.integers(len(data) - size))
            places.append(place if place < first else place + size)
            out[places[-1]] = (0, 0xFF, int(rng.integers(256)))[rng.integers(3)]
        return Mutant(bytes(out), f"bytes {places} of the structure changed")

    return structure


def contents(directory: Path) -> list[Any]:
    """All that a set gives to training; one of ``none`` has no waveform to give."""
    packed = PackedSet.open(directory)
    rows = np.arange(packed.num_clips)
    waveform = np.zeros((len(rows), packed.clip_samples), np.int16)
    if packed.codec != "none":
        packed.read_rows(rows, waveform)
    packed.close()
    arrays = (waveform, packed.num_samples, packed.targets(rows), packed.label_counts)
    return [
        *(array.tolist() for array in arrays),
        packed.names(rows), packed.sources(rows), packed.classes, packed.stats,
    ]  # fmt: skip


def check_shards(packed: Path, folder: Path, numbers: range) -> None:
    original = contents(packed)
    data = (packed / SHARD).read_bytes()
    with h5py.File(packed / SHARD) as file:
        audio = [file[name] for name in ("waveform", "flac_bytes") if name in file]
        places = [(dataset.id.get_offset(), dataset.nbytes) for dataset in audio]
    own = outside_the_waveform(*(places[0] if places else (len(data), 0)))
    copy = Path(shutil.copytree(packed, folder / "set"))
    index = json.loads((packed / INDEX_FILE).read_text())

    def mutant(number: int) -> Mutant:
        return mutate(data, rng_of(FAMILY, number), (own, own))

    def check(number: int) -> str | None:
        made = mutant(number)
        (copy / SHARD).write_bytes(made.data)
        # The size would give most of them away.
        index["shards"][0]["bytes"] = len(made.data)
        write_index(copy, index)
        found: list[Any] = []
        if complaint := error_of(lambda: found.extend(contents(copy)), names=SHARD):
            return complaint
        return "wrong rows, and no error" if found and found != original else None

    bad = []
    for number, (complaint, _) in run_cases(check, numbers).items():
        if complaint is not None:
            made = mutant(number)
            bad.append((keep(FAMILY, number, made.what, complaint, made.data, ".h5"), complaint))
    assert not bad, bad


def test_some(packed: Path, tmp_path: Path) -> None:
    check_shards(packed, tmp_path, range(NUM_CASES // SHARE))


@pytest.mark.full
def test_all(packed: Path, tmp_path: Path) -> None:
    check_shards(packed, tmp_path, range(NUM_CASES))
