"""The DALI source: a packed set's original files, decoded by DALI while training.

It gives the same batches as the packed source for the same plans, without reading the packed
waveforms: DALI's threads decode on the CPU (its audio decoder has no GPU version), then downmix,
cut, resample and round to int16. For ``logmel64``, mixup and the log-mel are computed in DALI's
graph too, on the GPU if there is one; for other features a batch holds waveforms and ``Frontend``
does the rest. For 16 kHz files both sources give the same features; at other rates their resamplers
differ.
"""

import io
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import soundfile as sf
import torch
import torch.utils.dlpack
from numpy.typing import NDArray

from fastat.data import dali_check
from fastat.data.dali_check import BadClip, Decoder, Header, Refusal
from fastat.data.loader import Batch, augment_of, mixed_targets, prefetch, to_device
from fastat.data.sampler import StepPlan
from fastat.data.shards import SAMPLE_RATE, PackedSet
from fastat.system.errors import Failure, UserError

READ_THREADS = 8
"""Threads that read files ahead of DALI: they wait for the disk, not for a core."""


class _File(NamedTuple):
    """A clip as DALI reads it; for the fields see ``dali_check.Clips``."""

    encoded: NDArray[np.uint8]
    first: int
    length: int
    skip: int
    samples: int
    rate: int
    channels: int


class DaliSource:
    """Batches of the original files of ``packed``, decoded by DALI.

    Args:
        feature: with ``logmel64`` batches hold log-mels, already mixed; with others and None, int16
            waveforms.
        batch: number of clips in the largest plan.
        threads: number of DALI's threads.
        device: the device of the batches, on which DALI does all but decoding.
        max_bad: share of the set's clips that DALI may be unable to take.
        remove_mean: as ``Frontend``'s; only log-mels need it.
        queue: number of steps that DALI works ahead.

    At construction, DALI decodes every file once (``dali_check``). With several processes, one has
    to construct this before the others, which then find its result.

    Raises:
        UserError: DALI is not installed, or more than ``max_bad`` of the clips are bad.
    """

    bad: list[BadClip]
    """Rows that DALI cannot deliver, with path and reason."""
    usable: NDArray[np.bool_]
    """[N] whether a plan may hold the row, because it is not bad."""

    def __init__(
        self,
        packed: PackedSet,
        feature: str | None,
        *,
        batch: int,
        threads: int,
        device: torch.device,
        max_bad: float = 0.01,
        remove_mean: bool = True,
        queue: int = 2,
    ) -> None:
        self._graph = _import_graph()
        self.packed, self.device = packed, device
        self.log_mel = feature == "logmel64"
        self.clips = dali_check.check(packed, self._graph, threads)
        self.bad, self.usable = self.clips.bad, self.clips.usable
        if len(self.bad) > max_bad * packed.num_clips:
            reasons = Counter(clip.reason.split(":")[0] for clip in self.bad)
            counts = ", ".join(f"{n:,} {reason}" for reason, n in reasons.most_common())
            otherwise = "--source packed needs no files"
            if packed.codec == "none":
                otherwise = "another --codec than none packs what DALI cannot decode"
            raise UserError(
                f"DALI cannot take {len(self.bad):,} of {packed.num_clips:,} clips, more than "
                f"--max-bad {max_bad:g}: {counts}, such as {self.bad[0].path} "
                f"({self.bad[0].reason}); they are listed in "
                f"{packed.directory / dali_check.BAD_FILE}; {otherwise}"
            )
        cuda = device.type == "cuda"
        rates, channels = self.clips.rate[self.usable], self.clips.channels[self.usable]
        self.spec = self._graph.Spec(
            clip_samples=packed.clip_samples,
            remove_mean=remove_mean,
            resample=bool((rates != SAMPLE_RATE).any()),
            # At low rates the spectral images are close above the signal, and need more lobes.
            quality=100.0 if (rates < 22_050).any() else 50.0,
            add_channels=0 if np.isin(channels, (1, 2, 4, 8)).all() else int(channels.max()),
            gpu=cuda,
        )
        self.options = {
            "batch_size": batch if self.log_mel else 2 * batch,
            "num_threads": threads,
            "device_id": _cuda_index(device) if cuda else None,
            "prefetch_queue_depth": queue,
        }
        self._silence = _silent_file()
        self._readers = ThreadPoolExecutor(READ_THREADS, "fastat-dali-read")
        self._idle: _Run | None = None

    def batches(self, plans: Iterable[StepPlan]) -> Iterator[Batch]:
        """One batch a plan, in order, on the device; plans hold usable rows only.

        Raises:
            Failure: a file was removed or damaged after the check; names it.
        """
        # DALI's own queue works ahead of this one.
        for batch in prefetch(self._produce(plans), 1):
            yield to_device(batch, self.device)

    def close(self) -> None:
        """Frees the pipeline and closes the set's files."""
        self._idle = None
        self._readers.shutdown()
        self.packed.close()

    def _produce(self, plans: Iterable[StepPlan]) -> Iterator[Batch]:
        run, self._idle = self._idle or _Run(self), None
        for plan, output in run.outputs(iter(plans)):
            rows = plan.rows if self.log_mel else np.concatenate([plan.rows, plan.partners])
            yield Batch(
                rows=plan.rows,
                partners=plan.partners,
                target=mixed_targets(self.packed, plan),
                num_samples=torch.from_numpy(self.packed.num_samples[rows].astype(np.int64)),
                augment=augment_of(plan),
                **{"log_mel" if self.log_mel else "waveform": output},
            )
        # A run that did not come to its end still holds batches, and is not used again.
        self._idle = run

    def inputs(self, plan: StepPlan) -> list[Any]:
        """The inputs of the graph for a plan, see ``dali_graph``."""
        rows = np.concatenate([plan.rows, plan.partners])
        if not self.usable[rows].all():
            raise ValueError(f"rows: DALI cannot take {rows[~self.usable[rows]].tolist()}")
        clips = self.clips
        columns = zip(
            self._read(rows),
            clips.first[rows].tolist(),
            clips.length[rows].tolist(),
            clips.skip[rows].tolist(),
            self.packed.num_samples[rows].tolist(),
            clips.rate[rows].tolist(),
            clips.channels[rows].tolist(),
            strict=True,
        )
        files = [_File(*column) for column in columns]
        if not self.log_mel:
            return self._stream(files)
        # A static graph needs a partner for every clip: most are silence, which is cheap.
        B = len(plan.rows)
        partners = [self._silence] * B
        lam = np.ones(B, np.float32)
        for partner, i in zip(files[B:], plan.mix_into.tolist(), strict=True):
            partners[i] = partner
        lam[plan.mix_into] = plan.lam
        return [*self._stream(files[:B]), *self._stream(partners), lam]

    def _stream(self, files: list[_File]) -> list[Any]:
        """The inputs that ``Spec.stream`` names, of these files."""
        values = {
            "encoded": [file.encoded for file in files],
            "first": np.array([file.first for file in files], np.int32),
            "length": np.array([file.length for file in files], np.int32),
            "skip": np.array([file.skip for file in files], np.int32),
            "samples": np.array([file.samples for file in files], np.int32),
            "rate": np.array([file.rate for file in files], np.float32),
            "lowpass": [self._graph.lowpass(file.rate) for file in files],
            "channels": np.array([file.channels for file in files], np.float32),
        }
        return [values[name] for name in self.spec.stream]

    def _read(self, rows: NDArray[np.int64]) -> list[NDArray[np.uint8]]:
        paths = [path for path, _ in self.packed.sources(rows)]
        try:
            return list(self._readers.map(lambda path: np.fromfile(path, np.uint8), paths))
        except OSError as error:
            raise Failure(f"cannot read {error.filename}: {error.strerror}") from error

    def explain(self, plans: Iterable[StepPlan], error: RuntimeError) -> Failure:
        """An error that names the file of ``plans`` at which DALI failed."""
        rows = np.concatenate([rows for plan in plans for rows in (plan.rows, plan.partners)])
        paths = [path for path, _ in self.packed.sources(rows)]
        decoder = Decoder(self._graph, self._readers, threads=1)
        changed = []
        for row, path in zip(rows.tolist(), paths, strict=True):
            (found,) = decoder.look([path], [None])
            if isinstance(found, Refusal):
                return Failure(f"{path} changed after it was checked: {found.reason}")
            if found != Header(*self.clips.headers[row].tolist()):
                changed.append(path)
        if changed:  # not certain to be the cause: it may have been touched only
            return Failure(f"{changed[0]} changed after it was checked: it is another file now")
        return Failure(f"DALI failed: {self._graph.reason_of(error)} (files {paths[0]}, ...)")


