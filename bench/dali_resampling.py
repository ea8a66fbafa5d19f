"""How far apart the log-mels of the packed source and of the DALI source are for another rate.

    python -m bench.dali_resampling FOLDER [--seconds 5] [--every 1]

Packs the files of FOLDER, takes 64-band log-mels of both sources (before normalisation, real
frames only) and prints |difference| in dB: median, 95 %, largest, for all values and for those
within 60 dB of their frame's peak; for the bands that end below 7 kHz, and the three at the edge.
"""

import argparse
import csv
import tempfile
from pathlib import Path

import numpy as np
import soundfile as sf
import torch
from numpy.typing import NDArray

from fastat.audio.features import FEATURES
from fastat.audio.frontend import Frontend
from fastat.data.dali import DaliSource
from fastat.data.loader import PackedSource, Source, evaluation_plans
from fastat.data.shards import PackedSet
from fastat.packing.pack import pack

BATCH = 20


def log_mels(source: Source, packed: PackedSet) -> NDArray[np.float32]:
    """The real frames of every clip, [frames, F]."""
    frontend = Frontend("logmel64", clip_samples=packed.clip_samples, normalize=False)
    frames = []
    for batch in source.batches(evaluation_plans(np.arange(packed.num_clips), BATCH)):
        real = frontend.feature.real_frames(batch.num_samples, packed.clip_samples)
        features = batch.features(frontend)
        frames += [clip[:count].numpy() for clip, count in zip(features, real, strict=True)]
    source.close()
    return np.concatenate(frames)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seconds", type=float, default=5.0, help="length of a clip")
    parser.add_argument("--every", type=int, default=1, help="take every n-th file")
    arguments = parser.parse_args()
    files = sorted(path for path in arguments.folder.iterdir() if path.is_file())
    files = files[:: arguments.every]
    rates = sorted({sf.info(path).samplerate for path in files})
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / "table.csv"
        with table.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("path", "labels"))
            writer.writerows((path.resolve(), "any") for path in files)
        pack(table, Path(folder) / "set", clip_seconds=arguments.seconds)
        packed = PackedSet.open(Path(folder) / "set")
        cpu = torch.device("cpu")
        want = log_mels(PackedSource(packed, cpu), packed)
        dali = DaliSource(packed, "logmel64", batch=BATCH, threads=2, device=cpu)
        got = log_mels(dali, packed)
    difference = np.abs(got - want)
    near = want >= want.max(1, keepdims=True) - 60.0
    bank = FEATURES["logmel64"].mel_bank()
    hz = np.arange(len(bank)) * 16_000 / 4096
    low, high = (hz[[np.flatnonzero(band)[end] for band in bank.T]] for end in (0, -1))
    groups = [("below 7 kHz", high <= 7_000)]
    groups += [(f"{low[k]:.0f}-{high[k]:.0f} Hz", np.arange(64) == k) for k in (61, 62, 63)]
    print(f"{len(files)} files at {rates} Hz, {len(want):,} frames; |DALI - packed| in dB")
    for name, bands in groups:
        everything = difference[:, bands]
        loud = everything[near[:, bands]]
        cells = [f"{name:>14}"]
        for label, values in (("all", everything.ravel()), ("within 60 dB of the peak", loud)):
            median, most = np.quantile(values, (0.5, 0.95)) if values.size else (0.0, 0.0)
            cells.append(
                f"{label}: median {median:.4f}, 95 % {most:.3f}, max {values.max(initial=0):.2f}"
            )
        print("; ".join(cells))


if __name__ == "__main__":
    main()
