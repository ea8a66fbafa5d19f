"""Clips per second from FLAC shards: ours (PyAV in threads), DALI, soundfile in threads, and PCM.

Clips of ten seconds at 16 kHz in the page cache: pairs of ESC-10 recordings (FASTAT_TEST_AUDIO) and
scenes of the practice set. All contenders read the same random rows with the set's own reader,
which checks their CRC, and use every core. ``clips_per_core_s`` is per second of CPU time, over all
threads; ``share_of_pcm_bytes`` is the size of the FLAC shards.
"""

import io
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
from numpy.typing import NDArray
from pytest_benchmark.fixture import BenchmarkFixture

from bench.results import sized, write_row
from fastat.audio.decode import decode
from fastat.data.practice import PEAK, make_scene
from fastat.data.shards import SAMPLE_RATE, PackedSet
from fastat.data.sounds import SOUNDS
from fastat.packing.pack import pack
from fastat.system.host import cores_of_rank

SECONDS, NUM_CLIPS, NUM_ROWS, ROUNDS = 10, 40, 256, sized(9, 3)
TARGET_CLIPS_PER_CORE_S = 600
CODECS = ("pcm16", "flac")
DALI_ROWS_PER_THREAD, DALI_BATCHES_AHEAD = 16, 2

Step = Callable[[], None]


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


def read_streams(packed: PackedSet, rows: NDArray[np.int64]) -> list[NDArray[np.uint8]]:
    """The FLAC stream of each of ``rows``."""
    assert packed.reader.spans is not None
    ends = np.cumsum(packed.reader.spans.size[rows], dtype=np.int64)
    memory = np.empty(ends[-1], np.uint8)
    assert not packed.reader.read(rows, memory.data, np.append(0, ends[:-1]))
    return np.split(memory, ends[:-1])


def soundfile_step(packed: PackedSet, rows: NDArray[np.int64], out: NDArray[np.int16]) -> Step:
    """soundfile in as many threads as ours, from memory."""
    threads = ThreadPoolExecutor(cores_of_rank())

    def decode_rows(places: NDArray[np.int64]) -> None:
        for place, stream in zip(places, read_streams(packed, rows[places]), strict=True):
            with sf.SoundFile(io.BytesIO(stream.data)) as sound:
                sound.buffer_read_into(out[place], "int16")

    jobs = np.array_split(np.argsort(rows, kind="stable"), NUM_ROWS // 8)
    return lambda: list(threads.map(decode_rows, jobs)).clear()


def dali_step(packed: PackedSet, rows: NDArray[np.int64], out: NDArray[np.int16]) -> Step:
    """A DALI pipeline on the CPU that decodes some batches while another is read or copied."""
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    from fastat.data.dali_graph import decode_pipeline

    batch = DALI_ROWS_PER_THREAD * cores_of_rank()
    pipe = decode_pipeline(
        "int16", batch_size=batch, num_threads=cores_of_rank(), device_id=None,
        prefetch_queue_depth=DALI_BATCHES_AHEAD,
    )  # fmt: skip
    order = np.argsort(rows, kind="stable")
    batches = [order[i : i + batch] for i in range(0, NUM_ROWS, batch)]

    def take(places: NDArray[np.int64]) -> None:
        decoded, _ = pipe.share_outputs()
        for i, place in enumerate(places):
            out[place] = decoded.at(i)[:, 0]
        pipe.release_outputs()

    def step() -> None:
        for i, places in enumerate(batches):
            if i >= DALI_BATCHES_AHEAD:
                take(batches[i - DALI_BATCHES_AHEAD])
            pipe.feed_input("encoded", read_streams(packed, rows[places]))
            pipe.schedule_run()
        for places in batches[-DALI_BATCHES_AHEAD:]:
            take(places)

    # The first run takes as many inputs as the pipeline holds; each later one takes one.
    streams = read_streams(packed, rows[:1])
    for _ in range(DALI_BATCHES_AHEAD):
        pipe.feed_input("encoded", streams)
    pipe.schedule_run()
    for _ in range(DALI_BATCHES_AHEAD):
        pipe.share_outputs()
        pipe.release_outputs()
    return step


@pytest.mark.parametrize("name", ["ours", "dali", "soundfile", "pcm16"])
def test_rows_a_second(benchmark: BenchmarkFixture, sets: dict[str, PackedSet], name: str) -> None:
    benchmark.group = f"data: FLAC rows, {sets['flac'].directory.parent.name}"
    rows = np.random.default_rng(0).integers(0, NUM_CLIPS, NUM_ROWS)
    out = np.empty((NUM_ROWS, sets["flac"].clip_samples), np.int16)
    want = np.empty_like(out)
    sets["pcm16"].read_rows(rows, want)
    if name == "dali":
        step = dali_step(sets["flac"], rows, out)
    elif name == "soundfile":
        step = soundfile_step(sets["flac"], rows, out)
    else:
        packed = sets["pcm16" if name == "pcm16" else "flac"]
        step = lambda: packed.read_rows(rows, out)  # noqa: E731
    step()  # starts threads, and brings the rows into the page cache
    assert np.array_equal(out, want)
    started = time.process_time()
    benchmark.pedantic(step, rounds=ROUNDS)
    cpu_seconds = time.process_time() - started
    if benchmark.disabled:
        return
    codec = "pcm16" if name == "pcm16" else "flac"
    num_bytes = {
        codec: sum(path.stat().st_size for path in sets[codec].directory.glob("shard-*.h5"))
        for codec in CODECS
    }
    row = write_row(
        area="data",
        op="PCM rows" if name == "pcm16" else "FLAC rows",
        impl="ours" if name == "pcm16" else name,
        shape=sets["flac"].directory.parent.name,
        passes="clip, CPU time",
        ms=1e3 * cpu_seconds / (ROUNDS * NUM_ROWS),
        codec=codec,
        cores=cores_of_rank(),
        clips_per_s=NUM_ROWS / benchmark.stats.stats.median,
        clips_per_core_s=ROUNDS * NUM_ROWS / cpu_seconds,
        target_clips_per_core_s=TARGET_CLIPS_PER_CORE_S,
        share_of_pcm_bytes=num_bytes[codec] / num_bytes["pcm16"],
    )
    benchmark.extra_info.update(row)
