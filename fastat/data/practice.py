"""The practice set: synthesised four-second scenes in AudioSet's own file formats.

One to three sounds (``sounds.py``) at random levels and onsets over a coloured background, written
as WAV and FLAC of several rates and widths, with a segments CSV for each split and a class list.
The training split is imbalanced on purpose, as AudioSet is; the eval split only mildly.
"""

import base64
import os
import struct
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path

import numpy as np
import soundfile as sf
from numpy.random import Generator
from numpy.typing import NDArray

from fastat.data.sounds import SOUNDS, Signal, Sound, coloured_noise, equalise
from fastat.system.errors import UserError
from fastat.system.progress import progress

DEMO_VERSION = 2
"""Raised whenever the same seed would give other bytes."""

CLIP_SECONDS = 4
"""Short, so that a training on the set takes minutes on two cores of an older processor."""
SAMPLE_RATES = (16_000, 22_050, 32_000, 44_100, 48_000)
RATE_SHARES = (0.35, 0.25, 0.2, 0.1, 0.1)
STEREO_SHARE = 0.35
SUBTYPES = (("wav", "PCM_16"), ("wav", "FLOAT"), ("flac", "PCM_16"), ("flac", "PCM_24"))
NAMINGS = ("{id}", "Y{id}", "{id}_{ms}", "{id}_{s}")
"""How downloaders of AudioSet name a clip; the last two carry its start."""

EVENT_DB = (-7.0, 0.0)
"""Level of a sound beside the scene's others, on top of the class's own."""
MAX_ONSET_SECONDS = 0.6
FADE_SECONDS = 0.05
EQ_SPREAD_DB = 5.0
"""Standard deviation of a scene's frequency response at each octave."""
BACKGROUND_DB = (-52.0, -32.0)
"""Background below the scene's loudest tenth."""
PEAK = (0.25, 0.9)
"""Range of a clip's largest sample, full scale being 1."""


@dataclass(frozen=True, kw_only=True)
class Split:
    """How many clips a split has, and how its labels are spread over them."""

    name: str
    num_clips: int
    rarest: int
    """Positives of the rarest class."""
    imbalance: float
    """Positives of the most frequent class over those of the rarest."""

    def counts(self) -> NDArray[np.int64]:
        """Positives of every class, [K], falling geometrically as AudioSet's do."""
        fall = np.linspace(1.0, 0.0, len(SOUNDS))
        return np.round(self.rarest * self.imbalance**fall).astype(np.int64)


SPLITS = (
    Split(name="train", num_clips=256, rarest=10, imbalance=8.0),
    Split(name="eval", num_clips=80, rarest=5, imbalance=3.0),
)


def make_demo(out: Path, seed: int = 0) -> None:
    """Writes the practice set of ``seed`` into the folder ``out``: same seed, same bytes.

    ``out`` appears only once it is complete; a complete set of the same seed is left as it is.

    Raises:
        UserError: ``seed`` is negative, or ``out`` holds anything else.
    """
    if seed < 0:
        raise UserError(f"expected a seed of 0 or more, got {seed}")
    out = out.resolve()
    if _is_finished(out, seed):
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as scratch:
        built = Path(scratch) / "demo"
        _build(built, seed)
        try:
            os.rename(built, out)
        except OSError:
            # Another process may have finished the same set meanwhile: then theirs stays.
            if not _is_finished(out, seed):
                raise


def _created_by(seed: int) -> str:
    return f"# Segments csv created by fastat demo, version {DEMO_VERSION}, seed {seed}"


