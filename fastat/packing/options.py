"""The options of ``fastat pack``: what they may be, and what they make of a table."""

import os
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastat.packing.manifest import Entry, Manifest
from fastat.packing.split import Holdout, holdout_mask
from fastat.system.errors import UserError

CODECS = ("pcm16", "flac", "none")
MIN_CLIP_SECONDS, MAX_CLIP_SECONDS = 0.1, 1000.0
EVAL_SUFFIX = "-eval"

STATS_CLIPS = 1_000
"""Clips that the statistics are taken from. Features of a clip cost as much as decoding it, and
1,000 clips fix the mean to about 1 % of the scale that normalisation divides by (clip means of
AudioSet-like material spread by half a standard deviation: 0.5 / sqrt(1000) / 2 = 0.8 %)."""


def named(out: Path) -> Path:
    """``out`` with a name of its own, not ``.`` or ``..``; UserError if there is none."""
    out = Path(os.path.abspath(out)) if not out.name or out.name == ".." else out
    if not out.name:
        raise UserError(f"--out {out}: expected a folder of its own")
    return out


def check_ranges(
    clip_seconds: float | None, codec: str | None, workers: int | None, max_bad: float
) -> None:
    """Raises UserError when an option that --append has too is out of its range."""
    if codec is not None and codec not in CODECS:
        raise UserError(f"--codec: expected {', '.join(CODECS[:-1])} or {CODECS[-1]}, got {codec}")
    if clip_seconds is not None and not MIN_CLIP_SECONDS <= clip_seconds <= MAX_CLIP_SECONDS:
        raise UserError(
            f"--clip-seconds: expected {MIN_CLIP_SECONDS} to {MAX_CLIP_SECONDS}, "
            f"got {clip_seconds:g}"
        )
    if workers is not None and workers < 1:
        raise UserError(f"--workers: expected at least 1, got {workers}")
    if not 0.0 <= max_bad <= 1.0:
        raise UserError(f"--max-bad: expected a fraction from 0 to 1, got {max_bad:g}")


def check_split(holdout: float | Holdout | None, group_by: str | None, seed: int) -> None:
    if seed < 0:
        raise UserError(f"--seed: expected 0 or more, got {seed}")
    if isinstance(holdout, int | float) and not 0.0 < holdout < 1.0:
        raise UserError(f"--holdout: expected a fraction between 0 and 1, got {holdout:g}")
    if group_by is not None and isinstance(holdout, Holdout):
        raise UserError(f"--group-by: --holdout {holdout} says of each row where it goes")
    if group_by is not None and holdout is None:
        raise UserError("--group-by: only --holdout groups clips, and it is not given")


def split_table(
    manifest: Manifest, out: Path, holdout: float | Holdout | None, seed: int, source: Path
) -> list[tuple[str, Path, Manifest]]:
    """The sets to pack: role, folder, entries. Files bad from the start are the training set's,
    unless a column says where they belong."""
    if holdout is None:
        return [("set", out, manifest)]
    entries = manifest.good
    eval_out = out.with_name(out.name + EVAL_SUFFIX)
    if isinstance(holdout, Holdout):
        assert manifest.held is not None
        return [("train", out, manifest), ("eval", eval_out, manifest.held)]
    mask = holdout_mask(
        [entry.group for entry in entries], [entry.labels for entry in entries], holdout, seed
    )
    if entries and not mask.any():
        raise UserError(
            f"--holdout: nothing of {source} can be held out: no class has two groups to spread"
        )
    is_held = iter(mask)
    marked = [(entry, entry.bad is None and next(is_held)) for entry in manifest.entries]
    return [
        ("train", out, manifest._replace(entries=[entry for entry, held in marked if not held])),
        ("eval", eval_out, manifest._replace(entries=[entry for entry, held in marked if held])),
    ]


def sampled_clips(entries: Sequence[Entry], segments: bool, seed: int) -> NDArray[np.int64]:
    """How many clips of each entry to measure, [entries]: a function of the seed and the table.

    If a missing file is found later, at most one sampled file changes.
    """
    num_entries = len(entries)
    if num_entries <= STATS_CLIPS:
        each = STATS_CLIPS // max(num_entries, 1) if segments else 1
        return np.full(num_entries, each, np.int64)
    clips = np.zeros(num_entries, np.int64)
    order = np.random.default_rng([seed, 0x57A75]).permutation(num_entries).tolist()
    clips[list(islice((i for i in order if entries[i].bad is None), STATS_CLIPS))] = 1
    return clips
