"""A packed set of noise: what a step costs depends on the number of clips, not on their sound."""

import io
from pathlib import Path

import numpy as np
from zlib_ng import zlib_ng

from fastat.audio.features import CLIP_SAMPLES, FEATURES
from fastat.config.paper import NUM_CLASSES
from fastat.data.shard_file import ShardRows, write_shard
from fastat.data.shards import FORMAT, VERSION, PackedSet, write_index

NUM_CLIPS = 256
"""82 MB, which stay in the page cache."""


def noise_set(
    folder: Path,
    *,
    num_clips: int = NUM_CLIPS,
    clip_samples: int = CLIP_SAMPLES,
    num_classes: int = NUM_CLASSES,
) -> PackedSet:
    """Writes a packed set of white noise into ``folder``, which must exist, and opens it.

    Two labels a clip; statistics are the authors'. The same noise each time.

    Raises:
        OSError, Failure: the disk refuses.
    """
    rng = np.random.default_rng(0)
    waveform = rng.integers(-3000, 3000, (num_clips, clip_samples), np.int16)
    target = np.zeros((num_clips, num_classes), np.uint8)
    for _ in range(2):
        target[np.arange(num_clips), rng.integers(num_classes, size=num_clips)] = 1
    names = np.array([f"noise-{i}" for i in range(num_clips)], np.bytes_)
    rows = ShardRows(
        np.full(num_clips, clip_samples, np.int32),
        np.packbits(target, axis=1),
        names,
        names,
        np.zeros(num_clips),
        np.array([zlib_ng.crc32(row) for row in waveform], np.uint32),
    )
    path, audio = folder / "shard-00000.h5", io.BytesIO(waveform.data)
    info = write_shard(path, rows, "pcm16", clip_samples, audio)
    index = {
        "format": FORMAT,
        "version": VERSION,
        "clips": num_clips,
        "clip_samples": clip_samples,
        "codec": "pcm16",
        "stats": {f.name: {"mean": f.mean, "std": f.std, "clips": 0} for f in FEATURES.values()},
        "shards": [info._asdict()],
        "label_counts": target.sum(0, dtype=int).tolist(),
        "classes": [{"id": f"noise-{k}", "name": f"noise {k}"} for k in range(num_classes)],
    }
    write_index(folder, index)
    return PackedSet.open(folder)