def _is_finished(out: Path, seed: int) -> bool:
    """Whether ``out`` is this very set; False if there is nothing yet."""
    if not out.exists():
        return False
    if not out.is_dir():
        raise UserError(f"expected a folder for the practice set, {out} is a file")
    if not any(out.iterdir()):
        return False
    first_lines = []
    for split in SPLITS:
        csv = out / f"{split.name}_segments.csv"
        first_lines.append(csv.read_bytes().partition(b"\n")[0] if csv.is_file() else b"")
    if first_lines != [_created_by(seed).encode()] * len(SPLITS):
        raise UserError(
            f"expected an empty folder or the practice set of seed {seed}, "
            f"found other files in {out}"
        )
    num_clips = sum(split.num_clips for split in SPLITS)
    num_files = sum(1 for _ in out.glob("audio/*"))
    if num_files != num_clips:
        raise UserError(
            f"expected {num_clips} audio files in the practice set {out}, found {num_files}: "
            "remove the folder to make it anew"
        )
    return True


def _build(out: Path, seed: int) -> None:
    audio = out / "audio"
    audio.mkdir(parents=True)
    lines = ["index,mid,display_name"]
    lines += [f'{i},{sound.id},"{sound.name}"' for i, sound in enumerate(SOUNDS)]
    (out / "class_labels_indices.csv").write_text("\n".join(lines) + "\n")

    num_clips = sum(split.num_clips for split in SPLITS)
    # numpy and libsndfile leave the interpreter lock while they work, so threads are enough.
    with ThreadPoolExecutor(os.cpu_count()) as pool, progress("demo", num_clips) as advance:
        for part, split in enumerate(SPLITS):
            labels = deal_labels(_generator(seed, part), split)
            # A generator for each clip: a scene depends on nothing but its own place.
            rngs = [_generator(seed, part, clip) for clip in range(len(labels))]
            sounds = [[SOUNDS[i] for i in indices] for indices in labels]
            rows = []
            for row in pool.map(_write_clip, rngs, sounds, repeat(audio)):
                rows.append(row)
                advance()
            num_labels = sum(map(len, labels))
            header = [
                _created_by(seed),
                f"# num_ytids={split.num_clips}, num_segs={split.num_clips}, "
                f"num_unique_labels={len(SOUNDS)}, num_positive_labels={num_labels}",
                "# YTID, start_seconds, end_seconds, positive_labels",
            ]
            (out / f"{split.name}_segments.csv").write_text("\n".join(header + rows) + "\n")


def _generator(seed: int, *place: int) -> Generator:
    # A spawn key, since the seeds [s, p] and [s, p, 0] are one and the same to numpy.
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=place))


def deal_labels(rng: Generator, split: Split) -> list[list[int]]:
    """Class indices of every clip: one to three each, and exactly ``split.counts()`` in all."""
    counts = split.counts()
    total, num_clips = int(counts.sum()), split.num_clips
    assert num_clips <= total <= 3 * num_clips and counts.max() <= num_clips // 2
    second_and_third = rng.permutation(np.repeat(np.arange(num_clips), 2))[: total - num_clips]
    owner = np.concatenate([np.arange(num_clips), second_and_third])  # [total]: clip of a slot
    label = rng.permutation(np.repeat(np.arange(len(counts)), counts))  # [total]

    clips: list[list[int]] = [[] for _ in range(num_clips)]
    for slot, clip in enumerate(owner):
        clips[clip].append(slot)
    # A clip that was dealt a class twice swaps one of the two with any clip that neither hurts.
    for slot in range(total):
        while np.count_nonzero(label[clips[owner[slot]]] == label[slot]) > 1:
            other = int(rng.integers(total))
            if (
                label[slot] not in label[clips[owner[other]]]
                and label[other] not in label[clips[owner[slot]]]
            ):
                label[slot], label[other] = label[other], label[slot]
    return [sorted(int(label[slot]) for slot in slots) for slots in clips]


