"""The DALI graphs: encoded files -> int16 clips, or the log-mels of mixed clips.

The only module that imports DALI, so that nothing but ``--source dali`` needs it.
DALI decodes audio on the CPU; with a GPU the decoded clip is copied there and resampling, mixing
and the spectrogram follow on it (written to DALI's documentation; not run on a GPU).

Per clip the graphs do what ``decode`` does before packing and what ``Frontend`` does after it, in
the same order and, where a rounding could show, with the same arithmetic: channel mean, cut,
resampling to 16 kHz, rounding to int16; mean removal, mixup, mean removal, log-mel.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from nvidia import dali
from nvidia.dali import fn, math, pipeline_def, types
from nvidia.dali.pipeline import Pipeline, do_not_convert

from fastat.audio.features import FEATURES
from fastat.data.shards import SAMPLE_RATE
from fastat.system.errors import first_line

DALI_VERSION: str = dali.__version__
INT16_STEPS = 32768.0
ROUND_HALF_EVEN = 1.5 * 2.0**23
"""Added and subtracted, it rounds a float32 below 2^22 to the nearest integer, ties to even, as
numpy's rint does. The mean of two int16 channels is a tie at every other sample."""
LOWPASS_CUTOFF, LOWPASS_WIDTH, LOWPASS_DECIBELS = 0.9569, 0.086, 128.0
"""Cutoff (-6 dB) and transition as fractions of the lower Nyquist frequency, and stopband
attenuation: soxr HQ's, fitted to its response to tones, which this follows to 1e-3 of the
amplitude."""

_SAID = re.compile(r"encountered:\s+(?:Failed to open encoded data: |.* audio file \. )?(.+)")
"""Finds the reason in DALI's report."""

DataNode = Any
Source = Callable[[], Sequence[list[NDArray[np.uint8]] | NDArray[Any]]]

_KINDS = {
    "encoded": (types.UINT8, 1),
    "first": (types.INT32, 0),
    "length": (types.INT32, 0),
    "skip": (types.INT32, 0),
    "samples": (types.INT32, 0),
    "rate": (types.FLOAT, 0),
    "lowpass": (types.FLOAT, 1),
    "channels": (types.FLOAT, 0),
    "lam": (types.FLOAT, 0),
}


@dataclass(frozen=True)
class Spec:
    """Parameters of a graph, the same for every step."""

    clip_samples: int
    remove_mean: bool
    resample: bool
    """Whether some files have another rate than 16 kHz."""
    quality: float
    """Quality of DALI's resampler, 0 to 100: 50 is 16 lobes, 100 is 64."""
    add_channels: int
    """Channels of the widest file, where some file has a number of them whose reciprocal float32
    does not hold, as 3 or 6; else 0."""
    gpu: bool

    @property
    def stream(self) -> tuple[str, ...]:
        """The inputs of a graph for each file of a step, in this order.

        encoded: the file's bytes (uint8); first, length: what of it is resampled, in samples at
        its own rate; skip: where in that the clip starts, samples: how long it is, at 16 kHz (all
        int32); rate in Hz, ``lowpass(rate)``, channels (float32).
        """
        names = ("encoded", "first", "length", "skip", "samples")
        return names + ("rate", "lowpass") * self.resample + ("channels",) * bool(self.add_channels)


@cache
def lowpass(rate: int) -> NDArray[np.float32]:
    """The filter before resampling ``rate`` Hz to 16 kHz: a Kaiser-windowed sinc, [taps], odd."""
    if rate == SAMPLE_RATE:
        return np.ones(1, np.float32)
    nyquist = min(rate, SAMPLE_RATE) / 2
    # Kaiser's formulas for length and shape.
    width = 2 * np.pi * LOWPASS_WIDTH * nyquist / rate
    half = int(np.ceil((LOWPASS_DECIBELS - 7.95) / (2.285 * width) / 2))
    n = np.arange(-half, half + 1)
    taps = np.sinc(2 * LOWPASS_CUTOFF * nyquist / rate * n)
    taps *= np.kaiser(len(n), 0.1102 * (LOWPASS_DECIBELS - 8.7))
    return np.asarray(taps / taps.sum(), np.float32)


def clips_pipeline(spec: Spec, source: Source, **options: Any) -> Pipeline:
    """int16 [R, S]: the clips of R files, padded with zeros.

    ``source`` returns ``spec.stream`` for a step's files, and raises StopIteration after the last
    step.
    """

    @pipeline_def(enable_conditionals=True)  # type: ignore[untyped-decorator]
    def graph() -> DataNode:
        x = _clip(spec, _inputs(source, spec.stream))
        return fn.cast(_cut(x, 0, spec.clip_samples), dtype=types.INT16)

    return graph(**options)


