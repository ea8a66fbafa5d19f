"""Packed sets for the benchmarks of reading, written without any audio to pack."""

import io
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from zlib_ng import zlib_ng

from fastat.audio.features import FEATURES
from fastat.data.shard_file import ShardInfo, ShardRows, write_shard
from fastat.data.shards import FORMAT, VERSION, write_index

SHARD_BYTES = 256 << 20


def write_set(
    directory: Path,
    target_bits: NDArray[np.uint8],  # [N, ceil(K / 8)]
    class_ids: Sequence[str],  # [K]
    *,
    clip_samples: int = 160_000,
    waveform: NDArray[np.int16] | None = None,  # [N, S]
) -> None:
    """A packed set at ``directory``, which must exist.

    Without ``waveform`` its rows are never written: they are holes in the shards, which take the
    room of their small datasets alone, and fail their CRC.
    """
    num_clips = len(target_bits)
    rows_per_shard = min(num_clips, SHARD_BYTES // (2 * clip_samples))
    shards: list[ShardInfo] = []
    for first in range(0, num_clips, rows_per_shard):
        rows = np.arange(first, min(first + rows_per_shard, num_clips))
        crc = np.zeros(len(rows), np.uint32)
        audio = None
        if waveform is not None:
            audio = io.BytesIO(waveform[rows].data)
            crc[:] = [zlib_ng.crc32(waveform[row]) for row in rows]
        names = [f"Y{row:011d}.wav" for row in rows]
        shard = ShardRows(
            np.full(len(rows), clip_samples, np.int32),
            target_bits[rows],
            np.array(names, np.bytes_),
            np.array([f"/datasets/audioset/unbalanced/{name}" for name in names], np.bytes_),
            np.zeros(len(rows)),
            crc,
        )
        path = directory / f"shard-{len(shards):05d}.h5"
        shards.append(write_shard(path, shard, "pcm16", clip_samples, audio))
    counts = np.zeros(len(class_ids), np.int64)
    for first in range(0, num_clips, 100_000):
        counts += np.unpackbits(
            target_bits[first : first + 100_000], axis=1, count=len(class_ids)
        ).sum(0, dtype=np.int64)
    index = {
        "format": FORMAT,
        "version": VERSION,
        "clips": num_clips,
        "clip_samples": clip_samples,
        "codec": "pcm16",
        "stats": {name: {"mean": math.nan, "std": math.nan, "clips": 0} for name in FEATURES},
        "shards": [info._asdict() for info in shards],
        "label_counts": counts.tolist(),
        "classes": [{"id": c, "name": c} for c in class_ids],
    }
    write_index(directory, index)