class _Run:
    """A DALI pipeline, its input, and the plans that it is working on."""

    def __init__(self, source: DaliSource) -> None:
        self.source = source
        self.plans: Iterator[StepPlan] = iter(())
        self.under_way: deque[StepPlan] = deque()
        graph = source._graph
        build = graph.log_mel_pipeline if source.log_mel else graph.clips_pipeline
        self.pipe = build(source.spec, self._next, **source.options)
        self.pipe.build()

    def outputs(self, plans: Iterator[StepPlan]) -> Iterator[tuple[StepPlan, torch.Tensor]]:
        self.plans = plans
        cuda = self.source.device.type == "cuda"
        while True:
            # DALI also reclaims its memory on this stream, after the work that reads it.
            stream = torch.cuda.current_stream(self.source.device) if cuda else None
            try:
                (output,) = self.pipe.run(stream)
            except StopIteration:
                self.pipe.reset()
                return
            except RuntimeError as error:
                if isinstance(error, Failure):
                    raise
                raise self.source.explain(self.under_way, error) from error
            yield self.under_way.popleft(), torch.utils.dlpack.from_dlpack(output.as_tensor())

    def _next(self) -> list[Any]:
        """Called by DALI for the inputs of the next step; StopIteration ends the run."""
        plan = next(self.plans)
        inputs = self.source.inputs(plan)
        self.under_way.append(plan)
        return inputs


def _import_graph() -> ModuleType:
    try:
        from fastat.data import dali_graph
    except ImportError as error:
        raise UserError(
            f"--source dali needs NVIDIA DALI (pip install nvidia-dali-cuda130): {error}"
        ) from None
    return dali_graph


def _cuda_index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def _silent_file() -> _File:
    """A WAV file that holds one sample of silence."""
    file = io.BytesIO()
    sf.write(file, np.zeros(1, np.int16), SAMPLE_RATE, format="WAV", subtype="PCM_16")
    encoded = np.frombuffer(file.getvalue(), np.uint8)
    return _File(encoded, first=0, length=1, skip=0, samples=1, rate=SAMPLE_RATE, channels=1)