def decode_pipeline(dtype: Literal["int16", "float32"], **options: Any) -> Pipeline:
    """Samples ([n, C] in ``dtype``) and rate (Hz) of the input ``encoded``: audio files as uint8
    [bytes], which must stay where they are until their batch is done."""
    kind = types.INT16 if dtype == "int16" else types.FLOAT

    @pipeline_def  # type: ignore[untyped-decorator]
    def graph() -> tuple[DataNode, DataNode]:
        encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1, no_copy=True)
        samples, rate = fn.decoders.audio(encoded, dtype=kind)
        return samples, rate

    return graph(**options)


def reason_of(error: RuntimeError) -> str:
    """The reason of DALI's error, without its place in the graph."""
    match = _SAID.search(str(error))
    return match[1] if match else first_line(error)


def log_mel_pipeline(spec: Spec, source: Source, **options: Any) -> Pipeline:
    """float32 [B, T, F]: the log-mels (feature logmel64) of B clips, each mixed with a partner.

    ``source`` returns ``spec.stream`` for a step's clips, then for their partners, then the weights
    of the clips (float32 [B]), and raises StopIteration after the last step.
    """
    feature = FEATURES["logmel64"]
    window = feature.window().astype(np.float32).tolist()
    corrections = _mel_corrections(spec.gpu, options["device_id"])

    @pipeline_def(enable_conditionals=True)  # type: ignore[untyped-decorator]
    def graph() -> DataNode:
        names = spec.stream
        inputs = _inputs(source, (*names, *(f"partner_{name}" for name in names), "lam"))
        clip = {name: inputs[name] for name in names}
        partner = {name: inputs[f"partner_{name}"] for name in names}
        lam = inputs["lam"].gpu() if spec.gpu else inputs["lam"]
        x = _centre(spec, _clip(spec, clip) * (1.0 / INT16_STEPS))
        y = _centre(spec, _clip(spec, partner) * (1.0 / INT16_STEPS))
        # A clip keeps its own length. Unmixed: lam 1 and a silent partner, the same numbers.
        x = _centre(spec, lam * x + (1.0 - lam) * _cut(y, 0, clip["samples"]))
        spectrum = fn.spectrogram(
            _cut(x, 0, spec.clip_samples),
            nfft=feature.n_fft,
            window_length=feature.window_samples,
            window_step=feature.hop_samples,
            window_fn=window,
            center_windows=True,
            reflect_padding=False,
            power=2,
            layout="tf",  # what the model reads; on the CPU also faster than "ft"
        )
        decibels = fn.to_decibels(
            _exact_mel(spec, spectrum, corrections),
            multiplier=10.0,
            reference=1.0,
            cutoff_db=10.0 * float(np.log10(feature.floor)),
        )
        return decibels[: feature.num_frames(spec.clip_samples)]

    return graph(**options)


def _mel(spectrum: DataNode) -> DataNode:
    feature = FEATURES["logmel64"]
    return fn.mel_filter_bank(
        spectrum,
        nfilter=feature.num_mels,
        sample_rate=float(feature.sample_rate),  # DALI's default is 44.1 kHz
        freq_low=feature.min_hz,
        freq_high=feature.max_hz,
        mel_formula="slaney",
        normalize=True,
    )


@cache
def _mel_corrections(gpu: bool, device_id: int | None) -> list[NDArray[np.float32]]:
    """Factors [bins] on the power before DALI's bank, for its even bands and for its odd ones.

    DALI keeps band edges in float32, so at the foot of a triangle its weights are up to 2 % off:
    3e-3 dB on a tone there. A bin lies in at most one even and one odd band, hence a factor for
    each. 3e-5 dB are left.
    """
    bank = FEATURES["logmel64"].mel_bank()  # [bins, F]

    @pipeline_def  # type: ignore[untyped-decorator]
    def graph() -> DataNode:
        bins = fn.external_source(name="bins", dtype=types.FLOAT, ndim=2, layout="tf")
        return _mel(bins.gpu() if gpu else bins)

    pipe = graph(batch_size=1, num_threads=1, device_id=device_id, prefetch_queue_depth=1)
    pipe.build()
    pipe.feed_input("bins", [np.eye(len(bank), dtype=np.float32)])
    (weights,) = pipe.run()
    dalis = np.asarray(weights.as_cpu().at(0), np.float64)
    corrections = []
    for parity in (0, 1):
        ours, theirs = bank[:, parity::2].sum(1), dalis[:, parity::2].sum(1)
        factor = np.divide(ours, theirs, out=np.ones_like(ours), where=theirs > 0)
        # A bank of another DALI that is further off is not one to correct.
        assert np.allclose(factor * theirs, ours) and np.abs(factor - 1).max() < 0.1, "mel bank"
        corrections.append(factor.astype(np.float32))
    return corrections


