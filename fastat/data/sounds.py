"""The sounds of the practice set: one numpy function a class, each able to fill a clip.

A class is a *pattern* in time and frequency (a sweep, a pulse train, a decaying stack of partials),
never a place in the spectrum: pitches, centres and rates are drawn from wide ranges, so the
average spectrum of a clip says little about what is in it.

Every function takes a generator, a sample rate in Hz and a number of samples S, and returns [S]
float32 at an arbitrary level. All randomness comes from the generator.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

Signal = NDArray[np.float32]
Floats = NDArray[np.floating[Any]]
Synth = Callable[[Generator, int, int], Signal]

TABLE_SIZE = 1 << 14
"""Samples of one stored period: nearest-sample lookup is then 70 dB below a low harmonic."""

MAX_HZ = 7000.0
"""Highest partial: all files hold their classes' marks, also those of 16 kHz."""

DB_PER_DOUBLING = 20 * float(np.log10(2))


def _log_uniform(rng: Generator, low: float, high: float) -> float:
    return float(low * (high / low) ** rng.random())


def _period(amplitudes: Floats) -> Signal:
    """One period, [TABLE_SIZE], of a sum of harmonics 1..H."""
    spectrum = np.zeros(TABLE_SIZE // 2 + 1, np.complex128)
    # Quadratic phases spread the energy over the period: no peak that would force the level down.
    harmonic = np.arange(1, len(amplitudes) + 1)
    spectrum[harmonic] = amplitudes * np.exp(1j * np.pi * harmonic**2 / len(amplitudes))
    return (np.fft.irfft(spectrum) * (TABLE_SIZE / 2)).astype(np.float32)


def _num_harmonics(top_hz: float, most: int) -> int:
    return max(1, min(most, int(MAX_HZ / top_hz)))


def _play(period: Signal, hz: NDArray[np.float64], rate: int) -> Signal:
    """Reads a stored period at an instantaneous frequency, [S] in Hz."""
    place = np.cumsum(hz * (TABLE_SIZE / rate)).astype(np.int64)
    signal: Signal = period[place & (TABLE_SIZE - 1)]
    return signal


def _seconds(rate: int, num_samples: int) -> NDArray[np.float64]:
    return np.arange(num_samples) / rate


def _ramps(gate: NDArray[np.bool_], rate: int, ramp_s: float = 0.008) -> Signal:
    """A gate, [S], whose edges are ramps: switching would otherwise click."""
    width = max(1, int(ramp_s * rate))
    total = np.cumsum(np.pad(gate.astype(np.int32), (width, 0), mode="edge"))
    return ((total[width:] - total[:-width]) / width).astype(np.float32)


def _place(hits: list[Signal], onsets: NDArray[np.float64], rate: int, num_samples: int) -> Signal:
    """Adds ``hits[i % len(hits)]`` at the second ``onsets[i]``; what is beyond the end is cut."""
    out = np.zeros(num_samples, np.float32)
    for i, start in enumerate((onsets * rate).astype(np.int64)):
        part = out[start : start + len(hits[i % len(hits)])]
        part += hits[i % len(hits)][: len(part)]
    return out


def _beats(rng: Generator, period_s: float, jitter: float, seconds: float) -> NDArray[np.float64]:
    """Onsets in seconds, every ``period_s`` on average, each off by up to ``jitter`` periods."""
    beats = np.arange(rng.random() * period_s, seconds, period_s)
    return np.maximum(beats + period_s * jitter * rng.uniform(-1, 1, len(beats)), 0.0)


def _decaying(
    hz: Floats,  # [P]
    amplitude: Floats,  # [P]
    decay_s: Floats,  # [P]
    rate: int,
    seconds: float,
) -> Signal:
    """P partials struck together, each dying away at its own speed."""
    t = np.arange(int(seconds * rate), dtype=np.float32) / np.float32(rate)
    out = np.zeros_like(t)
    for f, a, d in zip(hz, amplitude, decay_s, strict=True):
        if f < MAX_HZ:
            out += (
                np.float32(a) * np.sin(np.float32(2 * np.pi * f) * t) * np.exp(-t / np.float32(d))
            )
    out *= np.minimum(1.0, t / np.float32(0.002))
    return out


@lru_cache(maxsize=16)
def _octaves(rate: int, num_samples: int) -> Signal:
    """log2(f / 1 kHz) of the rfft bins; the lowest bins share 20 Hz."""
    hz = np.maximum(np.fft.rfftfreq(num_samples, 1 / rate), 20.0)
    return np.asarray(np.log2(hz / 1000.0), np.float32)


def coloured_noise(rng: Generator, rate: int, num_samples: int, db_per_octave: float) -> Signal:
    """[S] noise whose density falls (negative) or rises along frequency."""
    # Drawn as a spectrum, where white noise is white too: one transform instead of two.
    octaves = _octaves(rate, num_samples)
    white = rng.standard_normal(2 * len(octaves), np.float32).view(np.complex64)
    white[0] = 0.0
    spectrum = white * np.exp2(octaves * np.float32(db_per_octave / DB_PER_DOUBLING))
    return np.fft.irfft(spectrum, num_samples).astype(np.float32)


def equalise(x: Signal, rng: Generator, rate: int, spread_db: float) -> Signal:
    """[S] -> [S] through a random smooth frequency response: a microphone, a room, a place."""
    knots = np.arange(-5.0, 5.0)  # octaves about 1 kHz
    gain_db = rng.normal(0.0, spread_db, len(knots))
    gain = 10 ** (np.interp(_octaves(rate, len(x)), knots, gain_db) / 20)
    return np.fft.irfft(np.fft.rfft(x) * gain.astype(np.float32), len(x)).astype(np.float32)


def _siren(rng: Generator, rate: int, num_samples: int) -> Signal:
    t = _seconds(rate, num_samples)
    centre, depth = _log_uniform(rng, 500, 1500), rng.uniform(0.45, 0.8)
    swing = np.sin(2 * np.pi * (t / rng.uniform(1.0, 2.6) + rng.random()))
    hz = centre * np.exp2(depth * swing)
    return _play(_period(0.5 ** np.arange(_num_harmonics(hz.max(), 3))), hz, rate)


def _alarm(rng: Generator, rate: int, num_samples: int) -> Signal:
    t = _seconds(rate, num_samples)
    low = _log_uniform(rng, 500, 1600)
    step = (t / rng.uniform(0.35, 0.7) + rng.random()) % 1.0 < 0.5
    hz = np.where(step, low, low * rng.uniform(1.3, 1.6))
    return _play(_period(0.6 ** np.arange(_num_harmonics(hz.max(), 4))), hz, rate)


def _dial_tone(rng: Generator, rate: int, num_samples: int) -> Signal:
    t = _seconds(rate, num_samples)
    low = _log_uniform(rng, 350, 1000)
    sine, one = _period(np.ones(1)), np.ones(num_samples)
    pair = _play(sine, low * one, rate) + _play(sine, low * rng.uniform(1.3, 1.5) * one, rate)
    # The stuttered dial tone of a waiting message.
    return pair * _ramps((t / rng.uniform(0.3, 0.5) + rng.random()) % 1.0 < 0.6, rate)


def _sine(rng: Generator, rate: int, num_samples: int) -> Signal:
    hz = np.full(num_samples, _log_uniform(rng, 300, 4000))
    return _play(_period(np.ones(1)), hz, rate)


def _sweep(rng: Generator, rate: int, num_samples: int) -> Signal:
    t = _seconds(rate, num_samples)
    low = _log_uniform(rng, 150, 500)
    high = _log_uniform(rng, 3000, MAX_HZ)
    place = (t / rng.uniform(0.7, 1.8) + rng.random()) % 1.0
    out = _play(_period(np.ones(1)), low * (high / low) ** place, rate)
    return out * _ramps(place < 0.95, rate)


def _bird(rng: Generator, rate: int, num_samples: int) -> Signal:
    sine = _period(np.ones(1))
    calls = []
    for _ in range(int(rng.integers(2, 4))):
        length = int(rng.uniform(0.07, 0.14) * rate)
        u = np.linspace(0, 1, length)
        centre = _log_uniform(rng, 2000, 5000)
        down = rng.uniform(0.5, 0.8) * (0.5 - u)
        hz = np.minimum(centre * np.exp2(down + 0.15 * np.sin(2 * np.pi * u)), MAX_HZ)
        calls.append(_play(sine, hz, rate) * np.sin(np.pi * u).astype(np.float32) ** 0.5)
    song = _beats(rng, rng.uniform(0.16, 0.26), 0.1, num_samples / rate)
    rest = (song / rng.uniform(1.2, 2.0) + rng.random()) % 1.0
    return _place(calls, song[rest < 0.75], rate, num_samples)


def _bell(rng: Generator, rate: int, num_samples: int) -> Signal:
    ratio = np.array([0.5, 1.0, 1.19, 1.5, 2.0, 2.67, 3.01, 4.1, 5.4])
    ratio = ratio * rng.uniform(0.98, 1.02, len(ratio))
    amplitude = 0.8 ** np.arange(len(ratio)) * rng.uniform(0.6, 1.0, len(ratio))
    decay_s = rng.uniform(0.25, 0.45) / ratio**0.3
    hit = _decaying(_log_uniform(rng, 400, 1300) * ratio, amplitude, decay_s, rate, 1.8)
    onsets = _beats(rng, rng.uniform(0.7, 1.3), 0.03, num_samples / rate)
    return _place([hit], onsets, rate, num_samples)


def _plucked_string(rng: Generator, rate: int, num_samples: int) -> Signal:
    base = _log_uniform(rng, 130, 330)
    harmonic = np.arange(1, 16)
    notes = [
        _decaying(
            base * 2 ** (step / 12) * harmonic,
            0.85**harmonic,
            rng.uniform(0.2, 0.35) / harmonic**0.6,
            rate,
            0.8,
        )
        for step in rng.permutation([0, 3, 5, 7, 10, 12])
    ]
    onsets = _beats(rng, rng.uniform(0.2, 0.36), 0.02, num_samples / rate)
    return _place(notes, onsets, rate, num_samples)


def _drum(rng: Generator, rate: int, num_samples: int) -> Signal:
    t = np.arange(int(0.4 * rate)) / rate
    head = _log_uniform(rng, 70, 130)
    slap = coloured_noise(rng, rate, len(t), -6.0) * np.exp(-t / 0.025).astype(np.float32)
    toms = []
    for ratio in rng.permutation([1.0, 1.4, 2.0]):
        hz = head * ratio * (1 + 2.5 * np.exp(-t / 0.05))
        skin = _play(_period(0.35 ** np.arange(3)), hz, rate) * np.exp(-t / 0.12).astype(np.float32)
        toms.append(skin + np.float32(0.1) * slap / np.std(slap[: rate // 40]))
    bar = [[0, 1], [0, 0, 1, 2], [0, 1, 2, 1, 2]][int(rng.integers(3))]
    onsets = _beats(rng, rng.uniform(0.25, 0.45), 0.02, num_samples / rate)
    return _place([toms[i] for i in bar], onsets, rate, num_samples)


def _clicks(rng: Generator, rate: int, num_samples: int) -> Signal:
    t = np.arange(int(0.02 * rate)) / rate
    ticks = []
    for _ in range(2):
        ring = np.sin(2 * np.pi * _log_uniform(rng, 1200, 5000) * t) * np.exp(-t / 0.003)
        snap = rng.standard_normal(len(t)) * np.exp(-t / 0.0015)
        ticks.append((ring + snap).astype(np.float32))
    onsets = _beats(rng, rng.uniform(0.12, 0.3), 0.0, num_samples / rate)
    return _place(ticks, onsets, rate, num_samples)


def _engine(rng: Generator, rate: int, num_samples: int) -> Signal:
    t = _seconds(rate, num_samples)
    idle = _log_uniform(rng, 90, 160)
    cycle = (t / rng.uniform(1.2, 2.4) + rng.random()) % 1.0
    # The throttle opens fast and closes slowly.
    rev = np.where(cycle < 0.35, cycle / 0.35, np.exp(-(cycle - 0.35) / 0.25))
    hz = idle * np.exp2(rng.uniform(0.8, 1.2) * rev)
    num_harmonics = _num_harmonics(hz.max(), 24)
    comb = _period(rng.uniform(0.5, 1.0, num_harmonics) * 0.93 ** np.arange(num_harmonics))
    rough = 1 + 0.4 * np.sin(np.cumsum(2 * np.pi * hz / (4 * rate)))
    return _play(comb, hz, rate) * (rough * (0.5 + 0.5 * rev)).astype(np.float32)


def _rain(rng: Generator, rate: int, num_samples: int) -> Signal:
    t = np.arange(int(0.04 * rate)) / rate
    drops = []
    for _ in range(32):
        hz = _log_uniform(rng, 500, 6000) * (1 + rng.uniform(-2, 2) * t)
        drop = np.sin(2 * np.pi * np.cumsum(hz) / rate) * np.exp(-t / 0.008) * rng.uniform(0.5, 1.5)
        drops.append(drop.astype(np.float32))
    seconds = num_samples / rate
    onsets = rng.uniform(0, seconds, int(rng.uniform(40, 70) * seconds))
    hiss = rng.standard_normal(num_samples, np.float32)
    return _place(drops, onsets, rate, num_samples) + 0.01 * hiss


def _gusts(rng: Generator, rate: int, num_samples: int, hz: float) -> Floats:
    """[S] smooth noise of unit variance that wanders at about ``hz``."""
    knots = rng.standard_normal(int(num_samples / rate * 2 * hz) + 3)
    wander = np.interp(_seconds(rate, num_samples) * 2 * hz, np.arange(len(knots)), knots)
    # Linear interpolation keeps two thirds of the variance.
    return np.asarray(wander * np.sqrt(1.5))


def _wind(rng: Generator, rate: int, num_samples: int) -> Signal:
    centre = _log_uniform(rng, 350, 1000)
    width = rng.uniform(0.12, 0.25)
    gust = _gusts(rng, rate, num_samples, rng.uniform(0.5, 0.9))
    hz = centre * np.exp2(0.6 * np.tanh(gust))
    # Noise about a moving centre: slow quadrature noise on a moving carrier.
    phase = 2 * np.pi * np.cumsum(hz) / rate
    slow = [_gusts(rng, rate, num_samples, width * centre) for _ in range(2)]
    howl = slow[0] * np.cos(phase) + slow[1] * np.sin(phase)
    return (howl * np.exp(0.5 * np.tanh(gust))).astype(np.float32)


def _white_noise(rng: Generator, rate: int, num_samples: int) -> Signal:
    t = _seconds(rate, num_samples)
    on = (t / rng.uniform(0.5, 1.2) + rng.random()) % 1.0 < rng.uniform(0.45, 0.65)
    return rng.standard_normal(num_samples, np.float32) * _ramps(on, rate)


def _pink_noise(rng: Generator, rate: int, num_samples: int) -> Signal:
    t = _seconds(rate, num_samples)
    swell = 0.5 + 0.5 * np.sin(2 * np.pi * (t / rng.uniform(1.0, 2.2) + rng.random()))
    return coloured_noise(rng, rate, num_samples, -3.0) * swell.astype(np.float32) ** 2


# First three formants of five vowels, in Hz (Peterson and Barney, 1952, men).
VOWELS = np.array(
    [[270, 2290, 3010], [530, 1840, 2480], [730, 1090, 2440], [570, 840, 2410], [300, 870, 2240]]
)


def _speech(rng: Generator, rate: int, num_samples: int) -> Signal:
    pitch = _log_uniform(rng, 100, 230)
    tract = rng.uniform(0.95, 1.25)
    harmonic_hz = pitch * np.arange(1, int(4500 / pitch))
    vowels = []
    for formants in VOWELS * tract:
        peaks = 1 / (1 + ((harmonic_hz[:, None] - formants) / (0.06 * formants + 40)) ** 2)
        vowels.append(_period(peaks @ np.array([1.0, 0.7, 0.4])))
    out = np.zeros(num_samples, np.float32)
    start = int(rng.uniform(0, 0.2) * rate)
    while start < num_samples:
        length = int(rng.uniform(0.14, 0.26) * rate)
        u = np.linspace(0, 1, length)
        hz = pitch * np.exp2(rng.uniform(-0.2, 0.25) + rng.uniform(-0.3, 0.3) * u)
        first, second = rng.permutation(len(vowels))[:2]
        glide = (0.5 - 0.5 * np.cos(np.pi * u)).astype(np.float32)
        voiced = (
            _play(vowels[first], hz, rate) * (1 - glide) + _play(vowels[second], hz, rate) * glide
        )
        syllable = voiced * np.sin(np.pi * u).astype(np.float32) ** 0.5
        part = out[start : start + length]
        part += syllable[: len(part)]
        pause = 0.4 if rng.random() < 0.15 else rng.uniform(0.02, 0.07)
        start += length + int(pause * rate)
    return out


class Sound(NamedTuple):
    """A class: id and name in AudioSet's manner, level beside the others, synthesis."""

    id: str
    name: str
    level_db: float
    synth: Synth


# From the most frequent class of the set to the rarest.
SOUNDS = (
    Sound("/p/speech", "Speech, babble", 0.0, _speech),
    Sound("/p/plucked_string", "Plucked string", 0.0, _plucked_string),
    Sound("/p/engine", "Engine, revving", 0.0, _engine),
    Sound("/p/wind", "Wind", 0.0, _wind),
    Sound("/p/rain", "Rain, raindrop", 0.0, _rain),
    Sound("/p/drum", "Drum", 0.0, _drum),
    Sound("/p/dial_tone", "Dial tone", -4.0, _dial_tone),
    Sound("/p/white_noise", "White noise", -9.0, _white_noise),
    Sound("/p/bell", "Bell", 0.0, _bell),
    Sound("/p/sine_wave", "Sine wave", -3.0, _sine),
    Sound("/p/pink_noise", "Pink noise", -6.0, _pink_noise),
    Sound("/p/tick", "Tick-tock, clicks", 0.0, _clicks),
    Sound("/p/bird", "Bird, chirp, tweet", 0.0, _bird),
    Sound("/p/alarm", "Alarm, two-tone", -3.0, _alarm),
    Sound("/p/siren", "Siren", -3.0, _siren),
    Sound("/p/chirp_tone", "Chirp tone, sweep", -3.0, _sweep),
)
