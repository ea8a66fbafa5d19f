"""Clips a second from FLAC shards: ours (DALI), soundfile in a loop, and the same rows as PCM.

Clips of ten seconds at 16 kHz in the page cache: pairs of ESC-10 recordings (FASTAT_TEST_AUDIO) and
scenes of the practice set. ``clips_per_core_s`` is by the processor's time, over all threads;
``share_of_pcm_bytes`` is that of the shards. All three read the same random rows.
"""

import io
import os
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import h5py
import numpy as np
import pytest
import soundfile as sf
from numpy.typing import NDArray
from pytest_benchmark.fixture import BenchmarkFixture

from bench.results import sized, write_row
from fastat.data.decode import decode
from fastat.data.demo import PEAK, make_scene
from fastat.data.shards import SAMPLE_RATE, PackedSet
from fastat.data.sounds import SOUNDS
from fastat.packing.pack import pack

SECONDS, NUM_CLIPS, NUM_ROWS, ROUNDS = 10, 40, 256, sized(5, 3)
TARGET_CLIPS_PER_CORE_S = 600
CODECS = ("pcm16", "flac")


def recordings() -> Iterator[NDArray[np.float32]]:
    """Two recordings of five seconds behind each other, [S]."""
    folder = os.environ.get("FASTAT_TEST_AUDIO")
    if not folder:
        pytest.skip("FASTAT_TEST_AUDIO is not set: no real recordings to measure on")
    files = sorted((Path(folder) / "esc10" / "audio").iterdir())
    for pair in pairwise(files[: NUM_CLIPS + 1]):
        yield np.concatenate([decode(path).samples for path in pair])


def practice() -> Iterator[NDArray[np.float32]]:
    """Scenes as ``make_demo`` writes them, [S]."""
    rng = np.random.default_rng(0)
    for _ in range(NUM_CLIPS):
        sounds = [SOUNDS[i] for i in rng.choice(len(SOUNDS), 2, replace=False)]
        mix, background = make_scene(rng, sounds, SAMPLE_RATE, SECONDS * SAMPLE_RATE)
        wave = mix + background
        yield wave * np.float32(rng.uniform(*PEAK) / np.abs(wave).max())


@pytest.fixture(scope="module", params=[recordings, practice], ids=lambda make: make.__name__)
def sets(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, PackedSet]]:
    folder = tmp_path_factory.mktemp(request.param.__name__, numbered=False)
    (folder / "audio" / "sound").mkdir(parents=True)
    for i, wave in enumerate(request.param()):
        sf.write(folder / "audio" / "sound" / f"{i:02d}.wav", wave, SAMPLE_RATE, subtype="PCM_16")
    for codec in CODECS:
        pack(folder / "audio", folder / codec, codec=codec, workers=2)
    opened = {codec: PackedSet.open(folder / codec) for codec in CODECS}
    yield opened
    for packed in opened.values():
        packed.close()


@pytest.mark.parametrize("name", ["ours", "soundfile", "pcm16"])
def test_rows_a_second(benchmark: BenchmarkFixture, sets: dict[str, PackedSet], name: str) -> None:
    benchmark.group = f"data: FLAC rows, {sets['flac'].directory.parent.name}"
    rows = np.random.default_rng(0).integers(0, NUM_CLIPS, NUM_ROWS)
    out = np.empty((NUM_ROWS, sets["flac"].clip_samples), np.int16)
    want = np.empty_like(out)
    sets["pcm16"].read_rows(rows, want)
    (shard,) = sets["flac"].directory.glob("shard-*.h5")
    with h5py.File(shard, locking=False) as file:
        offsets, data = file["flac_offsets"][()], file["flac_bytes"][()]
    streams = [data[offsets[i] : offsets[i + 1]].tobytes() for i in range(NUM_CLIPS)]

    def by_soundfile() -> None:
        for place, row in enumerate(rows.tolist()):
            with sf.SoundFile(io.BytesIO(streams[row])) as sound:
                sound.buffer_read_into(out[place], "int16")

    steps: dict[str, Callable[[], None]] = {
        "ours": lambda: sets["flac"].read_rows(rows, out),
        "soundfile": by_soundfile,
        "pcm16": lambda: sets["pcm16"].read_rows(rows, out),
    }
    step = steps[name]
    step()  # starts DALI, and brings the rows into the page cache
    assert np.array_equal(out, want)
    started = time.process_time()
    benchmark.pedantic(step, rounds=ROUNDS)
    cpu_seconds = time.process_time() - started
    if benchmark.disabled:
        return
    codec = "pcm16" if name == "pcm16" else "flac"
    (pcm_shard,) = sets["pcm16"].directory.glob("shard-*.h5")
    pcm_bytes = pcm_shard.stat().st_size
    row = write_row(
        area="data",
        op="PCM rows" if name == "pcm16" else "FLAC rows",
        impl="soundfile" if name == "soundfile" else "ours",
        shape=sets["flac"].directory.parent.name,
        passes="clip, CPU time",  # DALI decodes on every core, soundfile on one
        ms=1e3 * cpu_seconds / (ROUNDS * NUM_ROWS),
        codec=codec,
        cores=len(os.sched_getaffinity(0)),
        clips_per_s=NUM_ROWS / benchmark.stats.stats.median,
        clips_per_core_s=ROUNDS * NUM_ROWS / cpu_seconds,
        target_clips_per_core_s=TARGET_CLIPS_PER_CORE_S,
        share_of_pcm_bytes=(shard.stat().st_size if codec == "flac" else pcm_bytes) / pcm_bytes,
    )
    benchmark.extra_info.update(row)