@do_not_convert  # type: ignore[untyped-decorator]
def _exact_mel(spec: Spec, spectrum: DataNode, corrections: list[NDArray[np.float32]]) -> DataNode:
    """Power [T, bins] -> mel power [T, F]: even and odd bands from a pass of the bank each."""
    device = "gpu" if spec.gpu else "cpu"
    even = (np.arange(FEATURES["logmel64"].num_mels) % 2 == 0).astype(np.float32)
    bands = [
        _mel(fn.reinterpret(spectrum * types.Constant(factor, device=device), layout="tf"))
        * types.Constant(mask, device=device)
        for factor, mask in zip(corrections, (even, 1 - even), strict=True)
    ]
    return bands[0] + bands[1]


@do_not_convert  # type: ignore[untyped-decorator]  # plain Python: nothing here depends on a sample
def _inputs(source: Source, names: tuple[str, ...]) -> dict[str, DataNode]:
    kinds = [_KINDS[name.removeprefix("partner_")] for name in names]
    nodes = fn.external_source(
        source,
        num_outputs=len(names),
        dtype=[dtype for dtype, _ in kinds],
        ndim=[rank for _, rank in kinds],
    )
    return dict(zip(names, nodes, strict=True))


def _clip(spec: Spec, file: dict[str, DataNode]) -> DataNode:
    """The clip at 16 kHz, whole int16 steps in float32, [samples]."""
    if spec.add_channels:
        x, _ = fn.decoders.audio(file["encoded"], dtype=types.FLOAT)
        x = _add_channels(x, spec.add_channels) / file["channels"]
    else:
        x, _ = fn.decoders.audio(file["encoded"], dtype=types.FLOAT, downmix=True)
    x = fn.slice(x, start=file["first"], shape=file["length"], axes=[0])
    if spec.gpu:
        x = x.gpu()
    if spec.resample:
        # Not at 16 kHz, where DALI's resampler still errs by 2e-7, enough to break a tie.
        if file["rate"] != float(SAMPLE_RATE):
            x = _resample(spec, x, file["rate"], file["lowpass"])
        else:
            x = x
    # Resamplers differ by a sample about where a file ends: the packed row's length holds.
    x = _cut(x, file["skip"], file["samples"])
    # Clamped before rounding, which needs small numbers: a float file may hold any.
    x = math.clamp(x * INT16_STEPS, -INT16_STEPS, INT16_STEPS - 1.0)
    return (x + ROUND_HALF_EVEN) - ROUND_HALF_EVEN


def _resample(spec: Spec, x: DataNode, rate: DataNode, taps: DataNode) -> DataNode:
    """x at ``rate`` Hz -> 16 kHz."""
    # DALI's resampler has no low-pass of its own: a 12 kHz tone would come out at 4 kHz, undamped.
    image = fn.reshape(x, shape=[1, -1], layout="HW")
    kernel = fn.reshape(taps.gpu() if spec.gpu else taps, shape=[1, -1])
    x = fn.reshape(fn.filter(image, kernel, border="constant"), shape=[-1])
    return fn.audio_resample(x, in_rate=rate, out_rate=float(SAMPLE_RATE), quality=spec.quality)


@do_not_convert  # type: ignore[untyped-decorator]
def _add_channels(x: DataNode, num_channels: int) -> DataNode:
    """[n, C] -> [n], in the order of ``decode``; the decoder's downmix would round 1 / C first."""
    x = fn.slice(x, start=0, shape=num_channels, axes=[1], out_of_bounds_policy="pad")
    total = x[:, 0]
    for channel in range(1, num_channels):
        total = total + x[:, channel]
    return total


def _centre(spec: Spec, x: DataNode) -> DataNode:
    return x - fn.reductions.mean(x) if spec.remove_mean else x


def _cut(x: DataNode, start: DataNode | int, samples: DataNode | int) -> DataNode:
    """x from ``start`` on, cut or padded with zeros to [samples]."""
    return fn.slice(x, start=start, shape=samples, axes=[0], out_of_bounds_policy="pad")
