"""dataset.json: what the shards of a set say, put together."""

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastat.data.shard_file import ShardInfo, ShardRows
from fastat.data.shards import FORMAT, SAMPLE_RATE, VERSION, ClassInfo, codec_of
from fastat.packing.bad_files import NotedFile
from fastat.packing.block import APPEND, Layout, Report, Sums
from fastat.packing.manifest import BadFile
from fastat.system.errors import UserError


@dataclass
class Content:
    """What shards hold, in their order."""

    label_counts: NDArray[np.int64]  # [K]
    shards: list[ShardInfo] = field(default_factory=list)
    reports: list[Report] = field(default_factory=list)
    clips: int = 0
    num_samples: int = 0
    """Without padding."""
    bad: list[BadFile] = field(default_factory=list)
    """Without those that an append tried again."""
    noted: list[NotedFile] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Of audio, without padding."""
        return self.num_samples / SAMPLE_RATE

    def add(self, info: ShardInfo, rows: ShardRows) -> Report:
        """Adds what a shard holds, and returns its report."""
        report = Report.parse(rows.block.tobytes(), info.file)
        self.shards.append(info)
        self.reports.append(report)
        self.clips += report.clips
        self.num_samples += report.num_samples
        bits = np.unpackbits(rows.target, axis=1, count=len(self.label_counts))
        self.label_counts += bits.sum(axis=0, dtype=np.int64)
        if report.command == APPEND and self.bad:
            tried = set(map(os.fsdecode, rows.audio_path)).union(file.path for file in report.bad)
            self.bad = [file for file in self.bad if file.path not in tried]
        self.bad += report.bad
        self.noted += report.noted
        return report


def index_of(
    directory: Path,
    content: Content,
    layout: Layout,
    classes: Iterable[ClassInfo],
    inputs: str,
    options: dict[str, Any],
) -> dict[str, Any]:
    """The index of the set of these shards.

    ``inputs`` is the fingerprint of what the command reads, ``options`` what it was told.

    Raises:
        UserError: its sampled clips give no statistics.
    """
    return {
        "format": FORMAT,
        "version": VERSION,
        "inputs": inputs,
        "clips": content.clips,
        "seconds": content.seconds,
        "bad_files": len(content.bad),
        "clip_seconds": layout.clip_samples / SAMPLE_RATE,
        "clip_samples": layout.clip_samples,
        "sample_rate": SAMPLE_RATE,
        "codec": layout.codec,
        "options": options,
        "stats": _stats(directory, content.reports),
        "shards": [info._asdict() for info in content.shards],
        "label_counts": content.label_counts.tolist(),
        "classes": [c._asdict() for c in classes],
    }


def grown_index(base: dict[str, Any], content: Content) -> dict[str, Any]:
    """The index of the set ``base`` after an append; ``content`` is of all its shards.

    Statistics, options and ``inputs`` stay those of the first pack: runs on the grown set are
    comparable with runs before, and the first command still finds its own set.
    """
    return base | {
        "clips": content.clips,
        "seconds": content.seconds,
        "appends": base.get("appends", 0) + 1,
        "appended_clips": base.get("appended_clips", 0) + content.clips - base["clips"],
        "bad_files": len(content.bad),
        "codec": codec_of(content.shards),
        "shards": [info._asdict() for info in content.shards],
        "label_counts": content.label_counts.tolist(),
    }


def _stats(directory: Path, reports: list[Report]) -> dict[str, dict[str, float]]:
    stats = {}
    for name in reports[0].sums:
        sums = Sums.over(report.sums[name] for report in reports)
        mean, std = sums.mean_and_std()
        if not std > 0.0:
            raise UserError(
                f"{directory}: no statistics of {name}: the {sums.clips} sampled clips are "
                "silent or too short for a frame"
            )
        stats[name] = {"mean": mean, "std": std, "clips": sums.clips}
    return stats