def make_scene(
    rng: Generator, sounds: Sequence[Sound], rate: int, num_samples: int
) -> tuple[Signal, Signal]:
    """One scene: the sounds through one random response, [S], and the background, [S]."""
    fade = np.linspace(0.0, 1.0, int(FADE_SECONDS * rate), dtype=np.float32)
    mix = np.zeros(num_samples, np.float32)
    for sound in sounds:
        x = sound.synth(rng, rate, num_samples)
        start = int(rng.uniform(0.0, MAX_ONSET_SECONDS) * rate)
        x[:start] = 0.0
        x[start : start + len(fade)] *= fade
        # Two in five go on to the very end.
        stop = num_samples - int(max(0.0, rng.uniform(-1.0, MAX_ONSET_SECONDS)) * rate)
        x[stop:] = 0.0
        x[stop - len(fade) : stop] *= fade[::-1]
        level_db = sound.level_db + rng.uniform(*EVENT_DB)
        mix += x * np.float32(10 ** (level_db / 20) / _loudness(x, rate))
    mix = equalise(mix, rng, rate, EQ_SPREAD_DB)
    mix /= _loudness(mix, rate)
    background = coloured_noise(rng, rate, num_samples, rng.uniform(-6.0, 0.0))
    background *= np.float32(10 ** (rng.uniform(*BACKGROUND_DB) / 20) / np.std(background))
    return mix, background


def _loudness(x: Signal, rate: int) -> float:
    """RMS of the loudest tenth of the 25 ms frames: a click counts as much as a drone."""
    frame = rate // 40
    power = np.square(x[: len(x) // frame * frame]).reshape(-1, frame).mean(1)
    power.partition(len(power) * 9 // 10)
    return float(np.sqrt(power[len(power) * 9 // 10 :].mean()))


def _write_clip(rng: Generator, sounds: Sequence[Sound], audio: Path) -> str:
    """Makes one scene, writes its file, returns its line of the segments CSV."""
    video = base64.urlsafe_b64encode(rng.bytes(9))[:11].decode()
    naming = NAMINGS[rng.integers(len(NAMINGS))]
    # A file whose name has no start could be taken for the whole video: those start at 0.
    start = int(rng.integers(0, 60)) * 10 if "_" in naming else 0
    extension, subtype = SUBTYPES[rng.integers(len(SUBTYPES))]
    rate = int(rng.choice(SAMPLE_RATES, p=RATE_SHARES))
    stereo = rng.random() < STEREO_SHARE
    name = naming.format(id=video, ms=start * 1000, s=start)

    mix, background = make_scene(rng, sounds, rate, CLIP_SECONDS * rate)
    if stereo:
        pan = np.float32(rng.uniform(-0.5, 0.5))
        wave = np.stack(
            [mix * (1 + pan) + background, mix * (1 - pan) + np.roll(background, rate // 7)], 1
        )
    else:
        wave = (mix + background)[:, None]
    wave *= np.float32(rng.uniform(*PEAK) / np.abs(wave).max())
    path = audio / f"{name}.{extension}"
    if subtype == "FLOAT":
        _write_float_wav(path, wave, rate)
    else:
        sf.write(path, wave, rate, subtype=subtype)
    ids = ",".join(sound.id for sound in sounds)
    return f'{video}, {start:.3f}, {start + CLIP_SECONDS:.3f}, "{ids}"'


def _write_float_wav(path: Path, wave: NDArray[np.float32], rate: int) -> None:
    """Writes [S, C] as 32-bit float WAV.

    libsndfile would add a PEAK chunk that holds the time of day: other bytes at every call.
    """
    num_samples, channels = wave.shape
    data = wave.astype("<f4", copy=False).tobytes()
    ieee_float = 3
    fmt = struct.pack(
        "<HHIIHHH", ieee_float, channels, rate, rate * channels * 4, channels * 4, 32, 0
    )
    body = b"WAVE"
    for tag, chunk in ((b"fmt ", fmt), (b"fact", struct.pack("<I", num_samples)), (b"data", data)):
        body += tag + struct.pack("<I", len(chunk)) + chunk
    path.write_bytes(b"RIFF" + struct.pack("<I", len(body)) + body)
