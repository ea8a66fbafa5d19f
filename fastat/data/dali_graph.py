"""The DALI graphs: encoded files -> int16 clips, or the log-mels of mixed clips.

The only module that imports DALI, so that nothing but ``--source dali`` needs it. DALI decodes audio on
the CPU; with a GPU the decoded clip is copied there and resampling, mixing and the spectrogram follow
on it (written to DALI's documentation; not run on a GPU).

Per clip the graphs do what ``decode`` does before packing and what ``Frontend`` does after it, in the
same order and, where a rounding could show, with the same arithmetic: channel mean, cut, resampling to
16 kHz, rounding to int16; mean removal, mixup, mean removal, log-mel.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from nvidia.dali import fn, math, pipeline_def, types
from nvidia.dali.pipeline import Pipeline, do_not_convert

from fastat.features import FEATURES

SAMPLE_RATE = 16_000
INT16_SCALE = 32768.0
ROUND_HALF_EVEN = 1.5 * 2.0**23
"""Added and subtracted, it rounds a float32 below 2^22 to the nearest integer, ties to even, as numpy's
rint does. The mean of two int16 channels is a tie at every other sample."""
RESAMPLE_QUALITY = 50.0
"""DALI's scale from 0 to 100."""

DataNode = Any
Source = Callable[[], Sequence[list[NDArray[np.uint8]] | NDArray[Any]]]

_KINDS = {
    "encoded": (types.UINT8, 1),
    "first": (types.INT32, 0),
    "length": (types.INT32, 0),
    "skip": (types.INT32, 0),
    "samples": (types.INT32, 0),
    "rate": (types.FLOAT, 0),
    "channels": (types.FLOAT, 0),
    "lam": (types.FLOAT, 0),
}


@dataclass(frozen=True)
class Spec:
    """What a graph is built for: the same for every step."""

    clip_samples: int
    remove_mean: bool
    resample: bool
    """Some files have another rate than 16 kHz."""
    divide: bool
    """Some files have a number of channels whose reciprocal float32 does not hold, as 3 or 6."""
    gpu: bool

    @property
    def stream(self) -> tuple[str, ...]:
        """What a graph reads about each file of a step, in this order.

        encoded: the file's bytes (uint8); first, length: what of it is resampled, in samples at its own
        rate; skip: where in that the clip starts, samples: how long it is, at 16 kHz (all int32); rate
        in Hz, channels (float32).
        """
        names = ("encoded", "first", "length", "skip", "samples")
        return names + ("rate",) * self.resample + ("channels",) * self.divide


def clips_pipeline(spec: Spec, source: Source, **options: Any) -> Pipeline:
    """int16 [R, S]: the clips of R files, padded with zeros.

    ``source`` returns ``spec.stream`` for a step's files, and raises StopIteration after the last step.
    """

    @pipeline_def(enable_conditionals=True)  # type: ignore[untyped-decorator]
    def graph() -> DataNode:
        x = _clip(spec, _inputs(source, spec.stream))
        return fn.cast(_cut(x, 0, spec.clip_samples), dtype=types.INT16)

    return graph(**options)


def log_mel_pipeline(spec: Spec, source: Source, **options: Any) -> Pipeline:
    """float32 [B, T, F]: the log-mels (feature logmel64) of B clips, each mixed with a partner.

    ``source`` returns ``spec.stream`` for a step's clips, then for their partners, then the weights of
    the clips (float32 [B]), and raises StopIteration after the last step.
    """
    feature = FEATURES["logmel64"]
    window = feature.window().astype(np.float32).tolist()

    @pipeline_def(enable_conditionals=True)  # type: ignore[untyped-decorator]
    def graph() -> DataNode:
        names = spec.stream
        inputs = _inputs(source, (*names, *(f"partner_{name}" for name in names), "lam"))
        clip = {name: inputs[name] for name in names}
        partner = {name: inputs[f"partner_{name}"] for name in names}
        lam = inputs["lam"].gpu() if spec.gpu else inputs["lam"]
        x = _centre(spec, _clip(spec, clip) * (1.0 / INT16_SCALE))
        y = _centre(spec, _clip(spec, partner) * (1.0 / INT16_SCALE))
        # A clip keeps its own length. An unmixed one has lam 1 and a silent partner: the same numbers.
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
        mel = fn.mel_filter_bank(
            spectrum,
            nfilter=feature.num_mels,
            sample_rate=float(feature.sample_rate),
            freq_low=feature.min_hz,
            freq_high=feature.max_hz,
            mel_formula="slaney",
            normalize=True,
        )
        decibels = fn.to_decibels(
            mel, multiplier=10.0, reference=1.0, cutoff_db=10.0 * float(np.log10(feature.floor))
        )
        return decibels[: feature.num_frames(spec.clip_samples)]

    return graph(**options)


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
    if spec.divide:
        # The sum divided rounds as numpy's mean does; the decoder's downmix multiplies by a rounded 1/6.
        x, _ = fn.decoders.audio(file["encoded"], dtype=types.FLOAT)
        x = fn.reductions.sum(x, axes=1) / file["channels"]
    else:
        x, _ = fn.decoders.audio(file["encoded"], dtype=types.FLOAT, downmix=True)
    x = fn.slice(x, start=file["first"], shape=file["length"], axes=[0])
    if spec.gpu:
        x = x.gpu()
    if spec.resample:
        # Between equal rates DALI's resampler still errs by 2e-7, enough to turn a tie.
        if file["rate"] != float(SAMPLE_RATE):
            x = fn.audio_resample(
                x, in_rate=file["rate"], out_rate=float(SAMPLE_RATE), quality=RESAMPLE_QUALITY
            )
        else:
            x = x
    # Resamplers differ by a sample about where a file ends: the packed row's length holds.
    x = _cut(x, file["skip"], file["samples"])
    # Clamped before rounding, which needs small numbers: a float file may hold any.
    x = math.clamp(x * INT16_SCALE, -INT16_SCALE, INT16_SCALE - 1.0)
    return (x + ROUND_HALF_EVEN) - ROUND_HALF_EVEN


def _centre(spec: Spec, x: DataNode) -> DataNode:
    return x - fn.reductions.mean(x) if spec.remove_mean else x


def _cut(x: DataNode, start: DataNode | int, samples: DataNode | int) -> DataNode:
    """x from ``start`` on, cut or padded with zeros to [samples]."""
    return fn.slice(x, start=start, shape=samples, axes=[0], out_of_bounds_policy="pad")
